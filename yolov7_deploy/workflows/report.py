"""Deployment report: artifacts of one model against their reference, in parity, accuracy and speed, on one HTML page.

Nothing is measured in a way of its own: stages and AP are those of `verify_artifacts`, intervals those of
`accuracy_drop`, times those of `measure_speed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from yolov7_deploy._bounded_read import read_text
from yolov7_deploy._console import plural
from yolov7_deploy._serialization import from_dict, parse_json, sha256_hex, short_repr
from yolov7_deploy._text import get_logger
from yolov7_deploy.benchmarking.benchmark import MAX_FRAMES, Frames, measure_speed, read_frames
from yolov7_deploy.benchmarking.devices import resolve_device
from yolov7_deploy.benchmarking.report import BUSY, SpeedReport
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import UsageError
from yolov7_deploy.evaluation.accuracy import AccuracyReport
from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop, accuracy_drop, summarize_drop
from yolov7_deploy.evaluation.image_differences import ObjectDifference, image_differences
from yolov7_deploy.evaluation.parity import ParityReport
from yolov7_deploy.evaluation.verification import (
    Verification,
    accuracy_failures,
    stage_failures,
    undecided_losses,
    used_images,
    verify_artifacts,
)
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import BenchOptions, ReportOptions
from yolov7_deploy.precision.sensitivity import LayerSensitivity

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
Show = Callable[[str], AbstractContextManager[Progress]]

MAX_IMAGES = 12  # pairs of images on the page
MAX_CANDIDATES = 2 * MAX_IMAGES
LOW_CONF = 0.05  # an object with a lower score is "not detected" on the page


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactRecord:
    """One artifact in one runtime; the reference comes first and has no `parity` and no `drop`.

    Attributes:
        name: Name on the page: the file's name, with the runtime if there are several.
        path, sha256, size_bytes: The file.
        metadata: Its metadata, as opened.
        input_hw: Height and width of the network input.
        accuracy: All metrics and the predictions.
        ap_interval: 95 % interval of the AP (0..1) for all images of this kind; `None` if unknown.
        drop: AP points lost against the reference, with their interval.
        parity: Stage by stage comparison with the reference.
        failures: One sentence for each reason for which the artifact is not accepted.
        undecided: Those of the failures that chance can explain.
        speed: Times; `None` if they were not measured.
        speed_source: The file that they are from; empty if they were measured for this report.
    """

    name: str
    path: Path
    sha256: str
    size_bytes: int
    metadata: ModelMetadata
    input_hw: tuple[int, int]
    accuracy: AccuracyReport
    ap_interval: tuple[float, float] | None
    drop: AccuracyDrop | None
    parity: ParityReport | None
    failures: tuple[str, ...]
    undecided: tuple[str, ...] = ()
    speed: SpeedReport | None = None
    speed_source: str = ""

    @property
    def runtime(self) -> str:
        """Name of the runtime."""
        return self.accuracy.runtime

    @property
    def is_wrong(self) -> bool:
        """True if chance cannot explain a failure."""
        return len(self.failures) > len(self.undecided)

    def verdict(self, max_drop: float) -> str:
        """Return `reference`, `equal`, `passed`, `undecided` or `FAILED`; docs/report.md says what they mean.

        Args:
            max_drop: Largest allowed loss in AP points.
        """
        if self.parity is None:
            return "reference"
        if self.is_wrong:
            return "FAILED"
        if self.undecided:
            return "undecided"
        return "equal" if self.drop is not None and self.drop.verdict(max_drop) == "within" else "passed"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """An image on which artifacts differ.

    Attributes:
        index: Position in the dataset.
        worst: Name of the artifact that differs most from the reference.
        objects: Objects of the image by name of the artifact, the largest difference first.
    """

    index: int
    worst: str
    objects: Mapping[str, tuple[ObjectDifference, ...]]

    @property
    def value(self) -> float:
        """The largest difference of any artifact; see `ObjectDifference.value`."""
        return self.objects[self.worst][0].value


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRanking:
    """INT8 sensitivities in a JSON file of `y7 quantize` or `y7 export`, in execution order, about one INT8 file."""

    source: Path
    sha256: str
    layers: tuple[LayerSensitivity, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentReport:
    """Result of `write_report`.

    Attributes:
        path: The HTML file.
        created_at: Date and time in UTC, ISO 8601.
        options: What was measured.
        artifacts: The reference first.
        verification: Stages and AP.
        warnings: What a reader has to know before signing: intervals that prove nothing, runtimes that refused a file.
        images: The images on which artifacts differ most.
        rankings: INT8 sensitivities by digest of the INT8 file.
        dataset: The dataset.
    """

    path: Path
    created_at: str
    options: ReportOptions
    artifacts: tuple[ArtifactRecord, ...]
    verification: Verification
    warnings: tuple[str, ...]
    images: tuple[ImageRecord, ...]
    rankings: Mapping[str, LayerRanking]
    dataset: Dataset = field(repr=False)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each artifact that differs too much, loses too much AP, or could not be verified."""
        return self.verification.failures

    @property
    def undecided(self) -> bool:
        """True if chance can explain every failure, so more images would decide."""
        return 0 < len(self.failures) == len(self.verification.undecided)

    @property
    def ok(self) -> bool:
        """True if every artifact gives the results of the reference within the tolerances."""
        return not self.failures and self.verification.verified

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for one JSON document."""
        return {
            "kind": "y7 report",
            "path": str(self.path),
            "created_at": self.created_at,
            "ok": self.ok,
            "failures": list(self.failures),
            "undecided": list(self.verification.undecided),
            "warnings": list(self.warnings),
            "verification": self.verification.to_dict(),
            "artifacts": [
                {
                    "name": one.name,
                    "path": str(one.path),
                    "sha256": one.sha256,
                    "runtime": one.runtime,
                    "precision": one.accuracy.precision,
                    "ap": one.accuracy.ap,
                    "ap_interval": one.ap_interval,
                    "drop": None if one.drop is None else one.drop.to_dict(),
                    "speed": None if one.speed is None else one.speed.to_dict(),
                    "failures": list(one.failures),
                    "undecided": list(one.undecided),
                }
                for one in self.artifacts
            ],
        }


def collect_report(
    reference: Path,
    others: Sequence[Path],
    *,
    data: Path,
    output: Path,
    options: ReportOptions,
    bench: Sequence[Path],
    sensitivity: Sequence[Path],
    show: Show,
) -> DeploymentReport:
    """Compare artifacts with their reference; see `write_report`."""
    dataset = open_dataset(data, limit=options.limit)
    digests = {path: sha256_hex(_existing(path)) for path in (reference, *others)}
    speeds = {path: _known_speed(path, digests) for path in bench}
    rankings = {one.sha256: one for one in (_read_ranking(path, digests) for path in sensitivity)}
    with show("verify") as progress:
        verification = verify_artifacts(
            reference,
            list(others),
            data=dataset,
            limit=options.stage_limit,
            max_drop=options.max_drop,
            device=options.device,
            runtime=options.runtime,
            progress=progress,
        )
    artifacts = _records(verification, digests, dataset, options)
    artifacts = [_with_speed(one, speeds, dataset, options, show) for one in artifacts]
    return DeploymentReport(
        path=output,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        options=options,
        artifacts=tuple(artifacts),
        verification=verification,
        warnings=tuple(_warnings(artifacts, verification, options, speeds, dataset.coverage)),
        images=_most_different(artifacts, dataset, options, show),
        rankings=rankings,
        dataset=dataset,
    )


# --- input ------------------------------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"{path} does not exist, or is not a file.", fix="Check the path.")
    return path


def _known_speed(path: Path, digests: Mapping[Path, str]) -> SpeedReport:
    """Return the report of `y7 bench` in a file.

    Raises:
        UsageError: It cannot be read, or is about a model file that is not part of the report.
    """
    report = SpeedReport.load(path)
    if report.weights_sha256 not in digests.values():
        raise UsageError(
            f"{path} is about {report.weights} (sha256 {report.weights_sha256[:12]}), which is none of the files of "
            "this report, or was replaced since.",
            fix=f"Measure again:  y7 bench --weights {next(iter(digests))} --json {path}",
        )
    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    layer: str
    head_error: float
    share_of_macs: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Convolution:
    layer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Convolutions:
    convolutions: tuple[_Convolution, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _QuantizeReport:
    """The fields of a report of `y7 quantize` that are read."""

    sha256: str
    layers: tuple[_Layer, ...]
    summary: _Convolutions


def _read_ranking(path: Path, digests: Mapping[Path, str]) -> LayerRanking:
    """Return the sensitivities in a file of `y7 quantize --json` or `y7 export --json`.

    Raises:
        UsageError: It cannot be read, has no sensitivities, or is about another file.
    """
    fix = f"Write one:  y7 quantize --weights FILE.onnx --calib FOLDER --sensitivity --json {path}"
    try:
        raw = parse_json(read_text(path))
        if not isinstance(raw, dict):
            raise ValueError(f"it contains {short_repr(raw)}")
        record = from_dict(_QuantizeReport, {**raw, **raw.get("quantization", {})})
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", fix=fix) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a report of y7 quantize: {error}.", fix=fix) from error
    if not record.layers:
        raise UsageError(f"{path} has no sensitivities.", fix=fix)
    if record.sha256 not in digests.values():
        raise UsageError(f"{path} is about another file than those of this report.", fix=fix)
    order = {one.layer: number for number, one in enumerate(record.summary.convolutions)}
    layers = [LayerSensitivity(layer=one.layer, error=one.head_error, share=one.share_of_macs) for one in record.layers]
    layers.sort(key=lambda one: order.get(one.layer, -1))
    return LayerRanking(source=path, sha256=record.sha256, layers=tuple(layers))


# --- artifacts --------------------------------------------------------------------------------------------------------


def _records(
    verification: Verification, digests: Mapping[Path, str], dataset: Dataset, options: ReportOptions
) -> list[ArtifactRecord]:
    """Return the artifacts, the reference first, with their drops and intervals."""
    first, records = verification.accuracy[0], []
    names = _short_names([row.weights for row in verification.accuracy])
    for row, name, parity in zip(verification.accuracy, names, [None, *verification.reports], strict=True):
        accuracy = row.report
        assert first.report and accuracy and row.metadata and row.input_hw, "measured on a dataset"
        path = Path(accuracy.weights)
        reports, rows = ([], []) if parity is None else ([parity], [first, row])
        undecided = undecided_losses(rows, options.max_drop)
        records.append(
            ArtifactRecord(
                name=name,
                path=path,
                sha256=digests[path],
                size_bytes=path.stat().st_size,
                metadata=row.metadata,
                input_hw=row.input_hw,
                accuracy=accuracy,
                ap_interval=_ap_interval(dataset, used_images(dataset, accuracy), accuracy),
                drop=row.drop,
                parity=parity,
                failures=(*stage_failures(reports), *accuracy_failures(rows, options.max_drop), *undecided),
                undecided=tuple(undecided),
            )
        )
    return records


def _short_names(names: Sequence[str]) -> list[str]:
    """Return names without folders, as far as they stay different: `a.onnx (openvino)` for `out/a.onnx (openvino)`."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _ap_interval(dataset: Dataset, used: Sequence[int], accuracy: AccuracyReport) -> tuple[float, float] | None:
    """Return the interval of an AP: that of the drop to a detector that finds nothing."""
    drop = accuracy_drop(dataset, used, accuracy.predictions, ())
    if drop.low is None or drop.high is None:
        return None
    return max(0.0, drop.low / 100), min(1.0, drop.high / 100)


