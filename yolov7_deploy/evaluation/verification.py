"""Verification of several artifacts against the reference they were exported from: stages, matched boxes, AP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov7_deploy._text import get_logger
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import LoadError, UsageError, Y7Error
from yolov7_deploy.evaluation.parity import ParityReport, compare, comparison_thresholds, make_artifact
from yolov7_deploy.evaluation.synthetic_image import synthetic_image
from yolov7_deploy.image import Image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import ValOptions, check_max_drop
from yolov7_deploy.runtimes.base import Runtime, installed_runtimes, open_runtime, runtime_entry
from yolov7_deploy.sources import open_source

if TYPE_CHECKING:
    from yolov7_deploy.evaluation.accuracy import AccuracyReport
    from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop

logger = get_logger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactAccuracy:
    """AP (0..1) of one artifact; all artifacts are evaluated with the same letterbox.

    Attributes:
        weights: Name of the artifact, with the runtime if there are several.
        precision: Precision in which it ran.
        ap, ap50: At IoU 0.50:0.95, and at 0.50.
        drop: AP points lost against the reference, with their interval; `None` for the reference itself, and if it
            has no AP to lose.
        report: All metrics and the predictions; `weights` and `runtime` in it are the file and the name of its runtime.
        metadata: Metadata of the artifact.
        input_hw: Height and width of the network input.
    """

    weights: str
    precision: str
    ap: float
    ap50: float
    drop: AccuracyDrop | None = None
    report: AccuracyReport | None = field(default=None, repr=False, compare=False)
    metadata: ModelMetadata | None = field(default=None, repr=False, compare=False)
    input_hw: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Results of `verify_artifacts`.

    Attributes:
        reports: Stage by stage comparison of each artifact with the reference.
        accuracy: AP of each artifact, the reference first; empty without a dataset.
        images: Number of images.
        failures: One sentence for each artifact that differs too much, loses too much AP, or could not be verified.
        undecided: Those of the failures that chance can explain: the interval of the AP loss contains the allowed one.
        unsure: One sentence for each artifact that passes, on images too few to exclude a loss above the allowed one.
        notes: Runtimes that refuse an artifact, and why.
    """

    reports: tuple[ParityReport, ...]
    accuracy: tuple[ArtifactAccuracy, ...]
    images: int
    failures: tuple[str, ...]
    undecided: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """True if detections of every artifact were compared, and if the reference has an AP to lose."""
        has_ap = not self.accuracy or self.accuracy[0].ap > 0
        return has_ap and all(report.verified for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain data for JSON."""
        return {
            "ok": not self.failures,
            "verified": self.verified,
            "failures": list(self.failures),
            "undecided": list(self.undecided),
            "unsure": list(self.unsure),
            "notes": list(self.notes),
            "images": self.images,
            "reports": [report.to_dict() for report in self.reports],
            "accuracy": [
                {
                    "weights": row.weights,
                    "precision": row.precision,
                    "ap": row.ap,
                    "ap50": row.ap50,
                    "drop": None if row.drop is None else row.drop.to_dict(),
                }
                for row in self.accuracy
            ],
        }


def verify_artifacts(
    reference: Path,
    others: Sequence[Path],
    *,
    images: Path | None = None,
    data: Path | Dataset | None = None,
    limit: int = 16,
    max_drop: float = 0.3,
    device: str = "cpu",
    runtime: str = "auto",
    progress: Progress | None = None,
) -> Verification:
    """Compare each of `others` with `reference` on the same images, in every runtime that is installed.

    Args:
        reference, others: Model files.
        images: Folder, file, pattern or list; by default the images of `data`, or else a synthetic one.
        data: Dataset for measuring AP. One that is open is measured on all of its images.
        limit: Maximum number of images.
        max_drop: Maximum loss in AP points (of 100).
        device: Device of all runtimes.
        runtime: The only runtime for ONNX files; `auto` uses all. Only then, one that refuses a file is a note.
        progress: Called with the number of finished and of all steps.

    Raises:
        UsageError: The artifacts differ in input size or classes, `limit` is below 1, or `max_drop` not 0 to 100.
    """
    check_max_drop(max_drop)
    if limit < 1:
        raise UsageError(f"--limit {limit} leaves no image to compare on.", fix="For example: --limit 16")
    dataset = open_dataset(data, limit=limit) if isinstance(data, Path) else data
    source = images or ([dataset.path(i) for i in range(len(dataset))] if dataset else None)
    frames = _read_images(source, limit)
    runs, notes = _find_runs(others, device, runtime)
    reports = [compare_stages(reference, run, frames, device, progress) for run in runs]
    accuracy = _measure_accuracy([Run(reference), *runs], dataset, device, progress) if dataset else []
    undecided = undecided_losses(accuracy, max_drop)
    return Verification(
        reports=tuple(reports),
        accuracy=tuple(accuracy),
        images=len(dataset) if dataset else len(frames) or 1,
        failures=(*stage_failures(reports), *accuracy_failures(accuracy, max_drop), *undecided),
        undecided=tuple(undecided),
        unsure=tuple(unsure_losses(accuracy, max_drop)),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """An artifact in a runtime; the name has the runtime if there are several."""

    path: Path
    runtime: str = "auto"
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.path)


def _find_runs(paths: Sequence[Path], device: str, runtime: str) -> tuple[list[Run], list[str]]:
    """Return every artifact in every runtime, and the reasons of runtimes that refuse one."""
    runs, notes = [], []
    for path in paths:
        names = installed_runtimes(path, device) if runtime == "auto" else (runtime,)
        accepted, refusals = [], []
        for name in names:
            try:
                open_runtime(path, device=device, input_hw=None, half=_reference_half(path), runtime=name).close()
            except Y7Error as error:
                if len(names) == 1:
                    raise
                refusals.append(f"{path} was not run in {name}: {error.message}")
                continue
            accepted.append(name)
        if not accepted:
            raise LoadError(f"No runtime opens {path}.", fix="  ".join(refusals))
        notes += refusals
        runs += [Run(path, name, f"{path} ({name})" if len(names) > 1 else "") for name in accepted]
    return runs, notes


def compare_stages(
    reference: Path, run: Run, images: Sequence[Image], device: str, progress: Progress | None = None
) -> ParityReport:
    """Compare an artifact in one runtime with the reference; see `compare`.

    Args:
        reference: The file it was exported from.
        run: The artifact and its runtime.
        images: uint8 BGR; without any, a synthetic one.
        device: Device of both.
        progress: Called with the number of finished and of all images.
    """
    with contextlib.ExitStack() as stack:
        original, other = (
            stack.enter_context(
                contextlib.closing(
                    open_runtime(
                        each.path, device=device, input_hw=None, half=_reference_half(each.path), runtime=each.runtime
                    )
                )
            )
            for each in (Run(reference), run)
        )
        return _compare_runtimes(reference, original, run, other, images, progress)


def _compare_runtimes(
    reference: Path,
    original: Runtime,
    run: Run,
    other: Runtime,
    images: Sequence[Image],
    progress: Progress | None,
) -> ParityReport:
    path = run.path
    _check_same_classes(reference, original.metadata, path, other.metadata)
    hw = common_input_hw([original.metadata, other.metadata])
    for file, metadata in ((reference, original.metadata), (path, other.metadata)):
        _check_stride(file, metadata, hw)
    return compare(
        make_artifact(str(reference), original, reference, input_hw=original.metadata.input_hw or hw),
        make_artifact(str(run), other, path, input_hw=other.metadata.input_hw or hw),
        images or [synthetic_image(hw)],
        thresholds=comparison_thresholds(_metadata_with_nms(original, other)),
        progress=progress,
    )


def _measure_accuracy(
    runs: Sequence[Run], dataset: Dataset, device: str, progress: Progress | None
) -> list[ArtifactAccuracy]:
    """Return the AP of each artifact at one input size."""
    size = common_input_hw([_read_metadata(run, device) for run in runs])
    # Imported here because faster-coco-eval is needed only with a dataset.
    from yolov7_deploy.evaluation.accuracy import evaluate
    from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop

    accuracy: list[ArtifactAccuracy] = []
    for run in runs:
        img, half = None if _is_fixed(run.path) else size, _reference_half(run.path)
        with Detector(run.path, device=device, img=img, half=half, runtime=run.runtime) as detector:
            try:
                report = evaluate(detector, dataset, options=ValOptions(rect=False, batch=1), progress=progress)
            except UsageError as error:  # NaN in a box or score
                raise UsageError(f"{run}: {error.message}", fix=error.fix) from error
            report = replace(report, weights=str(run.path), runtime=detector.runtime)
            metadata, input_hw = detector.metadata, detector.input_hw
        reference = accuracy[0].report if accuracy else None
        drop = None
        if reference is not None and reference.ap:
            used = used_images(dataset, report)
            drop = accuracy_drop(dataset, used, reference.predictions, report.predictions)
        accuracy.append(
            ArtifactAccuracy(
                weights=str(run),
                precision=report.precision,
                ap=report.ap or 0.0,
                ap50=report.ap50 or 0.0,
                drop=drop,
                report=report,
                metadata=metadata,
                input_hw=input_hw,
            )
        )
    return accuracy


def used_images(dataset: Dataset, accuracy: AccuracyReport) -> list[int]:
    """Return the indices of the images on which AP was measured: all but those that could not be read."""
    skipped = {item.path for item in accuracy.skipped}
    return [index for index in range(len(dataset)) if str(dataset.path(index)) not in skipped]


def common_input_hw(artifacts: Sequence[ModelMetadata]) -> tuple[int, int]:
    """Return the input size at which artifacts are compared: a fixed one, else a training size, else the paper's."""
    fixed = [metadata.input_hw for metadata in artifacts if metadata.input_hw is not None]
    trained = [metadata.default_hw for metadata in artifacts if metadata.training_size is not None]
    return next(iter([*fixed, *trained]), artifacts[0].default_hw)


def _read_metadata(run: Run, device: str) -> ModelMetadata:
    half = _reference_half(run.path)
    runtime = open_runtime(run.path, device=device, input_hw=None, half=half, runtime=run.runtime)
    try:
        return runtime.metadata
    finally:
        runtime.close()


def _read_images(source: Path | list[Path] | None, limit: int) -> list[Image]:
    if source is None:
        return []
    with open_source(source) as frames:
        return [frame.image for frame in islice(frames, limit)]


def _is_fixed(path: Path) -> bool:
    """Return whether input size and precision are fixed in the file; those of a checkpoint are not."""
    return runtime_entry(path).name != "pytorch"


def _reference_half(path: Path) -> bool | None:
    """Return the option `half` of a runtime: checkpoints run in float32 on every device, as the reference."""
    return None if _is_fixed(path) else False


def _metadata_with_nms(reference: Runtime, other: Runtime) -> ModelMetadata:
    """Return the metadata of a file with NMS inside, if one of the two has it."""
    return other.metadata if other.metadata.nms is not None else reference.metadata


def _check_same_classes(reference: Path, expected: ModelMetadata, path: Path, actual: ModelMetadata) -> None:
    if len(expected.class_names) != len(actual.class_names):
        raise UsageError(
            f"{reference} has {len(expected.class_names)} classes, {path} {len(actual.class_names)}: "
            "not the same model.",
            fix="Compare a file with the weights from which it was exported.",
        )


def _check_stride(path: Path, metadata: ModelMetadata, hw: tuple[int, int]) -> None:
    if metadata.input_hw is None and any(side % metadata.stride for side in hw):
        raise UsageError(
            f"{path} cannot run at {hw[0]}x{hw[1]}, the size of the other file: its stride is {metadata.stride}.",
            fix="Compare a file with the weights from which it was exported.",
        )


def stage_failures(reports: Sequence[ParityReport]) -> list[str]:
    """Return a sentence for each artifact that differs too much, or of which no detection was compared."""
    failures = [report.not_verified_reason for report in reports if not report.verified]
    for report in reports:
        stage = report.first_failure
        if stage is not None:
            found = stage.differences
            over = [
                f"{name} {found[name]:.3g} (limit {limit:g})"
                for name, limit in stage.limits.items()
                if not found[name] <= limit  # or NaN
            ]
            failures.append(
                f"{report.against} differs from {report.reference} at the stage {stage.stage!r}: {', '.join(over)}."
            )
    return failures


def accuracy_failures(accuracy: Sequence[ArtifactAccuracy], max_drop: float) -> list[str]:
    """Return a sentence for each artifact that surely loses more AP points than allowed; the first is the reference."""
    if accuracy and accuracy[0].ap == 0:
        return [f"NOT VERIFIED: {accuracy[0].weights} has AP 0 on these images, so no loss can be measured."]
    return [
        f"{name} loses more than --max-drop {max_drop:g}: {summary}"
        for name, verdict, summary in _losses(accuracy, max_drop, too_large=True)
        if verdict == "above"
    ]


def undecided_losses(accuracy: Sequence[ArtifactAccuracy], max_drop: float) -> list[str]:
    """Return a sentence for each artifact whose AP falls by more points than allowed, which may be chance."""
    return [
        f"UNDECIDED: {name} may lose more than --max-drop {max_drop:g}: {summary}"
        for name, verdict, summary in _losses(accuracy, max_drop, too_large=True)
        if verdict != "above"
    ]


def unsure_losses(accuracy: Sequence[ArtifactAccuracy], max_drop: float) -> list[str]:
    """Return a sentence for each artifact that passes on images too few to exclude a loss above the allowed one."""
    return [
        f"{name}: {summary}"
        for name, verdict, summary in _losses(accuracy, max_drop, too_large=False)
        if verdict == "inconclusive"
    ]


def _losses(
    accuracy: Sequence[ArtifactAccuracy], max_drop: float, *, too_large: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield name, verdict and summary of each measured loss above the allowed one, or of each up to it."""
    for row in accuracy:
        if row.drop is not None and (row.drop.points > max_drop) is too_large:
            from yolov7_deploy.evaluation.accuracy_drop import summarize_drop  # see `_measure_accuracy`

            yield row.weights, row.drop.verdict(max_drop), summarize_drop(row.drop, max_drop)
