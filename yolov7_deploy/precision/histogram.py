"""How often values of each magnitude occur, and the largest one that INT8 should tell apart.

A histogram counts magnitudes by the first sixteen bits of their float32, which are the bfloat16 below it: 128 bins in
every octave, from the smallest number to the largest. So no range need be known before the first image, bins never
move, and sums of histograms do not depend on the order of their images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import ExportError

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

LEVELS = 127  # INT8 without -128: symmetric, as TensorRT wants it
BINS = 2**15
PERCENTILE = 99.99  # what NVIDIA's tools take where nothing is asked
_INFINITE = 0x7F80  # first code of what is no finite number
_AT_ONCE = 2**18  # values whose codes stay in the cache while they are counted
_CLIPS = 160  # candidates of the best clip, 32 an octave: down to a 32nd of the largest
# Lower edge of each bin; those behind the last finite one have none.
_EDGES: Doubles = (np.arange(_INFINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_ENTROPY_BINS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of magnitudes, int64 [BINS], and the largest magnitude itself."""

    counts: Counts
    largest: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> Histogram:
        """The histogram of all values of an array; magnitudes that are no finite numbers count in bins of their own."""
        codes = (
            np.ascontiguousarray(values).reshape(-1).view(np.uint16)[1::2]
        )  # the high half, as memory is little-endian
        signed = np.zeros(2 * BINS, dtype=np.int64)
        for start in range(0, codes.size, _AT_ONCE):
            signed += np.bincount(codes[start : start + _AT_ONCE], minlength=2 * BINS)
        largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        return cls(signed[:BINS] + signed[BINS:], largest)

    @classmethod
    def sum(cls, parts: Iterable[Histogram]) -> Histogram:
        """Of all values of the parts together."""
        counts, largest = np.zeros(BINS, dtype=np.int64), 0.0
        for part in parts:
            counts += part.counts
            largest = max(largest, part.largest)
        return cls(counts, largest)

    @property
    def is_finite(self) -> bool:
        """Every value was a number."""
        return not self.counts[_INFINITE:].any() and np.isfinite(self.largest)

    def bins(self) -> tuple[Doubles, Doubles, Doubles]:
        """Lower edge, upper edge and count of each bin that is not empty, in rising order."""
        filled = np.flatnonzero(self.counts[:_INFINITE])
        return _EDGES[filled], np.minimum(_EDGES[filled + 1], self.largest), self.counts[filled].astype(np.float64)


def largest_of(histogram: Histogram) -> float:
    """The largest magnitude: nothing is clipped."""
    return histogram.largest


def percentile_of(histogram: Histogram, percent: float = PERCENTILE) -> float:
    """The magnitude that so many percent of the values do not exceed; the largest where so many are 0."""
    _, upper, counts = histogram.bins()
    reached = np.searchsorted(np.cumsum(counts), counts.sum() * percent / 100)
    clip = float(upper[min(int(reached), len(upper) - 1)])
    return clip if clip > _EDGES[1] else histogram.largest


def mse_of(histogram: Histogram) -> float:
    """The clip whose INT8 values differ least from the values themselves, in the mean of squares.

    Values spread evenly inside a bin. A clip of c has steps of c / 127; the mean squared difference is that of rounding
    below the clip, and of the distance to it above.
    """
    lower, upper, counts = histogram.bins()
    clips = histogram.largest * 2.0 ** (-np.arange(_CLIPS) / 32)
    errors = [_squared_error(lower, upper, counts, clip) for clip in clips]
    return float(clips[int(np.argmin(errors))])


def _squared_error(lower: Doubles, upper: Doubles, counts: Doubles, clip: float) -> float:
    """Sum over all values of (x - q(x))**2, from the integral of it over each bin."""
    step = clip / LEVELS
    width = upper - lower
    integral = _error_up_to(upper / step) - _error_up_to(lower / step)
    dense = width > 0
    # The largest value may stand at the lower edge of its bin.
    mean = np.where(dense, integral / np.where(dense, width / step, 1.0), _error_at(lower / step))
    return float((counts * mean).sum()) * step * step


def _error_at(x: Doubles) -> Doubles:
    distance: Doubles = x - np.minimum(np.rint(x), LEVELS)
    return distance * distance


def _error_up_to(x: Doubles) -> Doubles:
    """Integral from 0 to x of the squared distance to the nearest whole number, up to 127."""
    whole = np.minimum(np.rint(x), LEVELS)
    return whole / 12 + (x - whole) ** 3 / 3


def entropy_of(histogram: Histogram) -> float:
    """The clip that TensorRT's entropy calibration chooses (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Of 2048 equal bins up to the largest value, the first i stay, with all that is above in the last of them. The best i
    has the least Kullback-Leibler divergence between that and the same in 128 steps.
    """
    lower, upper, counts = histogram.bins()
    edges = np.linspace(0, histogram.largest, _ENTROPY_BINS + 1)
    linear = np.diff(_below(edges, lower, upper, counts))
    linear[0] = linear[1]  # as NVIDIA's tools do: what is next to nothing would outweigh all else
    steps = LEVELS + 1
    kept = range(steps, _ENTROPY_BINS + 1)
    best = min(kept, key=lambda i: _divergence(linear, i, steps))
    return float(edges[best])


def _below(x: Doubles, lower: Doubles, upper: Doubles, counts: Doubles) -> Doubles:
    """How many values are not above each x, spread evenly inside their bins."""
    points = np.column_stack([lower, upper]).reshape(-1)
    total = np.cumsum(counts)
    heights = np.column_stack([total - counts, total]).reshape(-1)
    return np.interp(x, points, heights)


def _divergence(linear: Doubles, kept: int, steps: int) -> float:
    reference = linear[:kept].copy()
    reference[-1] += linear[kept:].sum()
    place = np.arange(kept) * steps // kept
    filled = linear[:kept] > 0
    sums = np.bincount(place, linear[:kept], minlength=steps)
    members = np.bincount(place, filled, minlength=steps)
    spread = np.where(filled, sums[place] / np.maximum(members[place], 1), 0.0)
    p, q = reference / reference.sum(), spread / max(spread.sum(), 1e-300)
    seen = (p > 0) & (q > 0)
    # What one has and the other lacks costs as much as an event that was thought all but impossible.
    lost = p[(p > 0) & (q <= 0)].sum()
    return float((p[seen] * np.log(p[seen] / q[seen])).sum() + lost * np.log(1e9))


METHODS: dict[str, Callable[[Histogram], float]] = {
    "mse": mse_of,
    "percentile": percentile_of,
    "entropy": entropy_of,
    "max": largest_of,
}


def clip_of(histogram: Histogram, method: str) -> float:
    """The largest magnitude that INT8 tells apart, by one of `METHODS`; 1 where every value is 0.

    Raises:
        ExportError: Values are infinite or no numbers.
    """
    if not histogram.is_finite:
        raise ExportError("Some values are infinite or no numbers.", fix="Check the weights:  y7 info WEIGHTS")
    return METHODS[method](histogram) if histogram.largest > 0 else 1.0
