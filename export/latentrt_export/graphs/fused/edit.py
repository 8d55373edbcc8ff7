"""What the passes share: find the nodes around a value, put nodes in front of one, take a value's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

CONTRIB = "com.microsoft"
SINGLE = ir.DataType.FLOAT
FLOATS = (SINGLE, ir.DataType.FLOAT16)
PREPARES = ("Cast", "Transpose", "Reshape", "Concat")  # what a runtime computes from weights when it loads a graph
Sizes = tuple[Any, ...]  # whole numbers, and the names of those that are free


class Editor:
    """Adds nodes to a graph, each named after its first output."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph: ir.Graph = model.graph

    def __call__(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: Sequence[Any] | None,
        *,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Put a node in front of `before` and return its one output, by default of its first input's type."""
        if domain == CONTRIB:
            self.model.opset_imports[CONTRIB] = 1
        node = ir.node(op, inputs, attributes=attributes, domain=domain, name=name)
        self.graph.insert_before(before, node)
        result: ir.Value = node.outputs[0]
        first = inputs[0]
        assert first is not None
        result.name, result.dtype = name, dtype or first.dtype
        if shape is not None:
            result.shape = ir.Shape(shape)
        return result

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """Return the graph's initializer with these few numbers; make it if missing."""
        flat = array.reshape(-1).tolist()
        name = "_".join(("fixed", array.dtype.name, *map(str, array.shape), "of", *(f"{x:g}" for x in flat)))
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def whole(self, *values: int) -> ir.Value:
        """Return a vector of whole numbers, such as a Reshape's target."""
        return self.constant(np.array(values, np.int64))

    def tidy(self) -> None:
        """Put nodes behind what they read and drop those that nothing reads."""
        self.graph.sort()
        common.RemoveUnusedNodesPass()(self.model)


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Put `new` in the place of `old`, under the same name."""
    name, new.shape, new.type = old.name, old.shape, old.type
    old.name = f"{name}.before"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name = name


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def only_reader(value: ir.Value, op: str = "") -> ir.Node | None:
    """Return the one node that reads a value, once; None if others do too, or if it is of another operator."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    node: ir.Node = uses[0].node
    return node if op in ("", node.op_type) else None


def is_fixed(value: ir.Value | None) -> bool:
    """Return whether a value is a weight or constant, or prepared from such alone."""
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return bool(value.is_initializer())
    return node.op_type in PREPARES and all(is_fixed(v) for v in node.inputs)


def numbers(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the numbers of a small constant of the graph."""
    if value is None or not value.is_initializer() or isinstance(value.const_value, ir.ExternalTensor):
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def sizes(value: ir.Value | None) -> Sizes:
    """Return a value's shape with symbols as text; () if it is not known."""
    if value is None or value.shape is None:
        return ()
    return tuple(side if isinstance(side, int) else side.value for side in value.shape)


def same_sizes(a: ir.Value, b: ir.Value) -> bool:
    """Return whether two values are known to have one shape."""
    return sizes(a) == sizes(b) != () and None not in sizes(a)


def is_vector(value: ir.Value | None, size: Any) -> bool:
    """Return whether a value is a weight of one axis, of that length."""
    return isinstance(size, int) and sizes(value) == (size,) and is_fixed(value)


def split_bias(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return x and b if a value is x + b, read once, with a weight b for the last axis."""
    return biased(value) if only_reader(value) is not None else None


def biased(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return x and b if a value is x + b with a weight b for the last axis."""
    add = made_by(value, "Add")
    if add is None:
        return None
    for x, bias in (add.inputs, add.inputs[::-1]):
        if is_vector(bias, sizes(x)[-1] if sizes(x) else None) and not is_fixed(x) and x.dtype == bias.dtype:
            return x, bias
    return None


def number(node: ir.Node, name: str, default: float) -> Any:
    """Return a node's attribute."""
    return node.attributes[name].value if name in node.attributes else default


def carried_bias(value: ir.Value) -> ir.Value | None:
    """Return the bias of the convolution that makes a value, or of the tokens that it is reshaped from.

    Only if nothing else reads what it was added to, so that it can be taken off.
    """
    node = value.producer()
    if node is None or only_reader(value) is None:
        return None
    if node.op_type == "NhwcConv" and len(node.inputs) == 3:
        return node.inputs[2]
    parts = split_bias(node.inputs[0]) if node.op_type == "Reshape" else None
    return parts[1] if parts is not None and is_vector(parts[1], sizes(value)[-1]) else None


def take_biases(edit: Editor, reader: ir.Node, *values: ir.Value) -> ir.Value | None:
    """Take the biases that these values carry off them, for a sum of the values; return the one bias, or None.

    Two (a block's last convolution and that of its residual) are added when the graph is loaded.
    """
    biases = []
    for value in values:
        if (bias := carried_bias(value)) is not None:
            node = value.producer()
            assert node is not None
            if node.op_type == "NhwcConv":
                node.resize_inputs(2)
            elif (parts := split_bias(node.inputs[0])) is not None:
                node.replace_input_with(0, parts[0])
            biases.append(bias)
    if len(biases) < 2:
        return biases[0] if biases else None
    return sum_of_biases(edit, reader, biases)


def sum_of_biases(edit: Editor, reader: ir.Node, biases: Sequence[ir.Value]) -> ir.Value:
    """Return the sum of two biases, for a node, which a runtime computes when it loads the graph.

    In float32: ONNX Runtime does it on the CPU, where it has no Add of float16.
    """
    name, dtype = f"{reader.outputs[0].name}.bias", biases[0].dtype
    wide = [in_single(edit, reader, bias, f"{name}.{index}") for index, bias in enumerate(biases)]
    total = edit(reader, "Add", wide, f"{name}.sum", biases[0].shape)
    return total if dtype == SINGLE else edit(reader, "Cast", [total], name, total.shape, dtype=dtype, to=dtype)


def in_single(edit: Editor, before: ir.Node, weight: ir.Value, name: str) -> ir.Value:
    """Return a weight in float32: the stored numbers, not those rounded to float16."""
    cast = made_by(weight, "Cast")
    source = cast.inputs[0] if cast is not None and cast.inputs[0].is_initializer() else weight
    if source.dtype == SINGLE:
        return source
    return edit(before, "Cast", [source], name, source.shape, dtype=SINGLE, to=SINGLE)
