"""latentrt's own files: where caches lie, whole files or none, and which files are trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from latentrt.errors import UntrustedFileError
from latentrt.storage import cache_folder, check_trusted, read_trusted, remove_parts, write_atomic


@pytest.mark.parametrize("root", ["", "relative", "absolute"])
def test_the_cache_is_where_xdg_says(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if root == "absolute" else root)
    folder = tmp_path / ("xdg" if root == "absolute" else ".cache")
    assert cache_folder("plans", "emoji") == folder / "latentrt" / "plans" / "emoji"
    assert not folder.exists()


def test_a_user_whom_the_system_does_not_know_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    assert cache_folder("graphs") == Path("/.cache/latentrt/graphs")


# Writing


@pytest.mark.parametrize(
    ("mode", "file", "folder"), [(0o666, 0o644, 0o755), (0o644, 0o644, 0o755), (0o600, 0o600, 0o700)]
)
def test_new_files_and_folders_have_the_mode(tmp_path: Path, mode: int, file: int, folder: int) -> None:
    before = os.umask(0o022)
    try:
        write_atomic(tmp_path / "new" / "file", b"data", mode)
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "file").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == file
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == folder


def test_views_are_written_and_files_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, memoryview(b"new data")[:3])
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(*((os, "fsync", fail) if function == "fsync" else (Path, "replace", fail)))
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_parts_of_a_killed_process_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [tmp_path / name for name in ("film.mkv.part", ".film.part", "file", ".x.0123456789abcdef.part~")]
    for path in kept:
        path.write_bytes(b"somebody's")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: None)  # a process that is killed here
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # cleans nothing up
        write_atomic(tmp_path / "file.plan", b"half")
    assert len(list(tmp_path.iterdir())) == 5
    remove_parts(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


# Trust


def status(user: int, mode: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, user, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o600, 0o644, 0o400, 0o555])
@pytest.mark.parametrize("user", ["own", "root"])
def test_own_and_roots_files_are_trusted(user: str, mode: int) -> None:
    check_trusted(Path("file"), status(os.getuid() if user == "own" else 0, mode))


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o664, 0o646, 0o020, 0o002, 0o1777])
def test_files_that_others_can_write_are_not(mode: int) -> None:
    with pytest.raises(UntrustedFileError) as caught:
        check_trusted(Path("a file"), status(os.getuid(), mode))
    assert caught.value.found == f"a file has mode {mode:o}"
    assert "root as its owner, and no other user who may write to it" in caught.value.needed
    assert caught.value.fix.startswith("chmod go-w 'a file', if you trust")


def test_files_of_another_user_are_not() -> None:
    with pytest.raises(UntrustedFileError) as caught:
        check_trusted(Path("file"), status(54321, 0o600))
    assert caught.value.found == "file belongs to user 54321"
    assert caught.value.fix.startswith("sudo chown -R root file, if you trust")


def test_a_file_is_read_where_it_and_its_folder_are_trusted(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomic(path, b"code", 0o644)
    assert read_trusted(path) == b"code"
    for each, mode in ((path, 0o664), (path.parent, 0o775)):
        before = stat.S_IMODE(each.stat().st_mode)
        each.chmod(mode)
        with pytest.raises(UntrustedFileError, match=f"{each} has mode"):
            read_trusted(path)
        each.chmod(before)
    with pytest.raises(FileNotFoundError):
        read_trusted(path.parent / "none")


def test_of_a_link_counts_what_it_leads_to(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    write_atomic(path, b"code", 0o644)
    link.symlink_to(path)
    assert read_trusted(link) == b"code"
    path.chmod(0o666)
    with pytest.raises(UntrustedFileError):
        read_trusted(link)
