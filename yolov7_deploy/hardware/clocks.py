"""Clocks, temperatures and what holds them back, watched while something runs.

A reading changes nothing and is taken by a thread: of a GPU by NVML, of a processor from /sys and, in virtual machines
that show no scaling, from /proc/cpuinfo, of a Jetson from /sys or, where a container hides that, from tegrastats.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from yolov7_deploy.hardware.gpu import DRIVER
from yolov7_deploy.hardware.jetson import ROOT, Run, read_board, read_text, run_command
from yolov7_deploy.hardware.nvml import NVML, NvmlGpu, open_gpu
from yolov7_deploy.hardware.sampling import Sampler, read_number, read_word
from yolov7_deploy.hardware.tegrastats import ABSENT_BELOW_C, Tegrastats, TegrastatsSample, find_program, read_one_line

# 57000000.gpu (Nano), 17000000.gp10b (TX2), .gv11b (Xavier), .ga10b or .gpu (Orin), gpu-gpc-0 (Thor, whose other
# domain gpu-nvd-0 is video).
_GPU = re.compile(r"\d+\.(?:gpu|g[a-z]\d\d[a-z])|gpu-gpc-\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuClock:
    """A scaled clock in MHz: now, and the limits it moves between, which the power mode sets."""

    folder: Path
    mhz: float
    least_mhz: float
    most_mhz: float

    @property
    def pinned(self) -> bool:
        """It cannot move, as after `sudo jetson_clocks`."""
        return self.least_mhz == self.most_mhz


def read_gpu_clock(root: Path = ROOT) -> GpuClock | None:
    """The clock now; `None` on other machines and where it is not shown."""
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        numbers = [read_number(folder / f"{name}_freq") for name in ("cur", "min", "max")]
        now, least, most = (None if number is None else number / 1e6 for number in numbers)
        if _GPU.fullmatch(folder.name) and now is not None and least is not None and most is not None:
            return GpuClock(folder=folder, mhz=now, least_mhz=least, most_mhz=most)
    return None


# Reading a core's clock can interrupt that core, so this is seldom and of some cores only.
PERIOD_S = 0.25
MOST_CORES = 16
_CORES = "sys/devices/system/cpu"
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower")  # hwmon drivers of Intel and AMD
# soctherm_oc of Orin and Thor (developer guide, "Power and Performance": over-current events).
_OVER_CURRENT = {
    "oc1_event_cnt": "supply voltage too low",
    "oc2_event_cnt": "mean current too high",
    "oc3_event_cnt": "current too high",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """Clocks and limits over one measurement; what a machine does not tell is `None` or empty.

    Attributes:
        source: What told it: `NVML`, `sysfs`, `/proc/cpuinfo`, `tegrastats`.
        mhz: Median seen; of a GPU's multiprocessors, or of the fastest processor core at each reading.
        mhz_max: The limit of that clock; on a Jetson the one of its power mode.
        memory_mhz: Median of the memory's clock.
        temperature_c: Highest seen.
        power_limit_w: Enforced limit of the board.
        throttled: What held it back at any reading, in words; empty where nothing did, or nothing tells.
        mode: Power mode of a board, or governor of a processor.
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
class Reading:
    """One moment; `events` are counters that only grow while something throttles."""

    mhz: float | None = None
    memory_mhz: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    events: tuple[tuple[str, int], ...] = ()


Take = Callable[[Reading], None]
Feed = Callable[[Take], AbstractContextManager[object]]


class ClockWatch(Protocol):
    """Watches between `with` and its end; afterwards it can be entered again."""

    @property
    def state(self) -> Clocks:
        """What was seen since it was entered last."""

    def __enter__(self) -> ClockWatch:
        """Begins to watch."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it, however the work ended."""


class ClockMonitor:
    """A watch that makes its state of readings.

    Args:
        fixed: What does not change while it runs.
        feed: Given a place for readings, what brings them there between `with` and its end.
    """

    def __init__(self, fixed: Clocks, feed: Feed) -> None:
        self._fixed, self._feed = fixed, feed
        self._readings: list[Reading] = []
        self._open = ExitStack()

    @property
    def state(self) -> Clocks:
        """See `ClockWatch`."""
        readings = list(self._readings)
        now = [word for reading in readings for word in reading.throttled]
        first = dict(readings[0].events) if readings else {}
        last = dict(readings[-1].events) if readings else {}
        grown = [word for word, count in last.items() if count > first.get(word, count)]
        return Clocks(
            source=self._fixed.source,
            mhz=_median([reading.mhz for reading in readings]),
            mhz_max=self._fixed.mhz_max,
            memory_mhz=_median([reading.memory_mhz for reading in readings]),
            temperature_c=max((r.temperature_c for r in readings if r.temperature_c is not None), default=None),
            power_limit_w=self._fixed.power_limit_w,
            throttled=tuple(dict.fromkeys([*now, *grown])),
            mode=self._fixed.mode,
        )

    def __enter__(self) -> ClockMonitor:
        self._readings = []
        self._open.enter_context(self._feed(self._readings.append))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def open_clock_watch(
    device: str,
    *,
    root: Path = ROOT,
    run: Run = run_command,
    library: str = NVML,
    driver: str = DRIVER,
    program: str | None = None,
) -> ClockWatch | None:
    """What watches the clocks of a device; `None` where nothing tells them.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, as CUDA counts.
        root: The folder that `proc`, `etc` and `sys` are looked for in.
        run: Runs a command and gives its output.
        library: NVML.
        driver: CUDA's driver library.
        program: tegrastats; `None` looks for it.
    """
    if device == "cpu":
        return _processor_watch(root, run)
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        return None
    if read_board(root=root, run=run) is not None:
        return _board_watch(root, run, program or find_program())
    gpu = open_gpu(int(index or 0), library=library, driver=driver)
    return None if isinstance(gpu, str) else _gpu_watch(gpu)


