"""The plugin library is found in the order promised, and no file that is not it harms the process; the doctor tells."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.doctor.test_doctor import ORIN, PLAIN, WITH_T4, everything, library
from yolov7_deploy.doctor.plugin import plugin_state
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

# A library that says of itself what a test wants.
SAYS = 'extern "C" const char* y7_plugin_description() {{ return {}; }}\n'
LINE = (
    r'"{{\"name\": \"Y7NMS\", \"version\": \"{version}\", \"abi\": \"{abi}\", \"kernels_abi\": {kernels},'
    r' \"compute_capabilities\": [75, 86], \"ptx\": [86], \"cuda\": \"13.0\", \"headers\": \"10.14.1\"}}"'
)
MUTATIONS = 12


@pytest.fixture(autouse=True)
def nothing_built(monkeypatch, tmp_path):
    """No library anywhere, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "SYSTEM_FOLDERS", (tmp_path / "system",))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Compiles a line of C++ to a library, each once."""
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
def saying(compiled):
    """A library of a kind and version."""

    def make(abi="v3", version="1", kernels=KERNELS_ABI) -> Path:
        return compiled(SAYS.format(LINE.format(abi=abi, version=version, kernels=kernels)))

    return make


def placed(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target


# --- Finding -------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_was_built():
    assert find_plugin("v3") is None
    assert find_plugin("v2") is None
    assert find_plugin("kernels") is None


def test_the_named_library_comes_before_the_built_one_and_that_before_the_system(saying, tmp_path, monkeypatch):
    system = placed(saying(), tmp_path / "system" / "liby7_plugin.so")
    assert find_plugin("v3").path == system
    built = placed(saying(), built_path("v3"))
    assert find_plugin("v3").path == built
    named = placed(saying(), tmp_path / "mine.so")
    monkeypatch.setenv(PLUGIN_VARIABLE, str(named))
    assert find_plugin("v3").path == named


def test_a_library_is_read_whole(saying):
    found = describe_plugin(saying())
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


def test_a_system_library_for_another_tensorrt_is_passed_over(saying, tmp_path):
    placed(saying("v2"), tmp_path / "system" / "liby7_plugin.so")
    assert find_plugin("v3") is None
    assert find_plugin("v2") is not None


def test_a_named_library_for_another_tensorrt_is_refused(saying, monkeypatch):
    monkeypatch.setenv(PLUGIN_VARIABLE, str(saying("v2")))
    with pytest.raises(PluginError, match=r"TensorRT 8.5 to 9 \(abi v2\)") as caught:
        find_plugin("v3")
    assert caught.value.fix.endswith("unset Y7_PLUGIN; y7 plugin")


@pytest.mark.parametrize(("version", "kernels"), [("2", KERNELS_ABI), ("1", KERNELS_ABI + 1)])
def test_a_library_of_another_version_is_refused(saying, version, kernels):
    placed(saying("v3", version, kernels), built_path("v3"))
    with pytest.raises(PluginError, match=f"version {version} of the plugin with kernels {kernels}"):
        find_plugin("v3")


def test_any_of_our_libraries_serves_who_wants_the_kernels(saying, monkeypatch):
    monkeypatch.setenv(PLUGIN_VARIABLE, str(saying("v2")))
    assert find_plugin("kernels").abi == "v2"


def test_the_kernels_come_from_the_plugin_of_any_tensorrt_and_the_newest_shell_first(saying):
    assert find_kernels_library(86) is None
    for abi in ("kernels", "v2", "v3"):
        placed(saying(abi), built_path(abi))
        assert find_kernels_library(86).abi == abi
    assert find_kernels_library(70) is None


def test_the_kernels_come_from_the_library_that_is_named_and_from_no_other(saying, monkeypatch):
    placed(saying("v3"), built_path("v3"))
    monkeypatch.setenv(PLUGIN_VARIABLE, str(saying("v2")))
    assert find_kernels_library(86).abi == "v2"
    assert find_kernels_library(70) is None


def test_the_kernels_of_a_library_that_runs_on_the_gpu_are_taken(compiled, saying):
    line = LINE.replace("75, 86]", "120]").replace("[86]", "[]")
    placed(compiled(SAYS.format(line.format(abi="v3", version="1", kernels=KERNELS_ABI))), built_path("v3"))
    placed(saying("kernels"), built_path("kernels"))
    assert find_kernels_library(86).abi == "kernels"
    assert find_kernels_library(120).abi == "v3"


@pytest.mark.parametrize(
    ("capability", "runs"), [(75, True), (86, True), (89, True), (120, True), (70, False), (80, False), (72, False)]
)
def test_which_gpus_a_library_serves(saying, capability, runs):
    assert describe_plugin(saying()).runs_on(capability) is runs


def test_code_for_a_desktop_gpu_does_not_serve_a_board(saying):
    assert not replace(describe_plugin(saying()), ptx=()).runs_on(87)


# --- Files that are not our library ----------------------------------------------------------------------------------

BROKEN = {
    "absent": (None, "There is no plugin library"),
    "empty": (b"", "no 64-bit ELF file"),
    "text": (b"This is no library.\n" * 100, "no 64-bit ELF file"),
    "zeros": (bytes(10_000), "no 64-bit ELF file"),
    "an ELF header": (b"\x7fELF\x02\x01\x01" + bytes(57), "not a usable plugin library"),
    "a 32-bit header": (b"\x7fELF\x01\x01\x01" + bytes(57), "no 64-bit ELF file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_library_is_an_error_of_ours(tmp_path, monkeypatch, kind):
    content, words = BROKEN[kind]
    path = tmp_path / "broken.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(PLUGIN_VARIABLE, str(path))
    with pytest.raises(PluginError, match=words) as caught:
        find_plugin("v3")
    assert str(path) in caught.value.message
    assert "y7 plugin" in caught.value.fix


def test_a_folder_is_an_error_of_ours(tmp_path):
    with pytest.raises(PluginError, match="it is a folder"):
        describe_plugin(tmp_path)


def test_a_foreign_library_is_an_error_of_ours():
    extension = next(Path(np.__file__).parent.rglob("*.so"))
    with pytest.raises(PluginError, match="it is a library, but not ours"):
        describe_plugin(extension)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_library_is_an_error_of_ours(saying, tmp_path, part):
    whole = saying().read_bytes()
    path = tmp_path / "truncated.so"
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(PluginError, match=r"has \d+ of \d+ bytes|no 64-bit ELF file") as caught:
        describe_plugin(path)
    assert str(path) in caught.value.message


def test_mutated_libraries_never_take_this_process_with_them(saying, tmp_path):
    whole = saying().read_bytes()
    random = np.random.default_rng(0)
    outcomes = set()
    for number in range(MUTATIONS):
        mutated = bytearray(whole)
        for place in random.integers(0, len(whole) // 3, 20):  # headers and tables
            mutated[place] ^= int(random.integers(1, 256))
        path = tmp_path / f"mutated_{number}.so"
        path.write_bytes(mutated)
        try:
            describe_plugin(path)
            outcomes.add("read")
        except PluginError:
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize(
    "text",
    ["nullptr", '""', '"no JSON"', '"[]"', r'"{\"name\": \"Y7NMS\"}"', LINE.format(abi="v9", version="1", kernels=1)],
)
def test_a_library_that_describes_something_else_is_refused(compiled, text):
    with pytest.raises(PluginError, match=r"describe itself|not a usable"):
        describe_plugin(compiled(SAYS.format(text)))


def test_a_library_that_aborts_is_refused(compiled):
    source = "#include <cstdlib>\nstruct At { At() { abort(); } } at;\n" + SAYS.format('""')
    with pytest.raises(PluginError, match="SIGABRT"):
        describe_plugin(compiled(source))


def test_a_library_that_hangs_is_refused(compiled, monkeypatch):
    monkeypatch.setattr(plugins, "DESCRIBE_TIMEOUT_S", 1.0)
    source = "#include <unistd.h>\nstruct At { At() { sleep(1000); } } at;\n" + SAYS.format('""')
    with pytest.raises(PluginError, match="timed out"):
        describe_plugin(compiled(source))


def test_what_a_library_prints_when_it_is_opened_does_no_harm(compiled):
    line = LINE.format(abi="v3", version="1", kernels=KERNELS_ABI)
    source = '#include <cstdio>\nstruct At { At() { puts("hello"); fflush(stdout); } } at;\n' + SAYS.format(line)
    assert describe_plugin(compiled(source)).abi == "v3"


# --- The doctor -----------------------------------------------------------------------------------------------------

ABSENT = {"tensorrt": library("tensorrt"), "tensorrt_rtx": library("tensorrt_rtx")}
OLD = {**ABSENT, "tensorrt": library("tensorrt", "tensorrt 8.6.1")}
NEW = {**ABSENT, "tensorrt": library("tensorrt", "tensorrt 10.3.0")}
RTX = {**ABSENT, "tensorrt_rtx": library("tensorrt_rtx", "tensorrt-rtx 1.7.1")}


def test_the_doctor_asks_for_no_plugin_without_tensorrt():
    assert plugin_state(everything(**ABSENT), PLAIN) == (False, "no TensorRT is installed", "")


@pytest.mark.parametrize(("libraries", "title"), [(OLD, "TensorRT 8.5 to 9"), (NEW, "10 and later"), (RTX, "RTX")])
def test_the_doctor_names_the_command_where_the_library_is_missing(libraries, title):
    possible, reason, fix = plugin_state(everything(**libraries), PLAIN)
    assert (possible, fix) == (False, "y7 plugin")
    assert title in reason


def test_the_doctor_says_what_was_found(saying):
    placed(saying(), built_path("v3"))
    possible, reason, fix = plugin_state(everything(**RTX), WITH_T4)
    assert (possible, fix) == (True, "")
    assert str(built_path("v3")) in reason
    assert "compute capability 7.5, 8.6, CUDA 13.0" in reason


def test_the_doctor_sees_that_a_library_is_for_other_gpus(compiled):
    line = LINE.replace("86]", "120]").format(abi="v3", version="1", kernels=KERNELS_ABI)
    placed(compiled(SAYS.format(line)), built_path("v3"))
    possible, reason, fix = plugin_state(everything(**NEW), replace(PLAIN, jetson=ORIN))
    assert (possible, fix) == (False, "y7 plugin --arch 87")
    assert "no code for compute capability 8.7" in reason


def test_the_doctor_survives_a_broken_library(monkeypatch, tmp_path):
    (tmp_path / "it.so").write_text("text", encoding="utf-8")
    monkeypatch.setenv(PLUGIN_VARIABLE, str(tmp_path / "it.so"))
    possible, reason, fix = plugin_state(everything(**NEW), PLAIN)
    assert not possible
    assert "it.so" in reason
    assert fix == "unset Y7_PLUGIN; y7 plugin"
