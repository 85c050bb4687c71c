"""`y7 bench`: latency by pipeline stage, throughput, power and memory; with the paper's numbers or an earlier run."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo
from yolov7_deploy.cli.options import (
    Conf,
    Half,
    Img,
    Iou,
    JsonPath,
    MaxDet,
    RuntimeName,
    Weights,
    check_thresholds,
    check_writable,
    locate_weights,
    parse_img,
    was_given,
)
from yolov7_deploy.errors import UsageError, Y7Error, missing_library
from yolov7_deploy.options import MAX_FRAME_SIDE, BenchOptions

if TYPE_CHECKING:
    from yolov7_deploy.benchmarking.comparison import Comparison
    from yolov7_deploy.benchmarking.report import SpeedReport, SpeedRow
    from yolov7_deploy.metadata import ModelMetadata

DEFAULTS = BenchOptions()
RUNS = Path("runs/bench")
# Options that have no effect on an estimate.
MEASUREMENT_OPTIONS = (
    "device", "runtime", "concurrency", "source", "frame", "conf", "iou", "max_det", "duration", "warmup", "paper",
    "val_report", "compare", "save_dir", "chart", "no_chart",
)  # fmt: skip

Batch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        "--batch-size",
        help="Images per call: 1, or several values as 1,8,32 (default: the batch of the file, else 1).",
    ),
]
Concurrency = Annotated[
    str, typer.Option("--concurrency", help="Threads that call at the same time: 1, or several values as 1,4.")
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, a GPU (cuda:0 or 0), or v100 or jetson to require such a machine."),
]
SourceText = Annotated[
    str | None,
    typer.Option("--source", "-s", help="Images to measure with, as in y7 detect (default: a synthetic image)."),
]
FrameText = Annotated[
    str | None,
    typer.Option("--frame", metavar="SIZE", help="Height x width of the synthetic image (default: 1080x1920)."),
]
Duration = Annotated[
    float, typer.Option("--duration", help="Seconds to measure latency, and again to measure throughput.")
]
WarmupLimit = Annotated[float, typer.Option("--warmup", help="Maximum duration of the warm-up in seconds.")]
Paper = Annotated[bool, typer.Option("--paper", help="Compare with the paper, and write a JSON report and a chart.")]
ValReport = Annotated[
    Path | None, typer.Option("--val-report", help="Output of y7 val --json for the same file, to show its AP.")
]
EstimateFor = Annotated[
    str | None,
    typer.Option(
        "--estimate", help="Estimate the speed on another device (v100, orin-nx, t4, ...) instead of measuring."
    ),
]
CompareWith = Annotated[
    Path | None, typer.Option("--compare", help="JSON report of an earlier run to compare with statistically.")
]
SaveDir = Annotated[
    Path | None,
    typer.Option("--save-dir", help="Folder for JSON and chart (default with --paper: a new folder runs/bench/expN)."),
]
ChartPath = Annotated[Path | None, typer.Option("--chart", help="Write the chart to this PNG file.")]
NoChart = Annotated[bool, typer.Option("--no-chart", help="Do not write the chart of --paper.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """A parsed command line: what to measure. See the options of `bench`.

    Attributes:
        batches: `None` for the fixed batch of the model file, or 1.
        frame_hw: Height and width of the synthetic image.
    """

    weights: str
    device: str
    runtime: str
    img: int | tuple[int, int] | None
    half: bool | None
    conf: float | None
    iou: float | None
    max_det: int | None
    batches: tuple[int, ...] | None
    options: BenchOptions
    source: str | None
    frame_hw: tuple[int, int] | None
    paper: bool
    val_report: Path | None


def bench(
    *,
    weights: Weights = "yolov7",
    batch: Batch = None,
    device: Device = "auto",
    runtime: RuntimeName = "auto",
    img: Img = None,
    half: Half = None,
    concurrency: Concurrency = "1",
    source: SourceText = None,
    frame: FrameText = None,
    conf: Conf = None,
    iou: Iou = None,
    max_det: MaxDet = None,
    duration: Duration = DEFAULTS.duration_s,
    warmup: WarmupLimit = DEFAULTS.warmup_s,
    paper: Paper = False,
    val_report: ValReport = None,
    estimate: EstimateFor = None,
    compare: CompareWith = None,
    save_dir: SaveDir = None,
    chart: ChartPath = None,
    no_chart: NoChart = False,
    json_path: JsonPath = None,
) -> None:
    """Measure speed: latency by stage, throughput, power, memory.

    Example:  y7 bench --weights yolov7.onnx --batch 1,8
    """
    batches = None if batch is None else parse_numbers(batch, "batch")
    if estimate is not None:
        _check_only_estimate(weights, estimate)
        _estimate(weights, estimate, batches=batches or (1,), img=parse_img(img), half=half, json_path=json_path)
        return
    check_thresholds(conf=conf, iou=iou, max_det=max_det)
    request = BenchRequest(
        weights=weights,
        device=device,
        runtime=runtime,
        img=parse_img(img),
        half=half,
        conf=conf,
        iou=iou,
        max_det=max_det,
        batches=batches,
        options=BenchOptions(
            batches=batches or DEFAULTS.batches,
            concurrency=parse_numbers(concurrency, "concurrency"),
            duration_s=duration,
            warmup_s=warmup,
        ),
        source=source,
        frame_hw=parse_frame(frame),
        paper=paper,
        val_report=val_report,
    )
    choose = functools.partial(
        OutputFiles.choose, paper=paper, save_dir=save_dir, chart=chart, no_chart=no_chart, json_path=json_path
    )
    _run(request, choose, compare)


def _run(request: BenchRequest, choose: Callable[..., OutputFiles], compare: Path | None) -> None:
    from yolov7_deploy._output_folder import new_run_folder

    with ExitStack() as stack:
        outputs = choose(new_folder=lambda: stack.enter_context(new_run_folder(RUNS / "exp")))
        earlier = None if compare is None else _load(compare)
        _print_and_write(_measure(request), outputs, earlier=earlier, name=str(compare))


def _load(path: Path) -> SpeedReport:
    from yolov7_deploy.benchmarking.report import SpeedReport

    return SpeedReport.load(path)


# --- output files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFiles:
    """The files to write; `None` is not written."""

    json: str | None
    chart: Path | None

    @classmethod
    def choose(
        cls,
        *,
        paper: bool,
        save_dir: Path | None,
        chart: Path | None,
        no_chart: bool,
        json_path: str | None,
        new_folder: Callable[[], Path],
    ) -> OutputFiles:
        """Return the files of the options; files of `--paper` without a path go to a folder that `new_folder` creates.

        Raises:
            UsageError: The options contradict each other, or a file cannot be written.
        """
        if no_chart and chart is not None:
            raise UsageError("--chart and --no-chart contradict each other.", fix="Leave one of them out.")
        wants_chart = chart is not None or (paper and not no_chart)
        folder = save_dir
        if folder is None and paper and (json_path is None or (wants_chart and chart is None)):
            folder = new_folder()
        if folder is not None:
            json_path = json_path or str(folder / "bench.json")
            chart = chart or (folder / "chart.png" if wants_chart else None)
        if chart is not None and chart.suffix.lower() != ".png":
            raise UsageError(f"--chart {chart}: a chart is a PNG.", fix=f"--chart {chart.with_suffix('.png')}")
        for path in (chart, None if json_path in (None, "-") else Path(str(json_path))):
            if path is not None:
                check_writable(path)
        if chart is not None:
            _check_matplotlib()
        return cls(json=json_path, chart=chart)

    def write(self, report: SpeedReport, comparison: Comparison | None) -> Iterator[str]:
        """Write the files, and yield a line for each."""
        from yolov7_deploy._console import write_json

        if self.json is not None:
            document = report.to_dict()
            write_json(document if comparison is None else {**document, "comparison": asdict(comparison)}, self.json)
            yield f"report: {self.json}"
        if self.chart is not None:
            from yolov7_deploy.benchmarking.chart import speed_accuracy_chart

            speed_accuracy_chart([report], self.chart)
            yield f"chart: {self.chart}"


def _check_matplotlib() -> None:
    """Check before the measurement that the chart can be drawn after it."""
    try:
        import yolov7_deploy.benchmarking.chart  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_library(error, "for the chart (or use --no-chart)") from error


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse_numbers(text: str, name: str) -> tuple[int, ...]:
    """Parse `1,8,32` or `1 8 32`.

    Raises:
        UsageError: The text is not a list of numbers.
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise UsageError(f"--{name} {text} is not a list of numbers.", fix=f"For example: --{name} 1,8")
    return tuple(map(int, parts))


