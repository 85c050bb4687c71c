"""Building the plugin: search for the tools, validation of the options, and errors of the compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from yolov7_deploy.cli.app import app
from yolov7_deploy.errors import DeviceError, MissingLibraryError, PluginError, UsageError
from yolov7_deploy.runtimes.cuda import open_cuda
from yolov7_deploy.runtimes.letterbox_kernel import find_kernels
from yolov7_deploy.tensorrt import plugin_build
from yolov7_deploy.tensorrt import plugin_library as plugins
from yolov7_deploy.tensorrt.plugin_build import build_plugin, find_tools, parse_architectures, plugin_sources
from yolov7_deploy.tensorrt.plugin_library import KERNELS_ABI, PLUGIN_VARIABLE, find_plugin


@pytest.fixture(autouse=True)
def no_plugin(monkeypatch, tmp_path):
    """No plugin library is installed, and the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "SYSTEM_FOLDERS", (tmp_path / "system",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ()),
        (["86"], ("86",)),
        (["8.6,sm_75", "compute_120"], ("75", "86", "120")),
        (["sm86", "86"], ("86",)),
        (["90a;10.0"], ("90a", "100")),
        (["native"], ("native",)),
        (["all-major"], ("all-major",)),
    ],
)
def test_architectures_are_parsed_in_every_usual_form(given, expected):
    assert parse_architectures(given) == expected


@pytest.mark.parametrize("given", ["ampere", "8", "-86", "86,native", "1234", "8.6.1"])
def test_an_invalid_architecture_is_an_error(given):
    with pytest.raises(UsageError, match="is not a GPU architecture"):
        parse_architectures([given])


