"""NVIDIA GPUs: which ones CUDA shows to this process, and their sensors through NVML.

CUDA's driver library numbers the GPUs: `cuda:0` is the first in CUDA_VISIBLE_DEVICES, or the fastest one unless
CUDA_DEVICE_ORDER is set. NVML, the library of nvidia-smi, numbers them by PCI bus and ignores both variables.
So a GPU is looked up in NVML by its PCI address. Only NVML has the sensors, and only CUDA knows `cuda:N`.

This needs neither torch nor the CUDA runtime, creates no CUDA context, changes no setting and does not raise. Without a
driver there are no GPUs. A sensor that the GPU or its driver does not have reads `None`: virtual GPUs, the NVML of a
Jetson and older drivers lack some.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_int
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov7_deploy.hardware.system import FreeMemory

try:
    import pynvml
except ModuleNotFoundError:  # GPUs run without it; only their sensors cannot be read
    pynvml = None

CUDA_DRIVER = "libcuda.so.1"
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76
_NAME_BYTES, _ADDRESS_BYTES = 256, 32
# nvml.h: nvmlClockType_t and nvmlTemperatureSensors_t.
_CLOCK_SM, _CLOCK_MEMORY = 1, 2
_TEMPERATURE_GPU = 0
# nvmlClocksEventReasons, "throttle reasons" before driver 535. Two reasons are not throttling: an idle GPU (1) and
# application clocks that were set (2).
THROTTLE_REASONS = {
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
}


# --- CUDA's driver library --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaGpu:
    """The GPU `cuda:index`.

    Attributes:
        index: Number in CUDA's order.
        name: `NVIDIA A10`.
        pci_bus_id: `0000:3b:00.0`.
        compute_capability: `8.6`.
    """

    index: int
    name: str
    pci_bus_id: str
    compute_capability: str


def list_cuda_gpus() -> tuple[CudaGpu, ...]:
    """Return the GPUs that CUDA shows to this process, in CUDA's order; empty without a driver."""
    count = c_int()
    try:
        cuda = ctypes.CDLL(CUDA_DRIVER)
        if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(byref(count)) != 0:
            return ()
        return tuple(gpu for index in range(count.value) if (gpu := _cuda_gpu(cuda, index)) is not None)
    except (OSError, AttributeError):  # the library is missing, or does not have these functions
        return ()


