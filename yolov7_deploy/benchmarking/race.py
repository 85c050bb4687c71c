"""Finding the fastest of several functions without measuring the slow ones longer than needed.

In every round each function runs for a moment, after one call that is not counted, because the function before it has
filled the caches. So a drift of the machine affects all of them; every other round runs in reverse order. Two functions
are compared by the logarithms of their ratios in the rounds that both ran, whose mean has a confidence interval from
Student's t-distribution. A function that is slower with a probability of `LEVEL` leaves.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from yolov7_deploy._statistics import student_t_quantile
from yolov7_deploy.benchmarking.sampling import no_garbage_collection, timed_ms

MIN_ROUNDS = 8
SLICE_S = 0.1  # how long a function runs in a round, at least one call
# Strict, because the comparison is repeated after every round, and one slow call in a few is enough to mislead.
LEVEL = 0.9995
INTERVAL = 0.95

Call = Callable[[], object]
Samples = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Time of one function divided by that of another, with its 95 % confidence interval."""

    ratio: float
    low: float
    high: float


def race(
    calls: Mapping[str, Call],
    samples: Samples,
    *,
    seconds: float,
    items: Mapping[str, int],
    on_round: Callable[[float], None] = lambda share: None,
) -> None:
    """Time functions against each other until one is left, or the time is over.

    Args:
        calls: The functions by name; each was called before, so that it is warm.
        samples: Receives the milliseconds per item of each round, an entry for each function. They stay if the race is
            interrupted.
        seconds: Duration after which functions that are not slower share the first place; `MIN_ROUNDS` are run in any
            case.
        items: Number of items, such as images, that each function processes in a call.
        on_round: Called after each round with the share of the work that is done, 0 to 1.
    """
    left, started = list(calls), time.perf_counter()
    samples.update({name: [] for name in calls})
    for number in itertools.count(1):
        for name in left if number % 2 else reversed(left):
            samples[name].append(_mean_ms(calls[name]) / items[name])
        passed = time.perf_counter() - started
        if number >= MIN_ROUNDS:
            leader = fastest(samples, left)
            left = [name for name in left if not _is_slower(samples, name, leader)]
            if len(left) == 1 or passed >= seconds:
                break
        on_round(min(1.0, number / MIN_ROUNDS, passed / seconds))
    on_round(1.0)


def _mean_ms(call: Call) -> float:
    """Return the mean milliseconds of the calls of one slice, without the first one."""
    with no_garbage_collection():
        call()
        times, deadline = [timed_ms(call)], time.perf_counter() + SLICE_S
        while time.perf_counter() < deadline:
            times.append(timed_ms(call))
    return sum(times) / len(times)


def fastest(samples: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Return the name with the smallest median."""
    return min(names, key=lambda name: median(samples[name]))


def compare(slow: Sequence[float], fast: Sequence[float], *, level: float = INTERVAL) -> Ratio:
    """Return the ratio of the times of two functions in the rounds that both ran, at least two.

    Args:
        slow, fast: Times of one function, and of the other.
        level: Confidence level of the interval.
    """
    rounds = min(len(slow), len(fast))
    logs = np.log(np.asarray(slow[:rounds]) / np.asarray(fast[:rounds]))
    mean = float(np.median(logs)) if rounds < 2 else float(logs.mean())
    error = float(logs.std(ddof=1)) / math.sqrt(rounds) if rounds > 1 else math.inf
    width = student_t_quantile((1 + level) / 2, rounds - 1) * error if rounds > 1 else math.inf
    return Ratio(ratio=math.exp(mean), low=math.exp(mean - width), high=math.exp(min(mean + width, 700.0)))


def _is_slower(samples: Samples, name: str, leader: str) -> bool:
    return name != leader and compare(samples[name], samples[leader], level=2 * LEVEL - 1).low > 1
