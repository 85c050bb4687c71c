"""Find and describe our TensorRT plugin library. It does not need TensorRT: a library contains its description.

A library is loaded in a separate Python process, so that a damaged file cannot crash this one.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from yolov7_deploy._serialization import parse_json
from yolov7_deploy._text import expand_user
from yolov7_deploy.errors import PluginError
from yolov7_deploy.hardware.gpu import supported_cuda_version
from yolov7_deploy.hub import cache_dir
from yolov7_deploy.metadata import NMS_OPERATOR

PLUGIN_VARIABLE = "Y7_PLUGIN"  # environment variable with the path of a library
PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE = NMS_OPERATOR[1], "1", ""
KERNELS_ABI = 3  # Y7_KERNELS_ABI in kernels.h
BUILD_COMMAND = "y7 plugin"
SYSTEM_FOLDERS = (Path("/usr/local/lib"), Path("/usr/lib"))
DESCRIBE_TIMEOUT_S = 30.0

# Interface of the plugin: IPluginV2DynamicExt, IPluginV3, or none.
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
    """The description of a plugin library.

    Attributes:
        path: Absolute path.
        abi: Plugin interface, which determines the TensorRT version; see `ABI_TITLES`.
        version: Version of the plugin, which the ONNX node requires.
        kernels_abi: Version of the C ABI of the kernels.
        compute_capabilities: GPUs with machine code; 86 is compute capability 8.6.
        exact: Those of them whose code is of an architecture such as 100a, and runs on no other GPU.
        ptx: GPUs with PTX, which the driver compiles for these and all later ones.
        cuda: Version of the CUDA toolkit, such as `13.0`.
        headers: Version of the TensorRT headers; empty for kernels only.
    """

    path: Path
    abi: Abi
    version: str
    kernels_abi: int
    compute_capabilities: tuple[int, ...]
    exact: tuple[int, ...] = ()
    ptx: tuple[int, ...]
    cuda: str
    headers: str

    def runs_on(self, capability: int) -> bool:
        """Return whether a GPU of this compute capability (86 is 8.6) can run it.

        Machine code runs on its own and on higher minor versions of the same major version, PTX on all later ones.
        Machine code for Jetson boards (7.2, 8.7) and for other GPUs is not interchangeable, and that of `exact` runs on
        its own version only.
        """
        boards = {72, 87, 101, 110}
        return any(
            capability == known
            or (
                capability // 10 == known // 10
                and capability > known
                and known not in self.exact
                and not {capability, known} & boards
            )
            for known in self.compute_capabilities
        ) or any(capability >= known for known in self.ptx)


def find_plugin(abi: str) -> PluginLibrary | None:
    """Return the library for a plugin interface: `$Y7_PLUGIN`, else built by `y7 plugin`, else in a system folder.

    Args:
        abi: `v3` for TensorRT 10 and later and TensorRT-RTX, `v2` for earlier versions, `kernels` without TensorRT.

    Returns:
        `None` if there is no library.

    Raises:
        PluginError: The library exists, but is damaged, not ours, for another TensorRT or version, or built with a CUDA
            that the driver does not support.
    """
    given = os.environ.get(PLUGIN_VARIABLE)
    if given:
        library = describe_plugin(Path(given))
        _check(library, abi, f"${PLUGIN_VARIABLE} is {library.path}, which")
        return library
    built = built_path(abi)
    if built.is_file():
        library = describe_plugin(built)
        _check(library, abi, str(built))
        return library
    for path in _system_libraries(abi):
        library = describe_plugin(path)
        if library.abi == abi:
            _check(library, abi, str(path))
            return library
    return None


def find_kernels_library(capability: int) -> PluginLibrary | None:
    """Return a library with kernels for a GPU (86 is compute capability 8.6) and any TensorRT; `None` without one.

    Raises:
        PluginError: See `find_plugin`.
    """
    kinds: tuple[Abi, ...] = ("kernels",) if os.environ.get(PLUGIN_VARIABLE) else ("v3", "v2", "kernels")
    found = (find_plugin(abi) for abi in kinds)
    return next((library for library in found if library and library.runs_on(capability)), None)


def built_path(abi: str) -> Path:
    """Return the path where `y7 plugin` installs a library, and where `find_plugin` searches first."""
    name = f"liby7_kernels-{KERNELS_ABI}.so" if abi == "kernels" else f"liby7_plugin-{abi}-{PLUGIN_VERSION}.so"
    return cache_dir() / "plugins" / platform.machine() / name


def describe_plugin(path: Path) -> PluginLibrary:
    """Load a library in a separate Python process and return its description.

    Raises:
        PluginError: The file does not exist, cannot be loaded, or is not our library.
    """
    path = expand_user(path).absolute()
    if not path.is_file():
        raise PluginError(
            f"The plugin library {path} does not exist{' (it is a folder)' if path.is_dir() else ''}.", fix=_fix()
        )
    _check_complete(path)
    command = [sys.executable, "-I", "-S", "-c", _DESCRIBE, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DESCRIBE_TIMEOUT_S, check=False)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise PluginError(f"{path} could not be opened: {error}", fix=_fix()) from error
    if done.returncode != 0:
        raise PluginError(f"{path} is not a usable plugin library: {_load_error(done)}.", fix=_fix())
    try:
        return _parse(path, done.stdout.rpartition(b"\n")[2])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        output = done.stdout[-200:].decode(errors="replace").strip()
        raise PluginError(f"{path} does not have the description of our plugin: {output!r}", fix=_fix()) from error


def _check_complete(path: Path) -> None:
    """Check that a file is a 64-bit ELF file and complete: its last part is the section table.

    The loader does not read that table, so a truncated library may load and fail when its kernels are used.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise PluginError(f"{path} cannot be read: {error.strerror or error}.", fix=_fix()) from error
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        raise PluginError(f"{path} is not a usable plugin library: it is not a 64-bit ELF file.", fix=_fix())
    table, entry_bytes, entries = (int.from_bytes(head[at : at + n], "little") for at, n in ((40, 8), (58, 2), (60, 2)))
    if size < table + entry_bytes * entries:
        raise PluginError(
            f"{path} is not a usable plugin library: it has {size} of {table + entry_bytes * entries} bytes.",
            fix=_fix(),
        )


