"""Checks before a build: GPU support of the installed TensorRT, JetPack, power mode of a board, memory and disk.

`preflight` returns findings. An error stops the build; a warning is logged and the build continues; a note is only part
of the findings.

The memory of a build is estimated as the sum of four sizes: the libraries, the model, its activations and the
workspace. For TensorRT-RTX it was fitted to builds of two models. For TensorRT it is based on the memory use that its
builder logs.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yolov7_deploy.hardware.gpu import free_gpu_memory
from yolov7_deploy.hardware.jetson import Board, JetPack, Version, read_board, version_numbers
from yolov7_deploy.hardware.system import ROOT, CommandRunner, FreeMemory, free_host_memory, run_command
from yolov7_deploy.tensorrt.build_record import TITLES, Product

MIB = 2**20
GIB = 2**30

# Main memory of the process during a build with TensorRT-RTX 1.7.1: 317 MiB for a model of 23.8 MiB (yolov7-tiny),
# 790 MiB for a model of 141.3 MiB (yolov7). That is four copies of the model (read, parsed, built, serialized) plus:
_RTX_LIBRARIES = 225 * MIB
_MODEL_COPIES = 4
# "Init CUDA" plus "Init builder kernel library" in logs of builders: about 600 MiB with 8.5, 1.0 to 1.6 GiB with 8.6,
# 1.7 to 2.7 GiB from 9 on. On a Jetson less than half, because its packages contain the kernels of one GPU.
_LIBRARIES = (((9,), 2304 * MIB), ((8, 6), 1331 * MIB), ((0,), 640 * MIB))
_JETSON_SHARE = 0.5
# CUDA context, kernels and allocator blocks: 300 to 650 MiB in the same logs.
_CONTEXT = 512 * MIB
# Peak of the activations per input pixel: 384 bytes for yolov7 in FP32 (64 for yolov7-tiny).
_BYTES_PER_PIXEL = 400
# Workspace of convolutions without a limit.
_TYPICAL_WORKSPACE = 512 * MIB

Level = Literal["error", "warning", "note"]

# Compute capability: example GPU, first and last TensorRT version that supports it; `None` for the current one.
# Sources: release notes of 10.5 (Volta), 10.8 (Blackwell) and 10.13 (Thor), JetPack's tables. Xavier needs JetPack 5.
GPUS: dict[str, tuple[str, Version, Version | None]] = {
    "7.0": ("V100", (8, 5), (10, 4)),
    "7.2": ("Xavier", (8, 5), (8, 5)),
    "7.5": ("T4", (8, 5), None),
    "8.0": ("A100", (8, 5), None),
    "8.6": ("A10, RTX 30", (8, 5), None),
    "8.7": ("Orin", (8, 5), None),
    "8.9": ("L4, RTX 40", (8, 5), None),
    "9.0": ("H100", (8, 5), None),
    "10.0": ("B200", (10, 8), None),
    "11.0": ("Thor", (10, 13), None),
    "12.0": ("RTX 50", (10, 8), None),
}
# Targets of TensorRT-RTX 1.7. It does not support 9.0 (H100), Volta and Jetson.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_FIXES = {
    "7.0": "pip install tensorrt==10.4.0",
    "7.2": "Use the TensorRT 8.5.2 of JetPack 5:  sudo apt install python3-libnvinfer",
}
# Jetson modules without a DLA, and the versions between which TensorRT did not support the DLA of the others.
_NO_DLA = ("Thor", "Nano")
_LAST_DLA, _NEXT_DLA = (10, 7), (11, 4, 1)
# Distributions of the PyPI wheels, which JetPack's packages do not contain.
WHEELS = ("tensorrt-cu13-libs", "tensorrt-cu12-libs", "tensorrt-cu11-libs", "tensorrt-libs")
# The largest plan that was measured has 1.13 times the size of its model.
_PLAN_SHARE = 1.25
_PLAN_EXTRA = 16 * MIB
_TIMING_CACHE = 32 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of a check before a build.

    Attributes:
        level: An `error` stops the build.
        field: Subject: `compute_capability`, `targets`, `jetpack`, `power_mode`, `memory`, `disk` or `dla`.
        text: The finding and its effect.
        fix: What to type; empty if there is nothing to do.
    """

    level: Level
    field: str
    text: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBuild:
    """The inputs of the checks.

    Attributes:
        product, tensorrt: The installed TensorRT and its version; the version is empty if it is unknown.
        gpu, compute_capability: The GPU and its compute capability, such as `8.6`; empty without a GPU or if unknown.
        targets: Requested compute capabilities (TensorRT-RTX only).
        known_targets: Compute capabilities that this TensorRT-RTX supports.
        model_bytes: Size of the ONNX model.
        input_pixels: Height x width x maximum batch.
        workspace_bytes: Workspace limit; 0 for none.
        dla_core: The requested DLA core, if any.
        folder: Folder of the engine.
        cache_folder: Folder of the timing cache, if any.
    """

    product: Product
    tensorrt: str
    gpu: str = ""
    compute_capability: str = ""
    targets: tuple[str, ...] = ()
    known_targets: tuple[str, ...] = RTX_CAPABILITIES
    model_bytes: int = 0
    input_pixels: int = 0
    workspace_bytes: int = 0
    dla_core: int | None = None
    folder: Path | None = None
    cache_folder: Path | None = None


