"""The search for the plugin library and its order, files that are not the library, and the report of y7 doctor."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.doctor.test_doctor import ORIN, PLAIN, WITH_T4, everything, library
from tests.fakes.faked_cuda import install_fake_nvml
from yolov7_deploy.doctor.doctor import plugin_state
from yolov7_deploy.errors import PluginError
from yolov7_deploy.tensorrt import plugin_library as plugins
from yolov7_deploy.tensorrt.plugin_library import (
    KERNELS_ABI,
    PLUGIN_VARIABLE,
    PluginLibrary,
    built_path,
    describe_plugin,
    find_kernels_library,
    find_plugin,
)

# The source of a library with a given description.
SOURCE = 'extern "C" const char* y7_plugin_description() {{ return {}; }}\n'
DESCRIPTION = (
    r'"{{\"name\": \"Y7NMS\", \"version\": \"{version}\", \"abi\": \"{abi}\", \"kernels_abi\": {kernels},'
    r" \"compute_capabilities\": [75, 86], \"exact\": [], \"ptx\": [86], \"cuda\": \"13.0\","
    r' \"headers\": \"10.14.1\"}}"'
)
MUTATIONS = 12


@pytest.fixture(autouse=True)
def no_plugin(monkeypatch, tmp_path):
    """No plugin library is installed, and the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "SYSTEM_FOLDERS", (tmp_path / "system",))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Return a function that compiles C++ source to a library, once per source."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    made: dict[str, Path] = {}

    def compile_(source: str) -> Path:
        if source not in made:
            folder = tmp_path_factory.mktemp("library")
            (folder / "it.cpp").write_text(source, encoding="utf-8")
            made[source] = folder / "it.so"
            subprocess.run(["g++", "-shared", "-fPIC", "-o", made[source], folder / "it.cpp"], check=True)
        return made[source]

    return compile_


@pytest.fixture
def described(compiled):
    """Return a function that compiles a library with a given plugin interface and version."""

    def make(abi="v3", version="1", kernels=KERNELS_ABI) -> Path:
        return compiled(SOURCE.format(DESCRIPTION.format(abi=abi, version=version, kernels=kernels)))

    return make


