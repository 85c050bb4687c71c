"""The container image for a machine, and the docker commands that build and run it there.

`docker/` of the repository has the Dockerfiles. JetPack 5 has no image: its Python 3.8 cannot run this package, so such
a board gets an ONNX file, the source of the plugin, and an engine that its own trtexec builds.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.hardware.jetson import version_numbers
from yolov7_deploy.hardware.machine import Jetson, Machine
from yolov7_deploy.hardware.system import ROOT, read_text

REPOSITORY = "yolov7-deploy"  # of the images, and first part of the name of their volume
UID = 10001  # of the user in the images
CACHE, WORK = "/cache", "/work"  # folders in the images: compiled networks and engines, and the working directory
FIRST_JETPACK6 = (36, 4)  # L4T of JetPack 6.1, the first with the CUDA 12.6 and the TensorRT 10.3 of the image
VOLTA, FIRST_SUPPORTED = "7.0", (7, 0)  # compute capabilities: V100, and the first that TensorRT 10 supports
# On a Jetson the nodes of the GPU belong to these groups of the host, whose numbers differ between boards.
GPU_GROUPS = ("video", "render")


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A container image.

    Attributes:
        name: Name of its Dockerfile and its tag.
        runs_on: Machines that it is for.
        gpu: Options of `docker run` that give it the GPU.
    """

    name: str
    runs_on: str
    gpu: tuple[str, ...]


