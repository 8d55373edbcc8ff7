"""`python -m benchmarks.serving.inside [FLAGS]` is `latentrt serve`, and logs each second what its allocators hold.

Resident memory is that and what they keep for later, so it says of a leak only that there may be one. Linux with glibc.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time

from latentrt.command.serve import serve

COMMAND = (sys.executable, "-m", "benchmarks.serving.inside")
EVENT = "allocated"


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, mallinfo(3)."""

    _fields_ = [
        ("before", 4 * ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),  # mapped, for what is large
        ("between", 2 * ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),  # handed out, of all arenas
        ("after", 2 * ctypes.c_size_t),
    ]


def _tell() -> None:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    while True:
        now = mallinfo()
        held = {"allocated": (now.uordblks + now.hblkhd) / 2**20, "blocks": sys.getallocatedblocks() / 1000}
        print(json.dumps({"event": EVENT, **held}), file=sys.stderr, flush=True)
        time.sleep(1)


if __name__ == "__main__":
    threading.Thread(target=_tell, daemon=True).start()
    serve()
