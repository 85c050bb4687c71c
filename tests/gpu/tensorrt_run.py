"""Builds small networks and runs engines with TensorRT 8.6 and later, without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from tests.gpu.environment import Array, Cuda, DeviceBuffer, Stream

LOGGER = trt.Logger(trt.Logger.WARNING)
# The cuBLAS and cuDNN of the kit may be stubs, which only these tactic sources would call.
FOREIGN_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")


def load_plugins(library: Path | None) -> None:
    """Load TensorRT's own plugins and the plugin library of this project.

    Raises:
        AssertionError: TensorRT cannot load the library.
    """
    if library is not None:  # before TensorRT's own plugins, with which `load_library` conflicts
        assert trt.get_plugin_registry().load_library(str(library)), f"TensorRT cannot load {library}"
    trt.init_libnvinfer_plugins(LOGGER, "")


def plugin_names() -> list[str]:
    """Return the names of all registered plugins."""
    return sorted(creator.name for creator in trt.get_plugin_registry().plugin_creator_list)


def build(onnx: bytes, *, half: bool) -> bytes:
    """Build a plan from an ONNX file with fixed shapes.

    Raises:
        AssertionError: It cannot be parsed or built; TensorRT's log says why.
    """
    builder = trt.Builder(LOGGER)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = trt.OnnxParser(network, LOGGER)
    parsed = parser.parse(onnx)
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    if half and hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    sources = config.get_tactic_sources()
    for name in FOREIGN_TACTICS:
        if hasattr(trt.TacticSource, name):
            sources &= ~(1 << int(getattr(trt.TacticSource, name)))
    config.set_tactic_sources(sources)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, "TensorRT did not build a plan"
    return bytes(plan)


class Runner:
    """An engine with fixed shapes and its device buffers."""

    def __init__(self, cuda: Cuda, stream: Stream, plan: bytes) -> None:
        self.stream = stream
        self.runtime = trt.Runtime(LOGGER)
        self.engine: Any = self.runtime.deserialize_cuda_engine(plan)
        assert self.engine is not None, "TensorRT cannot open the plan"
        name = "device_memory_size" if hasattr(self.engine, "device_memory_size") else "device_memory_size_v2"
        self.scratch_bytes = int(getattr(self.engine, name))
        self.context: Any = self.engine.create_execution_context()
        self.buffers: dict[str, DeviceBuffer] = {}
        for number in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(number)
            shape, dtype = self.engine.get_tensor_shape(name), trt.nptype(self.engine.get_tensor_dtype(name))
            self.buffers[name] = DeviceBuffer(cuda, tuple(shape), dtype)
            self.context.set_tensor_address(name, self.buffers[name].pointer)

    def upload(self, name: str, array: Array) -> None:
        """Copy an array into an input."""
        buffer = self.buffers[name]
        assert array.shape == buffer.shape, f"{name} is {buffer.shape}, not {array.shape}"
        contents = np.ascontiguousarray(array, buffer.dtype)
        self.stream.upload(buffer, contents)
        self.stream.synchronize()

    def __call__(self) -> None:
        """Enqueue one inference."""
        assert self.context.execute_async_v3(self.stream.handle), "execute_async_v3 failed"

    def download(self, name: str) -> Array:
        """Return an output after all work is done."""
        buffer = self.buffers[name]
        array = np.empty(buffer.shape, buffer.dtype)
        self.stream.download(array, buffer)
        self.stream.synchronize()
        return array