def installed_wheels() -> tuple[str, ...]:
    """Return the TensorRT libraries that are installed with pip, as `name version`."""
    found = []
    for name in WHEELS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def free_disk(folder: Path) -> int | None:
    """Return the free bytes of the disk of a folder, which may not exist yet; `None` if it is unknown."""
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.is_dir():
            try:
                return shutil.disk_usage(parent).free
            except OSError:
                return None
    return None


def preflight(
    build: PlannedBuild,
    *,
    root: Path = ROOT,
    run: CommandRunner = run_command,
    wheels: Sequence[str] | None = None,
    disk: Callable[[Path], int | None] = free_disk,
) -> list[Finding]:
    """Check a build; return the findings, errors first. Takes a fraction of a second and changes nothing.

    Args:
        build: What is going to be built.
        root: Folder that contains `proc`, `etc`, `sys` and `var`.
        run: Runs a command and returns its output, or `None`.
        wheels: TensorRT libraries that are installed with pip; `None` looks them up.
        disk: Returns the free bytes of a folder.
    """
    board = read_board(root=root, run=run)
    capability = build.compute_capability or (board.compute_capability if board else "")
    found = [
        *capability_findings(build, capability),
        *_targets(build, capability, board),
        *(_jetpack(build, board, installed_wheels() if wheels is None else wheels) if board else ()),
        *(_power_mode(board) if board else ()),
        *_dla(build, board),
        *_memory(build, board, root),
        *_disk(build, disk),
    ]
    order: list[Level] = ["error", "warning", "note"]
    return sorted(found, key=lambda finding: order.index(finding.level))


# --- GPU and TensorRT -------------------------------------------------------------------------------------------------


def capability_findings(build: PlannedBuild, capability: str) -> Iterator[Finding]:
    """Check whether TensorRT supports a compute capability. TensorRT-RTX has `targets` instead."""
    if build.product != "tensorrt" or not capability:
        return
    version = version_numbers(build.tensorrt)[:2]
    field = "compute_capability"
    if capability not in GPUS:
        text = f"It is unknown here whether TensorRT supports compute capability {capability}; the build will show it."
        yield Finding(level="note", field=field, text=text)
        return
    example, first, last = GPUS[capability]
    here = f"{build.gpu or example}, compute capability {capability}"
    if last is not None and version > last:
        text = f"TensorRT {build.tensorrt} does not support this GPU ({here}): {_dotted(last)} was the last that did."
        yield Finding(level="error", field=field, text=text, fix=_FIXES[capability])
    elif version and version < first:
        text = f"TensorRT {build.tensorrt} does not support this GPU ({here}): {_dotted(first)} was the first that did."
        yield Finding(level="error", field=field, text=text, fix=f"pip install 'tensorrt>={_dotted(first)}'")
    elif last is not None:
        text = f"TensorRT {_dotted(last)} is the last that supports this GPU ({here}): do not upgrade."
        yield Finding(level="note", field=field, text=text, fix=_FIXES[capability])


