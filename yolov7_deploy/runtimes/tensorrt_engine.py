"""A deserialized TensorRT engine: its inputs and outputs, its metadata, and its execution contexts."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import replace
from typing import Literal

import numpy as np

from yolov7_deploy.errors import DeviceError, LoadError
from yolov7_deploy.metadata import (
    NMS_OUTPUTS,
    OVERFLOW_OUTPUT,
    RAW_OUTPUT,
    THRESHOLD_INPUTS,
    InputKind,
    ModelMetadata,
    assumed_metadata,
)
from yolov7_deploy.runtimes.base import assumed_nms_metadata
from yolov7_deploy.tensorrt.build_record import EngineTensor
from yolov7_deploy.tensorrt.capabilities import Trt, TrtCapabilities

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Layout = Literal["nchw", "nhwc"]

LOG_LINES = 6  # lines of TensorRT's log in an error message
_MAX_LAYOUT_CHARACTERS = 500
_INPUT_DTYPES = ("float32", "float16", "uint8")
_OUTPUT_DTYPES = ("float32", "float16", "int32", "int64")
_INSIDE_RTX = "inside TensorRT-RTX"


class TrtLog:
    """Passes TensorRT's log on to this package's logger, and keeps its last errors and warnings."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LOG_LINES)

    def append(self, line: str) -> None:
        """Add a line such as `ERROR: text`; TensorRT calls this from its own threads."""
        if line.startswith(("ERROR", "INTERNAL_ERROR", "WARNING")):
            self._lines.append(line)
        logger.debug("TensorRT: %s", line)

    @property
    def tail(self) -> str:
        """The last errors and warnings, one per line."""
        return "\n".join(self._lines) or "(empty)"


