"""The machine code that nvcc makes of the kernels for every architecture: no local memory, no stale or early loads.

A load with the modifier CONSTANT uses a cache that does not see what other blocks write during the kernel.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fakes.emulated_kernels import SOURCES
from tests.support.machine_code import (
    ALLOW_NEXT,
    FIRST_DISASSEMBLED,
    FIRST_OVERLAPPING,
    KERNELS,
    OPTIONS,
    WAIT,
    instructions,
    loads_before_wait,
    local_memory,
    spills,
    unpacked_disassembler,
    unsafe_constant_loads,
)
from tests.support.tensorrt_wheels import wheel_folder
from yolov7_deploy.errors import PluginError
from yolov7_deploy.tensorrt.plugin_build import find_tools

pytestmark = pytest.mark.slow

PLANTED = """
__global__ void planted_array(int* out, int at, int n) {
  int array[64];
  for (int i = 0; i < n; ++i) array[(i * at) & 63] = out[i];
  out[0] = array[at & 63];
}
__global__ void planted_list(const unsigned long long* list, unsigned long long* out) {
  out[threadIdx.x] = __ldg(list + threadIdx.x);
}
__global__ void planted_half_counters(const unsigned* counters, unsigned* out) {
  for (int i = 0; i < 5; ++i) out[i * 1024 + threadIdx.x] = __ldg(counters + i * 1024 + threadIdx.x);
}
"""


@pytest.fixture(scope="module")
def nvcc() -> Path:
    try:
        return find_tools(kernels_only=True).nvcc
    except PluginError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def architectures(nvcc) -> list[int]:
    """The architectures that the project supports, of those of the toolkit."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return sorted({int(line.removeprefix("sm_")) for line in listed.split()} - set(range(70)))


@pytest.fixture(scope="module")
def disassembler(tmp_path_factory) -> Path:
    return unpacked_disassembler(wheels=wheel_folder(tmp_path_factory), folder=tmp_path_factory.mktemp("nvdisasm"))


def compile_source(nvcc, source, *, architecture, options, output):
    """Compile a file to machine code; return what the compiler printed."""
    command = [nvcc, "-std=c++17", "-O3", *options, "-Wno-deprecated-gpu-targets", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run(
        [*command, f"-arch=sm_{architecture}", "-o", output, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_uses_local_memory_or_stale_loads_on_any_architecture(
    nvcc, architectures, disassembler, tmp_path, name
):
    assert architectures
    for architecture in architectures:
        cubin = tmp_path / f"{architecture}.cubin"
        printed = compile_source(nvcc, SOURCES / name, architecture=architecture, options=OPTIONS[name], output=cubin)
        assert spills(printed) == [("0", "0", "0")] * len(KERNELS[name]), printed
        if architecture < FIRST_DISASSEMBLED:
            continue
        found = instructions(disassembler, cubin)
        assert set(found) == KERNELS[name]
        for kernel, counts in found.items():
            assert counts["EXIT"] and any(part.startswith("LDG") for part in counts)
            assert not local_memory(counts), (architecture, kernel)
            if name == "nms.cu":
                assert not unsafe_constant_loads(kernel, counts), (architecture, kernel)
                check_overlap(kernel, counts, overlaps=architecture >= FIRST_OVERLAPPING)


def test_the_largest_block_compiles_without_spills_on_every_architecture(nvcc, architectures, tmp_path):
    """Its threads have the fewest registers: 64."""
    options = (*OPTIONS["nms.cu"], "-DY7_NMS_THREADS=1024")
    for architecture in architectures:
        cubin = tmp_path / f"{architecture}.cubin"
        printed = compile_source(nvcc, SOURCES / "nms.cu", architecture=architecture, options=options, output=cubin)
        assert spills(printed) == [("0", "0", "0")] * len(KERNELS["nms.cu"]), printed


def check_overlap(kernel, counts, *, overlaps):
    """`suppress` waits for `select` before its first load of the list, where it may start earlier."""
    assert counts[ALLOW_NEXT] == (overlaps and kernel.startswith("select"))
    assert counts[WAIT] == (overlaps and kernel.startswith("suppress"))
    if counts[WAIT]:
        assert not loads_before_wait(counts), kernel


def test_a_planted_array_and_planted_stale_loads_are_found(nvcc, architectures, disassembler, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED, encoding="utf-8")
    for architecture in (FIRST_DISASSEMBLED, architectures[-1]):
        cubin = tmp_path / f"{architecture}.cubin"
        printed = compile_source(nvcc, source, architecture=architecture, options=(), output=cubin)
        assert any(frame != ("0", "0", "0") for frame in spills(printed))
        found = instructions(disassembler, cubin)
        array, stale, counters = (
            next(counts for kernel, counts in found.items() if name in kernel)
            for name in ("planted_array", "planted_list", "planted_half_counters")
        )
        assert {part.split(".")[0] for part in local_memory(array)} == {"LDL", "STL"}
        assert unsafe_constant_loads("planted_list", stale).total() == 1
        assert unsafe_constant_loads("planted_half_counters", counters).total() == 5
