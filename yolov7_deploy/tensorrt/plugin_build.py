"""Build our TensorRT plugin with CMake and nvcc, and install it where `find_plugin` finds it.

Nothing is downloaded: a missing tool is an error that states how to install it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._process import temporary_folder
from yolov7_deploy._text import expand_user, get_logger
from yolov7_deploy.errors import PluginError, UsageError
from yolov7_deploy.tensorrt.plugin_library import PluginLibrary, built_path, check_driver, describe_plugin

logger = get_logger(__name__)

CMAKE_MINIMUM = (3, 18)
HEADER = "NvInferRuntime.h"
HEADER_FOLDERS = (
    Path("/usr/include/x86_64-linux-gnu"),
    Path("/usr/include/aarch64-linux-gnu"),
    Path("/usr/include"),
    Path("/opt/tensorrt/include"),
    Path("/usr/local/tensorrt/include"),
)
# PyPI packages that contain nvcc and TensorRT headers, for machines without the CUDA toolkit or the -dev packages.
NVCC_WHEEL, HEADER_WHEEL = "nvidia-cuda-nvcc", "kernel-lens"
ERROR_LINES = 30

_ARCHITECTURE = re.compile(r"(?:sm_?|compute_?)?(\d{1,2})\.?(\d[af]?)")
_SPECIAL_ARCHITECTURES = ("native", "all", "all-major")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildTools:
    """Absolute paths of the build tools and of the TensorRT headers; `headers` is `None` for kernels only."""

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
    warnings_as_errors: bool = False,
    log: Callable[[str], None] = logger.info,
) -> PluginLibrary:
    """Compile the library and install it atomically. Takes minutes for all GPUs, half a minute for one.

    Args:
        tensorrt_include: Folder of the TensorRT headers, which determine the plugin interface; default: searched.
        cuda: Folder of a CUDA toolkit, or its nvcc; default: searched.
        architectures: GPUs such as `86`, `8.6` or `sm86`, or `native`, `all`, `all-major`; default: all that the
            toolkit supports.
        output: File to write if it ends in .so, else a folder; default: the path that `find_plugin` searches first.
        jobs: Number of parallel compilers; default: one per processor.
        kernels_only: Build the CUDA kernels without TensorRT.
        warnings_as_errors: Fail on a warning of a compiler, for the tests of this project.
        log: Called with a line for every step.

    Raises:
        UsageError: An architecture is invalid or not supported by the toolkit.
        PluginError: A tool is missing, the compiler fails, or the library cannot be written.
    """
    start = time.perf_counter()
    sources = plugin_sources()
    parsed = parse_architectures(architectures)
    tools = find_tools(tensorrt_include=tensorrt_include, cuda=cuda, kernels_only=kernels_only)
    _check_architectures(parsed, tools.nvcc)
    log(f"sources:  {sources}")
    log(f"nvcc:     {tools.nvcc}")
    if tools.headers is not None:
        log(f"TensorRT: {tools.headers}")
    target = "y7_kernels" if kernels_only else "y7_plugin"
    with temporary_folder("y7-plugin") as folder:
        options = [*_cmake_options(sources, folder, tools, parsed)]
        options += ["-DY7_WARNINGS_AS_ERRORS=ON"] if warnings_as_errors else []
        _run([str(tools.cmake), *options], tools, log)
        count = str(jobs or os.cpu_count() or 1)
        _run([str(tools.cmake), "--build", str(folder), "--target", target, "--parallel", count], tools, log)
        built = describe_plugin(folder / f"lib{target}.so")
        library = describe_plugin(_install(built.path, _destination(output, built)))
    try:
        check_driver(library, str(library.path))
    except PluginError as error:  # it may be for another machine
        logger.warning("%s", error)
    logger.info("plugin: %s -> %s in %.1f s", sources, library.path, time.perf_counter() - start)
    return library


def plugin_sources() -> Path:
    """Return the folder of the plugin's CMakeLists.txt, in a checkout or in the installed package.

    Raises:
        PluginError: There is none.
    """
    here = Path(__file__).resolve()
    folders = (here.parent / "plugin_sources", here.parents[2] / "plugins")
    for folder in folders:
        if (folder / "CMakeLists.txt").is_file() and (folder / "kernels" / "kernels.h").is_file():
            return folder
    raise PluginError(
        f"The plugin's sources are neither in {folders[0]} nor in {folders[1]}.",
        fix="Install the package again:  pip install --force-reinstall --no-deps yolov7-deploy",
    )


def parse_architectures(given: Sequence[str]) -> tuple[str, ...]:
    """Return architectures in CMake's form: `8.6` and `sm86` as `86`, sorted; or one of `native`, `all`, `all-major`.

    Raises:
        UsageError: One of them is not an architecture.
    """
    names = [name for text in given for name in re.split(r"[,;\s]+", text.strip().lower()) if name]
    if len(names) == 1 and names[0] in _SPECIAL_ARCHITECTURES:
        return (names[0],)
    numbers = []
    for name in names:
        found = _ARCHITECTURE.fullmatch(name)
        if found is None:
            raise UsageError(
                f"{name} is not a GPU architecture.", fix="For example: --arch 86, or --arch 8.6,8.9, or --arch native"
            )
        numbers.append(found[1] + found[2])
    return tuple(sorted(set(numbers), key=lambda text: (int(text.rstrip("af")), text)))


def find_tools(
    *, tensorrt_include: Path | None = None, cuda: Path | None = None, kernels_only: bool = False
) -> BuildTools:
    """Return CMake, a C++ compiler, nvcc and the TensorRT headers of this machine.

    Raises:
        PluginError: One is missing; the fix is a command that installs it.
    """
    return BuildTools(
        cmake=_cmake(),
        cxx=_cxx(),
        nvcc=_given_nvcc(cuda) if cuda is not None else _nvcc(),
        headers=None if kernels_only else _given_headers(tensorrt_include) if tensorrt_include else _headers(),
    )


def _cmake() -> Path:
    in_venv = Path(sys.executable).parent / "cmake"  # installed with pip in a virtual environment that is not activated
    versions = []
    for path in filter(None, (shutil.which("cmake"), str(in_venv) if in_venv.is_file() else None)):
        version = _first_version(path)
        if version >= CMAKE_MINIMUM:
            return Path(path).absolute()
        versions.append(f"{path} is {'.'.join(map(str, version)) or 'of an unknown version'}")
    minimum = ".".join(map(str, CMAKE_MINIMUM))
    raise PluginError(
        f"CMake {minimum} or later is required to build the plugin; "
        + (f"{' and '.join(versions)}." if versions else "no cmake was found on the PATH."),
        fix=f"pip install 'cmake>={minimum}'",
    )


def _first_version(path: str) -> tuple[int, ...]:
    """Return the version that a tool prints with --version; empty if it prints none."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    found = re.search(r"(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else ()


def _cxx() -> Path:
    given = os.environ.get("CXX")
    for name in (given,) if given else ("g++", "c++"):
        path = shutil.which(name)
        if path is not None:
            return Path(path).absolute()
    required = "A C++ compiler is required to build the plugin"
    if given:
        raise PluginError(f"{required}; $CXX is {given}, which was not found.", fix=_fix_variable("CXX"))
    raise PluginError(f"{required}; neither g++ nor c++ was found on the PATH.", fix="sudo apt-get install g++")


def _fix_variable(name: str) -> str:
    return f"unset {name}   (or set it to the path of one compiler, without options)"


def _given_nvcc(cuda: Path) -> Path:
    cuda = expand_user(cuda).absolute()
    path = cuda if cuda.is_file() else cuda / "bin" / "nvcc"
    if not path.is_file() or not os.access(path, os.X_OK):
        raise PluginError(
            f"--cuda {cuda}: {path} is not an executable nvcc.",
            fix="Use the folder of the CUDA toolkit, for example:  --cuda /usr/local/cuda",
        )
    return path


def _nvcc() -> Path:
    required = "nvcc, the CUDA compiler, is required to build the plugin"
    given = os.environ.get("CUDACXX")
    if given:
        found = shutil.which(given)
        if found is None:
            raise PluginError(f"{required}; $CUDACXX is {given}, which was not found.", fix=_fix_variable("CUDACXX"))
        return Path(found).absolute()
    for path in _nvcc_candidates():
        if path.is_file() and os.access(path, os.X_OK):
            return path.absolute()
    raise PluginError(
        f"{required}; it is not on the PATH, not in /usr/local/cuda*, and no {NVCC_WHEEL} is installed.",
        fix="Install the CUDA toolkit, or only its compiler:  pip install 'yolov7-deploy[plugin]'",
    )


def _nvcc_candidates() -> Iterator[Path]:
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path)
    yield from (Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    yield Path("/usr/local/cuda/bin/nvcc")
    yield from sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)
    yield from _wheel_files(NVCC_WHEEL, "bin/nvcc")


