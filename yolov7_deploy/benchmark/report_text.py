"""A speed report, and the comparison of two, for people."""

from __future__ import annotations

from collections.abc import Iterator

from yolov7_deploy._console import table
from yolov7_deploy.benchmark.comparison import Comparison, Difference
from yolov7_deploy.benchmark.report import SPANS, PaperSpeed, SpeedReport, SpeedRow

WIDE = 1.1  # an interval that goes further to both sides cannot tell a tenth from nothing
_COLUMNS = ("batch", "callers", "p50", "p90", "p99", *SPANS[:-1], "images/s", "J/image", "memory")


def describe_speed(report: SpeedReport) -> str:
    """The table with what it is about, how it was measured, the paper beside it, and what to know."""
    height, width = report.input_hw
    model = ", ".join(part for part in (report.variant, report.backend, report.precision) if part)
    parts = [
        f"{report.weights} ({model}) at {width}x{height} on {report.device}: {report.machine}",
        f"frames: {report.frames}" + _found_words(report),
        table([_row_cells(row) for row in report.rows], _COLUMNS, "ms a call of a whole batch; spans are medians"),
        *_loaded_lines(report),
        "settings: " + "; ".join(f"{name}: {value}" for name, value in report.settings),
        *_machine_lines(report),
    ]
    if report.paper is not None:
        parts.append(_beside_paper(report, report.paper))
    elif report.ap is not None:
        parts.append(f"AP {100 * report.ap:.1f} % ({report.ap_source})")
    parts += [f"note: {note}" for note in report.notes]
    return "\n".join(parts)


def describe_comparison(comparison: Comparison) -> str:
    """What changed, line by line, by which test, and what else differs."""
    rows = [
        [
            one.batch,
            one.threads,
            one.span,
            _ms(one.old_ms),
            _ms(one.new_ms),
            f"{one.ratio:.3f}",
            _interval(one),
            _p(one.p),
            _verdict(one),
        ]
        for one in comparison.differences
    ]
    columns = ["batch", "callers", "span", "old ms", "new ms", "new/old", "95 % interval", "p", "verdict"]
    parts = [table(rows, columns, f"against {comparison.old}")] if rows else []
    parts.append(f"test: {comparison.test}")
    parts += [f"warning: {warning}" for warning in comparison.warnings]
    return "\n".join(parts)


def _found_words(report: SpeedReport) -> str:
    count = report.detections_per_image
    return "" if count is None else f"; {count:g} detections an image"


def _row_cells(row: SpeedRow) -> list[object]:
    whole = row.span("end_to_end")
    memory = row.host_peak_bytes if row.gpu_peak_bytes is None else row.gpu_peak_bytes
    return [
        row.batch,
        row.threads,
        *map(_ms, (whole.p50, whole.p90, whole.p99)),
        *(_ms(row.span(name).p50) if row.span(name).p50 else None for name in SPANS[:-1]),
        f"{row.images_per_second:.4g}",
        None if row.energy is None else f"{row.energy.joules_per_image:.3g}",
        f"{memory / 1e6:.0f} MB {'host' if row.gpu_peak_bytes is None else 'GPU'}",
    ]


def _loaded_lines(report: SpeedReport) -> Iterator[str]:
    for row in report.rows:
        if row.loaded is not None:
            yield (
                f"batch {row.batch}: while {row.threads} called at once, a call took p50 {_ms(row.loaded.p50)}, "
                f"p90 {_ms(row.loaded.p90)}, p99 {_ms(row.loaded.p99)} ms; the other times are of a single caller"
            )


def _machine_lines(report: SpeedReport) -> Iterator[str]:
    """Power and clocks; equal lines of several rows once."""
    lines: dict[str, None] = {}
    for row in report.rows:
        if row.energy is not None:
            idle = "" if row.energy.idle_watts is None else f", {row.energy.idle_watts:.1f} W idle before"
            lines[f"power, batch {row.batch} x {row.threads}: {row.energy.watts:.1f} W{idle} ({row.energy.source})"] = (
                None
            )
        elif row.energy_absent:
            lines[f"power: not measured. {row.energy_absent}"] = None
        if row.clocks is not None:
            clocks = row.clocks
            facts = (
                clocks.mhz is not None and f"{clocks.mhz:.0f} MHz",
                clocks.mhz_max is not None and f"of {clocks.mhz_max:.0f}",
                clocks.memory_mhz is not None and f"memory {clocks.memory_mhz:.0f} MHz",
                clocks.temperature_c is not None and f"{clocks.temperature_c:.0f} °C",
                clocks.power_limit_w is not None and f"limit {clocks.power_limit_w:.0f} W",
                clocks.mode,
            )
            told = ", ".join(fact for fact in facts if fact)
            lines[f"clocks, batch {row.batch} x {row.threads}: {told} ({clocks.source})"] = None
    yield from lines


def _beside_paper(report: SpeedReport, paper: PaperSpeed) -> str:
    """The row of the paper beside ours: what may be compared, and what its numbers are."""
    rows: list[list[object]] = []
    times = {1: 1e3 / paper.fps if paper.fps else None, 32: 32 * paper.batch32_ms if paper.batch32_ms else None}
    for row in {row.batch: row for row in reversed(report.rows)}.values():
        theirs = times.get(row.batch)
        for span in ("engine", "end_to_end"):
            ours = row.span(span).p50
            shown = theirs if span == "engine" else None
            rows.append(
                [
                    f"{'network' if span == 'engine' else 'end to end'}, batch {row.batch}",
                    f"{_ms(ours)} ms, {1e3 * row.batch / ours:.4g} images/s",
                    f"{_ms(shown)} ms, {1e3 * row.batch / shown:.4g} images/s" if shown else "not given",
                    f"{ours / shown:.3g}x its time" if shown else None,
                ]
            )
    ours_ap = f"{100 * report.ap:.1f} % ({report.ap_source})" if report.ap is not None else "not measured: --val-json"
    points = "-" if report.ap is None or paper.ap is None else f"{100 * report.ap - paper.ap:+.1f} points"
    rows.append(["AP on val2017", ours_ap, f"{paper.ap:g} %" if paper.ap is not None else None, points])
    size = max(report.input_hw)
    columns = [
        "",
        f"here: {report.machine}, {report.precision}, {size}",
        f"paper: {paper.device}, fp16, {paper.size}",
        "ratio",
    ]
    given = [
        *([f"{paper.fps:g} images/s at batch 1"] if paper.fps else []),
        *([f"{paper.batch32_ms:g} ms an image at batch 32"] if paper.batch32_ms else []),
    ]
    lines = [
        table(rows, columns, f"{paper.model} in the paper ({paper.source})"),
        f"the paper gives {' and '.join(given) or 'no speed'}: {paper.span}. "
        "Only the network's time stands beside that, machine against machine.",
    ]
    if size != paper.size:
        lines.append(f"measured at {size}, the paper's row is for {paper.size}: not the same work")
    return "\n".join(lines)


def _verdict(one: Difference) -> str:
    wide = one.low is not None and one.high is not None and one.high > WIDE**2 * one.low
    return f"{one.verdict} seen, too noisy to tell" if one.verdict == "no change" and wide else one.verdict


def _interval(one: Difference) -> str:
    if one.low is None or one.high is None:
        return "-"
    low = f"{one.low:.3f}" if one.low >= 0.1 else "below 0.1"
    return f"{low} to {f'{one.high:.3f}' if one.high <= 10 else 'above 10'}"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
