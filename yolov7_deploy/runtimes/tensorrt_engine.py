"""An opened TensorRT engine: what it takes, what it gives, and contexts to run it in."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from yolov7_deploy.errors import DeviceError, LoadError
from yolov7_deploy.metadata import InputKind, ModelMetadata, NmsMetadata, foreign_metadata
from yolov7_deploy.runtimes.nms_outputs import NMS_OUTPUTS, UNKNOWN_CLASSES
from yolov7_deploy.tensorrt.build_record import EngineTensor
from yolov7_deploy.tensorrt.capabilities import Dialect, Trt

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Layout = Literal["nchw", "nhwc"]

IMAGES, CONF, IOU, OVERFLOW = "images", "conf_threshold", "iou_threshold", "overflow"
RAW_OUTPUT = "output"
LAST_LINES = 6  # of TensorRT's log, in a message
_MAX_SHOWN = 500  # characters of a layout
_CANVASES = ("float32", "float16", "uint8")
_INSIDE = "inside TensorRT-RTX"
_RESULTS = ("float32", "float16", "int32", "int64")


class TrtLog:
    """The last lines that TensorRT said, and everything of it as log lines of ours."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LAST_LINES)

    def take(self, line: str) -> None:
        """One line, as `ERROR: words`; TensorRT calls from threads of its own."""
        if line.startswith(("ERROR", "INTERNAL_ERROR", "WARNING")):
            self._lines.append(line)
        logger.debug("TensorRT: %s", line)

    @property
    def words(self) -> str:
        """The last errors and warnings, one a line."""
        return "\n".join(self._lines) or "It said nothing."


