"""Where a benchmark runs: a device by its name, and what is customary to say about a measurement on it.

`v100` and `jetson` are promises about the machine that are checked; clocks and modes are read and reported. Nothing is
changed on the machine: what would change it is in the notes, to be typed by who may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from yolov7_deploy.errors import DeviceError
from yolov7_deploy.hardware.clocks import read_gpu_clock
from yolov7_deploy.hardware.gpu import DRIVER, VisibleGpu, read_visible_gpus
from yolov7_deploy.hardware.jetson import ROOT, Board, Run, jetpack_name, read_board, run_command
from yolov7_deploy.hardware.machine import Machine, read_machine
from yolov7_deploy.hardware.nvml import NVML, open_gpu

DEVICES = "auto, cpu, cuda, cuda:N, v100 and jetson"
MEASURE_HERE = "or measure this machine:  y7 bench --device auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """A device of this machine.

    Attributes:
        device: For a Detector: `cpu` or `cuda:N`.
        machine: What it is, as a title: `NVIDIA H200`, `AMD EPYC (2 cores)`, `NVIDIA Jetson Orin NX (JetPack 6.2)`.
        settings: Modes and clocks it was found with, by name.
        notes: What a reader of its numbers should know, with what to type where something slows it down.
    """

    device: str
    machine: str
    settings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Here:
    """This machine as it was found, and how to ask it more."""

    machine: Machine
    board: Board | None
    gpus: tuple[VisibleGpu, ...]
    root: Path
    library: str
    driver: str


def choose_place(
    device: str,
    *,
    gpu_usable: bool = True,
    root: Path = ROOT,
    run: Run = run_command,
    library: str = NVML,
    driver: str = DRIVER,
) -> DeviceProfile:
    """The device that a name means here.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `v100` or `jetson`; `auto` is the first GPU that CUDA shows.
        gpu_usable: `False` where the library that runs the model has no CUDA: `auto` is the processor then.
        root: The folder that `proc`, `etc` and `sys` are looked for in.
        run: Runs a command and gives its output.
        library: NVML.
        driver: CUDA's driver library.

    Raises:
        DeviceError: It means nothing, or this machine is none such.
    """
    here = _Here(
        machine=read_machine(root),
        board=read_board(root=root, run=run),
        gpus=read_visible_gpus(driver),
        root=root,
        library=library,
        driver=driver,
    )
    if device == "auto":
        return _auto(here, gpu_usable)
    if device == "cpu":
        return _processor(here)
    if device == "jetson":
        return _jetson(here)
    if device == "v100":
        return _v100(here)
    named = re.fullmatch(r"cuda|(?:cuda:)?([0-9]{1,3})", device)
    if named is None:
        raise DeviceError(f"--device {device} means nothing: devices are {DEVICES}.", fix="y7 bench --device auto")
    return _gpu(here, int(named[1] or 0), device)


def _auto(here: _Here, gpu_usable: bool) -> DeviceProfile:
    if here.gpus and gpu_usable:
        place = _jetson(here) if here.board else _gpu(here, 0, "auto")
        return _with_note(place, f"auto took {place.device}: {here.gpus[0].name}.")
    why = "CUDA shows no GPU here"
    if here.gpus:
        why = f"the library that runs this model cannot use {here.gpus[0].name}"
    elif here.machine.has_gpu:
        hidden = _gpu_names(here) or "that of the board"
        why = f"CUDA shows none of the GPUs here ({hidden}): see CUDA_VISIBLE_DEVICES and y7 doctor"
    return _with_note(_processor(here), f"auto took the processor: {why}.")


def _with_note(place: DeviceProfile, note: str) -> DeviceProfile:
    return replace(place, notes=(note, *place.notes))


def _processor(here: _Here) -> DeviceProfile:
    return DeviceProfile(device="cpu", machine=_processor_title(here))


def _processor_title(here: _Here) -> str:
    cores = here.machine.usable_cores
    title = f"{here.machine.cpu} ({cores} core{'s' if cores > 1 else ''})"
    return f"{_board_title(here.board)}, {title}" if here.board else title


def _gpu_names(here: _Here) -> str:
    """The GPUs of this machine, by CUDA or else by nvidia-smi; nothing without any."""
    return ", ".join([gpu.name for gpu in here.gpus] or [gpu.name for gpu in here.machine.gpus])


def _found(here: _Here) -> str:
    """What this machine is instead."""
    return ", ".join(filter(None, (_processor_title(here), _gpu_names(here) or "no GPU")))


def _gpu(here: _Here, index: int, asked: str) -> DeviceProfile:
    gpu = next((gpu for gpu in here.gpus if gpu.index == index), None)
    if gpu is None:
        seen = ", ".join(f"cuda:{gpu.index} is {gpu.name}" for gpu in here.gpus)
        message = f"--device {asked}: CUDA shows no GPU cuda:{index} here ({seen or _found(here)})."
        fix = "--device cuda:0" if seen else "y7 bench --device cpu   (nvidia-smi -L and y7 doctor show what is here)"
        raise DeviceError(message, fix=fix)
    return DeviceProfile(device=f"cuda:{index}", machine=gpu.name)


# --- V100 -------------------------------------------------------------------------------------------------------------


def _v100(here: _Here) -> DeviceProfile:
    gpu = next((gpu for gpu in here.gpus if "V100" in gpu.name), None)
    if gpu is None:
        hidden = "CUDA shows no Tesla V100" if "V100" in _found(here) else "this machine has no Tesla V100"
        raise DeviceError(
            f"--device v100: {hidden} but {_found(here)}.",
            fix=f"y7 bench --estimate v100   (an estimate, from data sheets), {MEASURE_HERE}",
        )
    sensors = open_gpu(gpu.index, library=here.library, driver=here.driver)
    notes = [
        "The paper's speeds on a V100 are FP16 and the network alone: compare with --half, or with an FP16 engine.",
    ]
    if isinstance(sensors, str):
        return DeviceProfile(device=f"cuda:{gpu.index}", machine=gpu.name, notes=(*notes, sensors))
    settings = []
    persistent = sensors.persistent()
    if persistent is not None:
        settings.append(("persistence mode", "on" if persistent else "off"))
    if persistent is False:
        notes.append(
            "Persistence mode is off, so clocks start from rest with each program: sudo nvidia-smi -pm 1 keeps the "
            "driver loaded."
        )
    clocks, highest = sensors.application_mhz(), sensors.mhz_max()
    if clocks is not None:
        memory, sm = clocks
        settings.append(("application clocks", f"{sm} MHz, memory {memory} MHz"))
        if highest is not None and sm < highest:
            notes.append(
                f"Application clocks hold the multiprocessors to {sm} of {highest:.0f} MHz: "
                f"sudo nvidia-smi -ac {memory},{highest:.0f}"
            )
    return DeviceProfile(device=f"cuda:{gpu.index}", machine=gpu.name, settings=tuple(settings), notes=tuple(notes))


# --- Jetson -----------------------------------------------------------------------------------------------------------


def _jetson(here: _Here) -> DeviceProfile:
    if here.board is None:
        raise DeviceError(
            f"--device jetson: this machine is no Jetson but {_found(here)}.",
            fix=f"y7 bench --estimate orin-nx   (an estimate, from data sheets), {MEASURE_HERE}",
        )
    mode = here.board.mode
    settings = [("power mode", mode.name if mode else "unknown"), ("memory", "one for processor and GPU")]
    clock = read_gpu_clock(here.root)
    if clock is not None:
        span = (
            f"{clock.most_mhz:.0f} MHz, held" if clock.pinned else f"{clock.least_mhz:.0f} to {clock.most_mhz:.0f} MHz"
        )
        settings.append(("GPU clock", span))
    notes = tuple(_board_notes(here.board, clock is not None and not clock.pinned))
    return DeviceProfile(device="cuda:0", machine=_board_title(here.board), settings=tuple(settings), notes=notes)


def _board_title(board: Board) -> str:
    release = jetpack_name(board.l4t)
    named = f"JetPack {release}" if release else f"L4T {board.l4t}" if board.l4t else ""
    return f"{board.model} ({named})" if named else board.model


def _board_notes(board: Board, clock_moves: bool) -> Iterator[str]:
    mode, best = board.mode, board.highest_mode
    if mode is None:
        yield "The power mode is not known here (no answer from nvpmodel -q); a container does not show it."
    elif best is not None and mode.name != best.name:
        how = "." if best.number is None else f": sudo nvpmodel -m {best.number}"
        yield f"The board is in power mode {mode.name}; {best.name} is faster{how}"
    if clock_moves:
        yield "The GPU's clock follows its load, which short runs feel: sudo jetson_clocks holds it at its highest."
