"""How fast a network should be on a machine that one does not have: an estimate, with the error it had elsewhere.

Nothing here is measured, and no estimate ever goes into a report of measurements.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from yolov7_deploy.errors import UsageError
from yolov7_deploy.estimation.devices import Device, find_device
from yolov7_deploy.estimation.fitted import (
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
    Judged,
)
from yolov7_deploy.estimation.layer_work import Kernel, compiled_kernels, eager_kernels, gigabytes
from yolov7_deploy.estimation.public_speeds import PAPER_VARIANTS, TENSORRT_SPEEDS, paper_canvas
from yolov7_deploy.estimation.roofline import BYTES, Floats, Timeline, demand, peak, timeline
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.paper import paper_row

Runtime = Literal["torch", "tensorrt"]
SCHEMA = 1
PAPER_DEVICE = "v100"
SHOWN_LAYERS = 5
_WIDTH = 116  # of a line of the description, before it is set in
_TITLES = {"torch": "PyTorch", "tensorrt": "TensorRT"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutError:
    """How far estimates were from published speeds that they were not fitted on.

    Attributes:
        known: Some of those speeds are of this device, with this runtime and precision. Where it is not, the numbers
            are of other devices, and how far off this one is nobody knows.
        median, worst: Absolute errors of images per second, 0.05 is 5 %; `None` where nothing can be judged.
        rows: Number of errors behind them.
        judged_by: Which speeds those are, and how they were held out.
    """

    known: bool
    median: float | None
    worst: float | None
    rows: int
    judged_by: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What bounds the time, as shares of it; they add up to 1.

    Attributes:
        compute: Kernels bound by arithmetic.
        memory: Kernels bound by memory.
        launch: Waiting for the processor, and gaps between kernels.
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
        ms: Of one pass.
        bound: What most of it is: `compute`, `memory`, `launch`.
    """

    index: int
    kind: str
    ms: float
    bound: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The speed of a network on a device, estimated and not measured.

    It covers the network with the decoding of its boxes: no letterbox, no transfers, no suppression.

    Attributes:
        variant: Official name of the network, with COCO's 80 classes.
        device, device_title: Name as in `devices.DEVICES`, and the maker's.
        runtime: `torch` (eager, what the paper measured) or `tensorrt`.
        precision: `fp32`, `fp16` or `int8`.
        batch: Images per pass.
        input_hw: Height and width of the network's input in pixels.
        ms: Milliseconds of one pass.
        images_per_second: Passes one after the other.
        gflops: Billions of operations of one pass, two for each multiply-accumulate.
        gigabytes: 10^9 bytes that its kernels read and write.
        shares: What bounds it.
        layers: The slowest ones, slowest first.
        error: What to expect of it.
        fitted_on: Published speeds behind the constants, in words.
        sources: Where the device's numbers stand.
        notes: What else a reader should know.
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
        """Passes per second; at batch 1 what the paper calls FPS."""
        return 1e3 / self.ms

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; says that it is an estimate, so that nothing takes it for a measurement."""
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
    """How fast a variant should be on a device.

    Args:
        variant: Official name.
        device: One of `devices.DEVICES`, in any spelling.
        batch: Images per pass.
        size: Side of a square input in pixels, or height and width; the paper's square where absent.
        precision: `fp32` (TF32 where the GPU has it), `fp16` or `int8`.
        runtime: `torch` or `tensorrt`; where absent that of the paper on a V100, and TensorRT elsewhere.

    Raises:
        UsageError: Unknown variant, device, precision or runtime, no images, a size its strides do not divide, or
            INT8 where there is no public figure of it or with PyTorch.
    """
    architecture, machine = find_variant(variant), find_device(device)
    chosen = _runtime(runtime, machine, precision)
    _check(machine, chosen, precision, batch)
    height, width = (architecture.size,) * 2 if size is None else (size, size) if isinstance(size, int) else size
    kernels = (eager_kernels if chosen == "torch" else compiled_kernels)(variant, (height, width))
    fitted, structure = FITTED[chosen], STRUCTURES[chosen]
    asked = demand(kernels, machine, structure, batch=batch, precision=precision)
    times = timeline(asked, fitted.constants).scaled(fitted.factors.get(machine.name, 1.0))
    return Estimate(
        variant=variant,
        device=machine.name,
        device_title=machine.title,
        runtime=chosen,
        precision=precision,
        batch=batch,
        input_hw=(height, width),
        ms=times.ms,
        images_per_second=1e3 * batch / times.ms,
        gflops=batch * sum(kernel.flops for kernel in kernels) / 1e9,
        gigabytes=gigabytes(kernels, batch=batch, bytes_per_element=BYTES[precision]),
        shares=Shares(**{part: float(seconds.sum()) * 1e3 / times.ms for part, seconds in _parts(times).items()}),
        layers=_slowest(kernels, times),
        error=_error(machine, chosen, precision, batch),
        fitted_on=_fitted_on(chosen),
        sources=(machine.source,),
        notes=_notes(machine, chosen, variant, (height, width), batch),
    )


def _runtime(asked: Runtime | None, machine: Device, precision: str) -> Runtime:
    if asked is None:
        return "torch" if machine.name == PAPER_DEVICE and precision != "int8" else "tensorrt"
    if asked not in FITTED:
        raise UsageError(f"{asked!r} is no runtime of the estimator.", fix=f"One of: {', '.join(FITTED)}")
    return asked


def _check(machine: Device, runtime: str, precision: str, batch: int) -> None:
    if precision not in BYTES:
        raise UsageError(f"{precision!r} is no precision of the estimator.", fix=f"One of: {', '.join(BYTES)}")
    if batch < 1:
        raise UsageError(f"A batch holds at least one image, not {batch}.", fix="For example: --batch 1")
    if precision == "int8" and runtime == "torch":
        raise UsageError("PyTorch runs no INT8 on a GPU here.", fix="Take TensorRT, or --precision fp16")
    if peak(machine, precision) is None:
        raise UsageError(
            f"The data sheet of {machine.title} has no figure for INT8 on tensor cores.", fix="Take --precision fp16"
        )


def _parts(times: Timeline) -> dict[str, Floats]:
    return {"compute": times.compute_s, "memory": times.memory_s, "launch": times.launch_s}


def _slowest(kernels: Sequence[Kernel], times: Timeline) -> tuple[LayerTime, ...]:
    indices = np.array([kernel.layer for kernel in kernels])
    kinds = {kernel.layer: kernel.kind for kernel in kernels}
    found = []
    for index, kind in kinds.items():
        parts = {part: float(seconds[indices == index].sum()) * 1e3 for part, seconds in _parts(times).items()}
        bound = max(parts, key=lambda part: parts[part])
        found.append(LayerTime(index=index, kind=kind, ms=sum(parts.values()), bound=bound))
    return tuple(sorted(found, key=lambda layer: -layer.ms)[:SHOWN_LAYERS])


def _error(machine: Device, runtime: str, precision: str, batch: int) -> HeldOutError:
    """What is known about the error of such an estimate."""
    if precision == "fp32":
        return HeldOutError(known=False, median=None, worst=None, rows=0, judged_by="no FP32 speed is published")
    if runtime == "tensorrt":
        judged = TENSORRT_ROWS.get(machine.name)
        if judged:
            return _held_out(judged, "its published speeds, one left out at a time", known=True)
        how = f"those of {len(FITTED['tensorrt'].factors)} devices, one device left out at a time"
        return _held_out(TENSORRT_DEVICES, how, known=False)
    if machine.name != PAPER_DEVICE:
        return _held_out(TORCH_T4, "those of a T4, with constants fitted on a V100", known=machine.name == "t4")
    own, splits = (V100_BATCH1, V100_BATCH1_SPLITS) if batch == 1 else (V100_BATCH32, V100_BATCH32_SPLITS)
    others = [variant for variant in PAPER_VARIANTS if variant not in FITTED_VARIANTS]
    how = (
        f"the paper's of {', '.join(others)} at batch {1 if batch == 1 else 32}; over all 35 ways to fit on three of "
        f"its seven rows median {splits.median:.1%}, worst {splits.worst:.1%}"
    )
    return _held_out(own, how, known=True)


def _held_out(judged: Judged, judged_by: str, *, known: bool) -> HeldOutError:
    return HeldOutError(known=known, median=judged.median, worst=judged.worst, rows=judged.rows, judged_by=judged_by)


def _fitted_on(runtime: str) -> tuple[str, ...]:
    if runtime == "torch":
        return tuple(f"{variant} on a V100, batch 1 and 32 (paper and README)" for variant in FITTED_VARIANTS)
    return tuple(
        f"{row.variant} on {row.device}, {row.precision}, batch {row.batch}: {row.ms:.2f} ms ({row.source})"
        for row in TENSORRT_SPEEDS
    )


def _notes(machine: Device, runtime: str, variant: str, input_hw: tuple[int, int], batch: int) -> tuple[str, ...]:
    notes = ["network and decoding only: no letterbox, no transfers, no NMS"]
    if machine.note:
        notes.append(machine.note)
    if runtime == "torch":
        notes.append("a launch costs what it cost the processor of the paper; CUDA graphs or a newer one cost less")
        fps, canvas = paper_row(variant).fps, paper_canvas(variant)
        if fps and (machine.name, batch) == (PAPER_DEVICE, 1) and canvas != input_hw:
            notes.append(
                f"the paper's {fps:g} FPS are of letterboxed rectangles, {canvas[1]}x{canvas[0]} as a rule, and do not "
                f"stand beside this {input_hw[1]}x{input_hw[0]}"
            )
    return tuple(notes)


def describe_estimate(found: Estimate) -> str:
    """A few lines for people: the figure, what bounds it, and how far off such figures were."""
    height, width = found.input_hw
    shares = sorted(asdict(found.shares).items(), key=lambda item: -item[1])
    layers = [f"{layer.index} {layer.kind} {layer.ms:.2f} ms ({layer.bound})" for layer in found.layers]
    lines = (
        f"estimated, not measured: {found.variant} at {width}x{height} on {found.device_title}, "
        f"{_TITLES[found.runtime]} {found.precision.upper()}, batch {found.batch}",
        f"{found.ms:.2f} ms a pass, {found.images_per_second:.0f} images/s",
        f"bound by {', '.join(f'{part} {share:.0%}' for part, share in shares)} "
        f"({found.gflops:.1f} GFLOPs, {found.gigabytes:.2f} GB)",
        f"slowest layers: {', '.join(layers)}",
        f"error: {_error_in_words(found)}",
        f"fitted on {_fit_in_words(found)}; peaks: {', '.join(found.sources)}",
        *(f"note: {note}" for note in found.notes),
    )
    first, *rest = (textwrap.fill(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False) for line in lines)
    return "\n".join([first, *(f"  {line}" for line in rest)])


def _error_in_words(found: Estimate) -> str:
    error = found.error
    if error.median is None or error.worst is None:
        return f"unknown, {error.judged_by}"
    figures = f"median {error.median:.1%}, worst {error.worst:.1%} on {error.rows} held-out speeds, {error.judged_by}"
    if error.known:
        return figures
    only = found.runtime == "tensorrt" and found.device in FITTED["tensorrt"].factors
    why = "its only published speed is one of those fitted on" if only else "no speed of this device to judge it by"
    return f"unknown, {why}; where it can be judged {figures}"


def _fit_in_words(found: Estimate) -> str:
    if found.runtime == "torch":
        return f"the V100 speeds of {', '.join(FITTED_VARIANTS)} (paper and README)"
    return f"{len(found.fitted_on)} published TensorRT speeds on {', '.join(FITTED['tensorrt'].factors)}"
