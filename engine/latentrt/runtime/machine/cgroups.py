"""The control groups of this process, of both versions: where the system says what it may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SYSTEM = Path("/")


def control_groups(system: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the process' control groups, of each up to the top that is mounted, and the version.

    Args:
        system: the root of the file system; /proc and /sys are read below it.
        controller: what the groups limit: "cpu" or "memory".
    """
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = [line.split(":", 2)[1:] for line in lines]
        mounts = [_mount(line) for line in (system / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # no Linux, or another's idea of it
        return
    for controllers, path in own:
        for kind, options, root, point in mounts:
            version = 1 if controllers else 2
            if kind != ("cgroup" if controllers else "cgroup2"):
                continue
            if controllers and not (controller in controllers.split(",") and controller in options):
                continue
            top = system / point.lstrip("/")
            inside = PurePosixPath(path)
            # A container sees its own group as the root of the mount; a path beyond that is none of its own.
            below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
            parts = [] if ".." in below.parts else below.parts
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth]), version


def _mount(line: str) -> tuple[str, list[str], str, str]:
    """Return a mount's kind, options of its file system, root and mount point from a line of mountinfo."""
    before, _, after = line.partition(" - ")
    kind, _, options = ([*after.split(" "), "", ""])[:3]
    root, point = before.split(" ")[3:5]
    return kind, options.split(","), _plain(root), _plain(point)


def _plain(path: str) -> str:
    """Return a path of mountinfo, where spaces and the like are octal numbers."""
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
