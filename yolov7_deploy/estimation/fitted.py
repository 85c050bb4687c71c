"""The estimator's constants and its errors as data; a test fits and judges them again.

`benchmarks/estimator_error.py` prints where they come from, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

from yolov7_deploy.estimation.fitting import ENGINE, Fit
from yolov7_deploy.estimation.roofline import ONE_TILE, Constants, Structure

# The smallest, the one most used, and the largest of the paper's rows; the other four judge.
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
class Judged:
    """Absolute errors of images per second on rows that the fit had not seen: 0.05 is 5 %."""

    median: float
    worst: float
    rows: int


# PyTorch on a V100, by batch: the four variants that are not fitted on, and all 35 ways to fit on three of seven.
V100_BATCH1, V100_BATCH1_SPLITS = (
    Judged(median=0.0156, worst=0.0241, rows=4),
    Judged(median=0.031, worst=0.328, rows=140),
)
V100_BATCH32, V100_BATCH32_SPLITS = (
    Judged(median=0.0474, worst=0.0681, rows=4),
    Judged(median=0.0532, worst=0.226, rows=140),
)
# PyTorch on the one other GPU that somebody has published figures of.
TORCH_T4 = Judged(median=0.126, worst=0.218, rows=3)
# TensorRT: one row left out at a time, by its device; then a whole device at a time.
TENSORRT_ROWS = {
    "t4": Judged(median=0.0534, worst=0.343, rows=10),
    "agx-orin": Judged(median=0.0786, worst=0.181, rows=4),
    "rtx-3090": Judged(median=0.505, worst=0.649, rows=2),
    "rtx-4090": Judged(median=0.127, worst=0.177, rows=2),
}
TENSORRT_DEVICES = Judged(median=0.302, worst=0.808, rows=19)
