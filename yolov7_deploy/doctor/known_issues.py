"""Known issues of installations that look right but do not work as expected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.doctor.packages import OPENCV, Library, find_module
from yolov7_deploy.hardware.machine import Machine
from yolov7_deploy.tensorrt.preflight import PlannedBuild, capability_findings

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
