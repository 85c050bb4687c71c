"""A Jetson board: its model, its JetPack, the TensorRT that belongs to it, and its power mode.

Everything is read from files and from `nvpmodel`, so a recorded tree of files stands for a board. What a board does
not tell is left empty; nothing here raises.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


def version_numbers(version: str) -> tuple[int, ...]:
    """`10.16.1` as (10, 16, 1), as far as it is numbers; nothing for an empty one."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


ROOT = Path("/")
COMMAND_TIMEOUT_S = 20.0

Version = tuple[int, ...]
Run = Callable[[Sequence[str]], str | None]

MODEL_FILES = ("proc/device-tree/model", "sys/firmware/devicetree/base/model")
# The first that fits counts: an Orin Nano is an Orin.
_CAPABILITIES = {"Thor": "11.0", "Orin": "8.7", "Xavier": "7.2", "TX2": "6.2", "Nano": "5.3", "TX1": "5.3"}


@dataclass(frozen=True, kw_only=True, slots=True)
class JetPack:
    """A JetPack release.

    Attributes:
        name: `6.2`; `6.x` where the board's Linux is of a release that is not in the table.
        tensorrt: The version it brings, `10.3`.
        first, last: Versions that run on it; a container may hold an older one than its host.
        server_wheels: The TensorRT wheels for ARM servers run on it (from JetPack 7 on), and no others exist.
    """

    name: str
    tensorrt: str
    first: Version
    last: Version
    server_wheels: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerMode:
    """A power mode by its name and the number that this board's configuration gives it."""

    name: str
    number: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """A Jetson.

    Attributes:
        model: As the device tree says it.
        l4t: Version of its Linux, `36.4.3`; empty in a container that does not show it.
        jetpack: `None` where the Linux is unknown or older than JetPack 5.1.
        compute_capability: Of its GPU, empty for an unknown module.
        mode: The present power mode, `None` where it is not told.
        modes: All that the configuration has.
    """

    model: str
    l4t: str
    jetpack: JetPack | None
    compute_capability: str
    mode: PowerMode | None
    modes: tuple[PowerMode, ...]

    @property
    def highest_mode(self) -> PowerMode | None:
        """The mode with the most power, told by the names; `None` where the configuration is not there."""
        return max(self.modes, key=lambda mode: _power(mode.name), default=None)


# By the first L4T with them; the release of a later one is that of the last row before it.
# JetPack's own archive pages; TensorRT 10.7 is the last that was built for JetPack 6.
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


def run_command(command: Sequence[str]) -> str | None:
    """Standard output of a command; `None` where it is absent, fails or hangs."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_board(*, root: Path = ROOT, run: Run = run_command) -> Board | None:
    """The board we run on, `None` on any other machine.

    Args:
        root: The folder that `proc`, `etc`, `sys` and `var` are looked for in.
        run: Runs a command and gives its output.
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
        mode=_present_mode(root, run, modes),
        modes=modes,
    )


def find_jetpack(l4t: str) -> JetPack | None:
    """The JetPack of an L4T version; `None` for none and for those before JetPack 5.1."""
    version = version_numbers(l4t)
    rows = [row for row in _SERIES if row[0] <= version]
    if not rows:
        return None
    _, tensorrt, first, last, server_wheels = rows[-1]
    return JetPack(name=jetpack_name(l4t), tensorrt=tensorrt, first=first, last=last, server_wheels=server_wheels)


def jetpack_name(l4t: str) -> str:
    """`6.2` for L4T `36.4.3`, `6.x` for a release of that series that is not known, or nothing."""
    exact = _NAMES.get(l4t) or _NAMES.get(l4t.removesuffix(".0"))
    return exact or _MAJORS.get(version_numbers(l4t)[0] if version_numbers(l4t) else 0, "")


def read_text(path: Path) -> str:
    """What a file says; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _l4t(root: Path) -> str:
    """By the release file of the board's Linux, or by the package that brings it."""
    release = re.search(r"R(\d+)[^,\n]*, REVISION: ([\d.]+)", read_text(root / "etc/nv_tegra_release"))
    if release:
        return f"{release[1]}.{release[2]}"
    status = read_text(root / "var/lib/dpkg/status")
    package = re.search(r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: ([\d.]+)", status, re.MULTILINE)
    return package[1] if package else ""


# --- power ------------------------------------------------------------------------------------------------------------


def _modes(root: Path) -> tuple[PowerMode, ...]:
    """The modes of nvpmodel's configuration; names and numbers differ by module and by JetPack."""
    entries = re.findall(r"^\s*<\s*POWER_MODEL\s+([^>]*)>", read_text(root / "etc/nvpmodel.conf"), re.MULTILINE)
    modes = []
    for entry in entries:
        values = dict(re.findall(r"(\w+)=(\S+)", entry))
        if "NAME" in values:
            number = values.get("ID", "")
            modes.append(PowerMode(name=values["NAME"], number=int(number) if number.isdecimal() else None))
    return tuple(modes)


def _present_mode(root: Path, run: Run, modes: tuple[PowerMode, ...]) -> PowerMode | None:
    """As `nvpmodel -q` says it, or, where that is not allowed, the file it keeps its state in."""
    answer = run(["nvpmodel", "-q"]) or ""
    if found := re.search(r"NV Power Mode:\s*(\S+)(?:\s*\n\s*(\d+))?", answer):
        return PowerMode(name=found[1], number=int(found[2]) if found[2] else None)
    state = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status"))
    return next((mode for mode in modes if state and mode.number == int(state[1])), None)


def _power(name: str) -> tuple[bool, bool, int, int]:
    """Sorts names: MAXN_SUPER above MAXN, that above all with watts, more watts and then more cores above fewer."""
    watts, cores = re.search(r"(\d+)W", name), re.search(r"(\d+)CORE", name)
    without_limit = name.upper().startswith("MAXN")
    return (
        without_limit,
        without_limit and "SUPER" in name.upper(),
        int(watts[1]) if watts else 0,
        int(cores[1]) if cores else 0,
    )