class TrtEngine:
    """A deserialised plan, which any number of threads may read.

    Args:
        dialect: The TensorRT that opened it.
        runtime: Must outlive the engine.
        engine: What TensorRT made of the plan.
        log: What it said.
        name: Of the file, for messages.

    Attributes:
        images: The input for images; -1 where a side is open.
        canvas_dtype: Its type, `layout` its order of axes.
        smallest, largest: Limits of its shape.
        outputs: Those that are read first, in the order of `wanted`, then the others.
        wanted: Names of the outputs that results are made of.
        scratch_bytes: Memory of the GPU that a context works in.
        graph_state: `on`, or who else records CUDA graphs, or why nobody does.

    Raises:
        LoadError: Its tensors are none of ours or of the field's.
    """

    def __init__(self, dialect: Dialect, runtime: Trt, engine: Trt, log: TrtLog, *, name: str) -> None:
        self.dialect, self.engine, self.log, self.name = dialect, engine, log, name
        self._runtime = runtime
        self._making = threading.Lock()
        self.scratch_bytes = dialect.scratch_bytes(engine)
        self.graph_state = "on"
        inputs, outputs = dialect.engine_tensors(engine)
        self._refusal = LoadError(
            f"{name} takes {_layout(inputs)} to {_layout(outputs)}, which is no YOLOv7 layout.",
            fix="Build it from the weights:  y7 export --weights WEIGHTS.pt --engine",
        )
        self.inputs = {tensor.name: tensor for tensor in inputs}
        known = {tensor.name: tensor for tensor in outputs}
        self.images = self._checked_images()
        self.layout: Layout = "nhwc" if self.images.dtype == "uint8" else "nchw"
        self.canvas_dtype = np.dtype(self.images.dtype)
        self.is_open = -1 in self.images.shape
        if self.is_open and dialect.records_by_itself:
            self.graph_state = _INSIDE  # it compiles better kernels for a shape after its first runs
        limits = dialect.profile(engine, self.images.name) if self.is_open else None
        self.smallest, self.largest = (limits.min, limits.max) if limits else (self.images.shape,) * 2
        self.wanted = self._wanted(known)
        self.outputs = (*(known[one] for one in self.wanted), *(one for one in outputs if one.name not in self.wanted))
        if not all(output.dtype in _RESULTS for output in self.outputs if output.name in self.wanted):
            raise self._refusal

    def _checked_images(self) -> EngineTensor:
        others = set(self.inputs) - {CONF, IOU}
        images = self.inputs[others.pop()] if len(others) == 1 else None
        if images is None or images.dtype not in _CANVASES or len(images.shape) != 4:
            raise self._refusal
        if images.shape[3 if images.dtype == "uint8" else 1] != 3:
            raise self._refusal
        if any(self.inputs[one].dtype != "float32" for one in set(self.inputs) & {CONF, IOU}):
            raise self._refusal
        return images

    def _wanted(self, outputs: dict[str, EngineTensor]) -> tuple[str, ...]:
        if set(NMS_OUTPUTS) <= set(outputs):
            if len(outputs["det_boxes"].shape) != 3:
                raise self._refusal
            return (*NMS_OUTPUTS, *([OVERFLOW] if OVERFLOW in outputs else []))
        decoded = [one for one in outputs.values() if len(one.shape) == 3 and one.shape[-1] > 5]
        decoded.sort(key=lambda one: one.name != RAW_OUTPUT)
        if not decoded:
            raise self._refusal
        return (decoded[0].name,)

    @property
    def suppresses(self) -> bool:
        """NMS is inside."""
        return len(self.wanted) > 1

    @property
    def takes_thresholds(self) -> bool:
        """Thresholds are inputs."""
        return {CONF, IOU} <= set(self.inputs)

    @property
    def batches(self) -> tuple[int, int]:
        """Fewest and most images that enter at once."""
        return self.smallest[0], self.largest[0]

    def shape(self, batch: int, canvas_hw: tuple[int, int]) -> Shape:
        """Of the input for images."""
        return (batch, *canvas_hw, 3) if self.layout == "nhwc" else (batch, 3, *canvas_hw)

    def canvas_hw(self, shape: Shape) -> tuple[int, int]:
        """Height and width in a shape of the input for images."""
        return (shape[1], shape[2]) if self.layout == "nhwc" else (shape[2], shape[3])

    @property
    def graphs_inside(self) -> bool:
        """TensorRT-RTX records CUDA graphs by itself."""
        return self.graph_state == _INSIDE

    def new_context(self) -> Trt | None:
        """A context that has no memory yet, see `Dialect.new_context`; engines make one at a time."""
        with self._making:
            return self.dialect.new_context(self.engine, graphs_inside=self.graphs_inside)

    def record_inside(self) -> None:
        """From now on contexts record by themselves."""
        self.graph_state = _INSIDE

    def give_up_graphs(self, error: DeviceError) -> None:
        """From now on nothing is recorded; says so once."""
        if self.graph_state == "on":
            self.graph_state = f"off: {error.message}"
            logger.warning("%s runs without CUDA graphs, which is slower: %s", self.name, error.message)

    def metadata(self, metadata: ModelMetadata | None) -> ModelMetadata:
        """The metadata as far as the engine bears it out, or what is assumed of one without."""
        batch = None if self.batches[0] != self.batches[1] else self.batches[0]
        low, high = self.canvas_hw(self.smallest), self.canvas_hw(self.largest)
        input_hw = low if low == high else None
        kind: InputKind = "uint8" if self.layout == "nhwc" else "float32"
        if metadata is None:
            return self._foreign(batch, input_hw, kind)
        nms = metadata.nms
        if (nms is not None) != self.suppresses:
            raise self._refusal
        if nms is not None:
            nms = replace(nms, runtime_thresholds=self.takes_thresholds)
        return replace(metadata, batch=batch, input_hw=input_hw, input_kind=kind, nms=nms)

    def _foreign(self, batch: int | None, input_hw: tuple[int, int] | None, kind: InputKind) -> ModelMetadata:
        first = self.outputs[0]
        if not self.suppresses:
            classes = first.shape[-1] - 5
            return foreign_metadata(classes=classes, input_hw=input_hw, batch=batch, input_kind=kind, nms=None)
        rows = next(one for one in self.outputs if one.name == "det_boxes").shape[1]
        nms = NmsMetadata(
            kind="efficient",
            conf=0.25 if self.takes_thresholds else 0.0,
            iou=0.45,
            max_det=max(rows, 1),
            max_candidates=0,
            multi_label=True,
            class_agnostic=False,
            runtime_thresholds=self.takes_thresholds,
        )
        return foreign_metadata(classes=UNKNOWN_CLASSES, input_hw=input_hw, batch=batch, input_kind=kind, nms=nms)


def _layout(tensors: tuple[EngineTensor, ...]) -> str:
    words: Any = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    return str(words)[:_MAX_SHOWN]
