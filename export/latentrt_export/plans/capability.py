"""Which nodes of a bundle's graphs a library's parser refuses, and why: `latentrt build --check`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from latentrt.bundle.bundle import Bundle
from latentrt.runtime.tensorrt.library import Library
from latentrt.runtime.tensorrt.record import Profile
from latentrt_export.plans import building
from latentrt_export.plans.plan_graph import load_graph, serialized


@dataclass(frozen=True, slots=True)
class Refused:
    """A node that the parser cannot read: its operator, its name and the parser's words."""

    operator: str
    node: str
    why: str


@dataclass(frozen=True, slots=True)
class Capability:
    """How many nodes a network's graph has in the opset that the parser got, and what it refuses of it."""

    network: str
    opset: int
    nodes: int
    refused: tuple[Refused, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def capability(
    bundle: Bundle, library: Library, network: str, precision: str, profiles: Sequence[Profile]
) -> Capability:
    """Have the parser read a network's graph, and build nothing.

    Raises:
        PlanError: the graph is damaged.
        BackendError: the library needs a GPU for it and finds none.
    """
    graph, opset = bundle.spec.graph(network, precision), building.opset(library)
    model = load_graph(bundle, graph, profiles, opset)
    with tempfile.TemporaryDirectory(prefix="latentrt-") as folder:
        data, path = serialized(model, bundle.path(graph.path), Path(folder))
        return Capability(network, opset, len(model.graph), refused(library, data, path))


def refused(library: Library, data: bytes, path: Path) -> tuple[Refused, ...]:
    """Return what the parser refuses of a serialized model whose weights lie beside `path`.

    Raises:
        BackendError: the library needs a GPU for it and finds none.
    """
    logger = library.logger()
    builder = library.builder(logger)
    network = building.new_network(library, builder)
    parser = building.new_parser(library, network, logger)
    if parser.parse(data, str(path)):
        return ()
    nodes = onnx.ModelProto.FromString(data).graph.node
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [_refused(nodes, error.node(), error.desc()) for error in errors]
    return tuple(found) or (Refused("", "", logger.take_errors()),)


def _refused(nodes: Sequence[onnx.NodeProto], index: int, why: str) -> Refused:
    if not 0 <= index < len(nodes):
        return Refused("", "", why)
    return Refused(nodes[index].op_type, nodes[index].name or nodes[index].output[0], why)
