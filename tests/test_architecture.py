"""The rules that files and imports can show: what the engine may not import, and that no folder imports upwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import latentrt

ROOT = Path(latentrt.__file__).parents[2]
ENGINE, EXPORT = ROOT / "engine" / "latentrt", ROOT / "export" / "latentrt_export"
FORBIDDEN = {"torch", "diffusers", "transformers", "onnx", "latentrt_export"}
# From the bottom to the top; a module imports only from its own room and from rooms before it.
ROOMS = (
    *("errors", "values", "storage"),
    *("bundle", "adapters", "sampling", "guides", "request", "cuda", "runtime", "images", "model", "run"),
    *("drawing", "engine", "golden"),
    *("serve.core", "serve.process", "serve.http", "serve", "command", "__main__"),
)
EXPORT_ROOMS = (
    *("checkpoint", "graphs", "place", "describe", "variants", "int8", "existing", "golden", "to_bundle"),
    *("merge_bundle", "plans", "verify", "cli"),
)
MOST_FILES, MOST_LINES = 13, 350


def module_of(path: Path, root: Path = ENGINE) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def modules(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if module_of(path, root))


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it, by its full name; names imported from a module too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room_of(module: str, rooms: tuple[str, ...]) -> str:
    """Return the longest room that a module lies in."""
    return max((room for room in rooms if f"{module}.".startswith(f"{room}.")), key=len)


def higher(path: Path, root: Path, rooms: tuple[str, ...]) -> set[str]:
    """Return the modules that a file imports from rooms above its own."""
    package = f"{root.name}."
    used = {name.removeprefix(package) for name in imports(path) if name.startswith(package)}
    known = {module_of(one, root) for one in modules(root)}
    own = rooms.index(room_of(module_of(path, root), rooms))
    return {name for name in used & known if rooms.index(room_of(name, rooms)) > own}


@pytest.mark.parametrize("path", modules(ENGINE), ids=module_of)
def test_engine_needs_no_research_stack(path: Path) -> None:
    verbs = path.parent.name == "command"  # the verbs import the export side when they run
    allowed = {"latentrt_export"} if verbs else set()
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not roots & (FORBIDDEN - allowed)


@pytest.mark.parametrize("path", modules(ENGINE), ids=module_of)
def test_lower_rooms_never_import_higher_ones(path: Path) -> None:
    assert higher(path, ENGINE, ROOMS) == set()


def test_lower_rooms_of_export_never_import_higher_ones() -> None:
    found = {path: higher(path, EXPORT, EXPORT_ROOMS) for path in modules(EXPORT)}
    assert {path: names for path, names in found.items() if names} == {}


def test_nothing_imports_a_private_name_of_another_module() -> None:
    for path in (*modules(ENGINE), *modules(EXPORT)):
        private = {name for name in imports(path) if "latentrt" in name and name.rpartition(".")[2].startswith("_")}
        assert private <= {"latentrt.__version__"}, path


@pytest.mark.parametrize("folder", ["engine", "export", "tests", "benchmarks", "examples", "docs"])
def test_folders_and_files_are_small_enough_to_read(folder: str) -> None:
    paths = [path for kind in ("*.py", "*.cu", "*.js") for path in (ROOT / folder).rglob(kind)]
    files = Counter(path.parent for path in paths if path.name != "__init__.py")
    assert {folder: count for folder, count in files.items() if count > MOST_FILES} == {}
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize(
    "statement", ["import latentrt", "from latentrt import Engine", "from latentrt.command.main import main"]
)
def test_import_brings_no_research_stack(statement: str) -> None:
    code = (
        f"{statement}; import sys; print(sorted({{'torch', 'diffusers', 'transformers', 'onnx'}} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in latentrt.__all__:
        assert getattr(latentrt, name) is not None
    assert set(latentrt.__all__) <= set(dir(latentrt))
    with pytest.raises(AttributeError, match="nothing"):
        latentrt.nothing  # noqa: B018
