"""A graph with ONNX Runtime's own operators, interpreted: those in numpy, the others by ONNX Runtime's CPU kernels.

From the specification, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, with layouts as the
CUDA kernels take them. Numbers are float32 inside a node and are rounded where the CUDA kernels round: at outputs, and
where a sum is kept before it is normalized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from scipy.special import erf, expit

Array = NDArray[Any]
Results = dict[str, Array]


def interpret(model: ir.Model, folder: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """Return the outputs of a graph whose weights lie in `folder`."""
    values: dict[str, Array] = dict(feeds)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor = ir.ExternalTensor(
                tensor.location, tensor.offset, tensor.length, tensor.dtype,
                shape=tensor.shape, name=name, base_dir=folder,
            )  # fmt: skip
        values[name] = tensor.numpy()
    for node in model.graph:
        inputs = [None if value is None else values[value.name] for value in node.inputs]
        run = CONTRIB.get(node.op_type) if node.domain == "com.microsoft" else None
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        results = run(*inputs, **attributes) if run is not None else _ordinary(node, model.opset_imports[""], inputs)
        for value, result in zip(node.outputs, results if isinstance(results, list) else [results], strict=False):
            if value.name:
                values[value.name] = result
                assert value.dtype.numpy() == result.dtype, f"{node.op_type} {value.name}"
    return [values[value.name] for value in model.graph.outputs]


SESSIONS: dict[bytes, Any] = {}


def _ordinary(node: ir.Node, opset: int, inputs: list[Array | None]) -> list[Array]:
    proto = ir.to_proto(node)
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(inputs)]
    given = [(name, x) for name, x in zip(names, inputs, strict=True) if x is not None]
    del proto.input[:], proto.output[:], proto.metadata_props[:]
    proto.name = "node"
    proto.input.extend(names)
    proto.output.extend(f"o{i}" for i in range(len(node.outputs)))
    infos = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given]
    outs = [helper.make_empty_tensor_value_info(name) for name in proto.output]
    # Sizes that are inputs are made constants: some kernels want to know them when they are loaded.
    whole = [numpy_helper.from_array(x, name) for name, x in given if x.dtype == np.int64 and x.ndim < 2 and x.size < 9]
    graph = helper.make_graph([proto], "node", infos, outs, whole)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if len(model.opset_import) and node.domain:
        model.opset_import.append(helper.make_opsetid(node.domain, 1))
    key = model.SerializeToString(deterministic=True)
    if key not in SESSIONS:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        inferred = onnx.shape_inference.infer_shapes(model) if not node.domain else model
        SESSIONS[key] = onnxruntime.InferenceSession(
            inferred.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    results: list[Array] = SESSIONS[key].run(None, dict(given))
    return results


# --- the operators ----------------------------------------------------------------------------------------------------


def group_norm(x: Array, gamma: Array, beta: Array, **options: Any) -> Array:
    assert gamma.dtype == beta.dtype == np.float32, "the CUDA kernel takes no others"
    assert gamma.shape == beta.shape
    last = options.get("channels_last", 1)
    wide = x.astype(np.float32) if last else np.moveaxis(x.astype(np.float32), 1, -1)
    (batch, height, width, channels), groups = wide.shape, options["groups"]
    assert gamma.shape == (channels,)
    assert (channels // groups) % 2 == 0, "the CUDA kernel refuses it"
    grouped = wide.reshape(batch, height * width, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdims=True, dtype=np.float64)
    variance = grouped.var((1, 3), keepdims=True, dtype=np.float64)
    normal = ((grouped - mean) / np.sqrt(variance + options["epsilon"])).reshape(wide.shape)
    result = gamma * normal + beta
    if options["activation"]:
        result = result * expit(result)
    return (result if last else np.moveaxis(result, -1, 1)).astype(x.dtype)


def skip_group_norm(
    x: Array, gamma: Array, beta: Array, skip: Array, bias: Array | None = None, **options: Any
) -> list[Array]:
    assert options["channels_last"] == 1
    batch, *_, channels = x.shape
    assert skip.shape in (x.shape, (batch, channels), (batch, 1, 1, channels))
    assert {x.dtype, skip.dtype, *([] if bias is None else [bias.dtype])} == {x.dtype}
    wide = skip if skip.ndim == 4 else skip[:, None, None]
    total = (x if bias is None else x + bias) + wide
    return [group_norm(total, gamma, beta, **options), total]


def nhwc_conv(x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
    assert options.get("group", 1) == 1
    assert x.dtype == weight.dtype
    out, rows, columns, channels = weight.shape
    assert (rows, columns) == tuple(options.get("kernel_shape", (rows, columns)))
    assert channels == x.shape[3]
    top, left, bottom, right = options.get("pads", (0, 0, 0, 0))
    (down, across), (tall, broad) = options.get("strides", (1, 1)), options.get("dilations", (1, 1))
    wide = np.pad(x.astype(np.float32), ((0, 0), (top, bottom), (left, right), (0, 0)))
    height = (wide.shape[1] - tall * (rows - 1) - 1) // down + 1
    width = (wide.shape[2] - broad * (columns - 1) - 1) // across + 1
    result = np.zeros((x.shape[0], height, width, out), np.float32)
    for i in range(rows):
        for j in range(columns):
            part = wide[:, i * tall :, j * broad :][:, : down * height : down, : across * width : across]
            flat = np.ascontiguousarray(part).reshape(-1, channels)  # strided, numpy would not use BLAS
            result += (flat @ np.ascontiguousarray(weight[:, i, j].astype(np.float32).T)).reshape(result.shape)
    result = result.astype(x.dtype)
    return result if bias is None else result + bias


def bias_split_gelu(x: Array, bias: Array) -> Array:
    assert x.ndim == 3
    assert x.shape[2] in (2560, 5120, 10240), "the CUDA kernel refuses it"
    left, right = np.split((x + bias).astype(np.float32), 2, axis=-1)
    return (left * _gelu(right)).astype(x.dtype)


def bias_gelu(x: Array, bias: Array) -> Array:
    return _gelu((x + bias).astype(np.float32)).astype(x.dtype)


def _gelu(x: Array) -> Array:
    return x * np.float32(0.5) * (erf(x / np.float32(np.sqrt(2))) + np.float32(1))


def bias_add(x: Array, bias: Array, skip: Array) -> Array:
    assert x.ndim == 3
    assert x.shape == skip.shape
    assert bias.shape == x.shape[2:]
    assert x.shape[2] in (320, 640, 1280), "the CUDA kernel of older releases refuses it"
    return x + bias + skip


def skip_layer_norm(
    x: Array, skip: Array, gamma: Array, beta: Array, bias: Array | None = None, *, epsilon: float
) -> list[Array | None]:
    assert x.shape == skip.shape, "strict mode takes no others"
    wide = x.astype(np.float32) + skip.astype(np.float32) + (0 if bias is None else bias.astype(np.float32))
    mean = wide.mean(-1, keepdims=True, dtype=np.float64)
    variance = wide.var(-1, keepdims=True, dtype=np.float64)
    normal = ((wide - mean) / np.sqrt(variance + epsilon)).astype(np.float32)
    result = gamma.astype(np.float32) * normal + beta.astype(np.float32)
    return [result.astype(x.dtype), None, None, wide.astype(x.dtype)]


def quick_gelu(x: Array, *, alpha: float) -> Array:
    wide = x.astype(np.float32)
    return (wide * expit(np.float32(alpha) * wide)).astype(x.dtype)


def multi_head_attention(q: Array, k: Array, v: Array, *, num_heads: int, scale: float = 0.0) -> Array:
    def heads(x: Array) -> Array:
        return x.astype(np.float32).reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)

    scores = heads(q) @ heads(k).swapaxes(2, 3) * np.float32(scale or 1 / np.sqrt(q.shape[2] // num_heads))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result = weights / weights.sum(-1, keepdims=True) @ heads(v)
    return result.swapaxes(1, 2).reshape(*q.shape[:2], -1).astype(q.dtype)


CONTRIB: dict[str, Callable[..., Any]] = {
    "BiasAdd": bias_add,
    "BiasGelu": bias_gelu,
    "BiasSplitGelu": bias_split_gelu,
    "GroupNorm": group_norm,
    "MultiHeadAttention": multi_head_attention,
    "NhwcConv": nhwc_conv,
    "QuickGelu": quick_gelu,
    "SkipGroupNorm": skip_group_norm,
    "SkipLayerNormalization": skip_layer_norm,
}