def _given_headers(folder: Path) -> Path:
    folder = expand_user(folder).absolute()
    if not (folder / HEADER).is_file():
        raise PluginError(
            f"--tensorrt-include {folder}: it does not contain {HEADER}.",
            fix="Use the folder of NvInfer.h, for example:  --tensorrt-include /usr/include/x86_64-linux-gnu",
        )
    return folder


def _headers() -> Path:
    for folder in HEADER_FOLDERS:
        if (folder / HEADER).is_file():
            return folder
    for file in _wheel_files(HEADER_WHEEL, f"/{HEADER}"):
        return file.parent
    raise PluginError(
        f"The TensorRT headers ({HEADER}) are required to build the plugin; they are not in "
        f"{', '.join(map(str, HEADER_FOLDERS))}.",
        fix="On Debian, Ubuntu and JetPack:  sudo apt-get install libnvinfer-headers-dev\n"
        "Elsewhere, the branch of your TensorRT:\n"
        "  git clone --depth 1 --branch release/10.3 https://github.com/NVIDIA/TensorRT\n"
        "  y7 plugin --tensorrt-include TensorRT/include\n"
        f"For TensorRT 10 and later and TensorRT-RTX also:  pip install {HEADER_WHEEL}",
    )


def _wheel_files(distribution: str, end: str) -> Iterator[Path]:
    """Yield the files of an installed distribution whose path ends with `end`."""
    try:
        files = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files or ():
        path = Path(str(file.locate()))
        if file.as_posix().endswith(end) and path.is_file():
            yield path.resolve()


