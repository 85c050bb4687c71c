"""INT8 weights against rounding by definition, and corrected biases against the means of real convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from yolov7_deploy.precision.histogram import LEVELS
from yolov7_deploy.precision.int8 import QuantizedWeight, bias_correction, quantize_weight

# In steps: weights are divided and multiplied in float32, whose error at 127 steps is 127 * 2**-23.
HALF_STEP = 0.5 + 2e-5
# Relative to the largest shift: it is rounded to float32 once, and is a difference of float32 weights.
SHIFT_REL = 1e-6
TINY = np.finfo(np.float32).tiny


def weights(shape, seed=0):
    """Random weights; each output channel has another magnitude."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-6, 3, shape[0])
    return (rng.normal(size=shape) * sizes.reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)


SHAPES = [(16, 8, 3, 3), (5, 1, 3, 3), (7, 3, 1, 1), (1, 1, 1, 1), (4, 6, 5), (3, 2, 3, 3, 3)]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_is_within_half_a_step_of_its_channel(shape):
    weight = weights(shape)
    quantized = quantize_weight(weight)
    assert quantized.values.dtype == np.int8 and quantized.values.shape == shape
    assert quantized.scales.dtype == np.float32 and quantized.scales.shape == shape[:1]
    for channel in range(shape[0]):
        step = float(quantized.scales[channel])
        assert step == pytest.approx(np.abs(weight[channel]).max() / LEVELS, rel=1e-6)
        found = quantized.values[channel].astype(np.float64) * step
        assert np.abs(found - weight[channel]).max() <= HALF_STEP * step


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_weight_of_each_channel_is_at_the_end_of_the_symmetric_range(shape):
    weight = weights(shape)
    values = quantize_weight(weight).values.reshape(shape[0], -1).astype(int)
    assert (np.abs(values).max(axis=1) == LEVELS).all()
    largest = np.abs(weight.reshape(shape[0], -1)).argmax(axis=1)
    assert (np.abs(values[np.arange(shape[0]), largest]) == LEVELS).all()


@given(st.integers(-40, 40), st.integers(0, 15), st.integers(0, 100))
def test_a_channel_times_a_power_of_two_changes_only_its_own_scale(exponent, channel, seed):
    weight = weights((16, 2, 3, 3), seed)
    scaled = weight.copy()
    scaled[channel] *= np.float32(2.0**exponent)
    before, after = quantize_weight(weight), quantize_weight(scaled)
    np.testing.assert_array_equal(before.values, after.values)
    factors = np.ones(16)
    factors[channel] = 2.0**exponent
    np.testing.assert_array_equal(before.scales * factors, after.scales)


@given(st.lists(st.integers(-LEVELS, LEVELS), min_size=3, max_size=30), st.integers(-30, 30))
def test_weights_that_are_multiples_of_a_step_are_restored_to_the_last_bit(steps, exponent):
    weight = np.array([[*steps, LEVELS]], np.float32) * np.float32(2.0**exponent)
    quantized = quantize_weight(weight)
    np.testing.assert_array_equal(quantized.dequantized, weight)
    assert quantized.values[0].tolist() == [*steps, LEVELS]


def test_a_channel_of_zeros_stays_zero_and_has_an_ordinary_scale():
    """A subnormal scale might be flushed to zero, and dividing by it would give NaN."""
    weight = weights((3, 2, 3, 3))
    weight[1] = 0
    quantized = quantize_weight(weight)
    assert not quantized.values[1].any() and not quantized.dequantized[1].any()
    assert quantized.scales[1] == np.float32(1 / LEVELS)
    np.testing.assert_array_equal(quantize_weight(weight[[0, 2]]).scales, quantized.scales[[0, 2]])


def test_channels_too_small_for_a_normal_scale_have_the_smallest_normal_one():
    weight = np.array([[1e-42, -1e-44], [TINY, 0], [130 * TINY, TINY]], np.float32)
    quantized = quantize_weight(weight)
    assert (quantized.scales >= TINY).all()
    error = np.abs(quantized.values * quantized.scales[:, None].astype(np.float64) - weight)
    assert (error <= HALF_STEP * quantized.scales[:, None]).all()