# --- speed ------------------------------------------------------------------------------------------------------------


def _with_speed(
    one: ArtifactRecord, known: Mapping[Path, SpeedReport], dataset: Dataset, options: ReportOptions, show: Show
) -> ArtifactRecord:
    """Return the artifact with its times: from a file about it in this runtime, else measured."""
    source = next((path for path, report in known.items() if _is_about(report, one)), None)
    if source is not None:
        return replace(one, speed=_with_ap(known[source], one, dataset), speed_source=str(source))
    if options.duration_s <= 0:
        return one
    with show(f"bench {one.name}") as progress:
        return replace(one, speed=_with_ap(_measure(one, dataset, options, progress), one, dataset))


def _is_about(report: SpeedReport, one: ArtifactRecord) -> bool:
    found = (report.weights_sha256, report.runtime, report.precision, report.input_hw)
    return found == (one.sha256, one.runtime, one.accuracy.precision, one.input_hw)


def _with_ap(report: SpeedReport, one: ArtifactRecord, dataset: Dataset) -> SpeedReport:
    source = f"{plural(one.accuracy.images, 'image')} of {dataset.source}"
    return replace(report, ap=one.accuracy.ap, ap_source=source)


def _measure(one: ArtifactRecord, dataset: Dataset, options: ReportOptions, progress: Progress) -> SpeedReport:
    with _open(one, options) as detector:
        is_known = detector.device.startswith(("cpu", "cuda"))
        return measure_speed(
            detector,
            _frames(one, dataset),
            options=BenchOptions(duration_s=options.duration_s),
            profile=resolve_device(detector.device if is_known else "auto"),
            progress=progress,
        )


