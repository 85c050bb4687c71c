"""Estimated speed of a network on a device that is not available, with the error of such estimates.

Nothing is measured, and estimates never appear in a report of measurements.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from yolov7_deploy.errors import UsageError
from yolov7_deploy.estimation.devices import Device, find_device
from yolov7_deploy.estimation.fitting import (
    FITTED,
    FITTED_VARIANTS,
    STRUCTURES,
    TENSORRT_DEVICES,
    TENSORRT_ROWS,
    TORCH_T4,
    V100_BATCH1,
    V100_BATCH1_SPLITS,
    V100_BATCH32,
    V100_BATCH32_SPLITS,
    ErrorSummary,
)
from yolov7_deploy.estimation.layer_work import Kernel, compiled_kernels, eager_kernels, gigabytes
from yolov7_deploy.estimation.public_speeds import PAPER_VARIANTS, TENSORRT_SPEEDS, paper_canvas
from yolov7_deploy.estimation.roofline import BYTES, Floats, Timeline, compute_demand, peak, timeline
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.paper import paper_row

Runtime = Literal["torch", "tensorrt"]
SCHEMA = 1
PAPER_DEVICE = "v100"
SHOWN_LAYERS = 5
_WIDTH = 116  # of a line of the description, before indentation
_TITLES = {"torch": "PyTorch", "tensorrt": "TensorRT"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutError:
    """Error of estimates on published speeds that were held out of the fit.

    Attributes:
        known: True if some of those speeds are of this device, runtime and precision. Otherwise the numbers are of
            other devices, and the error for this one is unknown.
        median, worst: Absolute errors of images per second, 0.05 is 5 %; `None` where nothing is published.
        rows: Number of held-out speeds.
        evaluated_on: Description of these speeds, and how they were held out.
    """

    known: bool
    median: float | None
    worst: float | None
    rows: int
    evaluated_on: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Shares of the time by cause; they add up to 1.

    Attributes:
        compute: Kernels bound by compute.
        memory: Kernels bound by memory.
        launch: Waiting for the CPU, and gaps between kernels.
    """

    compute: float
    memory: float
    launch: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """One row of the layer table.

    Attributes:
        index: Official number.
        kind: Official class name.
        ms: Milliseconds in one pass.
        bound: Cause of most of it: `compute`, `memory` or `launch`.
    """

    index: int
    kind: str
    ms: float
    bound: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Estimated speed of a network on a device.

    It covers the network with the decoding of its boxes: no letterbox, no transfers, no NMS.

    Attributes:
        variant: Official name of the network, with COCO's 80 classes.
        device, device_title: Name in `devices.DEVICES`, and name of the manufacturer.
        runtime: `torch` (eager, as in the paper) or `tensorrt`.
        precision: `fp32`, `fp16` or `int8`.
        batch: Images per pass.
        input_hw: Height and width of the network's input in pixels.
        ms: Milliseconds of one pass.
        images_per_second: Throughput of sequential passes.
        gflops: 10^9 operations of one pass, two for each multiply-accumulate.
        gigabytes: Memory traffic of its kernels in 10^9 bytes.
        shares: Shares of the time by cause.
        layers: The slowest layers, slowest first.
        error: Error of such estimates.
        fitted_on: Descriptions of the published speeds behind the constants.
        sources: Sources of the device's numbers.
        notes: Remarks for the reader.
    """

    variant: str
    device: str
    device_title: str
    runtime: Runtime
    precision: str
    batch: int
    input_hw: tuple[int, int]
    ms: float
    images_per_second: float
    gflops: float
    gigabytes: float
    shares: Shares
    layers: tuple[LayerTime, ...]
    error: HeldOutError
    fitted_on: tuple[str, ...]
    sources: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fps(self) -> float:
        """Passes per second; at batch 1 the FPS of the paper."""
        return 1e3 / self.ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, marked as an estimate."""
        return asdict(self) | {"schema": SCHEMA, "kind": "y7 estimate", "measured": False, "fps": self.fps}


