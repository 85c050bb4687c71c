"""From network outputs to detections: thresholds, box arithmetic and NMS, in NumPy.

Results are equal, bit for bit, to those of the slow and obvious version in `tests/support/reference_nms.py`, against
which every NMS of this package (also the ONNX function body and the CUDA kernels) is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import FloatArray, IntArray
from yolov7_deploy.metadata import NmsMetadata
from yolov7_deploy.options import Thresholds

MAX_CANDIDATES = 30_000  # official limit of boxes that enter NMS
# Boxes that NMS compares with each other at once, and candidates whose classes it sorts at once: the fastest of 32 to
# 128 and of 1024 to 4096. Temporary arrays stay in the cache of a core.
_BLOCK, _CHUNK = 64, 1024
_LATER = np.triu(np.ones((_BLOCK, _BLOCK), dtype=np.bool_), 1)
_BITS = np.uint64(32)
_LOW_BITS = np.uint64(2**32 - 1)


class RawDetections(NamedTuple):
    """Detections of one image in network-input pixels, best score first.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        scores: float32 [N].
        class_ids: int64 [N].
    """

    boxes: FloatArray
    scores: FloatArray
    class_ids: IntArray


def xywh_to_xyxy(boxes: FloatArray) -> FloatArray:
    """Convert boxes [..., 4] from centre, width and height to corners."""
    half = boxes[..., 2:] * np.float32(0.5)
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


def iou_matrix(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the IoU of xyxy boxes [N, 4] and [M, 4] as [N, M]; 0 where both boxes are empty."""
    a, b = a[:, None], b[None]
    shared = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.maximum(shared, 0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    iou: FloatArray = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return iou


# --- NMS ------------------------------------------------------------------------------------------------------------


def greedy_nms(
    boxes: FloatArray, class_ids: IntArray, *, iou: float, max_det: int, class_agnostic: bool = False
) -> IntArray:
    """Return the indices of the boxes that NMS keeps, best first.

    A box is suppressed if a better kept box of its class overlaps it with intersection > iou * union. The comparison
    is strict, as in the official program. It has no division, so an empty box never suppresses another.

    Kept boxes do not suppress each other, so NMS of the first candidates, followed by NMS of the kept ones and the next
    candidates, keeps the same boxes as NMS of all. Most images need few of these chunks to find `max_det` boxes.

    Args:
        boxes: float32 xyxy [N, 4], best score first.
        class_ids: [N], not negative.
        iou: IoU threshold.
        max_det: Stop after this many boxes.
        class_agnostic: Suppress across classes.
    """
    columns = np.empty((5, len(boxes)), dtype=np.float32)
    columns[:4] = boxes.T
    columns[4] = (columns[2] - columns[0]) * (columns[3] - columns[1])
    classes = np.zeros_like(class_ids) if class_agnostic else class_ids
    kept: IntArray = np.zeros(0, dtype=np.int64)
    for start in range(0, len(boxes), _CHUNK):
        pool = np.concatenate([kept, np.arange(start, min(start + _CHUNK, len(boxes)))])
        pool = pool[_stable_order(classes[pool].astype(np.uint32))]
        kept = np.sort(pool[_nms_by_class(columns[:, pool], classes[pool], np.float32(iou))])
        if len(kept) >= max_det:
            break
    return kept[:max_det]


def _nms_by_class(columns: FloatArray, classes: IntArray, iou: np.float32) -> IntArray:
    """Return the positions of kept boxes; boxes are sorted by class, then best first.

    A block of boxes, of one or more classes, is resolved at a time. Of its last class, the boxes after the block that
    its kept ones suppress are then removed, by moving the others to the end of the class.

    Args:
        columns: float32 [5, N]: x0, y0, x1, y1, area. It is overwritten.
        classes: [N].
        iou: IoU threshold.
    """
    count = columns.shape[1]
    positions, kept = np.arange(count), []
    ends = np.append(np.flatnonzero(classes[1:] != classes[:-1]) + 1, count)
    start = 0
    while start < count:
        stop = min(start + _BLOCK, count)
        block, own = columns[:, start:stop], classes[start:stop]
        suppresses = _suppresses(block, block, iou) & _LATER[: stop - start, : stop - start]
        if own[0] != own[-1]:
            suppresses &= own[:, None] == own
        selected = _resolve(suppresses)
        kept.append(positions[start:stop][selected])
        end = int(ends[np.searchsorted(ends, stop)])
        if stop < end:
            last = block[:, selected[own[selected] == own[-1]]]
            rest = np.flatnonzero(~_suppresses(last, columns[:, stop:end], iou).any(axis=0)) + stop
            stop = end - len(rest)
            columns[:, stop:end], positions[stop:end] = columns[:, rest], positions[rest]
        start = stop
    return np.concatenate(kept)


def _suppresses(a: FloatArray, b: FloatArray, iou: np.float32) -> npt.NDArray[np.bool_]:
    """Return whether intersection > iou * union of boxes [5, N] and [5, M] (see `_nms_by_class`), as [N, M]."""
    intersection = np.minimum(a[2][:, None], b[2])
    intersection -= np.maximum(a[0][:, None], b[0])
    np.maximum(intersection, 0, out=intersection)
    height = np.minimum(a[3][:, None], b[3])
    height -= np.maximum(a[1][:, None], b[1])
    np.maximum(height, 0, out=height)
    intersection *= height
    union = np.add(a[4][:, None], b[4], out=height)
    union -= intersection
    union *= iou
    result: npt.NDArray[np.bool_] = intersection > union
    return result


def _resolve(suppresses: npt.NDArray[np.bool_]) -> IntArray:
    """Return the boxes that no kept box before them suppresses; `suppresses` [N, N] is above its diagonal.

    Each row becomes a number with one bit for each box, so that a step of the loop is one OR.
    """
    rows = np.packbits(suppresses, axis=1, bitorder="little")
    data, width, suppressed = rows.tobytes(), rows.shape[1], 0
    for row in np.flatnonzero(rows.any(axis=1)).tolist():
        if not suppressed >> row & 1:
            suppressed |= int.from_bytes(data[row * width : (row + 1) * width], "little")
    packed = np.frombuffer(suppressed.to_bytes(width, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(packed, count=len(suppresses), bitorder="little") == 0)


def _stable_order(keys: npt.NDArray[np.uint32]) -> IntArray:
    """Return the stable ascending order of keys [N]; several times faster than `np.argsort(kind="stable")`."""
    numbered = (keys.astype(np.uint64) << _BITS) | np.arange(len(keys), dtype=np.uint64)
    numbered.sort()
    order: IntArray = (numbered & _LOW_BITS).view(np.int64)
    return order


# --- decoded outputs ------------------------------------------------------------------------------------------------


def postprocess(output: FloatArray, thresholds: Thresholds, *, max_candidates: int = MAX_CANDIDATES) -> RawDetections:
    """Return the detections in the decoded output of one image.

    The semantics are the official ones. A score is objectness * class probability (objectness alone with one class)
    and must exceed `conf` strictly. With `multi_label` every class of an anchor counts, otherwise only its best. Equal
    scores keep the order of anchors and classes.

    Args:
        output: float32 [A, 5 + C]: cx, cy, w, h, objectness, class probabilities.
        thresholds: Which detections to keep.
        max_candidates: Only this many of the best boxes enter NMS.
    """
    rows = output[output[:, 4] > thresholds.conf]
    scores = rows[:, 4:5]
    if output.shape[1] > 6:
        scores = scores * rows[:, 5:]
    return postprocess_scores(rows[:, :4], scores, thresholds, max_candidates=max_candidates)


def postprocess_scores(
    boxes: FloatArray, scores: FloatArray, thresholds: Thresholds, *, max_candidates: int = MAX_CANDIDATES
) -> RawDetections:
    """Return the detections among boxes with one score for each class; see `postprocess`.

    Args:
        boxes: float32 [A, 4]: cx, cy, w, h.
        scores: float32 [A, C].
        thresholds: Which detections to keep.
        max_candidates: Only this many of the best boxes enter NMS.
    """
    if thresholds.multi_label:
        # Several times faster than `np.nonzero` of two dimensions.
        row, class_ids = np.divmod(np.flatnonzero(scores > thresholds.conf), scores.shape[1])
    else:
        best = scores.argmax(1)
        row = np.flatnonzero(scores[np.arange(len(scores)), best] > thresholds.conf)
        class_ids = best[row]
    if thresholds.classes is not None:
        selected = np.isin(class_ids, thresholds.classes)
        row, class_ids = row[selected], class_ids[selected]
    score = scores[row, class_ids]
    # The bits of positive floats are ordered as the floats are.
    order = _stable_order(~score.view(np.uint32))[:max_candidates]
    row, class_ids, score = row[order], class_ids[order], score[order]
    corners = xywh_to_xyxy(boxes[row])
    kept = greedy_nms(
        corners, class_ids, iou=thresholds.iou, max_det=thresholds.max_det, class_agnostic=thresholds.class_agnostic
    )
    return RawDetections(boxes=corners[kept], scores=score[kept], class_ids=class_ids[kept].astype(np.int64))


# --- head maps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNms:
    """Decoding and NMS of head maps as the operator `y7::Y7NMS` defines them, of the few boxes that can pass `conf`.

    Attributes:
        strides: Of each level.
        anchors: float32 [L, 3, 2], width and height in network-input pixels.
        classes: Number of classes.
        max_det: Maximum number of boxes per image.
        max_candidates: Only this many of the best boxes enter NMS.
    """

    strides: tuple[int, ...]
    anchors: FloatArray
    classes: int
    max_det: int
    max_candidates: int

    def __call__(self, heads: Sequence[FloatArray], thresholds: Thresholds) -> list[RawDetections]:
        """Return the detections of each image in head maps [B, 3 * (5 + C), H, W]; see `postprocess`."""
        return [self._detections([head[image] for head in heads], thresholds) for image in range(len(heads[0]))]

    def _detections(self, heads: Sequence[FloatArray], thresholds: Thresholds) -> RawDetections:
        logit = _lowest_logit(thresholds.conf)
        levels = [self._decode(head, level, logit) for level, head in enumerate(heads)]
        boxes, scores = (np.concatenate(parts) for parts in zip(*levels, strict=True))
        return postprocess_scores(boxes, scores, thresholds, max_candidates=self.max_candidates)

    def _decode(self, head: FloatArray, level: int, logit: float) -> tuple[FloatArray, FloatArray]:
        """Return boxes (cx, cy, w, h) [N, 4] and scores [N, C] of the anchors whose objectness is above a logit."""
        maps = head.reshape(3, 5 + self.classes, -1)
        objectness = maps[:, 4].astype(np.float32, copy=False)
        anchor, cell = np.divmod(np.flatnonzero(objectness > logit), maps.shape[2])
        y = _sigmoid(maps[anchor, :, cell].astype(np.float32, copy=False))
        two, half = np.float32(2), np.float32(0.5)
        origin = np.stack([cell % head.shape[2], cell // head.shape[2]], axis=1).astype(np.float32)
        center = (y[:, :2] * two - half + origin) * np.float32(self.strides[level])
        doubled = y[:, 2:4] * two
        boxes = np.concatenate([center, doubled * doubled * self.anchors[level][anchor]], axis=1)
        # With one class, its logit is not trained, and the score is the objectness.
        return boxes, y[:, 4:5] * y[:, 5:] if self.classes > 1 else y[:, 4:5]


def _lowest_logit(conf: float) -> float:
    """Return a logit that is below those of all probabilities above `conf`, whatever the rounding of float32."""
    low = conf - 1e-6
    return float(np.log(low) - np.log1p(-low)) if low > 0 else -np.inf


def _sigmoid(x: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # exp is infinite then, and the result 0
        y: FloatArray = np.divide(1, 1 + np.exp(-x), dtype=np.float32)
    return y


# --- models with NMS inside -----------------------------------------------------------------------------------------


def check_nms_compatible(nms: NmsMetadata, thresholds: Thresholds) -> None:
    """Refuse thresholds that the NMS inside a model file cannot apply.

    Raises:
        UsageError: The message names the threshold and both values.
    """
    if nms.runtime_thresholds:
        return
    fixed: list[tuple[str, object, object]] = [
        ("multi_label", nms.multi_label, thresholds.multi_label),
        ("class_agnostic", nms.class_agnostic, thresholds.class_agnostic),
        ("iou", nms.iou, thresholds.iou),
    ]
    if thresholds.conf < nms.conf:
        fixed.append(("conf", nms.conf, thresholds.conf))
    for name, exported, requested in fixed:
        if exported != requested and nms.max_candidates == 0:
            raise UsageError(
                f"Another exporter put NMS into this file and did not record its {name}, so {name}={requested} cannot "
                "be applied.",
                fix=f"Omit {name}, or export the weights here:  y7 export --weights WEIGHTS.pt",
            )
        if exported != requested:
            raise UsageError(
                f"The NMS inside this file was exported with {name}={exported}; {name}={requested} was requested.",
                fix=f"Omit {name} to use the file's own value, or export again with it; --nms none leaves it open.",
            )


def filter_outputs(
    count: int, boxes: FloatArray, scores: FloatArray, classes: npt.NDArray[Any], thresholds: Thresholds
) -> RawDetections:
    """Apply a call's thresholds to the outputs of NMS inside a model; return copies.

    The model's own score threshold may be lower, and it does not know `classes`.

    Args:
        count: Rows that hold detections.
        boxes: float32 [K, 4] xyxy.
        scores: float32 [K], best first.
        classes: Integers [K].
        thresholds: Which detections to keep.
    """
    keep = np.flatnonzero(scores[:count] > thresholds.conf)
    if thresholds.classes is not None:
        keep = keep[np.isin(classes[keep], thresholds.classes)]
    keep = keep[: thresholds.max_det]
    return RawDetections(boxes=boxes[keep], scores=scores[keep], class_ids=classes[keep].astype(np.int64))
