"""Whether our TensorRT plugin is here, for which TensorRT and GPUs, and the command that builds it."""

from __future__ import annotations

from collections.abc import Mapping

from yolov7_deploy.doctor.packages import Library
from yolov7_deploy.errors import PluginError
from yolov7_deploy.hardware.machine import Machine
from yolov7_deploy.tensorrt.plugin_library import ABI_TITLES, BUILD_COMMAND, Abi, PluginLibrary, find_plugin

FIRST_V3_MAJOR = 10  # of TensorRT; TensorRT-RTX has it since its first version


def plugin_state(libraries: Mapping[str, Library], machine: Machine) -> tuple[bool, str, str]:
    """Whether every TensorRT that is installed finds our plugin; what it finds, or why not; what to type."""
    wanted = _wanted(libraries)
    if not wanted:
        return False, "no TensorRT is installed", ""
    fix = BUILD_COMMAND
    reasons, possible = [], True
    for abi in wanted:
        try:
            library = find_plugin(abi)
        except PluginError as error:
            return False, error.message, error.fix.rpartition("  ")[2]
        if library is None:
            possible = False
            reasons.append(f"no library for {ABI_TITLES[abi]} is built")
            continue
        gpu = _unserved(library, machine)
        if gpu is not None:
            possible = False
            fix = f"{BUILD_COMMAND} --arch {gpu}"
            reasons.append(f"{library.path} has no code for compute capability {gpu // 10}.{gpu % 10}")
        else:
            reasons.append(described(library))
    return possible, "; ".join(reasons), "" if possible else fix


def described(library: PluginLibrary) -> str:
    """`/a/lib.so for TensorRT 10 and later, compute capabilities 7.5, 8.6, CUDA 13.0`."""
    gpus = ", ".join(f"{number // 10}.{number % 10}" for number in library.compute_capabilities)
    return f"{library.path} for {ABI_TITLES[library.abi]}, compute capability {gpus}, CUDA {library.cuda}"


def _wanted(libraries: Mapping[str, Library]) -> list[Abi]:
    """The kinds of library that the installed TensorRTs load."""
    wanted: dict[Abi, None] = {}
    full = libraries["tensorrt"]
    if full.installed:
        major = full.version.partition(".")[0]
        wanted["v2" if major.isdigit() and int(major) < FIRST_V3_MAJOR else "v3"] = None
    if libraries["tensorrt_rtx"].installed:
        wanted["v3"] = None
    return list(wanted)


def _unserved(library: PluginLibrary, machine: Machine) -> int | None:
    """Compute capability of a GPU here that the library has no code for."""
    boards = (machine.jetson,) if machine.jetson is not None else ()
    for device in (*machine.gpus, *boards):
        digits = device.compute_capability.replace(".", "")
        if digits.isdigit() and not library.runs_on(int(digits)):
            return int(digits)
    return None