def install(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target


# --- search --------------------------------------------------------------------------------------------------------


def test_without_a_library_none_is_found():
    assert find_plugin("v3") is None
    assert find_plugin("v2") is None
    assert find_plugin("kernels") is None


def test_the_search_order_is_the_variable_then_the_built_library_then_system_folders(described, tmp_path, monkeypatch):
    system = install(described(), tmp_path / "system" / "liby7_plugin.so")
    assert find_plugin("v3").path == system
    built = install(described(), built_path("v3"))
    assert find_plugin("v3").path == built
    given = install(described(), tmp_path / "mine.so")
    monkeypatch.setenv(PLUGIN_VARIABLE, str(given))
    assert find_plugin("v3").path == given


def test_every_field_of_the_description_is_read(described):
    found = describe_plugin(described())
    assert found == PluginLibrary(
        path=found.path,
        abi="v3",
        version="1",
        kernels_abi=KERNELS_ABI,
        compute_capabilities=(75, 86),
        ptx=(86,),
        cuda="13.0",
        headers="10.14.1",
    )


def test_a_system_library_for_another_tensorrt_is_ignored(described, tmp_path):
    install(described("v2"), tmp_path / "system" / "liby7_plugin.so")
    assert find_plugin("v3") is None
    assert find_plugin("v2") is not None


def test_a_given_library_for_another_tensorrt_is_an_error(described, monkeypatch):
    monkeypatch.setenv(PLUGIN_VARIABLE, str(described("v2")))
    with pytest.raises(PluginError, match=r"TensorRT 8.5 to 9 \(abi v2\)") as caught:
        find_plugin("v3")
    assert caught.value.fix.endswith("unset Y7_PLUGIN; y7 plugin")


@pytest.mark.parametrize(("version", "kernels"), [("2", KERNELS_ABI), ("1", KERNELS_ABI + 1)])
def test_a_library_of_another_version_is_an_error(described, version, kernels):
    install(described("v3", version, kernels), built_path("v3"))
    with pytest.raises(PluginError, match=f"is plugin version {version} with kernels ABI {kernels}"):
        find_plugin("v3")


def test_a_given_library_of_any_interface_has_the_kernels(described, monkeypatch):
    monkeypatch.setenv(PLUGIN_VARIABLE, str(described("v2")))
    assert find_plugin("kernels").abi == "v2"


def test_the_kernels_come_from_any_library_in_the_order_v3_v2_kernels(described):
    assert find_kernels_library(86) is None
    for abi in ("kernels", "v2", "v3"):
        install(described(abi), built_path(abi))
        assert find_kernels_library(86).abi == abi
    assert find_kernels_library(70) is None


def test_the_kernels_come_only_from_a_given_library(described, monkeypatch):
    install(described("v3"), built_path("v3"))
    monkeypatch.setenv(PLUGIN_VARIABLE, str(described("v2")))
    assert find_kernels_library(86).abi == "v2"
    assert find_kernels_library(70) is None


def test_the_kernels_come_from_a_library_that_runs_on_the_gpu(compiled, described):
    line = DESCRIPTION.replace("75, 86]", "120]").replace("[86]", "[]")
    install(compiled(SOURCE.format(line.format(abi="v3", version="1", kernels=KERNELS_ABI))), built_path("v3"))
    install(described("kernels"), built_path("kernels"))
    assert find_kernels_library(86).abi == "kernels"
    assert find_kernels_library(120).abi == "v3"


@pytest.mark.parametrize(
    ("capability", "runs"), [(75, True), (86, True), (89, True), (120, True), (70, False), (80, False), (72, False)]
)
def test_a_library_runs_on_gpus_with_machine_code_or_ptx(described, capability, runs):
    assert describe_plugin(described()).runs_on(capability) is runs


def test_code_for_a_desktop_gpu_does_not_run_on_a_board(described):
    assert not replace(describe_plugin(described()), ptx=()).runs_on(87)


def test_code_of_one_architecture_only_runs_on_no_later_minor_version(described):
    library = replace(describe_plugin(described()), compute_capabilities=(86, 100, 120), exact=(100, 120), ptx=())
    assert [number for number in (86, 89, 100, 103, 120, 121) if library.runs_on(number)] == [86, 89, 100, 120]


# --- files that are not our library ----------------------------------------------------------------------------------

BROKEN = {
    "absent": (None, "does not exist"),
    "empty": (b"", "not a 64-bit ELF file"),
    "text": (b"This is not a library.\n" * 100, "not a 64-bit ELF file"),
    "zeros": (bytes(10_000), "not a 64-bit ELF file"),
    "an ELF header": (b"\x7fELF\x02\x01\x01" + bytes(57), "not a usable plugin library"),
    "a 32-bit header": (b"\x7fELF\x01\x01\x01" + bytes(57), "not a 64-bit ELF file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_a_library_is_a_plugin_error(tmp_path, monkeypatch, kind):
    content, message = BROKEN[kind]
    path = tmp_path / "broken.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(PLUGIN_VARIABLE, str(path))
    with pytest.raises(PluginError, match=message) as caught:
        find_plugin("v3")
    assert str(path) in caught.value.message
    assert "y7 plugin" in caught.value.fix


def test_a_folder_is_a_plugin_error(tmp_path):
    with pytest.raises(PluginError, match="it is a folder"):
        describe_plugin(tmp_path)


def test_another_library_is_a_plugin_error():
    extension = next(Path(np.__file__).parent.rglob("*.so"))
    with pytest.raises(PluginError, match="it is another library"):
        describe_plugin(extension)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_library_is_a_plugin_error(described, tmp_path, part):
    content = described().read_bytes()
    path = tmp_path / "truncated.so"
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(PluginError, match=r"has \d+ of \d+ bytes|not a 64-bit ELF file") as caught:
        describe_plugin(path)
    assert str(path) in caught.value.message


def test_damaged_libraries_do_not_crash_this_process(described, tmp_path):
    content = described().read_bytes()
    random = np.random.default_rng(0)
    outcomes = set()
    for number in range(MUTATIONS):
        mutated = bytearray(content)
        for offset in random.integers(0, len(content) // 3, 20):  # headers and tables
            mutated[offset] ^= int(random.integers(1, 256))
        path = tmp_path / f"mutated_{number}.so"
        path.write_bytes(mutated)
        try:
            describe_plugin(path)
            outcomes.add("read")
        except PluginError:
            outcomes.add("rejected")
    assert "rejected" in outcomes


@pytest.mark.parametrize(
    "text",
    [
        "nullptr",
        '""',
        '"not JSON"',
        '"[]"',
        r'"{\"name\": \"Y7NMS\"}"',
        DESCRIPTION.format(abi="v9", version="1", kernels=1),
    ],
)
def test_a_library_with_another_description_is_a_plugin_error(compiled, text):
    with pytest.raises(PluginError, match=r"does not have the description|not a usable"):
        describe_plugin(compiled(SOURCE.format(text)))


def test_a_library_that_aborts_is_a_plugin_error(compiled):
    source = "#include <cstdlib>\nstruct At { At() { abort(); } } at;\n" + SOURCE.format('""')
    with pytest.raises(PluginError, match="SIGABRT"):
        describe_plugin(compiled(source))


def test_a_library_that_hangs_is_a_plugin_error(compiled, monkeypatch):
    monkeypatch.setattr(plugins, "DESCRIBE_TIMEOUT_S", 1.0)
    source = "#include <unistd.h>\nstruct At { At() { sleep(1000); } } at;\n" + SOURCE.format('""')
    with pytest.raises(PluginError, match="timed out"):
        describe_plugin(compiled(source))


def test_output_of_a_library_when_it_is_loaded_is_ignored(compiled):
    line = DESCRIPTION.format(abi="v3", version="1", kernels=KERNELS_ABI)
    source = '#include <cstdio>\nstruct At { At() { puts("hello"); fflush(stdout); } } at;\n' + SOURCE.format(line)
    assert describe_plugin(compiled(source)).abi == "v3"


# --- the CUDA of the driver -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("supported", "fits"), [("12080", False), ("13000", True), ("13010", True), ("14000", True)])
def test_a_library_of_a_newer_cuda_than_the_driver_supports_is_refused(described, monkeypatch, supported, fits):
    install(described(), built_path("v3"))
    install_fake_nvml(monkeypatch)
    monkeypatch.setenv("FAKE_CUDA_VERSION", supported)
    if fits:
        assert find_plugin("v3") is not None and find_kernels_library(86) is not None
        return
    for search in (lambda: find_plugin("v3"), lambda: find_kernels_library(86)):
        with pytest.raises(PluginError, match=r"built with CUDA 13\.0; .* supports CUDA 12\.8 at most") as caught:
            search()
        assert "y7 plugin --cuda /usr/local/cuda-12.8" in caught.value.fix


def test_a_library_that_does_not_tell_its_cuda_is_found(compiled, monkeypatch):
    line = DESCRIPTION.replace("13.0", "").format(abi="v3", version="1", kernels=KERNELS_ABI)
    install(compiled(SOURCE.format(line)), built_path("v3"))
    install_fake_nvml(monkeypatch)
    assert find_plugin("v3") is not None


def test_without_a_driver_a_library_of_any_cuda_is_found(described, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.gpu.CUDA_DRIVER", "libnothing_of_this_name.so.1")
    install(described(), built_path("v3"))
    assert find_plugin("v3") is not None


# --- y7 doctor ------------------------------------------------------------------------------------------------------

ABSENT = {"tensorrt": library("tensorrt"), "tensorrt_rtx": library("tensorrt_rtx")}
OLD = {**ABSENT, "tensorrt": library("tensorrt", "tensorrt 8.6.1")}
NEW = {**ABSENT, "tensorrt": library("tensorrt", "tensorrt 10.3.0")}
RTX = {**ABSENT, "tensorrt_rtx": library("tensorrt_rtx", "tensorrt-rtx 1.7.1")}


def test_without_tensorrt_the_doctor_does_not_require_the_plugin():
    assert plugin_state(everything(**ABSENT), PLAIN) == (False, "no TensorRT is installed", "")


@pytest.mark.parametrize(("libraries", "title"), [(OLD, "TensorRT 8.5 to 9"), (NEW, "10 and later"), (RTX, "RTX")])
def test_the_doctor_shows_the_command_for_a_missing_library(libraries, title):
    possible, reason, fix = plugin_state(everything(**libraries), PLAIN)
    assert (possible, fix) == (False, "y7 plugin")
    assert title in reason


def test_the_doctor_describes_the_library(described):
    install(described(), built_path("v3"))
    possible, reason, fix = plugin_state(everything(**RTX), WITH_T4)
    assert (possible, fix) == (True, "")
    assert str(built_path("v3")) in reason
    assert "compute capability 7.5, 8.6, CUDA 13.0" in reason


def test_the_doctor_reports_a_library_without_code_for_the_gpu(compiled):
    line = DESCRIPTION.replace("86]", "120]").format(abi="v3", version="1", kernels=KERNELS_ABI)
    install(compiled(SOURCE.format(line)), built_path("v3"))
    possible, reason, fix = plugin_state(everything(**NEW), replace(PLAIN, jetson=ORIN))
    assert (possible, fix) == (False, "y7 plugin --arch 87")
    assert "no code for compute capability 8.7" in reason


def test_the_doctor_reports_a_broken_library(monkeypatch, tmp_path):
    (tmp_path / "it.so").write_text("text", encoding="utf-8")
    monkeypatch.setenv(PLUGIN_VARIABLE, str(tmp_path / "it.so"))
    possible, reason, fix = plugin_state(everything(**NEW), PLAIN)
    assert not possible
    assert "it.so" in reason
    assert fix == "unset Y7_PLUGIN; y7 plugin"
