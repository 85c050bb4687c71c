"""This machine: system, CPU, memory, NVIDIA GPUs and Jetson boards.

What a machine does not have or does not report is left empty; nothing here raises.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.hardware.gpu import InstalledGpu, list_installed_gpus, open_gpu, parse_device
from yolov7_deploy.hardware.jetson import jetpack_name, read_board
from yolov7_deploy.hardware.system import ROOT, read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Jetson:
    """A Jetson board: `l4t` is the version of its Linux, `jetpack` the JetPack release that contains it."""

    model: str
    l4t: str
    jetpack: str
    compute_capability: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine that this process runs on.

    Attributes:
        system: Operating system with its version.
        architecture: `x86_64`, `aarch64`, ...
        cpu: Name of the CPU.
        cores: Logical cores of the machine.
        usable_cores: Logical cores that this process may run on.
        memory_gb: Main memory in units of 10^9 bytes; `None` where the system does not show it.
        gpus: NVIDIA GPUs.
        jetson: `None` on other machines.
    """

    system: str
    architecture: str
    cpu: str
    cores: int
    usable_cores: int
    memory_gb: float | None
    gpus: tuple[InstalledGpu, ...]
    jetson: Jetson | None

    @property
    def has_gpu(self) -> bool:
        """True if there is an NVIDIA GPU, discrete or integrated."""
        return bool(self.gpus) or self.jetson is not None

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities of the GPUs, as far as they are known."""
        known = [gpu.compute_capability for gpu in self.gpus]
        known += [self.jetson.compute_capability] if self.jetson else []
        return tuple(dict.fromkeys(text for text in known if text))


def read_machine(root: Path = ROOT) -> Machine:
    """Return a description of this machine. `root` is the folder that contains `proc` and `etc`."""
    cores = os.cpu_count() or 1
    return Machine(
        system=_system(root),
        architecture=platform.machine(),
        cpu=_cpu(root),
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        memory_gb=_memory_gb(root),
        gpus=list_installed_gpus(),
        jetson=read_jetson(root),
    )


def read_jetson(root: Path = ROOT) -> Jetson | None:
    """Return the Jetson board, recognised by its device tree or the release file of its Linux; else `None`."""
    board = read_board(root=root)
    if board is None:
        return None
    return Jetson(
        model=board.model,
        l4t=board.l4t,
        jetpack=jetpack_name(board.l4t),
        compute_capability=board.compute_capability,
    )


def _system(root: Path) -> str:
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]*)', read_text(root / "etc/os-release"), re.MULTILINE)
    kernel = f"{platform.system()} {platform.release()}"
    return f"{pretty[1]} ({kernel})" if pretty else kernel


def _cpu(root: Path) -> str:
    # ARM boards write "Model" or nothing here.
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def find_int8_target(root: Path = ROOT, *, use_gpu: bool = True) -> str:
    """Return the INT8 target of this machine, or of its CPU without `use_gpu`; see `Int8Options`."""
    if use_gpu and (read_board(root=root) is not None or list_installed_gpus()):
        return "tensorrt"
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "arm"
    return "cpu"


# --- memory -----------------------------------------------------------------------------------------------------------


def gpu_memory_used(device: str, *, root: Path = ROOT) -> int | None:
    """Return the bytes that all programs together use on a GPU; `None` for a CPU and where it cannot be read.

    The memory of a model is the difference of two readings. CPU and GPU of a Jetson share one memory: there this is
    what the whole board uses, so other programs and the images of this process are part of the difference.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, numbered as by CUDA.
        root: Folder that contains `proc` and `etc`.
    """
    index = parse_device(device).cuda_index
    if index is None:
        return None
    if read_board(root=root) is not None:
        total, available = _meminfo_bytes(root, "MemTotal"), _meminfo_bytes(root, "MemAvailable")
        return None if total is None or available is None else total - available
    gpu = open_gpu(index)
    return None if isinstance(gpu, str) else gpu.memory_used_bytes()


def host_peak_bytes(root: Path = ROOT) -> int:
    """Return the peak resident memory of this process, since it started."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", read_text(root / "proc/self/status"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    import resource  # Windows does not have it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory_gb(root: Path) -> float | None:
    total = _meminfo_bytes(root, "MemTotal")
    return None if total is None else round(total / 1e9, 1)


def _meminfo_bytes(root: Path, name: str) -> int | None:
    found = re.search(rf"^{name}:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
