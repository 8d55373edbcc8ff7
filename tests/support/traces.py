"""Traces kept for the tests that export a checkpoint of the same structure again: they take most of an export's time.

A test of tracing itself imports `trace` by its name, and gets the function as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODULE = "latentrt_export.graphs.to_onnx"
WHERE_FROM = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")  # of a config


def keep(folder: Path) -> None:
    """Let exports in this process take their traces from a folder of graphs, and put them there."""
    module: Any = sys.modules.get(MODULE)
    if module is not None and not hasattr(module.trace, "traced"):
        module.trace = _kept(module.trace, folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other workers out."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _kept(trace: Callable[[Any], Any], folder: Path) -> Callable[[Any], Any]:
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    folder.mkdir(exist_ok=True)

    def kept(network: Any) -> ir.Model:
        path = folder / f"{_structure(network)}.onnx"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                ir.save(trace(network), path)
            model = ir.load(path)
        weights = network.module.state_dict()
        for name, value in model.graph.initializers.items():
            if name in weights:
                value.const_value = TorchTensor(weights[name], name=name)
        return model

    kept.traced = trace  # type: ignore[attr-defined]
    return kept


def _structure(network: Any) -> str:
    """Return a digest of all that a trace depends on: modules, settings, shapes and inputs, but no weights."""
    module = network.module
    config = module.model.config
    settings = dict(config) if hasattr(config, "keys") else config.to_dict()
    facts = (
        repr(module),
        sorted((name, repr(value)) for name, value in settings.items() if name not in WHERE_FROM),
        sorted((name, value) for name, value in vars(module).items() if isinstance(value, int)),
        sorted((name, tuple(value.shape)) for name, value in module.state_dict().items()),
        [(one.name, str(one.example.dtype), tuple(one.example.shape), dict(one.axes)) for one in network.inputs],
        network.outputs,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
