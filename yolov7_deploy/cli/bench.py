"""`y7 bench`: latency with its spans, throughput, power and memory; beside the paper, or against an earlier run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy.cli.options import Conf, Half, Img, Iou, JsonPath, MaxDet, Weights, check_thresholds, parse_img
from yolov7_deploy.errors import UsageError, Y7Error, missing_library
from yolov7_deploy.options import MAX_FRAME_SIDE, BenchOptions

if TYPE_CHECKING:
    from yolov7_deploy.benchmark.comparison import Comparison
    from yolov7_deploy.benchmark.inputs import Frames
    from yolov7_deploy.benchmark.report import SpeedReport, SpeedRow

DEFAULTS = BenchOptions()
RUNS = Path("runs/bench")

Batch = Annotated[
    str | None, typer.Option("--batch", "--batch-size", help="Images of a call: 1, or several as 1,8,32.")
]
Threads = Annotated[str, typer.Option("--threads", help="Callers at the same time: 1, or several as 1,4.")]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda:0, 0, or a kind of machine with its conventions: v100, jetson."),
]
SourceText = Annotated[
    str | None, typer.Option("--source", "-s", help="Measure with these images, as in y7 detect; else a drawn one.")
]
FrameText = Annotated[
    str | None, typer.Option("--frame", help="Width x height of the drawn image (default: 1920x1080).")
]
Duration = Annotated[float, typer.Option("--duration", help="Seconds of each part of a row: latency, then throughput.")]
Warmup = Annotated[float, typer.Option("--warmup", help="Seconds after which the warm-up ends in any case.")]
Paper = Annotated[bool, typer.Option("--paper", help="Set the paper's row beside it; write JSON and a chart.")]
ValJson = Annotated[
    Path | None, typer.Option("--val-json", help="Record of y7 val --json about the same file: its AP is shown.")
]
EstimateFor = Annotated[
    str | None,
    typer.Option("--estimate", help="Estimate for a machine that is not here (v100, orin-nx); no measuring."),
]
CompareWith = Annotated[
    Path | None, typer.Option("--compare", help="JSON of an earlier run: tells a change from noise.")
]
SaveDir = Annotated[
    Path | None, typer.Option("--save-dir", help="Write JSON and chart here; --paper takes runs/bench/expN without it.")
]
ChartPath = Annotated[Path | None, typer.Option("--chart", help="Write the chart here, as PNG.")]
NoChart = Annotated[bool, typer.Option("--no-chart", help="Leave the chart of --paper out.")]


def bench(
    *,
    weights: Weights = "yolov7",
    batch: Batch = None,
    device: Device = "auto",
    img: Img = None,
    half: Half = None,
    threads: Threads = "1",
    source: SourceText = None,
    frame: FrameText = None,
    conf: Conf = None,
    iou: Iou = None,
    max_det: MaxDet = None,
    duration: Duration = DEFAULTS.duration_s,
    warmup: Warmup = DEFAULTS.warmup_s,
    paper: Paper = False,
    val_json: ValJson = None,
    estimate: EstimateFor = None,
    compare: CompareWith = None,
    save_dir: SaveDir = None,
    chart: ChartPath = None,
    no_chart: NoChart = False,
    json_path: JsonPath = None,
) -> None:
    """Measure speed: latency by span, throughput, power, memory."""
    batches = None if batch is None else parse_numbers(batch, "batch")
    if estimate is not None:
        measuring: dict[str, object] = {
            **{"--paper": paper, "--compare": compare, "--val-json": val_json, "--source": source, "--frame": frame},
            **{"--save-dir": save_dir, "--chart": chart, "--conf": conf, "--iou": iou, "--max-det": max_det},
            **{"--threads": threads != "1", "--device": device != "auto", "--no-chart": no_chart},
            **{"--duration": duration != DEFAULTS.duration_s, "--warmup": warmup != DEFAULTS.warmup_s},
        }
        _estimate(
            weights, estimate, batches=batches or (1,), img=img, half=half, json_path=json_path, measuring=measuring
        )
        return
    options = BenchOptions(
        batches=batches or DEFAULTS.batches,
        threads=parse_numbers(threads, "threads"),
        duration_s=duration,
        warmup_s=warmup,
    )
    check_thresholds(conf=conf, iou=iou, max_det=max_det)
    detector_options = {"img": parse_img(img), "half": half, "conf": conf, "iou": iou, "max_det": max_det}
    targets = Targets.choose(paper=paper, save_dir=save_dir, chart=chart, no_chart=no_chart, json_path=json_path)
    earlier = None if compare is None else _load(compare)
    report = _measure(
        weights,
        _frames(source, parse_frame(frame)),
        device=device,
        detector_options=detector_options,
        options=options,
        own_batch=batches is None,
        paper=paper,
        val_json=val_json,
    )
    _conclude(report, targets, earlier=earlier, name=str(compare))


def _load(path: Path) -> SpeedReport:
    from yolov7_deploy.benchmark.report import SpeedReport

    return SpeedReport.load(path)


def _check_drawing() -> None:
    """Refuses before the measuring what could not be drawn after it."""
    try:
        import yolov7_deploy.benchmark.chart  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_library(error, "for the chart (--no-chart leaves it out)") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What is written where; `None` is not written."""

    json: str | None
    chart: Path | None

    @classmethod
    def choose(
        cls, *, paper: bool, save_dir: Path | None, chart: Path | None, no_chart: bool, json_path: str | None
    ) -> Targets:
        """What the options ask for; what `--paper` writes and has no place yet goes to a new folder.

        Raises:
            UsageError: A chart is asked for and left out, or something cannot be written.
        """
        if no_chart and chart is not None:
            raise UsageError("--chart and --no-chart contradict each other.", fix="Leave one of them out.")
        wants_chart = chart is not None or (paper and not no_chart)
        folder = save_dir
        if folder is None and paper and (json_path is None or (wants_chart and chart is None)):
            from yolov7_deploy.workflows.predict import next_run_folder

            folder = next_run_folder(RUNS)
        if folder is not None:
            json_path = json_path or str(folder / "bench.json")
            chart = chart or (folder / "chart.png" if wants_chart else None)
        if chart is not None and chart.suffix.lower() != ".png":
            raise UsageError(f"--chart {chart}: a chart is a PNG.", fix=f"--chart {chart.with_suffix('.png')}")
        for path in (chart, None if json_path in (None, "-") else Path(str(json_path))):
            if path is not None:
                check_writable(path)
        if chart is not None:
            _check_drawing()
        return cls(json=json_path, chart=chart)

    def write(self, report: SpeedReport, comparison: Comparison | None) -> Iterator[str]:
        """Writes both, and gives a line for each."""
        from yolov7_deploy._console import write_json

        if self.json is not None:
            document = report.to_dict()
            write_json(document if comparison is None else {**document, "comparison": asdict(comparison)}, self.json)
            yield f"record: {self.json}"
        if self.chart is not None:
            from yolov7_deploy.benchmark.chart import speed_accuracy_chart

            speed_accuracy_chart([report], self.chart)
            yield f"chart: {self.chart}"


