"""Jetson boards: model, JetPack release, its TensorRT version, power mode, and the readings of tegrastats.

Everything is read from files and from `nvpmodel`, so a recorded tree of files can represent a board. What a board does
not report is left empty; nothing here raises.

tegrastats is the monitor program of Jetson Linux. Its fields and their spelling change with release and board (NVIDIA's
developer guides, "tegrastats utility"). Power is `2532/2532` up to R32, `2532mW/2532mW` later and
`5139mW/5139mW/5139mW` in R39: current, average and, in R39, peak. The GPU clock is missing, `0%`, `99%@1300`,
`14%@[407,407]` or `@[1000,1000,1000]`. The temperature of a part that is switched off is -256. So the parser searches a
line for each field.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from yolov7_deploy.hardware.system import ROOT, CommandRunner, read_text, run_command


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (10, 16, 1) for `10.16.1`, () for an empty text."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


Version = tuple[int, ...]

MODEL_FILES = ("proc/device-tree/model", "sys/firmware/devicetree/base/model")
# By a part of the model name. The first match counts: an Orin Nano is an Orin.
_CAPABILITIES = {"Thor": "11.0", "Orin": "8.7", "Xavier": "7.2", "TX2": "6.2", "Nano": "5.3", "TX1": "5.3"}


@dataclass(frozen=True, kw_only=True, slots=True)
class JetPack:
    """A JetPack release.

    Attributes:
        name: `6.2`; `6.x` where the release of the board's Linux is not in the table.
        tensorrt: TensorRT version of the release, `10.3`.
        min_tensorrt, max_tensorrt: Versions that run on it; a container may have an older one than its host.
        server_wheels: True where the TensorRT wheels for ARM servers run, the only ones there are (JetPack 7 and
            later).
    """

    name: str
    tensorrt: str
    min_tensorrt: Version
    max_tensorrt: Version
    server_wheels: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerMode:
    """A power mode: its name, and its number in the configuration of this board."""

    name: str
    number: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """A Jetson board.

    Attributes:
        model: Model name from the device tree.
        l4t: Version of its Linux, `36.4.3`; empty in a container that does not show it.
        jetpack: `None` where the Linux is unknown or older than JetPack 5.1.
        compute_capability: Compute capability of its GPU; empty for an unknown module.
        mode: Current power mode; `None` where it is not shown.
        modes: All power modes of the configuration.
    """

    model: str
    l4t: str
    jetpack: JetPack | None
    compute_capability: str
    mode: PowerMode | None
    modes: tuple[PowerMode, ...]

    @property
    def highest_mode(self) -> PowerMode | None:
        """The mode with the most power, judged by the names; `None` where the configuration is missing."""
        return max(self.modes, key=lambda mode: _power(mode.name), default=None)


# By the first L4T version of each series; a version between two rows belongs to the earlier one. From the archive pages
# of JetPack; TensorRT 10.7 is the last one that was built for JetPack 6.
_SERIES: tuple[tuple[Version, str, Version, Version, bool], ...] = (
    ((35, 2), "8.5.2", (8, 5), (8, 5), False),
    ((36,), "8.6.2", (8, 6), (8, 6), False),
    ((36, 4), "10.3.0", (8, 6), (10, 7), False),
    ((38,), "10.13", (10, 13), (10, 99), True),
    ((39,), "10.16.2", (10, 13), (10, 99), True),
    ((39, 2, 1), "10.16.2", (10, 13), (11, 99), True),
)
_NAMES = {
    "35.1": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5": "5.1.3", "35.6": "5.1.4",
    "35.6.1": "5.1.5", "36.2": "6.0 DP", "36.3": "6.0", "36.4": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1",
    "36.4.7": "6.2.1", "36.5": "6.2.2", "38.2": "7.0", "38.2.1": "7.0", "38.2.2": "7.0", "38.4": "7.1", "39.2": "7.2",
}  # fmt: skip
_MAJORS = {32: "4.x", 34: "5.0", 35: "5.x", 36: "6.x", 38: "7.x", 39: "7.x"}


def read_board(*, root: Path = ROOT, run: CommandRunner = run_command) -> Board | None:
    """Return the Jetson board that this process runs on; `None` on any other machine.

    Args:
        root: Folder that contains `proc`, `etc`, `sys` and `var`.
        run: Runs a command and returns its output.
    """
    model = next((text for name in MODEL_FILES if (text := read_text(root / name).strip("\0\n "))), "")
    l4t = _l4t(root)
    if not l4t and not ("nvidia" in model.lower() and any(name in model for name in ("Jetson", *_CAPABILITIES))):
        return None
    modes = _modes(root)
    return Board(
        model=model or "Jetson",
        l4t=l4t,
        jetpack=find_jetpack(l4t),
        compute_capability=next((value for name, value in _CAPABILITIES.items() if name in model), ""),
        mode=_current_mode(root, run, modes),
        modes=modes,
    )


def find_jetpack(l4t: str) -> JetPack | None:
    """Return the JetPack release of an L4T version; `None` without a version and before JetPack 5.1."""
    version = version_numbers(l4t)
    rows = [row for row in _SERIES if row[0] <= version]
    if not rows:
        return None
    _, tensorrt, oldest, newest, server_wheels = rows[-1]
    return JetPack(
        name=jetpack_name(l4t),
        tensorrt=tensorrt,
        min_tensorrt=oldest,
        max_tensorrt=newest,
        server_wheels=server_wheels,
    )


def jetpack_name(l4t: str) -> str:
    """Return `6.2` for L4T `36.4.3`, `6.x` for an unknown release of that series, or an empty text."""
    exact = _NAMES.get(l4t) or _NAMES.get(l4t.removesuffix(".0"))
    return exact or _MAJORS.get(version_numbers(l4t)[0] if version_numbers(l4t) else 0, "")


def _l4t(root: Path) -> str:
    """Return the L4T version from the release file, or from the package database."""
    release = re.search(r"R(\d+)[^,\n]*, REVISION: ([\d.]+)", read_text(root / "etc/nv_tegra_release"))
    if release:
        return f"{release[1]}.{release[2]}"
    status = read_text(root / "var/lib/dpkg/status")
    package = re.search(r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: ([\d.]+)", status, re.MULTILINE)
    return package[1] if package else ""


# --- power ------------------------------------------------------------------------------------------------------------


def _modes(root: Path) -> tuple[PowerMode, ...]:
    """Return the modes of nvpmodel's configuration; names and numbers differ by module and JetPack."""
    entries = re.findall(r"^\s*<\s*POWER_MODEL\s+([^>]*)>", read_text(root / "etc/nvpmodel.conf"), re.MULTILINE)
    modes = []
    for entry in entries:
        values = dict(re.findall(r"(\w+)=(\S+)", entry))
        if "NAME" in values:
            number = values.get("ID", "")
            modes.append(PowerMode(name=values["NAME"], number=int(number) if number.isdecimal() else None))
    return tuple(modes)


