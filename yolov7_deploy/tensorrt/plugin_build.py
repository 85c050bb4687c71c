"""Builds our TensorRT plugin with CMake and nvcc, and puts it where `find_plugin` looks.

Nothing is installed and nothing is downloaded: a tool that is missing is an error that says how to get it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy.errors import PluginError, UsageError
from yolov7_deploy.tensorrt.plugin_library import PluginLibrary, built_path, describe_plugin

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

CMAKE_MINIMUM = (3, 18)
HEADER = "NvInferRuntime.h"
HEADER_FOLDERS = (
    Path("/usr/include/x86_64-linux-gnu"),
    Path("/usr/include/aarch64-linux-gnu"),
    Path("/usr/include"),
    Path("/opt/tensorrt/include"),
    Path("/usr/local/tensorrt/include"),
)
# PyPI packages with an nvcc and with TensorRT headers, for machines without the toolkit or the -dev packages.
NVCC_WHEEL, HEADER_WHEEL = "nvidia-cuda-nvcc", "kernel-lens"
NVCC_WHEELS = f"{NVCC_WHEEL} nvidia-cuda-runtime nvidia-cuda-cccl"
ERROR_LINES = 30

_ARCHITECTURE = re.compile(r"(?:sm_?|compute_?)?(\d{1,2})\.?(\d[af]?)")
_WORDS = ("native", "all", "all-major")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What a build needs, as absolute paths; `headers` is `None` for the kernels alone."""

    cmake: Path
    cxx: Path
    nvcc: Path
    headers: Path | None


def build_plugin(
    *,
    tensorrt_include: Path | None = None,
    cuda: Path | None = None,
    architectures: Sequence[str] = (),
    output: Path | None = None,
    jobs: int | None = None,
    kernels_only: bool = False,
    say: Say = logger.info,
) -> PluginLibrary:
    """Compiles the library and installs it whole or not at all; minutes for every GPU, half a minute for one.

    Args:
        tensorrt_include: Folder of the TensorRT headers; searched for without it. They decide which TensorRT the
            library is for.
        cuda: Folder of a CUDA toolkit, or its nvcc; searched for without it.
        architectures: GPUs such as `86`, `8.6` or `sm86`, or `native`, `all`, `all-major`; without any, all that the
            toolkit knows.
        output: File or folder to write to instead of the place where `find_plugin` looks.
        jobs: Compilers at once; without it, one a processor.
        kernels_only: Build the CUDA kernels without TensorRT.
        say: Gets a line for every step.

    Raises:
        UsageError: An architecture that is none, or that the toolkit does not compile for.
        PluginError: A tool is missing, the compiler fails, or the library cannot be written.
    """
    start = time.perf_counter()
    sources = plugin_sources()
    wanted = parse_architectures(architectures)
    tools = find_tools(tensorrt_include=tensorrt_include, cuda=cuda, kernels_only=kernels_only)
    _check_architectures(wanted, tools.nvcc)
    say(f"sources:  {sources}")
    say(f"nvcc:     {tools.nvcc}")
    if tools.headers is not None:
        say(f"TensorRT: {tools.headers}")
    target = "y7_kernels" if kernels_only else "y7_plugin"
    with tempfile.TemporaryDirectory(prefix="y7-plugin-") as folder:
        _run([str(tools.cmake), *_configuration(sources, Path(folder), tools, wanted)], tools, say)
        count = str(jobs or os.cpu_count() or 1)
        _run([str(tools.cmake), "--build", folder, "--target", target, "--parallel", count], tools, say)
        built = describe_plugin(Path(folder) / f"lib{target}.so")
        library = describe_plugin(_install(built.path, _destination(output, built)))
    logger.info("plugin: %s -> %s in %.1f s", sources, library.path, time.perf_counter() - start)
    return library


def plugin_sources() -> Path:
    """The folder of the plugin's CMakeLists.txt: of a checkout, or the copy inside the installed package.

    Raises:
        PluginError: This installation has neither.
    """
    here = Path(__file__).resolve()
    places = (here.parent / "plugin_sources", here.parents[2] / "plugins")
    for place in places:
        if (place / "CMakeLists.txt").is_file() and (place / "kernels" / "kernels.h").is_file():
            return place
    raise PluginError(
        f"The plugin's sources are neither in {places[0]} nor in {places[1]}.",
        fix="Install the package again:  pip install --force-reinstall --no-deps yolov7-deploy",
    )


