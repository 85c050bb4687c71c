"""The fastest detector of a machine that loses no more than an allowed part of the AP.

Every combination of a file (FP32, FP16, INT8, engine), a runtime and a batch size that this machine can run is a
candidate. Those that lose too much AP, or differ from the checkpoint stage by stage, are rejected; the others are
timed against each other on images of the dataset.
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._console import plural, table
from yolov7_deploy._process import temporary_folder
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._text import get_logger
from yolov7_deploy._version import __version__
from yolov7_deploy.benchmarking.benchmark import Frames
from yolov7_deploy.benchmarking.race import MIN_ROUNDS, Ratio, Samples, compare, fastest, race
from yolov7_deploy.benchmarking.sampling import warm_up
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, ParityError, UsageError, Y7Error
from yolov7_deploy.evaluation.accuracy import AccuracyReport, evaluate
from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop, accuracy_drop
from yolov7_deploy.evaluation.verification import Run, compare_stages, stage_failures
from yolov7_deploy.hardware.gpu import parse_device
from yolov7_deploy.hardware.machine import Machine, find_int8_target, read_machine
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import (
    EngineOptions,
    ExportOptions,
    Int8Options,
    OptimizeOptions,
    QuantizeOptions,
    ValOptions,
)
from yolov7_deploy.precision.calibration_images import CalibrationImages
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.tensorrt.builder import build_file
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.workflows.export import limit_detections
from yolov7_deploy.workflows.quantize import Quantizer, Show, silent

logger = get_logger(__name__)

Log = Callable[[str], None]

WARMUP_S = 10.0
VERIFIED_IMAGES = 2  # stages are compared on these
TIMED_IMAGES = 16
# Candidates at most this much slower than the fastest are as fast, because the times of one file differ as much from
# one opening to the next: of them, the one that computes most precisely wins.
AS_FAST = 1.05
_CALLS_PER_THREAD = 2  # in each round with several callers
_EXTRAS = {"onnxruntime": "cpu", "openvino": "openvino"}
_CPU_RUNTIMES = ("onnxruntime", "openvino", "openvino-bf16", "openvino-f16")


@dataclass(kw_only=True, slots=True)
class Candidate:
    """A file in a runtime, and what was measured of it.

    Attributes:
        path: The file.
        runtime: As the option of `Detector`.
        batch: Images per call.
        half: As the option of `Detector`.
        drop: AP, and its loss against the checkpoint in FP32.
        rejected: Why it cannot be the winner; empty for a candidate that was not rejected.
        samples_ms: Milliseconds per image, one for each round of the measurement.
        ratio: Time divided by that of the winner.
    """

    path: Path
    runtime: str
    batch: int = 1
    half: bool | None = None
    drop: AccuracyDrop | None = None
    rejected: str = ""
    samples_ms: list[float] = field(default_factory=list)
    ratio: Ratio | None = None

    @property
    def name(self) -> str:
        """File, runtime and batch size."""
        runtime = f"{self.runtime} FP16" if self.half else self.runtime
        return f"{self.path.name} in {runtime}, batch {self.batch}"

    def open(self, device: str) -> Detector:
        """Return a detector with these settings."""
        runtime = self.runtime if self.path.suffix == ".onnx" else "auto"
        return Detector(self.path, device=device, half=self.half, runtime=runtime)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "file": self.path.name,
            "runtime": self.runtime,
            "batch": self.batch,
            "half": self.half,
            "accuracy": self.drop.to_dict() if self.drop else None,
            "rejected": self.rejected or None,
            "rounds": len(self.samples_ms),
            "median_ms_per_image": round(median(self.samples_ms), 3) if self.samples_ms else None,
            "time_to_winner": asdict(self.ratio) if self.ratio else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizeReport:
    """Result of `Optimizer.run`.

    Attributes:
        weights: The checkpoint.
        candidates: All candidates, the winner first, then by time; rejected ones last.
        winner: The fastest one that was not rejected, or the most precise of those that are as fast (`AS_FAST`); `None`
            if nothing was timed.
        not_tried: What this machine or the options do not have, with the command that adds it.
        images: Number of images on which AP was measured.
        options: What was measured.
        machine: The machine.
        interrupted: What stopped it before the measurement was complete, such as Ctrl-C; `None` if nothing did.
    """

    weights: Path
    candidates: tuple[Candidate, ...]
    winner: Candidate | None
    not_tried: tuple[str, ...]
    images: int
    options: OptimizeOptions
    machine: Machine
    interrupted: BaseException | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "version": __version__,
            "weights": str(self.weights),
            "weights_sha256": sha256_hex(self.weights),
            "images": self.images,
            "options": asdict(self.options),
            "machine": asdict(self.machine),
            "python": platform.python_version(),
            "winner": self.winner.to_dict() if self.winner else None,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "not_tried": list(self.not_tried),
            "complete": self.interrupted is None,
        }


class Optimizer:
    """Searches the fastest detector of a machine.

    Args:
        weights: A checkpoint.
        dataset: Labelled images, on which AP and time are measured.
        images: Calibration images for INT8; without any, INT8 is not tried.
        others: More files to try, such as an INT8 file with excluded layers.
        options: See `OptimizeOptions`.
        device: Device of all candidates.
        folder: Folder for the file of the winner.
        log: Called with each finished step.
        show: Opens a progress display for a step.
    """

    def __init__(
        self,
        weights: Path,
        dataset: Dataset,
        images: CalibrationImages | None,
        options: OptimizeOptions,
        *,
        folder: Path,
        others: Sequence[Path] = (),
        device: str = "auto",
        log: Log = logger.info,
        show: Show = silent,
    ) -> None:
        self._weights, self._data, self._images, self._options = weights, dataset, images, options
        self._folder, self._others, self._device, self._log, self._show = folder, others, device, log, show
        self._machine = read_machine()
        self._on_gpu = self._machine.has_gpu and parse_device(device).kind in ("auto", "cuda")
        self._candidates: list[Candidate] = []
        self._not_tried: list[str] = []
        self._images_measured = 0

    def run(self) -> OptimizeReport:
        """Write the files, measure and compare them.

        Ctrl-C and SIGTERM end the search; what was measured until then is kept.

        Raises:
            LoadError: The checkpoint cannot be read.
            ParityError: The checkpoint has AP 0.
        """
        interrupted: BaseException | None = None
        with _without_runtime_warnings(), temporary_folder("y7-optimize") as self._temporary:
            try:
                self._find_candidates()
                self._measure_accuracy()
                self._verify()
                self._race()
            except KeyboardInterrupt as error:
                interrupted = error
            winner = self._find_winner()
            if winner is not None and winner.path.parent == self._temporary:
                winner.path = self._keep(winner.path)
        return self._report(winner, interrupted)

    # --- candidates ---------------------------------------------------------------------------------------------------

    def _find_candidates(self) -> None:
        files = [*self._write_files(), *self._others]
        for path, batch in itertools.product(files, self._options.batches):
            self._candidates += [Candidate(path=path, runtime=name, batch=batch) for name in self._runtimes(path)]
        halves = (False, True) if self._on_gpu else (False,)
        self._candidates += [
            Candidate(path=self._weights, runtime="pytorch", half=half, batch=batch)
            for half, batch in itertools.product(halves, self._options.batches)
        ]

    def _runtimes(self, path: Path) -> Iterator[str]:
        """Yield the runtimes that this machine may have for a file."""
        from yolov7_deploy.runtimes.base import installed_runtimes

        if path.suffix != ".onnx":
            yield "tensorrt"
            return
        if self._on_gpu:
            yield "onnxruntime"
            return
        installed = installed_runtimes(path, "cpu")
        for name in _CPU_RUNTIMES:
            library = name.partition("-")[0]
            if library in installed:
                yield name
            else:
                self._skip(f"{library} is not installed:  pip install 'yolov7-deploy[{_EXTRAS[library]}]'")

    def _skip(self, reason: str) -> None:
        if reason not in self._not_tried:
            self._not_tried.append(reason)

    def _write_files(self) -> list[Path]:
        """Export the checkpoint in every precision that can be fast here, and return the files."""
        checkpoint = load_checkpoint(self._weights)
        if checkpoint.quantization is not None:
            raise UsageError(
                f"{self._weights.name} was trained for INT8, and can be exported in no other precision.",
                fix=f"y7 export --int8 --weights {self._weights}",
            )
        network = fuse(build_model(checkpoint))
        batch = self._options.batches[0] if len(self._options.batches) == 1 else None
        metadata = replace(checkpoint.metadata, version=__version__)
        model = export_onnx(network, metadata, limit_detections(ExportOptions(batch=batch), metadata))
        files = [self._save(model, "fp32")]
        if self._on_gpu:
            files += self._write_gpu_files(model)
        else:
            self._skip("TensorRT needs an NVIDIA GPU")
        if self._images is None:
            self._skip("INT8 needs calibration images:  --calib FOLDER")
        elif not self._on_gpu:
            files.append(self._save(self._to_int8(model, self._images), "int8"))
        return files

    def _write_gpu_files(self, model: OnnxModel) -> Iterator[Path]:
        """Yield the FP16 file, and FP16 and INT8 engines."""
        fp16 = self._save(to_fp16(model, self._timed_images()[:1]), "fp16")
        yield fp16
        sources = [fp16]
        if self._images is not None:
            sources.append(self._save(self._to_int8(model, self._images), "int8"))
        for source in sources:
            engine = source.with_suffix(".engine")
            try:
                build_file(source, engine, options=EngineOptions(max_batch=max(self._options.batches)))
            except Y7Error as error:
                self._skip(f"{engine.name} was not built: {error.message} {error.fix}")
                continue
            self._log(f"wrote {engine.name}")
            yield engine

    def _to_int8(self, model: OnnxModel, images: CalibrationImages) -> OnnxModel:
        options = QuantizeOptions(int8=Int8Options(target=find_int8_target(use_gpu=self._on_gpu)))
        return Quantizer(model, images, options, log=lambda _: None, show=self._show).run().model

    def _save(self, model: OnnxModel, precision: str) -> Path:
        path = self._temporary / f"{self._weights.stem}-{precision}.onnx"
        model.save(path)
        self._log(f"wrote {path.name}")
        return path

    # --- accuracy -----------------------------------------------------------------------------------------------------

    def _measure_accuracy(self) -> None:
        """Measure the AP of each file in each runtime, and reject those that lose too much."""
        reference = self._evaluate(Candidate(path=self._weights, runtime="pytorch", half=False))
        self._images_measured = reference.images
        if not reference.ap:
            raise ParityError(
                f"{self._weights} has AP 0 on these images, so no loss can be measured.",
                fix="Use labelled images of its classes:  --data DATA.yaml",
            )
        reports: dict[tuple[Path, str, bool | None], AccuracyReport | Y7Error] = {
            (self._weights, "pytorch", False): replace(reference, predictions=list(reference.predictions))
        }
        drops: dict[tuple[Path, str, bool | None], AccuracyDrop] = {}
        for candidate in tuple(self._candidates):
            key = (candidate.path, candidate.runtime, candidate.half)
            if key not in reports:
                reports[key] = self._try_to_evaluate(candidate)
            report = reports[key]
            if isinstance(report, DeviceError):
                self._skip(f"{candidate.runtime}: {report.message}")
                self._candidates.remove(candidate)
                continue
            if isinstance(report, Y7Error):
                candidate.rejected = report.message
                continue
            if key not in drops:
                everything = range(len(self._data))
                drops[key] = accuracy_drop(self._data, everything, reference.predictions, report.predictions)
                report.predictions.clear()  # hundreds of megabytes for thousands of images
            candidate.drop = drop = drops[key]
            if drop.points > self._options.max_drop:
                lost = f"{drop.points:.2f} AP points" + _interval(drop)
                candidate.rejected = f"loses {lost}, more than --max-drop {self._options.max_drop:g}"

    def _try_to_evaluate(self, candidate: Candidate) -> AccuracyReport | Y7Error:
        try:
            return self._evaluate(candidate)
        except Y7Error as error:
            return error

    def _evaluate(self, candidate: Candidate) -> AccuracyReport:
        with candidate.open(self._device) as detector, self._show(f"AP of {candidate.path.name}") as progress:
            report = evaluate(detector, self._data, options=ValOptions(rect=False, batch=1), progress=progress)
        self._log(f"AP {report.ap or 0.0:.4f}: {candidate.path.name} in {candidate.runtime}")
        return report

    def _verify(self) -> None:
        """Compare the remaining files with the checkpoint, stage by stage, and reject those that differ."""
        images = self._timed_images()[:VERIFIED_IMAGES]
        failures: dict[tuple[Path, str], str] = {}
        for candidate in self._remaining():
            if candidate.path == self._weights:
                continue
            key = (candidate.path, candidate.runtime)
            if key not in failures:
                runtime = candidate.runtime if candidate.path.suffix == ".onnx" else "auto"
                parity = compare_stages(self._weights, Run(candidate.path, runtime), images, self._device)
                failures[key] = " ".join(stage_failures([parity]))
            candidate.rejected = failures[key]

    # --- speed --------------------------------------------------------------------------------------------------------

    def _remaining(self) -> list[Candidate]:
        return [candidate for candidate in self._candidates if not candidate.rejected]

    def _timed_images(self) -> list[Image]:
        count = min(TIMED_IMAGES, len(self._data))
        return [read_image(self._data.path(index)) for index in range(count)]

    def _race(self) -> None:
        """Time the remaining candidates against each other."""
        remaining = {str(number): candidate for number, candidate in enumerate(self._remaining())}
        frames = Frames(images=tuple(self._timed_images()), description="")
        samples: Samples = {}
        with ExitStack() as stack, self._show("time") as progress:
            calls = {}
            for name, candidate in remaining.items():
                detector = stack.enter_context(candidate.open(self._device))
                calls[name] = self._call(detector, frames.batches(candidate.batch), stack)
                warm_up(calls[name], limit_s=WARMUP_S)
            items = {name: self._items(candidate) for name, candidate in remaining.items()}
            try:
                race(
                    calls,
                    samples,
                    seconds=self._options.duration_s,
                    items=items,
                    on_round=lambda share: progress(round(100 * share), 100),
                )
            finally:
                for name, values in samples.items():
                    remaining[name].samples_ms = values

    def _items(self, candidate: Candidate) -> int:
        calls = 1 if self._options.callers == 1 else self._options.callers * _CALLS_PER_THREAD
        return calls * candidate.batch

    def _call(self, detector: Detector, batches: list[list[Image]], stack: ExitStack) -> Callable[[], object]:
        """Return what one round calls: one batch, or some batches from each of several threads."""
        if self._options.callers == 1:
            following = itertools.cycle(batches)
            return lambda: detector.batch(next(following))
        pool = stack.enter_context(ThreadPoolExecutor(self._options.callers))

        def work(thread: int) -> None:
            for number in range(_CALLS_PER_THREAD):
                detector.batch(batches[(thread + number) % len(batches)])

        return lambda: list(pool.map(work, range(self._options.callers)))

    # --- result -------------------------------------------------------------------------------------------------------

    def _find_winner(self) -> Candidate | None:
        """Return the winner, and compare the others with it; `None` if nothing was timed."""
        timed = [one for one in self._remaining() if len(one.samples_ms) >= MIN_ROUNDS]
        if not timed:
            return None
        longest = max(len(one.samples_ms) for one in timed)
        leaders = {str(n): one.samples_ms for n, one in enumerate(timed) if len(one.samples_ms) == longest}
        leader = leaders[fastest(leaders, list(leaders))]
        # Files and runtimes are tried from the most precise to the least.
        winner = next(one for one in timed if compare(one.samples_ms, leader).ratio <= AS_FAST)
        for one in timed:
            one.ratio = compare(one.samples_ms, winner.samples_ms) if one is not winner else None
        return winner

    def _keep(self, path: Path) -> Path:
        """Copy the file of the winner, with the build record of an engine, to the folder of results."""
        kept = self._folder / path.name
        if path.suffix == ".engine":
            Engine.load(path).save(kept)
            return kept
        with atomic_write(kept) as partial:
            shutil.copyfile(path, partial)
        return kept

    def _report(self, winner: Candidate | None, interrupted: BaseException | None) -> OptimizeReport:
        order = sorted(self._candidates, key=lambda one: (one is not winner, bool(one.rejected), _time(one)))
        return OptimizeReport(
            weights=self._weights,
            candidates=tuple(order),
            winner=winner,
            not_tried=tuple(self._not_tried),
            images=self._images_measured,
            options=self._options,
            machine=self._machine,
            interrupted=interrupted,
        )


@contextmanager
def _without_runtime_warnings() -> Iterator[None]:
    """Keep quiet about files that are slow in a runtime: that is measured here."""
    runtimes = get_logger("yolov7_deploy.runtimes")
    level = runtimes.level
    runtimes.setLevel(logging.ERROR)
    try:
        yield
    finally:
        runtimes.setLevel(level)


def _time(candidate: Candidate) -> float:
    return median(candidate.samples_ms) if candidate.samples_ms else float("inf")


# --- text -------------------------------------------------------------------------------------------------------------


def describe(report: OptimizeReport) -> str:
    """Return the table of all candidates, the reasons for rejections, and the Python code that uses the winner."""
    rows = [_row(candidate, report.winner) for candidate in report.candidates]
    columns = ["file", "runtime", "batch", "AP", "points lost", "ms/image", "time / winner", "result"]
    title = f"AP on {plural(report.images, 'image')}; time of {plural(report.options.callers, 'caller')}"
    parts = [table(rows, columns, title)] if rows else []
    parts += [f"rejected: {one.name}: {one.rejected}" for one in report.candidates if one.rejected]
    parts += [f"not tried: {reason}" for reason in report.not_tried]
    if report.winner is not None:
        parts.append(_usage(report.winner))
    return "\n".join(parts)


def _interval(drop: AccuracyDrop) -> str:
    return "" if drop.low is None else f" ({drop.low:.2f} to {drop.high:.2f})"


def _row(candidate: Candidate, winner: Candidate | None) -> list[str | None]:
    drop, ratio, samples = candidate.drop, candidate.ratio, candidate.samples_ms
    lost = None if drop is None else f"{drop.points:.2f}" + _interval(drop)
    tied = ratio is not None and ratio.low <= 1
    result = "rejected" if candidate.rejected else "winner" if candidate is winner else "as fast" if tied else "slower"
    return [
        candidate.path.name,
        f"{candidate.runtime} FP16" if candidate.half else candidate.runtime,
        str(candidate.batch),
        f"{drop.ap:.4f}" if drop else None,
        lost,
        f"{median(samples):.1f}" if samples else None,
        f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else None,
        result if samples or candidate.rejected else "not timed",
    ]


def _usage(winner: Candidate) -> str:
    """Return the lines of Python that use the winner."""
    arguments = [json.dumps(str(winner.path), ensure_ascii=False)]
    if winner.path.suffix == ".onnx":
        arguments.append(f'runtime="{winner.runtime}"')
    if winner.half is not None:
        arguments.append(f"half={winner.half}")
    lines = ["from yolov7_deploy import Detector", f"detector = Detector({', '.join(arguments)})"]
    if winner.batch > 1:
        lines.append(f"found = detector.batch(images)  # {winner.batch} at a time")
    return "\n".join(["", *lines])
