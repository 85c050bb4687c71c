"""Memory in use: of a GPU by anybody, of this process at its peak."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

from yolov7_deploy.hardware.gpu import DRIVER
from yolov7_deploy.hardware.jetson import ROOT, read_board, read_text
from yolov7_deploy.hardware.nvml import NVML, open_gpu

_RESET_PEAK = "5"  # proc(5), clear_refs


def gpu_memory_used(device: str, *, root: Path = ROOT, library: str = NVML, driver: str = DRIVER) -> int | None:
    """Bytes that all programs together use on a GPU; `None` for `cpu` and where nothing tells.

    Only the difference of two readings says what a model takes. A Jetson has one memory for processor and GPU: there
    it is what the whole board uses, so other programs and the images of this one are in the difference.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, as CUDA counts.
        root: The folder that `proc` and `etc` are looked for in.
        library: NVML.
        driver: CUDA's driver library.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        return None
    if read_board(root=root) is not None:
        return _memory_in_use(root)
    gpu = open_gpu(int(index or 0), library=library, driver=driver)
    return None if isinstance(gpu, str) else gpu.memory_used_bytes()


def host_peak_bytes(root: Path = ROOT) -> int:
    """The most main memory that this process has held at once, since it began or since `reset_host_peak`."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", read_text(root / "proc/self/status"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_host_peak(root: Path = ROOT) -> bool:
    """Lets the peak begin anew at what is held now; `False` where the system does not allow that."""
    try:
        (root / "proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _memory_in_use(root: Path) -> int | None:
    text = read_text(root / "proc/meminfo")
    total, free = (re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE) for name in ("MemTotal", "MemAvailable"))
    return (int(total[1]) - int(free[1])) * 1024 if total and free else None