def _targets(build: PlannedBuild, capability: str, board: Board | None) -> Iterator[Finding]:
    if build.product != "tensorrt_rtx":
        return
    unknown = [target for target in build.targets if target not in build.known_targets]
    choice = f"--target {','.join(_target(text) for text in build.known_targets)}   (some of these)"
    title = f"{TITLES[build.product]} {build.tensorrt}".strip()
    if unknown:
        text = f"{title} builds for {', '.join(build.known_targets)}, not for {', '.join(unknown)}."
        if "9.0" in unknown or "7.0" in unknown:
            text += " Data center GPUs of that kind need TensorRT."
        yield Finding(level="error", field="targets", text=text, fix=choice)
    elif board is not None:
        text = f"{title} does not run on a Jetson ({board.model})."
        fix = "Use the TensorRT of its JetPack:  sudo apt install python3-libnvinfer"
        yield Finding(level="error", field="targets", text=text, fix=fix)
    elif capability and capability not in build.known_targets:
        here = f"{build.gpu}, compute capability {capability}" if build.gpu else f"compute capability {capability}"
        text = f"{title} does not build for the GPU of this machine ({here}); the engine runs on other machines only."
        fix = f"To run it here:  {_FIXES.get(capability, 'pip install tensorrt')}"
        yield Finding(level="warning", field="targets", text=text, fix=fix)
    elif capability and build.targets and capability not in build.targets:
        text = f"The engine is for compute capability {', '.join(build.targets)}; the GPU here has {capability}."
        fix = f"To run it here as well:  --target {','.join(map(_target, (*build.targets, capability)))}"
        yield Finding(level="warning", field="targets", text=text, fix=fix)


def _dla(build: PlannedBuild, board: Board | None) -> Iterator[Finding]:
    if build.dla_core is None:
        return
    fix = "Leave out --dla"
    if build.product == "tensorrt_rtx" or (board is None and build.compute_capability not in ("7.2", "8.7", "")):
        text = f"Only Jetson Xavier and Orin have a DLA; {TITLES[build.product]} {build.tensorrt} runs on the GPU here."
        yield Finding(level="error", field="dla", text=text, fix=fix)
    elif board is not None and any(name in board.model for name in _NO_DLA):
        yield Finding(level="error", field="dla", text=f"{board.model} has no DLA.", fix=fix)
    elif version_numbers(build.tensorrt)[:2] > _LAST_DLA and version_numbers(build.tensorrt) < _NEXT_DLA:
        text = f"TensorRT {build.tensorrt} does not support the DLA of Jetson; versions up to {_dotted(_LAST_DLA)} and "
        text += f"from {_dotted(_NEXT_DLA)} on do."
        yield Finding(level="error", field="dla", text=text, fix=fix)


def _target(capability: str) -> str:
    return f"sm{capability.replace('.', '')}"


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


# --- Jetson -----------------------------------------------------------------------------------------------------------