def parse_frame(text: str | None) -> tuple[int, int] | None:
    """Parse `1080x1920` and return height and width.

    Raises:
        UsageError: The text is not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([1-9][0-9]{0,5})[xX, ]([1-9][0-9]{0,5})\s*", text)
    if match is None or max(int(match[1]), int(match[2])) > MAX_FRAME_SIDE:
        raise UsageError(
            f"--frame {text} is not an image size of at most {MAX_FRAME_SIDE} pixels.",
            fix="Height x width, for example: --frame 1080x1920",
        )
    return int(match[1]), int(match[2])


# --- measurement ------------------------------------------------------------------------------------------------------


def _measure(request: BenchRequest) -> SpeedReport:
    """Return the report, with the paper's row and AP; everything is checked before the measurement."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.benchmarking.devices import resolve_device
    from yolov7_deploy.workflows.functions import benchmark

    if request.device != "auto":
        resolve_device(request.device)  # raises its error before weights are downloaded
    path = locate_weights(request.weights)
    with report_complete_rows() as on_row, progress("bench", unit="%") as show:
        return benchmark(
            path,
            batch=request.batches,
            device=request.device,
            runtime=request.runtime,
            img=request.img,
            half=request.half,
            concurrency=request.options.concurrency,
            source=request.source,
            frame=request.frame_hw,
            conf=request.conf,
            iou=request.iou,
            max_det=request.max_det,
            duration_s=request.options.duration_s,
            warmup_s=request.options.warmup_s,
            paper=request.paper,
            val_report=request.val_report,
            progress=show,
            on_row=on_row,
        )


