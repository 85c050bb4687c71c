"""The GPU that an engine would be built on, asked of the driver itself.

Neither torch nor the CUDA runtime is needed. Without a driver there is no GPU, and nothing here raises.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_int
from dataclasses import dataclass
from pathlib import Path

DRIVER = "libcuda.so.1"
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildGpu:
    """The first GPU that CUDA sees: name, `8.6`, version of the driver, and the CUDA version the driver brings."""

    name: str
    compute_capability: str
    driver: str
    cuda: str


def read_gpu(library: str = DRIVER) -> BuildGpu | None:
    """The first GPU; `None` without a driver or without a GPU."""
    try:
        cuda = ctypes.CDLL(library)
        if cuda.cuInit(0) != 0:
            return None
        device = ctypes.c_int()
        name = ctypes.create_string_buffer(_NAME_BYTES)
        if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0 or cuda.cuDeviceGetName(name, _NAME_BYTES, device) != 0:
            return None
        major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        cuda.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # no such library, or one without these functions
        return None
    return BuildGpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        driver=_driver_version(),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _driver_version() -> str:
    try:
        text = DRIVER_VERSION.read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


# The NVIDIA GPUs that CUDA gives this process, in CUDA's own order.
#
# `cuda:0` is the first of these: CUDA_VISIBLE_DEVICES chooses and orders them, and without CUDA_DEVICE_ORDER the
# fastest comes first. nvidia-smi and NVML count otherwise, so the PCI address is what a GPU is known by to both.

_NAME_BYTES, _ADDRESS_BYTES = 256, 32


@dataclass(frozen=True, kw_only=True, slots=True)
class VisibleGpu:
    """`cuda:index`: its name and its PCI address, `0000:3b:00.0`."""

    index: int
    name: str
    pci: str


def read_visible_gpus(library: str = DRIVER) -> tuple[VisibleGpu, ...]:
    """All of them; none without a driver. No context is made on any."""
    count = c_int()
    try:
        cuda = ctypes.CDLL(library)
        if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(byref(count)) != 0:
            return ()
        return tuple(gpu for index in range(count.value) if (gpu := _gpu(cuda, index)) is not None)
    except (OSError, AttributeError):  # no such library, or one without these functions
        return ()


def _gpu(cuda: ctypes.CDLL, index: int) -> VisibleGpu | None:
    device = c_int()
    name, pci = ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(_ADDRESS_BYTES)
    if cuda.cuDeviceGet(byref(device), index) != 0:
        return None
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDeviceGetPCIBusId(pci, _ADDRESS_BYTES, device)
    return VisibleGpu(index=index, name=name.value.decode(errors="replace"), pci=pci.value.decode(errors="replace"))
