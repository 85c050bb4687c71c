"""Tells a change of speed from noise: two reports of `y7 bench`, row by row and span by span.

A run is a series of block medians, which depend on their neighbours: a machine that is slow now is slow a second later
too. The logarithms of the medians are compared by Welch's t-test on as many independent blocks as the series is worth,

    n' = n (1 - r) / (1 + r),    r = (n r1 + 1) / (n - 4), not below 0,

with r1 the correlation of neighbours and r the same without its bias in short series (Kendall 1954; Marriott and Pope
1954). What is tested is not whether the ratio is 1, which it never is, but whether it lies beyond `RELEVANT` to either
side; the spans and rows of two reports are one family, whose false alarms Holm's procedure holds at `LEVEL`.

What no test can see in two runs: a machine that was busier during all of one. It is warned of, as far as it is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt

from yolov7_deploy.benchmark.report import BUSY, SpanTime, SpeedReport, SpeedRow

RELEVANT = 0.02  # a smaller change is none: where memory comes to lie differs from run to run, and makes one per cent
LEVEL = 0.05
LEAST_BLOCKS = 6  # of either run; the correlation of fewer says nothing
LEAST_MS = 0.005  # a span shorter than this is noise of the clock
TICK_MS = 1e-6  # the clock's own unit
_WIDEST = 600.0  # of a logarithm that has an exponential
LOADED = "end_to_end of all callers"
TEST = (
    f"Welch's t-test on logarithms of block medians, corrected for the correlation of neighbours, that the ratio lies "
    f"beyond {RELEVANT:.0%}; Holm's correction over all lines, {LEVEL:.0%} false alarms"
)

_LIMIT = math.log1p(RELEVANT)
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One span of one row, before and now.

    Attributes:
        batch, threads, span: Which.
        old_ms, new_ms: Medians a call.
        ratio: New by old, of the typical block; above 1 is slower.
        low, high: 95 % confidence interval of the ratio; `None` where there are too few blocks.
        p: Probability of such a ratio, or one further away, where nothing beyond `RELEVANT` has changed; corrected.
        verdict: `faster`, `slower`, `no change` or `too few blocks`.
    """

    batch: int
    threads: int
    span: str
    old_ms: float
    new_ms: float
    ratio: float
    low: float | None
    high: float | None
    p: float
    verdict: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What changed between two reports.

    Attributes:
        old: File name of the earlier one, as given.
        test: How a change is told from noise, in words.
        differences: One for each span of every row that both have.
        warnings: Why a difference may not be one of speed, and what could not be compared.
    """

    old: str
    test: str
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]


def compare_reports(old: SpeedReport, new: SpeedReport, *, name: str = "") -> Comparison:
    """The differences of two reports; `name` says where the old one came from."""
    pairs = list(_row_pairs(old, new))
    raw: list[Difference] = []
    batches: set[int] = set()
    for row_before, row_now in pairs:
        # Rows of one batch size share what a single caller saw.
        spans = () if row_now.batch in batches else _span_pairs(row_before, row_now)
        batches.add(row_now.batch)
        raw += [_difference(before, now, row=row_now, span=span) for span, before, now in spans]
        if row_before.loaded is not None and row_now.loaded is not None:
            raw.append(_difference(row_before.loaded, row_now.loaded, row=row_now, span=LOADED))
    return Comparison(
        old=name, test=TEST, differences=tuple(_judged(raw)), warnings=tuple(_warnings(old, new, len(pairs)))
    )


def _row_pairs(old: SpeedReport, new: SpeedReport) -> Iterator[tuple[SpeedRow, SpeedRow]]:
    """Rows of the same batch size and number of callers."""
    for row in new.rows:
        for other in old.rows:
            if (other.batch, other.threads) == (row.batch, row.threads):
                yield other, row
                break


def _span_pairs(old: SpeedRow, new: SpeedRow) -> Iterator[tuple[str, SpanTime, SpanTime]]:
    """Spans that both rows have and that a clock can measure."""
    earlier = {span.name: span for span in old.spans}
    for span in new.spans:
        before = earlier.get(span.name)
        if before is not None and min(before.p50, span.p50) >= LEAST_MS:
            yield span.name, before, span


def _difference(before: SpanTime, now: SpanTime, *, row: SpeedRow, span: str) -> Difference:
    """With the p-value of this line alone, and without a verdict."""
    ratio, low, high, p = _ratio(before.blocks, now.blocks)
    return Difference(
        batch=row.batch,
        threads=row.threads,
        span=span,
        old_ms=before.p50,
        new_ms=now.p50,
        ratio=ratio,
        low=low,
        high=high,
        p=p,
        verdict="too few blocks" if high is None else "",
    )


def _judged(raw: Sequence[Difference]) -> Iterator[Difference]:
    """With p-values corrected by Holm's procedure, and verdicts."""
    testable = [index for index, one in enumerate(raw) if not one.verdict]
    corrected = dict.fromkeys(range(len(raw)), 1.0)
    highest = 0.0
    for rank, index in enumerate(sorted(testable, key=lambda index: raw[index].p)):
        highest = max(highest, min(1.0, raw[index].p * (len(testable) - rank)))
        corrected[index] = highest
    for index, one in enumerate(raw):
        changed = "slower" if one.ratio > 1 else "faster"
        verdict = one.verdict or (changed if corrected[index] <= LEVEL else "no change")
        yield replace(one, p=corrected[index], verdict=verdict)


