"""The machine under the feet: system, processor, memory, NVIDIA GPUs and Jetson boards.

What a machine does not have or does not tell is left empty; nothing here raises.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.hardware.jetson import ROOT, jetpack_name, read_board, read_text

SMI_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One NVIDIA GPU as nvidia-smi lists it; `compute_capability` is empty with drivers that do not tell it."""

    name: str
    compute_capability: str
    driver: str
    memory_gb: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Jetson:
    """A Jetson board: `l4t` is the version of its Linux, `jetpack` the release that brought it."""

    model: str
    l4t: str
    jetpack: str
    compute_capability: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where we run.

    Attributes:
        system: Operating system with its version.
        architecture: `x86_64`, `aarch64`, ...
        cpu: Name of the processor.
        cores: Logical processors of the machine.
        usable_cores: Those this process may run on.
        memory_gb: Main memory in units of 10^9 bytes; `None` where the system does not tell.
        gpus: NVIDIA GPUs.
        jetson: `None` on other machines.
    """

    system: str
    architecture: str
    cpu: str
    cores: int
    usable_cores: int
    memory_gb: float | None
    gpus: tuple[Gpu, ...]
    jetson: Jetson | None

    @property
    def has_gpu(self) -> bool:
        """There is an NVIDIA GPU, in a slot or on the board."""
        return bool(self.gpus) or self.jetson is not None

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities of the GPUs, as far as they are known."""
        known = [gpu.compute_capability for gpu in self.gpus]
        known += [self.jetson.compute_capability] if self.jetson else []
        return tuple(dict.fromkeys(text for text in known if text))


def read_machine(root: Path = ROOT) -> Machine:
    """This machine. `root` is the folder that `proc` and `etc` are looked for in."""
    cores = os.cpu_count() or 1
    return Machine(
        system=_system(root),
        architecture=platform.machine(),
        cpu=_cpu(root),
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        memory_gb=_memory_gb(root),
        gpus=read_gpus(),
        jetson=read_jetson(root),
    )


def read_gpus() -> tuple[Gpu, ...]:
    """What nvidia-smi lists; none where it is absent, hangs or finds no driver."""
    for fields in (("name", "driver_version", "memory.total", "compute_cap"), ("name", "driver_version")):
        lines = _smi(fields)
        if lines is not None:
            return tuple(gpu for line in lines if (gpu := _gpu(line)) is not None)
    return ()


def read_jetson(root: Path = ROOT) -> Jetson | None:
    """The board, told by its device tree or by the release file of its Linux."""
    board = read_board(root=root)
    if board is None:
        return None
    return Jetson(
        model=board.model,
        l4t=board.l4t,
        jetpack=jetpack_name(board.l4t),
        compute_capability=board.compute_capability,
    )


def _smi(fields: tuple[str, ...]) -> list[str] | None:
    """The lines of a query; `None` if nvidia-smi is absent or refuses it, as old ones do with unknown fields."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.splitlines()


def _gpu(line: str) -> Gpu | None:
    name, driver, memory, capability = ([part.strip() for part in line.split(",")] + ["", "", ""])[:4]
    if not name or not driver:
        return None
    # On a Jetson several fields are "[N/A]".
    return Gpu(
        name=name,
        compute_capability=capability if re.fullmatch(r"\d+\.\d+", capability) else "",
        driver=driver,
        memory_gb=round(int(memory) * 2**20 / 1e9, 1) if memory.isdigit() else None,
    )


def _system(root: Path) -> str:
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]*)', read_text(root / "etc/os-release"), re.MULTILINE)
    kernel = f"{platform.system()} {platform.release()}"
    return f"{pretty[1]} ({kernel})" if pretty else kernel


def _cpu(root: Path) -> str:
    # ARM boards say "Model" or nothing here.
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_gb(root: Path) -> float | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    return round(int(found[1]) * 1024 / 1e9, 1) if found else None
