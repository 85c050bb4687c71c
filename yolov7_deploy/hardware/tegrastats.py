"""tegrastats, the monitor of every Jetson Linux: its lines as numbers, and the program as a child that tells them.

The fields and their spelling change with the release and the board (NVIDIA's developer guides, "tegrastats utility"):
power is `2532/2532` up to R32, `2532mW/2532mW` later and `5139mW/5139mW/5139mW` in R39, each of it now, mean and from
R39 highest; the GPU's clock is absent, `0%`, `99%@1300`, `14%@[407,407]` or `@[1000,1000,1000]`; temperatures of parts
that are switched off read -256. So a line is searched for what it has.
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
ABSENT_BELOW_C = -40.0

# Memory has megabytes behind its second number, which no rail has.
_RAIL = re.compile(r"(?<![\w@])([A-Z][A-Z0-9_]*) (\d{1,7})(?:mW)?/\d{1,7}(?:mW)?(?![\w.])")
_ENGINE = r"(?<!\S){}(?:_FREQ)? (?:(\d{{1,3}})%)?(?:@(\d+|\[[\d,]*\]))?(?!\S)"
_GPU, _MEMORY_CLOCK = re.compile(_ENGINE.format("GR3D")), re.compile(_ENGINE.format("EMC"))
_RAM = re.compile(r"(?<!\S)RAM (\d{1,7})/(\d{1,7})MB")
_TEMPERATURE = re.compile(r"(?<!\S)([\w-]+)@(-?\d{1,3}(?:\.\d+)?)C")


@dataclass(frozen=True, kw_only=True, slots=True)
class TegrastatsSample:
    """One line of tegrastats; what it does not have is `None` or empty.

    Attributes:
        rails_w: Power now by rail, as the line spells it.
        gpu_percent, gpu_mhz: Load of the GPU, and the clock of its fastest cluster.
        memory_percent, memory_mhz: The same of the memory controller; only root is told.
        ram_used_mb, ram_mb: Memory in use and in all, in units of 2^20 bytes.
        temperatures_c: By sensor in lower case.
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
        """Of the GPU; where it is switched off, of the hottest place of the chip."""
        known = self.temperatures_c
        return next((known[name] for name in ("gpu", "tj", "thermal") if name in known), None)


def read_line(text: str) -> TegrastatsSample:
    """What a line says; an empty one of text that is none."""
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
        temperatures_c={name: degrees for name, degrees in temperatures.items() if degrees > ABSENT_BELOW_C},
    )


def _engine(pattern: re.Pattern[str], text: str) -> tuple[int | None, int | None]:
    """Load in percent and clock in MHz of an engine; of several clusters the fastest, as a resting one reads 0."""
    found = pattern.search(text)
    if found is None:
        return None, None
    clocks = [int(number) for number in re.findall(r"\d{1,5}", found[2] or "")]
    return int(found[1]) if found[1] else None, max(clocks, default=None)


class Tegrastats:
    """The program as a child, between `with` and its end; each of its lines is given to `take` in a thread.

    Args:
        take: Called with every line.
        program: Its path.
    """

    def __init__(self, take: Callable[[TegrastatsSample], None], *, program: str) -> None:
        self._take, self._program = take, program
        self._first = threading.Event()
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Tegrastats:
        self._first.clear()
        command = [self._program, "--interval", str(INTERVAL_MS)]
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        try:
            child = subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=nothing, text=True, errors="replace")
        except OSError:  # it was there a moment ago: no lines, as from one that tells nothing
            return self
        self._child = child
        self._thread = threading.Thread(target=self._read, args=(child,), name="y7-tegrastats", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._thread.join(_STOP_TIMEOUT_S)  # a grandchild that keeps the pipe open may hold it

    def wait_for_a_line(self) -> bool:
        """A first line came, within a few of its intervals."""
        return self._first.wait(FIRST_LINE_TIMEOUT_S)

    def _read(self, child: subprocess.Popen[str]) -> None:
        if child.stdout is None:
            return
        with child.stdout:
            for text in child.stdout:
                self._take(read_line(text))
                self._first.set()


def read_one_line(program: str) -> TegrastatsSample | None:
    """The first line that the program says; `None` where it says nothing within seconds."""
    lines: list[TegrastatsSample] = []
    with Tegrastats(lines.append, program=program) as child:
        child.wait_for_a_line()
    return lines[0] if lines else None


def find_program() -> str | None:
    """Path of tegrastats; `None` where there is none, as in most containers."""
    return shutil.which(PROGRAM)
