"""Comparison of two artifacts of one model, stage by stage: head, decode, candidates, detections.

All stages run on the same image, so the difference begins at the first stage over its tolerance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import FloatArray, Image, Letterbox, fit_letterbox
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import RawDetections, iou_matrix, xywh_to_xyxy
from yolov7_deploy.runtimes.base import IntermediateOutputs, Runtime

logger = logging.getLogger(__name__)

SAME_OBJECT_IOU = 0.5
STAGES = ("head", "decode", "candidates", "detections")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Maximum differences between two artifacts.

    Attributes:
        head: Maximum difference of a raw head map, in standard deviations of that map; infinite if not checked.
        head_rms: Root mean square difference of a raw head map, in the same unit.
        box_px: Maximum difference of a box coordinate, in input pixels.
        score: Maximum difference of a score. A detection that only one artifact has may exceed `conf` by this much.
        swaps: Number of detections per image that may differ by more, or be missing in one artifact: rounding decides
            which of two boxes NMS keeps if their IoU is close to `iou` or their scores are nearly equal.
    """

    head: float
    head_rms: float
    box_px: float
    score: float
    swaps: int = 0


# Float32 runtimes sum in different orders: about 1e-5 standard deviations of a map, which a 900-pixel anchor turns
# into hundredths of a pixel. The limits are ten times that.
TOLERANCES = {
    "fp32": Tolerance(head=1e-3, head_rms=1e-3, box_px=0.25, score=1e-3),
    # FP16 has 11 significant bits. Measured with the official yolov7 on COCO images: raw maps within 0.035 standard
    # deviations (24 images; the eight variants with random weights: 0.03), decoded boxes within 2.9 pixels (the widest
    # ones) and scores within 0.0043 (82 images); at conf 0.25 no detection swapped, at 0.01 at most two per image. The
    # limits are three times that, and a little more for scores, which depend most on the weights. A layer with
    # overflow or underflow is off by tenths of a standard deviation and more.
    "fp16": Tolerance(head=0.1, head_rms=0.1, box_px=9, score=0.02, swaps=3),
    # INT8 has 8 bits and clips, so single cells may differ by any amount: only means over a map and detections are
    # checked. Measured with the official yolov7 on 24 COCO images: means within 0.10 standard deviations of a map,
    # scores of matched detections within 0.18, no detection with a score above conf + 0.3 missing. Whether that is
    # good enough, AP shows (`y7 verify --data`).
    "int8": Tolerance(head=math.inf, head_rms=0.3, box_px=math.inf, score=0.3, swaps=2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """Differences at one stage on one image, or the largest ones over several images.

    Attributes:
        stage: One of `STAGES`.
        differences: Largest difference of each compared quantity.
        limits: Maximum allowed difference of each quantity that is checked.
        note: A remark, such as the number of matched detections.
    """

    stage: str
    differences: dict[str, float]
    limits: dict[str, float]
    note: str = ""

    @property
    def ok(self) -> bool:
        """True if no difference exceeds its limit; NaN exceeds every limit."""
        return all(self.differences[name] <= limit for name, limit in self.limits.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """Results of all stages that both artifacts provide, with the largest differences over the images."""

    reference: str
    against: str
    images: int
    stages: tuple[StageResult, ...]

    @property
    def ok(self) -> bool:
        """True if every stage is within tolerance."""
        return all(stage.ok for stage in self.stages)

    @property
    def first_failure(self) -> StageResult | None:
        """The first stage over its tolerance, or `None`."""
        return next((stage for stage in self.stages if not stage.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        document = asdict(self)
        for row, stage in zip(document["stages"], self.stages, strict=True):
            row["ok"] = stage.ok
        return {**document, "ok": self.ok}


class StageProbe(Protocol):
    """An object that provides intermediate outputs: `PytorchRuntime` or `OnnxProbe`."""

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """Return the intermediate outputs for one canvas, uint8 BGR [H, W, 3]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One model to compare, with its runtime; `probe` is `None` if it has no intermediate outputs."""

    name: str
    runtime: Runtime
    probe: StageProbe | None
    input_hw: tuple[int, int]


def compare(
    reference: Artifact,
    against: Artifact,
    images: Sequence[Image],
    *,
    thresholds: Thresholds,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare two artifacts on the same images (uint8 BGR), stage by stage.

    If the thresholds are fixed in a file, `thresholds` must be the same.

    Raises:
        UsageError: There is no image, or the artifacts have different input sizes.
    """
    if not images:
        raise UsageError("There is no image to compare on.", fix="Pass some:  --images DIR")
    if reference.input_hw != against.input_hw:
        (h, w), (other_h, other_w) = reference.input_hw, against.input_hw
        raise UsageError(
            f"{reference.name} takes {h}x{w}, {against.name} {other_h}x{other_w}: no stage is comparable.",
            fix=f"Export both with the same input size:  --img {h},{w}",
        )
    worst: dict[str, StageResult] = {}
    for done, image in enumerate(images, 1):
        for result in _compare_image(reference, against, image, thresholds):
            worst[result.stage] = _merge_worst(worst.get(result.stage), result)
        if progress:
            progress(done, len(images))
    report = ParityReport(
        reference=reference.name,
        against=against.name,
        images=len(images),
        stages=tuple(worst[stage] for stage in STAGES if stage in worst),
    )
    logger.info("%s against %s on %d images: %s", against.name, reference.name, len(images), report.ok)
    return report


def _compare_image(reference: Artifact, against: Artifact, image: Image, thresholds: Thresholds) -> list[StageResult]:
    tolerance = _tolerance(reference.runtime.metadata, against.runtime.metadata)
    letterbox = fit_letterbox((image.shape[0], image.shape[1]), reference.input_hw)
    results = []
    if reference.probe and against.probe:
        canvas = letterbox.apply(image)
        theirs, ours = reference.probe.stages(canvas), against.probe.stages(canvas)
        if theirs.heads and ours.heads:
            results.append(_compare_heads(theirs.heads, ours.heads, tolerance))
        if theirs.decoded is not None and ours.decoded is not None:
            results.append(_compare_decoded(theirs.decoded, ours.decoded, tolerance))
    # With conf 0 and IoU 1, a file with NMS inside returns all its decoded candidates.
    nms = against.runtime.metadata.nms or reference.runtime.metadata.nms
    if nms is not None and nms.runtime_thresholds and tolerance.head < math.inf:
        no_nms, no_swaps = replace(thresholds, conf=0.0, iou=1.0), replace(tolerance, swaps=0)
        results.append(_compare_detections("candidates", reference, against, image, letterbox, no_nms, no_swaps))
    results.append(_compare_detections("detections", reference, against, image, letterbox, thresholds, tolerance))
    return results


def _tolerance(reference: ModelMetadata, against: ModelMetadata) -> Tolerance:
    """Return the tolerance for the lower one of the two precisions."""
    order = list(TOLERANCES)
    return TOLERANCES[max(reference.precision, against.precision, key=order.index)]


def _compare_heads(reference: Sequence[FloatArray], against: Sequence[FloatArray], tolerance: Tolerance) -> StageResult:
    # np.max returns NaN if any value is NaN; Python's max would depend on the order.
    pairs = list(zip(reference, against, strict=True))
    spread = np.max([np.abs(a - b).max() / max(a.std(), 1e-6) for a, b in pairs])
    rms = np.max([np.sqrt(np.square(a - b).mean()) / max(a.std(), 1e-6) for a, b in pairs])
    return StageResult(
        stage="head",
        differences={"raw / std": float(spread), "rms / std": float(rms)},
        limits=_without_infinite({"raw / std": tolerance.head, "rms / std": tolerance.head_rms}),
        note=f"{len(reference)} levels",
    )


def _compare_decoded(reference: FloatArray, against: FloatArray, tolerance: Tolerance) -> StageResult:
    boxes = np.abs(xywh_to_xyxy(reference[:, :4]) - xywh_to_xyxy(against[:, :4]))
    scores = np.abs(_scores(reference) - _scores(against))
    limits = {"box px": tolerance.box_px, "score": tolerance.score}
    return StageResult(
        stage="decode",
        differences={"box px": float(boxes.max()), "score": float(scores.max())},
        limits=_without_infinite(limits) if tolerance.head < math.inf else {},
        note=f"{len(reference)} anchors",
    )


def _without_infinite(limits: dict[str, float]) -> dict[str, float]:
    """Return the limits without infinite ones: these quantities are reported but not checked."""
    return {name: limit for name, limit in limits.items() if limit < math.inf}


def _scores(decoded: FloatArray) -> FloatArray:
    objectness = decoded[:, 4:5]
    return objectness * decoded[:, 5:] if decoded.shape[1] > 6 else objectness


def _compare_detections(
    stage: str,
    reference: Artifact,
    against: Artifact,
    image: Image,
    letterbox: Letterbox,
    thresholds: Thresholds,
    tolerance: Tolerance,
) -> StageResult:
    a, b = (artifact.runtime.infer([image], [letterbox], thresholds).detections[0] for artifact in (reference, against))
    pairs = match_detections(a, b)
    unmatched_a, unmatched_b = (
        scores[np.setdiff1d(np.arange(len(scores)), pairs[:, side])] for side, scores in enumerate((a.scores, b.scores))
    )
    # A detection whose score is close to conf, or to the last score of max_det, may be in one artifact only.
    min_score = max([thresholds.conf, *(float(f.scores[-1]) for f in (a, b) if len(f.scores) >= thresholds.max_det)])
    missing = int((unmatched_a > min_score + tolerance.score).sum())
    extra = int((unmatched_b > min_score + tolerance.score).sum())
    boxes = np.abs(a.boxes[pairs[:, 0]] - b.boxes[pairs[:, 1]]).max(axis=1, initial=0)
    scores = np.abs(a.scores[pairs[:, 0]] - b.scores[pairs[:, 1]])
    swapped = (boxes > tolerance.box_px) | (scores > tolerance.score)
    if swapped.sum() <= tolerance.swaps:
        boxes, scores = boxes[~swapped], scores[~swapped]
    limits = {
        "box px": tolerance.box_px,
        "score": tolerance.score,
        "missing": tolerance.swaps,
        "extra": tolerance.swaps,
    }
    return StageResult(
        stage=stage,
        differences={
            "box px": float(boxes.max(initial=0)),
            "score": float(scores.max(initial=0)),
            "missing": missing,
            "extra": extra,
        },
        limits=_without_infinite(limits),
        note=f"{len(pairs)} of {len(a.scores)} matched",
    )


def match_detections(a: RawDetections, b: RawDetections) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return index pairs [M, 2] of detections of the same class with an IoU of at least `SAME_OBJECT_IOU`.

    Matching is greedy in descending order of IoU; ties in order of score.
    """
    overlap = iou_matrix(a.boxes, b.boxes)
    overlap[a.class_ids[:, None] != b.class_ids[None]] = 0
    rows, columns = np.nonzero(overlap >= SAME_OBJECT_IOU)
    pairs: list[tuple[int, int]] = []
    used_a: set[int] = set()
    used_b: set[int] = set()
    for k in np.argsort(-overlap[rows, columns], kind="stable"):
        i, j = int(rows[k]), int(columns[k])
        if i not in used_a and j not in used_b:
            pairs.append((i, j))
            used_a.add(i)
            used_b.add(j)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _merge_worst(old: StageResult | None, new: StageResult) -> StageResult:
    if old is None:
        return new
    merged = {name: float(np.maximum(old.differences[name], value)) for name, value in new.differences.items()}
    return replace(new, differences=merged, note=old.note if old.note == new.note else _sum_counts(old.note, new.note))


def _sum_counts(old: str, new: str) -> str:
    """Return `8 of 9 matched` for `3 of 4 matched` and `5 of 5 matched`."""
    (a, _, b, *rest), (c, _, d, *_) = old.split(), new.split()
    return " ".join([str(int(a) + int(c)), "of", str(int(b) + int(d)), *rest])


def make_artifact(name: str, runtime: Runtime, path: Path | None, *, input_hw: tuple[int, int]) -> Artifact:
    """Return an artifact with a probe for intermediate outputs, if its file format allows that.

    Args:
        name: Name in the report.
        runtime: The opened model.
        path: Its file, `None` for a model in memory.
        input_hw: Input size for the comparison.
    """
    probe: StageProbe | None = None
    if hasattr(runtime, "stages"):
        probe = runtime  # type: ignore[assignment]
    elif path is not None and path.suffix == ".onnx" and runtime.metadata.heads:
        from yolov7_deploy.evaluation.onnx_probe import OnnxProbe

        probe = OnnxProbe(path)
    return Artifact(name=name, runtime=runtime, probe=probe, input_hw=input_hw)


def comparison_thresholds(metadata: ModelMetadata) -> Thresholds:
    """Return the thresholds of the NMS inside a file, else the defaults with a low `conf` for more detections."""
    nms = metadata.nms
    if nms is None:
        return Thresholds(conf=0.01)
    return Thresholds(
        conf=nms.conf,
        iou=nms.iou,
        max_det=nms.max_det,
        multi_label=nms.multi_label,
        class_agnostic=nms.class_agnostic,
    )
