"""A deserialized TensorRT engine: its inputs and outputs, its metadata, and its execution contexts."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.metadata import NMS_OUTPUTS, OVERFLOW_OUTPUT, THRESHOLD_INPUTS, InputKind, ModelMetadata
from yolov7_deploy.output_layout import (
    OutputLayout,
    TensorSpec,
    find_input,
    find_layout,
    layout_metadata,
    unknown_layout,
)
from yolov7_deploy.tensorrt.build_record import EngineTensor
from yolov7_deploy.tensorrt.capabilities import Trt, TrtCapabilities

logger = get_logger(__name__)

Shape = tuple[int, ...]
Layout = Literal["nchw", "nhwc"]

# Contexts are created and graphs are captured one at a time in the whole process: what TensorRT does for a new context
# (allocations, loading of kernels) can invalidate a capture in another thread.
GRAPH_LOCK = threading.Lock()
MAX_FAILED_CAPTURES = 3  # in a row
LOG_LINES = 6  # lines of TensorRT's log in an error message
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
        recorded: Metadata of its build record, if it has one.
        shares_profiles: Any number of contexts may use one optimization profile at the same time.

    Attributes:
        metadata: The metadata with the engine's own sizes, or what is assumed for an engine without a record.
        output_layout: The layout of the outputs that are read.
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

    def __init__(
        self,
        capabilities: TrtCapabilities,
        runtime: Trt,
        engine: Trt,
        log: TrtLog,
        *,
        name: str,
        recorded: ModelMetadata | None,
        shares_profiles: bool,
    ) -> None:
        self.capabilities, self.engine, self.log, self.name = capabilities, engine, log, name
        self._runtime = runtime
        self._failed_captures = 0
        self._shares_profiles = shares_profiles
        self._contexts: weakref.WeakSet[Trt] = weakref.WeakSet()
        self.scratch_bytes = capabilities.device_memory_bytes(engine)
        self.graph_state = "on"
        inputs, outputs = capabilities.engine_tensors(engine)
        self._specs = _specs(inputs), _specs(outputs)
        self.inputs = {tensor.name: tensor for tensor in inputs}
        known = {tensor.name: tensor for tensor in outputs}
        image_input = find_input(name, *self._specs)
        self.images = self.inputs[image_input.name]
        self.layout: Layout = "nhwc" if self.images.dtype == "uint8" else "nchw"
        self.canvas_dtype = np.dtype(self.images.dtype)
        self.is_dynamic = -1 in self.images.shape
        if self.is_dynamic and capabilities.captures_cuda_graphs:
            self.graph_state = _INSIDE_RTX  # it compiles faster kernels for a shape after the first runs
        self.min_shape = self.max_shape = self.images.shape
        limits = capabilities.profile_shapes(engine, self.images.name) if self.is_dynamic else None
        if limits is not None:
            self.min_shape, self.max_shape = limits.min, limits.max
        self.output_layout, self.metadata = self._find_layout(recorded)
        self.result_names = self.output_layout.outputs
        if self.output_layout.kind == "nms" and OVERFLOW_OUTPUT in known:
            self.result_names = (*self.result_names, OVERFLOW_OUTPUT)
        results = tuple(known[name] for name in self.result_names)
        self.outputs = (*results, *(output for output in outputs if output.name not in self.result_names))
        if not all(output.dtype in _OUTPUT_DTYPES for output in results):
            raise unknown_layout(name, *self._specs)

    def _find_layout(self, recorded: ModelMetadata | None) -> tuple[OutputLayout, ModelMetadata]:
        """Return the layout of the outputs, and the metadata with the engine's own sizes.

        Metadata without strides was assumed for a file of another exporter, so it does not tell the layout.
        """
        least, most = self.batch_limits
        low, high = self.canvas_hw(self.min_shape), self.canvas_hw(self.max_shape)
        input_hw, batch = low if low == high else None, most if least == most else None
        known = {output.name for output in self._specs[1]}
        if recorded is not None and recorded.strides:
            layout = OutputLayout.of(recorded)
            contradicts = not set(layout.outputs) <= known or (recorded.nms is None and set(NMS_OUTPUTS) <= known)
            if contradicts:
                raise unknown_layout(self.name, *self._specs)
            metadata = recorded
        else:
            found = find_layout(self.name, *self._specs, canvas_hw=input_hw)
            layout = found.output
            thresholds = self.has_threshold_inputs
            metadata = layout_metadata(found, runtime_thresholds=thresholds, recorded=recorded)
        if layout.kind == "batch_rows" and None in self._output_shape(layout.outputs[0]):
            raise unknown_layout(
                self.name, *self._specs, "the number of rows depends on the image, which this runtime does not allocate"
            )
        nms = metadata.nms and replace(metadata.nms, runtime_thresholds=self.has_threshold_inputs)
        kind: InputKind = "uint8" if self.layout == "nhwc" else "float32"
        return layout, replace(metadata, batch=batch, input_hw=input_hw, input_kind=kind, nms=nms)

    def _output_shape(self, name: str) -> tuple[int | None, ...]:
        return next(output.shape for output in self._specs[1] if output.name == name)

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

    def new_context(self, stream: int) -> Trt | None:
        """Create a context with an optimization profile and without memory, see `TrtCapabilities.create_context`.

        Args:
            stream: Handle of the stream on which TensorRT may copy the values of the profile.

        Returns:
            `None` if TensorRT creates no further context, or if each profile with these limits is in use.
        """
        with GRAPH_LOCK:
            context = self.capabilities.create_context(self.engine, capture_graphs=self.graphs_inside)
            if context is None or not self._has_profile(context, stream):
                return None
            self._contexts.add(context)
            return context

    def _has_profile(self, context: Trt, stream: int) -> bool:
        """Select a profile if the context has none; TensorRT gives one to the first context of an engine only."""
        if context.active_optimization_profile >= 0:
            return True
        profile = 0 if self._shares_profiles else self._unused_profile()
        return profile is not None and self.capabilities.select_profile(context, profile, stream)

    def _unused_profile(self) -> int | None:
        """Return the first profile that no context uses and that has the limits of the first one."""
        used = {context.active_optimization_profile for context in self._contexts}
        for profile in set(range(self.engine.num_optimization_profiles)) - used:
            shapes = self.capabilities.profile_shapes(self.engine, self.images.name, profile)
            if (shapes.min, shapes.max) == (self.min_shape, self.max_shape):
                return profile
        return None

    def close(self) -> None:
        """Free TensorRT's engine, then its runtime; the contexts must be freed before."""
        self.engine = self._runtime = None

    def use_graphs_inside(self) -> None:
        """Let TensorRT-RTX capture the CUDA graphs of new contexts."""
        self.graph_state = _INSIDE_RTX

    def count_capture(self, error: DeviceError | None) -> None:
        """Count the failed captures since the last successful one; after a few, stop capturing with one warning.

        A single failure may have come from other code of the process, such as a call on the legacy default stream.
        """
        self._failed_captures = 0 if error is None else self._failed_captures + 1
        if error is None or self.graph_state != "on":
            return
        logger.debug("%s: a CUDA graph could not be captured: %s", self.name, error.message)
        if self._failed_captures >= MAX_FAILED_CAPTURES:
            self.graph_state = f"off: {error.message}"
            logger.warning("%s runs without CUDA graphs, which is slower: %s", self.name, error.message)


def _specs(tensors: Sequence[EngineTensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=one.name, dtype=one.dtype, shape=tuple(size if size >= 0 else None for size in one.shape))
        for one in tensors
    )