def check_writable(path: Path) -> None:
    """Refuses before the measuring what could not be written after it; makes nothing.

    Raises:
        UsageError: Its folder cannot be made or written to.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{place} {'is read-only' if place.is_dir() else 'is no folder'}"
        raise UsageError(f"{path} cannot be written: {why}.", fix="Choose another place.")


def parse_numbers(text: str, name: str) -> tuple[int, ...]:
    """`1,8,32` or `1 8 32`.

    Raises:
        UsageError: Anything else.
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise UsageError(f"--{name} {text} is no list of numbers.", fix=f"For example: --{name} 1,8")
    return tuple(map(int, parts))


def parse_frame(text: str | None) -> tuple[int, int] | None:
    """Height and width of `1920x1080`, which is width x height as people say it.

    Raises:
        UsageError: Anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([1-9][0-9]{0,5})[xX, ]([1-9][0-9]{0,5})\s*", text)
    if match is None or max(int(match[1]), int(match[2])) > MAX_FRAME_SIDE:
        raise UsageError(
            f"--frame {text} is no size of an image of at most {MAX_FRAME_SIDE} pixels a side.",
            fix="Width x height, for example: --frame 1920x1080",
        )
    return int(match[2]), int(match[1])


def _frames(source: str | None, hw: tuple[int, int] | None) -> Frames:
    from yolov7_deploy.benchmark.inputs import DRAWN_HW, drawn_frames, read_frames

    if source is None:
        return drawn_frames(hw or DRAWN_HW)
    if hw is not None:
        raise UsageError("--frame is the size of the drawn image; --source brings its own.", fix="Leave one out.")
    return read_frames(source)


def _measure(
    weights: str,
    frames: Frames,
    *,
    device: str,
    detector_options: dict[str, Any],
    options: BenchOptions,
    own_batch: bool,
    paper: bool,
    val_json: Path | None,
) -> SpeedReport:
    """The report, with what stands beside it; nothing is measured if that is not to be had."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.benchmark.benchmark import measure_speed
    from yolov7_deploy.benchmark.devices import choose_place
    from yolov7_deploy.benchmark.references import paper_speed, read_ap
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.hardware.memory import gpu_memory_used
    from yolov7_deploy.hub import file_digest, find_weights

    name = f"cuda:{device}" if device.isdigit() else device
    place = None if name == "auto" else choose_place(name)
    with progress("download") as show:
        path = find_weights(weights, progress=show)
    ap, source = (None, "") if val_json is None else read_ap(val_json, path, sha256=file_digest(path))
    wanted = place.device if place else "auto"
    before = gpu_memory_used("cuda:0" if wanted == "auto" else wanted)
    with Detector(path, device=wanted, **detector_options) as detector, counted_rows() as on_row:
        metadata = detector.metadata
        beside = paper_speed(metadata.variant, detector.input_hw) if paper else None
        place = place or choose_place("auto", gpu_usable=detector.device != "cpu")
        with progress("bench, in percent") as show:
            report = measure_speed(
                detector,
                frames,
                options=replace(options, batches=(metadata.batch or 1,)) if own_batch else options,
                place=place,
                gpu_bytes_before=before,
                progress=lambda done, total: show(100 * done // total, 100),
                on_row=on_row,
            )
    return replace(report, paper=beside, ap=ap, ap_source=source)


@contextmanager
def counted_rows() -> Iterator[Callable[[SpeedRow], None]]:
    """A function that takes rows; if the work inside ends early, it is said how many were complete."""
    rows: list[SpeedRow] = []
    try:
        yield rows.append
    except (KeyboardInterrupt, Y7Error):
        if rows:
            typer.echo(
                f"{len(rows)} row{'s were' if len(rows) > 1 else ' was'} complete; nothing is written.", err=True
            )
        raise


def _conclude(report: SpeedReport, targets: Targets, *, earlier: SpeedReport | None, name: str) -> None:
    """Prints everything before anything is written: a full disk costs no result."""
    from yolov7_deploy.benchmark.comparison import compare_reports
    from yolov7_deploy.benchmark.report_text import describe_comparison, describe_speed

    to_stderr = targets.json == "-"
    typer.echo(describe_speed(report), err=to_stderr)
    comparison = None if earlier is None else compare_reports(earlier, report, name=name)
    if comparison is not None:
        typer.echo(describe_comparison(comparison), err=to_stderr)
    for line in targets.write(report, comparison):
        typer.echo(line, err=to_stderr)


def _estimate(
    weights: str,
    device: str,
    *,
    batches: tuple[int, ...],
    img: str | None,
    half: bool | None,
    json_path: str | None,
    measuring: dict[str, object],
) -> None:
    """Prints what is calculated for a machine that is not here; nothing is measured, nothing is mixed with it."""
    given = [option for option, value in measuring.items() if value not in (None, False)]
    if given:
        raise UsageError(
            f"--estimate calculates and measures nothing, so {', '.join(given)} cannot apply.",
            fix=f"y7 bench --weights {weights} --estimate {device}",
        )
    from yolov7_deploy._console import write_json
    from yolov7_deploy.estimation.estimate import describe_estimate, estimate

    variant = find_variant_name(weights)
    found = [
        estimate(
            variant,
            device=device,
            batch=batch,
            size=parse_img(img),
            precision="fp32" if half is False else "fp16",
        )
        for batch in batches
    ]
    typer.echo("\n".join(map(describe_estimate, found)), err=json_path == "-")
    if json_path is not None:
        documents = [one.to_dict() for one in found]
        write_json(documents[0] if len(documents) == 1 else documents, json_path)


def find_variant_name(weights: str) -> str:
    """The official name of a network: of a name as it is, without looking for its file; of a file what it says.

    Raises:
        LoadError: There is no such file, or it cannot be read.
        UsageError: The file does not tell its network.
    """
    from yolov7_deploy.paper import VARIANTS

    name = weights.removesuffix(".pt").removesuffix("_training")
    if name in VARIANTS and not Path(weights).is_file():
        return name
    suffix = Path(weights).suffix.lower()
    variant = ""
    if suffix == ".onnx":
        from yolov7_deploy.inspection.onnx_file import read_onnx

        metadata = read_onnx(weights).metadata
        variant = metadata.variant if metadata else ""
    elif suffix in (".engine", ".plan", ".trt"):
        from yolov7_deploy.inspection.engine_file import read_engine_file

        record = read_engine_file(weights).record
        variant = record.metadata.variant if record else ""
    else:
        from yolov7_deploy.hub import find_weights
        from yolov7_deploy.inspection.describe import describe_weights

        variant = describe_weights(find_weights(weights)).variant
    if variant not in VARIANTS:
        raise UsageError(
            f"{weights} does not tell which network it is.", fix=f"Name it: --weights {next(iter(VARIANTS))}"
        )
    return variant
