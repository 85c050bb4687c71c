"""Statistical comparison of two reports of `y7 bench`: which stages became faster or slower.

A run is a series of block medians, and neighbouring blocks are correlated: a machine that is slow now is still slow a
second later. The logarithms of the medians are compared by Welch's t-test with the effective number of independent
blocks,

    n' = n (1 - r) / (1 + r),    r = (n r1 + 1) / (n - 4), not below 0,

where r1 is the correlation of neighbours and r corrects its bias in short series (Kendall 1954; Marriott and Pope
1954). The null hypothesis is not a ratio of 1, which never holds exactly, but a ratio within `MIN_CHANGE` of it. All
stages and rows of two reports are one family, whose false alarms Holm's procedure limits to `LEVEL`.

No test can detect from two runs that the machine was busier during all of one of them. A warning is given where this
is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from yolov7_deploy._console import table
from yolov7_deploy._statistics import student_t_quantile, student_t_tail
from yolov7_deploy.benchmarking.report import BUSY, SpeedReport, SpeedRow, StageTime, format_ms

MIN_CHANGE = 0.02  # smaller changes are ignored: memory placement differs from run to run and causes one percent
LEVEL = 0.05
MAX_SPREAD = 1.1  # an interval that is wider in both directions cannot exclude a change of ten percent
MIN_BLOCKS = 6  # of either run; the correlation of fewer is meaningless
MIN_MS = 0.005  # shorter stages are within the noise of the clock
TICK_MS = 1e-6  # resolution of the clock
_MAX_LOG = 600.0  # exp() of more overflows
UNDER_LOAD = "end_to_end under load"
TEST = (
    f"Welch's t-test on logarithms of block medians, corrected for the correlation of neighbours, that the ratio is "
    f"beyond {MIN_CHANGE:.0%}; Holm's correction over all lines, {LEVEL:.0%} false alarms"
)

_LOG_MIN_CHANGE = math.log1p(MIN_CHANGE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One stage of one row, old and new.

    Attributes:
        batch, concurrency, stage: The row and the stage.
        old_ms, new_ms: Medians per call.
        ratio: New divided by old for the typical block; above 1 is slower.
        low, high: 95 % confidence interval of the ratio; `None` where there are too few blocks.
        p: Corrected p-value: probability of such a ratio, or a larger one, if the change is within `MIN_CHANGE`.
        verdict: `faster`, `slower`, `no change` or `too few blocks`.
    """

    batch: int
    concurrency: int
    stage: str
    old_ms: float
    new_ms: float
    ratio: float
    low: float | None
    high: float | None
    p: float
    verdict: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The differences between two reports.

    Attributes:
        old: File name of the older report, as given.
        test: Description of the statistical test.
        differences: One for each stage of every row that both reports have.
        warnings: Other reasons for a difference, and what could not be compared.
    """

    old: str
    test: str
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]


def compare_reports(old: SpeedReport, new: SpeedReport, *, name: str = "") -> Comparison:
    """Compare two reports; `name` is the file name of the old one."""
    pairs = list(_row_pairs(old, new))
    untested: list[Difference] = []
    batches: set[int] = set()
    for row_before, row_now in pairs:
        # Rows of one batch size share the stages, which are measured with a single thread.
        stages = () if row_now.batch in batches else _stage_pairs(row_before, row_now)
        batches.add(row_now.batch)
        untested += [_difference(before, now, row=row_now, stage=stage) for stage, before, now in stages]
        if row_before.under_load is not None and row_now.under_load is not None:
            untested.append(_difference(row_before.under_load, row_now.under_load, row=row_now, stage=UNDER_LOAD))
    return Comparison(
        old=name,
        test=TEST,
        differences=tuple(_with_verdicts(untested)),
        warnings=tuple(_warnings(old, new, len(pairs))),
    )


def _row_pairs(old: SpeedReport, new: SpeedReport) -> Iterator[tuple[SpeedRow, SpeedRow]]:
    """Yield the rows of the same batch size and concurrency."""
    for row in new.rows:
        for other in old.rows:
            if (other.batch, other.concurrency) == (row.batch, row.concurrency):
                yield other, row
                break


def _stage_pairs(old: SpeedRow, new: SpeedRow) -> Iterator[tuple[str, StageTime, StageTime]]:
    """Yield the stages that both rows have and that are long enough to measure."""
    earlier = {stage.name: stage for stage in old.stages}
    for stage in new.stages:
        before = earlier.get(stage.name)
        if before is not None and min(before.p50, stage.p50) >= MIN_MS:
            yield stage.name, before, stage


def _difference(before: StageTime, now: StageTime, *, row: SpeedRow, stage: str) -> Difference:
    """Return the difference with its uncorrected p-value and without a verdict."""
    ratio, low, high, p = _ratio(before.blocks, now.blocks)
    return Difference(
        batch=row.batch,
        concurrency=row.concurrency,
        stage=stage,
        old_ms=before.p50,
        new_ms=now.p50,
        ratio=ratio,
        low=low,
        high=high,
        p=p,
        verdict="too few blocks" if high is None else "",
    )


def _with_verdicts(untested: Sequence[Difference]) -> Iterator[Difference]:
    """Yield the differences with p-values corrected by Holm's procedure, and verdicts."""
    testable = [index for index, one in enumerate(untested) if not one.verdict]
    corrected = dict.fromkeys(range(len(untested)), 1.0)
    highest = 0.0
    for rank, index in enumerate(sorted(testable, key=lambda index: untested[index].p)):
        highest = max(highest, min(1.0, untested[index].p * (len(testable) - rank)))
        corrected[index] = highest
    for index, one in enumerate(untested):
        changed = "slower" if one.ratio > 1 else "faster"
        verdict = one.verdict or (changed if corrected[index] <= LEVEL else "no change")
        yield replace(one, p=corrected[index], verdict=verdict)


