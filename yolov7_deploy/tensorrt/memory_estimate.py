"""How much memory a build is going to take, and how much there is.

The prediction is an estimate from four known sizes: the libraries, the model, its activations and the workspace. Of
TensorRT-RTX it was fitted to builds of two models; of TensorRT it rests on what its builder logs about itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.hardware.jetson import ROOT, Run, read_text, run_command, version_numbers
from yolov7_deploy.tensorrt.build_record import Product

MIB = 2**20
GIB = 2**30

# Host memory of the process while TensorRT-RTX 1.7.1 builds: 317 MiB for a model of 23.8 MiB (yolov7-tiny), 790 MiB
# for one of 141.3 MiB (yolov7). That is four times the model (as read, as parsed, as built, as serialized) and:
_RTX_LIBRARIES = 225 * MIB
_MODEL_COPIES = 4
# What builders logged as "Init CUDA" plus "Init builder kernel library": about 600 MiB with 8.5, 1.0 to 1.6 GiB with
# 8.6, 1.7 to 2.7 GiB from 9 on. On a Jetson less than half: its packages hold the kernels of one GPU.
_LIBRARIES = (((9,), 2304 * MIB), ((8, 6), 1331 * MIB), ((0,), 640 * MIB))
_JETSON_SHARE = 0.5
# Context, kernels and the allocator's blocks: 300 to 650 MiB in the same logs.
_CONTEXT = 512 * MIB
# Tensors that live at one time, per pixel of the input: 384 bytes in yolov7 as float32 (64 in yolov7-tiny).
_BYTES_PER_PIXEL = 400
# What convolutions ask for where the workspace has no limit.
_USUAL_WORKSPACE = 512 * MIB
# A cgroup without a limit says a number near 2**63.
_NO_LIMIT = 2**60


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildMemory:
    """What a build is predicted to take.

    Attributes:
        host_bytes: Main memory of the process that builds.
        device_bytes: GPU memory without the workspace; 0 where the build does not use the GPU.
        workspace_bytes: What comes on top of that at most, or usually where no limit was given.
        parts: What was added up, in words.
    """

    host_bytes: int
    device_bytes: int
    workspace_bytes: int
    parts: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeMemory:
    """Memory that a new process can have, and who says so."""

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
    """The memory of a build, estimated.

    Args:
        product, tensorrt: Which TensorRT builds, and its version.
        model_bytes: Size of the ONNX model.
        input_pixels: Height times width times the largest batch.
        workspace_bytes: Limit given to TensorRT; 0 for none.
        on_jetson: Its TensorRT is the smaller one of a JetPack.
    """
    if product == "tensorrt_rtx":
        libraries, device, workspace = _RTX_LIBRARIES, 0, 0
    else:
        whole = next((size for first, size in _LIBRARIES if version_numbers(tensorrt) >= first), _LIBRARIES[0][1])
        libraries = int(whole * _JETSON_SHARE) if on_jetson else whole
        device = _CONTEXT + model_bytes + input_pixels * _BYTES_PER_PIXEL
        workspace = workspace_bytes or _USUAL_WORKSPACE
    parts = [f"libraries {in_gib(libraries)}", f"{_MODEL_COPIES} copies of the model's {in_gib(model_bytes)}"]
    if device:
        parts += [
            f"CUDA {in_gib(_CONTEXT)}",
            f"weights and activations on the GPU {in_gib(device - _CONTEXT)}",
            f"workspace {in_gib(workspace)}",
        ]
    return BuildMemory(
        host_bytes=libraries + _MODEL_COPIES * model_bytes,
        device_bytes=device,
        workspace_bytes=workspace,
        parts=" + ".join(parts),
    )


def free_host_memory(*, root: Path = ROOT) -> FreeMemory | None:
    """What the system or the container's limit leaves, whichever is less; `None` where neither tells."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    known = [FreeMemory(size=int(found[1]) * 1024, source="MemAvailable")] if found else []
    return min([*known, *_cgroups(root)], key=lambda memory: memory.size, default=None)


def free_gpu_memory(*, run: Run = run_command) -> FreeMemory | None:
    """Free memory of the first GPU as nvidia-smi says it; `None` where it does not, as on a Jetson."""
    answer = run(["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]) or ""
    line = answer.strip().partition("\n")[0].strip()
    return FreeMemory(size=int(line) * MIB, source="nvidia-smi") if line.isdecimal() else None


def in_gib(size: int) -> str:
    """`1.5 GiB`, or `290 MiB` below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def _cgroups(root: Path) -> list[FreeMemory]:
    """What every control group above this process leaves, of both versions; pages of files count as free."""
    files = root / "sys/fs/cgroup"
    group = re.search(r"^0::(/\S*)", read_text(root / "proc/self/cgroup"), re.MULTILINE)
    path = group[1].strip("/") if group else ""
    folders = [files / path, *(files / parent for parent in Path(path).parents)] if path else [files]
    left = [_left(folder, "memory.max", "memory.current", "inactive_file") for folder in folders]
    left.append(_left(files / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return [FreeMemory(size=size, source="the container's memory limit") for size in left if size is not None]


def _left(folder: Path, limit_file: str, usage_file: str, cache: str) -> int | None:
    limit, usage = read_text(folder / limit_file).strip(), read_text(folder / usage_file).strip()
    if not limit.isdecimal() or not usage.isdecimal() or int(limit) >= _NO_LIMIT:
        return None
    files = re.search(rf"^{cache} (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(usage) + (int(files[1]) if files else 0))