@contextmanager
def report_complete_rows() -> Iterator[Callable[[SpeedRow], None]]:
    """Yield a function that receives rows; print how many were complete if the block ends early."""
    rows: list[SpeedRow] = []
    try:
        yield rows.append
    except (KeyboardInterrupt, Y7Error):
        if rows:
            echo(f"Complete rows: {len(rows)}; nothing is written.", err=True)
        raise


def _print_and_write(report: SpeedReport, outputs: OutputFiles, *, earlier: SpeedReport | None, name: str) -> None:
    """Print everything before anything is written, so that a full disk does not lose the result."""
    from yolov7_deploy.benchmarking.comparison import compare_reports, describe_comparison
    from yolov7_deploy.benchmarking.report import describe_speed

    to_stderr = outputs.json == "-"
    echo(describe_speed(report), err=to_stderr)
    comparison = None if earlier is None else compare_reports(earlier, report, name=name)
    if comparison is not None:
        echo(describe_comparison(comparison), err=to_stderr)
    for line in outputs.write(report, comparison):
        echo(line, err=to_stderr)


# --- estimate ---------------------------------------------------------------------------------------------------------


def _check_only_estimate(weights: str, device: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in MEASUREMENT_OPTIONS if was_given(name)]
    if given:
        raise UsageError(
            f"--estimate measures nothing, so {', '.join(given)} cannot apply.",
            fix=f"y7 bench --weights {weights} --estimate {device}",
        )


def _estimate(
    weights: str,
    device: str,
    *,
    batches: tuple[int, ...],
    img: int | tuple[int, int] | None,
    half: bool | None,
    json_path: str | None,
) -> None:
    """Print estimates for another device."""
    from yolov7_deploy._console import write_json
    from yolov7_deploy.estimation.estimate import describe_estimate, estimate

    variant, input_hw = find_network(weights)
    precision = "fp32" if half is False else "fp16"
    estimates = [
        estimate(variant, device=device, batch=batch, size=img or input_hw, precision=precision) for batch in batches
    ]
    echo("\n".join(map(describe_estimate, estimates)), err=json_path == "-")
    if json_path is not None:
        documents = [one.to_dict() for one in estimates]
        write_json(documents[0] if len(documents) == 1 else documents, json_path)


def find_network(weights: str) -> tuple[str, tuple[int, int] | None]:
    """Return the official name of a network, and the input size of its file or its training.

    The size is `None` if the file has none, and for an official name, whose file is not looked for.

    Raises:
        LoadError: The file does not exist or cannot be read.
        UsageError: The file does not name its network.
    """
    from yolov7_deploy.hub import ENGINE_SUFFIXES, find_weights
    from yolov7_deploy.paper import VARIANTS

    name = weights.removesuffix(".pt").removesuffix("_training")
    if name in VARIANTS and not Path(weights).is_file():
        return name, None
    suffix = Path(weights).suffix.lower()
    metadata: ModelMetadata | None
    if suffix == ".onnx":
        from yolov7_deploy.inspection.onnx_file import read_onnx

        metadata = read_onnx(weights).metadata
    elif suffix in ENGINE_SUFFIXES:
        from yolov7_deploy.inspection.engine_file import read_engine_file

        record = read_engine_file(weights).record
        metadata = record.metadata if record else None
    else:
        from yolov7_deploy.checkpoint import load_checkpoint

        metadata = load_checkpoint(find_weights(weights)).metadata
    if metadata is None or metadata.variant not in VARIANTS:
        raise UsageError(
            f"{weights} does not name its network.",
            fix=f"Pass the name of its network instead:  --weights NAME   One of: {', '.join(VARIANTS)}",
        )
    has_size = metadata.input_hw or metadata.nominal_hw or metadata.training_size
    return metadata.variant, metadata.default_hw if has_size else None