def estimate(
    variant: str,
    *,
    device: str,
    batch: int = 1,
    size: int | tuple[int, int] | None = None,
    precision: str = "fp16",
    runtime: Runtime | None = None,
) -> Estimate:
    """Estimate the speed of a variant on a device.

    Args:
        variant: Official name.
        device: One of `devices.DEVICES`, in any spelling.
        batch: Images per pass.
        size: Size of a square input in pixels, or height and width; by default the size in the paper.
        precision: `fp32` (TF32 where the GPU supports it), `fp16` or `int8`.
        runtime: `torch` or `tensorrt`; by default PyTorch on a V100, as in the paper, and TensorRT elsewhere.

    Raises:
        UsageError: Variant, device, precision or runtime is unknown, the batch is empty, the size is not a multiple of
            the strides, or INT8 is requested with PyTorch or where no figure is public.
    """
    architecture, target = find_variant(variant), find_device(device)
    chosen = _runtime(runtime, target, precision)
    _check(target, chosen, precision, batch)
    height, width = (architecture.size,) * 2 if size is None else (size, size) if isinstance(size, int) else size
    kernels = (eager_kernels if chosen == "torch" else compiled_kernels)(variant, (height, width))
    fitted, structure = FITTED[chosen], STRUCTURES[chosen]
    demand = compute_demand(kernels, target, structure, batch=batch, precision=precision)
    times = timeline(demand, fitted.constants).scaled(fitted.factors.get(target.name, 1.0))
    seconds = _seconds_by_cause(times)
    return Estimate(
        variant=variant,
        device=target.name,
        device_title=target.title,
        runtime=chosen,
        precision=precision,
        batch=batch,
        input_hw=(height, width),
        ms=times.ms,
        images_per_second=1e3 * batch / times.ms,
        gflops=batch * sum(kernel.flops for kernel in kernels) / 1e9,
        gigabytes=gigabytes(kernels, batch=batch, bytes_per_element=BYTES[precision]),
        shares=Shares(**{cause: float(values.sum()) * 1e3 / times.ms for cause, values in seconds.items()}),
        layers=_slowest(kernels, times),
        error=_error(target, chosen, precision, batch),
        fitted_on=_fitted_on(chosen),
        sources=(target.source,),
        notes=_notes(target, chosen, variant, (height, width), batch),
    )


def _runtime(requested: Runtime | None, device: Device, precision: str) -> Runtime:
    if requested is None:
        return "torch" if device.name == PAPER_DEVICE and precision != "int8" else "tensorrt"
    if requested not in FITTED:
        raise UsageError(f"The runtime {requested!r} cannot be estimated.", fix=f"One of: {', '.join(FITTED)}")
    return requested


def _check(device: Device, runtime: str, precision: str, batch: int) -> None:
    if precision not in BYTES:
        raise UsageError(f"The precision {precision!r} cannot be estimated.", fix=f"One of: {', '.join(BYTES)}")
    if batch < 1:
        raise UsageError(f"A batch has at least one image, not {batch}.", fix="For example: --batch 1")
    if precision == "int8" and runtime == "torch":
        raise UsageError("INT8 cannot be estimated with PyTorch.", fix="Use TensorRT, or --precision fp16")
    if peak(device, precision) is None:
        raise UsageError(
            f"The data sheet of {device.title} has no figure for INT8 on tensor cores.", fix="Use --precision fp16"
        )


def _seconds_by_cause(times: Timeline) -> dict[str, Floats]:
    return {"compute": times.compute_s, "memory": times.memory_s, "launch": times.launch_s}


def _slowest(kernels: Sequence[Kernel], times: Timeline) -> tuple[LayerTime, ...]:
    indices = np.array([kernel.layer for kernel in kernels])
    kinds = {kernel.layer: kernel.kind for kernel in kernels}
    seconds = _seconds_by_cause(times)
    found = []
    for index, kind in kinds.items():
        ms = {cause: float(values[indices == index].sum()) * 1e3 for cause, values in seconds.items()}
        bound = max(ms, key=lambda cause: ms[cause])
        found.append(LayerTime(index=index, kind=kind, ms=sum(ms.values()), bound=bound))
    return tuple(sorted(found, key=lambda layer: -layer.ms)[:SHOWN_LAYERS])


