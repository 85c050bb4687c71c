"""Clocks, temperatures and throttling of a device while something runs.

Readings change nothing and are taken in a thread. Sources: NVML for a GPU; /sys for a CPU, or /proc/cpuinfo in virtual
machines that do not show frequency scaling; /sys for a Jetson, or tegrastats where a container hides /sys.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from yolov7_deploy.hardware.gpu import NvmlGpu, open_gpu, parse_device
from yolov7_deploy.hardware.jetson import (
    MIN_TEMPERATURE_C,
    Tegrastats,
    TegrastatsSample,
    find_tegrastats,
    read_board,
    read_tegrastats,
)
from yolov7_deploy.hardware.system import (
    ROOT,
    CommandRunner,
    PeriodicSampler,
    read_number,
    read_text,
    read_word,
    run_command,
)

# 57000000.gpu (Nano), 17000000.gp10b (TX2), .gv11b (Xavier), .ga10b or .gpu (Orin), gpu-gpc-0 (Thor, whose other
# domain gpu-nvd-0 is video).
_JETSON_GPU = re.compile(r"\d+\.(?:gpu|g[a-z]\d\d[a-z])|gpu-gpc-\d+")
# Reading the clock of a core can interrupt that core, so readings are rare and of some cores only.
PERIOD_S = 0.25
MAX_CORES = 16
_CORES = "sys/devices/system/cpu"
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower")  # hwmon drivers of Intel and AMD
# soctherm_oc of Orin and Thor (developer guide, "Power and Performance": over-current events).
_OVER_CURRENT = {
    "oc1_event_cnt": "under-voltage",
    "oc2_event_cnt": "average over-current",
    "oc3_event_cnt": "over-current",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """Clocks and limits during one measurement; what a machine does not report is `None` or empty.

    Attributes:
        source: `NVML`, `sysfs`, `/proc/cpuinfo` or `tegrastats`.
        mhz: Median clock, of the multiprocessors of a GPU or of the fastest core of a CPU at each reading.
        mhz_max: Limit of that clock; on a Jetson the limit of its power mode.
        memory_mhz: Median clock of the memory.
        temperature_c: Highest temperature.
        power_limit_w: Enforced power limit of the board.
        throttled: Reasons for throttling at any reading; empty where there was none or none is reported.
        mode: Power mode of a board, or frequency governor of a CPU.
    """

    source: str
    mhz: float | None = None
    mhz_max: float | None = None
    memory_mhz: float | None = None
    temperature_c: float | None = None
    power_limit_w: float | None = None
    throttled: tuple[str, ...] = ()
    mode: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockReading:
    """The clocks at one moment; `events` are counters that grow while something throttles."""

    mhz: float | None = None
    memory_mhz: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    events: tuple[tuple[str, int], ...] = ()


OnReading = Callable[[ClockReading], None]
ReadingSource = Callable[[OnReading], AbstractContextManager[object]]


class ClockMonitor:
    """Reads clocks inside a `with` block; it can be entered again for the next measurement.

    Args:
        constants: Values that do not change during a measurement.
        source: Creates a context manager that passes readings to a function.
    """

    def __init__(self, constants: Clocks, source: ReadingSource) -> None:
        self._constants, self._source = constants, source
        self._readings: list[ClockReading] = []
        self._open = ExitStack()

    @property
    def clocks(self) -> Clocks:
        """Summary of the readings since the monitor was last entered."""
        readings = list(self._readings)
        reported = [reason for reading in readings for reason in reading.throttled]
        first = dict(readings[0].events) if readings else {}
        last = dict(readings[-1].events) if readings else {}
        counted = [reason for reason, count in last.items() if count > first.get(reason, count)]
        return replace(
            self._constants,
            mhz=_median([reading.mhz for reading in readings]),
            memory_mhz=_median([reading.memory_mhz for reading in readings]),
            temperature_c=_max([reading.temperature_c for reading in readings]),
            throttled=tuple(dict.fromkeys([*reported, *counted])),
        )

    def __enter__(self) -> ClockMonitor:
        self._readings = []
        self._open.enter_context(self._source(self._readings.append))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def open_clock_monitor(
    device: str, *, root: Path = ROOT, run: CommandRunner = run_command, tegrastats: str | None = None
) -> ClockMonitor | None:
    """Return a monitor for the clocks of a device; `None` where they cannot be read.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, numbered as by CUDA.
        root: Folder that contains `proc`, `etc` and `sys`.
        run: Runs a command and returns its output.
        tegrastats: Path of the program; searched for if `None`.
    """
    if device == "cpu":
        return _cpu_monitor(root, run)
    index = parse_device(device).cuda_index
    if index is None:
        return None
    if read_board(root=root, run=run) is not None:
        return _jetson_monitor(root, run, tegrastats or find_tegrastats())
    gpu = open_gpu(index)
    return None if isinstance(gpu, str) else _gpu_monitor(gpu)


# --- GPU --------------------------------------------------------------------------------------------------------------


def _gpu_monitor(gpu: NvmlGpu) -> ClockMonitor:
    def read() -> ClockReading:
        return ClockReading(
            mhz=gpu.sm_mhz(),
            memory_mhz=gpu.memory_mhz(),
            temperature_c=gpu.temperature_c(),
            throttled=gpu.throttle_reasons(),
        )

    constants = Clocks(source="NVML", mhz_max=gpu.max_sm_mhz(), power_limit_w=gpu.power_limit_w())
    return ClockMonitor(constants, _periodic(read))


# --- CPU --------------------------------------------------------------------------------------------------------------


def _cpu_monitor(root: Path, run: CommandRunner) -> ClockMonitor | None:
    scaled = sorted((root / _CORES).glob("cpu[0-9]*/cpufreq"), key=lambda path: int(path.parent.name[3:]))
    scaled = scaled[:: -(-len(scaled) // MAX_CORES) or 1]
    sensors = [path.with_name("temp1_input") for path in _hwmon_names(root) if read_word(path) in _CPU_SENSORS]
    throttle_counts = sorted((root / _CORES).glob("cpu[0-9]*/thermal_throttle/package_throttle_count"))

    def read() -> ClockReading:
        clocks = [_scaled(read_number(path / "scaling_cur_freq"), 1000) for path in scaled] or _cpuinfo_mhz(root)
        counts = [count for path in throttle_counts if (count := read_number(path)) is not None]
        return ClockReading(
            mhz=_max(clocks),
            temperature_c=_max([_temperature_c(path) for path in sensors]),
            events=(("CPU too hot", sum(counts)),) if counts else (),
        )

    first = read()
    if first.mhz is None and first.temperature_c is None:
        return None
    limits = [_scaled(read_number(path / "cpuinfo_max_freq"), 1000) for path in scaled]
    governors = dict.fromkeys(word for path in scaled if (word := read_word(path / "scaling_governor")))
    board = read_board(root=root, run=run)
    modes = [*governors, *([board.mode.name] if board and board.mode else [])]
    source = "sysfs" if scaled or first.mhz is None else "/proc/cpuinfo"
    return ClockMonitor(Clocks(source=source, mhz_max=_max(limits), mode=", ".join(modes)), _periodic(read))


def _hwmon_names(root: Path) -> list[Path]:
    return sorted((root / "sys/class/hwmon").glob("hwmon*/name"))


def _cpuinfo_mhz(root: Path) -> list[float | None]:
    """Return the clock of each core from /proc/cpuinfo; a virtual machine often shows the nominal one."""
    found = re.findall(r"^cpu MHz\s*:\s*(\d+(?:\.\d+)?)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return [float(text) for text in found if float(text) > 0]


# --- Jetson -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class JetsonGpuClock:
    """The GPU clock of a Jetson in MHz, and the limits that its power mode sets."""

    folder: Path
    mhz: float
    min_mhz: float
    max_mhz: float

    @property
    def fixed(self) -> bool:
        """True if the clock cannot change, as after `sudo jetson_clocks`."""
        return self.min_mhz == self.max_mhz


def read_jetson_gpu_clock(root: Path = ROOT) -> JetsonGpuClock | None:
    """Return the GPU clock of a Jetson; `None` on other machines and where it is hidden."""
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        now, low, high = (_scaled(read_number(folder / f"{name}_freq"), 1_000_000) for name in ("cur", "min", "max"))
        if _JETSON_GPU.fullmatch(folder.name) and now is not None and low is not None and high is not None:
            return JetsonGpuClock(folder=folder, mhz=now, min_mhz=low, max_mhz=high)
    return None


def _jetson_monitor(root: Path, run: CommandRunner, tegrastats: str | None) -> ClockMonitor | None:
    board = read_board(root=root, run=run)
    mode = board.mode.name if board and board.mode else ""
    clock = read_jetson_gpu_clock(root)
    if clock is None:
        sample = read_tegrastats(tegrastats) if tegrastats else None
        if tegrastats is None or sample is None or (sample.gpu_mhz is None and sample.temperature_c is None):
            return None
        return ClockMonitor(Clocks(source="tegrastats", mode=mode), _from_tegrastats(tegrastats))
    folder = clock.folder
    zones = [path.parent / "temp" for path in _files_with(root / "sys/class/thermal", "thermal_zone*/type", "gpu")]
    alerts = _files_with(root / "sys/class/thermal", "cooling_device*/type", "throttle-alert")
    counters = sorted((root / "sys/class/hwmon").glob("hwmon*/oc[123]_event_cnt"))

    def read() -> ClockReading:
        active = [path for path in alerts if read_number(path.parent / "cur_state")]
        counts = [(_OVER_CURRENT[path.name], read_number(path)) for path in counters]
        return ClockReading(
            mhz=_scaled(read_number(folder / "cur_freq"), 1_000_000),
            temperature_c=_max([_temperature_c(path) for path in zones]),
            throttled=tuple(f"{read_word(path).removesuffix('-throttle-alert')} too hot" for path in active),
            events=tuple((reason, count) for reason, count in counts if count is not None),
        )

    mode = ", ".join(filter(None, (mode, "clocks fixed by jetson_clocks" if clock.fixed else "")))
    return ClockMonitor(Clocks(source="sysfs", mhz_max=clock.max_mhz, mode=mode), _periodic(read))


def _files_with(folder: Path, pattern: str, text: str) -> list[Path]:
    """Return the files of this name pattern that contain a text, in any case."""
    return [path for path in sorted(folder.glob(pattern)) if text in read_word(path).lower()]


def _from_tegrastats(program: str) -> ReadingSource:
    def source(add: OnReading) -> AbstractContextManager[object]:
        def on_sample(sample: TegrastatsSample) -> None:
            add(ClockReading(mhz=sample.gpu_mhz, memory_mhz=sample.memory_mhz, temperature_c=sample.temperature_c))

        return Tegrastats(on_sample, program=program)

    return source


# --- readings ---------------------------------------------------------------------------------------------------------


def _periodic(read: Callable[[], ClockReading]) -> ReadingSource:
    def source(add: OnReading) -> AbstractContextManager[object]:
        return PeriodicSampler(lambda: add(read()), period_s=PERIOD_S)

    return source


def _temperature_c(path: Path) -> float | None:
    """Return a temperature in degrees Celsius; the file of a part that is switched off is missing or contains -256."""
    value = _scaled(read_number(path), 1000)
    return value if value is not None and value > MIN_TEMPERATURE_C else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _max(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _scaled(value: int | None, divisor: int) -> float | None:
    return None if value is None else value / divisor
