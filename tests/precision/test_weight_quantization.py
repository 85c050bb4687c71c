"""INT8 weights against rounding by the definition, and corrected biases against the means of real convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from yolov7_deploy.precision.histogram import LEVELS
from yolov7_deploy.precision.weight_quantization import RoundedWeight, round_weight, shifted_by_rounding

# Of a step: weights are divided and multiplied in float32, whose error at 127 steps is 127 * 2**-23.
HALF_STEP = 0.5 + 2e-5
# Of the largest shift: it is rounded to float32 once, and is a difference of weights in float32.
SHIFT_REL = 1e-6
TINY = np.finfo(np.float32).tiny


def weights(shape, seed=0):
    """Each output channel of another size."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-6, 3, shape[0])
    return (rng.normal(size=shape) * sizes.reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)


SHAPES = [(16, 8, 3, 3), (5, 1, 3, 3), (7, 3, 1, 1), (1, 1, 1, 1), (4, 6, 5), (3, 2, 3, 3, 3)]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_is_within_half_a_step_of_its_channel(shape):
    weight = weights(shape)
    rounded = round_weight(weight)
    assert rounded.values.dtype == np.int8 and rounded.values.shape == shape
    assert rounded.scales.dtype == np.float32 and rounded.scales.shape == shape[:1]
    for channel in range(shape[0]):
        step = float(rounded.scales[channel])
        assert step == pytest.approx(np.abs(weight[channel]).max() / LEVELS, rel=1e-6)
        found = rounded.values[channel].astype(np.float64) * step
        assert np.abs(found - weight[channel]).max() <= HALF_STEP * step


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_of_each_channel_is_at_the_end_of_the_range_which_is_symmetric(shape):
    weight = weights(shape)
    values = round_weight(weight).values.reshape(shape[0], -1).astype(int)
    assert (np.abs(values).max(axis=1) == LEVELS).all()
    largest = np.abs(weight.reshape(shape[0], -1)).argmax(axis=1)
    assert (np.abs(values[np.arange(shape[0]), largest]) == LEVELS).all()


@given(st.integers(-40, 40), st.integers(0, 15), st.integers(0, 100))
def test_a_channel_times_a_power_of_two_changes_its_own_scale_and_no_value(exponent, channel, seed):
    weight = weights((16, 2, 3, 3), seed)
    scaled = weight.copy()
    scaled[channel] *= np.float32(2.0**exponent)
    ours, other = round_weight(weight), round_weight(scaled)
    np.testing.assert_array_equal(ours.values, other.values)
    factors = np.ones(16)
    factors[channel] = 2.0**exponent
    np.testing.assert_array_equal(ours.scales * factors, other.scales)


@given(st.lists(st.integers(-LEVELS, LEVELS), min_size=3, max_size=30), st.integers(-30, 30))
def test_weights_that_are_whole_steps_come_back_to_the_last_bit(steps, exponent):
    weight = np.array([[*steps, LEVELS]], np.float32) * np.float32(2.0**exponent)
    rounded = round_weight(weight)
    np.testing.assert_array_equal(rounded.floats, weight)
    assert rounded.values[0].tolist() == [*steps, LEVELS]


def test_a_channel_of_zeros_stays_zero_and_has_an_ordinary_scale():
    """A faint one might be flushed to zero, and then divide."""
    weight = weights((3, 2, 3, 3))
    weight[1] = 0
    rounded = round_weight(weight)
    assert not rounded.values[1].any() and not rounded.floats[1].any()
    assert rounded.scales[1] == np.float32(1 / LEVELS)
    np.testing.assert_array_equal(round_weight(weight[[0, 2]]).scales, rounded.scales[[0, 2]])


def test_channels_too_faint_for_a_normal_scale_are_rounded_to_the_smallest_normal_one():
    weight = np.array([[1e-42, -1e-44], [TINY, 0], [130 * TINY, TINY]], np.float32)
    rounded = round_weight(weight)
    assert (rounded.scales >= TINY).all()
    error = np.abs(rounded.values * rounded.scales[:, None].astype(np.float64) - weight)
    assert (error <= HALF_STEP * rounded.scales[:, None]).all()


