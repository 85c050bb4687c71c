"""Electric power while something runs: of a GPU by NVML, of a CPU by RAPL, of a Jetson by its power monitors.

An energy counter is preferred, because it loses no energy between two readings; otherwise power is sampled and
integrated by the trapezoidal rule. NVML updates its counter every 20 to 100 ms, so energy is taken between the first
and the last update that was seen. The error is one sampling period at each end, 20 ms each, so a measurement to one
percent takes four seconds.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from yolov7_deploy.hardware.gpu import NvmlGpu, open_gpu, parse_device
from yolov7_deploy.hardware.jetson import Tegrastats, TegrastatsSample, find_tegrastats, read_board, read_tegrastats
from yolov7_deploy.hardware.system import ROOT, PeriodicSampler, read_number, read_word

# A reading of NVML or RAPL takes microseconds. INA3221 chips are on a slow bus: a millisecond for each rail.
COUNTER_PERIOD_S = 0.02
POWER_PERIOD_S = 0.05
RAIL_PERIOD_S = 0.1


class PowerMeter(Protocol):
    """Measures power inside a `with` block; it can be entered again for the next measurement.

    Attributes:
        source: The sensor and what it covers: `NVML (GPU board)`.
    """

    source: str

    @property
    def mean_watts(self) -> float:
        """Mean power of the last measurement; NaN where there were too few readings (`samples` is 0)."""

    @property
    def samples(self) -> int:
        """Readings that the mean is based on; 0 where there is none."""

    def __enter__(self) -> PowerMeter:
        """Start a measurement."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the measurement."""


class PowerIntegrator:
    """Integrates power over one measurement, from readings of watts or of an energy counter in joules."""

    def __init__(self, *, counts_joules: bool) -> None:
        self._counts_joules = counts_joules
        self._last: tuple[float, float] | None = None
        self._joules = self._seconds = 0.0
        self._updated = not counts_joules  # the age of a counter's value is known only once it was updated
        self._intervals = 0

    def add(self, time_s: float, value: float | None) -> None:
        """Add a reading; `None` and values that are not finite are ignored."""
        if value is None or not math.isfinite(value):
            return
        if self._last is not None:
            last_s, before = self._last
            if self._counts_joules and value <= before:
                if value < before:  # the driver was loaded again
                    self._last, self._updated = (time_s, value), False
                return
            if self._updated:
                seconds = time_s - last_s
                self._joules += value - before if self._counts_joules else (value + before) / 2 * seconds
                self._seconds += seconds
                self._intervals += 1
            self._updated = True
        self._last = time_s, value

    @property
    def mean_watts(self) -> float:
        """Mean over the time that the readings cover; NaN where they cover none."""
        return self._joules / self._seconds if self._seconds > 0 else math.nan

    @property
    def samples(self) -> int:
        """Readings that the mean is based on, both ends included."""
        return self._intervals + 1 if self._seconds > 0 else 0


class SampledPowerMeter:
    """A meter that reads a sensor periodically.

    Args:
        source: The sensor and what it covers.
        read: Returns watts, or joules of a counter; `None` where the sensor does not answer.
        counts_joules: `read` returns a counter.
        period_s: Time between two readings.
    """

    def __init__(self, source: str, read: Callable[[], float | None], *, counts_joules: bool, period_s: float) -> None:
        self.source = source
        self._read, self._counts_joules = read, counts_joules
        self._integrator = PowerIntegrator(counts_joules=counts_joules)
        self._sampler = PeriodicSampler(self._take_sample, period_s=period_s)

    @property
    def mean_watts(self) -> float:
        """See `PowerMeter`."""
        return self._integrator.mean_watts

    @property
    def samples(self) -> int:
        """See `PowerMeter`."""
        return self._integrator.samples

    def __enter__(self) -> SampledPowerMeter:
        self._integrator = PowerIntegrator(counts_joules=self._counts_joules)
        self._sampler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.__exit__(kind, error, trace)

    def _take_sample(self) -> None:
        integrator = self._integrator  # a reading that hangs may outlive its block; the next block has another one
        value = self._read()
        integrator.add(time.perf_counter(), value)


def open_power_meter(device: str, *, root: Path = ROOT, tegrastats: str | None = None) -> PowerMeter | str:
    """Return a meter for the power of a device, or a sentence that explains why there is none and what to type.

    On a Jetson it measures the input of the module for every device, because CPU and GPU share one supply.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, numbered as by CUDA.
        root: Folder that contains `proc`, `etc` and `sys`.
        tegrastats: Path of the program; searched for if `None`.
    """
    if read_board(root=root) is not None:
        return _jetson_meter(root, tegrastats or find_tegrastats())
    if device == "cpu":
        return _cpu_meter(root)
    index = parse_device(device).cuda_index
    if index is None:
        return f"The power of {device!r} cannot be measured: only that of cpu, cuda and cuda:N."
    gpu = open_gpu(index)
    return gpu if isinstance(gpu, str) else _gpu_meter(gpu)