def parse_architectures(given: Sequence[str]) -> tuple[str, ...]:
    """Architectures as CMake writes them, `8.6` and `sm86` as `86`; ascending, words as they are.

    Raises:
        UsageError: One of them is no architecture.
    """
    words = [word for text in given for word in re.split(r"[,;\s]+", text.strip().lower()) if word]
    if len(words) == 1 and words[0] in _WORDS:
        return (words[0],)
    numbers = []
    for word in words:
        found = _ARCHITECTURE.fullmatch(word)
        if found is None:
            raise UsageError(
                f"{word} is not a GPU architecture.", fix="For example: --arch 86, or --arch 8.6,8.9, or --arch native"
            )
        numbers.append(found[1] + found[2])
    return tuple(sorted(set(numbers), key=lambda text: (int(text.rstrip("af")), text)))


def find_tools(*, tensorrt_include: Path | None = None, cuda: Path | None = None, kernels_only: bool = False) -> Tools:
    """CMake, a C++ compiler, nvcc and the TensorRT headers of this machine.

    Raises:
        PluginError: One is missing; the fix says how to get it.
    """
    return Tools(
        cmake=_cmake(),
        cxx=_cxx(),
        nvcc=_given_nvcc(cuda) if cuda is not None else _nvcc(),
        headers=None if kernels_only else _given_headers(tensorrt_include) if tensorrt_include else _headers(),
    )


def _cmake() -> Path:
    beside = Path(sys.executable).parent / "cmake"  # of pip, in a virtual environment that is not activated
    versions = []
    for path in filter(None, (shutil.which("cmake"), str(beside) if beside.is_file() else None)):
        version = _first_version(path)
        if version >= CMAKE_MINIMUM:
            return Path(path).absolute()
        versions.append(f"{path} is {'.'.join(map(str, version)) or 'of an unknown version'}")
    wanted = ".".join(map(str, CMAKE_MINIMUM))
    raise PluginError(
        f"CMake {wanted} or later is needed to build the plugin; "
        + (f"{' and '.join(versions)}." if versions else "no cmake was found on the PATH."),
        fix=f"pip install 'cmake>={wanted}'",
    )


