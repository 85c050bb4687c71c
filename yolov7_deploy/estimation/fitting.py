"""Fit of the estimator's constants to published speeds, and its error on speeds that were held out.

The fit is Gauss-Newton with Levenberg's damping on logarithms, so that twice too fast costs as much as twice too slow.
Every constant has a wide prior, which only matters where the rows do not determine it (such as the launch time from
large networks alone). With TensorRT every device has a factor around 1 for what its data sheet does not contain, mainly
clocks under load.

The fitted constants and the errors are committed at the end of this module; a test repeats the fits.
`benchmarks/estimator_error.py` prints all rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from yolov7_deploy.estimation.devices import DEVICES
from yolov7_deploy.estimation.layer_work import compiled_kernels, eager_kernels
from yolov7_deploy.estimation.public_speeds import PublicSpeed
from yolov7_deploy.estimation.roofline import (
    ONE_TILE,
    TUNED_TILES,
    Constants,
    Demand,
    Floats,
    Structure,
    compute_demand,
    pass_ms,
)

# Standard deviations of the logarithms: of a published row from the model, of a constant from its initial value, and of
# a device from its data sheet.
ROW_SPREAD, CONSTANT_SPREAD, DEVICE_SPREAD = 0.1, 1.0, 0.3

# The paper's rows cannot separate the gap on the GPU from launches by the CPU; 2 us is usual.
INITIAL_CONSTANTS = {
    "torch": Constants(compute=0.5, compute_int8=0.5, memory=0.7, gap_us=2.0, launch_us=15.0),
    "tensorrt": Constants(compute=0.5, compute_int8=0.5, memory=0.7, gap_us=3.0, launch_us=0.0),
}
FITTED_FIELDS = {
    "torch": ("compute", "memory", "launch_us"),
    "tensorrt": ("compute", "compute_int8", "memory", "gap_us"),
}
# Candidates for PyTorch. The list was made with all seven rows of the paper known, so each split selects one by its
# fitted rows alone, and the reported error includes that selection.
CANDIDATES = tuple(
    Structure(tiles=tiles, layout_copies=layout_copies, cached=cached)
    for tiles in ((), ONE_TILE, TUNED_TILES)
    for layout_copies in (False, True)
    for cached in (False, True)
)
# An engine is tuned on its GPU and chooses its layouts. That it uses the cache was decided with all rows known (the RTX
# 4090 has a larger one), so the reported errors of TensorRT are slightly too low.
ENGINE = Structure(tiles=TUNED_TILES, layout_copies=False, cached=True)
_STEPS, _DIFFERENCE, _MAX_STEP = 60, 1e-4, 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Fitted constants, and factors by which a pass takes longer on a device than by its data sheet."""

    constants: Constants
    factors: Mapping[str, float]
    loss: float

    def ms(self, row: PublicSpeed, structure: Structure) -> float:
        """Return the estimated milliseconds of one pass."""
        return pass_ms(row_demand(row, structure), self.constants) * self.factors.get(row.device, 1.0)

    def error(self, row: PublicSpeed, structure: Structure) -> float:
        """Return the estimated images per second divided by the published ones, minus 1."""
        return row.ms / self.ms(row, structure) - 1


@lru_cache(maxsize=512)
def row_demand(row: PublicSpeed, structure: Structure) -> Demand:
    """Return the times of a row's kernels at the peaks of its device."""
    kernels = (eager_kernels if row.runtime == "torch" else compiled_kernels)(row.variant, row.input_hw)
    return compute_demand(kernels, DEVICES[row.device], structure, batch=row.batch, precision=row.precision)


def fit(rows: Sequence[PublicSpeed], structure: Structure) -> Fit:
    """Fit the constants to these rows, which are all of one runtime."""
    runtime = rows[0].runtime
    initial, names = INITIAL_CONSTANTS[runtime], FITTED_FIELDS[runtime]
    devices = sorted({row.device for row in rows}) if runtime == "tensorrt" else []
    start = np.log([getattr(initial, name) for name in names])

    def unpack(x: Floats) -> Fit:
        constants = replace(initial, **dict(zip(names, np.exp(x[: len(names)]).tolist(), strict=True)))
        factors = dict(zip(devices, np.exp(x[len(names) :]).tolist(), strict=True))
        return Fit(constants=constants, factors=factors, loss=0.0)

    def residuals(x: Floats) -> Floats:
        found = unpack(x)
        row_errors = [math.log(found.ms(row, structure) / row.ms) / ROW_SPREAD for row in rows]
        return np.array([*row_errors, *(x[: len(names)] - start) / CONSTANT_SPREAD, *x[len(names) :] / DEVICE_SPREAD])

    x = _least_squares(residuals, np.concatenate([start, np.zeros(len(devices))]))
    return replace(unpack(x), loss=float(np.sum(residuals(x) ** 2)))