def _jetpack(build: PlannedBuild, board: Board, wheels: Sequence[str]) -> Iterator[Finding]:
    if build.product != "tensorrt":
        return
    jetpack = board.jetpack
    if jetpack is None:
        release = f"L4T {board.l4t}" if board.l4t else "a container without the L4T version"
        text = f"{board.model} with {release}: its TensorRT version is unknown here (JetPack 5.1 to 7.2 are known)."
        yield Finding(level="warning" if board.l4t else "note", field="jetpack", text=text)
        return
    version = version_numbers(build.tensorrt)[:2]
    where = f"JetPack {jetpack.name} (L4T {board.l4t})"
    if wheels and not jetpack.server_wheels:
        text = (
            f"TensorRT is installed with pip ({', '.join(wheels)}), in a build for ARM servers: on {where} it cannot "
        )
        text += f"use the GPU. This JetPack contains {jetpack.tensorrt}."
        names = " ".join(wheel.partition(" ")[0] for wheel in wheels)
        yield Finding(level="error", field="jetpack", text=text, fix=_jetpack_repair(f"tensorrt {names}"))
    elif version > jetpack.max_tensorrt:
        last = "" if jetpack.server_wheels else f", and {_dotted(jetpack.max_tensorrt)} is the last that can run on it"
        text = f"TensorRT {build.tensorrt} is newer than {where}, which contains {jetpack.tensorrt}{last}."
        # Not supported by NVIDIA there, but it may run.
        level: Level = "warning" if jetpack.server_wheels else "error"
        yield Finding(level=level, field="jetpack", text=text, fix=_jetpack_repair("tensorrt"))
    elif version and version < jetpack.min_tensorrt:
        text = f"TensorRT {build.tensorrt} is older than {where}, which contains {jetpack.tensorrt}: a container of an "
        text += "older JetPack? Engines built in it run in it only."
        yield Finding(level="warning", field="jetpack", text=text, fix=_container(jetpack))
    elif version and version != version_numbers(jetpack.tensorrt)[:2]:
        text = f"TensorRT {build.tensorrt} is not the version of {where}, {jetpack.tensorrt}. It can run there."
        yield Finding(level="note", field="jetpack", text=text)


def _jetpack_repair(names: str) -> str:
    return (
        f"pip uninstall -y {names}; sudo apt install python3-libnvinfer   (a virtual environment sees it with "
        "python3 -m venv --system-site-packages)"
    )


def _container(jetpack: JetPack) -> str:
    if jetpack.server_wheels:
        return "Use a container of TensorRT for JetPack 7:  nvcr.io/nvidia/tensorrt:26.05-py3"
    return f"Use the container of this JetPack:  nvcr.io/nvidia/l4t-tensorrt:r{jetpack.tensorrt}-runtime"


def _power_mode(board: Board) -> Iterator[Finding]:
    mode, best = board.mode, board.highest_mode
    if mode is None:
        text = "The power mode is unknown (nvpmodel -q failed); a container cannot read it."
        yield Finding(level="note", field="power_mode", text=text)
    elif best is not None and mode.name != best.name:
        text = (
            f"The board is in power mode {mode.name}; {best.name} is faster. TensorRT selects kernels by timing them "
        )
        text += "during the build, so build in the mode in which the engine will run."
        fix = "" if best.number is None else f"sudo nvpmodel -m {best.number}; sudo jetson_clocks"
        yield Finding(level="warning", field="power_mode", text=text, fix=fix)


# --- memory and disk --------------------------------------------------------------------------------------------------


def _memory(build: PlannedBuild, board: Board | None, root: Path) -> Iterator[Finding]:
    if not build.model_bytes:
        return
    need = predict_memory(
        product=build.product,
        tensorrt=build.tensorrt,
        model_bytes=build.model_bytes,
        input_pixels=build.input_pixels,
        workspace_bytes=build.workspace_bytes,
        on_jetson=board is not None,
    )
    host = free_host_memory(root=root)
    if board is not None:  # CPU and GPU share the memory
        yield from _compare(need, need.host_bytes + need.device_bytes, need.workspace_bytes, host, "memory")
        return
    yield from _compare(need, need.host_bytes, 0, host, "main memory")
    if need.device_bytes:
        yield from _compare(need, need.device_bytes, need.workspace_bytes, free_gpu_memory(), "GPU memory")


