"""The house rules that imports can show: what the engine may not need, and that no layer looks up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine

ROOT = Path(engine.__file__).parents[1]
FORBIDDEN = {"torch", "diffusers", "transformers", "onnx", "export"}
SERVER = [
    *("config", "problems", "wire", "sd_wire", "ticket", "observer", "curve", "queue", "forecast", "desk", "stages"),
    *("studio", "worker", "clock", "service", "catalog", "pixels", "board", "metrics", "logs", "routes", "context"),
    *("records", "connection", "door", "gate", "drawing", "openai_api", "sdapi", "health", "page_route", "app"),
    *("server", "ray_app"),
]
# From the bottom to the top: the way of an image, and what surrounds it. A file imports only from files above it here.
LAYERS = [
    *("errors", "spec", "bundle", "seal", "plan_record", "plans", "prompt", "noise", "settings", "schedule", "spacing"),
    *("solvers.base", "solvers.training", "solvers.sigma", "solvers.exponential", "solvers", "trace", "table"),
    *("request", "guidance", "backends.base", "backends.kernels", "backends.nvrtc", "backends.driver", "backends.cuda"),
    *("backends.trt", "backends.refit", "backends.loaded", "backends.tensorrt"),
    *("backends.ort", "backends.lazy", "backends.fake", "backends"),
    *("models", "conditioning", "job", "lanes", "device_lanes", "one_launch", "denoiser", "image", "picture"),
    *("edit", "pipeline", "golden", "bench", "doctor", "output", "terminal", "arguments", "options"),
    *("serve", *(f"serve.{name}" for name in SERVER)),
    *("build_verb", "generate_verb", "serve_verb", "cli"),
]
SOURCES = sorted((ROOT / "engine").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "engine").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_engine_needs_no_research_stack(path: Path) -> None:
    verbs = module_of(path) in ("cli", "build_verb")  # what is exported and built is imported when they run
    allowed = {"export"} if verbs else set()
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not roots & (FORBIDDEN - allowed)


@pytest.mark.parametrize("path", [p for p in SOURCES if module_of(p)], ids=module_of)
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    own = LAYERS.index(module_of(path))
    used = {name.removeprefix("engine.") for name in imports(path) if name.startswith("engine.")}
    higher = {name for name in used if LAYERS.index(name) > own}
    assert higher == set()


def test_export_imports_only_the_engine_below_the_pipeline() -> None:
    for path in sorted((ROOT / "export").glob("*.py")):
        if path.stem in ("verify", "reference", "ranges", "cli", "build_cli"):  # these run the whole engine
            continue
        used = {name.removeprefix("engine.") for name in imports(path) if name.startswith("engine")}
        plans = {"plans", "plan_record", "backends.base", "backends.trt", "backends.cuda"}  # built with, for
        assert used <= {"engine", "errors", "spec", "bundle", "prompt", "schedule", *plans}


@pytest.mark.parametrize("statement", ["import engine", "from engine import Engine", "from engine.cli import latentrt"])
def test_import_brings_no_research_stack(statement: str) -> None:
    code = (
        f"{statement}; import sys; print(sorted({{'torch', 'diffusers', 'transformers', 'onnx'}} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in engine.__all__:
        assert getattr(engine, name) is not None
    assert set(engine.__all__) <= set(dir(engine))
    with pytest.raises(AttributeError, match="nothing"):
        engine.nothing  # noqa: B018