def _cuda_gpu(cuda: ctypes.CDLL, index: int) -> CudaGpu | None:
    device, major, minor = c_int(), c_int(), c_int()
    name, pci = ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(_ADDRESS_BYTES)
    if cuda.cuDeviceGet(byref(device), index) != 0 or cuda.cuDeviceGetName(name, _NAME_BYTES, device) != 0:
        return None
    cuda.cuDeviceGetPCIBusId(pci, _ADDRESS_BYTES, device)
    cuda.cuDeviceGetAttribute(byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(byref(minor), _MINOR, device)
    return CudaGpu(
        index=index,
        name=name.value.decode(errors="replace"),
        pci_bus_id=pci.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
    )


def supported_cuda_version() -> str:
    """Return the newest CUDA version that the driver supports, `12.8`; empty without a driver."""
    version = c_int()
    try:
        if ctypes.CDLL(CUDA_DRIVER).cuDriverGetVersion(byref(version)) != 0:
            return ""
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def driver_version() -> str:
    """Return the version of the loaded driver, `570.86.15`; empty where the kernel module does not show it."""
    try:
        text = DRIVER_VERSION.read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


# --- NVML -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledGpu:
    """An NVIDIA GPU of this machine; `compute_capability` is empty and `memory_gb` is `None` where not reported."""

    name: str
    compute_capability: str
    driver: str
    memory_gb: float | None


def list_installed_gpus() -> tuple[InstalledGpu, ...]:
    """Return the GPUs of this machine, also those that CUDA_VISIBLE_DEVICES hides.

    Where NVML is not available they are those that CUDA shows.
    """
    if _initialize_nvml():
        return tuple(
            InstalledGpu(
                name=gpu.name, compute_capability=gpu.compute_capability, driver=driver_version(), memory_gb=None
            )
            for gpu in list_cuda_gpus()
        )
    handles = (_query("nvmlDeviceGetHandleByIndex", index) for index in range(_query("nvmlDeviceGetCount") or 0))
    return tuple(_installed_gpu(handle) for handle in handles if handle is not None)


def _installed_gpu(handle: Any) -> InstalledGpu:  # noqa: ANN401 - an opaque handle of NVML
    capability = _query("nvmlDeviceGetCudaComputeCapability", handle)
    memory = _query("nvmlDeviceGetMemoryInfo", handle)
    return InstalledGpu(
        name=_query("nvmlDeviceGetName", handle) or "NVIDIA GPU",
        compute_capability="{}.{}".format(*capability) if capability else "",
        driver=_query("nvmlSystemGetDriverVersion") or "",
        memory_gb=round(memory.total / 1e9, 1) if memory else None,
    )


class NvmlGpu:
    """Sensors of one GPU.

    Attributes:
        name, pci_bus_id: As in `CudaGpu`.
    """

    def __init__(self, handle: Any, *, name: str, pci_bus_id: str) -> None:  # noqa: ANN401 - an opaque handle of NVML
        self._handle = handle
        self.name, self.pci_bus_id = name, pci_bus_id

    def power_w(self) -> float | None:
        """Power of the board, memory included; since Ampere (except A100) the mean over the last second."""
        return self._scaled(1000, "nvmlDeviceGetPowerUsage")

    def energy_j(self) -> float | None:
        """Energy of the board since the driver was loaded, on Volta and later; updated every 20 to 100 ms."""
        return self._scaled(1000, "nvmlDeviceGetTotalEnergyConsumption")

    def power_limit_w(self) -> float | None:
        """Power limit that the driver enforces."""
        return self._scaled(1000, "nvmlDeviceGetEnforcedPowerLimit")

    def sm_mhz(self) -> float | None:
        """Clock of the multiprocessors."""
        return self._scaled(1, "nvmlDeviceGetClockInfo", _CLOCK_SM)

    def max_sm_mhz(self) -> float | None:
        """Highest possible clock of the multiprocessors."""
        return self._scaled(1, "nvmlDeviceGetMaxClockInfo", _CLOCK_SM)

    def memory_mhz(self) -> float | None:
        """Clock of the memory."""
        return self._scaled(1, "nvmlDeviceGetClockInfo", _CLOCK_MEMORY)

    def application_clocks_mhz(self) -> tuple[int, int] | None:
        """Application clocks of memory and multiprocessors; `None` where the GPU does not have this setting."""
        memory, sm = (self._query("nvmlDeviceGetApplicationsClock", kind) for kind in (_CLOCK_MEMORY, _CLOCK_SM))
        return (memory, sm) if memory and sm else None

    def temperature_c(self) -> float | None:
        """Temperature of the GPU in degrees Celsius."""
        return self._scaled(1, "nvmlDeviceGetTemperature", _TEMPERATURE_GPU)

    def throttle_reasons(self) -> tuple[str, ...]:
        """Reasons why the clocks are reduced now."""
        mask = self._query("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:  # a driver before 535
            mask = self._query("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return tuple(reason for bit, reason in THROTTLE_REASONS.items() if mask & bit)

    def memory_used_bytes(self) -> int | None:
        """GPU memory that all programs use together, the driver included."""
        memory = self._query("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def memory_free_bytes(self) -> int | None:
        """GPU memory that is free."""
        memory = self._query("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.free)

    def persistence_mode(self) -> bool | None:
        """True if the driver stays loaded while the GPU is unused."""
        mode = self._query("nvmlDeviceGetPersistenceMode")
        return None if mode is None else mode == 1

    def _query(self, function: str, *arguments: int) -> Any | None:  # noqa: ANN401 - see `_query` below
        return _query(function, self._handle, *arguments)

    def _scaled(self, divisor: int, function: str, *arguments: int) -> float | None:
        value = self._query(function, *arguments)
        return None if value is None else value / divisor


def open_gpu(index: int) -> NvmlGpu | str:
    """Return the sensors of `cuda:index`, or a sentence that explains why NVML does not show that GPU."""
    gpu = next((gpu for gpu in list_cuda_gpus() if gpu.index == index), None)
    if gpu is None:
        return f"CUDA shows no GPU cuda:{index} to this process: nvidia-smi -L lists the installed ones."
    problem = _initialize_nvml()
    if problem:
        return f"The sensors of {gpu.name} are read through NVML. {problem}"
    try:
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(gpu.pci_bus_id)
    except pynvml.NVMLError as error:
        return f"NVML does not show {gpu.name} ({gpu.pci_bus_id}): {_described(error)}. See nvidia-smi."
    return NvmlGpu(handle, name=gpu.name, pci_bus_id=gpu.pci_bus_id)


def _initialize_nvml() -> str:
    """Initialize NVML, and return a description of the error; empty on success.

    It stays initialized until the process ends, as other libraries in the process may use it; NVML counts the calls.
    """
    if pynvml is None:
        return "Its Python library is not installed: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return (
            "libnvidia-ml.so.1 was not found: it comes with the driver; a container needs "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        )
    except pynvml.NVMLError as error:
        return f"It does not start: {_described(error)}. See nvidia-smi."
    return ""


def _query(function: str, *arguments: Any) -> Any | None:  # noqa: ANN401 - functions of NVML return numbers and structs
    """Return the result of an NVML function; `None` where it fails or does not exist in this driver or library."""
    try:
        return getattr(pynvml, function)(*arguments)
    except (pynvml.NVMLError, AttributeError):
        return None


def _described(error: Any) -> str:  # noqa: ANN401 - an NVMLError
    return f"{error} (error {error.value})"


def free_gpu_memory() -> FreeMemory | None:
    """Return the free memory of `cuda:0`; `None` where NVML does not report it."""
    gpu = open_gpu(0)
    size = None if isinstance(gpu, str) else gpu.memory_free_bytes()
    return None if size is None else FreeMemory(size=size, source="NVML")


# --- device names -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceName:
    """A parsed device name, as in PyTorch: `auto`, `cpu`, `cuda`, `cuda:N` or `N`.

    Attributes:
        kind: `auto`, `cpu`, `cuda`, or any other text unchanged, which a runtime accepts (`mps`) or rejects.
        index: Number of the GPU in CUDA's order; `None` for other kinds and where the name does not have a number.
    """

    kind: str
    index: int | None = None

    @property
    def cuda_index(self) -> int | None:
        """Number of the GPU, 0 for plain `cuda`; `None` if this is not a CUDA device."""
        return (self.index or 0) if self.kind == "cuda" else None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


def parse_device(text: str) -> DeviceName:
    """Return the parsed device name; a text of any other form becomes a kind of its own."""
    match = re.fullmatch(r"cuda|(?:cuda:)?([0-9]{1,3})", text)
    if match is None:
        return DeviceName(text)
    return DeviceName("cuda", None if match[1] is None else int(match[1]))
