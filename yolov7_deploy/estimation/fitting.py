"""Fits the estimator's constants on published speeds, and judges it by those it was not fitted on.

Gauss-Newton with Levenberg's damping on logarithms, so that a factor of two too fast costs as much as one too slow.
Every constant has a wide prior, which only matters where the rows do not tell (what a launch costs, say, from large
networks alone), and with TensorRT every device a factor of its own, around 1, that takes what its data sheet leaves
out: clocks under load, most of all.
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
    demand,
    pass_ms,
)

ROW_SPREAD = 0.1  # how far a published row is believed to be from the model, as a logarithm
CONSTANT_SPREAD = 1.0  # how far a constant may be from where the fit begins
DEVICE_SPREAD = 0.3  # how far devices are believed to be from their data sheets

# The GPU's own gap cannot be told from the processor's launches by the paper's rows; 2 us is usual.
BEGIN = {
    "torch": Constants(compute=0.5, compute_int8=0.5, memory=0.7, gap_us=2.0, launch_us=15.0),
    "tensorrt": Constants(compute=0.5, compute_int8=0.5, memory=0.7, gap_us=3.0, launch_us=0.0),
}
FREE = {
    "torch": ("compute", "memory", "launch_us"),
    "tensorrt": ("compute", "compute_int8", "memory", "gap_us"),
}
# What PyTorch's kernels could be like. The list was made with all seven rows of the paper in sight, so which of them is
# taken is decided by the fitted rows alone, in every split anew; that choice is part of the error that is told.
CANDIDATES = tuple(
    Structure(tiles=tiles, layout_copies=layout_copies, cached=cached)
    for tiles in ((), ONE_TILE, TUNED_TILES)
    for layout_copies in (False, True)
    for cached in (False, True)
)
# An engine is tuned on its GPU and lays out its maps as it likes. That the cache counts was settled with all rows in
# sight (it is what the RTX 4090 has more of), so errors of TensorRT are told a little too low.
ENGINE = Structure(tiles=TUNED_TILES, layout_copies=False, cached=True)
_STEPS, _DIFFERENCE, _LONGEST = 60, 1e-4, 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants and, by device, how much longer than by its data sheet a pass takes there."""

    constants: Constants
    factors: Mapping[str, float]
    loss: float

    def ms(self, row: PublicSpeed, structure: Structure) -> float:
        """Milliseconds of one pass."""
        return pass_ms(asked_of(row, structure), self.constants) * self.factors.get(row.device, 1.0)

    def error(self, row: PublicSpeed, structure: Structure) -> float:
        """Frames per second estimated over those published, minus 1."""
        return row.ms / self.ms(row, structure) - 1


@lru_cache(maxsize=512)
def asked_of(row: PublicSpeed, structure: Structure) -> Demand:
    """What a row's network takes at the peaks of its device."""
    kernels = (eager_kernels if row.runtime == "torch" else compiled_kernels)(row.variant, row.input_hw)
    return demand(kernels, DEVICES[row.device], structure, batch=row.batch, precision=row.precision)


def fit(rows: Sequence[PublicSpeed], structure: Structure) -> Fit:
    """The constants that explain these rows, all of one runtime."""
    runtime = rows[0].runtime
    begin, names = BEGIN[runtime], FREE[runtime]
    devices = sorted({row.device for row in rows}) if runtime == "tensorrt" else []
    start = np.log([getattr(begin, name) for name in names])

    def unpack(x: Floats) -> Fit:
        constants = replace(begin, **dict(zip(names, np.exp(x[: len(names)]).tolist(), strict=True)))
        factors = dict(zip(devices, np.exp(x[len(names) :]).tolist(), strict=True))
        return Fit(constants=constants, factors=factors, loss=0.0)

    def residuals(x: Floats) -> Floats:
        found = unpack(x)
        rows_off = [math.log(found.ms(row, structure) / row.ms) / ROW_SPREAD for row in rows]
        return np.array([*rows_off, *(x[: len(names)] - start) / CONSTANT_SPREAD, *x[len(names) :] / DEVICE_SPREAD])

    x = _least_squares(residuals, np.concatenate([start, np.zeros(len(devices))]))
    return replace(unpack(x), loss=float(np.sum(residuals(x) ** 2)))


def _least_squares(residuals: Callable[[Floats], Floats], x: Floats) -> Floats:
    """Where the sum of squares is smallest, from x on downhill."""
    damping, at = 1.0, residuals(x)
    for _ in range(_STEPS):
        slopes = np.stack([(residuals(x + _DIFFERENCE * axis) - at) / _DIFFERENCE for axis in np.eye(len(x))], 1)
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ at)
        step = np.clip(step, -_LONGEST, _LONGEST)
        there = residuals(x + step)
        if there @ there < at @ at:
            x, at, damping = x + step, there, damping / 3
            if float(np.abs(step).max()) < 1e-6:
                break
        else:
            damping *= 4
    return x


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Errors on rows that a fit had not seen, with the sign: positive is estimated too fast."""

    rows: tuple[tuple[PublicSpeed, float], ...]

    @property
    def median(self) -> float:
        """Of the absolute errors."""
        return float(np.median([abs(error) for _, error in self.rows]))

    @property
    def worst(self) -> float:
        """Of the absolute errors."""
        return max(abs(error) for _, error in self.rows)


def score_held_out(fitted: Fit, rows: Sequence[PublicSpeed], structure: Structure) -> HeldOut:
    """Errors of one fit on rows it has not seen."""
    return HeldOut(rows=tuple((row, fitted.error(row, structure)) for row in rows))


def leave_groups_out(
    rows: Sequence[PublicSpeed], structures: Sequence[Structure], *, fitted: int
) -> tuple[HeldOut, dict[Structure, int]]:
    """Every way of fitting on `fitted` variants and judging by the others, and how often each structure was chosen.

    The structure is chosen anew each time, by the rows that are fitted on alone.
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
    """Every row judged by a fit on the others; only rows whose device has another one."""
    errors: list[tuple[PublicSpeed, float]] = []
    for row in rows:
        others = [other for other in rows if other is not row]
        if any(other.device == row.device for other in others):
            errors.append((row, fit(others, structure).error(row, structure)))
    return HeldOut(rows=tuple(errors))


def leave_one_device_out(rows: Sequence[PublicSpeed], structure: Structure) -> HeldOut:
    """Every device judged by a fit on the rows of all others: what a device without a public figure is to expect."""
    errors: list[tuple[PublicSpeed, float]] = []
    for device in dict.fromkeys(row.device for row in rows):
        found = fit([row for row in rows if row.device != device], structure)
        errors += score_held_out(found, [row for row in rows if row.device == device], structure).rows
    return HeldOut(rows=tuple(errors))
