"""Every TensorRT call of the product on NVIDIA's Python bindings of seven versions, and the table in docs/tensorrt.md.

The bindings are wheels of about 1.2 MB without TensorRT's libraries, downloaded into `$Y7_TENSORRT_BINDINGS` or a
temporary folder. `tests/fakes/nvinfer` is in the place of the libraries. It answers every call without meaning, or runs
engines: then the tests of the runtime pass on the bindings.

Each version has three processes: `MODULE` without arguments, `MODULE refuse`, and pytest with the tests of the runtime.
All that the selected tests need run two at a time, beside each other; a test waits for those of its version.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.fakes import fake_tensorrt
from tests.support.tensorrt_wheels import downloaded_wheel, wheel_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
UPDATE_VARIABLE = "Y7_UPDATE_DOCS"
DOCUMENT = ROOT / "docs" / "tensorrt.md"
START, END = "<!-- start of the table of versions -->\n", "<!-- end of the table of versions -->\n"
VERSIONS = {
    "8.6": "tensorrt_bindings==8.6.1",
    "10.3": "tensorrt_cu12_bindings==10.3.0",
    "10.4": "tensorrt_cu12_bindings==10.4.0",
    "10.13": "tensorrt_cu12_bindings==10.13.3.9",
    "10.16": "tensorrt_cu13_bindings==10.16.1.11",
    "11.0": "tensorrt_cu13_bindings==11.0.0.114",
    "11.4": "tensorrt_cu13_bindings==11.4.0.106",
}
LIBRARIES = ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so", "libnvparsers.so")
MAJORS = (8, 10, 11)
TIMEOUT_S = 400  # of a process; the longest needs 25 s of an idle core
SEGMENTATION_FAULT = -11
# Calls that every version must have received; the rest depends on the version.
CALLS = {
    "Builder.build_serialized_network",
    "EngineInspector.get_engine_information",
    "IBuilderConfig.set_flag",
    "ICudaEngine.get_tensor_profile_shape",
    "ICudaEngine.num_optimization_profiles",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async",
    "IExecutionContext.set_tensor_address",
    "IOptimizationProfile.set_shape",
    "IPluginRegistry.load_library",
    "ITimingCache.serialize",
    "OnnxParser.get_error",
    "Runtime.deserialize_cuda_engine",
}
YES, NO = "yes", "no"
# The first two, with a real network, are for every version; all of them for one of each major version.
NAMES = ("tensorrt_network", "tensorrt", "tensorrt_graphs", "tensorrt_open", "tensorrt_threads", "device_arrays")
RUNTIME_TESTS = [str(ROOT / "tests" / "runtimes" / f"test_{name}.py") for name in NAMES]
ALL_TESTS = ("8.6", "10.13", "11.4")
# The functional libnvinfer has no plugin registry. Real ones are tested in tests/plugins/test_plugin_registry.py.
OF_THE_REGISTRY = "test_our_plugin_is_registered_before_the_plan_is_deserialized"
MIN_PASSED, MIN_PASSED_OF_FEW = 150, 25  # 157 and 26 passed when this was written; the others are for other versions

MODULE = "tests.support.real_bindings"
PROCESSES = ("found", "refusal", "tested")  # the fixtures that read what a process of a version has found
PROCESSES_AT_ONCE = 2


def arguments_of(process, version):
    """Return what follows `python -m` in a process of a version."""
    if process != "tested":
        return (MODULE, *(("refuse",) if process == "refusal" else ()))
    options = ("-q", "-p", "tests.support.on_real_bindings", "-p", "no:cacheprovider", "-k", f"not {OF_THE_REGISTRY}")
    return ("pytest", *options, *(RUNTIME_TESTS if version in ALL_TESTS else RUNTIME_TESTS[:2]))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The folder with the replacement of TensorRT's libraries."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("tests/fakes/nvinfer is for x86-64 and Linux")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("nvinfer")
    source, library = ROOT / "tests" / "fakes" / "nvinfer" / "nvinfer.cpp", folder / "library.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["g++", *options, "-o", library, source], check=True)
    for name in LIBRARIES:
        for major in MAJORS:
            (folder / f"{name}.{major}").symlink_to(library)
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Return a function that returns the folder with the bindings of a version, unpacked once."""
    wheels, unpacked, lock = wheel_folder(tmp_path_factory), tmp_path_factory.mktemp("bindings"), threading.Lock()

    def unpack(version):
        folder = unpacked / version
        with lock:
            if not folder.exists():
                with zipfile.ZipFile(downloaded_wheel(VERSIONS[version], wheels)) as archive:
                    archive.extractall(folder)
                (folder / "tensorrt_bindings").rename(folder / "tensorrt")
        return folder

    return unpack