def _ratio(old: Sequence[float], new: Sequence[float]) -> tuple[float, float | None, float | None, float]:
    """Return the ratio of the typical blocks, its confidence interval (low, high), and the p-value."""
    if min(len(old), len(new)) < MIN_BLOCKS:
        return _exp(math.log(max(TICK_MS, median(new)) / max(TICK_MS, median(old)))), None, None, 1.0
    (mean_old, error_old, freedom_old), (mean_new, error_new, freedom_new) = _log_mean(old), _log_mean(new)
    difference = mean_new - mean_old
    error = math.hypot(error_old, error_new)
    if error == 0.0:
        ratio = _exp(difference)
        return ratio, ratio, ratio, float(abs(difference) <= _LOG_MIN_CHANGE)
    freedom = error**4 / (error_old**4 / freedom_old + error_new**4 / freedom_new)
    margin = student_t_quantile(1 - LEVEL / 2, freedom) * error
    # The hypothesis is the nearer edge of "no change"; the other edge adds the probability beyond it.
    nearer = student_t_tail((abs(difference) - _LOG_MIN_CHANGE) / error, freedom)
    p = nearer + student_t_tail((abs(difference) + _LOG_MIN_CHANGE) / error, freedom)
    return _exp(difference), _exp(difference - margin), _exp(difference + margin), min(1.0, p)


def _exp(logarithm: float) -> float:
    """Return e to this power, limited to finite numbers."""
    return math.exp(min(max(logarithm, -_MAX_LOG), _MAX_LOG))


def _log_mean(blocks: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of the logarithms, its standard error, and the degrees of freedom of that error."""
    values = np.log(np.maximum(np.asarray(blocks, dtype=np.float64), TICK_MS))
    n = len(values)
    deviations = values - values.mean()
    square = float(deviations @ deviations)
    if square <= n * np.finfo(np.float64).eps:
        return float(values.mean()), 0.0, n - 1.0
    neighbours = float(deviations[1:] @ deviations[:-1]) / square
    correlation = min(max(0.0, (n * neighbours + 1) / (n - 4)), 1 - 2 / n)
    effective = max(2.0, n * (1 - correlation) / (1 + correlation))
    return float(values.mean()), math.sqrt(square / (n - 1) / effective), effective - 1


# --- other differences ------------------------------------------------------------------------------------------------


def _warnings(old: SpeedReport, new: SpeedReport, paired_rows: int) -> Iterator[str]:
    """Yield what differs between two reports besides the speed."""
    if not paired_rows:
        rows = "; ".join(
            f"{age}: {', '.join(f'batch {row.batch} x {row.concurrency}' for row in report.rows)}"
            for age, report in (("old", old), ("new", new))
        )
        yield f"no row has the same batch size and concurrency ({rows})"
    facts = (
        ("machine", old.machine, new.machine),
        ("device", old.device, new.device),
        ("runtime", old.runtime, new.runtime),
        ("precision", old.precision, new.precision),
        ("NMS", old.nms, new.nms),
        ("model", old.variant, new.variant),
        ("network input", old.input_hw, new.input_hw),
        ("frame size", old.frame_hw, new.frame_hw),
        ("frames", old.frames, new.frames),
        ("detections per image", old.detections_per_image, new.detections_per_image),
    )
    yield from (f"{name}: was {before}, is {now}" for name, before, now in facts if before != now)
    earlier, later = dict((*old.environment, *old.settings)), dict((*new.environment, *new.settings))
    for key in sorted({*earlier, *later}):
        if earlier.get(key) != later.get(key):
            yield f"{key}: was {earlier.get(key, 'not reported')}, is {later.get(key, 'not reported')}"
    for age, report in (("old", old), ("new", new)):
        for row in report.rows:
            if row.other_cpu_load is not None and row.other_cpu_load > BUSY:
                yield (
                    f"in the {age} run other programs used {row.other_cpu_load:.0%} of the CPU time at batch "
                    f"{row.batch} x {row.concurrency}: they may cause a difference"
                )
            if row.clocks is not None and row.clocks.throttled:
                yield f"the {age} run was throttled at batch {row.batch}: {', '.join(row.clocks.throttled)}"


def describe_comparison(comparison: Comparison) -> str:
    """Return the table of differences, the test, and the warnings."""
    rows = [
        [
            one.batch,
            one.concurrency,
            one.stage,
            format_ms(one.old_ms),
            format_ms(one.new_ms),
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


def _verdict(one: Difference) -> str:
    wide = one.low is not None and one.high is not None and one.high > MAX_SPREAD**2 * one.low
    return "too noisy to tell" if one.verdict == "no change" and wide else one.verdict


def _interval(one: Difference) -> str:
    if one.low is None or one.high is None:
        return "-"
    low = f"{one.low:.3f}" if one.low >= 0.1 else "below 0.1"
    return f"{low} to {f'{one.high:.3f}' if one.high <= 10 else 'above 10'}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
