"""A roofline model with three additions: waves of tiles, a cache, and launch time.

At the peaks of the device, a kernel computes for c seconds and moves memory for m seconds:

    c = 2 * tile_rows * tile_columns * depth * multiprocessors * waves / peak,  waves = ceil(tiles / multiprocessors)
    m = bytes / bandwidth

A convolution is a matrix product that is divided into tiles; each multiprocessor computes one tile at a time. Part of
the GPU is idle in the last wave of tiles, which is why a batch of one image is slow even for a large network. A kernel
takes max(c / compute, m / memory) + gap, where `compute` and `memory` are the achieved shares of the peaks.

In eager PyTorch the CPU launches one operator after the other, `launch` apart, and the GPU runs them in order. A pass
ends at the maximum over k of (k * launch + sum of t_i for i >= k).
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
# Bandwidth of the L2 cache relative to memory. Jia et al., arXiv 1804.06826: 2155 to 750 GB/s measured on a V100.
CACHE_SPEED = 3.0
# Tiles that a library can choose from: rows (cells of the output map) by columns (filters) of the product.
ONE_TILE = ((128, 128),)
TUNED_TILES = ((256, 128), (256, 64), (128, 128), (128, 64), (64, 128), (64, 64))
# The maps of a convolution are converted to another layout before and after it (tensor cores need NHWC, PyTorch's
# default is NCHW): three times the traffic.
LAYOUT_TRAFFIC = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """Execution model of a runtime on a GPU; selected, not fitted.

    Attributes:
        tiles: Tile shapes of a convolution, of which the fastest is used. Empty: every convolution fills the GPU.
        layout_copies: FP16 convolutions convert the layout of their maps.
        cached: A kernel's traffic goes through the cache where all of it fits.
    """

    tiles: tuple[tuple[int, int], ...]
    layout_copies: bool
    cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """The fitted constants.

    Attributes:
        compute: Share of the compute peak that full waves achieve in FP16 and FP32.
        compute_int8: Share of the INT8 peak.
        memory: Share of the memory bandwidth.
        gap_us: Time between two kernels on the GPU.
        launch_us: CPU time to launch an operator; 0 where an engine or a CUDA graph is launched as a whole.
    """

    compute: float
    compute_int8: float
    memory: float
    gap_us: float
    launch_us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Seconds at the peaks of a device, one element per kernel."""

    compute_s: Floats
    memory_s: Floats
    is_int8: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Seconds of a pass by cause; the three arrays have one element per kernel and add up to the total.

    Attributes:
        compute_s: Time of kernels bound by compute.
        memory_s: Time of kernels bound by memory.
        launch_s: Gaps between kernels, and waiting for the CPU.
    """

    compute_s: Floats
    memory_s: Floats
    launch_s: Floats

    @property
    def by_kernel_s(self) -> Floats:
        """Seconds of each kernel."""
        return self.compute_s + self.memory_s + self.launch_s

    @property
    def ms(self) -> float:
        """Milliseconds of one pass."""
        return float(self.by_kernel_s.sum()) * 1e3

    def scaled(self, factor: float) -> Timeline:
        """Return the timeline with all times multiplied."""
        return Timeline(
            compute_s=self.compute_s * factor, memory_s=self.memory_s * factor, launch_s=self.launch_s * factor
        )


def peak(device: Device, precision: str) -> float | None:
    """Return the peak operations per second of a precision; `None` where no figure is public.

    FP32 is TF32 where the GPU supports it, the default of both runtimes.
    """
    tera = {
        "fp32": device.tf32_tflops or device.fp32_tflops,
        "fp16": device.fp16_tflops,
        "int8": device.int8_tops,
    }[precision]
    return None if tera is None else tera * 1e12


def compute_demand(
    kernels: Sequence[Kernel], device: Device, structure: Structure, *, batch: int, precision: str
) -> Demand:
    """Return the times of the kernels at the peaks of a device, for a batch of images."""
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
    """Return the operations of whole waves of tiles, with the idle multiprocessors of the last wave."""
    rows, columns = tile
    tiles = np.ceil(pixels / rows) * np.ceil(filters / columns)
    waves = np.ceil(tiles / device.multiprocessors)
    return waves * device.multiprocessors * 2.0 * rows * columns * depth


def pass_ms(demand: Demand, constants: Constants) -> float:
    """Return the milliseconds of one pass."""
    return float(_ends(*_busy(demand, constants), constants).max()) * 1e3


def timeline(demand: Demand, constants: Constants) -> Timeline:
    """Return the time of each kernel by cause."""
    compute, memory = _busy(demand, constants)
    # The last kernel that waits for the CPU; after it, the GPU is always busy.
    last = int(np.argmax(_ends(compute, memory, constants)))
    index = np.arange(len(compute))
    after_launches = index >= last
    return Timeline(
        compute_s=np.where(after_launches & (compute >= memory), compute, 0.0),
        memory_s=np.where(after_launches & (compute < memory), memory, 0.0),
        launch_s=1e-6
        * (np.where(after_launches, constants.gap_us, 0.0) + np.where(index <= last, constants.launch_us, 0.0)),
    )


def _busy(demand: Demand, constants: Constants) -> tuple[Floats, Floats]:
    """Return the compute and memory seconds of each kernel at the achieved shares of the peaks."""
    share = constants.compute_int8 if demand.is_int8 else constants.compute
    return demand.compute_s / share, demand.memory_s / constants.memory


def _ends(compute: Floats, memory: Floats, constants: Constants) -> Floats:
    """Return the end of the pass if each kernel were the last one that waits for the CPU."""
    busy = np.maximum(compute, memory) + constants.gap_us * 1e-6
    remaining: Floats = np.cumsum(busy[::-1])[::-1]
    return remaining + constants.launch_us * 1e-6 * np.arange(1, len(busy) + 1)
