"""SpeedReport: the result of a benchmark, as written by `y7 bench --json` and read by `--compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolov7_deploy._bounded_read import read_text
from yolov7_deploy._console import table
from yolov7_deploy._serialization import from_dict, parse_json, short_repr
from yolov7_deploy.errors import UsageError
from yolov7_deploy.hardware.clocks import Clocks
from yolov7_deploy.paper import paper_row

SCHEMA = 1

# Pipeline stages in order. `end_to_end` is the wall time of a whole call, measured in calls without the others.
STAGES = ("preprocess", "upload", "engine", "download", "postprocess", "end_to_end")
BUSY = 0.05  # share of CPU time used by other programs from which times are unreliable
PAPER_SCOPE = "PyTorch FP16 forward pass of the network only: no letterbox, no upload, no NMS"
VAL2017_IMAGES = 5000  # the paper's AP is for all of them
_VAL_COMMAND = "y7 val --weights FILE --data DATA --json val.json"
# Short, so that all columns fit a line of 100 characters.
_STAGE_NAMES = {"preprocess": "pre", "upload": "H2D", "engine": "engine", "download": "D2H", "postprocess": "post"}
_TABLE_TITLE = "ms per call of a whole batch; medians of: letterbox (pre), transfers (H2D, D2H), network, boxes (post)"
_WRITE_VAL_REPORT = f"Write one:  {_VAL_COMMAND}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """Milliseconds of one stage per call (a call runs a whole batch).

    Attributes:
        name: One of `STAGES`.
        p50, p90, p99, mean, min: Statistics over all calls.
        blocks: Medians of consecutive equal parts of the run. Two runs are compared by them, because neighbouring calls
            are correlated and blocks are less so.
    """

    name: str
    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    blocks: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Electric energy of one row.

    Attributes:
        source: The sensor and what it covers: `NVML (GPU board)`, `INA3221 VDD_IN`, `RAPL (CPU package)`.
        watts: Mean power during the calls.
        idle_watts: Mean power before them, with the model loaded and nothing running; `None` where not measured.
        joules_per_image: Mean power divided by throughput; idle power is included.
        samples: Readings that the mean is based on.
    """

    source: str
    watts: float
    idle_watts: float | None
    joules_per_image: float
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRow:
    """The results for one batch size at one concurrency.

    Attributes:
        batch: Images per call.
        concurrency: Threads that call at the same time.
        calls: End-to-end calls of a single thread that the percentiles are based on.
        images, seconds: Images that all threads processed together, and the time it took.
        images_per_second: Throughput of all threads together, end to end.
        stages: One for each of `STAGES`, measured with a single thread; rows of one batch size share them.
        warmup_calls, warmup_s: Calls and seconds before the measurement.
        warmup_stable: True if times were stable at the end of the warm-up; `False` if its time limit was reached.
        host_peak_bytes: Peak resident memory of this process.
        gpu_peak_bytes: Peak memory in use on the GPU by all programs, minus that before the model was loaded; `None`
            without a GPU.
        energy: `None` where power cannot be measured; `energy_unavailable` is the reason.
        clocks: `None` where clocks cannot be read.
        under_load: End-to-end time of a call while all threads were calling; `None` at concurrency 1.
        other_cpu_load: Share of the machine's CPU time used by other programs, 0 to 1; `None` where the system does not
            show it.
    """

    batch: int
    concurrency: int
    calls: int
    images: int
    seconds: float
    images_per_second: float
    stages: tuple[StageTime, ...]
    warmup_calls: int
    warmup_s: float
    warmup_stable: bool
    host_peak_bytes: int
    gpu_peak_bytes: int | None
    energy: Energy | None
    energy_unavailable: str = ""
    clocks: Clocks | None = None
    under_load: StageTime | None = None
    other_cpu_load: float | None = None

    def stage(self, name: str) -> StageTime:
        """Return the stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperSpeed:
    """The row of the paper that a report is compared with.

    Attributes:
        model, size, source: Model name, input size in pixels, and table.
        device: `V100`.
        fps: Images per second at batch 1; `None` where the paper has none.
        batch32_ms: Milliseconds per image at batch 32.
        ap: AP on val2017 in percent.
        scope: What the times include.
    """

    model: str
    size: int
    source: str
    device: str
    fps: float | None
    batch32_ms: float | None
    ap: float | None
    scope: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedReport:
    """The result of one benchmark run.

    Attributes:
        weights, weights_sha256: Path and digest of the model file.
        variant: Official name of the model; empty for foreign files.
        runtime, precision, nms: How it ran; `nms` is the kind inside the file or `host`.
        device: `cpu`, `cuda:0`.
        machine: Name of the GPU or CPU, such as `NVIDIA H200`.
        environment: Versions and hardware by name, to distinguish two reports.
        input_hw: Height and width of the network input.
        frame_hw: Height and width of the first source image.
        frames: Description of the source images.
        settings: Measurement settings by name: CUDA graph, transfers, waiting, threads of the runtime.
        rows: One for each batch size and concurrency.
        detections_per_image: Mean number; NMS takes longer with more boxes. `None` where unknown.
        paper: The row of the paper, with `--paper`.
        is_coco: The model has the classes of COCO, so its AP can be compared with the paper's.
        ap: Average precision (0 to 1) measured with this file, and `ap_source`: the report it is from, with the number
            of images unless they are all of val2017.
        notes: Remarks for the reader.
        y7_version: Version of this package.
        started_at: Date and time in UTC, ISO 8601.
    """

    weights: str
    weights_sha256: str
    variant: str
    runtime: str
    precision: str
    nms: str
    device: str
    machine: str
    environment: tuple[tuple[str, str], ...]
    input_hw: tuple[int, int]
    frame_hw: tuple[int, int]
    frames: str
    settings: tuple[tuple[str, str], ...]
    rows: tuple[SpeedRow, ...]
    detections_per_image: float | None = None
    paper: PaperSpeed | None = None
    is_coco: bool = True
    ap: float | None = None
    ap_source: str = ""
    notes: tuple[str, ...] = ()
    y7_version: str = ""
    started_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"schema": SCHEMA, "kind": "y7 bench"}

    @classmethod
    def load(cls, path: str | Path) -> SpeedReport:
        """Read a report from a JSON file.

        Raises:
            UsageError: The file is missing or is not a report of this schema; the message names the field.
        """
        try:
            raw = parse_json(read_text(path))
            if not isinstance(raw, dict) or raw.get("kind") != "y7 bench":
                raise ValueError("it is not a report of y7 bench")
            if raw.get("schema") != SCHEMA:
                raise ValueError(f"its schema is {short_repr(raw.get('schema'))}, this version reads {SCHEMA}")
            return from_dict(cls, raw)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
        except ValueError as error:
            raise UsageError(
                f"{path} cannot be compared with: {error}.", fix="Write one:  y7 bench --json old.json"
            ) from error


# --- reference numbers ------------------------------------------------------------------------------------------------


def paper_speed(variant: str, input_hw: tuple[int, int]) -> PaperSpeed:
    """Return the paper's row of a model, at the measured size where the paper has several sizes.

    Raises:
        UsageError: The paper does not have this model.
    """
    row = paper_row(variant)
    with suppress(UsageError):  # the paper does not have this size; the report shows both sizes
        row = paper_row(variant, size=max(input_hw))
    assert row.size is not None, "an official model"
    return PaperSpeed(
        model=row.model,
        size=row.size,
        source=row.source,
        device=row.device or "V100",
        fps=row.fps,
        batch32_ms=row.batch32_ms,
        ap=row.val.ap if row.val else None,
        scope=PAPER_SCOPE,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _ValReport:
    """The fields of a report of `y7 val` that are read."""

    ap: float
    weights: str
    images: int
    weights_sha256: str = ""


def read_ap(path: Path, weights: Path, *, sha256: str) -> tuple[float, str]:
    """Return the AP (0 to 1) in a report of `y7 val --json` about a model file, and its source for display.

    Raises:
        UsageError: The report cannot be read, does not have an AP, or is about another file.
    """
    try:
        raw = parse_json(read_text(path))
        if not isinstance(raw, dict):
            raise ValueError(f"it contains {short_repr(raw)}")
        report = from_dict(_ValReport, raw)
        if not 0 <= report.ap <= 1:
            raise ValueError(f"ap is {report.ap:g}")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", fix=_WRITE_VAL_REPORT) from error
    except ValueError as error:
        raise UsageError(f"{path} is not a report of y7 val: {error}.", fix=_WRITE_VAL_REPORT) from error
    same_file = report.weights_sha256 == sha256 if report.weights_sha256 else Path(report.weights).name == weights.name
    if not same_file:
        raise UsageError(
            f"{path} is about {report.weights}, and {weights} is another file: its AP is not known.",
            fix=_VAL_COMMAND.replace("FILE", str(weights)),
        )
    return report.ap, str(path) if report.images == VAL2017_IMAGES else f"{path}, {report.images} images"


# --- text -------------------------------------------------------------------------------------------------------------


def describe_speed(report: SpeedReport) -> str:
    """Return the table of rows, the settings, the paper's row, and the notes."""
    size = "x".join(map(str, report.input_hw))
    model = ", ".join(part for part in (report.variant, report.runtime, report.precision) if part)
    parts = [
        f"{report.weights} ({model}) at {size} on {report.device}: {report.machine}",
        f"frames: {report.frames}" + _detection_count(report),
        _speed_table(report.rows),
        *_under_load_lines(report),
        "settings: " + "; ".join(f"{name}: {value}" for name, value in report.settings),
        *_power_and_clock_lines(report),
    ]
    if report.paper is not None:
        parts.append(_paper_table(report, report.paper))
    elif report.ap is not None:
        parts.append(f"AP {100 * report.ap:.1f} % ({report.ap_source})")
    parts += [f"note: {note}" for note in report.notes]
    return "\n".join(parts)


