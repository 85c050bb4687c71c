"""Histograms of magnitudes, and the five methods that choose an INT8 range from one.

A histogram counts magnitudes by the upper sixteen bits of their float32, which is bfloat16 by truncation: 128 bins per
octave over all finite numbers. So the range need not be known before the first image, bins never move, and the sum of
histograms does not depend on the order of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import ExportError

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

LEVELS = 127  # largest INT8 value; -128 is not used, because TensorRT quantizes symmetrically
REDUCED_LEVELS = 64  # largest weight of 7 bits: the sum of two products with uint8 fits into 16 bits
BINS = 2**15
PERCENTILE = 99.99  # the default of NVIDIA's tools
_INFINITE = 0x7F80  # first bin of values that are not finite
_CHUNK = 2**18  # values whose bins stay in the CPU cache while they are counted
LP_POWER = 2.4  # of the error that `lp` minimises
_CANDIDATES = 160  # clips that `mse` and `lp` try, 32 per octave: down to a 32nd of the largest value
# Lower edge of each bin; bins of infinities and NaN have none.
_EDGES: Doubles = (np.arange(_INFINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_ENTROPY_BINS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Histogram of absolute values.

    Attributes:
        counts: int64 [BINS].
        amax: The largest absolute value.
        negative_amax: The largest absolute value of negative values, 0 without any.
    """

    counts: Counts
    amax: float
    negative_amax: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> Histogram:
        """Return the histogram of all values of an array; infinities and NaN have bins of their own."""
        # Memory is little-endian, so the upper half of a float32 is its second word.
        words = np.ascontiguousarray(values).reshape(-1).view(np.uint16)[1::2]
        signed = np.zeros(2 * BINS, dtype=np.int64)
        for start in range(0, words.size, _CHUNK):
            signed += np.bincount(words[start : start + _CHUNK], minlength=2 * BINS)
        negative_amax = 0.0 - float(values.min(initial=0))
        amax = max(float(values.max(initial=0)), negative_amax)
        return cls(signed[:BINS] + signed[BINS:], amax, negative_amax)

    @classmethod
    def sum(cls, parts: Iterable[Histogram]) -> Histogram:
        """Return the histogram of the values of all parts."""
        counts, amax, negative_amax = np.zeros(BINS, dtype=np.int64), 0.0, 0.0
        for part in parts:
            counts += part.counts
            amax, negative_amax = max(amax, part.amax), max(negative_amax, part.negative_amax)
        return cls(counts, amax, negative_amax)

    @property
    def is_finite(self) -> bool:
        """True if no value was infinite or NaN."""
        return not self.counts[_INFINITE:].any() and np.isfinite(self.amax)

    def bins(self) -> tuple[Doubles, Doubles, Doubles]:
        """Return lower edge, upper edge and count of each bin that is not empty, in ascending order."""
        filled = np.flatnonzero(self.counts[:_INFINITE])
        return _EDGES[filled], np.minimum(_EDGES[filled + 1], self.amax), self.counts[filled].astype(np.float64)


def max_range(histogram: Histogram) -> float:
    """Return the largest magnitude: nothing is clipped."""
    return histogram.amax


def percentile_range(histogram: Histogram, percent: float = PERCENTILE) -> float:
    """Return the magnitude that `percent` of the values do not exceed; the largest one if that would be 0."""
    _, upper, counts = histogram.bins()
    reached = np.searchsorted(np.cumsum(counts), counts.sum() * percent / 100)
    clip = float(upper[min(int(reached), len(upper) - 1)])
    return clip if clip > _EDGES[1] else histogram.amax


def mse_range(histogram: Histogram, levels: int = LEVELS) -> float:
    """Return the clip with the least mean squared error between values and INT8 values."""
    return _least_error_range(histogram, levels, 2)


def lp_range(histogram: Histogram, levels: int = LEVELS) -> float:
    """Return the clip with the least mean of |x - q(x)|**2.4 over the values, x, and their INT8 values, q(x).

    A power above 2 clips large values less (Nahshan et al., "Loss aware post-training quantization", Machine Learning
    2021, section 3).
    """
    return _least_error_range(histogram, levels, LP_POWER)


def _least_error_range(histogram: Histogram, levels: int, power: float) -> float:
    """Return the clip with the least mean of |x - q(x)|**power.

    Values are taken as evenly spread inside a bin. A clip of c has steps of c / levels; the error is that of rounding
    below the clip, and the distance to the clip above it.
    """
    lower, upper, counts = histogram.bins()
    clips = histogram.amax * 2.0 ** (-np.arange(_CANDIDATES) / 32)
    errors = [_sum_of_errors(lower, upper, counts, clip, levels, power) for clip in clips]
    return float(clips[int(np.argmin(errors))])


