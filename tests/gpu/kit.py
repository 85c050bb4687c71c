"""TensorRT 8.6 for a GPU machine that has none and no network: its libraries, its bindings and the Python they are for.

On a machine that reaches PyPI and has Python 3.10, write archive parts to .gpu/kit/ (downloads 780 MB; most of the ten
minutes are compression):

    python -m tests.gpu kit --python python3.10

Copy them to the GPU machine, and there:

    python -m tests.gpu unpack --archive FOLDER --folder /opt/trt86
    python -m tests.gpu run --kit /opt/trt86

The bindings are those of the same wheel as the libraries: the plugin registry of 8.6.1 differs from that of 8.6.0.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.archive import pack

REQUIREMENT = "tensorrt==8.6.0"
LIBRARIES = (
    *("libnvinfer.so.8", "libnvinfer_plugin.so.8", "libnvonnxparser.so.8", "libnvparsers.so.8"),
    "libnvinfer_builder_resource.so.8.6.0",
)
# Python packages that the parts with TensorRT import.
PACKAGES = ("numpy", "cuda-bindings<13", "cuda-core", "typer", "rich", "onnx", "opencv-python-headless")
# libnvinfer_plugin links these, and only plugins that no part uses call them: an empty library has their symbols.
UNUSED_LIBRARIES = {"cublas": "libcublas.so.12", "cublasLt": "libcublasLt.so.12", "cudnn": "libcudnn.so.8"}
_LEFT_OUT = ("test", "tests", "__pycache__", "site-packages", "idlelib", "tkinter", "ensurepip", "*.a", "config-3*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kit:
    """A kit on this machine: the interpreter, its packages, and the folders of the libraries."""

    python: str
    site: Path
    libraries: tuple[Path, ...]


def open_kit(folder: Path, python: str | None = None) -> Kit:
    """Return the kit in a folder.

    Args:
        folder: With `lib`, `site` and `python`.
        python: Another interpreter than that of the kit.

    Raises:
        FileNotFoundError: The kit or its interpreter is not there; the message says which.
    """
    if not (folder / "site" / "tensorrt").is_dir():
        raise FileNotFoundError(f"--kit {folder}: there is no {folder / 'site' / 'tensorrt'}; see tests/gpu/kit.py")
    own = sorted((folder / "python" / "bin").glob("python3.*"))
    chosen = shutil.which(python) if python else str(own[0]) if own else None
    if chosen is None:
        missing = python or folder / "python" / "bin"
        raise FileNotFoundError(f"--kit {folder}: there is no Python for it ({missing}); name one with --kit-python")
    return Kit(python=chosen, site=folder / "site", libraries=(folder / "lib", folder / "python" / "lib"))


def write_kit(archive: Path, python: str, *, wheel: Path | None = None, packages: Sequence[str] = PACKAGES) -> None:
    """Write a kit as archive parts.

    Args:
        archive: Folder of the parts.
        python: An interpreter of the version that the wheel is for.
        wheel: Wheel of TensorRT; downloaded by default.
        packages: Requirements to install into the kit.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "kit")
        (root / "lib").mkdir(parents=True)
        (root / "site").mkdir()
        _copy_tensorrt(wheel or _download(python, Path(folder)), root)
        _write_unused_libraries(root / "lib", Path(folder))
        _copy_python(python, root / "python")
        if packages:
            install = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
            subprocess.run([*install, "--target", str(root / "site"), *packages], check=True)
        pack(root, archive)


def _download(python: str, folder: Path) -> Path:
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, REQUIREMENT], check=True)
    return next(folder.glob("tensorrt-*.whl"))


def _copy_tensorrt(wheel: Path, root: Path) -> None:
    """Copy the libraries to lib/ and the bindings to site/tensorrt/."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename.rpartition("/")[2]
            if name in LIBRARIES:
                (root / "lib" / name).write_bytes(archive.read(entry))
            elif entry.filename.startswith("tensorrt/") and not name.startswith("lib"):
                archive.extract(entry, root / "site")


def _write_unused_libraries(folder: Path, work: Path) -> None:
    plugin = folder / "libnvinfer_plugin.so.8"
    listing = subprocess.run(["objdump", "-T", plugin], capture_output=True, text=True, check=True).stdout
    for name, library in UNUSED_LIBRARIES.items():
        symbols = sorted(set(re.findall(rf"\({re.escape(library)}\)\s+(\w+)$", listing, re.MULTILINE)))
        source, versions = work / f"{name}.c", work / f"{name}.map"
        source.write_text("".join(f"int {symbol}(void) {{ return 1; }}\n" for symbol in symbols), encoding="utf-8")
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", "-o", str(folder / library), str(source)]
        subprocess.run([*command, f"-Wl,-soname,{library}", f"-Wl,--version-script,{versions}"], check=True)


def _copy_python(python: str, target: Path) -> None:
    """Copy an interpreter and its standard library, which Python finds relative to the interpreter."""
    program = "import sys, sysconfig; print(sys.base_prefix); print(sysconfig.get_config_var('py_version_short'))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    prefix, version = done.stdout.split()
    library = target / "lib" / f"python{version}"
    ignored = shutil.ignore_patterns(*_LEFT_OUT)
    shutil.copytree(Path(prefix, "lib", f"python{version}"), library, symlinks=True, ignore=ignored)
    for path in Path(prefix, "lib").glob(f"libpython{version}.so*"):
        shutil.copy(path, target / "lib" / path.name)
    (target / "bin").mkdir()
    shutil.copy(Path(prefix, "bin", f"python{version}"), target / "bin")