def _detection_count(report: SpeedReport) -> str:
    count = report.detections_per_image
    return "" if count is None else f"; {count:g} detections per image"


def _speed_table(rows: Sequence[SpeedRow]) -> str:
    """Return the table of rows without the columns that were not measured."""
    cells = [_row_cells(row) for row in rows]
    names = [name for name in cells[0] if any(row[name] is not None for row in cells)] if cells else []
    return table([[row[name] for name in names] for row in cells], names, _TABLE_TITLE)


def _row_cells(row: SpeedRow) -> dict[str, object]:
    end_to_end = row.stage("end_to_end")
    return {
        "batch": row.batch,
        "threads": row.concurrency,
        **{name: format_ms(getattr(end_to_end, name)) for name in ("p50", "p90", "p99")},
        **{
            short: format_ms(row.stage(name).p50) if row.stage(name).p50 else None
            for name, short in _STAGE_NAMES.items()
        },
        "img/s": f"{row.images_per_second:.4g}",
        "J/img": None if row.energy is None else f"{row.energy.joules_per_image:.3g}",
        "GPU MB": None if row.gpu_peak_bytes is None else f"{row.gpu_peak_bytes / 1e6:.0f}",
        "host MB": f"{row.host_peak_bytes / 1e6:.0f}" if row.gpu_peak_bytes is None else None,
    }


