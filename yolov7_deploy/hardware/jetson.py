"""Jetson boards: model, JetPack release, its TensorRT version, and power mode.

Everything is read from files and from `nvpmodel`, so a recorded tree of files can represent a board. What a board does
not report is left empty; nothing here raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

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
