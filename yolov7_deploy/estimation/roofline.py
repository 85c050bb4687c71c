"""A roofline with the three things that keep a GPU below it: waves of tiles, a cache, and the time of a launch.

A kernel computes for c seconds and moves memory for m seconds, both at the device's peaks:

    c = 2 * tile_rows * tile_columns * depth * multiprocessors * waves / peak,  waves = ceil(tiles / multiprocessors)
    m = bytes / bandwidth

A convolution is a matrix product cut into tiles, one to a multiprocessor at a time. Unless tiles fill whole waves, part
of the GPU waits: this is why a batch of one image is slow even where the GPU has all the work it wants. A kernel
takes max(c / compute, m / memory) + gap, where `compute` and `memory` are the shares of the peaks that are reached.

Eager PyTorch has the processor hand over one operator after the other, `launch` apart, and the GPU works them off in
order. The end is the latest of "handed over, then all that follows": max over k of (k * launch + sum of t_i, i >= k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolov7_deploy.estimation.devices import Device
from yolov7_deploy.estimation.layer_work import Kernel

Floats = npt.NDArray[np.float64]

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
# Second-level cache against memory. Jia et al., arXiv 1804.06826: 2155 against 750 GB/s measured on a V100.
CACHE_SPEED = 3.0
# What a library can choose from: rows (cells of the output map) by columns (filters) of the product.
ONE_TILE = ((128, 128),)
TUNED_TILES = ((256, 128), (256, 64), (128, 128), (128, 64), (64, 128), (64, 64))
# A convolution's maps are read and written once more on both sides to change their layout (tensor cores want the
# channels last, PyTorch's default has them first): three times the traffic.
LAYOUT_TRAFFIC = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """How a runtime uses a GPU; chosen, not fitted.

    Attributes:
        tiles: Shapes a convolution can be cut into; the best one is taken. None: it fills the GPU without rest.
        layout_copies: Half-precision convolutions change the layout of their maps on the way.
        cached: What a kernel moves comes from the cache where all of it fits.
    """

    tiles: tuple[tuple[int, int], ...]
    layout_copies: bool
    cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """The few numbers that are fitted.

    Attributes:
        compute: Share of the peak that full waves reach, FP16 and FP32.
        compute_int8: The same for INT8.
        memory: Share of the bandwidth.
        gap_us: Between two kernels on the GPU.
        launch_us: Of the processor, for one operator; 0 where an engine or a graph is launched as a whole.
    """

    compute: float
    compute_int8: float
    memory: float
    gap_us: float
    launch_us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Seconds at the device's peaks, one element for each kernel."""

    compute_s: Floats
    memory_s: Floats
    is_int8: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Where the time goes; the three arrays have one element for each kernel and add up to the whole.

    Attributes:
        compute_s: Of kernels bound by arithmetic.
        memory_s: Of kernels bound by memory.
        launch_s: Gaps, and waiting for the processor.
    """

    compute_s: Floats
    memory_s: Floats
    launch_s: Floats

    @property
    def by_kernel_s(self) -> Floats:
        """Seconds of every kernel."""
        return self.compute_s + self.memory_s + self.launch_s

    @property
    def ms(self) -> float:
        """Milliseconds of one pass."""
        return float(self.by_kernel_s.sum()) * 1e3

    def scaled(self, factor: float) -> Timeline:
        """All of it that many times as long."""
        return Timeline(
            compute_s=self.compute_s * factor, memory_s=self.memory_s * factor, launch_s=self.launch_s * factor
        )


def peak(device: Device, precision: str) -> float | None:
    """Operations per second of this precision; `None` where the device has no public figure for it.

    FP32 means TF32 where the GPU has it, as both runtimes do by default.
    """
    tera = {
        "fp32": device.tf32_tflops or device.fp32_tflops,
        "fp16": device.fp16_tflops,
        "int8": device.int8_tops,
    }[precision]
    return None if tera is None else tera * 1e12


def demand(kernels: Sequence[Kernel], device: Device, structure: Structure, *, batch: int, precision: str) -> Demand:
    """What the kernels take at the device's peaks for a batch of images."""
    operations = peak(device, precision)
    assert operations is not None, f"{device.name} has no {precision} peak"
    pixels, filters, depth, flops, weights, moved = (
        np.array(column, np.float64)
        for column in zip(
            *((k.pixels, k.filters, k.depth, k.flops, k.weights, k.read + k.written) for k in kernels), strict=True
        )
    )
    work = flops * batch
    if structure.tiles:
        work = np.min([_tiled(pixels * batch, filters, depth, tile, device) for tile in structure.tiles], axis=0)
    traffic = moved * batch * BYTES[precision]
    weight_bytes = weights * BYTES[precision]
    if structure.cached:
        traffic = np.where(traffic + weight_bytes <= device.l2_mb * 1e6, traffic / CACHE_SPEED, traffic)
    if structure.layout_copies and precision == "fp16":
        traffic = np.where(depth > 0, traffic * LAYOUT_TRAFFIC, traffic)
    return Demand(
        compute_s=work / operations,
        memory_s=(traffic + weight_bytes) / (device.gb_per_s * 1e9),
        is_int8=precision == "int8",
    )


def _tiled(pixels: Floats, filters: Floats, depth: Floats, tile: tuple[int, int], device: Device) -> Floats:
    """Operations that whole waves of such tiles amount to, the idle multiprocessors of the last wave included."""
    rows, columns = tile
    tiles = np.ceil(pixels / rows) * np.ceil(filters / columns)
    waves = np.ceil(tiles / device.multiprocessors)
    return waves * device.multiprocessors * 2.0 * rows * columns * depth


def pass_ms(asked: Demand, constants: Constants) -> float:
    """Milliseconds of one pass."""
    return float(_ends(*_busy(asked, constants), constants).max()) * 1e3


def timeline(asked: Demand, constants: Constants) -> Timeline:
    """Where the milliseconds of one pass go."""
    compute, memory = _busy(asked, constants)
    # The last kernel that waits for the processor; from there on the GPU has always something to do.
    last = int(np.argmax(_ends(compute, memory, constants)))
    at = np.arange(len(compute))
    behind = at >= last
    return Timeline(
        compute_s=np.where(behind & (compute >= memory), compute, 0.0),
        memory_s=np.where(behind & (compute < memory), memory, 0.0),
        launch_s=1e-6 * (np.where(behind, constants.gap_us, 0.0) + np.where(at <= last, constants.launch_us, 0.0)),
    )


def _busy(asked: Demand, constants: Constants) -> tuple[Floats, Floats]:
    """Seconds that arithmetic and memory keep the GPU busy with each kernel."""
    share = constants.compute_int8 if asked.is_int8 else constants.compute
    return asked.compute_s / share, asked.memory_s / constants.memory


def _ends(compute: Floats, memory: Floats, constants: Constants) -> Floats:
    """When the pass would end if each kernel were the last to wait for the processor."""
    busy = np.maximum(compute, memory) + constants.gap_us * 1e-6
    remaining: Floats = np.cumsum(busy[::-1])[::-1]
    return remaining + constants.launch_us * 1e-6 * np.arange(1, len(busy) + 1)
