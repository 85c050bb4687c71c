"""Finding the fastest of several functions without measuring the slow ones longer than needed.

In every round each function runs once, so that a drift of the machine affects all of them; every other round runs in
reverse order. Two functions are compared by the logarithms of their ratios in the rounds that both ran, whose mean has
a confidence interval from Student's t-distribution. A function that is slower with a probability of `LEVEL` leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from yolov7_deploy._statistics import student_t_quantile
from yolov7_deploy.benchmarking.sampling import no_garbage_collection, timed_ms

MIN_ROUNDS = 8
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
    max_rounds: int,
    items: Mapping[str, int],
    on_round: Callable[[int, Sequence[str]], None] = lambda rounds, names: None,
) -> None:
    """Time functions against each other until one is left, or `max_rounds` are over.

    Args:
        calls: The functions by name; each was called before, so that it is warm.
        samples: Receives the milliseconds per item of each round, an entry for each function. They stay if the race is
            interrupted.
        max_rounds: Number of rounds after which functions that are not slower share the first place.
        items: Number of items, such as images, that each function processes in a call.
        on_round: Called after each round with their number and the names that are left.
    """
    left = list(calls)
    samples.update({name: [] for name in calls})
    for number in range(1, max_rounds + 1):
        for name in left if number % 2 else reversed(left):
            with no_garbage_collection():
                samples[name].append(timed_ms(calls[name]) / items[name])
        if number >= MIN_ROUNDS:
            left = [name for name in left if not _is_slower(samples, name, fastest(samples, left))]
        on_round(number, left)
        if len(left) < 2 and number >= MIN_ROUNDS:
            return


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
