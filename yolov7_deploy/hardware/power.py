"""Electric power while something runs: of a GPU by NVML, of a processor by RAPL, of a Jetson by its rail monitors.

Where a counter of energy exists it is read, which misses nothing between two readings; else power is sampled and its
course taken as straight between samples. A counter of NVML moves every 20 to 100 ms, so energy is taken between the
first and the last move that was seen: the error is one sampling period at each end, 20 ms each, and a measurement that
should be good to a percent lasts four seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from yolov7_deploy.hardware import ina3221, rapl, tegrastats
from yolov7_deploy.hardware.gpu import DRIVER
from yolov7_deploy.hardware.jetson import ROOT, read_board
from yolov7_deploy.hardware.nvml import NVML, NvmlGpu, open_gpu
from yolov7_deploy.hardware.sampling import Sampler

# Power rails of Jetson boards: which of them together are all that goes in.
#
# Rails contain each other: `VDD_IN` is the input of a module and holds `VDD_CPU_GPU_CV` and `VDD_SOC`; `VIN_SYS_5V0`
# of an AGX Orin feeds `VDDQ_VDD2_1V8AO`. So only sets that NVIDIA's developer guides and carrier designs tell to be
# side by side are ever added up.

MODULE = "whole module"


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerInput:
    """Rails whose sum is what goes in, and what that feeds."""

    rails: tuple[str, ...]
    covers: str = MODULE

    def __str__(self) -> str:
        return f"{' + '.join(self.rails)} ({self.covers})"


# The first that a board has all rails of.
INPUTS = (
    PowerInput(rails=("VIN",), covers="module and carrier board"),  # AGX Thor, by its INA238
    PowerInput(rails=("VDD_IN",)),  # TX1, TX2, Xavier NX, Orin NX, Orin Nano
    PowerInput(rails=("POM_5V_IN",)),  # Nano
    PowerInput(rails=("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),  # AGX Orin
    PowerInput(rails=("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")),  # AGX Thor
    PowerInput(rails=("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")),  # AGX Xavier
)


def find_input(rails: Collection[str]) -> PowerInput | None:
    """The input of a board that has these rails; `None` where no set of them is known to be all of it."""
    return next((known for known in INPUTS if set(known.rails) <= set(rails)), None)


# A reading of NVML or RAPL takes microseconds; one of an INA3221 goes over a slow bus, a millisecond for each rail.
COUNTER_PERIOD_S = 0.02
POWER_PERIOD_S = 0.05
RAIL_PERIOD_S = 0.1


class PowerMeter(Protocol):
    """Measures between `with` and its end; afterwards it can be entered again for the next measurement.

    Attributes:
        source: What measures, and what that covers: `NVML (GPU board)`.
    """

    source: str

    @property
    def mean_watts(self) -> float:
        """Mean power of the last measurement; NaN where the sensor told too little, which `samples` of 0 says too."""

    @property
    def samples(self) -> int:
        """Readings behind the mean; 0 where there is none."""

    def __enter__(self) -> PowerMeter:
        """Begins to measure."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it, however the work ended."""


class PowerIntegrator:
    """The course of power over one measurement, from readings of watts or of a counter of joules."""

    def __init__(self, *, counts_joules: bool) -> None:
        self._counts = counts_joules
        self._last: tuple[float, float] | None = None
        self._joules = self._seconds = 0.0
        self._moved = not counts_joules  # a counter tells when its first joule began only by moving
        self._readings = 0

    def add(self, time_s: float, value: float | None) -> None:
        """One reading; `None` and what is no number are left out."""
        if value is None or not math.isfinite(value):
            return
        if self._last is not None:
            then_s, before = self._last
            if self._counts and value <= before:
                if value < before:  # the driver was loaded anew
                    self._last, self._moved = (time_s, value), False
                return
            if self._moved:
                seconds = time_s - then_s
                self._joules += value - before if self._counts else (value + before) / 2 * seconds
                self._seconds += seconds
                self._readings += 1
            self._moved = True
        self._last = time_s, value

    @property
    def mean_watts(self) -> float:
        """Over the time that readings cover; NaN where they cover none."""
        return self._joules / self._seconds if self._seconds > 0 else math.nan

    @property
    def samples(self) -> int:
        """Readings behind the mean, both ends counted."""
        return self._readings + 1 if self._seconds > 0 else 0


