"""Puts together what is installed and what the machine has, and concludes what can run here."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._version import __version__
from yolov7_deploy.doctor.known_issues import KnownIssue, find_traps
from yolov7_deploy.doctor.packages import Library, find_module, read_libraries
from yolov7_deploy.doctor.plugin import plugin_state
from yolov7_deploy.hardware.machine import Machine, read_machine
from yolov7_deploy.hub import OFFICIAL_NAMES, WEIGHTS_DIR_VARIABLE, cache_dir

WEIGHT_SUFFIXES = (".pt", ".safetensors")
CUDA_PROVIDER = "CUDAExecutionProvider"
JETSON_WHEELS = "https://pypi.jetson-ai-lab.io/jp6/cu126/+simple"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capability:
    """Something this package does: whether it can here, with what or why not, and what to type to get it."""

    what: str
    possible: bool
    reason: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsPlace:
    """A folder official names are looked for in, and the official files in it; `folder` is `None` where not set."""

    label: str
    folder: str | None
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything the doctor found."""

    version: str
    python: str
    machine: Machine
    libraries: dict[str, Library]
    abilities: tuple[Capability, ...]
    traps: tuple[KnownIssue, ...]
    weights: tuple[WeightsPlace, ...]


def diagnose() -> Diagnosis:
    """Looks at this Python and this machine; never raises for what is missing or broken."""
    libraries, machine = read_libraries(), read_machine()
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        machine=machine,
        libraries=libraries,
        abilities=(*find_abilities(libraries, machine), _suppress_in_engines(libraries, machine)),
        traps=tuple(find_traps(libraries, machine)),
        weights=tuple(find_weight_files()),
    )


def find_abilities(libraries: dict[str, Library], machine: Machine) -> list[Capability]:
    """What can be done with these libraries on this machine."""

    def needs(what: str, *names: str) -> Capability:
        return _needs(what, [libraries[name] for name in names])

    weights_cpu = needs("run .pt and .safetensors on the CPU", "torch", "safetensors", "cv2", "numpy")
    onnx_cpu = needs("run .onnx on the CPU", "onnxruntime", "cv2", "numpy")
    return [
        needs("read and convert checkpoints", "torch", "safetensors", "numpy"),
        needs("export to ONNX", "torch", "safetensors", "onnx", "onnxsim", "numpy"),
        weights_cpu,
        _on_gpu("run .pt and .safetensors on the GPU", weights_cpu, machine, _torch_on_gpu(libraries["torch"])),
        onnx_cpu,
        _on_gpu("run .onnx on the GPU", onnx_cpu, machine, _onnx_on_gpu(libraries["onnxruntime"], machine)),
        needs("measure accuracy (y7 val)", "faster_coco_eval", "yaml", "cv2", "numpy"),
        needs("train (y7 train)", "torch", "safetensors", "faster_coco_eval", "yaml", "matplotlib", "cv2", "numpy"),
        _build_engines(libraries, machine),
        _run_engines(libraries, machine),
    ]


def find_weight_files() -> list[WeightsPlace]:
    """The local places of official weights, in the order they are looked at."""
    chosen = os.environ.get(WEIGHTS_DIR_VARIABLE)
    places = {
        "working directory": Path.cwd(),
        f"${WEIGHTS_DIR_VARIABLE}": Path(chosen) if chosen else None,
        "cache": cache_dir(),
    }
    names = [f"{name}{suffix}" for name in OFFICIAL_NAMES for suffix in WEIGHT_SUFFIXES]
    return [
        WeightsPlace(
            label=label,
            folder=None if folder is None else str(folder),
            files=() if folder is None else tuple(name for name in names if (folder / name).is_file()),
        )
        for label, folder in places.items()
    ]


def _needs(what: str, libraries: list[Library]) -> Capability:
    wanting = [library for library in libraries if not library.works]
    if wanting:
        return Capability(what=what, possible=False, reason=_reason(wanting), fix=_install(wanting))
    return Capability(what=what, possible=True, reason=", ".join(_named(library) for library in libraries))