def _current_mode(root: Path, run: CommandRunner, modes: tuple[PowerMode, ...]) -> PowerMode | None:
    """Return the mode from `nvpmodel -q`, or from its state file where the command is not allowed."""
    answer = run(["nvpmodel", "-q"]) or ""
    if found := re.search(r"NV Power Mode:\s*(\S+)(?:\s*\n\s*(\d+))?", answer):
        return PowerMode(name=found[1], number=int(found[2]) if found[2] else None)
    state = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status"))
    return next((mode for mode in modes if state and mode.number == int(state[1])), None)


def _power(name: str) -> tuple[bool, bool, int, int]:
    """Return a sort key: MAXN_SUPER above MAXN, MAXN above modes with watts, then by watts, then by cores."""
    watts, cores = re.search(r"(\d+)W", name), re.search(r"(\d+)CORE", name)
    without_limit = name.upper().startswith("MAXN")
    return (
        without_limit,
        without_limit and "SUPER" in name.upper(),
        int(watts[1]) if watts else 0,
        int(cores[1]) if cores else 0,
    )


# --- tegrastats -------------------------------------------------------------------------------------------------------

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


def parse_tegrastats(text: str) -> TegrastatsSample:
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
                self._on_sample(parse_tegrastats(text))
                self._first.set()


def read_tegrastats(program: str) -> TegrastatsSample | None:
    """Return the first sample of the program; `None` if there is none within seconds."""
    samples: list[TegrastatsSample] = []
    with Tegrastats(samples.append, program=program) as running:
        running.wait_for_sample()
    return samples[0] if samples else None


def find_tegrastats() -> str | None:
    """Return the path of tegrastats; `None` where it is missing, as in most containers."""
    return shutil.which(PROGRAM)
