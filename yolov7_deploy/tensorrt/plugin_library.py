"""Finds our TensorRT plugin library, and says what it is. Needs no TensorRT: a library describes itself.

A library is only ever opened in a second Python, so that a damaged or foreign file cannot take this one with it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from yolov7_deploy.errors import PluginError
from yolov7_deploy.hub import cache_dir

PLUGIN_VARIABLE = "Y7_PLUGIN"  # path of a library to use instead of searching
PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE = "Y7NMS", "1", ""
KERNELS_ABI = 2  # of kernels.h
BUILD_COMMAND = "y7 plugin"
SYSTEM_FOLDERS = (Path("/usr/local/lib"), Path("/usr/lib"))
DESCRIBE_TIMEOUT_S = 30.0

# Shell of the plugin: IPluginV2DynamicExt, IPluginV3, or none at all.
Abi = Literal["v2", "v3", "kernels"]
ABI_TITLES: dict[Abi, str] = {
    "v2": "TensorRT 8.5 to 9",
    "v3": "TensorRT 10 and later and TensorRT-RTX",
    "kernels": "no TensorRT (kernels only)",
}

_DESCRIBE = """
import ctypes, sys
describe = ctypes.CDLL(sys.argv[1]).y7_plugin_description
describe.restype = ctypes.c_char_p
sys.stdout.buffer.write(b"\\n" + describe())
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginLibrary:
    """A library of ours as it describes itself.

    Attributes:
        path: Where it lies, absolute.
        abi: Which TensorRT it is for, see `ABI_TITLES`.
        version: Version of the plugin, as the ONNX node asks for it.
        kernels_abi: Version of the C interface of the kernels inside.
        compute_capabilities: GPUs it has machine code for; 86 is compute capability 8.6.
        ptx: GPUs it has code for that the driver compiles, for these and all later ones.
        cuda: Toolkit it was built with, such as `13.0`.
        headers: TensorRT whose headers it was built with; empty for kernels only.
    """

    path: Path
    abi: Abi
    version: str
    kernels_abi: int
    compute_capabilities: tuple[int, ...]
    ptx: tuple[int, ...]
    cuda: str
    headers: str

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of this compute capability (86 is 8.6) can run it.

        Machine code serves its own and higher minor versions of one major version, PTX everything later. Boards
        (7.2, 8.7) are families of their own.
        """
        boards = {72, 87, 101, 110}
        return any(
            capability == known
            or (capability // 10 == known // 10 and capability > known and not {capability, known} & boards)
            for known in self.compute_capabilities
        ) or any(capability >= known for known in self.ptx)


def find_plugin(abi: str) -> PluginLibrary | None:
    """Our library for a TensorRT of this kind: `$Y7_PLUGIN`, else what `y7 plugin` built, else a system folder's.

    Args:
        abi: `v3` for TensorRT 10 and later and TensorRT-RTX, `v2` before, `kernels` where none is needed.

    Returns:
        `None` where there is none; a library that is there and cannot be used is an error.

    Raises:
        PluginError: The file is not our library, is damaged, or is for another TensorRT or another version.
    """
    chosen = os.environ.get(PLUGIN_VARIABLE)
    if chosen:
        library = describe_plugin(Path(chosen))
        _check(library, abi, f"${PLUGIN_VARIABLE} names {library.path}, which")
        return library
    built = built_path(abi)
    if built.is_file():
        library = describe_plugin(built)
        _check(library, abi, str(built))
        return library
    for path in _in_system(abi):
        library = describe_plugin(path)
        if library.abi == abi:
            _check(library, abi, str(path))
            return library
    return None


def find_kernels_library(capability: int) -> PluginLibrary | None:
    """The first library of ours whose kernels run on a GPU (86 is compute capability 8.6), whatever TensorRT it is for.

    Raises:
        PluginError: See `find_plugin`.
    """
    kinds: tuple[Abi, ...] = ("kernels",) if os.environ.get(PLUGIN_VARIABLE) else ("v3", "v2", "kernels")
    found = (find_plugin(abi) for abi in kinds)
    return next((library for library in found if library and library.runs_on(capability)), None)


def built_path(abi: str) -> Path:
    """Where `y7 plugin` puts a library of this kind, and `find_plugin` looks for it."""
    name = f"liby7_kernels-{KERNELS_ABI}.so" if abi == "kernels" else f"liby7_plugin-{abi}-{PLUGIN_VERSION}.so"
    return cache_dir() / "plugins" / platform.machine() / name


def describe_plugin(path: Path) -> PluginLibrary:
    """What a library says of itself; the file is opened in a second Python.

    Raises:
        PluginError: There is no such file, it does not load, or it is not ours.
    """
    path = path.expanduser().absolute()
    if not path.is_file():
        raise PluginError(
            f"There is no plugin library {path}{' (it is a folder)' if path.is_dir() else ''}.", fix=_fix()
        )
    _check_whole(path)
    command = [sys.executable, "-I", "-S", "-c", _DESCRIBE, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DESCRIBE_TIMEOUT_S, check=False)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise PluginError(f"{path} could not be opened: {error}", fix=_fix()) from error
    if done.returncode != 0:
        raise PluginError(f"{path} is not a usable plugin library: {_fault(done)}.", fix=_fix())
    try:
        return _parsed(path, done.stdout.rpartition(b"\n")[2])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        said = done.stdout[-200:].decode(errors="replace").strip()
        raise PluginError(f"{path} does not describe itself as our plugin does: {said!r}", fix=_fix()) from error


def _check_whole(path: Path) -> None:
    """Refuses what is no 64-bit ELF file, and one that ends before its section table, which is its last part.

    The loader does not read that table, and a library that lost its end may work until its kernels are needed.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise PluginError(f"{path} cannot be read: {error.strerror or error}.", fix=_fix()) from error
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        raise PluginError(f"{path} is not a usable plugin library: it is no 64-bit ELF file.", fix=_fix())
    table, entry_bytes, entries = (int.from_bytes(head[at : at + n], "little") for at, n in ((40, 8), (58, 2), (60, 2)))
    if size < table + entry_bytes * entries:
        raise PluginError(
            f"{path} is not a usable plugin library: it has {size} of {table + entry_bytes * entries} bytes.",
            fix=_fix(),
        )