def _ratio(old: Sequence[float], new: Sequence[float]) -> tuple[float, float | None, float | None, float]:
    """Ratio of the typical blocks, its confidence interval, and how probable it is where nothing relevant changed."""
    if min(len(old), len(new)) < LEAST_BLOCKS:
        return _power(math.log(max(TICK_MS, median(new)) / max(TICK_MS, median(old)))), None, None, 1.0
    (mean_old, error_old, free_old), (mean_new, error_new, free_new) = _mean(old), _mean(new)
    difference = mean_new - mean_old
    error = math.hypot(error_old, error_new)
    if error == 0.0:
        ratio = _power(difference)
        return ratio, ratio, ratio, float(abs(difference) <= _LIMIT)
    free = error**4 / (error_old**4 / free_old + error_new**4 / free_new)
    half = student_quantile(1 - LEVEL / 2, free) * error
    # The worse edge of what counts as no change is the hypothesis; the other edge adds what lies beyond it.
    far = (abs(difference) - _LIMIT) / error
    p = student_tail(far, free) + student_tail((abs(difference) + _LIMIT) / error, free)
    return _power(difference), _power(difference - half), _power(difference + half), min(1.0, p)


def _power(logarithm: float) -> float:
    """e to it, as far as numbers go."""
    return math.exp(min(max(logarithm, -_WIDEST), _WIDEST))


def _mean(blocks: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the logarithms, its standard error, and the degrees of freedom of that."""
    values = np.log(np.maximum(np.asarray(blocks, dtype=np.float64), TICK_MS))
    n = len(values)
    rest = values - values.mean()
    square = float(rest @ rest)
    if square <= n * np.finfo(np.float64).eps:
        return float(values.mean()), 0.0, n - 1.0
    neighbours = float(rest[1:] @ rest[:-1]) / square
    correlation = min(max(0.0, (n * neighbours + 1) / (n - 4)), 1 - 2 / n)
    worth = max(2.0, n * (1 - correlation) / (1 + correlation))
    return float(values.mean()), math.sqrt(square / (n - 1) / worth), worth - 1


# --- Student's distribution ---------------------------------------------------------------------------------------

_STEPS = 2000


def student_tail(t: float, freedom: float) -> float:
    """P(T > t). With t = sqrt(freedom) tan(a), the density of a is proportional to cos(a) ** (freedom - 1)."""
    angles, below = _student(freedom)
    beyond = (1 - float(np.interp(math.atan(abs(t) / math.sqrt(freedom)), angles, below))) / 2
    return beyond if t >= 0 else 1 - beyond


def student_quantile(probability: float, freedom: float) -> float:
    """The t that T stays below with this probability (above one half)."""
    angles, below = _student(freedom)
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * probability - 1, below, angles)))


def _student(freedom: float) -> tuple[FloatArray, FloatArray]:
    """Angles from 0 to a quarter turn, and the share of |T| below each."""
    angles = np.linspace(0.0, math.pi / 2, _STEPS + 1)
    density = np.cos((angles[:-1] + angles[1:]) / 2) ** (freedom - 1)
    below = np.concatenate(([0.0], np.cumsum(density)))
    return angles, below / below[-1]


# --- what else differs --------------------------------------------------------------------------------------------


def _warnings(old: SpeedReport, new: SpeedReport, rows: int) -> Iterator[str]:
    """What besides the speed differs between two reports."""
    if not rows:
        told = "; ".join(
            f"{word}: {', '.join(f'batch {row.batch} x {row.threads}' for row in report.rows)}"
            for word, report in (("old", old), ("new", new))
        )
        yield f"no row has the same batch size and number of callers ({told})"
    facts = (
        ("machine", old.machine, new.machine),
        ("device", old.device, new.device),
        ("backend", old.backend, new.backend),
        ("precision", old.precision, new.precision),
        ("NMS", old.nms, new.nms),
        ("model", old.variant, new.variant),
        ("network input", old.input_hw, new.input_hw),
        ("size of the frames", old.frame_hw, new.frame_hw),
        ("frames", old.frames, new.frames),
        ("detections an image", old.detections_per_image, new.detections_per_image),
    )
    yield from (f"{what}: {before} then, {now} now" for what, before, now in facts if before != now)
    earlier, later = dict((*old.environment, *old.settings)), dict((*new.environment, *new.settings))
    for key in sorted({*earlier, *later}):
        if earlier.get(key) != later.get(key):
            yield f"{key}: {earlier.get(key, 'not told')} then, {later.get(key, 'not told')} now"
    for word, report in (("old", old), ("new", new)):
        for row in report.rows:
            if row.other_load is not None and row.other_load > BUSY:
                yield (
                    f"in the {word} run other programs had {row.other_load:.0%} of the processors at batch {row.batch} "
                    f"x {row.threads}: a difference may be theirs"
                )
            if row.clocks is not None and row.clocks.throttled:
                yield f"the {word} run was held back at batch {row.batch}: {', '.join(row.clocks.throttled)}"