def _compare(need: BuildMemory, least: int, workspace: int, free: FreeMemory | None, what: str) -> Iterator[Finding]:
    if free is None or free.size >= least + workspace:
        return
    text = f"The build is expected to take {format_gib(least + workspace)} of {what} at its peak, and "
    text += f"{format_gib(free.size)} are free ({free.source}). The estimate: {need.parts}."
    enough = free.size >= least
    fix = "Close other programs, or export a smaller --img or --batch"
    if enough:
        left = max(0.1, (free.size - least) / GIB)
        fix = f"Limit the workspace:  --workspace {left:.1f}   (GiB), or close other programs"
    yield Finding(level="warning" if enough else "error", field="memory", text=text, fix=fix)


def _disk(build: PlannedBuild, disk: Callable[[Path], int | None]) -> Iterator[Finding]:
    plan_bytes = int(build.model_bytes * _PLAN_SHARE) + _PLAN_EXTRA
    cache_folder = build.cache_folder if build.product == "tensorrt" else None  # TensorRT-RTX does not time kernels
    files: list[tuple[Path | None, int, Level, str, str]] = [
        (build.folder, plan_bytes, "error", "the engine", "Choose another path:  --output F.engine"),
        (cache_folder, _TIMING_CACHE, "warning", "the timing cache", "Build without it:  --no-timing-cache"),
    ]
    for folder, size, level, what, fix in files:
        free = disk(folder) if folder is not None else None
        if free is not None and free < size:
            text = f"{folder} has {format_gib(free)} left; {what} takes about {format_gib(size)}."
            yield Finding(level=level, field="disk", text=text, fix=fix)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildMemory:
    """The estimated memory of a build.

    Attributes:
        host_bytes: Main memory of the build process.
        device_bytes: GPU memory without the workspace; 0 if the build does not use the GPU.
        workspace_bytes: The workspace limit, or a typical workspace without a limit.
        parts: The terms of the sum, for a message.
    """

    host_bytes: int
    device_bytes: int
    workspace_bytes: int
    parts: str


def predict_memory(
    *,
    product: Product,
    tensorrt: str,
    model_bytes: int,
    input_pixels: int,
    workspace_bytes: int = 0,
    on_jetson: bool = False,
) -> BuildMemory:
    """Return the estimated memory of a build.

    Args:
        product, tensorrt: The TensorRT that builds, and its version.
        model_bytes: Size of the ONNX model.
        input_pixels: Height x width x maximum batch.
        workspace_bytes: Workspace limit; 0 for none.
        on_jetson: The TensorRT of JetPack is smaller.
    """
    if product == "tensorrt_rtx":
        libraries, device, workspace = _RTX_LIBRARIES, 0, 0
    else:
        size = next((size for first, size in _LIBRARIES if version_numbers(tensorrt) >= first), _LIBRARIES[0][1])
        libraries = int(size * _JETSON_SHARE) if on_jetson else size
        device = _CONTEXT + model_bytes + input_pixels * _BYTES_PER_PIXEL
        workspace = workspace_bytes or _TYPICAL_WORKSPACE
    parts = [f"libraries {format_gib(libraries)}", f"{_MODEL_COPIES} copies of the model's {format_gib(model_bytes)}"]
    if device:
        parts += [
            f"CUDA {format_gib(_CONTEXT)}",
            f"weights and activations on the GPU {format_gib(device - _CONTEXT)}",
            f"workspace {format_gib(workspace)}",
        ]
    return BuildMemory(
        host_bytes=libraries + _MODEL_COPIES * model_bytes,
        device_bytes=device,
        workspace_bytes=workspace,
        parts=" + ".join(parts),
    )


def format_gib(size: int) -> str:
    """Return a size as text: `1.5 GiB`, or `290 MiB` below 1 GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
