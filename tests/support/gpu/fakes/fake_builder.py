"""TensorRT's build-time interface without TensorRT: stands in as the module `tensorrt` in a process that builds.

A "plan" is JSON of everything that the builder was given. Names are the real ones (test_to_tensorrt.py compares
them with tensorrt_rtx); what a version lacks is absent. Environment variables say which version it is
(FAKE_TENSORRT_VERSION) and what goes wrong (FAKE_TENSORRT_FAULT: crash, hang, memory, refuse, no-gpu).
"""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import onnx

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "11.4.0.106")
FAULT = os.environ.get("FAKE_TENSORRT_FAULT", "")
STEPS = 4


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


float32 = DataType.FLOAT
KINDS = {1: DataType.FLOAT, 10: DataType.HALF, 6: DataType.INT32, 7: DataType.INT64, 9: DataType.BOOL}


class LayerType(enum.IntEnum):
    OTHER, CAST, CONSTANT, SHAPE, ATTENTION_INPUT = range(5)


class MemoryPoolType(enum.IntEnum):
    WORKSPACE, TACTIC_DRAM = range(2)


class OnnxParserFlag(enum.IntEnum):
    NATIVE_INSTANCENORM = 0


_FLAGS = ["TF32", "REFIT", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "STRIP_PLAN", "REFIT_IDENTICAL"]
_FLAGS += ["REFIT_INDIVIDUAL"]
BuilderFlag = enum.IntEnum("BuilderFlag", _FLAGS, start=0)  # type: ignore[misc]
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"], start=0)  # type: ignore[misc]


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def phase_finish(self, phase_name: str) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool: ...


class ITensor:
    def __init__(self, dtype: DataType) -> None:
        self.dtype = dtype


class ILayer:
    def __init__(self, node: onnx.NodeProto, outputs: list[ITensor]) -> None:
        types = {"Attention": LayerType.ATTENTION_INPUT, "Cast": LayerType.CAST, "Shape": LayerType.SHAPE}
        self.type = types.get(node.op_type, LayerType.OTHER)
        self.name, self._outputs = node.name, outputs
        self.num_outputs = len(outputs)

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class IAttention:
    decomposable = False


class IAttentionInputLayer(ILayer):
    @property
    def attention(self) -> IAttention:
        return self.__dict__.setdefault("_attention", IAttention())


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags, self.layers, self.weights, self.marked = flags, list[ILayer](), set[str](), list[str]()
        self.inputs: dict[str, list[int]] = {}
        self.opset = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked.append(name)
        return name in self.weights


class ParserError:
    def __init__(self, node: int, words: str) -> None:
        self._node, self._words = node, words

    def node(self) -> int:
        return self._node

    def desc(self) -> str:
        return self._words


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[ParserError]()
        self.flags = 0

    def parse(self, model: bytes, path: str | None = None) -> bool:
        graph = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(model)).graph
        self._network.opset = onnx.ModelProto.FromString(model).opset_import[0].version
        folder = Path(path or "").parent
        kinds = {v.name: KINDS[v.type.tensor_type.elem_type] for v in [*graph.value_info, *graph.output]}
        for tensor in graph.initializer:
            self._network.weights.add(tensor.name)
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place and (folder / place["location"]).stat().st_size < int(place["offset"]) + int(place["length"]):
                self._errors.append(ParserError(-1, f"{tensor.name} ends too early"))
        for index, node in enumerate(graph.node):
            if FAULT == "refuse" and index == 3:
                self._errors.append(ParserError(index, f"no importer for [{node.op_type}]"))
            outputs = [ITensor(kinds.get(name, DataType.FLOAT)) for name in node.output]
            self._network.layers.append(ILayer(node, outputs))
        for value in graph.input:
            self._network.inputs[value.name] = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return b"fake" + str(self.data.count(b"+") + 1).encode() + b"+" * (self.data.count(b"+") + 1)


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    def __init__(self) -> None:
        self.told: dict[str, Any] = {"flags": ["TF32"], "limits": {}, "profiles": []}
        self.progress_monitor: Any = None

    @property
    def builder_optimization_level(self) -> int:
        return int(self.told.get("level", 3))

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        self.told["level"] = level

    def set_flag(self, flag: Any) -> None:
        self.told["flags"].append(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.told["flags"].remove(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.told["limits"][pool.name] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> None:
        self.told["profiles"].append(profile.shapes)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.told["cache"] = cache.data.decode(errors="replace")
        return cache.data[:4] in (b"", b"fake")


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if FAULT == "no-gpu":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        print("a library's own words", flush=True)
        severity = ILogger.Severity
        if FAULT == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if FAULT == "memory":
            self._logger.log(severity.ERROR, "Requested size was 123 bytes: OutOfMemory")
            return None
        if FAULT == "hang":
            time.sleep(600)
        self._logger.log(severity.INFO, "Total Activation Memory: 4096")
        if not self._steps(config.progress_monitor):
            return None
        attention = [layer for layer in network.layers if isinstance(layer, IAttentionInputLayer)]
        told = {**config.told, "inputs": network.inputs, "opset": network.opset}
        told |= {"marked": network.marked, "network_flags": network.flags}
        told["decomposable"] = [layer.attention.decomposable for layer in attention]
        return json.dumps(told).encode()

    def _steps(self, monitor: Any) -> bool:
        """Report some steps; return whether to go on."""
        if monitor is None:
            return True
        monitor.phase_start("Building engine", None, STEPS)
        going = all(monitor.step_complete("Building engine", step) for step in range(STEPS))
        monitor.phase_finish("Building engine")
        return going