@given(st.integers(0, 1000))
def test_what_the_values_stand_for_is_each_times_the_scale_of_its_channel(seed):
    rounded = round_weight(weights((4, 3, 3, 3), seed))
    for channel in range(4):
        expected = rounded.values[channel].astype(np.float32) * rounded.scales[channel]
        np.testing.assert_array_equal(rounded.floats[channel], expected)
    assert rounded.floats.dtype == np.float32


def test_the_weights_are_left_as_they_were():
    weight = weights((4, 3, 3, 3))
    before = weight.copy()
    shifted_by_rounding(weight, round_weight(weight), np.ones(3))
    np.testing.assert_array_equal(weight, before)


# --- biases -----------------------------------------------------------------------------------------------------------


def around(images, kernel):
    """Images continued at their other side, so that a convolution sees every pixel at every place of its kernel."""
    border = kernel // 2
    return np.pad(images, [(0, 0), (0, 0), (border, border), (border, border)], mode="wrap")


def mean_result(images, weight, groups):
    """Mean of each output channel in float64."""
    made = F.conv2d(
        torch.from_numpy(around(images, weight.shape[-1])), torch.from_numpy(weight.astype(np.float64)), groups=groups
    )
    return made.mean(dim=(0, 2, 3)).numpy()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(8, 6, 1), (8, 6, 2), (6, 6, 6), (12, 6, 6), (9, 3, 3), (1, 1, 1)]),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 1000),
)
def test_the_corrected_mean_of_every_channel_is_that_of_float(channels, kernel, seed):
    c_out, c_in, groups = channels
    rng = np.random.default_rng(seed)
    weight = weights((c_out, c_in // groups, kernel, kernel), seed)
    images = rng.normal(size=(3, c_in, 8, 9)) + rng.uniform(-2, 5, (c_in, 1, 1))
    rounded = round_weight(weight)
    shift = shifted_by_rounding(weight, rounded, images.mean(axis=(0, 2, 3)))
    assert shift.dtype == np.float32 and shift.shape == (c_out,)
    expected = mean_result(images, weight, groups)
    ours = mean_result(images, rounded.floats, groups)
    steps = rounded.scales * np.abs(images).mean() * kernel**2 * c_in  # what each channel may lose
    assert (np.abs(ours + shift - expected) <= SHIFT_REL * steps).all()


def test_without_the_correction_the_mean_is_another():
    weight = weights((8, 6, 3, 3))
    images = np.random.default_rng(0).normal(size=(3, 6, 8, 8)) + 3
    rounded = round_weight(weight)
    lost = np.abs(mean_result(images, rounded.floats, 1) - mean_result(images, weight, 1))
    assert (lost > 1000 * SHIFT_REL * rounded.scales).all()


def test_the_shift_is_what_each_weight_loses_times_the_mean_of_what_it_multiplies():
    weight, means = weights((4, 3, 2, 2)), np.array([0.5, -2.0, 7.0, 1e-3, 3.0, -4.0])
    rounded = round_weight(weight)
    expected = np.zeros(4)
    for output, (i, y, x) in ((o, place) for o in range(4) for place in np.ndindex(3, 2, 2)):
        group = output // 2  # two groups of two results and three inputs
        lost = float(weight[output, i, y, x]) - float(rounded.floats[output, i, y, x])
        expected[output] += lost * means[3 * group + i]
    np.testing.assert_allclose(shifted_by_rounding(weight, rounded, means), expected, rtol=1e-5)


def test_where_rounding_is_exact_nothing_is_shifted():
    steps = np.random.default_rng(0).integers(-LEVELS, LEVELS + 1, (5, 4, 3, 3))
    steps[:, 0, 0, 0] = LEVELS
    weight = steps.astype(np.float32) / 128
    means = np.array([1e6, -3.0, 0.1, 7.0])
    assert not shifted_by_rounding(weight, round_weight(weight), means).any()


def test_means_of_zero_shift_nothing():
    weight = weights((5, 4, 3, 3))
    assert not shifted_by_rounding(weight, round_weight(weight), np.zeros(4)).any()


def test_other_weights_than_the_nearest_are_made_up_for_as_well():
    """The correction takes what it is given: weights a whole step too low lose a step."""
    weight = np.full((2, 3, 1, 1), 127, np.float32)
    lower = RoundedWeight(np.full((2, 3, 1, 1), 126, np.int8), np.ones(2, np.float32))
    np.testing.assert_array_equal(shifted_by_rounding(weight, lower, np.array([1.0, 2.0, 4.0])), [7, 7])
