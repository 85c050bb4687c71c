"""Comparison of two artifacts of one model, stage by stage: head, decode, NMS, detections.

All stages run on the same image, so a difference begins at the first stage over its tolerance. Detections are compared
with the boxes before NMS, because NMS turns the smallest differences into other detections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from yolov7_deploy._process import temporary_folder
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import UsageError
from yolov7_deploy.evaluation.nms_consistency import candidate_limit
from yolov7_deploy.evaluation.parity_stages import (
    STAGES,
    TOLERANCES,
    NetworkRun,
    StageResult,
    compare_decoding,
    compare_heads,
    compare_lists,
    compare_nms,
    compare_with_boxes,
    lower_precision,
    measured_slack,
    merge_worst,
)
from yolov7_deploy.image import Image, Letterbox, fit_letterbox
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Thresholds, file_thresholds, size_text
from yolov7_deploy.postprocess import RawDetections
from yolov7_deploy.runtimes.base import IntermediateOutputs, Runtime
from yolov7_deploy.runtimes.onnx_session import OnnxRuntime

logger = get_logger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """Results of all stages that both artifacts provide, with the largest differences over the images.

    Attributes:
        reference, against: Names of the artifacts.
        images: Number of images.
        conf: Confidence threshold of the detections; lower than requested if none was above that.
        stages: One result per stage.
    """

    reference: str
    against: str
    images: int
    conf: float
    stages: tuple[StageResult, ...]

    @property
    def ok(self) -> bool:
        """True if detections were compared and every stage is within tolerance."""
        return self.verified and self.first_failure is None

    @property
    def verified(self) -> bool:
        """True if at least one detection was compared."""
        return self.compared > 0

    @property
    def compared(self) -> int:
        """Number of detections that were compared."""
        return sum(stage.compared for stage in self.stages)

    @property
    def first_failure(self) -> StageResult | None:
        """The first stage over its tolerance, or `None`."""
        return next((stage for stage in self.stages if not stage.ok), None)

    @property
    def not_verified_reason(self) -> str:
        """A sentence that says why the report proves nothing; empty if it is `verified`."""
        if self.verified:
            return ""
        images = "the image" if self.images == 1 else f"the {self.images} images"
        return f"NOT VERIFIED: {self.reference} detects nothing on {images}, so no detection was compared."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        document = asdict(self)
        for row, stage in zip(document["stages"], self.stages, strict=True):
            row["ok"] = stage.ok
        return {**document, "ok": self.ok, "verified": self.verified, "compared": self.compared}


class StageProbe(Protocol):
    """An object that provides intermediate outputs: `PytorchRuntime` or `OnnxProbe`."""

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """Return the intermediate outputs for one canvas, uint8 BGR [H, W, 3]."""
        ...


class StageMemory:
    """A probe that runs once for each canvas, for comparisons with several artifacts on few images."""

    def __init__(self, probe: StageProbe) -> None:
        self._probe = probe
        self._outputs: dict[tuple[tuple[int, ...], bytes], IntermediateOutputs] = {}

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """See `StageProbe.stages`."""
        key = (canvas.shape, canvas.tobytes())
        if key not in self._outputs:
            self._outputs[key] = self._probe.stages(canvas)
        return self._outputs[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One model to compare, with its runtime and file; `probe` is `None` if it has no intermediate outputs."""

    name: str
    runtime: Runtime
    path: Path | None
    probe: StageProbe | None
    input_hw: tuple[int, int]

    @property
    def metadata(self) -> ModelMetadata:
        """Metadata of the model."""
        return self.runtime.metadata

    def run_network(self, canvas: Image) -> NetworkRun:
        """Return the intermediate outputs for one canvas, as far as there are any."""
        outputs = self.probe.stages(canvas) if self.probe else IntermediateOutputs(heads=[], decoded=None)
        return NetworkRun.of(outputs, self.metadata)

    def detect(self, image: Image, letterbox: Letterbox, thresholds: Thresholds) -> RawDetections:
        """Return the detections in one image."""
        return self.runtime.infer([image], [letterbox], thresholds).detections[0]

    @property
    def lowest_conf(self) -> float:
        """The lowest confidence threshold that `with_conf` can set; the graph of an ONNX file can be changed."""
        nms = self.metadata.nms
        return 0.0 if nms is None or nms.runtime_thresholds or self._efficient_file() else nms.conf

    def _efficient_file(self) -> Path | None:
        """Return the file, if it is an ONNX file of this package with EfficientNMS_TRT."""
        nms = self.metadata.nms
        is_onnx = self.path is not None and self.path.suffix == ".onnx" and bool(self.metadata.heads)
        return self.path if is_onnx and nms is not None and nms.kind == "efficient" else None

    @contextlib.contextmanager
    def with_conf(self, conf: float) -> Iterator[Artifact]:
        """Yield this artifact, or a copy that has the confidence threshold if its own is higher and fixed."""
        nms, path = self.metadata.nms, self._efficient_file()
        if path is None or not isinstance(self.runtime, OnnxRuntime) or nms is None or nms.conf <= conf:
            yield self
            return
        from yolov7_deploy.evaluation.onnx_probe import copy_with_conf

        with temporary_folder("y7-verify") as folder:
            copy = folder / "copy.onnx"
            copy_with_conf(path, copy, conf=conf)
            runtime = self.runtime.open_copy(copy)
            try:
                yield make_artifact(self.name, runtime, copy, input_hw=self.input_hw)
            finally:
                runtime.close()


