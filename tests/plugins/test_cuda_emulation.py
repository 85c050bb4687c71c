"""The CUDA emulation detects errors in kernels, and sanitizers and its search for races find none in ours."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.emulated_kernels import (
    CUDA_ERROR,
    EMULATION,
    FLOAT32,
    OK,
    SOURCES,
    Frame,
    Guarded,
    HeadMap,
    HostMemory,
    Kernels,
    LetterboxParams,
    compile_emulated,
    emulated,
)
from tests.support.nms_cases import BUILDS, Call, one_random_case

ROOT = Path(__file__).parents[2]

OBSERVED_CASES, CHANGED_CASES = 3, 8
HANG_S = 30

FAULTS = {
    2: "61 wait at a barrier",
    3: "written beyond its end",
    4: "wait for other lanes of their warp",
    5: "reads lane 20",
    6: "leaves out its own lane",
    8: "64 wait at a barrier",
}


RACES = {
    1: "of shared variable 0",  # no barrier
    9: "of shared variable 0",  # a shuffle instead of a barrier
    11: "writes and thread",  # global memory
    12: "changes atomically",  # an atomic access and another one
}


def run_fault(fault, seed, flags=(), *, observed=False):
    """Return the status of the kernel in faults.cu, its text, and whether the result is correct."""
    kernels = emulated(EMULATION / "faults.cu", flags=flags, observed=observed)
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


@pytest.mark.parametrize("fault", RACES)
def test_races_are_found_in_every_order_of_threads(fault):
    for seed in range(5):
        status, text, _ = run_fault(fault, seed, observed=True)
        assert status == CUDA_ERROR
        assert text.startswith("block (0, 0): a race: ") and RACES[fault] in text


@pytest.mark.parametrize("fault", [0, 7, 10])
def test_a_kernel_without_races_passes(fault):
    for seed in range(5):
        assert run_fault(fault, seed, observed=True)[0] == OK


def test_the_kernels_have_no_races():
    kernels = emulated("nms.cu", "letterbox.cu", defines=BUILDS["64 threads"], observed=True)
    for seed in range(OBSERVED_CASES):
        one_random_case(kernels, [5, seed])
    letterbox_a_frame(kernels)


def letterbox_a_frame(kernels):
    """Letterbox one small frame, for the check of its memory accesses."""
    pixels, canvas = Guarded.of(np.zeros((20, 30, 3), np.uint8)), Guarded((3, 40, 50), np.float32)
    frame = Frame(pixels.address, 90, 20, 30, 33, 50, 3, 0, None)
    table = Guarded.of(np.frombuffer(bytes(frame), np.uint8))
    params = LetterboxParams(1, 40, 50, FLOAT32, 114)
    assert kernels.y7_letterbox(params, table.address, canvas.address, None) == OK
    canvas.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nms_select.cuh", "nms_suppress.cuh", "nms_tiles.cuh"])
def test_no_barrier_of_the_nms_kernels_can_be_removed(tmp_path, name):
    """So none is superfluous, and what would be a race without it is found.

    In a separate process: without a barrier, a thread may take garbage for the length of a loop.
    """
    source = (SOURCES / name).read_text(encoding="utf-8")
    for number, found in enumerate(re.finditer(r"__syncthreads\(\);", source)):
        folder = tmp_path / str(number)
        shutil.copytree(SOURCES, folder)
        (folder / name).write_text(f"{source[: found.start()]};{source[found.end() :]}", encoding="utf-8")
        path = compile_emulated(folder / "nms.cu", defines=BUILDS["64 threads"], observed=True, folder=folder)
        assert not passes_random_cases(path), f"barrier {number} of {name}"


def passes_random_cases(library):
    """Return whether a library of NMS kernels equals the reference without a race, a crash or a hang."""
    program = "import sys; from tests.plugins import test_cuda_emulation as module; module.run_cases(sys.argv[1])"
    command, environment = [sys.executable, "-c", program, str(library)], {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=HANG_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def run_cases(library):
    for seed in range(CHANGED_CASES):
        one_random_case(Kernels(library), [5, seed])


@pytest.mark.slow
def test_unchanged_nms_kernels_pass_the_same_cases():
    assert passes_random_cases(compile_emulated("nms.cu", defines=BUILDS["64 threads"], observed=True))


@pytest.mark.slow
def test_the_kernels_as_shipped_have_no_races():
    kernels = emulated("nms.cu", observed=True)
    for seed in range(4):
        one_random_case(kernels, [6, seed])


@pytest.mark.slow
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
