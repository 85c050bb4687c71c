"""The CUDA emulation detects errors in kernels, and sanitizers find none in the NMS kernels."""

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


def run_fault(fault, seed, flags=()):
    """Return the status of the kernel in faults.cu, its text, and whether the result is correct."""
    kernels = emulated(EMULATION / "faults.cu", flags=flags)
    kernels.seed(seed)
    numbers = Guarded.of(np.arange(64, dtype=np.float32))
    status = kernels.y7_neighbour(ctypes.c_void_p(numbers.address), fault)
    numbers.check()
    return status, kernels.status_text(status), (numbers.array == np.roll(np.arange(64), -1)).all()


@pytest.mark.parametrize("flags", [(), ("-DCUDA_ON_CPU_UCONTEXT",)])
def test_the_emulation_runs_a_correct_kernel(flags):
    for seed in range(5):
        assert run_fault(0, seed, flags) == (OK, "no error", True)
        assert run_fault(7, seed, flags) == (OK, "no error", True)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_reports_an_error_of_a_kernel(fault):
    status, text, _ = run_fault(fault, 1)
    assert status == CUDA_ERROR
    assert text.startswith("block (0, 0): ") and FAULTS[fault] in text


def test_the_emulation_shows_a_missing_barrier_as_wrong_results():
    assert not any(run_fault(1, seed)[2] for seed in range(5))


def test_nothing_is_undefined_and_nothing_outside_the_buffers_is_read():
    """Two sanitizers in a separate process, which also reports reads of the memory around every buffer."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    runtime = Path(library.stdout.strip())
    if library.returncode or not runtime.is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    program = "from tests.plugins import test_cuda_emulation as module; module.run_with_poisoned_memory(6)"
    environment = {**os.environ, "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "invalid read detected" in result.stdout


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class PoisonedMemory(HostMemory):
    """Host memory whose guard zones are poisoned for AddressSanitizer. Buffers exist until the process ends."""

    def __init__(self):
        name = "__asan_poison_memory_region"  # as an attribute, Python would mangle the name
        self.poison = getattr(ctypes.CDLL(None), name)
        self.poison.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.buffers = []

    def _poisoned(self, buffer):
        for zone in (buffer.before, buffer.after):
            self.poison(zone.ctypes.data, zone.size)
        self.buffers.append(buffer)
        return buffer

    def upload(self, array):
        return self._poisoned(super().upload(array))

    def garbage(self, shape, dtype):
        return self._poisoned(super().garbage(shape, dtype))


def run_with_poisoned_memory(cases):
    """Run random cases, then a read beyond the end of a buffer, in this process."""
    memory = PoisonedMemory()
    kernels = emulated("nms.cu", defines=BUILDS["64 threads"], flags=SANITIZERS)
    for seed in range(cases):
        one_random_case(kernels, [4, seed], memory=memory)
    # The sanitizer is active: it reports a head map that is larger than its buffer.
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
    sys.stdout.write("invalid read detected\n")