def _parsed(path: Path, text: bytes) -> PluginLibrary:
    record = json.loads(text)
    if record["name"] != PLUGIN_NAME or record["abi"] not in get_args(Abi):
        raise ValueError(record)
    return PluginLibrary(
        path=path,
        abi=record["abi"],
        version=str(record["version"]),
        kernels_abi=int(record["kernels_abi"]),
        compute_capabilities=tuple(int(capability) for capability in record["compute_capabilities"]),
        ptx=tuple(int(capability) for capability in record["ptx"]),
        cuda=str(record["cuda"]),
        headers=str(record["headers"]),
    )


def _fault(done: subprocess.CompletedProcess[bytes]) -> str:
    """Why a library did not describe itself."""
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return f"it ended the process that opened it with {name}, as a truncated file does"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    if last.startswith("AttributeError"):
        return "it is a library, but not ours: it has no function y7_plugin_description"
    return last.removeprefix("OSError: ")


def _check(library: PluginLibrary, abi: str, what: str) -> None:
    """Refuses a library of another kind or of other sources than this package's."""
    if library.abi != abi and abi != "kernels":
        wanted = ABI_TITLES.get(cast(Abi, abi), abi)
        raise PluginError(
            f"{what} is for {ABI_TITLES[library.abi]} (abi {library.abi}); here {wanted} (abi {abi}) needs it.",
            fix=_fix(),
        )
    if library.version != PLUGIN_VERSION or library.kernels_abi != KERNELS_ABI:
        raise PluginError(
            f"{what} is version {library.version} of the plugin with kernels {library.kernels_abi}; this yolov7-deploy "
            f"needs version {PLUGIN_VERSION} with kernels {KERNELS_ABI}.",
            fix=_fix(),
        )


def _in_system(abi: str) -> Iterator[Path]:
    machine = f"{platform.machine()}-linux-gnu"
    names = ("liby7_kernels.so", "liby7_plugin.so") if abi == "kernels" else ("liby7_plugin.so",)
    for folder in SYSTEM_FOLDERS:
        for name in names:
            yield from (path for path in (folder / name, folder / machine / name) if path.is_file())


def _fix() -> str:
    unset = f"unset {PLUGIN_VARIABLE}; " if os.environ.get(PLUGIN_VARIABLE) else ""
    return f"Build it for this machine:  {unset}{BUILD_COMMAND}"