class SampledMeter:
    """A meter that asks a sensor at a steady pace.

    Args:
        source: What it is, and what it covers.
        read: A reading in watts, or in joules of a counter; `None` where the sensor does not answer.
        counts_joules: It is a counter.
        period_s: Between two readings.
    """

    def __init__(self, source: str, read: Callable[[], float | None], *, counts_joules: bool, period_s: float) -> None:
        self.source = source
        self._read, self._counts = read, counts_joules
        self._course = PowerIntegrator(counts_joules=counts_joules)
        self._sampler = Sampler(self._take, period_s=period_s)

    @property
    def mean_watts(self) -> float:
        """See `PowerMeter`."""
        return self._course.mean_watts

    @property
    def samples(self) -> int:
        """See `PowerMeter`."""
        return self._course.samples

    def __enter__(self) -> SampledMeter:
        self._course = PowerIntegrator(counts_joules=self._counts)
        self._sampler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.__exit__(kind, error, trace)

    def _take(self) -> None:
        value = self._read()
        self._course.add(time.perf_counter(), value)


class TegrastatsMeter:
    """A meter that reads what tegrastats tells about the input of a board."""

    def __init__(self, program: str, rails: PowerInput) -> None:
        self.source = f"tegrastats {rails}"
        self._program, self._rails = program, rails
        self._course = PowerIntegrator(counts_joules=False)
        self._open = ExitStack()

    @property
    def mean_watts(self) -> float:
        """See `PowerMeter`."""
        return self._course.mean_watts

    @property
    def samples(self) -> int:
        """See `PowerMeter`."""
        return self._course.samples

    def __enter__(self) -> TegrastatsMeter:
        self._course = course = PowerIntegrator(counts_joules=False)

        def take(line: tegrastats.TegrastatsSample) -> None:
            known = [line.rails_w.get(name, math.nan) for name in self._rails.rails]
            course.add(time.perf_counter(), sum(known))

        self._open.enter_context(tegrastats.Tegrastats(take, program=self._program))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def open_power_meter(
    device: str, *, root: Path = ROOT, library: str = NVML, driver: str = DRIVER, program: str | None = None
) -> PowerMeter | str:
    """What measures the power of a device, or the sentence why nothing does and what to type.

    On a Jetson it is the input of the module whatever the device, as one supply feeds them all.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, as CUDA counts.
        root: The folder that `proc`, `etc` and `sys` are looked for in.
        library: NVML.
        driver: CUDA's driver library.
        program: tegrastats; `None` looks for it.
    """
    if read_board(root=root) is not None:
        return _rail_meter(root, program or tegrastats.find_program())
    if device == "cpu":
        return _processor_meter(root)
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        return f"Nothing here measures the power of {device!r}: cpu, cuda and cuda:N can be measured."
    gpu = open_gpu(int(index or 0), library=library, driver=driver)
    return gpu if isinstance(gpu, str) else _gpu_meter(gpu)


def _gpu_meter(gpu: NvmlGpu) -> PowerMeter | str:
    source = "NVML (GPU board)"
    if gpu.energy_j() is not None:
        return SampledMeter(source, gpu.energy_j, counts_joules=True, period_s=COUNTER_PERIOD_S)
    if gpu.power_w() is not None:
        return SampledMeter(source, gpu.power_w, counts_joules=False, period_s=POWER_PERIOD_S)
    return f"{gpu.name} tells NVML neither energy nor power, as virtual GPUs do not: nvidia-smi -q -d POWER shows it."


def _processor_meter(root: Path) -> PowerMeter | str:
    packages = rapl.open_packages(root)
    if isinstance(packages, str):
        return packages
    many = len(packages.folders)
    source = f"RAPL ({many} processor packages)" if many > 1 else "RAPL (processor package)"
    return SampledMeter(source, packages.energy_j, counts_joules=True, period_s=COUNTER_PERIOD_S)


def _rail_meter(root: Path, program: str | None) -> PowerMeter | str:
    rails = ina3221.read_rails(root)
    whole = find_input(rails)
    if whole is not None:
        sensors = [rails[name] for name in whole.rails]

        def read() -> float | None:
            watts = [value for sensor in sensors if (value := sensor.read_w()) is not None]
            return sum(watts) if len(watts) == len(sensors) else None

        chip = "INA238" if whole.rails == (ina3221.INA238,) else "INA3221"
        return SampledMeter(f"{chip} {whole}", read, counts_joules=False, period_s=RAIL_PERIOD_S)
    line = tegrastats.read_one_line(program) if program else None
    if program and line and (whole := find_input(line.rails_w)) is not None:
        return TegrastatsMeter(program, whole)
    names = ", ".join(sorted({*rails, *(line.rails_w if line else ())}))
    if names:
        return f"This board tells the power of {names}; which of these are its whole input is not known here."
    return (
        "This board shows no power monitor (no ina3221 under /sys/bus/i2c/drivers and no power in tegrastats): a "
        "container needs --volume /usr/bin/tegrastats:/usr/bin/tegrastats, and a Jetson Nano 2GB has none."
    )