def _gpu_meter(gpu: NvmlGpu) -> PowerMeter | str:
    source = "NVML (GPU board)"
    if gpu.energy_j() is not None:
        return SampledPowerMeter(source, gpu.energy_j, counts_joules=True, period_s=COUNTER_PERIOD_S)
    if gpu.power_w() is not None:
        return SampledPowerMeter(source, gpu.power_w, counts_joules=False, period_s=POWER_PERIOD_S)
    return f"NVML reports neither energy nor power of {gpu.name}, as for virtual GPUs: see nvidia-smi -q -d POWER"


# --- CPU: RAPL --------------------------------------------------------------------------------------------------------
#
# Linux shows the energy counters of Intel and AMD CPUs under /sys/class/powercap. The counter of a package covers its
# cores, caches and graphics, not main memory. It is updated every millisecond and restarts from zero after
# `max_energy_range_uj`, on a large server within minutes. Since Linux 5.10 only root may read it (CVE-2020-8694).

POWERCAP = "sys/class/powercap"


@dataclass(slots=True)
class RaplCounter:
    """Energy of all CPU packages of a machine since the first reading.

    Attributes:
        folders: One for each package.
    """

    folders: tuple[Path, ...]
    _before_uj: list[int] = field(default_factory=list)
    _total_uj: int = 0

    def energy_j(self) -> float | None:
        """Return the joules since the first call; `None` where a package does not answer.

        One restart of a counter between two calls is corrected, so call it more often than counters restart.
        """
        now_uj = [number for folder in self.folders if (number := read_number(folder / "energy_uj")) is not None]
        if len(now_uj) < len(self.folders):
            return None
        used_uj = 0
        for folder, before, now in zip(self.folders, self._before_uj or now_uj, now_uj, strict=True):
            counter_range = 0 if now >= before else read_number(folder / "max_energy_range_uj")
            if counter_range is None:
                return None
            used_uj += now - before + counter_range
        self._before_uj = now_uj
        self._total_uj += used_uj
        return self._total_uj / 1e6


def open_rapl_counter(root: Path = ROOT) -> RaplCounter | str:
    """Return the energy counter of this machine, or a sentence that explains why it cannot be read."""
    # Packages only: "core", "uncore" and "dram" are their parts, "psys" contains them, intel-rapl-mmio repeats them.
    domains = sorted(path for path in (root / POWERCAP).glob("intel-rapl:*") if re.fullmatch(r"[\w-]+:\d+", path.name))
    folders = tuple(path for path in domains if read_word(path / "name").startswith("package"))
    if not folders:
        return (
            f"This CPU shows no energy counter (no package in /{POWERCAP}): virtual machines, containers and ARM have "
            "none. On an x86 machine itself: sudo modprobe intel_rapl_msr"
        )
    counter = RaplCounter(folders)
    files = " ".join(f"/{(path / 'energy_uj').relative_to(root)}" for path in folders)
    try:
        for path in folders:
            (path / "energy_uj").read_bytes()
    except PermissionError:
        return f"Only root may read the energy counter of this CPU: sudo chmod a+r {files}"
    except OSError as error:
        return f"The energy counter of this CPU does not answer ({error.strerror}): cat {files}"
    if counter.energy_j() is None:
        return f"The energy counter of this CPU is not a number: cat {files}"
    return counter


def _cpu_meter(root: Path) -> PowerMeter | str:
    counter = open_rapl_counter(root)
    if isinstance(counter, str):
        return counter
    packages = len(counter.folders)
    source = f"RAPL ({packages} CPU packages)" if packages > 1 else "RAPL (CPU package)"
    return SampledPowerMeter(source, counter.energy_j, counts_joules=True, period_s=COUNTER_PERIOD_S)


# --- Jetson: power rails ----------------------------------------------------------------------------------------------
#
# The power monitors are INA3221 chips with three rails each, and an INA238 on Thor. JetPack 5 and later have the
# mainline driver: millivolts and milliamperes under hwmon, channels from 1 (kernel.org, hwmon/ina3221). JetPack 4 has
# NVIDIA's `ina3221x`: milliwatts under iio, channels from 0. Every user may read the files on a board as shipped.
#
# Rails contain each other: `VDD_IN` is the input of a module and contains `VDD_CPU_GPU_CV` and `VDD_SOC`; `VIN_SYS_5V0`
# of an AGX Orin feeds `VDDQ_VDD2_1V8AO`. So only sets of rails that NVIDIA's developer guides and carrier designs show
# side by side are added up.

MODULE = "whole module"
# Channels 4 to 6 of the mainline driver are shunt voltages and 7 is their sum, not rails.
_CHANNELS = ("1", "2", "3")
_UNUSED = ("", "NC")
INA238_RAIL = "VIN"  # name in tegrastats of the rail of Thor's INA238, which does not have a label


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerInput:
    """Rails whose sum is the input power, and what that input feeds."""

    rails: tuple[str, ...]
    covers: str = MODULE

    def __str__(self) -> str:
        return f"{' + '.join(self.rails)} ({self.covers})"


