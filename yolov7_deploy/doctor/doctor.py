"""Diagnosis of this machine: what can run here, and installations that look right but do not work as expected."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._version import __version__
from yolov7_deploy.doctor.packages import OPENCV, Library, find_module, read_libraries
from yolov7_deploy.errors import PluginError
from yolov7_deploy.hardware.machine import Machine, read_machine
from yolov7_deploy.hub import OFFICIAL_NAMES, weights_folders
from yolov7_deploy.tensorrt.plugin_library import ABI_TITLES, BUILD_COMMAND, Abi, PluginLibrary, find_plugin
from yolov7_deploy.tensorrt.preflight import PlannedBuild, capability_findings

WEIGHT_SUFFIXES = (".pt", ".safetensors")
CUDA_PROVIDER = "CUDAExecutionProvider"
FIRST_V3_MAJOR = 10  # major version of TensorRT; TensorRT-RTX has plugin interface v3 since its first version
JETSON_WHEELS = "https://pypi.jetson-ai-lab.io/jp6/cu126/+simple"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capability:
    """A capability of this package: whether it works here, the reason (libraries, or what is missing), and a fix."""

    what: str
    possible: bool
    reason: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsFolder:
    """A folder in which official weights are looked for, and those found in it; `folder` is `None` if not set."""

    label: str
    folder: str | None
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Results of `diagnose`."""

    version: str
    python: str
    machine: Machine
    libraries: dict[str, Library]
    capabilities: tuple[Capability, ...]
    known_issues: tuple[KnownIssue, ...]
    weights: tuple[WeightsFolder, ...]


def diagnose() -> Diagnosis:
    """Examine this Python installation and this machine; missing or broken libraries raise no error."""
    libraries, machine = read_libraries(), read_machine()
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        machine=machine,
        libraries=libraries,
        capabilities=(*find_capabilities(libraries, machine), _run_nms_plugin(libraries, machine)),
        known_issues=tuple(find_known_issues(libraries, machine)),
        weights=tuple(find_weight_files()),
    )


def find_capabilities(libraries: dict[str, Library], machine: Machine) -> list[Capability]:
    """Return what works with these libraries on this machine, except the NMS plugin."""

    def needs(what: str, *names: str) -> Capability:
        return _needs(what, [libraries[name] for name in names])

    weights_cpu = needs("run .pt and .safetensors on the CPU", "torch", "safetensors", "cv2", "numpy")
    onnx_cpu = needs("run .onnx on the CPU", "onnxruntime", "cv2", "numpy")
    return [
        needs("read and convert checkpoints", "torch", "safetensors", "numpy"),
        needs("export to ONNX", "torch", "safetensors", "onnx", "onnxsim", "onnxruntime", "numpy"),
        weights_cpu,
        _on_gpu("run .pt and .safetensors on the GPU", weights_cpu, machine, _torch_on_gpu(libraries["torch"])),
        onnx_cpu,
        _on_gpu("run .onnx on the GPU", onnx_cpu, machine, _onnx_on_gpu(libraries["onnxruntime"], machine)),
        needs("measure accuracy (y7 val)", "faster_coco_eval", "yaml", "cv2", "numpy"),
        needs("train (y7 train)", "torch", "safetensors", "faster_coco_eval", "yaml", "matplotlib", "cv2", "numpy"),
        _build_engines(libraries, machine),
        _run_engines(libraries, machine),
    ]


def find_weight_files() -> list[WeightsFolder]:
    """Return the local folders of official weights in search order, with the files found in each."""
    names = [f"{name}{suffix}" for name in OFFICIAL_NAMES for suffix in WEIGHT_SUFFIXES]
    return [
        WeightsFolder(
            label=label,
            folder=None if folder is None else str(folder),
            files=() if folder is None else tuple(name for name in names if (folder / name).is_file()),
        )
        for label, folder in weights_folders().items()
    ]


def _needs(what: str, libraries: list[Library]) -> Capability:
    missing = [library for library in libraries if not library.works]
    if missing:
        return Capability(what=what, possible=False, reason=_missing_text(missing), fix=_install_command(missing))
    return Capability(what=what, possible=True, reason=", ".join(_label(library) for library in libraries))


def _missing_text(missing: list[Library]) -> str:
    not_installed = [library.name for library in missing if not library.installed and not library.fault]
    broken = [f"{library.name} does not load: {library.fault}" for library in missing if library.fault]
    parts = broken
    if not_installed:
        verb = "is" if len(not_installed) == 1 else "are"
        parts = [f"{', '.join(not_installed)} {verb} not installed", *broken]
    return "; ".join(parts)