def _open(one: ArtifactRecord, options: ReportOptions) -> Detector:
    """Open the artifact in its runtime, with the input size on which AP was measured."""
    is_checkpoint = one.runtime == "pytorch"
    half, img = (False, one.input_hw) if is_checkpoint else (None, None)
    runtime = one.runtime if is_checkpoint or options.runtime == "auto" else options.runtime
    return Detector(one.path, device=options.device, img=img, half=half, runtime=runtime)


def _frames(one: ArtifactRecord, dataset: Dataset) -> Frames:
    used = used_images(dataset, one.accuracy)[:MAX_FRAMES]
    frames = read_frames([dataset.path(index) for index in used])
    return replace(frames, description=f"{plural(len(used), 'image')} of {dataset.source}")


# --- images -----------------------------------------------------------------------------------------------------------


def _most_different(
    artifacts: Sequence[ArtifactRecord], dataset: Dataset, options: ReportOptions, show: Show
) -> tuple[ImageRecord, ...]:
    """Return the images with the largest difference between an artifact and the reference, the largest first.

    The detections for AP, which has other thresholds than an application, choose the candidates. On these the files
    detect again with their own thresholds.
    """
    candidates = _rank({one.name: one.accuracy.predictions for one in artifacts}, dataset)[:MAX_CANDIDATES]
    if not candidates:
        return ()
    indices = [record.index for record in candidates]
    detected = {one.name: _detect(one, dataset, indices, options, show) for one in artifacts}
    return tuple(_rank(detected, dataset)[:MAX_IMAGES])


