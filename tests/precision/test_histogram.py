"""Histograms against counting value by value, and each calibration method against its slow definition."""

from __future__ import annotations

import math
import struct
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolov7_deploy.errors import ExportError
from yolov7_deploy.options import INT8_METHODS
from yolov7_deploy.precision.histogram import (
    BINS,
    LEVELS,
    METHODS,
    PERCENTILE,
    Histogram,
    choose_range,
    entropy_range,
    lp_range,
    max_range,
    mse_range,
    percentile_range,
)

INFINITE = 0x7F80  # the bfloat16 code of infinity
CANDIDATES_PER_OCTAVE, CANDIDATES = 32, 160  # clips that `mse_range` and `lp_range` try
# A histogram treats values as evenly spread inside a bin, so of two candidates that are nearly equal it may choose the
# other one. Measured: 0.26 % and 1.1 %.
MSE_EXCESS, LP_EXCESS = 0.005, 0.02
ENTROPY_BINS = 2048
# The slow entropy counts the values themselves, not those of a histogram, and tries every seventh number of bins.
# Measured: 2.9 %.
ENTROPY_REL = 0.05

RNG = np.random.default_rng(7)
NORMAL = RNG.normal(size=20_000)
SHAPES = {
    "silu": 3 * NORMAL / (1 + np.exp(-3 * NORMAL)),
    "normal": NORMAL,
    "heavy": RNG.standard_t(2, size=20_000),
    "uniform": RNG.uniform(-1, 1, size=20_000),
    "bimodal": np.concatenate([RNG.normal(0, 0.02, 19_000), RNG.normal(5, 0.3, 1_000)]),
    "outlier": np.append(NORMAL, 60.0),
    "mostly zeros": np.where(RNG.random(20_000) < 0.95, 0.0, np.abs(NORMAL)),
}
SCALES = (1e-20, 1e-3, 1.0, 1e20)


def samples(shape, scale=1.0):
    return (SHAPES[shape] * scale).astype(np.float32)


def slow_code(value):
    """The upper 16 bits of the float32, without its sign."""
    return struct.unpack(">H", struct.pack(">f", value)[:2])[0] & 0x7FFF


def slow_counts(values):
    counts = np.zeros(BINS, np.int64)
    for code, count in Counter(slow_code(value) for value in values.reshape(-1).tolist()).items():
        counts[code] = count
    return counts


any_floats = st.lists(st.floats(width=32), max_size=50).map(lambda values: np.array(values, np.float32))
finite = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50).map(
    lambda values: np.array(values, np.float32)
)


# --- counts -----------------------------------------------------------------------------------------------------------


@given(any_floats)
def test_counts_equal_counting_each_value_by_its_bfloat16_code(values):
    histogram = Histogram.of(values)
    assert histogram.counts.dtype == np.int64 and histogram.counts.shape == (BINS,)
    np.testing.assert_array_equal(histogram.counts, slow_counts(values))


def test_arrays_of_several_chunks_are_counted_to_the_last_value():
    values = np.tile(samples("heavy"), 35)[: 2 * 2**18 + 77]
    np.testing.assert_array_equal(Histogram.of(values).counts, slow_counts(values))


def test_the_memory_layout_of_an_array_does_not_matter():
    values = samples("silu")[:7200].reshape(2, 3, 40, 30)
    strange = values.transpose(0, 2, 3, 1)[:, ::2, :, ::-1]
    assert not strange.flags.c_contiguous
    np.testing.assert_array_equal(Histogram.of(strange).counts, slow_counts(np.array(strange.tolist(), np.float32)))


@given(finite)
def test_amax_is_the_largest_magnitude_to_the_last_bit(values):
    assert Histogram.of(values).amax == max(map(abs, values.tolist()), default=0.0)