@pytest.fixture(scope="session")
def on_bindings(site, libraries):
    """Return a function that runs a Python module with the bindings of a version."""

    def run(version, *arguments):
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "PYTHONPATH": os.pathsep.join([str(site(version)), str(ROOT), *sys.path]),
        }
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    return run


@pytest.fixture(scope="session")
def finished(request, on_bindings):
    """Return a function that waits for a process of a version; those of all selected tests have been started."""
    with ThreadPoolExecutor(PROCESSES_AT_ONCE) as pool:
        start = cache(lambda process, version: pool.submit(on_bindings, version, *arguments_of(process, version)))
        for process, version in () if "PYTEST_XDIST_WORKER" in os.environ else needed_by(request.session.items):
            start(process, version)
        yield lambda process, version: start(process, version).result()
        pool.shutdown(cancel_futures=True)


def needed_by(items):
    """Return the processes of the tests of this module among `items`, with their versions; the longest first."""
    needed = {
        (process, version)
        for item in items
        if item.path == Path(__file__)
        for process in set(PROCESSES) & set(item.fixturenames)
        for version in ([item.callspec.params["version"]] if hasattr(item, "callspec") else VERSIONS)
    }
    return sorted(needed, key=lambda one: (one[0] != "tested", one[1] not in ALL_TESTS, list(VERSIONS).index(one[1])))


@pytest.fixture(scope="session")
def found(finished):
    """Return a function that returns what a version has, after every call of the product was made on it."""

    def read(version):
        done = finished("found", version)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    return read


@pytest.fixture(scope="session")
def refusal(finished):
    """Return a function that returns what happens when a version refuses an optimization profile."""

    def read(version):
        done = finished("refusal", version)
        if done.returncode == SEGMENTATION_FAULT:
            return "ends the process"
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return read


@pytest.fixture(scope="session")
def tested(finished):
    """Return a function that returns pytest's output and how many tests of the runtime passed with a version."""

    def read(version):
        done = finished("tested", version)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout, int(re.search(r"(\d+) passed", done.stdout)[1])

    return read


@pytest.mark.parametrize("version", VERSIONS)
def test_the_bindings_accept_every_call_of_builds_and_runs(found, version):
    result = found(version)
    assert result["version"].startswith(f"{version}.")
    assert set(result["used"]) >= CALLS
    assert result["virtual calls"] > 1000, "the calls reach the library below the bindings"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_contexts_of_an_engine_can_be_tracked(found, version):
    assert found(version)["weak references"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_builder_has_the_names_of_the_bindings(found, version):
    names = [
        (kind, name)
        for kind, name, *first_and_last in fake_tensorrt.NAMES
        if fake_tensorrt.has(version, *first_and_last)
    ]
    assert found(version)["fake names"] == [list(pair) for pair in names]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_runtime_passes_its_tests_on_the_bindings(tested, version):
    """Engines run: a real network gives the boxes of its ONNX file, with threads, graphs and refusals."""
    output, passed = tested(version)
    assert passed >= (MIN_PASSED if version in ALL_TESTS else MIN_PASSED_OF_FEW), output[-2000:]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refused_profile_ends_the_process_or_raises(refusal, version):
    """This is why the product never selects a profile that is in use."""
    expected = "ends the process" if version in ("8.6", "10.3", "10.4") else "raises `RuntimeError`"
    assert refusal(version) == expected


def test_the_document_has_the_table_of_these_versions(found, refusal):
    columns = {version: found(version) for version in VERSIONS}
    refusals = [refusal(version) for version in VERSIONS]
    rows = {
        name: [cell(columns[version]["members"][name]) for version in VERSIONS] for name in columns["8.6"]["members"]
    }
    rows["TensorRT refuses a profile"] = refusals
    lines = [("TensorRT", *(result["version"] for result in columns.values())), ("---",) * (1 + len(VERSIONS))]
    lines += [(name, *shortened(cells)) for name, cells in rows.items()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    in_document, _, after = rest.partition(END)
    if os.environ.get(UPDATE_VARIABLE):
        DOCUMENT.write_text(f"{before}{START}{table}{END}{after}", encoding="utf-8")
    else:
        assert in_document == table, f"Write it:  {UPDATE_VARIABLE}=1 pytest -m slow {Path(__file__).relative_to(ROOT)}"


def cell(value):
    return {True: YES, False: NO}.get(value, value)


def shortened(cells):
    """Return the cells, with a quotation mark for a repeated long one."""
    return [
        '"' if number and one == cells[number - 1] and len(one) > len(YES) else one for number, one in enumerate(cells)
    ]
