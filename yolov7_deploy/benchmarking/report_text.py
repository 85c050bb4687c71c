"""Text output for a speed report and for the comparison of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from yolov7_deploy._console import table
from yolov7_deploy.benchmarking.comparison import Comparison, Difference
from yolov7_deploy.benchmarking.report import PaperSpeed, SpeedReport, SpeedRow
from yolov7_deploy.hardware.clocks import Clocks

MAX_SPREAD = 1.1  # an interval that is wider in both directions cannot exclude a change of ten percent
# Short, so that all columns fit a line of 100 characters.
_STAGE_NAMES = {"preprocess": "pre", "upload": "H2D", "engine": "engine", "download": "D2H", "postprocess": "post"}
_TABLE_TITLE = "ms per call of a whole batch; medians of: letterbox (pre), transfers (H2D, D2H), network, boxes (post)"


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


def describe_comparison(comparison: Comparison) -> str:
    """Return the table of differences, the test, and the warnings."""
    rows = [
        [
            one.batch,
            one.concurrency,
            one.stage,
            _ms(one.old_ms),
            _ms(one.new_ms),
            f"{one.ratio:.3f}",
            _interval(one),
            _p_value(one.p),
            _verdict(one),
        ]
        for one in comparison.differences
    ]
    columns = ["batch", "threads", "stage", "old ms", "new ms", "new/old", "95 % interval", "p", "verdict"]
    parts = [table(rows, columns, f"compared with {comparison.old}")] if rows else []
    parts.append(f"test: {comparison.test}")
    parts += [f"warning: {warning}" for warning in comparison.warnings]
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
        **{name: _ms(getattr(end_to_end, name)) for name in ("p50", "p90", "p99")},
        **{short: _ms(row.stage(name).p50) if row.stage(name).p50 else None for name, short in _STAGE_NAMES.items()},
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
                f"batch {row.batch}: at concurrency {row.concurrency} a call took p50 {_ms(times.p50)}, "
                f"p90 {_ms(times.p90)}, p99 {_ms(times.p99)} ms; the other times are of a single thread"
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
                f"{_ms(ours)} ms, {1e3 * row.batch / ours:.4g} images/s",
                f"{_ms(theirs)} ms, {1e3 * row.batch / theirs:.4g} images/s" if theirs else "not given",
                f"{ours / theirs:.3g}x the time" if theirs else None,
            ]


def _paper_ap_row(report: SpeedReport, paper: PaperSpeed) -> list[object]:
    measured = (
        f"{100 * report.ap:.1f} % ({report.ap_source})" if report.ap is not None else "not measured: --val-report"
    )
    points = "-" if report.ap is None or paper.ap is None else f"{100 * report.ap - paper.ap:+.1f} points"
    return ["AP on val2017", measured, f"{paper.ap:g} %" if paper.ap is not None else None, points]


def _verdict(one: Difference) -> str:
    wide = one.low is not None and one.high is not None and one.high > MAX_SPREAD**2 * one.low
    return "too noisy to tell" if one.verdict == "no change" and wide else one.verdict


def _interval(one: Difference) -> str:
    if one.low is None or one.high is None:
        return "-"
    low = f"{one.low:.3f}" if one.low >= 0.1 else "below 0.1"
    return f"{low} to {f'{one.high:.3f}' if one.high <= 10 else 'above 10'}"


def _ms(value: float) -> str:
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
