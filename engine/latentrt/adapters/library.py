"""LoRAs that requests have by name: the files of a folder, or files that were given with names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from latentrt.adapters.files import located
from latentrt.errors import AdapterError
from latentrt.values import did_you_mean

ENDING = ".safetensors"
Given = Mapping[str, str | Path] | str | Path


class File(NamedTuple):
    """A file as it is now: a later one of that name differs in the time or the size."""

    path: Path
    time: int
    size: int


class Library:
    """LoRAs by the names that requests have for them.

    A folder is listed anew at each use, so that files may come and go. A file's name without its ending is the LoRA's.
    Names are looked up among the files that lie in the folder itself, so that none leads out of it; nor may a link.

    Args:
        given: files by name, or a folder of .safetensors files.

    Raises:
        AdapterError: a file or the folder is not there.
    """

    def __init__(self, given: Given) -> None:
        self._folder: Path | None = None
        self._files: dict[str, Path] = {}
        if isinstance(given, Mapping):
            self._files = {name: located(Path(path)) for name, path in given.items()}
            return
        self._folder = Path(given)
        if not self._folder.is_dir():
            fix = "pass {'name': file} for files"
            raise AdapterError(f"there is no folder {given}", needed="a folder of LoRAs", fix=fix)

    @property
    def files(self) -> dict[str, Path]:
        """The files by name, in the names' order."""
        if self._folder is None:
            return dict(self._files)
        root = self._folder.resolve()
        paths = sorted(path for path in self._folder.glob(f"*{ENDING}") if path.is_file())
        return {path.stem: path for path in paths if path.resolve().parent == root}

    def find(self, name: str) -> File:
        """Return the file of a name.

        Raises:
            AdapterError: there is none, or it cannot be read.
        """
        files = self.files
        if name not in files:
            where = "" if self._folder is None else f", a {ENDING} in the folder of LoRAs"
            shown = ", ".join(list(files)[:8]) or "none"
            fix = did_you_mean(name, files, f"those that are there: {shown}")
            raise AdapterError(f"there is no LoRA {name!r}", needed=f"the name of one{where}", fix=fix)
        try:
            facts = files[name].stat()
        except OSError as error:
            raise AdapterError(f"the LoRA {name!r} cannot be read ({error.strerror})", needed="its file") from error
        return File(files[name], facts.st_mtime_ns, facts.st_size)
