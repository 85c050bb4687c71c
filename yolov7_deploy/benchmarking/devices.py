"""The device of a benchmark: resolves a device name, and reports the settings that affect a measurement on it.

`v100` and `jetson` are requirements on the machine that are checked; clocks and modes are read and reported. Nothing is
changed on the machine: the notes contain the commands that would change a setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from yolov7_deploy.errors import DeviceError
from yolov7_deploy.hardware.clocks import read_jetson_gpu_clock
from yolov7_deploy.hardware.gpu import CudaGpu, list_cuda_gpus, open_gpu, parse_device
from yolov7_deploy.hardware.jetson import Board, jetpack_name, read_board
from yolov7_deploy.hardware.machine import Machine, read_machine
from yolov7_deploy.hardware.system import ROOT, CommandRunner, run_command

DEVICE_NAMES = "auto, cpu, cuda, cuda:N, v100 and jetson"
MEASURE_HERE = "or measure this machine:  y7 bench --device auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """A device of this machine, and what affects measurements on it.

    Attributes:
        device: Device of a Detector: `cpu` or `cuda:N`.
        machine: Title: `NVIDIA H200`, `AMD EPYC (2 cores)`, `NVIDIA Jetson Orin NX (JetPack 6.2)`.
        settings: Modes and clocks by name.
        notes: Remarks for the reader, with the command to type where a setting slows the device down.
    """

    device: str
    machine: str
    settings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Host:
    """This machine."""

    machine: Machine
    board: Board | None
    gpus: tuple[CudaGpu, ...]
    root: Path


def resolve_device(
    name: str, *, gpu_usable: bool = True, root: Path = ROOT, run: CommandRunner = run_command
) -> DeviceProfile:
    """Return the device that a name means on this machine.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N`, `N`, `v100` or `jetson`; `auto` is the first GPU that CUDA shows.
        gpu_usable: `False` where the library that runs the model does not support CUDA: `auto` is the CPU then.
        root: Folder that contains `proc`, `etc` and `sys`.
        run: Runs a command and returns its output.

    Raises:
        DeviceError: The name is unknown, or this machine does not have the device.
    """
    host = _Host(machine=read_machine(root), board=read_board(root=root, run=run), gpus=list_cuda_gpus(), root=root)
    if name == "auto":
        return _auto(host, gpu_usable)
    if name == "cpu":
        return _cpu(host)
    if name == "jetson":
        return _jetson(host)
    if name == "v100":
        return _v100(host)
    index = parse_device(name).cuda_index
    if index is None:
        raise DeviceError(f"--device {name} is unknown: devices are {DEVICE_NAMES}.", fix="y7 bench --device auto")
    return _gpu(host, index, name)


def _auto(host: _Host, gpu_usable: bool) -> DeviceProfile:
    if host.gpus and gpu_usable:
        profile = _jetson(host) if host.board else _gpu(host, 0, "auto")
        return _with_note(profile, f"device=auto: {profile.device}, {host.gpus[0].name}.")
    reason = "CUDA shows no GPU here"
    if host.gpus:
        reason = f"the library that runs this model cannot use {host.gpus[0].name}"
    elif host.machine.has_gpu:
        hidden = _gpu_names(host) or "the GPU of the board"
        reason = f"CUDA shows none of the GPUs here ({hidden}): see CUDA_VISIBLE_DEVICES and y7 doctor"
    return _with_note(_cpu(host), f"device=auto: CPU, because {reason}.")


def _with_note(profile: DeviceProfile, note: str) -> DeviceProfile:
    return replace(profile, notes=(note, *profile.notes))


def _cpu(host: _Host) -> DeviceProfile:
    return DeviceProfile(device="cpu", machine=_cpu_title(host))


def _cpu_title(host: _Host) -> str:
    cores = host.machine.usable_cores
    title = f"{host.machine.cpu} ({cores} core{'s' if cores > 1 else ''})"
    return f"{_board_title(host.board)}, {title}" if host.board else title


def _gpu_names(host: _Host) -> str:
    """Return the GPUs that CUDA shows, or else the installed ones; empty without any."""
    return ", ".join([gpu.name for gpu in host.gpus] or [gpu.name for gpu in host.machine.gpus])


def _summary(host: _Host) -> str:
    return ", ".join(filter(None, (_cpu_title(host), _gpu_names(host) or "no GPU")))


def _gpu(host: _Host, index: int, name: str) -> DeviceProfile:
    gpu = next((gpu for gpu in host.gpus if gpu.index == index), None)
    if gpu is None:
        shown = ", ".join(f"cuda:{gpu.index} is {gpu.name}" for gpu in host.gpus)
        message = f"--device {name}: CUDA shows no GPU cuda:{index} here ({shown or _summary(host)})."
        fix = "--device cuda:0" if shown else "y7 bench --device cpu   (nvidia-smi -L and y7 doctor show what is here)"
        raise DeviceError(message, fix=fix)
    return DeviceProfile(device=f"cuda:{index}", machine=gpu.name)


# --- V100 -------------------------------------------------------------------------------------------------------------


def _v100(host: _Host) -> DeviceProfile:
    gpu = next((gpu for gpu in host.gpus if "V100" in gpu.name), None)
    if gpu is None:
        problem = "CUDA shows no Tesla V100" if "V100" in _summary(host) else "this machine has no Tesla V100"
        raise DeviceError(
            f"--device v100: {problem}; found: {_summary(host)}.",
            fix=f"y7 bench --estimate v100   (an estimate, from data sheets), {MEASURE_HERE}",
        )
    device = f"cuda:{gpu.index}"
    notes = ["The paper's V100 speeds are FP16 and the network only: compare with --half, or with an FP16 engine."]
    sensors = open_gpu(gpu.index)
    if isinstance(sensors, str):
        return DeviceProfile(device=device, machine=gpu.name, notes=(*notes, sensors))
    settings = []
    persistence = sensors.persistence_mode()
    if persistence is not None:
        settings.append(("persistence mode", "on" if persistence else "off"))
    if persistence is False:
        notes.append(
            "Persistence mode is off, so each program starts with idle clocks: sudo nvidia-smi -pm 1 keeps the driver "
            "loaded."
        )
    clocks, highest = sensors.application_clocks_mhz(), sensors.max_sm_mhz()
    if clocks is not None:
        memory, sm = clocks
        settings.append(("application clocks", f"{sm} MHz, memory {memory} MHz"))
        if highest is not None and sm < highest:
            notes.append(
                f"Application clocks limit the multiprocessors to {sm} of {highest:.0f} MHz: "
                f"sudo nvidia-smi -ac {memory},{highest:.0f}"
            )
    return DeviceProfile(device=device, machine=gpu.name, settings=tuple(settings), notes=tuple(notes))


# --- Jetson -----------------------------------------------------------------------------------------------------------


def _jetson(host: _Host) -> DeviceProfile:
    if host.board is None:
        raise DeviceError(
            f"--device jetson: this machine is not a Jetson but {_summary(host)}.",
            fix=f"y7 bench --estimate orin-nx   (an estimate, from data sheets), {MEASURE_HERE}",
        )
    mode = host.board.mode
    settings = [("power mode", mode.name if mode else "unknown"), ("memory", "shared by CPU and GPU")]
    clock = read_jetson_gpu_clock(host.root)
    if clock is not None:
        limits = f"{clock.max_mhz:.0f} MHz, fixed" if clock.fixed else f"{clock.min_mhz:.0f} to {clock.max_mhz:.0f} MHz"
        settings.append(("GPU clock", limits))
    notes = tuple(_board_notes(host.board, clock_changes=clock is not None and not clock.fixed))
    return DeviceProfile(device="cuda:0", machine=_board_title(host.board), settings=tuple(settings), notes=notes)


def _board_title(board: Board) -> str:
    release = jetpack_name(board.l4t)
    version = f"JetPack {release}" if release else f"L4T {board.l4t}" if board.l4t else ""
    return f"{board.model} ({version})" if version else board.model


def _board_notes(board: Board, *, clock_changes: bool) -> Iterator[str]:
    mode, best = board.mode, board.highest_mode
    if mode is None:
        yield "The power mode is unknown (no answer from nvpmodel -q); a container does not show it."
    elif best is not None and mode.name != best.name:
        command = "." if best.number is None else f": sudo nvpmodel -m {best.number}"
        yield f"The board is in power mode {mode.name}; {best.name} is faster{command}"
    if clock_changes:
        yield "The GPU clock follows the load, which slows short runs: sudo jetson_clocks fixes it at its maximum."
