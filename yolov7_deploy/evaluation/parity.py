"""Where two forms of the same model part: letterbox, head, decode, candidates, detections, stage by stage.

Each stage is compared on the same image, so the first stage over its tolerance is where the loss begins.
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
from yolov7_deploy.postprocess import iou_matrix, xywh_to_xyxy
from yolov7_deploy.runtimes.base import Backend, IntermediateOutputs, RawDetections

logger = logging.getLogger(__name__)

SAME_OBJECT_IOU = 0.5
STAGES = ("letterbox", "head", "decode", "candidates", "detections")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far two forms may differ.

    Attributes:
        head: Largest difference of a raw map, in standard deviations of that map; infinite where it says nothing.
        head_rms: Root of the mean squared difference, in the same.
        box_px: Largest difference of a box side, in input pixels.
        score: Largest difference of a score; also how close to `conf` a detection may be found by one form only.
        swaps: Detections an image that may differ by more, or be found by one form only: between two boxes that
            overlap by nearly `iou`, or score nearly alike, NMS decides by the last bit.
    """

    head: float
    head_rms: float
    box_px: float
    score: float
    swaps: int = 0


# Two float32 runtimes add in different orders: about 1e-5 of a map's spread, which a 900-pixel anchor turns into
# hundredths of a pixel. The limits leave a factor of ten.
TOLERANCES = {
    "fp32": Tolerance(head=1e-3, head_rms=1e-3, box_px=0.25, score=1e-3),
    # Half keeps 11 bits. Measured with the official yolov7 on images of COCO: raw maps within 0.035 of their spread
    # (24 images; the eight variants with random weights: 0.03), decoded boxes within 2.9 pixels (the widest ones) and
    # scores within 0.0043 (82 images); at conf 0.25 no detection swapped, at 0.01 at most two an image. The limits
    # leave a factor of three; scores, which depend on the weights most, a little more. A layer that overflows or loses
    # its bits is off by tenths of a spread and more.
    "fp16": Tolerance(head=0.1, head_rms=0.1, box_px=9, score=0.02, swaps=3),
    # INT8 keeps 8 bits and clips: single cells differ by anything, so only means over a map and plain detections count.
    # Measured with the official yolov7 on 24 images of COCO: means within 0.10 of a map's spread, scores of matched
    # detections within 0.18, none of a score above conf + 0.3 lost. What that is worth, AP says (`y7 verify --data`).
    "int8": Tolerance(head=math.inf, head_rms=0.3, box_px=math.inf, score=0.3, swaps=2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """One stage on one image, or the worst over several.

    Attributes:
        stage: One of `STAGES`.
        differences: By what was compared, the largest difference found.
        limits: By the same names, the largest allowed.
        note: What else to know, such as how many detections were matched.
    """

    stage: str
    differences: dict[str, float]
    limits: dict[str, float]
    note: str = ""

    @property
    def ok(self) -> bool:
        """Nothing is over its limit; a difference that is no number is over every limit."""
        return all(self.differences[name] <= limit for name, limit in self.limits.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """All stages that both forms show, each with its worst image."""

    reference: str
    against: str
    images: int
    stages: tuple[StageResult, ...]

    @property
    def ok(self) -> bool:
        """Every stage is within tolerance."""
        return all(stage.ok for stage in self.stages)

    @property
    def first_loss(self) -> StageResult | None:
        """The first stage over its tolerance: where the two part."""
        return next((stage for stage in self.stages if not stage.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        document = asdict(self)
        for row, stage in zip(document["stages"], self.stages, strict=True):
            row["ok"] = stage.ok
        return {**document, "ok": self.ok}


class StageProbe(Protocol):
    """Something that shows its stages: the torch backend, or an `OnnxProbe`."""

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """What it makes of one canvas."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One form of the model under comparison."""

    name: str
    backend: Backend
    inside: StageProbe | None
    input_hw: tuple[int, int]


def compare(
    reference: Artifact,
    against: Artifact,
    images: Sequence[Image],
    *,
    thresholds: Thresholds,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """The stages of two forms on the same images (uint8 BGR).

    Thresholds that the files fix must agree with `thresholds`.

    Raises:
        UsageError: There is no image, or the forms take inputs of different sizes.
    """
    if not images:
        raise UsageError("There is no image to compare on.", fix="Give some:  --images DIR")
    if reference.input_hw != against.input_hw:
        (h, w), (other_h, other_w) = reference.input_hw, against.input_hw
        raise UsageError(
            f"{reference.name} takes {h}x{w}, {against.name} {other_h}x{other_w}: no stage is comparable.",
            fix=f"Export both at one size:  --img {h},{w}",
        )
    worst: dict[str, StageResult] = {}
    for done, image in enumerate(images, 1):
        for result in _one_image(reference, against, image, thresholds):
            worst[result.stage] = _worse(worst.get(result.stage), result)
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


def _one_image(reference: Artifact, against: Artifact, image: Image, thresholds: Thresholds) -> list[StageResult]:
    tolerance = _coarser(reference.backend.metadata, against.backend.metadata)
    placed = fit_letterbox((image.shape[0], image.shape[1]), reference.input_hw)
    results = []
    if reference.inside and against.inside:
        canvas = placed.apply(image)
        theirs, ours = reference.inside.stages(canvas), against.inside.stages(canvas)
        if theirs.heads and ours.heads:
            results.append(_heads(theirs.heads, ours.heads, tolerance))
        if theirs.decoded is not None and ours.decoded is not None:
            results.append(_decoded(theirs.decoded, ours.decoded, tolerance))
    # Without a threshold and without NMS, what comes out of a file with NMS inside is its decoding.
    nms = against.backend.metadata.nms or reference.backend.metadata.nms
    if nms is not None and nms.runtime_thresholds and tolerance.head < math.inf:
        everything = replace(thresholds, conf=0.0, iou=1.0)
        unsuppressed = replace(tolerance, swaps=0)
        results.append(_found("candidates", reference, against, image, placed, everything, unsuppressed))
    results.append(_found("detections", reference, against, image, placed, thresholds, tolerance))
    return results


def _coarser(*infos: ModelMetadata) -> Tolerance:
    """The tolerance of the form of the lowest precision: no other can be nearer to it than it is to the truth."""
    order = list(TOLERANCES)
    return TOLERANCES[max((metadata.precision for metadata in infos), key=order.index)]


def _heads(reference: Sequence[FloatArray], against: Sequence[FloatArray], tolerance: Tolerance) -> StageResult:
    # NumPy's largest is no number where any of them is none; Python's would be whichever came first.
    pairs = list(zip(reference, against, strict=True))
    spread = np.max([np.abs(a - b).max() / max(a.std(), 1e-6) for a, b in pairs])
    rms = np.max([np.sqrt(np.square(a - b).mean()) / max(a.std(), 1e-6) for a, b in pairs])
    return StageResult(
        stage="head",
        differences={"raw / std": float(spread), "rms / std": float(rms)},
        limits=_finite({"raw / std": tolerance.head, "rms / std": tolerance.head_rms}),
        note=f"{len(reference)} levels",
    )


def _decoded(reference: FloatArray, against: FloatArray, tolerance: Tolerance) -> StageResult:
    boxes = np.abs(xywh_to_xyxy(reference[:, :4]) - xywh_to_xyxy(against[:, :4]))
    scores = np.abs(_scores(reference) - _scores(against))
    return StageResult(
        stage="decode",
        differences={"box px": float(boxes.max()), "score": float(scores.max())},
        limits=_finite({"box px": tolerance.box_px, "score": tolerance.score}) if tolerance.head < math.inf else {},
        note=f"{len(reference)} anchors",
    )


def _finite(limits: dict[str, float]) -> dict[str, float]:
    """What has no limit is left out: it is shown and not judged."""
    return {name: limit for name, limit in limits.items() if limit < math.inf}


def _scores(decoded: FloatArray) -> FloatArray:
    objectness = decoded[:, 4:5]
    return objectness * decoded[:, 5:] if decoded.shape[1] > 6 else objectness


def _found(
    stage: str,
    reference: Artifact,
    against: Artifact,
    image: Image,
    placed: Letterbox,
    thresholds: Thresholds,
    tolerance: Tolerance,
) -> StageResult:
    a, b = (form.backend.infer([image], [placed], thresholds).found[0] for form in (reference, against))
    pairs = matched(a, b)
    alone_a, alone_b = (
        scores[np.setdiff1d(np.arange(len(scores)), pairs[:, side])] for side, scores in enumerate((a.scores, b.scores))
    )
    # Whoever sits on a threshold, or on the last place of max_det, may fall to either side.
    floor = max([thresholds.conf, *(float(f.scores[-1]) for f in (a, b) if len(f.scores) >= thresholds.max_det)])
    lost = int((alone_a > floor + tolerance.score).sum())
    extra = int((alone_b > floor + tolerance.score).sum())
    boxes = np.abs(a.boxes[pairs[:, 0]] - b.boxes[pairs[:, 1]]).max(axis=1, initial=0)
    scores = np.abs(a.scores[pairs[:, 0]] - b.scores[pairs[:, 1]])
    swapped = (boxes > tolerance.box_px) | (scores > tolerance.score)
    if swapped.sum() <= tolerance.swaps:
        boxes, scores = boxes[~swapped], scores[~swapped]
    return StageResult(
        stage=stage,
        differences={
            "box px": float(boxes.max(initial=0)),
            "score": float(scores.max(initial=0)),
            "lost": lost,
            "extra": extra,
        },
        limits=_finite(
            {
                "box px": tolerance.box_px,
                "score": tolerance.score,
                "lost": tolerance.swaps,
                "extra": tolerance.swaps,
            }
        ),
        note=f"{len(pairs)} of {len(a.scores)} matched",
    )


def matched(a: RawDetections, b: RawDetections) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Index pairs [M, 2] of detections of the same class that overlap best, at least by `SAME_OBJECT_IOU`.

    Pairs are made in order of overlap; equal overlaps in order of score.
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


def _worse(old: StageResult | None, new: StageResult) -> StageResult:
    if old is None:
        return new
    merged = {name: float(np.maximum(old.differences[name], value)) for name, value in new.differences.items()}
    return replace(new, differences=merged, note=old.note if old.note == new.note else _counted(old.note, new.note))


def _counted(old: str, new: str) -> str:
    """`3 of 4 matched` and `5 of 5 matched` as `8 of 9 matched`."""
    (a, _, b, *rest), (c, _, d, *_) = old.split(), new.split()
    return " ".join([str(int(a) + int(c)), "of", str(int(b) + int(d)), *rest])


def form(name: str, backend: Backend, path: Path | None, *, input_hw: tuple[int, int]) -> Artifact:
    """A form with a look inside where its kind of file allows one.

    Args:
        name: For the report.
        backend: The opened model.
        path: Its file, `None` for a model in memory.
        input_hw: Input size to compare at.
    """
    inside: StageProbe | None = None
    if hasattr(backend, "stages"):
        inside = backend  # type: ignore[assignment]
    elif path is not None and path.suffix == ".onnx" and backend.metadata.heads:
        from yolov7_deploy.evaluation.onnx_probe import OnnxProbe

        inside = OnnxProbe(path)
    return Artifact(name=name, backend=backend, inside=inside, input_hw=input_hw)


def comparison_thresholds(metadata: ModelMetadata) -> Thresholds:
    """Those inside a file, else the official ones with a low `conf`, so that there is something to compare."""
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
