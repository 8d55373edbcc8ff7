"""Channels last throughout: every convolution and group norm, and what stands between them, as (batch, ..., channels).

cuDNN's tensor-core kernels for half precision want channels last. Given channels first, they transpose activations
and weights in every call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from latentrt_export.graphs.fused.edit import (
    CONTRIB,
    FLOATS,
    Editor,
    is_fixed,
    made_by,
    number,
    numbers,
    sizes,
    take_over,
)

TO_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
TO_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2)}
STARTS = ("Conv", "GroupNorm")  # these become channels last whatever they read
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Sigmoid", "Cast", "Gelu", "Tanh", "Max", "Min")


def channels_last(model: ir.Model) -> int:
    """Move convolutions (to NhwcConv) and group norms to channels last, and all between them that can follow.

    A value and its twin, the same with channels last, are known together; a Transpose is made only where a node that
    cannot follow reads a value of which there is only the twin. Weights are transposed by nodes that a runtime computes
    when it loads the graph.

    Returns:
        How many nodes were moved.
    """
    return _Layout(Editor(model)).run()


def for_each_channel(value: ir.Value) -> ir.Value | None:
    """Return the (batch, channels) value that a (batch, channels, 1, 1) one is."""
    node = made_by(value, "Unsqueeze")
    axes = numbers(node.inputs[1]) if node is not None else None
    if node is None or axes is None or sorted(axes.tolist()) != [2, 3] or len(sizes(node.inputs[0])) != 2:
        return None
    return node.inputs[0]


class _Layout:
    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._last: dict[ir.Value, ir.Value] = {}  # a value's twin
        self._first: dict[ir.Value, ir.Value] = {}  # a value that was moved, made again from its twin
        self._moved: set[ir.Value] = set()
        self._whole: dict[ir.Value, ir.Value] = {}  # a shape, and that of the twin
        self._movers: dict[str, Callable[[ir.Node], bool]] = {
            "Conv": self._conv,
            "GroupNorm": self._group_norm,
            "Concat": self._concat,
            "Split": self._split,
            "Resize": self._resize,
            "Pad": self._pad,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
            "Shape": self._shape,
            "Unsqueeze": self._unsqueeze,
            "Squeeze": self._squeeze,
        } | dict.fromkeys(ELEMENTWISE, self._elementwise)

    def run(self) -> int:
        moved = 0
        for node in list(self._edit.graph):
            mover = self._movers.get(node.op_type)
            known = any(value in self._last for value in node.inputs)
            if mover is not None and (known or node.op_type in (*STARTS, "Transpose")) and mover(node):
                moved += node.op_type not in ("Transpose", "Shape")
                self._moved.update(node.outputs)
                continue
            for index, value in enumerate(node.inputs):
                if value in self._moved:
                    node.replace_input_with(index, self._as_first(value, node))
        for value in list(self._edit.graph.outputs):
            if value in self._moved:
                take_over(self._as_first(value, self._edit.graph[-1]), value)
        self._edit.tidy()
        return moved

    # --- both forms of a value ----------------------------------------------------------------------------------------

    def _as_last(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self._last:
            shape, name = self._permuted(value), f"{value.name}.last"
            if (vector := for_each_channel(value)) is not None:
                self._last[value] = self._edit(reader, "Unsqueeze", [vector, self._edit.whole(1, 2)], name, shape)
            else:
                perm = TO_LAST[len(shape)]
                self._last[value] = self._edit(reader, "Transpose", [value], name, shape, perm=perm)
        return self._last[value]

    def _as_first(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self._first:
            twin, perm = self._last[value], TO_FIRST[len(sizes(value))]
            self._first[value] = self._edit(reader, "Transpose", [twin], f"{value.name}.first", value.shape, perm=perm)
        return self._first[value]

    @staticmethod
    def _permuted(value: ir.Value) -> list[int | ir.SymbolicDim]:
        return [value.shape[i] for i in TO_LAST[len(value.shape)]]

    def _move(
        self, node: ir.Node, inputs: list[ir.Value | None], op: str = "", domain: str = "", **options: object
    ) -> bool:
        """Put the channels-last form of a node in front of it."""
        attributes = {name: attr for name, attr in node.attributes.items() if name not in options}
        made = ir.node(
            op or node.op_type,
            inputs,
            attributes=options,
            domain=domain or node.domain,
            num_outputs=len(node.outputs),
            name=f"{node.outputs[0].name}.last",
        )
        made.attributes.update(attributes)
        self._edit.graph.insert_before(node, made)
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name, new.dtype = f"{old.name}.last", old.dtype
            new.shape = ir.Shape(self._permuted(old))
            self._last[old] = new
        return True

    # --- what moves, and how ------------------------------------------------------------------------------------------

    def _conv(self, node: ir.Node) -> bool:
        x, weight, *bias = node.inputs
        if len(sizes(x)) != 4 or x.dtype not in FLOATS or not is_fixed(weight):
            return False
        shape = [weight.shape[i] for i in TO_LAST[4]]
        name = f"{node.outputs[0].name}.weight"
        turned = self._edit(node, "Transpose", [weight], name, shape, perm=TO_LAST[4])
        self._edit.model.opset_imports[CONTRIB] = 1
        return self._move(node, [self._as_last(x, node), turned, *bias], "NhwcConv", CONTRIB)

    def _group_norm(self, node: ir.Node) -> bool:
        if number(node, "channels_last", 1):
            return False
        return self._move(node, [self._as_last(node.inputs[0], node), *node.inputs[1:]], channels_last=1)

    def _elementwise(self, node: ir.Node) -> bool:
        axes = len(sizes(node.outputs[0]))
        if axes not in TO_LAST:
            return False
        scalars = {value for value in node.inputs if value is not None and set(sizes(value)) <= {1} and is_fixed(value)}
        if any(len(sizes(value)) != axes for value in node.inputs if value not in scalars):
            return False
        return self._move(node, [v if v in scalars else self._as_last(v, node) for v in node.inputs])

    def _concat(self, node: ir.Node) -> bool:
        axes = len(sizes(node.outputs[0]))
        if axes not in TO_LAST:
            return False
        axis = TO_LAST[axes].index(int(number(node, "axis", 0)) % axes)
        return self._move(node, [self._as_last(v, node) for v in node.inputs], axis=axis)

    def _split(self, node: ir.Node) -> bool:
        axes = len(sizes(node.inputs[0]))
        if axes not in TO_LAST:
            return False
        axis = TO_LAST[axes].index(int(number(node, "axis", 0)) % axes)
        return self._move(node, [self._as_last(node.inputs[0], node), *node.inputs[1:]], axis=axis)

    def _resize(self, node: ir.Node) -> bool:
        x, *rest = node.inputs
        if len(sizes(x)) != 4 or "axes" in node.attributes or any(v is not None for v in rest[:1]):
            return False
        return self._move(
            node, [self._as_last(x, node), *(None if v is None else self._reordered(v, node) for v in rest)]
        )

    def _pad(self, node: ir.Node) -> bool:
        x, pads, *value = node.inputs
        known = numbers(pads)
        if len(sizes(x)) != 4 or value[1:] or known is None:
            return False
        turned = known.reshape(2, 4)[:, list(TO_LAST[4])].reshape(8)
        return self._move(node, [self._as_last(x, node), self._edit.constant(turned), *value])

    def _reordered(self, vector: ir.Value, reader: ir.Node) -> ir.Value:
        """Return a number for each axis (a shape, scales) in the order of channels last."""
        if (known := numbers(vector)) is not None:
            return self._edit.constant(known[list(TO_LAST[4])]) if known.size else vector
        order = self._edit.whole(*TO_LAST[4])
        return self._edit(reader, "Gather", [vector, order], f"{reader.outputs[0].name}.order", [4])

    def _transpose(self, node: ir.Node) -> bool:
        """A Transpose to channels last is the twin itself; one from channels last has its input as its twin."""
        x, y = node.inputs[0], node.outputs[0]
        perm, axes = tuple(node.attributes["perm"].as_ints()), len(sizes(x))
        if axes not in TO_LAST or is_fixed(x):
            return False
        if x in self._last and perm == TO_LAST[axes]:
            if y.is_graph_output():
                return False
            ir.convenience.replace_all_uses_with(y, self._last[x])
            return True
        if x not in self._moved and perm == TO_FIRST[axes]:
            self._last[y] = x
            return True
        return False

    def _reshape(self, node: ir.Node) -> bool:
        """Reshapes that join or split the axes behind the channels: (b, c, h, w) and (b, c, tokens)."""
        x, y = node.inputs[0], node.outputs[0]
        before, after = sizes(x), sizes(y)
        if before[:2] != after[:2] or not isinstance(before[1], int):
            return False
        if (len(before), len(after)) == (4, 3):
            return self._move(node, [self._last[x], self._edit.whole(0, -1, before[1])])
        if (len(before), len(after)) == (3, 4):
            target = self._whole.get(node.inputs[1]) or self._reordered(node.inputs[1], node)
            return self._move(node, [self._last[x], target])
        return False

    def _shape_of(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        name = f"{reader.outputs[0].name}.sizes"
        return self._edit(reader, "Shape", [value], name, [len(sizes(value))], dtype=ir.DataType.INT64)

    def _shape(self, node: ir.Node) -> bool:
        """Read a shape off the twin: shapes are small numbers on the host."""
        x, y = node.inputs[0], node.outputs[0]
        if x not in self._moved or y.is_graph_output():
            return False
        axes = len(sizes(x))
        whole = self._shape_of(self._last[x], node)
        wanted = TO_FIRST[axes][slice(number(node, "start", 0), number(node, "end", axes))]
        order = self._edit.constant(np.array(wanted, np.int64))
        made = self._edit(node, "Gather", [whole, order], f"{y.name}.first", y.shape)
        ir.convenience.replace_all_uses_with(y, made)
        if len(wanted) == axes:
            self._whole[made] = whole
        return True

    def _unsqueeze(self, node: ir.Node) -> bool:
        """(b, c, tokens) as (b, c, tokens, 1)."""
        axes = numbers(node.inputs[1])
        if len(sizes(node.inputs[0])) != 3 or axes is None or axes.tolist() != [3]:
            return False
        return self._move(node, [self._last[node.inputs[0]], self._edit.whole(2)])

    def _squeeze(self, node: ir.Node) -> bool:
        axes = numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        if len(sizes(node.inputs[0])) != 4 or axes is None or axes.tolist() != [3]:
            return False
        return self._move(node, [self._last[node.inputs[0]], self._edit.whole(2)])