def _rank(predictions: Mapping[str, Sequence[Mapping[str, Any]]], dataset: Dataset) -> list[ImageRecord]:
    """Return the images on which detections in COCO results format differ, the largest difference first.

    Args:
        predictions: By name of the artifact, the reference first.
        dataset: The images.
    """
    (_, reference), *others = predictions.items()
    found = {name: image_differences(reference, rows) for name, rows in others}
    records = []
    for index in range(len(dataset)):
        image_id = dataset.image_id(index)
        objects = {name: by_image[image_id] for name, by_image in found.items() if by_image.get(image_id)}
        if objects:
            worst = max(objects, key=lambda name: (objects[name][0].value, sum(one.value for one in objects[name])))
            records.append(ImageRecord(index=index, worst=worst, objects=objects))
    records.sort(key=lambda record: -record.value)
    return [record for record in records if record.value > 0]


def _detect(
    one: ArtifactRecord, dataset: Dataset, indices: Sequence[int], options: ReportOptions, show: Show
) -> list[dict[str, Any]]:
    """Return the detections of some images as an application has them, down to a low score, in COCO results format."""
    rows: list[dict[str, Any]] = []
    with _open(one, options) as detector, show(f"images {one.name}") as progress:
        nms = detector.metadata.nms
        conf = LOW_CONF if nms is None or nms.runtime_thresholds else None
        for done, index in enumerate(indices, start=1):
            found = detector(dataset.path(index), conf=conf)
            rows += found.to_coco(dataset.image_id(index), category_ids=dataset.category_ids)
            progress(done, len(indices))
    return rows


