"""tegrastats, the monitor program of Jetson Linux: a parser for its lines, and the program as a child process.

Fields and their spelling change with release and board (NVIDIA's developer guides, "tegrastats utility"). Power is
`2532/2532` up to R32, `2532mW/2532mW` later and `5139mW/5139mW/5139mW` in R39: current, average and, in R39, peak. The
GPU clock is missing, `0%`, `99%@1300`, `14%@[407,407]` or `@[1000,1000,1000]`. The temperature of a part that is
switched off is -256. So the parser searches a line for each field.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

PROGRAM = "tegrastats"
INTERVAL_MS = 100
FIRST_LINE_TIMEOUT_S = 3.0
_STOP_TIMEOUT_S = 2.0
MIN_TEMPERATURE_C = -40.0  # a lower one is of a part that is switched off

# "MB" follows the second number of memory fields, and of no rail.
_RAIL = re.compile(r"(?<![\w@])([A-Z][A-Z0-9_]*) (\d{1,7})(?:mW)?/\d{1,7}(?:mW)?(?![\w.])")
_ENGINE = r"(?<!\S){}(?:_FREQ)? (?:(\d{{1,3}})%)?(?:@(\d+|\[[\d,]*\]))?(?!\S)"
_GPU, _MEMORY_CLOCK = re.compile(_ENGINE.format("GR3D")), re.compile(_ENGINE.format("EMC"))
_RAM = re.compile(r"(?<!\S)RAM (\d{1,7})/(\d{1,7})MB")
_TEMPERATURE = re.compile(r"(?<!\S)([\w-]+)@(-?\d{1,3}(?:\.\d+)?)C")


@dataclass(frozen=True, kw_only=True, slots=True)
class TegrastatsSample:
    """One line of tegrastats; a field that the line does not have is `None` or empty.

    Attributes:
        rails_w: Current power by rail, with the names of the line.
        gpu_percent, gpu_mhz: Load of the GPU, and clock of its fastest cluster.
        memory_percent, memory_mhz: Load and clock of the memory controller; only shown to root.
        ram_used_mb, ram_mb: Used and total memory in units of 2^20 bytes.
        temperatures_c: Temperatures by sensor, names in lower case.
    """

    rails_w: dict[str, float] = field(default_factory=dict)
    gpu_percent: int | None = None
    gpu_mhz: int | None = None
    memory_percent: int | None = None
    memory_mhz: int | None = None
    ram_used_mb: int | None = None
    ram_mb: int | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)

    @property
    def temperature_c(self) -> float | None:
        """Temperature of the GPU; of the hottest part of the chip where the GPU is switched off."""
        known = self.temperatures_c
        return next((known[name] for name in ("gpu", "tj", "thermal") if name in known), None)


def parse_line(text: str) -> TegrastatsSample:
    """Return the fields of a line; an empty sample for any other text."""
    gpu_percent, gpu_mhz = _engine(_GPU, text)
    memory_percent, memory_mhz = _engine(_MEMORY_CLOCK, text)
    ram = _RAM.search(text)
    temperatures = {name.lower(): float(degrees) for name, degrees in _TEMPERATURE.findall(text)}
    return TegrastatsSample(
        rails_w={name: int(now) / 1000 for name, now in _RAIL.findall(text)},
        gpu_percent=gpu_percent,
        gpu_mhz=gpu_mhz,
        memory_percent=memory_percent,
        memory_mhz=memory_mhz,
        ram_used_mb=int(ram[1]) if ram else None,
        ram_mb=int(ram[2]) if ram else None,
        temperatures_c={name: degrees for name, degrees in temperatures.items() if degrees > MIN_TEMPERATURE_C},
    )


def _engine(pattern: re.Pattern[str], text: str) -> tuple[int | None, int | None]:
    """Return load in percent and clock in MHz; of several clusters the fastest, because an idle one reads 0."""
    found = pattern.search(text)
    if found is None:
        return None, None
    clocks = [int(number) for number in re.findall(r"\d{1,5}", found[2] or "")]
    return int(found[1]) if found[1] else None, max(clocks, default=None)


class Tegrastats:
    """Runs tegrastats inside a `with` block; a thread calls `on_sample` for each line.

    Args:
        on_sample: Called with every line.
        program: Path of tegrastats.
    """

    def __init__(self, on_sample: Callable[[TegrastatsSample], None], *, program: str) -> None:
        self._on_sample, self._program = on_sample, program
        self._first = threading.Event()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Tegrastats:
        self._first.clear()
        try:
            process = subprocess.Popen(
                [self._program, "--interval", str(INTERVAL_MS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        except OSError:  # the file has been removed since it was found: no samples
            return self
        self._process = process
        self._thread = threading.Thread(target=self._read, args=(process,), name="y7-tegrastats", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._thread.join(_STOP_TIMEOUT_S)  # a grandchild that keeps the pipe open can block the thread

    def wait_for_sample(self) -> bool:
        """Wait for the first sample; return `False` if there is none within seconds."""
        return self._first.wait(FIRST_LINE_TIMEOUT_S)

    def _read(self, process: subprocess.Popen[str]) -> None:
        if process.stdout is None:
            return
        with process.stdout:
            for text in process.stdout:
                self._on_sample(parse_line(text))
                self._first.set()


def read_one_sample(program: str) -> TegrastatsSample | None:
    """Return the first sample of the program; `None` if there is none within seconds."""
    samples: list[TegrastatsSample] = []
    with Tegrastats(samples.append, program=program) as running:
        running.wait_for_sample()
    return samples[0] if samples else None


def find_tegrastats() -> str | None:
    """Return the path of tegrastats; `None` where it is missing, as in most containers."""
    return shutil.which(PROGRAM)