def _install_command(missing: list[Library]) -> str:
    """Return the pip commands that install missing libraries, and reinstall those that do not load."""
    lines = []
    extras = sorted({library.extra for library in missing if library.extra and not library.fault})
    if extras:
        lines.append(f"pip install 'yolov7-deploy[{','.join(extras)}]'")
    if any(not library.extra and not library.fault for library in missing):
        lines.append("pip install yolov7-deploy")
    broken = [
        library.distributions[0].partition(" ")[0] for library in missing if library.fault and library.distributions
    ]
    if broken:
        lines.append(f"pip install --force-reinstall {' '.join(broken)}")
    return "; ".join(lines)


def _label(library: Library) -> str:
    return f"{library.name} {library.version}".strip()


def _on_gpu(what: str, on_cpu: Capability, machine: Machine, library: Capability) -> Capability:
    """Return the capability on a GPU: that on the CPU, with a GPU and a library that was built for it."""
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
    return Capability(what="", possible=True, reason=" ".join([_label(torch), *torch.details]))


def _onnx_on_gpu(onnxruntime: Library, machine: Machine) -> Capability:
    if CUDA_PROVIDER in onnxruntime.details:
        return Capability(what="", possible=True, reason=f"{_label(onnxruntime)} with {CUDA_PROVIDER}")
    fix = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'yolov7-deploy[gpu]'"
    if machine.jetson is not None:
        # PyPI has no onnxruntime-gpu for Jetson.
        index = f" --index-url {JETSON_WHEELS}" if machine.jetson.jetpack.startswith("6") else ""
        fix = f"pip uninstall -y onnxruntime; pip install onnxruntime-gpu{index}"
    return Capability(
        what="", possible=False, reason=f"{_label(onnxruntime)} has only {', '.join(onnxruntime.details)}", fix=fix
    )


def _build_engines(libraries: dict[str, Library], machine: Machine) -> Capability:
    """Return whether engines can be built: TensorRT needs a GPU, TensorRT-RTX does not."""
    what = "build TensorRT engines"
    full, rtx, onnx = (libraries[name] for name in ("tensorrt", "tensorrt_rtx", "onnx"))
    if full.works and machine.has_gpu:
        return _needs(what, [full, onnx])
    ready = _needs(what, [full if machine.has_gpu and not rtx.works else rtx, onnx])
    if full.works and not rtx.works:
        reason = f"{_label(full)} builds only where there is a GPU, and none is visible; {rtx.name} builds without one"
        return Capability(what=what, possible=False, reason=reason, fix=ready.fix)
    if ready.possible:
        return Capability(what=what, possible=True, reason=f"{ready.reason}, for any GPU it knows (y7 build --target)")
    return ready


def _run_engines(libraries: dict[str, Library], machine: Machine) -> Capability:
    what = "run TensorRT engines"
    from yolov7_deploy.runtimes.cudart import cuda_bindings  # imports cuda-python

    cuda = libraries["cuda"]
    has_other_binding = not cuda.works and next(cuda_bindings(), None) is not None  # a libcudart
    needed = [_tensorrt(libraries), *([] if has_other_binding else [cuda]), libraries["cv2"], libraries["numpy"]]
    ready = _needs(what, needed)
    return _on_gpu(what, ready, machine, ready)


def _run_nms_plugin(libraries: dict[str, Library], machine: Machine) -> Capability:
    possible, reason, fix = plugin_state(libraries, machine)
    return Capability(what="run NMS inside engines with our plugin", possible=possible, reason=reason, fix=fix)


def _tensorrt(libraries: dict[str, Library]) -> Library:
    """Return the TensorRT that works, preferring the full one to TensorRT-RTX."""
    rtx = libraries["tensorrt_rtx"]
    return rtx if rtx.works and not libraries["tensorrt"].works else libraries["tensorrt"]


# --- plugin -----------------------------------------------------------------------------------------------------------


def plugin_state(libraries: Mapping[str, Library], machine: Machine) -> tuple[bool, str, str]:
    """Return whether every installed TensorRT has our plugin, which library or why not, and the command to build it."""
    abis = _required_abis(libraries)
    if not abis:
        return False, "no TensorRT is installed", ""
    fix = BUILD_COMMAND
    reasons, possible = [], True
    for abi in abis:
        try:
            library = find_plugin(abi)
        except PluginError as error:
            return False, error.message, error.fix.rpartition("  ")[2]
        if library is None:
            possible = False
            reasons.append(f"the library for {ABI_TITLES[abi]} is not built")
            continue
        gpu = _unsupported_gpu(library, machine)
        if gpu is not None:
            possible = False
            fix = f"{BUILD_COMMAND} --arch {gpu}"
            reasons.append(f"{library.path} has no code for compute capability {gpu // 10}.{gpu % 10}")
        else:
            reasons.append(_library_text(library))
    return possible, "; ".join(reasons), "" if possible else fix


def _library_text(library: PluginLibrary) -> str:
    """Return `/a/lib.so for TensorRT 10 and later, compute capability 7.5, 8.6, CUDA 13.0`."""
    gpus = ", ".join(f"{number // 10}.{number % 10}" for number in library.compute_capabilities)
    return f"{library.path} for {ABI_TITLES[library.abi]}, compute capability {gpus}, CUDA {library.cuda}"