class TrtEngine:
    """A deserialized engine, which any number of threads may read.

    Args:
        capabilities: The TensorRT that opened it.
        runtime: TensorRT's runtime, which must outlive the engine.
        engine: TensorRT's engine.
        log: The log of this TensorRT.
        name: File name, for messages.

    Attributes:
        images: The input tensor for images; dynamic dimensions are -1.
        canvas_dtype, layout: Its type and its order of axes.
        min_shape, max_shape: Limits of its shape.
        outputs: All output tensors; those in `result_names` come first, in that order.
        result_names: Names of the outputs that are read.
        scratch_bytes: GPU memory that a context works in.
        graph_state: State of CUDA graphs: `on`, `inside TensorRT-RTX`, or `off` with the reason.

    Raises:
        LoadError: Its tensors are not those of a known YOLOv7 layout.
    """

    def __init__(self, capabilities: TrtCapabilities, runtime: Trt, engine: Trt, log: TrtLog, *, name: str) -> None:
        self.capabilities, self.engine, self.log, self.name = capabilities, engine, log, name
        self._runtime = runtime
        self._context_lock = threading.Lock()
        self.scratch_bytes = capabilities.device_memory_bytes(engine)
        self.graph_state = "on"
        inputs, outputs = capabilities.engine_tensors(engine)
        self._refusal = LoadError(
            f"{name} takes {_layout(inputs)} to {_layout(outputs)}, which is not a YOLOv7 layout.",
            fix="Build it from the weights:  y7 export --weights WEIGHTS.pt --engine",
        )
        self.inputs = {tensor.name: tensor for tensor in inputs}
        known = {tensor.name: tensor for tensor in outputs}
        self.images = self._find_images()
        self.layout: Layout = "nhwc" if self.images.dtype == "uint8" else "nchw"
        self.canvas_dtype = np.dtype(self.images.dtype)
        self.is_dynamic = -1 in self.images.shape
        if self.is_dynamic and capabilities.captures_cuda_graphs:
            self.graph_state = _INSIDE_RTX  # it compiles faster kernels for a shape after the first runs
        self.min_shape = self.max_shape = self.images.shape
        limits = capabilities.profile_shapes(engine, self.images.name) if self.is_dynamic else None
        if limits is not None:
            self.min_shape, self.max_shape = limits.min, limits.max
        self.result_names = self._find_results(known)
        results = tuple(known[name] for name in self.result_names)
        self.outputs = (*results, *(output for output in outputs if output.name not in self.result_names))
        if not all(output.dtype in _OUTPUT_DTYPES for output in results):
            raise self._refusal

    def _find_images(self) -> EngineTensor:
        thresholds = set(THRESHOLD_INPUTS)
        others = set(self.inputs) - thresholds
        images = self.inputs[others.pop()] if len(others) == 1 else None
        if images is None or images.dtype not in _INPUT_DTYPES or len(images.shape) != 4:
            raise self._refusal
        if images.shape[3 if images.dtype == "uint8" else 1] != 3:
            raise self._refusal
        if any(self.inputs[name].dtype != "float32" for name in set(self.inputs) & thresholds):
            raise self._refusal
        return images

    def _find_results(self, outputs: dict[str, EngineTensor]) -> tuple[str, ...]:
        if set(NMS_OUTPUTS) <= set(outputs):
            if len(outputs["det_boxes"].shape) != 3:
                raise self._refusal
            return (*NMS_OUTPUTS, OVERFLOW_OUTPUT) if OVERFLOW_OUTPUT in outputs else NMS_OUTPUTS
        decoded = [output for output in outputs.values() if len(output.shape) == 3 and output.shape[-1] > 5]
        decoded.sort(key=lambda output: output.name != RAW_OUTPUT)
        if not decoded:
            raise self._refusal
        return (decoded[0].name,)

    @property
    def has_nms(self) -> bool:
        """True if NMS is inside the engine."""
        return len(self.result_names) > 1

    @property
    def has_threshold_inputs(self) -> bool:
        """True if the NMS thresholds are inputs."""
        return set(THRESHOLD_INPUTS) <= set(self.inputs)

    @property
    def batch_limits(self) -> tuple[int, int]:
        """Smallest and largest batch size."""
        return self.min_shape[0], self.max_shape[0]

    def input_shape(self, batch: int, canvas_hw: tuple[int, int]) -> Shape:
        """Return the shape of the input tensor for a batch."""
        return (batch, *canvas_hw, 3) if self.layout == "nhwc" else (batch, 3, *canvas_hw)

    def canvas_hw(self, shape: Shape) -> tuple[int, int]:
        """Return height and width from a shape of the input tensor."""
        return (shape[1], shape[2]) if self.layout == "nhwc" else (shape[2], shape[3])

    @property
    def graphs_inside(self) -> bool:
        """True if TensorRT-RTX captures CUDA graphs itself."""
        return self.graph_state == _INSIDE_RTX

    def new_context(self) -> Trt | None:
        """Create a context without memory, see `TrtCapabilities.create_context`; an engine creates one at a time."""
        with self._context_lock:
            return self.capabilities.create_context(self.engine, capture_graphs=self.graphs_inside)

    def use_graphs_inside(self) -> None:
        """Let TensorRT-RTX capture the CUDA graphs of new contexts."""
        self.graph_state = _INSIDE_RTX

    def disable_graphs(self, error: DeviceError) -> None:
        """Stop capturing CUDA graphs, with one warning."""
        if self.graph_state == "on":
            self.graph_state = f"off: {error.message}"
            logger.warning("%s runs without CUDA graphs, which is slower: %s", self.name, error.message)

    def metadata(self, metadata: ModelMetadata | None) -> ModelMetadata:
        """Return the metadata with the engine's own sizes, or what is assumed for an engine without metadata."""
        least, most = self.batch_limits
        batch = most if least == most else None
        low, high = self.canvas_hw(self.min_shape), self.canvas_hw(self.max_shape)
        input_hw = low if low == high else None
        kind: InputKind = "uint8" if self.layout == "nhwc" else "float32"
        if metadata is None:
            return self._assume_metadata(batch, input_hw, kind)
        nms = metadata.nms
        if (nms is not None) != self.has_nms:
            raise self._refusal
        if nms is not None:
            nms = replace(nms, runtime_thresholds=self.has_threshold_inputs)
        return replace(metadata, batch=batch, input_hw=input_hw, input_kind=kind, nms=nms)

    def _assume_metadata(self, batch: int | None, input_hw: tuple[int, int] | None, kind: InputKind) -> ModelMetadata:
        if not self.has_nms:
            classes = self.outputs[0].shape[-1] - 5
            return assumed_metadata(classes=classes, input_hw=input_hw, batch=batch, input_kind=kind, nms=None)
        boxes = next(output for output in self.outputs if output.name == "det_boxes")
        return assumed_nms_metadata(
            input_hw=input_hw,
            batch=batch,
            input_kind=kind,
            conf=0.25 if self.has_threshold_inputs else 0.0,
            max_det=max(boxes.shape[1], 1),
            runtime_thresholds=self.has_threshold_inputs,
        )


def _layout(tensors: tuple[EngineTensor, ...]) -> str:
    layout = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    return str(layout)[:_MAX_LAYOUT_CHARACTERS]
