"""The sensors of an NVIDIA GPU by NVML, the library behind nvidia-smi; it comes with the driver.

Opened with ctypes, which leaves Python's lock while a call runs. Old drivers and the NVML of a Jetson lack functions
that others have, virtual GPUs lack sensors: what is not told is `None`. Nothing here changes a setting.

Names, numbers and units are those of nvml.h.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from typing import Any

from yolov7_deploy.hardware.gpu import DRIVER, read_visible_gpus

NVML = "libnvidia-ml.so.1"

_SUCCESS, _FUNCTION_NOT_FOUND = 0, 13  # nvmlReturn_t
_CLOCK_SM, _CLOCK_MEMORY = 1, 2  # nvmlClockType_t
_TEMPERATURE_GPU = 0
# nvmlClocksEventReasons, named "throttle reasons" up to driver 530. An idle GPU (1) is not held back, and clocks that
# somebody set (2) are a setting.
THROTTLE_REASONS = {
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
}


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class NvmlGpu:
    """One GPU.

    Attributes:
        name, pci: As CUDA tells them.
    """

    def __init__(self, library: ctypes.CDLL, handle: c_void_p, *, name: str, pci: str) -> None:
        self._library, self._handle = library, handle
        self.name, self.pci = name, pci

    def power_w(self) -> float | None:
        """Power of the board now, memory included; from Ampere on (but for the A100) its mean over the last second."""
        return _scaled(self._value("nvmlDeviceGetPowerUsage", c_uint()), 1000)

    def energy_j(self) -> float | None:
        """Energy that the board has taken since the driver was loaded, from Volta on; moves every 20 to 100 ms."""
        return _scaled(self._value("nvmlDeviceGetTotalEnergyConsumption", c_ulonglong()), 1000)

    def power_limit_w(self) -> float | None:
        """What the driver holds the board to."""
        return _scaled(self._value("nvmlDeviceGetEnforcedPowerLimit", c_uint()), 1000)

    def mhz(self) -> float | None:
        """Clock of the multiprocessors."""
        return _scaled(self._value("nvmlDeviceGetClockInfo", c_uint(), _CLOCK_SM))

    def mhz_max(self) -> float | None:
        """The highest clock that the multiprocessors can have."""
        return _scaled(self._value("nvmlDeviceGetMaxClockInfo", c_uint(), _CLOCK_SM))

    def memory_mhz(self) -> float | None:
        """Clock of the memory."""
        return _scaled(self._value("nvmlDeviceGetClockInfo", c_uint(), _CLOCK_MEMORY))

    def application_mhz(self) -> tuple[int, int] | None:
        """The clocks of memory and multiprocessors that applications run with, where the GPU has such a setting."""
        memory, sm = (
            self._value("nvmlDeviceGetApplicationsClock", c_uint(), kind) for kind in (_CLOCK_MEMORY, _CLOCK_SM)
        )
        return (memory, sm) if memory and sm else None

    def temperature_c(self) -> float | None:
        """Of the GPU."""
        return _scaled(self._value("nvmlDeviceGetTemperature", c_uint(), _TEMPERATURE_GPU))

    def throttle_reasons(self) -> tuple[str, ...]:
        """What holds the clocks back now, in words."""
        mask = None
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            mask = self._value(name, c_ulonglong()) if mask is None else mask
        return tuple(words for bit, words in THROTTLE_REASONS.items() if (mask or 0) & bit)

    def memory_used_bytes(self) -> int | None:
        """GPU memory that anybody uses, the driver included."""
        memory = _Memory()
        return int(memory.used) if self._call("nvmlDeviceGetMemoryInfo", byref(memory)) == _SUCCESS else None

    def persistent(self) -> bool | None:
        """Persistence mode: the driver stays loaded while nobody uses the GPU."""
        mode = self._value("nvmlDeviceGetPersistenceMode", c_uint())
        return None if mode is None else mode == 1

    def _value(self, function: str, result: c_uint | c_ulonglong, *arguments: int) -> int | None:
        """The one number that a function writes; `None` where it fails or does not exist."""
        done = self._call(function, *(c_uint(argument) for argument in arguments), byref(result))
        return int(result.value) if done == _SUCCESS else None

    def _call(self, function: str, *arguments: Any) -> int:  # noqa: ANN401 - any argument of a C function
        return _call(self._library, function, self._handle, *arguments)


def open_gpu(index: int, *, library: str = NVML, driver: str = DRIVER) -> NvmlGpu | str:
    """The GPU that CUDA calls `cuda:index`, or the sentence why NVML does not show it.

    Args:
        index: In CUDA's order, which CUDA_VISIBLE_DEVICES may have changed.
        library: NVML.
        driver: CUDA's driver library.
    """
    found = next((gpu for gpu in read_visible_gpus(driver) if gpu.index == index), None)
    if found is None:
        return f"CUDA shows no GPU cuda:{index} to this process: nvidia-smi -L lists what is here."
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return (
            f"The sensors of {found.name} are told by NVML, and {library} is not here: it comes with the driver; a "
            "container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        )
    status = _first(nvml, ("nvmlInit_v2", "nvmlInit"))
    handle = c_void_p()
    if status == _SUCCESS:
        names = ("nvmlDeviceGetHandleByPciBusId_v2", "nvmlDeviceGetHandleByPciBusId")
        status = _first(nvml, names, c_char_p(found.pci.encode()), byref(handle))
    if status != _SUCCESS:
        return f"NVML does not show {found.name} ({found.pci}): {_words(nvml, status)}. nvidia-smi says more."
    # NVML stays open until the process ends, as other libraries in it keep it; opening it again only counts.
    return NvmlGpu(nvml, handle, name=found.name, pci=found.pci)


def _call(library: ctypes.CDLL, function: str, *arguments: Any) -> int:  # noqa: ANN401 - any argument of a C function
    try:
        found = getattr(library, function)
    except AttributeError:
        return _FUNCTION_NOT_FOUND
    return int(found(*arguments))


def _first(library: ctypes.CDLL, functions: tuple[str, ...], *arguments: Any) -> int:  # noqa: ANN401 - see _call
    """Status of the first of these functions that the library has."""
    status = _FUNCTION_NOT_FOUND
    for function in functions:
        status = _call(library, function, *arguments)
        if status != _FUNCTION_NOT_FOUND:
            break
    return status


def _words(library: ctypes.CDLL, status: int) -> str:
    try:
        describe = library.nvmlErrorString
    except AttributeError:
        return f"error {status}"
    describe.argtypes, describe.restype = [c_int], c_char_p
    return f"{(describe(status) or b'').decode(errors='replace')} (error {status})"


def _scaled(value: int | None, divisor: int = 1) -> float | None:
    return None if value is None else value / divisor