def _least_squares(residuals: Callable[[Floats], Floats], x: Floats) -> Floats:
    """Return the minimum of the sum of squares, starting at x."""
    damping, current = 1.0, residuals(x)
    for _ in range(_STEPS):
        slopes = np.stack([(residuals(x + _DIFFERENCE * axis) - current) / _DIFFERENCE for axis in np.eye(len(x))], 1)
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ current)
        step = np.clip(step, -_MAX_STEP, _MAX_STEP)
        following = residuals(x + step)
        if following @ following < current @ current:
            x, current, damping = x + step, following, damping / 3
            if float(np.abs(step).max()) < 1e-6:
                break
        else:
            damping *= 4
    return x


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Signed errors on held-out rows: positive is estimated too fast."""

    rows: tuple[tuple[PublicSpeed, float], ...]

    @property
    def median(self) -> float:
        """Median of the absolute errors."""
        return float(np.median([abs(error) for _, error in self.rows]))

    @property
    def worst(self) -> float:
        """Largest absolute error."""
        return max(abs(error) for _, error in self.rows)


def score_held_out(fitted: Fit, rows: Sequence[PublicSpeed], structure: Structure) -> HeldOut:
    """Return the errors of a fit on held-out rows."""
    return HeldOut(rows=tuple((row, fitted.error(row, structure)) for row in rows))


def leave_groups_out(
    rows: Sequence[PublicSpeed], structures: Sequence[Structure], *, fitted: int
) -> tuple[HeldOut, dict[Structure, int]]:
    """Fit on every choice of `fitted` variants, and return the errors on the others with the count of each structure.

    Each split selects the structure by its fitted rows alone.
    """
    variants = list(dict.fromkeys(row.variant for row in rows))
    errors: list[tuple[PublicSpeed, float]] = []
    chosen = dict.fromkeys(structures, 0)
    for inside in itertools.combinations(variants, fitted):
        seen = [row for row in rows if row.variant in inside]
        best, structure = min(((fit(seen, s), s) for s in structures), key=lambda pair: pair[0].loss)
        chosen[structure] += 1
        errors += score_held_out(best, [row for row in rows if row.variant not in inside], structure).rows
    return HeldOut(rows=tuple(errors)), chosen


def leave_one_row_out(rows: Sequence[PublicSpeed], structure: Structure) -> HeldOut:
    """Return the error of each row for a fit on the other rows; only rows whose device has another one."""
    errors: list[tuple[PublicSpeed, float]] = []
    for row in rows:
        others = [other for other in rows if other is not row]
        if any(other.device == row.device for other in others):
            errors.append((row, fit(others, structure).error(row, structure)))
    return HeldOut(rows=tuple(errors))


def leave_one_device_out(rows: Sequence[PublicSpeed], structure: Structure) -> HeldOut:
    """Return the errors of each device for a fit on all others: what to expect of a device without published speeds."""
    errors: list[tuple[PublicSpeed, float]] = []
    for device in dict.fromkeys(row.device for row in rows):
        found = fit([row for row in rows if row.device != device], structure)
        errors += score_held_out(found, [row for row in rows if row.device == device], structure).rows
    return HeldOut(rows=tuple(errors))


# --- committed results -----------------------------------------------------------------------------------------------

# The smallest, the most popular and the largest of the paper's variants; the other four are held out.
FITTED_VARIANTS = ("yolov7-tiny-silu", "yolov7", "yolov7-e6e")

STRUCTURES = {"torch": Structure(tiles=ONE_TILE, layout_copies=True, cached=False), "tensorrt": ENGINE}

FITTED = {
    "torch": Fit(
        constants=Constants(compute=0.6546, compute_int8=0.5, memory=0.5670, gap_us=2.0, launch_us=19.84),
        factors={},
        loss=1.525,
    ),
    "tensorrt": Fit(
        constants=Constants(compute=0.5554, compute_int8=0.4029, memory=0.3849, gap_us=6.887, launch_us=0.0),
        factors={"agx-orin": 0.9048, "orin-nx": 1.461, "rtx-3090": 1.030, "rtx-4090": 0.6326, "t4": 1.333},
        loss=22.67,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorSummary:
    """Absolute errors of images per second on held-out rows: 0.05 is 5 %."""

    median: float
    worst: float
    rows: int


# PyTorch on a V100, by batch: the four held-out variants, and all 35 ways to fit on three of seven.
V100_BATCH1, V100_BATCH1_SPLITS = (
    ErrorSummary(median=0.0156, worst=0.0241, rows=4),
    ErrorSummary(median=0.031, worst=0.328, rows=140),
)
V100_BATCH32, V100_BATCH32_SPLITS = (
    ErrorSummary(median=0.0474, worst=0.0681, rows=4),
    ErrorSummary(median=0.0532, worst=0.226, rows=140),
)
# PyTorch on the only other GPU with published speeds.
TORCH_T4 = ErrorSummary(median=0.126, worst=0.218, rows=3)
# TensorRT: one row held out at a time, by device; then one device at a time.
TENSORRT_ROWS = {
    "t4": ErrorSummary(median=0.0534, worst=0.343, rows=10),
    "agx-orin": ErrorSummary(median=0.0786, worst=0.181, rows=4),
    "rtx-3090": ErrorSummary(median=0.505, worst=0.649, rows=2),
    "rtx-4090": ErrorSummary(median=0.127, worst=0.177, rows=2),
}
TENSORRT_DEVICES = ErrorSummary(median=0.302, worst=0.808, rows=19)