def _reason(wanting: list[Library]) -> str:
    absent = [library.name for library in wanting if not library.installed and not library.fault]
    broken = [f"{library.name} does not load: {library.fault}" for library in wanting if library.fault]
    parts = [f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"] if absent else []
    return "; ".join([*parts, *broken])


def _install(wanting: list[Library]) -> str:
    """The pip lines that bring these libraries; one that is there and does not load must be forced."""
    lines = []
    extras = sorted({library.extra for library in wanting if library.extra and not library.fault})
    if extras:
        lines.append(f"pip install 'yolov7-deploy[{','.join(extras)}]'")
    if any(not library.extra and not library.fault for library in wanting):
        lines.append("pip install yolov7-deploy")
    broken = [
        library.distributions[0].partition(" ")[0] for library in wanting if library.fault and library.distributions
    ]
    if broken:
        lines.append(f"pip install --force-reinstall {' '.join(broken)}")
    return "; ".join(lines)


def _named(library: Library) -> str:
    return f"{library.name} {library.version}".strip()


def _on_gpu(what: str, on_cpu: Capability, machine: Machine, library: Capability) -> Capability:
    """What runs on the CPU also runs on a GPU, if there is one and the library was built for it."""
    if not on_cpu.possible:
        return Capability(what=what, possible=False, reason=on_cpu.reason, fix=on_cpu.fix)
    if not machine.has_gpu:
        return Capability(what=what, possible=False, reason="no NVIDIA GPU is visible (nvidia-smi lists none)")
    return Capability(what=what, possible=library.possible, reason=library.reason, fix=library.fix)


def _torch_on_gpu(torch: Library) -> Capability:
    if torch.details == ("cpu",):
        return Capability(
            what="",
            possible=False,
            reason=f"torch {torch.version} was built without CUDA",
            fix="pip install --force-reinstall torch   (or the line for your CUDA from https://pytorch.org)",
        )
    return Capability(what="", possible=True, reason=" ".join([_named(torch), *torch.details]))


def _onnx_on_gpu(onnxruntime: Library, machine: Machine) -> Capability:
    if CUDA_PROVIDER in onnxruntime.details:
        return Capability(what="", possible=True, reason=f"{_named(onnxruntime)} with {CUDA_PROVIDER}")
    fix = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'yolov7-deploy[gpu]'"
    if machine.jetson is not None:
        # PyPI has no onnxruntime-gpu for these boards.
        index = f" --index-url {JETSON_WHEELS}" if machine.jetson.jetpack.startswith("6") else ""
        fix = f"pip uninstall -y onnxruntime; pip install onnxruntime-gpu{index}"
    return Capability(
        what="", possible=False, reason=f"{_named(onnxruntime)} has only {', '.join(onnxruntime.details)}", fix=fix
    )


def _build_engines(libraries: dict[str, Library], machine: Machine) -> Capability:
    """TensorRT builds where it finds a GPU, TensorRT-RTX anywhere."""
    what = "build TensorRT engines"
    full, rtx, onnx = (libraries[name] for name in ("tensorrt", "tensorrt_rtx", "onnx"))
    if full.works and machine.has_gpu:
        return _needs(what, [full, onnx])
    ready = _needs(what, [full if machine.has_gpu and not rtx.works else rtx, onnx])
    if full.works and not rtx.works:
        reason = f"{_named(full)} builds only where there is a GPU, and none is visible; {rtx.name} builds without one"
        return Capability(what=what, possible=False, reason=reason, fix=ready.fix)
    if ready.possible:
        return Capability(what=what, possible=True, reason=f"{ready.reason}, for any GPU it knows (y7 build --target)")
    return ready


def _run_engines(libraries: dict[str, Library], machine: Machine) -> Capability:
    what = "run TensorRT engines"
    if find_module("yolov7_deploy.runtimes.tensorrt") is None:
        return Capability(what=what, possible=False, reason="this version of yolov7-deploy does not run them")
    cuda = libraries["pycuda"] if libraries["pycuda"].works else libraries["cuda"]
    ready = _needs(what, [_tensorrt(libraries), cuda, libraries["cv2"], libraries["numpy"]])
    return _on_gpu(what, ready, machine, ready)


def _suppress_in_engines(libraries: dict[str, Library], machine: Machine) -> Capability:
    possible, reason, fix = plugin_state(libraries, machine)
    return Capability(what="suppress inside engines with our plugin", possible=possible, reason=reason, fix=fix)


def _tensorrt(libraries: dict[str, Library]) -> Library:
    """The TensorRT that works, the full one first."""
    rtx = libraries["tensorrt_rtx"]
    return rtx if rtx.works and not libraries["tensorrt"].works else libraries["tensorrt"]
