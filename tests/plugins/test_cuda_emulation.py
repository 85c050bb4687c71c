"""The emulated GPU finds the mistakes it promises to find; and sanitizers find none in the NMS on it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.emulated_kernels import CUDA_ERROR, EMULATION, OK, Guarded, HeadMap, HostMemory, emulated
from tests.support.nms_cases import BUILDS, Call, one_random_case

ROOT = Path(__file__).parents[2]

FAULTS = {
    2: "61 wait at a barrier",
    3: "written beyond its end",
    4: "wait for other lanes of their warp",
    5: "reads lane 20",
    6: "leaves out its own lane",
    8: "64 wait at a barrier",
}


def neighbours(fault, seed, flags=()):
    """Status of faults.cu's kernel, its text, and whether the result is right."""
    kernels = emulated(EMULATION / "faults.cu", flags=flags)
    kernels.seed(seed)
    numbers = Guarded.of(np.arange(64, dtype=np.float32))
    status = kernels.y7_neighbour(ctypes.c_void_p(numbers.address), fault)
    numbers.check()
    return status, kernels.status_text(status), (numbers.array == np.roll(np.arange(64), -1)).all()


@pytest.mark.parametrize("flags", [(), ("-DCUDA_ON_CPU_UCONTEXT",)])
def test_the_emulation_runs_a_kernel_without_mistakes(flags):
    for seed in range(5):
        assert neighbours(0, seed, flags) == (OK, "no error", True)
        assert neighbours(7, seed, flags) == (OK, "no error", True)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_names_a_mistake(fault):
    status, text, _ = neighbours(fault, 1)
    assert status == CUDA_ERROR
    assert text.startswith("block (0, 0): ") and FAULTS[fault] in text


def test_the_emulation_shows_a_missing_barrier_as_wrong_results():
    assert not any(neighbours(1, seed)[2] for seed in range(5))


def test_nothing_is_undefined_and_nothing_outside_the_buffers_is_read():
    """Two sanitizers in a process of their own, where the zones around every buffer are forbidden to reads too."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    runtime = Path(library.stdout.strip())
    if library.returncode or not runtime.is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    program = "from tests.plugins import test_cuda_emulation as module; module.run_with_forbidden_zones(6)"
    environment = {**os.environ, "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert child.returncode == 0, child.stderr
    assert "forbidden read found" in child.stdout


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class ForbiddenZones(HostMemory):
    """Host memory whose zones AddressSanitizer watches; buffers live as long as the process."""

    def __init__(self):
        name = "__asan_poison_memory_region"  # as an attribute, Python would put the class's name in front
        self.poison = getattr(ctypes.CDLL(None), name)
        self.poison.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.buffers = []

    def _watched(self, buffer):
        for zone in (buffer.before, buffer.after):
            self.poison(zone.ctypes.data, zone.size)
        self.buffers.append(buffer)
        return buffer

    def upload(self, array):
        return self._watched(super().upload(array))

    def garbage(self, shape, dtype):
        return self._watched(super().garbage(shape, dtype))


def run_with_forbidden_zones(cases):
    """The body of the child process."""
    memory = ForbiddenZones()
    kernels = emulated("nms.cu", defines=BUILDS["64 threads"], flags=SANITIZERS)
    for seed in range(cases):
        one_random_case(kernels, [4, seed], memory=memory)
    # And the watch is awake: a map that claims more memory than it has.
    buffer = memory.upload(np.zeros(18 * 4, np.float32))
    structs = (HeadMap * 1)(HeadMap(data=buffer.address, batch_stride=72, channel_stride=5, cell_stride=1))
    structs[0].height, structs[0].width, structs[0].stride = 2, 2, 8
    sys.stdout.flush()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        call = Call(classes=1)
        call.params.batch = 1
        call.kernels = kernels
        call.status(heads=structs, workspace_bytes=10**9)
        os._exit(0)
    assert os.wait()[1] != 0
    sys.stdout.write("forbidden read found\n")