def _first_version(path: str) -> tuple[int, ...]:
    """The version a tool prints with --version; empty where it prints none."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    found = re.search(r"(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else ()


def _cxx() -> Path:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("g++", "c++"):
        path = shutil.which(name)
        if path is not None:
            return Path(path).absolute()
    what = f"$CXX is {chosen}, which was not found" if chosen else "neither g++ nor c++ was found on the PATH"
    raise PluginError(f"A C++ compiler is needed to build the plugin; {what}.", fix="sudo apt-get install g++")


def _given_nvcc(cuda: Path) -> Path:
    cuda = cuda.expanduser().absolute()
    path = cuda if cuda.is_file() else cuda / "bin" / "nvcc"
    if not path.is_file() or not os.access(path, os.X_OK):
        raise PluginError(
            f"--cuda {cuda}: there is no nvcc that can be run at {path}.",
            fix="Name the folder of the CUDA toolkit, for example:  --cuda /usr/local/cuda",
        )
    return path


def _nvcc() -> Path:
    for path in _nvcc_places():
        if path.is_file() and os.access(path, os.X_OK):
            return path.absolute()
    raise PluginError(
        "nvcc, the CUDA compiler, is needed to build the plugin; it is not on the PATH, not in /usr/local/cuda*, "
        f"and no {NVCC_WHEEL} is installed.",
        fix=f"Install the CUDA toolkit, or its compiler alone:  pip install {NVCC_WHEELS}",
    )


def _nvcc_places() -> Iterator[Path]:
    yield from (Path(os.environ[name]) for name in ("CUDACXX",) if os.environ.get(name))
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path)
    yield from (Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    yield Path("/usr/local/cuda/bin/nvcc")
    yield from sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)
    yield from _wheel_files(NVCC_WHEEL, "bin/nvcc")


def _given_headers(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    if not (folder / HEADER).is_file():
        raise PluginError(
            f"--tensorrt-include {folder}: there is no {HEADER} in it.",
            fix="Name the folder of NvInfer.h, for example:  --tensorrt-include /usr/include/x86_64-linux-gnu",
        )
    return folder


def _headers() -> Path:
    for folder in HEADER_FOLDERS:
        if (folder / HEADER).is_file():
            return folder
    for file in _wheel_files(HEADER_WHEEL, f"/{HEADER}"):
        return file.parent
    raise PluginError(
        f"The TensorRT headers ({HEADER}) are needed to build the plugin; they are not in "
        f"{', '.join(map(str, HEADER_FOLDERS))}.",
        fix="On Debian, Ubuntu and JetPack:  sudo apt-get install libnvinfer-headers-dev\n"
        "Elsewhere, the branch of your TensorRT:\n"
        "  git clone --depth 1 --branch release/10.3 https://github.com/NVIDIA/TensorRT\n"
        "  y7 plugin --tensorrt-include TensorRT/include\n"
        f"For TensorRT 10 and later and TensorRT-RTX also:  pip install {HEADER_WHEEL}",
    )


def _wheel_files(distribution: str, end: str) -> Iterator[Path]:
    """Files of an installed distribution whose path ends so."""
    try:
        files = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files or ():
        path = Path(str(file.locate()))
        if file.as_posix().endswith(end) and path.is_file():
            yield path.resolve()


def _check_architectures(wanted: Sequence[str], nvcc: Path) -> None:
    """Refuses what this nvcc does not compile for, before a minute is spent."""
    try:
        done = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise PluginError(f"{nvcc} cannot be run: {error}", fix="y7 plugin --cuda /usr/local/cuda") from error
    known = re.findall(r"sm_(\d+[af]?)", done.stdout)
    strangers = [name for name in wanted if name not in _WORDS and name.rstrip("af") not in known]
    if known and strangers:
        raise UsageError(
            f"{nvcc} does not compile for {', '.join(strangers)}; it knows {', '.join(known)}.",
            fix="CUDA 12.9 is the last for 70 (V100) and 72 (Xavier): name it with  --cuda /usr/local/cuda-12.9"
            if {"70", "72"} & set(strangers)
            else "Name one of these, or a newer toolkit with  --cuda",
        )


def _configuration(sources: Path, folder: Path, tools: Tools, wanted: Sequence[str]) -> Iterator[str]:
    yield from ("-S", str(sources), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release")
    yield f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"
    yield f"-DCMAKE_CXX_COMPILER={tools.cxx}"
    if tools.headers is None:
        yield "-DY7_KERNELS_ONLY=ON"
    else:
        yield f"-DTENSORRT_INCLUDE_DIR={tools.headers}"
    if wanted:
        # Machine code for each, and PTX of the last for GPUs to come.
        names = wanted if wanted[0] in _WORDS else [*(f"{name}-real" for name in wanted[:-1]), wanted[-1]]
        yield f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(names)}"


def _run(command: Sequence[str], tools: Tools, say: Say) -> None:
    """Runs CMake; every line of progress is said, and the errors are kept for the message."""
    lines: list[str] = []  # but empty ones
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines += filter(None, [line.rstrip()])
                if re.match(r"\[ *\d+(%|/\d+)\]|-- (CUDA|TensorRT) ", line):
                    say(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        first = next((number for number, line in enumerate(lines) if re.search(r"\berror\b", line, re.I)), None)
        shown = lines[-ERROR_LINES:] if first is None else lines[first : first + ERROR_LINES]
        raise PluginError(
            "\n".join(
                [f"The plugin could not be built ({Path(command[0]).name} ended with {process.returncode}):", *shown]
            ),
            fix=f"The compilers were {tools.nvcc} and {tools.cxx}. To use others:  "
            "CXX=g++-11 y7 plugin --cuda /usr/local/cuda-11.8",
        )


def _destination(output: Path | None, built: PluginLibrary) -> Path:
    if output is None:
        return built_path(built.abi)
    output = output.expanduser().absolute()
    return output / built.path.name if output.is_dir() else output


def _install(built: Path, target: Path) -> Path:
    """Copies under a temporary name and renames, so that no process ever opens half a library."""
    try:
        with whole_file(target) as unfinished:
            shutil.copyfile(built, unfinished)
            unfinished.chmod(0o755)
    except OSError as error:
        raise PluginError(
            f"The library was built, but could not be written to {target}: {error.strerror or error}.",
            fix="Name a place that can be written:  y7 plugin --output FILE.so  (and then  export Y7_PLUGIN=FILE.so)",
        ) from error
    return target