@given(finite)
def test_each_value_lies_inside_the_bin_that_counts_it(values):
    lower, upper, counts = Histogram.of(values).bins()
    assert counts.sum() == len(values)
    assert (lower <= upper).all() and (lower[1:] >= upper[:-1]).all()
    for value in map(abs, values.tolist()):
        assert ((lower <= value) & (value <= upper)).any()


@given(st.lists(finite, max_size=6).flatmap(lambda parts: st.tuples(st.just(parts), st.permutations(parts))))
def test_a_sum_is_the_histogram_of_all_values_for_any_order_and_split(parts):
    given_parts, permuted = parts
    whole = Histogram.of(np.concatenate([np.zeros(0, np.float32), *given_parts]))
    for order in (given_parts, permuted):
        total = Histogram.sum(map(Histogram.of, order))
        np.testing.assert_array_equal(total.counts, whole.counts)
        assert total.amax == whole.amax


def test_a_sum_does_not_change_its_parts():
    parts = [Histogram.of(samples(shape)) for shape in ("silu", "uniform")]
    before = [part.counts.copy() for part in parts]
    Histogram.sum(parts)
    for part, counts in zip(parts, before, strict=True):
        np.testing.assert_array_equal(part.counts, counts)


# --- values without a range -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_refused_by_every_method(bad, method):
    histogram = Histogram.of(np.append(samples("normal"), np.float32(bad)))
    for found in (histogram, Histogram.sum([Histogram.of(samples("silu")), histogram])):
        assert not found.is_finite
        with pytest.raises(ExportError, match="infinite or NaN"):
            choose_range(found, method)


def test_every_bit_pattern_of_nan_is_noticed():
    codes = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF], np.uint32)
    for value in codes.view(np.float32):
        assert not Histogram.of(np.array([1, value], np.float32)).is_finite


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_finite_numbers_have_a_range(method):
    most = float(np.finfo(np.float32).max)
    histogram = Histogram.of((np.linspace(-1, 1, 1001) * most).astype(np.float32))
    assert histogram.is_finite
    assert 0.5 * most < choose_range(histogram, method) <= most


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[], [0.0], [0.0, -0.0] * 50])
def test_an_empty_tensor_and_a_tensor_of_zeros_have_a_range_of_one(values, method):
    assert choose_range(Histogram.of(np.array(values, np.float32)), method) == 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [-3.0, 1.0, 1e-30, 2.0**100])
def test_a_single_magnitude_is_not_clipped(value, method):
    """At most slightly: if it lies between two steps, a clip just below it may be as good."""
    value = np.float32(value)
    clip = choose_range(Histogram.of(np.full(100, value)), method)
    step = clip / LEVELS
    assert abs(min(round(abs(value) / step), LEVELS) * step - abs(value)) <= step / 2
    assert clip <= abs(value)


# --- max and percentile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_max_clips_nothing(shape):
    assert max_range(Histogram.of(samples(shape))) == np.abs(samples(shape)).max()