def _check_architectures(architectures: Sequence[str], nvcc: Path) -> None:
    """Check that nvcc supports the architectures, before a minute of compilation."""
    try:
        done = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise PluginError(f"{nvcc} cannot be run: {error}", fix="y7 plugin --cuda /usr/local/cuda") from error
    supported = re.findall(r"sm_(\d+[af]?)", done.stdout)
    numbers = [name for name in architectures if name not in _SPECIAL_ARCHITECTURES]
    unsupported = [name for name in numbers if name.rstrip("af") not in supported]
    if supported and unsupported:
        raise UsageError(
            f"{nvcc} does not support {', '.join(unsupported)}; it supports {', '.join(supported)}.",
            fix="CUDA 12.9 is the last for 70 (V100) and 72 (Xavier):  --cuda /usr/local/cuda-12.9"
            if {"70", "72"} & set(unsupported)
            else "Use one of these, or a newer toolkit with  --cuda",
        )


def _cmake_options(sources: Path, folder: Path, tools: BuildTools, architectures: Sequence[str]) -> Iterator[str]:
    yield from ("-S", str(sources), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release")
    yield f"-DCMAKE_CUDA_COMPILER={tools.nvcc}"
    yield f"-DCMAKE_CXX_COMPILER={tools.cxx}"
    if tools.headers is None:
        yield "-DY7_KERNELS_ONLY=ON"
    else:
        yield f"-DTENSORRT_INCLUDE_DIR={tools.headers}"
    if architectures:
        *older, newest = architectures
        # Machine code for each, and PTX of the newest for future GPUs.
        yield f"-DCMAKE_CUDA_ARCHITECTURES={';'.join([*(f'{name}-real' for name in older), newest])}"


def _run(command: Sequence[str], tools: BuildTools, log: Callable[[str], None]) -> None:
    """Run CMake; log the lines that show progress, and raise an error with the compiler's messages."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines += filter(None, [line.rstrip()])
                if re.match(r"\[ *\d+(%|/\d+)\]|-- (CUDA|TensorRT) ", line):
                    log(line.rstrip())
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
    output = expand_user(output).absolute()
    is_file = output.suffix == ".so" and not output.is_dir()
    return output if is_file else output / built.path.name


def _install(built: Path, target: Path) -> Path:
    """Copy the library atomically, so that no process opens an incomplete one."""
    try:
        with atomic_write(target) as temporary:
            shutil.copyfile(built, temporary)
            temporary.chmod(0o755)
    except OSError as error:
        raise PluginError(
            f"The library was built, but could not be written to {target}: {error.strerror or error}.",
            fix="Use a writable path:  y7 plugin --output FILE.so  (and then  export Y7_PLUGIN=FILE.so)",
        ) from error
    return target