def _parse(path: Path, text: bytes) -> PluginLibrary:
    record = parse_json(text)
    if record["name"] != PLUGIN_NAME or record["abi"] not in get_args(Abi):
        raise ValueError(record)
    return PluginLibrary(
        path=path,
        abi=record["abi"],
        version=str(record["version"]),
        kernels_abi=int(record["kernels_abi"]),
        compute_capabilities=tuple(int(capability) for capability in record["compute_capabilities"]),
        exact=tuple(int(capability) for capability in record["exact"]),
        ptx=tuple(int(capability) for capability in record["ptx"]),
        cuda=str(record["cuda"]),
        headers=str(record["headers"]),
    )


def _load_error(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return the reason why a library could not be loaded or described."""
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return f"loading it ended the process with {name}, as a truncated file does"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    if last.startswith("AttributeError"):
        return "it is another library: it has no function y7_plugin_description"
    return last.removeprefix("OSError: ")


def _check(library: PluginLibrary, abi: str, what: str) -> None:
    """Check the plugin interface and the version of a library."""
    if library.abi != abi and abi != "kernels":
        required = ABI_TITLES.get(cast(Abi, abi), abi)
        raise PluginError(
            f"{what} is for {ABI_TITLES[library.abi]} (abi {library.abi}), not for {required} (abi {abi}).",
            fix=_fix(),
        )
    if library.version != PLUGIN_VERSION or library.kernels_abi != KERNELS_ABI:
        raise PluginError(
            f"{what} is plugin version {library.version} with kernels ABI {library.kernels_abi}; this yolov7-deploy "
            f"needs plugin version {PLUGIN_VERSION} with kernels ABI {KERNELS_ABI}.",
            fix=_fix(),
        )
    check_driver(library, what)


def check_driver(library: PluginLibrary, what: str) -> None:
    """Check that the driver accepts the CUDA version of a library; without a driver there is nothing to check.

    The CUDA runtime in the library needs a driver for CUDA of at least its own major version.

    Raises:
        PluginError: The driver is older.
    """
    supported = supported_cuda_version()
    own, newest = (text.partition(".")[0] for text in (library.cuda, supported))
    if own.isdecimal() and newest.isdecimal() and int(own) > int(newest):
        raise PluginError(
            f"{what} was built with CUDA {library.cuda}; the NVIDIA driver of this machine supports CUDA {supported} "
            "at most.",
            fix="Update the driver, or build with an older CUDA toolkit:  "
            f"{BUILD_COMMAND} --cuda /usr/local/cuda-{supported}",
        )


def _system_libraries(abi: str) -> Iterator[Path]:
    machine = f"{platform.machine()}-linux-gnu"
    name = "liby7_kernels.so" if abi == "kernels" else "liby7_plugin.so"
    for folder in SYSTEM_FOLDERS:
        yield from (path for path in (folder / name, folder / machine / name) if path.is_file())


def _fix() -> str:
    unset = f"unset {PLUGIN_VARIABLE}; " if os.environ.get(PLUGIN_VARIABLE) else ""
    return f"Build it for this machine:  {unset}{BUILD_COMMAND}"
