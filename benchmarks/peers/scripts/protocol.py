"""What every peer's script does: answer requests, one JSON object a line, until there are no more.

It runs in the peer's own environment, so it imports nothing but the standard library. Requests are
{"do": "load", "settings": ...} and {"do": "draw", "task": ..., "save": stem of the files or null}.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path


def serve(load):
    """Answer the requests on standard input.

    Args:
        load: a function of the settings that loads the model and returns a function of a task that returns its
            pictures, as uint8 arrays or PIL images.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print what they like, and answers are not mixed with it
    draw = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                draw = load(request["settings"])
                answer = {"versions": {name: version(name) for name in request["settings"]["packages"]}}
            else:
                start = time.perf_counter()
                pictures = draw(request["task"])
                answer = {"seconds": time.perf_counter() - start, "pictures": len(pictures)}
                if request["save"]:
                    save(pictures, request["save"])
        except Exception as error:  # any error is the reason why there is no figure
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({**answer, "peak": peak()}), file=answers, flush=True)


def save(pictures, stem):
    """Write pictures as PNG: STEM-0.png and so on."""
    from PIL import Image

    for index, picture in enumerate(pictures):
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        image.save(f"{stem}-{index}.png")


def peak():
    """Return the most bytes of memory that this process ever had at once (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
