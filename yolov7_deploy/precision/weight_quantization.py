"""Weights of convolutions as INT8: a scale for each output channel, and biases that make up for rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolov7_deploy.precision.histogram import LEVELS

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RoundedWeight:
    """int8 [O, ...] and the float32 scale of each output channel [O]."""

    values: npt.NDArray[np.int8]
    scales: FloatArray

    @property
    def floats(self) -> FloatArray:
        """What they stand for."""
        floats: FloatArray = self.values * _as_columns(self.scales, self.values.ndim)
        return floats


def round_weight(weight: FloatArray) -> RoundedWeight:
    """The nearest INT8 weights, with the largest of each output channel at the end of the range.

    Clipping it for a smaller squared error was tried and gains nothing (`benchmarks/README.md`).

    Args:
        weight: [O, I, ...].
    """
    reach: FloatArray = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scales: FloatArray = np.where(reach > 0, reach, np.float32(1)) / np.float32(LEVELS)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    steps = np.rint(weight / _as_columns(scales, weight.ndim))
    return RoundedWeight(np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scales)


def shifted_by_rounding(weight: FloatArray, rounded: RoundedWeight, means: DoubleArray) -> FloatArray:
    """What rounding takes from the mean of each output channel [O], to be added to the bias.

    The mean result of a convolution is the sum of its weights times the mean of their input channel (Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2), but for the border.

    Args:
        weight: [O, I / groups, ...].
        rounded: Of it.
        means: Of the input channels [I].
    """
    lost = (weight - rounded.floats).reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)
    groups = len(means) // weight.shape[1]
    inputs = means.reshape(groups, weight.shape[1])
    shift: DoubleArray = np.einsum("goi,gi->go", lost.reshape(groups, -1, weight.shape[1]), inputs)
    return shift.reshape(-1).astype(np.float32)


def _as_columns(scales: FloatArray, ndim: int) -> FloatArray:
    return scales.reshape(-1, *[1] * (ndim - 1))
