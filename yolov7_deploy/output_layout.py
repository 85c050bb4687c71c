"""The layouts in which exporters write YOLO networks, and how their outputs become detections.

A file of this package says in its metadata what it contains. For any other file, tensor names say little: the shapes
decide. A network has a known number of output rows for its input size: one for each anchor in YOLOv5 and YOLOv7 (three
for each cell of the head maps), one for each cell in YOLOv8 and later. A layout that cannot be distinguished from
another one is refused by name, because wrong boxes look like a bad model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import LoadError
from yolov7_deploy.image import FloatArray
from yolov7_deploy.metadata import (
    MAX_SIDE,
    NMS_OUTPUTS,
    RAW_OUTPUT,
    THRESHOLD_INPUTS,
    InputKind,
    ModelMetadata,
    NmsMetadata,
    assumed_metadata,
)
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import (
    MAX_CANDIDATES,
    RawDetections,
    filter_outputs,
    postprocess,
    postprocess_scores,
)

# anchors: [B, A, 5 + C] cx, cy, w, h, objectness, classes: YOLOv5, YOLOv7 (official --grid), this package (--nms none)
# cells: [B, 4 + C, A] cx, cy, w, h, class scores: YOLOv8 and later
# nms: num_dets [B, 1], boxes [B, K, 4] xyxy, scores [B, K], classes [B, K]: EfficientNMS_TRT, official --end2end
# rows: [B, K, 6] x0, y0, x1, y1, score, class: YOLOv10, YOLO26, exports with nms=True
# batch_rows: [N, 7] image, x0, y0, x1, y1, class, score: official --end2end --max-wh
LayoutKind = Literal["anchors", "cells", "nms", "rows", "batch_rows"]
AnyArray = npt.NDArray[Any]

UNKNOWN_CLASSES = 1000  # class names invented for a file with NMS inside, which does not state how many it has
ANCHORS = 3  # per cell
# The head levels of the YOLO families: P3 to P5, P3 to P6, P2 to P5, P4 to P5 (tiny YOLOv3), P3 to P7.
STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32), (8, 16, 32, 64, 128))
# Names of the outputs of NMS, in the order of `NMS_OUTPUTS`; the others are those of TensorRT-For-YOLO-Series.
NMS_NAMES = (NMS_OUTPUTS, ("num", "boxes", "scores", "classes"))
INPUT_DTYPES = ("float32", "float16", "uint8")
EXPORT_HERE = "Export the weights here:  y7 export --weights WEIGHTS.pt"
_MAX_CLASSES = 100_000
_MAX_CHARACTERS = 500  # of the tensors in a message
_MAX_SCORE = 1.01  # probabilities that were rounded in FP16
_CLASS_NAME = re.compile(r"""(\d{1,6}): (?:'([^'\\]*)'|"([^"\\]*)")""")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or output of a file: `dtype` is a NumPy name, `None` in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name!r} {self.dtype} [{sizes}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputLayout:
    """The image input: float NCHW RGB 0..1, or uint8 NHWC BGR.

    Attributes:
        name: Name of the tensor.
        dtype: `float32`, `float16` or `uint8`.
        input_hw: Height and width; `None` if one of them is dynamic.
        batch: Batch size; `None` if it is dynamic.
    """

    name: str
    dtype: str
    input_hw: tuple[int, int] | None
    batch: int | None

    @property
    def kind(self) -> InputKind:
        """The kind in the metadata; float16 inputs are converted from float32."""
        return "uint8" if self.dtype == "uint8" else "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputLayout:
    """Contents and order of the outputs of a model file.

    Attributes:
        kind: See `LayoutKind`.
        outputs: Names of the tensors that are read.
        classes: Number of classes; `None` if the outputs do not show it.
        max_det: Maximum number of detections of an image; `None` if the file does not limit them.
        is_assumed: The layout was found by shapes, so every result is checked for values that contradict it.
    """

    kind: LayoutKind
    outputs: tuple[str, ...]
    classes: int | None = None
    max_det: int | None = None
    is_assumed: bool = True

    @classmethod
    def of(cls, metadata: ModelMetadata, *, output: str = RAW_OUTPUT) -> OutputLayout:
        """Return the layout of a file that this package exported; `output` is the decoded one of a file without NMS."""
        classes = len(metadata.class_names)
        if metadata.nms is None:
            return cls(kind="anchors", outputs=(output,), classes=classes, is_assumed=False)
        return cls(kind="nms", outputs=NMS_OUTPUTS, classes=classes, max_det=metadata.nms.max_det, is_assumed=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """Layout of a file of another exporter; `class_names` are those that the file states, if any."""

    input: InputLayout
    output: OutputLayout
    class_names: tuple[str, ...] = ()


def find_layout(
    file: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    canvas_hw: tuple[int, int] | None = None,
    properties: Mapping[str, str] | None = None,
) -> ModelLayout:
    """Return the layout of a file by the shapes of its inputs and outputs.

    Args:
        file: The file, for messages.
        inputs: Its inputs without those that have a default.
        outputs: Its outputs.
        canvas_hw: Input size that belongs to the shapes of the outputs, if the input size is dynamic.
        properties: Key-value metadata of another exporter (`task` and `names` of ultralytics).

    Raises:
        LoadError: The layout is none of these, or cannot be distinguished from another one, which the message names.
    """
    properties = properties or {}
    names = _class_names(properties.get("names", ""))
    with _refusing(file, inputs, outputs):
        task = properties.get("task", "detect")
        if task != "detect":
            raise _UnreadableError(f"its task is {task[:40]!r}, and only detection is read")
        images = _image_input(inputs)
        output = _output_layout(outputs, images.input_hw or canvas_hw)
        if output.classes is not None and names and len(names) != output.classes:
            raise _UnreadableError(
                f"it names {len(names)} classes and has columns for {output.classes}, so other columns "
                "(masks, keypoints, angles) are among them"
            )
    if output.classes is None and names:
        output = replace(output, classes=len(names))
    return ModelLayout(input=images, output=output, class_names=names)


def find_input(file: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InputLayout:
    """Return the layout of the image input; see `find_layout`.

    Raises:
        LoadError: There is no such input, or others without a default.
    """
    with _refusing(file, inputs, outputs):
        return _image_input(inputs)


def unknown_layout(
    file: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], reason: str = "", *, fix: str = EXPORT_HERE
) -> LoadError:
    """Return the error for a file that cannot be read; it lists the tensors."""
    detail = f": {reason}" if reason else ""
    return LoadError(
        f"{file} takes {_listed(inputs)} to {_listed(outputs)}, which is not a YOLOv7 layout{detail}.", fix=fix
    )


def layout_metadata(
    layout: ModelLayout, *, runtime_thresholds: bool = False, recorded: ModelMetadata | None = None
) -> ModelMetadata:
    """Return the metadata that is assumed for a file of another exporter.

    Args:
        layout: Its layout.
        runtime_thresholds: It has inputs for the thresholds of NMS.
        recorded: Metadata that this package wrote when it quantized or built the file, possibly without knowing sizes.
    """
    output, nms = layout.output, None
    if output.kind not in ("anchors", "cells"):
        nms = NmsMetadata(
            kind="efficient" if output.kind == "nms" else "standard",
            conf=0.0,  # unknown
            iou=0.45,
            max_det=output.max_det or MAX_CANDIDATES,
            max_candidates=0,
            multi_label=output.kind == "nms" and not runtime_thresholds,
            class_agnostic=False,
            runtime_thresholds=runtime_thresholds,
        )
    metadata = assumed_metadata(
        classes=UNKNOWN_CLASSES if output.classes is None else output.classes,
        class_names=layout.class_names,
        input_hw=layout.input.input_hw,
        batch=layout.input.batch,
        input_kind=layout.input.kind,
        nms=nms,
    )
    if recorded is None:
        return replace(metadata, precision="fp16") if layout.input.dtype == "float16" else metadata
    is_known = recorded.class_names and output.classes in (None, len(recorded.class_names))
    return replace(recorded, nms=nms, class_names=recorded.class_names if is_known else metadata.class_names)


# --- finding the layout ---------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """The layout cannot be read; the text says what it is, if that is known."""

    def __init__(self, reason: str = "", *, fix: str = EXPORT_HERE) -> None:
        super().__init__(reason)
        self.fix = fix


@contextmanager
def _refusing(file: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Iterator[None]:
    """Turn an `_UnreadableError` into a `LoadError` that lists the tensors."""
    try:
        yield
    except _UnreadableError as error:
        raise unknown_layout(file, inputs, outputs, str(error), fix=error.fix) from None


def _listed(tensors: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, tensors))[:_MAX_CHARACTERS] or "nothing"


def _class_names(text: str) -> tuple[str, ...]:
    """Return the class names in a text such as `{0: 'person', 1: 'bicycle'}`; empty if it is anything else."""
    found = [(int(number), one or other) for number, one, other in _CLASS_NAME.findall(text[: 2**20])]
    is_complete = [number for number, _ in found] == list(range(len(found))) and text.count(": ") == len(found)
    return tuple(name for _, name in found) if is_complete else ()


def _image_input(inputs: Sequence[TensorSpec]) -> InputLayout:
    images = [tensor for tensor in inputs if tensor.name not in THRESHOLD_INPUTS]
    if len(images) != 1 or any(tensor.dtype != "float32" for tensor in inputs if tensor not in images):
        raise _UnreadableError
    tensor, shape = images[0], images[0].shape
    if len(shape) != 4:
        raise _UnreadableError
    if tensor.dtype not in INPUT_DTYPES:
        raise _UnreadableError(f"images are float32, float16 or uint8, not {tensor.dtype[:40]}")
    is_uint8 = tensor.dtype == "uint8"
    if shape[3 if is_uint8 else 1] not in (3, None):
        expected, other = ("NHWC", shape[1]) if is_uint8 else ("NCHW", shape[3])
        reason = f"{tensor.dtype} images are {expected}, and these are {'NCHW' if is_uint8 else 'NHWC'}"
        raise _UnreadableError(reason if other == 3 else "images have three channels")
    batch, sides = shape[0], shape[1:3] if is_uint8 else shape[2:4]
    if not all(size is None or 1 <= size <= MAX_SIDE for size in (batch, *sides)):
        raise _UnreadableError
    height, width = sides
    input_hw = None if height is None or width is None else (height, width)
    return InputLayout(name=tensor.name, dtype=tensor.dtype, input_hw=input_hw, batch=batch)


def _output_layout(outputs: Sequence[TensorSpec], input_hw: tuple[int, int] | None) -> OutputLayout:
    by_name = {tensor.name: tensor for tensor in outputs}
    for names in NMS_NAMES:
        if set(names) <= set(by_name):
            return _nms_layout([by_name[name] for name in names])
    ranks = {len(tensor.shape) for tensor in outputs}
    if len(outputs) == 1 and ranks == {2} and outputs[0].shape[1] == 7:
        return OutputLayout(kind="batch_rows", outputs=(outputs[0].name,))
    candidates = [tensor for tensor in outputs if len(tensor.shape) == 3]
    if not candidates:
        is_raw = bool(outputs) and ranks <= {4, 5}
        raise _UnreadableError(
            "these are raw head maps, whose anchors are not in the file" if is_raw else "",
            fix=f"python export.py --weights WEIGHTS.pt --grid   decodes them. {EXPORT_HERE}"
            if is_raw
            else EXPORT_HERE,
        )
    if 4 in ranks:
        raise _UnreadableError("it returns maps as well as boxes, as segmentation networks do")
    return _one_layout(candidates, input_hw)


def _nms_layout(tensors: Sequence[TensorSpec]) -> OutputLayout:
    boxes = tensors[1].shape
    if len(boxes) != 3 or boxes[2] not in (4, None):
        raise _UnreadableError
    names = tuple(tensor.name for tensor in tensors)
    # Official exports declare no sizes of these outputs; 100 is the official maximum.
    return OutputLayout(kind="nms", outputs=names, max_det=boxes[1] if boxes[1] and boxes[1] > 0 else 100)


def _one_layout(candidates: Sequence[TensorSpec], input_hw: tuple[int, int] | None) -> OutputLayout:
    """Return the layout of the only readable output, or of the one with the usual name.

    Raises:
        _UnreadableError: There is none, or several.
    """
    candidates = [tensor for tensor in candidates if tensor.name == RAW_OUTPUT] or candidates
    found: list[OutputLayout] = []
    errors: list[_UnreadableError] = []
    for tensor in candidates:
        try:
            found.append(_row_layout(tensor, input_hw))
        except _UnreadableError as error:
            errors.append(error)
    if not found:
        raise max(errors, key=lambda error: len(str(error)))
    if len(found) > 1:
        raise _UnreadableError("several of these outputs may be detections")
    return found[0]


def _row_layout(tensor: TensorSpec, input_hw: tuple[int, int] | None) -> OutputLayout:
    """Return the layout of an output [B, x, y] by its rows and columns."""
    _, first, second = tensor.shape
    if first is None or second is None or input_hw is None:
        return _partly_known_layout(tensor)
    for cells in _cell_counts(input_hw):
        if first == ANCHORS * cells and 6 <= second <= 5 + _MAX_CLASSES:
            return OutputLayout(kind="anchors", outputs=(tensor.name,), classes=second - 5)
        if second == cells and 5 <= first <= 4 + _MAX_CLASSES:
            return OutputLayout(kind="cells", outputs=(tensor.name,), classes=first - 4)
    for cells in _cell_counts(input_hw):
        if first == cells and second >= 5:
            raise _UnreadableError(
                "it has one row for each cell, and YOLOX, YOLOv6 and a transposed YOLOv8 look the same",
                fix=f"yolo export model=WEIGHTS.pt format=onnx   writes [batch, 4 + classes, {first}]. {EXPORT_HERE}",
            )
        if second == ANCHORS * cells and first >= 6:
            raise _UnreadableError(f"rows and columns are swapped: a YOLOv7 output is [batch, {second}, {first}]")
    if second == 6:
        return OutputLayout(kind="rows", outputs=(tensor.name,), max_det=first)
    sizes = " or ".join(str(ANCHORS * cells) for cells in list(_cell_counts(input_hw))[:2])
    raise _UnreadableError(
        f"an input of {input_hw[0]}x{input_hw[1]} gives {sizes} rows of 5 + classes columns, "
        f"which {tensor} does not have"
    )


def _partly_known_layout(tensor: TensorSpec) -> OutputLayout:
    """Return the layout of an output with a dynamic number of rows; its rows are checked in every call."""
    _, first, second = tensor.shape
    if first is not None and second is None and 5 <= first <= 4 + _MAX_CLASSES:
        return OutputLayout(kind="cells", outputs=(tensor.name,), classes=first - 4)
    if first is None and second is not None and 7 <= second <= 5 + _MAX_CLASSES:
        return OutputLayout(kind="anchors", outputs=(tensor.name,), classes=second - 5)
    raise _UnreadableError("the shapes do not show which of the output's dimensions are rows")


def _cell_counts(input_hw: tuple[int, int]) -> Iterator[int]:
    """Yield the number of cells of all head maps, for each of `STRIDES`; maps of odd sizes are rounded up."""
    height, width = input_hw
    for strides in STRIDES:
        yield sum(-(-height // stride) * -(-width // stride) for stride in strides)


# --- reading the outputs --------------------------------------------------------------------------------------------


def read_detections(
    layout: OutputLayout,
    arrays: Sequence[AnyArray],
    thresholds: Thresholds,
    *,
    batch: int,
    canvas_hw: tuple[int, int],
    count: int | None = None,
) -> list[RawDetections]:
    """Return the detections of each image from the outputs of a network.

    Args:
        layout: The layout of the outputs.
        arrays: The outputs, in the order of `layout.outputs`.
        thresholds: Which detections to keep.
        batch: Batch size of the run.
        canvas_hw: Input size of the run.
        count: Number of images; the rest of the batch is padding.

    Raises:
        LoadError: The outputs have other shapes or values than the layout: shapes may be dynamic, and known only now.
    """
    _check_shapes(layout, arrays, batch=batch, canvas_hw=canvas_hw)
    count = batch if count is None else count
    if layout.kind == "nms":
        number, boxes, scores, classes = (array[:count] for array in arrays)
        boxes, scores = boxes.astype(np.float32, copy=False), scores.astype(np.float32, copy=False)
        numbers = np.maximum(number.reshape(-1), 0).tolist()
        found = [filter_outputs(int(numbers[i]), boxes[i], scores[i], classes[i], thresholds) for i in range(count)]
    elif layout.kind in ("rows", "batch_rows"):
        rows = arrays[0].astype(np.float32, copy=False)
        if layout.kind == "batch_rows" and not np.isin(rows[:, 0], range(batch)).all():
            raise _contradiction("a first column that is not the number of an image")
        found = [_read_rows(*_columns(layout.kind, rows, image), thresholds) for image in range(count)]
    else:
        outputs = arrays[0][:count].astype(np.float32, copy=False)
        found = [_read_scores(layout, output, thresholds) for output in outputs]
    limit = UNKNOWN_CLASSES if layout.classes is None else layout.classes
    if layout.is_assumed and any(
        raw.class_ids.size and not 0 <= raw.class_ids.min() <= raw.class_ids.max() < limit for raw in found
    ):
        raise _contradiction(f"class ids outside 0 to {limit - 1}")
    return found


def _check_shapes(layout: OutputLayout, arrays: Sequence[AnyArray], *, batch: int, canvas_hw: tuple[int, int]) -> None:
    shapes: list[tuple[int, ...]] = [getattr(value, "shape", ()) for value in arrays]
    numeric = all(getattr(value, "dtype", np.dtype(object)).kind in "fiu" for value in arrays)
    if not numeric or not _fits(layout, shapes, batch=batch, canvas_hw=canvas_hw):
        raise LoadError(
            f"The file returns outputs of shapes {str(shapes)[:200]} for {batch} images of "
            f"{canvas_hw[0]}x{canvas_hw[1]}, which is not a YOLOv7 layout.",
            fix=EXPORT_HERE,
        )


def _fits(layout: OutputLayout, shapes: Sequence[tuple[int, ...]], *, batch: int, canvas_hw: tuple[int, int]) -> bool:
    first, classes = shapes[0], layout.classes or 0
    if layout.kind == "nms":
        rows = shapes[2][1] if len(shapes[2]) == 2 else -1
        # Some exporters omit the dimension of 1 of num_dets.
        return first in ((batch, 1), (batch,)) and list(shapes[1:]) == [(batch, rows, 4), (batch, rows), (batch, rows)]
    if layout.kind == "batch_rows":
        return len(first) == 2 and first[1] == 7
    if len(first) != 3 or first[0] != batch:
        return False
    if layout.kind == "rows":
        return first[2] == 6
    columns, rows = (first[2], first[1]) if layout.kind == "anchors" else (first[1], first[2])
    if columns != classes + (5 if layout.kind == "anchors" else 4):
        return False
    per_cell = ANCHORS if layout.kind == "anchors" else 1
    return not layout.is_assumed or rows in {per_cell * cells for cells in _cell_counts(canvas_hw)}


def _read_scores(layout: OutputLayout, output: FloatArray, thresholds: Thresholds) -> RawDetections:
    if layout.kind == "anchors":
        if layout.is_assumed and not output[:, 4:6].max(initial=0) <= _MAX_SCORE:
            raise _contradiction("an objectness or a class probability above 1, so its columns are others")
        return postprocess(output, thresholds)
    scores = output[4:]
    best = scores.max(axis=0)
    if not best.max(initial=0) <= _MAX_SCORE:
        raise _contradiction("class scores above 1, so they are not probabilities")
    cells = np.flatnonzero(best > thresholds.conf)
    return postprocess_scores(output[:4, cells].T, scores[:, cells].T, thresholds)


def _columns(kind: LayoutKind, rows: FloatArray, image: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return boxes xyxy [N, 4], scores [N] and classes [N] of one image."""
    if kind == "rows":
        return rows[image, :, :4], rows[image, :, 4], rows[image, :, 5]
    own = rows[rows[:, 0] == image]
    return own[:, 1:5], own[:, 6], own[:, 5]


def _read_rows(boxes: FloatArray, scores: FloatArray, classes: FloatArray, thresholds: Thresholds) -> RawDetections:
    if not np.all((scores >= -_MAX_SCORE) & (scores <= _MAX_SCORE)) or not np.array_equal(classes, np.rint(classes)):
        raise _contradiction("scores above 1 or class ids that are not integers, so its columns are others")
    order = np.argsort(-scores, kind="stable")
    return filter_outputs(len(order), boxes[order], scores[order], classes[order], thresholds)


def _contradiction(what: str) -> LoadError:
    return LoadError(f"The file returns {what}: it is not a YOLOv7 layout.", fix=EXPORT_HERE)