# --- GPU --------------------------------------------------------------------------------------------------------------


def _gpu_watch(gpu: NvmlGpu) -> ClockWatch:
    def read() -> Reading:
        return Reading(
            mhz=gpu.mhz(),
            memory_mhz=gpu.memory_mhz(),
            temperature_c=gpu.temperature_c(),
            throttled=gpu.throttle_reasons(),
        )

    return ClockMonitor(Clocks(source="NVML", mhz_max=gpu.mhz_max(), power_limit_w=gpu.power_limit_w()), _sampled(read))


# --- processor --------------------------------------------------------------------------------------------------------


def _processor_watch(root: Path, run: Run) -> ClockWatch | None:
    scaled = sorted((root / _CORES).glob("cpu[0-9]*/cpufreq"), key=lambda path: int(path.parent.name[3:]))
    scaled = scaled[:: -(-len(scaled) // MOST_CORES) or 1]
    sensors = [
        path.with_name("temp1_input")
        for path in sorted((root / "sys/class/hwmon").glob("hwmon*/name"))
        if read_word(path) in _CPU_SENSORS
    ]
    slowed = sorted((root / _CORES).glob("cpu[0-9]*/thermal_throttle/package_throttle_count"))

    def read() -> Reading:
        clocks = [_scaled(read_number(path / "scaling_cur_freq"), 1000) for path in scaled] or _cpuinfo_mhz(root)
        degrees = [_degrees(path) for path in sensors]
        counts = [count for path in slowed if (count := read_number(path)) is not None]
        return Reading(
            mhz=_highest(clocks),
            temperature_c=_highest(degrees),
            events=(("processor too hot", sum(counts)),) if counts else (),
        )

    first = read()
    if first.mhz is None and first.temperature_c is None:
        return None
    limits = [_scaled(read_number(path / "cpuinfo_max_freq"), 1000) for path in scaled]
    governors = dict.fromkeys(word for path in scaled if (word := read_word(path / "scaling_governor")))
    board = read_board(root=root, run=run)
    modes = [*governors, *([board.mode.name] if board and board.mode else [])]
    source = "sysfs" if scaled or first.mhz is None else "/proc/cpuinfo"
    return ClockMonitor(Clocks(source=source, mhz_max=_highest(limits), mode=", ".join(modes)), _sampled(read))


def _cpuinfo_mhz(root: Path) -> list[float | None]:
    """The clock of each core as /proc/cpuinfo has it; a virtual machine often shows the nominal one."""
    found = re.findall(r"^cpu MHz\s*:\s*(\d+(?:\.\d+)?)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return [float(text) for text in found if float(text) > 0]


# --- Jetson -----------------------------------------------------------------------------------------------------------


def _board_watch(root: Path, run: Run, program: str | None) -> ClockWatch | None:
    board = read_board(root=root, run=run)
    mode = board.mode.name if board and board.mode else ""
    clock = read_gpu_clock(root)
    if clock is None:
        line = read_one_line(program) if program else None
        if program is None or line is None or (line.gpu_mhz is None and line.temperature_c is None):
            return None
        return ClockMonitor(Clocks(source="tegrastats", mode=mode), _told(program))
    folder = clock.folder
    zones = [path.parent / "temp" for path in _named(root / "sys/class/thermal", "thermal_zone*/type", "gpu")]
    alerts = _named(root / "sys/class/thermal", "cooling_device*/type", "throttle-alert")
    counters = sorted((root / "sys/class/hwmon").glob("hwmon*/oc[123]_event_cnt"))

    def read() -> Reading:
        active = [path for path in alerts if read_number(path.parent / "cur_state")]
        counts = [(words, read_number(path)) for path in counters if (words := _OVER_CURRENT.get(path.name))]
        return Reading(
            mhz=_scaled(read_number(folder / "cur_freq"), 1_000_000),
            temperature_c=_highest([_degrees(path) for path in zones]),
            throttled=tuple(f"{read_word(path).removesuffix('-throttle-alert')} too hot" for path in active),
            events=tuple((words, count) for words, count in counts if count is not None),
        )

    pinned = "clocks held by jetson_clocks" if clock.pinned else ""
    mode = ", ".join(filter(None, (mode, pinned)))
    return ClockMonitor(Clocks(source="sysfs", mhz_max=clock.most_mhz, mode=mode), _sampled(read))


def _named(folder: Path, pattern: str, part: str) -> list[Path]:
    """Files of such names whose text holds a part, in any case of letters."""
    return [path for path in sorted(folder.glob(pattern)) if part in read_word(path).lower()]


def _told(program: str) -> Feed:
    def feed(add: Take) -> AbstractContextManager[object]:
        def take(line: TegrastatsSample) -> None:
            add(Reading(mhz=line.gpu_mhz, memory_mhz=line.memory_mhz, temperature_c=line.temperature_c))

        return Tegrastats(take, program=program)

    return feed


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _sampled(read: Callable[[], Reading]) -> Feed:
    def feed(add: Take) -> AbstractContextManager[object]:
        return Sampler(lambda: add(read()), period_s=PERIOD_S)

    return feed


def _degrees(path: Path) -> float | None:
    """A temperature in degrees Celsius; a sensor that is switched off is absent or says -256."""
    value = _scaled(read_number(path), 1000)
    return value if value is not None and value > ABSENT_BELOW_C else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _highest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _scaled(value: int | None, divisor: int) -> float | None:
    return None if value is None else value / divisor