_JETSON_GPU, _SERVER_GPU = ("--runtime", "nvidia"), ("--gpus", "all")
IMAGES = (
    Image(name="jetson-jetpack7", runs_on="Jetson Orin and Thor with JetPack 7", gpu=_JETSON_GPU),
    Image(name="jetson-jetpack6", runs_on="Jetson Orin with JetPack 6.1 or later", gpu=_JETSON_GPU),
    Image(name="server", runs_on="NVIDIA GPUs of compute capability 7.5 and later (T4 and newer)", gpu=_SERVER_GPU),
    Image(name="v100", runs_on="NVIDIA V100", gpu=_SERVER_GPU),
    Image(name="cpu", runs_on="CPUs, with ONNX Runtime and OpenVINO", gpu=()),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerPlan:
    """The image of a machine.

    Attributes:
        image: Its name.
        reason: The part of the machine that decided it.
        build: Command that builds it, in the root of the repository.
        run: Command that runs it, in the folder with the models and images.
        notes: What to know before, one sentence each.
    """

    image: str
    reason: str
    build: str
    run: str
    notes: tuple[str, ...] = ()


def plan_container(
    machine: Machine, *, image: str | None = None, is_root: bool = False, root: Path = ROOT
) -> ContainerPlan:
    """Return the image for a machine, and the commands.

    Args:
        machine: The machine.
        image: Name of another image to use.
        is_root: The user of the host is root, who must not be the user in the container.
        root: Folder that contains `etc`.

    Raises:
        UsageError: There is no such image.
        DeviceError: There is no image for this Jetson; the fix is what to do instead.
    """
    if image is not None:
        chosen, reason = _image(image), "as given"
    else:
        name, reason = _for_jetson(machine.jetson) if machine.jetson else _for_gpus(machine)
        chosen = _image(name)
    tag = f"{REPOSITORY}:{chosen.name}"
    file = f"docker/{chosen.name}.Dockerfile"
    return ContainerPlan(
        image=chosen.name,
        reason=reason,
        build=shlex.join(["docker", "build", "--file", file, "--tag", tag, "."]),
        run=_run_line(
            chosen, tag, groups=_group_numbers(root) if machine.jetson and chosen.gpu else (), is_root=is_root
        ),
        notes=_notes(machine, chosen, is_root=is_root),
    )


def _image(name: str) -> Image:
    found = next((image for image in IMAGES if image.name == name), None)
    if found is None:
        known = ", ".join(image.name for image in IMAGES)
        raise UsageError(f"There is no image {name}.", fix=f"One of: {known}")
    return found


def _for_jetson(board: Jetson) -> tuple[str, str]:
    version = version_numbers(board.l4t)
    release = f"JetPack {board.jetpack or 'unknown'} (L4T {board.l4t or 'unknown'})"
    what = f"{board.model}, {release}"
    if board.jetpack.startswith("7"):
        return "jetson-jetpack7", what
    if version[:2] >= FIRST_JETPACK6:
        return "jetson-jetpack6", what
    if board.jetpack.startswith("6"):
        raise DeviceError(
            f"{what}: the image for JetPack 6 needs JetPack 6.1 or later, whose driver supports CUDA 12.6.",
            fix="Update the board, or try the image anyway:  y7 docker --image jetson-jetpack6",
        )
    if board.jetpack.startswith("5"):
        raise _plan_and_plugin_only(what, board)
    raise DeviceError(
        f"{what}: there are images for JetPack 6.1 and later and for JetPack 7.",
        fix="To choose one:  y7 docker --image jetson-jetpack6",
    )


def _plan_and_plugin_only(what: str, board: Jetson) -> DeviceError:
    architecture = board.compute_capability.replace(".", "") or "72"
    return DeviceError(
        f"{what}: there is no image for JetPack 5, whose Python 3.8 cannot run this package. It gets an engine (plan) "
        "and the plugin as source only.",
        fix="Copy plugins/ and an ONNX file, exported elsewhere with  y7 export --opset 17  , to the board. There,\n"
        "with CMake 3.18 or later (python3 -m pip install cmake):\n"
        f"  cmake -S plugins -B build -DCMAKE_CUDA_ARCHITECTURES={architecture} && cmake --build build -j\n"
        "  /usr/src/tensorrt/bin/trtexec --onnx=MODEL.onnx --fp16 --plugins=build/liby7_plugin.so "
        "--saveEngine=MODEL.engine",
    )


def _for_gpus(machine: Machine) -> tuple[str, str]:
    known = {gpu.name: gpu.compute_capability for gpu in machine.gpus}
    usable = {name: text for name, text in known.items() if not text or version_numbers(text) >= FIRST_SUPPORTED}
    if not usable:
        return "cpu", f"no NVIDIA GPU that TensorRT 10 supports ({_listed(known)})" if known else "no NVIDIA GPU"
    image = "v100" if VOLTA in usable.values() else "server"
    return image, _listed(usable)


def _listed(gpus: dict[str, str]) -> str:
    return ", ".join(f"{name}, compute capability {capability or 'unknown'}" for name, capability in gpus.items())


def _run_line(image: Image, tag: str, *, groups: Sequence[int], is_root: bool) -> str:
    """Return the command that runs `y7 doctor` in the image, as the user who types it unless that is root."""
    added = [word for number in groups for word in ("--group-add", str(number))]
    words = ["docker", "run", "--rm", *image.gpu, *added]
    user = "" if is_root else ' --user "$(id -u):$(id -g)"'
    return f'{shlex.join(words)}{user} --volume {REPOSITORY}-cache:{CACHE} --volume "$PWD":{WORK} {tag} doctor'


def _group_numbers(root: Path) -> tuple[int, ...]:
    found = re.findall(r"^([\w-]+):[^:\n]*:(\d+):", read_text(root / "etc/group"), re.MULTILINE)
    return tuple(int(number) for name, number in found if name in GPU_GROUPS)


def _notes(machine: Machine, image: Image, *, is_root: bool) -> tuple[str, ...]:
    notes = []
    capabilities = {gpu.compute_capability for gpu in machine.gpus}
    if image.name == "v100" and len(capabilities) > 1:
        notes.append("TensorRT 10.4 of this image is the last for the V100; it also runs GPUs up to 9.0 (H100).")
    if image.gpu == _SERVER_GPU:
        notes.append("The GPU needs NVIDIA's driver and the NVIDIA Container Toolkit on the host.")
    if image.gpu == _JETSON_GPU and machine.jetson is None:
        notes.append("On the board, y7 docker adds the groups of the GPU's device nodes.")
    if is_root:
        notes.append(f"The container's user {UID} must be able to write to the folder with your models and images.")
    return tuple(notes)
