"""The NVIDIA GPUs that CUDA gives this process, in CUDA's own order.

`cuda:0` is the first of these: CUDA_VISIBLE_DEVICES chooses and orders them, and without CUDA_DEVICE_ORDER the fastest
comes first. nvidia-smi and NVML count otherwise, so the PCI address is what a GPU is known by to both.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int
from dataclasses import dataclass

from yolov7_deploy.machine.gpu import DRIVER

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