def _required_abis(libraries: Mapping[str, Library]) -> list[Abi]:
    """Return the plugin interfaces of the installed TensorRT versions."""
    abis: dict[Abi, None] = {}
    full = libraries["tensorrt"]
    if full.installed:
        major = full.version.partition(".")[0]
        abis["v2" if major.isdigit() and int(major) < FIRST_V3_MAJOR else "v3"] = None
    if libraries["tensorrt_rtx"].installed:
        abis["v3"] = None
    return list(abis)


def _unsupported_gpu(library: PluginLibrary, machine: Machine) -> int | None:
    """Return the compute capability of a GPU of this machine for which the library has no code."""
    boards = (machine.jetson,) if machine.jetson is not None else ()
    for device in (*machine.gpus, *boards):
        digits = device.compute_capability.replace(".", "")
        if digits.isdigit() and not library.runs_on(int(digits)):
            return int(digits)
    return None


RTX_LIBRARY = "libtensorrt_rtx.so"
RTX_LINKS = "$HOME/.local/lib/tensorrt_rtx"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownIssue:
    """A known issue: the problem with its effect, and the command that fixes it."""

    what: str
    fix: str


def find_known_issues(libraries: dict[str, Library], machine: Machine) -> list[KnownIssue]:
    """Return the known issues that this installation has."""
    return [
        *_two_opencvs(libraries["cv2"]),
        *_two_onnxruntimes(libraries["onnxruntime"]),
        *_tensorrt_without_this_gpu(libraries["tensorrt"], machine),
        *_rtx_without_link(libraries["tensorrt_rtx"]),
        *_broken_libraries(libraries),
    ]


def _names(library: Library) -> list[str]:
    return [entry.partition(" ")[0] for entry in library.distributions]


def _two_opencvs(cv2: Library) -> Iterator[KnownIssue]:
    names = _names(cv2)
    if len(names) > 1:
        yield KnownIssue(
            what=f"{' and '.join(names)} are both installed. They share the folder cv2, so files of one replace those "
            "of the other, and uninstalling either breaks both.",
            fix=f"pip uninstall -y {' '.join(names)}; pip install {OPENCV[0]}",
        )


def _two_onnxruntimes(onnxruntime: Library) -> Iterator[KnownIssue]:
    names = _names(onnxruntime)
    if len(names) > 1:
        preferred = next((name for name in names if name != "onnxruntime"), names[0])
        yield KnownIssue(
            what=f"{' and '.join(names)} are both installed. They share the folder onnxruntime, and the one installed "
            "last replaces the other: often the CPU build replaces the GPU build.",
            fix=f"pip uninstall -y {' '.join(names)}; pip install {preferred}",
        )


def _tensorrt_without_this_gpu(tensorrt: Library, machine: Machine) -> Iterator[KnownIssue]:
    """Yield an issue if this TensorRT no longer or not yet supports the GPU of this machine."""
    if not tensorrt.installed:
        return
    for capability in machine.capabilities:
        build = PlannedBuild(product="tensorrt", tensorrt=tensorrt.version, compute_capability=capability)
        for finding in capability_findings(build, capability):
            if finding.level == "error":
                yield KnownIssue(what=finding.text, fix=finding.fix)


def _rtx_without_link(rtx: Library) -> Iterator[KnownIssue]:
    """Yield an issue if libtensorrt_rtx.so is missing, which the parser loads: the wheel has only the .so.1."""
    spec = find_module("tensorrt_rtx_libs") if rtx.installed else None
    folders = [Path(text) for text in (spec.submodule_search_locations or ())] if spec else []
    real = next((path for folder in folders for path in sorted(folder.glob(f"{RTX_LIBRARY}.*"))), None)
    searched = [Path(text) for text in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if text]
    if real is None or any((folder / RTX_LIBRARY).exists() for folder in searched):
        return
    yield KnownIssue(
        what=f"The wheel of TensorRT-RTX has {real.name} but no {RTX_LIBRARY}, which its ONNX parser opens: parsing "
        "ends the process without a message. y7 build has a workaround; your own programs need the link.",
        fix=f"mkdir -p {RTX_LINKS}; ln -sf {real} {RTX_LINKS}/{RTX_LIBRARY}; "
        f"export LD_LIBRARY_PATH={RTX_LINKS}:$LD_LIBRARY_PATH",
    )


def _broken_libraries(libraries: dict[str, Library]) -> Iterator[KnownIssue]:
    for library in libraries.values():
        if library.fault:
            names = " ".join(_names(library)) or library.name
            fix = f"pip install --force-reinstall {names}"
            if "libGL" in library.fault:
                fix = f"pip uninstall -y {names}; pip install {OPENCV[0]}   (it needs no display libraries)"
            yield KnownIssue(what=f"{library.name} does not load: {library.fault}", fix=fix)