# --- warnings ---------------------------------------------------------------------------------------------------------


def _warnings(
    artifacts: Sequence[ArtifactRecord],
    verification: Verification,
    options: ReportOptions,
    speeds: Mapping[Path, SpeedReport],
    coverage: str,
) -> Iterator[str]:
    """Yield the warnings of the page; `coverage` of the dataset is not one, since it is repeated in its problems."""
    reference = artifacts[0]
    for one in artifacts[1:]:
        drop, allowed = one.drop, options.max_drop
        if drop is not None and drop.points <= allowed and drop.verdict(allowed) == "inconclusive":
            yield f"{one.name}: {summarize_drop(drop, allowed)}"
    yield from dict.fromkeys(_origin_warnings(reference, artifacts[1:]))
    yield from verification.notes
    if reference.accuracy.skipped:
        skipped = reference.accuracy.skipped
        yield f"{plural(len(skipped), 'image')} could not be used: {skipped[0].path}: {skipped[0].reason}"
    yield from dict.fromkeys(note for one in artifacts for note in one.accuracy.notes if note != coverage)
    yield from _speed_warnings(artifacts)
    for path, report in speeds.items():
        if not any(_is_about(report, one) for one in artifacts):
            size = "x".join(map(str, report.input_hw))
            yield f"{path} is not used: {report.weights} is not in this report in {report.runtime} at {size}."


def _origin_warnings(reference: ArtifactRecord, others: Sequence[ArtifactRecord]) -> Iterator[str]:
    """Yield a sentence for each file that does not say that it was made from the reference."""
    known = {reference.sha256, reference.metadata.source_sha256} - {""}
    for one in others:
        source = one.metadata.source_sha256
        if not source:
            yield f"{one.path.name} does not say from which weights it was made."
        elif source not in known:
            named = one.metadata.source or "other weights"
            yield f"{one.path.name} says that it was made from {named} (sha256 {source[:12]}), not from the reference."


def _speed_warnings(artifacts: Sequence[ArtifactRecord]) -> Iterator[str]:
    """Yield one sentence for each reason for which times are missing or too long, with the artifacts it is about."""
    rows = [(one.name, row) for one in artifacts if one.speed is not None for row in one.speed.rows]
    missing = [one.name for one in artifacts if one.speed is None]
    if len(missing) == len(artifacts):
        yield "No speed was measured."
    elif missing:
        yield f"The speed of {', '.join(missing)} was not measured."
    busy = {name: row.other_cpu_load for name, row in rows if row.other_cpu_load and row.other_cpu_load > BUSY}
    if busy:
        yield (
            f"Times are too long: other programs used up to {max(busy.values()):.0%} of the CPU while the speed of "
            f"{', '.join(busy)} was measured."
        )
    throttled = dict.fromkeys(name for name, row in rows if row.clocks is not None and row.clocks.throttled)
    if throttled:
        yield f"Times are too long: the processor was throttled while the speed of {', '.join(throttled)} was measured."