# The first one whose rails a board has is its input.
POWER_INPUTS = (
    PowerInput(rails=("VIN",), covers="module and carrier board"),  # AGX Thor, by its INA238
    PowerInput(rails=("VDD_IN",)),  # TX1, TX2, Xavier NX, Orin NX, Orin Nano
    PowerInput(rails=("POM_5V_IN",)),  # Nano
    PowerInput(rails=("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),  # AGX Orin
    PowerInput(rails=("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")),  # AGX Thor
    PowerInput(rails=("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")),  # AGX Xavier
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerRail:
    """A monitored power rail.

    Attributes:
        name: Label on the board, `VDD_IN`.
        files: Files whose numbers are multiplied.
        scale_w: Watts for a product of one.
    """

    name: str
    files: tuple[Path, ...]
    scale_w: float

    def read_w(self) -> float | None:
        """Return the power now; `None` where the sensor does not answer."""
        product = self.scale_w
        for path in self.files:
            number = read_number(path)
            if number is None:
                return None
            product *= number
        return product


def find_power_input(rails: Collection[str]) -> PowerInput | None:
    """Return the input of a board that has these rails; `None` where no set of them is known to be all of it."""
    return next((known for known in POWER_INPUTS if set(known.rails) <= set(rails)), None)


def read_rails(root: Path = ROOT) -> dict[str, PowerRail]:
    """Return the rails that answer now, by name; empty on other machines."""
    chips = root / "sys/bus/i2c/drivers"
    found = []
    for label in sorted(chips.glob("ina3221/*/hwmon/hwmon*/in*_label")):
        channel = re.fullmatch(r"in(\d+)_label", label.name)
        if channel and channel[1] in _CHANNELS:
            files = (label.with_name(f"in{channel[1]}_input"), label.with_name(f"curr{channel[1]}_input"))
            found.append(PowerRail(name=read_word(label), files=files, scale_w=1e-6))
    for label in sorted(chips.glob("ina3221x/*/iio*device*/rail_name_*")):
        power = label.with_name(f"in_power{label.name.removeprefix('rail_name_')}_input")
        found.append(PowerRail(name=read_word(label), files=(power,), scale_w=1e-3))
    for kind in sorted((root / "sys/class/hwmon").glob("hwmon*/name")):
        if read_word(kind) == "ina238":
            found.append(PowerRail(name=INA238_RAIL, files=(kind.with_name("power1_input"),), scale_w=1e-6))
    return {rail.name: rail for rail in found if rail.name not in _UNUSED and rail.read_w() is not None}


class TegrastatsPowerMeter:
    """A meter for the input of a Jetson that reads tegrastats."""

    def __init__(self, program: str, power_input: PowerInput) -> None:
        self.source = f"tegrastats {power_input}"
        self._program, self._input = program, power_input
        self._integrator = PowerIntegrator(counts_joules=False)
        self._open = ExitStack()

    @property
    def mean_watts(self) -> float:
        """See `PowerMeter`."""
        return self._integrator.mean_watts

    @property
    def samples(self) -> int:
        """See `PowerMeter`."""
        return self._integrator.samples

    def __enter__(self) -> TegrastatsPowerMeter:
        self._integrator = integrator = PowerIntegrator(counts_joules=False)

        def on_sample(sample: TegrastatsSample) -> None:
            watts = [sample.rails_w.get(name, math.nan) for name in self._input.rails]
            integrator.add(time.perf_counter(), sum(watts))

        self._open.enter_context(Tegrastats(on_sample, program=self._program))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def _jetson_meter(root: Path, tegrastats: str | None) -> PowerMeter | str:
    rails = read_rails(root)
    power_input = find_power_input(rails)
    if power_input is not None:
        sensors = [rails[name] for name in power_input.rails]

        def read() -> float | None:
            watts = [value for sensor in sensors if (value := sensor.read_w()) is not None]
            return sum(watts) if len(watts) == len(sensors) else None

        chip = "INA238" if power_input.rails == (INA238_RAIL,) else "INA3221"
        return SampledPowerMeter(f"{chip} {power_input}", read, counts_joules=False, period_s=RAIL_PERIOD_S)
    sample = read_tegrastats(tegrastats) if tegrastats else None
    if tegrastats and sample and (power_input := find_power_input(sample.rails_w)) is not None:
        return TegrastatsPowerMeter(tegrastats, power_input)
    names = ", ".join(sorted({*rails, *(sample.rails_w if sample else ())}))
    if names:
        return f"This board reports the power of {names}, and it is not known which of these are its whole input."
    return (
        "This board shows no power monitor (no ina3221 under /sys/bus/i2c/drivers and no power in tegrastats): a "
        "container needs --volume /usr/bin/tegrastats:/usr/bin/tegrastats, and a Jetson Nano 2GB has none."
    )
