"""The memory that a build needs, and the memory that is free.

The estimate is the sum of four sizes: the libraries, the model, its activations and the workspace. For TensorRT-RTX it
was fitted to builds of two models. For TensorRT it is based on the memory use that its builder logs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.hardware.gpu import open_gpu
from yolov7_deploy.hardware.jetson import version_numbers
from yolov7_deploy.hardware.system import ROOT, read_text
from yolov7_deploy.tensorrt.build_record import Product

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
# A control group without a limit reports a number near 2**63.
_NO_LIMIT = 2**60


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


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeMemory:
    """Memory that is available to a new process, and the source of the number."""

    size: int
    source: str


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


def free_host_memory(*, root: Path = ROOT) -> FreeMemory | None:
    """Return the free main memory, limited by the container; `None` if it is unknown."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    known = [FreeMemory(size=int(found[1]) * 1024, source="MemAvailable")] if found else []
    return min([*known, *_cgroups(root)], key=lambda memory: memory.size, default=None)


def free_gpu_memory() -> FreeMemory | None:
    """Return the free memory of `cuda:0`; `None` where NVML does not report it."""
    gpu = open_gpu(0)
    size = None if isinstance(gpu, str) else gpu.memory_free_bytes()
    return None if size is None else FreeMemory(size=size, source="NVML")


def format_gib(size: int) -> str:
    """Return a size as text: `1.5 GiB`, or `290 MiB` below 1 GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def _cgroups(root: Path) -> list[FreeMemory]:
    """Return the free memory of every control group of this process (v1 and v2); page cache counts as free."""
    files = root / "sys/fs/cgroup"
    group = re.search(r"^0::(/\S*)", read_text(root / "proc/self/cgroup"), re.MULTILINE)
    path = group[1].strip("/") if group else ""
    folders = [files / path, *(files / parent for parent in Path(path).parents)] if path else [files]
    free = [_free_in_cgroup(folder, "memory.max", "memory.current", "inactive_file") for folder in folders]
    free.append(
        _free_in_cgroup(files / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    return [FreeMemory(size=size, source="the container's memory limit") for size in free if size is not None]


def _free_in_cgroup(folder: Path, limit_file: str, usage_file: str, cache: str) -> int | None:
    limit, usage = read_text(folder / limit_file).strip(), read_text(folder / usage_file).strip()
    if not limit.isdecimal() or not usage.isdecimal() or int(limit) >= _NO_LIMIT:
        return None
    files = re.search(rf"^{cache} (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(usage) + (int(files[1]) if files else 0))