def _under_load_lines(report: SpeedReport) -> Iterator[str]:
    for row in report.rows:
        if row.under_load is not None:
            times = row.under_load
            yield (
                f"batch {row.batch}: at concurrency {row.concurrency} a call took p50 {format_ms(times.p50)}, "
                f"p90 {format_ms(times.p90)}, p99 {format_ms(times.p99)} ms; the other times are of a single thread"
            )


def _power_and_clock_lines(report: SpeedReport) -> Iterator[str]:
    """Yield lines about power and clocks; equal lines of several rows once."""
    lines: dict[str, None] = {}
    for row in report.rows:
        name = f"batch {row.batch} x {row.concurrency}"
        if row.energy is not None:
            idle = "" if row.energy.idle_watts is None else f", {row.energy.idle_watts:.1f} W idle before"
            lines[f"power, {name}: {row.energy.watts:.1f} W{idle} ({row.energy.source})"] = None
        elif row.energy_unavailable:
            lines[f"power: not measured. {row.energy_unavailable}"] = None
        if row.clocks is not None:
            lines[f"clocks, {name}: {_clock_facts(row.clocks)} ({row.clocks.source})"] = None
    yield from lines


def _clock_facts(clocks: Clocks) -> str:
    facts = (
        clocks.mhz is not None and f"{clocks.mhz:.0f} MHz",
        clocks.mhz_max is not None and f"of {clocks.mhz_max:.0f}",
        clocks.memory_mhz is not None and f"memory {clocks.memory_mhz:.0f} MHz",
        clocks.temperature_c is not None and f"{clocks.temperature_c:.0f} °C",
        clocks.power_limit_w is not None and f"limit {clocks.power_limit_w:.0f} W",
        clocks.mode,
    )
    return ", ".join(fact for fact in facts if fact)