@given(st.integers(0, 1000))
def test_dequantized_weights_are_values_times_the_scale_of_their_channel(seed):
    quantized = quantize_weight(weights((4, 3, 3, 3), seed))
    for channel in range(4):
        expected = quantized.values[channel].astype(np.float32) * quantized.scales[channel]
        np.testing.assert_array_equal(quantized.dequantized[channel], expected)
    assert quantized.dequantized.dtype == np.float32


def test_the_weights_are_not_modified():
    weight = weights((4, 3, 3, 3))
    before = weight.copy()
    bias_correction(weight, quantize_weight(weight), np.ones(3))
    np.testing.assert_array_equal(weight, before)


# --- biases -----------------------------------------------------------------------------------------------------------


def wrap(images, kernel):
    """Pad images periodically, so that every weight of a kernel sees every pixel."""
    border = kernel // 2
    return np.pad(images, [(0, 0), (0, 0), (border, border), (border, border)], mode="wrap")


def mean_result(images, weight, groups):
    """Mean of each output channel in float64."""
    made = F.conv2d(
        torch.from_numpy(wrap(images, weight.shape[-1])), torch.from_numpy(weight.astype(np.float64)), groups=groups
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
    quantized = quantize_weight(weight)
    shift = bias_correction(weight, quantized, images.mean(axis=(0, 2, 3)))
    assert shift.dtype == np.float32 and shift.shape == (c_out,)
    expected = mean_result(images, weight, groups)
    actual = mean_result(images, quantized.dequantized, groups)
    steps = quantized.scales * np.abs(images).mean() * kernel**2 * c_in  # largest error of each channel
    assert (np.abs(actual + shift - expected) <= SHIFT_REL * steps).all()


def test_without_the_correction_the_mean_is_wrong():
    weight = weights((8, 6, 3, 3))
    images = np.random.default_rng(0).normal(size=(3, 6, 8, 8)) + 3
    quantized = quantize_weight(weight)
    error = np.abs(mean_result(images, quantized.dequantized, 1) - mean_result(images, weight, 1))
    assert (error > 1000 * SHIFT_REL * quantized.scales).all()


def test_the_correction_is_the_rounding_error_of_each_weight_times_the_mean_of_its_input():
    weight, means = weights((4, 3, 2, 2)), np.array([0.5, -2.0, 7.0, 1e-3, 3.0, -4.0])
    quantized = quantize_weight(weight)
    expected = np.zeros(4)
    for output, (i, y, x) in ((o, index) for o in range(4) for index in np.ndindex(3, 2, 2)):
        group = output // 2  # two groups of two outputs and three inputs
        error = float(weight[output, i, y, x]) - float(quantized.dequantized[output, i, y, x])
        expected[output] += error * means[3 * group + i]
    np.testing.assert_allclose(bias_correction(weight, quantized, means), expected, rtol=1e-5)


def test_exact_rounding_needs_no_correction():
    steps = np.random.default_rng(0).integers(-LEVELS, LEVELS + 1, (5, 4, 3, 3))
    steps[:, 0, 0, 0] = LEVELS
    weight = steps.astype(np.float32) / 128
    means = np.array([1e6, -3.0, 0.1, 7.0])
    assert not bias_correction(weight, quantize_weight(weight), means).any()


def test_means_of_zero_need_no_correction():
    weight = weights((5, 4, 3, 3))
    assert not bias_correction(weight, quantize_weight(weight), np.zeros(4)).any()


def test_the_correction_works_for_any_quantized_weights():
    """Not only for the nearest ones: weights that are a whole step too low are corrected by a step."""
    weight = np.full((2, 3, 1, 1), 127, np.float32)
    lower = QuantizedWeight(np.full((2, 3, 1, 1), 126, np.int8), np.ones(2, np.float32))
    np.testing.assert_array_equal(bias_correction(weight, lower, np.array([1.0, 2.0, 4.0])), [7, 7])