@pytest.fixture
def add_tool(tmp_path, monkeypatch):
    """Return a function that adds a tool to the PATH, which is otherwise empty; no tool of this machine is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(plugin_build, "HEADER_FOLDERS", (tmp_path / "include",))
    monkeypatch.setattr(plugin_build, "NVCC_WHEEL", "no-such-package")
    monkeypatch.setattr(plugin_build, "HEADER_WHEEL", "no-such-package-either")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))

    def add_tool(name: str, *lines: str) -> None:
        path = folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
        path.chmod(0o755)

    return add_tool


def test_every_missing_tool_is_an_error_with_the_install_command(add_tool, tmp_path, monkeypatch):
    if Path("/usr/local/cuda/bin/nvcc").is_file():
        real = Path.is_file
        monkeypatch.setattr(Path, "is_file", lambda self: "/cuda" not in str(self) and real(self))
    messages = []
    for tool, lines in (
        ("cmake", ("echo cmake version 3.16.3",)),
        ("cmake", ("echo cmake version 3.25.1",)),
        ("g++", ()),
        ("nvcc", ()),
    ):
        with pytest.raises(PluginError) as caught:
            find_tools()
        messages.append(str(caught.value))
        add_tool(tool, *lines)
    with pytest.raises(PluginError) as caught:
        find_tools()
    messages.append(str(caught.value))
    for text, parts in zip(
        messages,
        (
            ("no cmake was found", "pip install 'cmake>=3.18'"),
            ("cmake is 3.16", "pip install 'cmake>=3.18'"),
            ("neither g++ nor c++", "apt-get install g++"),
            ("nvcc, the CUDA compiler", "pip install 'yolov7-deploy[plugin]'"),
            ("NvInferRuntime.h", "libnvinfer-headers-dev"),
        ),
        strict=True,
    ):
        assert all(part in text for part in parts), text
    assert find_tools(kernels_only=True).headers is None
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    assert find_tools().headers == tmp_path / "include"


@pytest.mark.parametrize("name", ["CXX", "CUDACXX"])
def test_a_compiler_of_a_variable_that_does_not_exist_is_an_error(add_tool, monkeypatch, name):
    for tool, line in (("cmake", "echo cmake version 3.25.1"), ("g++", ""), ("nvcc", "")):
        add_tool(tool, line)
    assert find_tools(kernels_only=True).nvcc.name == "nvcc"
    monkeypatch.setenv(name, "ccache compiler")
    with pytest.raises(PluginError, match=rf"\${name} is ccache compiler, which was not found") as caught:
        find_tools(kernels_only=True)
    assert caught.value.fix.startswith(f"unset {name} ")


def test_the_compiler_and_the_headers_of_wheels_are_found(tmp_path, monkeypatch):
    for name, files in (
        ("nvidia-cuda-nvcc", ("nvidia/cu13/bin/nvcc",)),
        ("kernel-lens", ("kernel_lens/include/NvInferRuntime.h",)),
    ):
        metadata = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True)
            (tmp_path / file).touch(mode=0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugin_build, "HEADER_FOLDERS", ())
    assert plugin_build._headers() == tmp_path / "kernel_lens/include"
    assert tmp_path / "nvidia/cu13/bin/nvcc" in plugin_build._nvcc_candidates()


def test_given_folders_without_the_tool_are_an_error(tmp_path):
    with pytest.raises(PluginError, match="is not an executable nvcc"):
        find_tools(cuda=tmp_path, kernels_only=True)
    if shutil.which("cmake") and shutil.which("g++"):
        with pytest.raises(PluginError, match="does not contain"):
            find_tools(cuda=nvcc_or_skip(), tensorrt_include=tmp_path)


def nvcc_or_skip() -> Path:
    """Return the nvcc of this machine, or skip the test."""
    try:
        return find_tools(kernels_only=True).nvcc
    except PluginError as error:
        pytest.skip(error.message)


def test_an_architecture_that_cuda_does_not_support_is_an_error_before_the_build():
    known = subprocess.run([nvcc_or_skip(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    unsupported = "70" if "sm_70" not in known else "99"
    result = CliRunner().invoke(app, ["plugin", "--arch", unsupported, "--kernels-only"])
    assert isinstance(result.exception, UsageError)
    assert f"does not support {unsupported}" in result.exception.message
    if unsupported == "70":
        assert "CUDA 12.9 is the last" in result.exception.fix


def test_the_error_of_a_failing_compiler_is_shown_and_no_file_remains(monkeypatch, tmp_path):
    nvcc_or_skip()
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'fatal error: nothing works here' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(PluginError, match="could not be built") as caught:
        build_plugin(kernels_only=True, architectures=["86"], log=lambda _: None)
    assert "nothing works here" in caught.value.message
    assert str(broken) in caught.value.fix
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_an_output_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PluginError, match="could not be written"):
        plugin_build._install(Path(sys.executable), tmp_path / "file" / "lib.so")


def test_a_library_is_replaced_atomically(tmp_path):
    target = tmp_path / "there" / "lib.so"
    for source in (tmp_path / "old.so", tmp_path / "new.so"):
        source.write_bytes(source.name.encode() * 1000)
        assert plugin_build._install(source, target) == target
        assert target.read_bytes() == source.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_the_sources_are_those_of_this_checkout():
    assert plugin_sources() == Path(__file__).parents[2] / "plugins"


def test_the_kernels_build_without_tensorrt_and_are_found(tmp_path):
    nvcc_or_skip()
    lines: list[str] = []
    built = build_plugin(kernels_only=True, architectures=["86"], log=lines.append)
    assert (built.abi, built.compute_capabilities, built.ptx, built.headers) == ("kernels", (86,), (86,), "")
    assert find_plugin("kernels") == built
    assert find_plugin("v3") is None
    assert any("Building CUDA object" in line for line in lines)
    loaded = ctypes.CDLL(str(built.path))
    assert loaded.y7_kernels_abi() == KERNELS_ABI
    assert not hasattr(loaded, "getCreators")
    kernels = find_kernels((8, 6))
    assert kernels is not None
    assert kernels.path == built.path
    if not has_gpu():
        with pytest.raises(DeviceError, match=r"The letterbox of 1 frames on 8x8 float32 failed: .*(CUDA|driver)"):
            kernels.letterbox(batch=1, canvas_hw=(8, 8), dtype="float32", frames=64, canvas=64, stream=0)


@pytest.mark.slow
def test_a_warning_of_a_users_compiler_does_not_fail_the_build(monkeypatch, tmp_path):
    """A newer compiler has warnings that this project has never seen."""
    nvcc_or_skip()
    newer = tmp_path / "g++-99"
    warn = 'case "$*" in *description.cpp*) set -- -DY7_UNUSED -include "$0.h" "$@";; esac'
    newer.write_text(f'#!/bin/sh\n{warn}\nexec g++ "$@"\n', encoding="utf-8")
    newer.chmod(0o755)
    Path(f"{newer}.h").write_text("static void never_called() {}\n", encoding="utf-8")
    monkeypatch.setenv("CXX", str(newer))
    options = {"kernels_only": True, "architectures": ["86"], "output": tmp_path / "it.so", "log": lambda _: None}
    assert build_plugin(**options).abi == "kernels"
    with pytest.raises(PluginError, match="unused-function"):
        build_plugin(**options, warnings_as_errors=True)


def has_gpu() -> bool:
    """Return whether CUDA can be used."""
    try:
        open_cuda()
    except (DeviceError, MissingLibraryError):
        return False
    return True


@pytest.mark.slow
def test_ptx_of_one_architecture_only_is_not_for_later_gpus(tmp_path):
    nvcc_or_skip()
    names = ["100a", "120"]
    built = build_plugin(kernels_only=True, architectures=names, output=tmp_path / "it.so", log=lambda _: None)
    assert (built.compute_capabilities, built.exact, built.ptx) == ((100, 120), (100,), (120,))
    assert built.runs_on(100) and not built.runs_on(103) and built.runs_on(121)


@pytest.mark.slow
def test_every_architecture_of_the_toolkit_compiles_without_a_warning(tmp_path):
    nvcc = nvcc_or_skip()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = sorted({int(line.removeprefix("sm_")) for line in listed.split()} - set(range(70)))
    names, path = [str(number) for number in known], tmp_path / "all.so"
    built = build_plugin(
        kernels_only=True, architectures=names, output=path, warnings_as_errors=True, log=lambda _: None
    )
    assert list(built.compute_capabilities) == known
    assert built.ptx == (known[-1],)


@pytest.mark.slow
def test_by_default_every_gpu_of_the_table_is_compiled_for(tmp_path):
    nvcc = nvcc_or_skip()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    table = [70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 110, 120]
    known = [number for number in table if f"sm_{number}\n" in listed + "\n"]
    built = build_plugin(kernels_only=True, output=tmp_path / "default.so", log=lambda _: None)
    assert list(built.compute_capabilities) == known
    assert built.ptx == (known[-1],)


def test_an_output_is_a_folder_unless_it_ends_in_so(tmp_path):
    built = SimpleNamespace(path=tmp_path / "liby7.so")
    (tmp_path / "odd.so").mkdir()
    for output, target in (("new", "new/liby7.so"), ("a/my.so", "a/my.so"), ("odd.so", "odd.so/liby7.so")):
        assert plugin_build._destination(tmp_path / output, built) == tmp_path / target