def _sum_of_errors(lower: Doubles, upper: Doubles, counts: Doubles, clip: float, levels: int, power: float) -> float:
    """Return the sum over all values of |x - q(x)|**power, integrated over each bin."""
    step = clip / levels
    width = upper - lower
    integral = _error_integral(upper / step, levels, power) - _error_integral(lower / step, levels, power)
    has_width = width > 0
    # The largest value may lie on the lower edge of its bin.
    alone = np.abs(_distance(lower / step, levels)) ** power
    mean = np.where(has_width, integral / np.where(has_width, width / step, 1.0), alone)
    return float((counts * mean).sum()) * math.pow(step, power)


def _distance(x: Doubles, levels: int) -> Doubles:
    """Return the signed distance to the nearest integer up to `levels`."""
    distance: Doubles = x - np.minimum(np.rint(x), levels)
    return distance


def _error_integral(x: Doubles, levels: int, power: float) -> Doubles:
    """Return the integral from 0 to x of |distance|**power; each integer that is passed adds that from -1/2 to 1/2."""
    distance = _distance(x, levels)
    rest: Doubles = np.copysign(np.abs(distance) ** (power + 1), distance) / (power + 1)
    return (x - distance) / ((power + 1) * 2**power) + rest


def entropy_range(histogram: Histogram, levels: int = LEVELS) -> float:
    """Return the clip of TensorRT's entropy calibration (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Of 2048 equal bins up to the largest value, the first i are kept, and everything above is added to the last of them.
    The best i has the least Kullback-Leibler divergence between that and its quantization to 128 steps (`levels` + 1).
    """
    lower, upper, counts = histogram.bins()
    edges = np.linspace(0, histogram.amax, _ENTROPY_BINS + 1)
    linear = np.diff(_cumulative(edges, lower, upper, counts))
    linear[0] = linear[1]  # as NVIDIA's tools do: values near zero would outweigh all others
    steps = levels + 1
    best = min(range(steps, _ENTROPY_BINS + 1), key=lambda kept: _divergence(linear, kept, steps))
    return float(edges[best])


def _cumulative(x: Doubles, lower: Doubles, upper: Doubles, counts: Doubles) -> Doubles:
    """Return the number of values up to each x, if values are evenly spread inside their bins."""
    points = np.column_stack([lower, upper]).reshape(-1)
    total = np.cumsum(counts)
    heights = np.column_stack([total - counts, total]).reshape(-1)
    return np.interp(x, points, heights)


def _divergence(linear: Doubles, kept: int, steps: int) -> float:
    """Return the Kullback-Leibler divergence between the first `kept` bins and their quantization to `steps`."""
    reference = linear[:kept].copy()
    reference[-1] += linear[kept:].sum()
    step_of_bin = np.arange(kept) * steps // kept
    filled = linear[:kept] > 0
    sums = np.bincount(step_of_bin, linear[:kept], minlength=steps)
    filled_bins = np.bincount(step_of_bin, filled, minlength=steps)
    spread = np.where(filled, sums[step_of_bin] / np.maximum(filled_bins[step_of_bin], 1), 0.0)
    p, q = reference / reference.sum(), spread / max(spread.sum(), 1e-300)
    in_both = (p > 0) & (q > 0)
    # Values that the quantization cannot represent cost as much as an event of probability 1e-9.
    missing = p[(p > 0) & (q <= 0)].sum()
    return float((p[in_both] * np.log(p[in_both] / q[in_both])).sum() + missing * np.log(1e9))


METHODS: dict[str, Callable[[Histogram, int], float]] = {
    "mse": mse_range,
    "lp": lp_range,
    "percentile": lambda histogram, _: percentile_range(histogram),
    "entropy": entropy_range,
    "max": lambda histogram, _: max_range(histogram),
}


def choose_range(histogram: Histogram, method: str, levels: int = LEVELS) -> float:
    """Return the largest magnitude that INT8 represents, by one of `METHODS`; 1 if every value is 0.

    Args:
        histogram: The values.
        method: One of `METHODS`.
        levels: Number of steps from 0 to that magnitude.

    Raises:
        ExportError: There are infinite values or NaN.
    """
    if not histogram.is_finite:
        raise ExportError("Some values are infinite or NaN.", fix="Check the weights:  y7 info WEIGHTS")
    return METHODS[method](histogram, levels) if histogram.amax > 0 else 1.0