def compare(
    reference: Artifact,
    against: Artifact,
    images: Sequence[Image],
    *,
    thresholds: Thresholds,
    progress: Progress | None = None,
) -> ParityReport:
    """Compare two artifacts on the same images (uint8 BGR), stage by stage.

    If no detection is above `thresholds.conf`, the images are compared again with half of the best score; if it is
    fixed in an ONNX file, with a copy of the file.

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
            fix=f"Export both with the same input size:  --img {size_text((h, w))}",
        )
    report = _compare_images(reference, against, images, thresholds, progress)
    lower = None if report.verified else _lower_conf(reference, against, images, thresholds)
    if lower is not None:
        with reference.with_conf(lower.conf) as first, against.with_conf(lower.conf) as second:
            report = _compare_images(first, second, images, lower, progress)
    logger.info("%s against %s on %d images: %s", against.name, reference.name, len(images), report.ok)
    return report


def _compare_images(
    reference: Artifact, against: Artifact, images: Sequence[Image], thresholds: Thresholds, progress: Progress | None
) -> ParityReport:
    worst: dict[str, StageResult] = {}
    for done, image in enumerate(images, 1):
        for result in _compare_image(reference, against, image, thresholds):
            worst[result.stage] = merge_worst(worst.get(result.stage), result)
        if progress:
            progress(done, len(images))
    return ParityReport(
        reference=reference.name,
        against=against.name,
        images=len(images),
        conf=thresholds.conf,
        stages=tuple(worst[stage] for stage in STAGES if stage in worst),
    )


def _lower_conf(
    reference: Artifact, against: Artifact, images: Sequence[Image], thresholds: Thresholds
) -> Thresholds | None:
    """Return the thresholds with half of the reference's best score as `conf`; `None` if it is fixed above that."""
    lowest, best = max(reference.lowest_conf, against.lowest_conf), 0.0
    with reference.with_conf(lowest) as artifact:
        for image in images:
            found = artifact.detect(image, _letterbox(artifact, image), replace(thresholds, conf=lowest, max_det=1))
            best = max(best, float(found.scores.max(initial=0)))
    conf = max(float(f"{best / 2:.2g}"), lowest)
    return replace(thresholds, conf=conf) if conf < min(best, thresholds.conf) else None


def _letterbox(artifact: Artifact, image: Image) -> Letterbox:
    return fit_letterbox((image.shape[0], image.shape[1]), artifact.input_hw)


def _compare_image(
    reference: Artifact, against: Artifact, image: Image, thresholds: Thresholds
) -> Iterator[StageResult]:
    """Yield the results of all stages that the artifacts provide."""
    tolerance = TOLERANCES[lower_precision(reference.metadata, against.metadata)]
    letterbox = _letterbox(reference, image)
    canvas = letterbox.apply(image)
    theirs, ours = reference.run_network(canvas), against.run_network(canvas)
    if theirs.heads and ours.heads:
        yield compare_heads(theirs.heads, ours.heads, tolerance)
        yield compare_decoding(theirs, ours)
    if ours.detections is not None and ours.decoded is not None:
        yield compare_nms(ours)
    if theirs.decoded is None and ours.decoded is None:
        expected, actual = (artifact.detect(image, letterbox, thresholds) for artifact in (reference, against))
        yield compare_lists(expected, actual, thresholds, tolerance)
        return
    # The reference may be the one that does not expose its boxes.
    boxes, artifact = (theirs, against) if theirs.decoded is not None else (ours, reference)
    result = compare_with_boxes(
        artifact.detect(image, letterbox, thresholds),
        boxes,
        thresholds,
        tolerance=tolerance,
        slack=measured_slack(theirs, ours, tolerance),
        max_candidates=candidate_limit(artifact.metadata.nms),
    )
    yield result if boxes is theirs else result.with_sides_swapped()


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
    elif path is not None and isinstance(runtime, OnnxRuntime) and runtime.metadata.heads:
        from yolov7_deploy.evaluation.onnx_probe import OnnxProbe

        probe = OnnxProbe(path, runtime)
    return Artifact(name=name, runtime=runtime, path=path, probe=probe, input_hw=input_hw)


def comparison_thresholds(metadata: ModelMetadata) -> Thresholds:
    """Return the thresholds of the NMS inside a file, else the defaults with a low `conf` for more detections."""
    return Thresholds(conf=0.01) if metadata.nms is None else file_thresholds(metadata.nms)