def _error(device: Device, runtime: str, precision: str, batch: int) -> HeldOutError:
    """Return the error of estimates for this device, as far as it is known."""
    if precision == "fp32":
        return HeldOutError(known=False, median=None, worst=None, rows=0, evaluated_on="no FP32 speed is published")
    if runtime == "tensorrt":
        summary = TENSORRT_ROWS.get(device.name)
        if summary:
            return _held_out(summary, "its published speeds, one held out at a time", known=True)
        speeds = f"those of {len(FITTED['tensorrt'].factors)} devices, one device held out at a time"
        return _held_out(TENSORRT_DEVICES, speeds, known=False)
    if device.name != PAPER_DEVICE:
        return _held_out(TORCH_T4, "those of a T4, with constants fitted on a V100", known=device.name == "t4")
    own, splits = (V100_BATCH1, V100_BATCH1_SPLITS) if batch == 1 else (V100_BATCH32, V100_BATCH32_SPLITS)
    others = [variant for variant in PAPER_VARIANTS if variant not in FITTED_VARIANTS]
    speeds = (
        f"the paper's of {', '.join(others)} at batch {1 if batch == 1 else 32}; over all 35 ways to fit on three of "
        f"its seven rows median {splits.median:.1%}, worst {splits.worst:.1%}"
    )
    return _held_out(own, speeds, known=True)


def _held_out(summary: ErrorSummary, evaluated_on: str, *, known: bool) -> HeldOutError:
    return HeldOutError(
        known=known, median=summary.median, worst=summary.worst, rows=summary.rows, evaluated_on=evaluated_on
    )


def _fitted_on(runtime: str) -> tuple[str, ...]:
    if runtime == "torch":
        return tuple(f"{variant} on a V100, batch 1 and 32 (paper and README)" for variant in FITTED_VARIANTS)
    return tuple(
        f"{row.variant} on {row.device}, {row.precision}, batch {row.batch}: {row.ms:.2f} ms ({row.source})"
        for row in TENSORRT_SPEEDS
    )


def _notes(device: Device, runtime: str, variant: str, input_hw: tuple[int, int], batch: int) -> tuple[str, ...]:
    notes = ["network and decoding only: no letterbox, no transfers, no NMS"]
    if device.note:
        notes.append(device.note)
    if runtime == "torch":
        notes.append("the launch time is that of the paper's CPU; CUDA graphs or a newer CPU take less")
        fps, canvas = paper_row(variant).fps, paper_canvas(variant)
        if fps and (device.name, batch) == (PAPER_DEVICE, 1) and canvas != input_hw:
            notes.append(
                f"the paper's {fps:g} FPS are for letterboxed rectangles, typically {canvas[0]}x{canvas[1]}, and not "
                f"comparable with this {input_hw[0]}x{input_hw[1]}"
            )
    return tuple(notes)


def describe_estimate(found: Estimate) -> str:
    """Return a few lines: the speed, what limits it, and the error of such estimates."""
    height, width = found.input_hw
    shares = sorted(asdict(found.shares).items(), key=lambda item: -item[1])
    layers = [f"{layer.index} {layer.kind} {layer.ms:.2f} ms ({layer.bound})" for layer in found.layers]
    lines = (
        f"estimated, not measured: {found.variant} at {height}x{width} on {found.device_title}, "
        f"{_TITLES[found.runtime]} {found.precision.upper()}, batch {found.batch}",
        f"{found.ms:.2f} ms per pass, {found.images_per_second:.0f} images/s",
        f"bound by {', '.join(f'{part} {share:.0%}' for part, share in shares)} "
        f"({found.gflops:.1f} GFLOPs, {found.gigabytes:.2f} GB)",
        f"slowest layers: {', '.join(layers)}",
        f"error: {_describe_error(found)}",
        f"fitted on {_describe_fit(found)}; peaks: {', '.join(found.sources)}",
        *(f"note: {note}" for note in found.notes),
    )
    first, *rest = (textwrap.fill(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False) for line in lines)
    return "\n".join([first, *(f"  {line}" for line in rest)])


def _describe_error(found: Estimate) -> str:
    error = found.error
    if error.median is None or error.worst is None:
        return f"unknown, {error.evaluated_on}"
    figures = (
        f"median {error.median:.1%}, worst {error.worst:.1%} on {error.rows} held-out speeds, {error.evaluated_on}"
    )
    if error.known:
        return figures
    only = found.runtime == "tensorrt" and found.device in FITTED["tensorrt"].factors
    reason = "its only published speed is used for the fit" if only else "no speed of this device is published"
    return f"unknown, {reason}; elsewhere {figures}"


def _describe_fit(found: Estimate) -> str:
    if found.runtime == "torch":
        return f"the V100 speeds of {', '.join(FITTED_VARIANTS)} (paper and README)"
    return f"{len(found.fitted_on)} published TensorRT speeds on {', '.join(FITTED['tensorrt'].factors)}"