@pytest.mark.parametrize("percent", [PERCENTILE, 99.9, 99.0, 97.3, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_percentile_is_in_the_bin_of_the_exact_one(shape, percent, scale):
    """It may be in the bin of the next value, if percent of the count is an integer except for rounding."""
    values = np.sort(np.abs(samples(shape, scale)))
    rank = math.ceil(Fraction(str(percent)) * len(values) / 100)
    exact, following = values[rank - 1], values[min(rank, len(values) - 1)]
    assert np.percentile(values, percent, method="inverted_cdf") in (exact, following)
    clip = percentile_range(Histogram.of(values), percent)
    assert exact <= clip <= min(following * (1 + 2.0**-7), values[-1])


def test_the_given_percentage_of_values_does_not_exceed_the_percentile():
    values = np.append(np.ones(9_999, np.float32), np.float32(1000))
    assert percentile_range(Histogram.of(values)) == pytest.approx(1, rel=2.0**-7)
    assert percentile_range(Histogram.of(np.append(values, np.float32(1000)))) == 1000


def test_a_percentile_of_almost_only_zeros_does_not_clip_everything():
    values = np.zeros(100_000, np.float32)
    values[:5] = [1, 2, 3, 4, 5]
    assert percentile_range(Histogram.of(values)) == 5


# --- mse and lp -------------------------------------------------------------------------------------------------------


def slow_error(values, clip, power=2.0):
    """Mean error to a power of INT8 against values in float64."""
    step = clip / LEVELS
    return float((np.abs(np.clip(np.rint(values / step), -LEVELS, LEVELS) * step - values) ** power).mean())


@pytest.mark.parametrize(("method", "power", "excess"), [(mse_range, 2.0, MSE_EXCESS), (lp_range, 2.4, LP_EXCESS)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_the_error_of_the_clip_is_that_of_the_best_candidate_on_the_values(shape, scale, method, power, excess):
    values = samples(shape, scale)
    clips = [float(np.abs(values).max()) * 2.0 ** (-k / CANDIDATES_PER_OCTAVE) for k in range(CANDIDATES)]
    errors = [slow_error(values.astype(np.float64), clip, power) for clip in clips]
    clip = method(Histogram.of(values))
    assert clip in clips
    assert errors[clips.index(clip)] <= min(errors) * (1 + excess)


@pytest.mark.parametrize("shape", SHAPES)
def test_lp_clips_at_most_as_much_as_mse(shape):
    histogram = Histogram.of(samples(shape))
    assert mse_range(histogram) <= lp_range(histogram) <= max_range(histogram)


def test_lp_clips_an_outlier_where_its_error_balances_that_of_all_others():
    """The derivatives of (x - c)**p and n (c / levels)**p / ((p + 1) 2**p) are equal at the best clip c."""
    count, outlier, power = 2**20, 60.0, 2.4
    values = np.append(np.resize(NORMAL, count), outlier).astype(np.float32)
    clips = np.linspace(1, outlier, 200_000)
    errors = (outlier - clips) ** power + count * (clips / LEVELS) ** power / ((power + 1) * 2**power)
    assert lp_range(Histogram.of(values)) == pytest.approx(clips[errors.argmin()], rel=1 / CANDIDATES_PER_OCTAVE)


def test_mse_clips_tails_and_does_not_clip_a_distribution_without_tails():
    """The best clip c for one outlier x of n values balances its error, (x - c)**2, and n rounding errors."""
    count, outlier = 2**20, 60.0
    rounding = count / 12 / LEVELS**2
    values = np.append(np.resize(NORMAL, count), outlier).astype(np.float32)
    assert mse_range(Histogram.of(values)) == pytest.approx(outlier / (1 + rounding), rel=1 / CANDIDATES_PER_OCTAVE)
    assert mse_range(Histogram.of(samples("uniform"))) > 0.95


def test_values_that_int8_represents_exactly_have_no_error():
    values = np.repeat(np.arange(-127, 128), 3).astype(np.float32)
    clip = mse_range(Histogram.of(values))
    assert clip == 127
    assert slow_error(values.astype(np.float64), clip) == 0


# --- entropy ----------------------------------------------------------------------------------------------------------


def slow_divergence(linear, kept):
    """Divergence of the first bins, with all others added to the last of them, from their 128 steps; bin by bin."""
    reference = [*linear[: kept - 1], sum(linear[kept - 1 :])]
    merged = [0.0] * kept
    steps = [[] for _ in range(LEVELS + 1)]
    for index in range(kept):
        steps[index * (LEVELS + 1) // kept].append(index)
    for members in steps:
        filled = [index for index in members if linear[index] > 0]
        for index in filled:
            merged[index] = sum(linear[i] for i in members) / len(filled)
    p, q = np.array(reference) / sum(reference), np.array(merged) / max(sum(merged), 1e-300)
    result = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        if a > 0:
            result += a * np.log(a / b) if b > 0 else a * np.log(1e9)
    return result


def slow_entropy(linear, largest, only):
    """The clip with the least divergence among these numbers of kept bins."""
    linear = [linear[1], *linear[1:]]
    return min(only, key=lambda kept: slow_divergence(linear, kept)) * largest / ENTROPY_BINS


def spread(histogram):
    """The counts in equal bins up to the largest value; each count is spread evenly over its own bin."""
    linear, width = [0.0] * ENTROPY_BINS, histogram.amax / ENTROPY_BINS
    for low, high, count in zip(*(column.tolist() for column in histogram.bins()), strict=True):
        if high == low:  # the largest value, on the lower edge of its bin
            linear[-1] += count
            continue
        for index in range(int(low / width), min(int(high / width) + 1, ENTROPY_BINS)):
            overlap = min(high, (index + 1) * width) - max(low, index * width)
            linear[index] += count * max(overlap, 0) / (high - low)
    return linear


EVERY_SEVENTH = range(LEVELS + 1, ENTROPY_BINS + 1, 7)


@pytest.mark.parametrize("shape", ["silu", "heavy"])
def test_the_entropy_clip_is_that_of_the_slow_definition(shape):
    histogram = Histogram.of(samples(shape))
    clip = entropy_range(histogram)
    kept = round(clip / histogram.amax * ENTROPY_BINS)
    assert clip == pytest.approx(kept * histogram.amax / ENTROPY_BINS, rel=1e-12)
    # All candidates would take a minute: try every seventh, and the neighbors of the result.
    near = range(max(kept - 3, LEVELS + 1), min(kept + 4, ENTROPY_BINS + 1))
    assert slow_entropy(spread(histogram), histogram.amax, [*EVERY_SEVENTH, *near]) == pytest.approx(clip, rel=1e-12)


@pytest.mark.parametrize("shape", ["silu", "heavy"])
def test_the_entropy_clip_is_near_that_of_the_values_themselves(shape):
    """A million values: with fewer, many bins have one value or none, and divergences are noise."""
    normal = np.random.default_rng(3).normal(size=1_000_000)
    made = normal / (1 + np.exp(-3 * normal)) if shape == "silu" else normal**3
    values = np.abs(made.astype(np.float32))
    largest = float(values.max())
    linear, _ = np.histogram(values, bins=ENTROPY_BINS, range=(0, largest))
    slow = slow_entropy(linear.tolist(), largest, EVERY_SEVENTH)
    assert entropy_range(Histogram.of(values)) == pytest.approx(slow, rel=ENTROPY_REL)


def test_entropy_clips_heavy_tails_and_hardly_other_values():
    heavy, flat = samples("heavy"), samples("uniform")
    assert entropy_range(Histogram.of(heavy)) < 0.5 * max_range(Histogram.of(heavy))
    assert entropy_range(Histogram.of(flat)) > 0.9 * max_range(Histogram.of(flat))


# --- all methods ------------------------------------------------------------------------------------------------------


def test_the_methods_are_those_of_the_option():
    assert tuple(METHODS) == INT8_METHODS


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None)
@given(shape=st.sampled_from(sorted(SHAPES)), exponent=st.integers(-60, 60))
def test_values_times_a_power_of_two_have_that_multiple_of_the_clip(method, shape, exponent):
    values = samples(shape)
    scaled = values * np.float32(2.0**exponent)
    assert choose_range(Histogram.of(scaled), method) == choose_range(Histogram.of(values), method) * 2.0**exponent


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None)
@given(shape=st.sampled_from(sorted(SHAPES)), signs=st.integers(0, 2**32 - 1))
def test_signs_do_not_matter(method, shape, signs):
    values = samples(shape)
    flipped = values * np.random.default_rng(signs).choice(np.array([-1, 1], np.float32), len(values))
    assert choose_range(Histogram.of(flipped), method) == choose_range(Histogram.of(values), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_clip_is_positive_and_at_most_the_largest_value(shape, method):
    histogram = Histogram.of(samples(shape))
    assert 0 < choose_range(histogram, method) <= histogram.amax