def _paper_table(report: SpeedReport, paper: PaperSpeed) -> str:
    """Return the measured times beside the paper's row, and what that row includes."""
    rows = [*_paper_speed_rows(report, paper), *([_paper_ap_row(report, paper)] if report.is_coco else [])]
    size = max(report.input_hw)
    columns = ["", "here", "paper", "ratio"]
    here = f"here {report.machine}, {report.precision}, {size}"
    title = f"{here}; {paper.model} in the paper {paper.device}, fp16, {paper.size} ({paper.source})"
    given = [
        *([f"{paper.fps:g} images/s at batch 1"] if paper.fps else []),
        *([f"{paper.batch32_ms:g} ms per image at batch 32"] if paper.batch32_ms else []),
    ]
    lines = [
        table(rows, columns, title),
        f"the paper gives {' and '.join(given) or 'no speed'}: {paper.scope}. "
        "Only the network time is comparable, machine against machine.",
    ]
    if not report.is_coco:
        own = "" if report.ap is None else f", AP {100 * report.ap:.1f} % ({report.ap_source}),"
        lines.append(f"this model has other classes than COCO; its accuracy{own} cannot be compared with the paper's")
    if size != paper.size:
        lines.append(f"measured at {size}, the paper's row is for {paper.size}: the workloads differ")
    return "\n".join(lines)


def _paper_speed_rows(report: SpeedReport, paper: PaperSpeed) -> Iterator[list[object]]:
    paper_ms = {1: 1e3 / paper.fps if paper.fps else None, 32: 32 * paper.batch32_ms if paper.batch32_ms else None}
    for row in {row.batch: row for row in reversed(report.rows)}.values():
        for stage, name in (("engine", "network"), ("end_to_end", "end to end")):
            ours = row.stage(stage).p50
            theirs = paper_ms.get(row.batch) if stage == "engine" else None
            yield [
                f"{name}, batch {row.batch}",
                f"{format_ms(ours)} ms, {1e3 * row.batch / ours:.4g} images/s",
                f"{format_ms(theirs)} ms, {1e3 * row.batch / theirs:.4g} images/s" if theirs else "not given",
                f"{ours / theirs:.3g}x the time" if theirs else None,
            ]


def _paper_ap_row(report: SpeedReport, paper: PaperSpeed) -> list[object]:
    measured = (
        f"{100 * report.ap:.1f} % ({report.ap_source})" if report.ap is not None else "not measured: --val-report"
    )
    points = "-" if report.ap is None or paper.ap is None else f"{100 * report.ap - paper.ap:+.1f} points"
    return ["AP on val2017", measured, f"{paper.ap:g} %" if paper.ap is not None else None, points]


def format_ms(value: float) -> str:
    """Return milliseconds with three digits, or without decimals from 1000 on."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
