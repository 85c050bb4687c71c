"""The CUDA bindings: ctypes calls into a fake CUDA runtime, and the real libraries without a driver."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.faked_cuda import fake_cudart
from yolov7_deploy.errors import DeviceError, MissingLibraryError, Y7Error
from yolov7_deploy.runtimes import cuda as cuda_module
from yolov7_deploy.runtimes import cudart
from yolov7_deploy.runtimes.cuda import Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream, open_cuda
from yolov7_deploy.runtimes.cudart import CudaPythonBinding, LibcudartBinding

ROOT = Path(__file__).parents[2]
# Arguments of the right type for every call; without a driver all calls return the same status.
ARGUMENTS = {"cudaDeviceGetAttribute": (75, 0), "cudaMemcpyAsync": (16, 32, 1, 1, 0), "cudaStreamBeginCapture": (0, 2)}


@pytest.fixture
def library():
    return ctypes.CDLL(str(fake_cudart()))


@pytest.fixture
def cuda(library):
    """A Cuda with the fake library; everything that a test creates must be freed at its end."""
    before = library.fake_cuda_live()
    yield Cuda(LibcudartBinding(str(fake_cudart())))
    gc.collect()
    assert library.fake_cuda_live() == before


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Names of the calls since the start of the test."""
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
    return lambda: log.read_text().split()


def test_device_returns_the_properties_of_a_gpu(cuda, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "3")
    assert cuda.device_count() == 3
    cuda.set_device(2)
    device = cuda.device()
    assert (device.index, device.name, device.compute_capability) == (2, "Imaginary GPU 2", (9, 2))
    assert device.memory_bytes == device.free_bytes == 2**30
    assert cuda.versions() == ("12.4", "12.4")
    cuda.set_device(0)


def test_uploaded_bytes_are_downloaded_unchanged(cuda):
    up, down = (PinnedBuffer(cuda, (2, 3), np.float32) for _ in range(2))
    with Stream(cuda) as stream, DeviceBuffer(cuda, (2, 3), np.float32) as buffer, up, down:
        up.array[...] = [[1, 2, 3], [4, 5, 6]]
        stream.upload(buffer, up.array)
        stream.download(down.array, buffer)
        stream.synchronize()
        np.testing.assert_array_equal(down.array, up.array)
        stream.fill(buffer, 0)
        stream.download(down.array[:1], buffer)
        stream.synchronize()
        np.testing.assert_array_equal(down.array, [[0, 0, 0], [4, 5, 6]])


def test_a_copy_on_the_device_copies_part_of_a_buffer(cuda):
    data, part = np.arange(8, dtype=np.int32), np.zeros(3, np.int32)
    with Stream(cuda) as stream, DeviceBuffer(cuda, (8,), np.int32) as a, DeviceBuffer(cuda, (3,), np.int32) as b:
        stream.upload(a, data)
        stream.copy(b.pointer, a.pointer + 8, b.nbytes)
        stream.download(part, b)
        stream.synchronize()
    assert part.tolist() == [2, 3, 4]


def test_arrays_that_do_not_fit_are_refused_before_anything_is_copied(cuda):
    with Stream(cuda) as stream, DeviceBuffer(cuda, (4,), np.uint8) as buffer:
        for bad in (np.zeros(5, np.uint8), np.zeros((4, 2), np.uint8)[:, 0]):
            with pytest.raises(ValueError, match=r"bytes|contiguous"):
                stream.upload(buffer, bad)
            with pytest.raises(ValueError, match=r"bytes|contiguous"):
                stream.download(bad, buffer)
        frozen = np.zeros(4, np.uint8)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            stream.download(frozen, buffer)


def test_a_device_buffer_describes_itself_to_other_libraries(cuda):
    with DeviceBuffer(cuda, (2, 5), np.float16) as buffer:
        assert buffer.__cuda_array_interface__ == {
            "shape": (2, 5), "typestr": "<f2", "data": (buffer.pointer, False), "strides": None, "stream": None,
            "version": 3,
        }  # fmt: skip


def test_buffers_may_be_empty(cuda):
    with DeviceBuffer(cuda, (0, 4), np.float32) as buffer, PinnedBuffer(cuda, (0, 4), np.float32) as pinned:
        assert (buffer.nbytes, pinned.array.shape) == (0, (0, 4))


def test_pinned_memory_lives_as_long_as_its_last_view(cuda, library):
    before = library.fake_cuda_live()
    pinned = PinnedBuffer(cuda, (100,), np.uint8)
    pinned.array[:] = 7
    view = pinned.array[10:20].reshape(2, 5)
    pinned.close()
    pinned.close()
    assert library.fake_cuda_live() == before + 1
    assert (view == 7).all()
    del view
    gc.collect()
    assert library.fake_cuda_live() == before


def test_every_handle_is_freed_once(cuda, library, calls):
    before = library.fake_cuda_live()
    resources = [DeviceBuffer(cuda, (4,), np.uint8), Stream(cuda), Event(cuda), Graph(Stream(cuda), lambda: None)]
    for resource in resources * 2:
        resource.close()
    gc.collect()
    assert library.fake_cuda_live() == before
    assert [calls().count(name) for name in ("cudaFree", "cudaStreamDestroy", "cudaEventDestroy")] == [1, 2, 1]
    assert [calls().count(name) for name in ("cudaGraphDestroy", "cudaGraphExecDestroy")] == [1, 1]


def test_garbage_collected_objects_are_freed(cuda, library):
    before = library.fake_cuda_live()
    DeviceBuffer(cuda, (4,), np.uint8)
    gc.collect()
    assert library.fake_cuda_live() == before


def test_events_measure_time_and_order_streams(cuda):
    with Stream(cuda) as stream, Stream(cuda) as other, Event(cuda) as start, Event(cuda) as end:
        start.record(stream)
        end.record(stream)
        end.synchronize()
        other.wait(end)
        assert 0 <= end.seconds_since(start) < 1
        with Event(cuda, timing=False) as never, pytest.raises(DeviceError, match="cudaEventElapsedTime"):
            never.seconds_since(start)


def test_a_graph_repeats_its_work_with_the_current_contents_of_memory(cuda):
    up, down = np.zeros(4, np.uint8), np.zeros(4, np.uint8)
    with Stream(cuda) as stream, DeviceBuffer(cuda, (4,), np.uint8) as buffer:

        def work():
            stream.upload(buffer, up)
            stream.download(down, buffer)

        up[:] = 1
        with Graph(stream, work) as graph:
            assert not down.any(), "a capture does not execute the work"
            for value in (5, 9):
                up[:] = value
                graph.launch(stream)
                stream.synchronize()
                assert (down == value).all()


def test_a_failed_capture_leaves_the_stream_usable(cuda):
    with Stream(cuda) as stream:
        with pytest.raises(DeviceError, match="cudaStreamSynchronize"):
            Graph(stream, stream.synchronize)
        with pytest.raises(ZeroDivisionError):
            Graph(stream, lambda: 1 // 0)
        stream.synchronize()


def test_a_graph_that_cannot_be_instantiated_is_freed(cuda, monkeypatch):
    with Stream(cuda) as stream:
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaGraphInstantiateWithFlags:2")
        with pytest.raises(DeviceError, match="cudaGraphInstantiateWithFlags"):
            Graph(stream, lambda: None)
        stream.synchronize()


def test_out_of_memory_states_what_is_needed_and_what_is_free(cuda, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(10 * 2**20))
    with DeviceBuffer(cuda, (4, 2**20), np.uint8), pytest.raises(DeviceError) as caught:
        DeviceBuffer(cuda, (8, 2**20), np.uint8)
    assert caught.value.message == "8.0 MiB of GPU memory are needed; 6.0 MiB of 10.0 MiB are free."
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaHostAlloc:2")
    with pytest.raises(DeviceError, match=r"3\.0 MiB of page-locked host memory"):
        PinnedBuffer(cuda, (3, 2**20), np.uint8)


def test_an_error_is_not_reported_again_by_the_next_call(cuda):
    with Stream(cuda) as stream, DeviceBuffer(cuda, (4,), np.uint8) as buffer:
        with pytest.raises(DeviceError, match="cudaMemcpyAsync failed"):
            stream.copy(buffer.pointer, buffer.pointer + 2, 4)
        assert cuda.binding.call("cudaGetLastError") == (0,)


def test_a_lost_cuda_context_is_an_error_that_asks_for_a_restart(cuda, monkeypatch):
    with Stream(cuda) as stream:
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cudaStreamSynchronize:700")
        with pytest.raises(DeviceError, match="the CUDA context is lost") as caught:
            stream.synchronize()
        assert "Restart the program" in caught.value.fix
        assert cuda.fault is not None and cuda.fault.message == caught.value.message


def test_an_unknown_device_is_reported(cuda):
    with pytest.raises(DeviceError, match="no such GPU"):
        cuda.set_device(7)


def test_every_thread_has_its_own_current_device(cuda, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "4")
    found = {}

    def work(index):
        cuda.set_device(index)
        with DeviceBuffer(cuda, (1000,), np.uint8), Stream(cuda):
            found[index] = cuda.device().index

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: index for index in range(4)}
    assert cuda.device().index == 0


# --- choosing a binding, in a separate process with the real loader ---


@pytest.fixture
def process(tmp_path):
    """Run a line of Python with only the fake library on the loader's path, under the given names."""

    def run(line, *names, **environment):
        folder = tmp_path / "loader"
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).symlink_to(fake_cudart())
        # A real library that this machine's loader knows must not be found first.
        versions = tuple(name.split(".so.")[1] for name in names if "cudart" in name)
        setup = (
            "from pathlib import Path\n"
            "from yolov7_deploy.runtimes import cudart\n"
            "from yolov7_deploy.runtimes.cuda import open_cuda\n"
            "from yolov7_deploy.errors import Y7Error\n"
            "cudart.cuda_runtime, cudart.WHEEL_FOLDERS, cudart.TOOLKIT = None, (), Path('/nowhere')\n"
            f"cudart.CUDART_VERSIONS = {versions}\n"
            f"try:\n    {line}\nexcept Y7Error as error:\n    print(type(error).__name__, error)"
        )
        env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run([sys.executable, "-c", setup], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_the_newest_libcudart_on_the_loaders_path_is_used(process):
    assert process("print(open_cuda())", "libcudart.so.12", "libcudart.so.11.0") == "Cuda(libcudart.so.12)"


def test_without_any_binding_the_error_names_the_extra(process):
    text = process("open_cuda()")
    assert text.startswith("MissingLibraryError A CUDA runtime is needed")
    assert text.endswith("pip install 'yolov7-deploy[tensorrt]'")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_CUDA_DRIVER": "0"}, "DeviceError There is no NVIDIA driver here"),
        ({"FAKE_CUDA_DRIVER": "11040"}, "DeviceError The NVIDIA driver supports CUDA 11.4 at most"),
        ({"FAKE_CUDA_DEVICES": "0"}, "DeviceError The NVIDIA driver finds no GPU."),
        ({"FAKE_CUDA_FAIL": "cudaGetDeviceCount:999"}, "DeviceError The CUDA runtime libcudart.so.12 does not start"),
    ],
)
def test_the_error_without_a_usable_gpu_states_the_cause(process, environment, message):
    text = process("open_cuda()", "libcudart.so.12", **environment)
    assert text.startswith(message)
    assert len(text.splitlines()) == 2, "what happened, and the fix"


def test_a_context_that_is_already_current_is_used(process, tmp_path):
    line = "cudart._driver().cuCtxSetCurrent(0x2000); cuda = open_cuda(); cuda.set_device(0); print(cuda.device().name)"
    log = tmp_path / "log"
    assert process(line, "libcudart.so.12", "libcuda.so.1", FAKE_CUDA_LOG=str(log)) == "Imaginary GPU 0"
    assert "cudaSetDevice" not in log.read_text()


def test_without_a_current_context_the_device_is_set(process, tmp_path):
    log = tmp_path / "log"
    process("open_cuda().set_device(0)", "libcudart.so.12", "libcuda.so.1", FAKE_CUDA_LOG=str(log))
    assert "cudaSetDevice" in log.read_text()


def test_working_on_a_gpu_restores_the_context_of_another_library_on_another_gpu(process):
    line = (
        "cudart._driver().cuCtxSetCurrent(0x2001); cuda = open_cuda()\n"
        "    with cuda.working_on(0): print(hex(cudart.current_context()), cuda.value('cudaGetDevice'))\n"
        "    print(hex(cudart.current_context()), cuda.value('cudaGetDevice'))"
    )
    printed = process(line, "libcudart.so.12", "libcuda.so.1", FAKE_CUDA_DEVICES="2").split()
    assert printed == ["0x1000", "0", "0x2001", "1"]


def test_working_on_a_gpu_without_a_context_restores_the_device(process):
    line = (
        "cuda = open_cuda()\n"
        "    with cuda.working_on(1): print(cuda.value('cudaGetDevice'))\n"
        "    print(cuda.value('cudaGetDevice'))"
    )
    assert process(line, "libcudart.so.12", "libcuda.so.1", FAKE_CUDA_DEVICES="2").split() == ["1", "0"]


def test_the_fake_runtime_does_not_use_one_that_is_loaded_for_the_whole_process(tmp_path):
    """A torch for CUDA loads the real one so, which fails without a GPU."""
    source, real = tmp_path / "real.c", tmp_path / "real.so"
    source.write_text("int cudaMemGetInfo(void* a, void* b) { (void)a, (void)b; return 35; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", real, source], check=True)
    program = (
        "import ctypes, sys; ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL); fake = ctypes.CDLL(sys.argv[2]); "
        "sys.exit(fake.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8)))"
    )
    assert subprocess.run([sys.executable, "-c", program, real, fake_cudart()], check=False).returncode == 0


def test_a_libcudart_in_a_wheel_is_found(tmp_path, monkeypatch):
    wheel = tmp_path / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12"
    wheel.parent.mkdir(parents=True)
    wheel.symlink_to(fake_cudart())
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert str(wheel) in cudart.cudart_paths()


def test_an_older_binding_is_used_if_the_driver_rejects_the_newest(library, monkeypatch):
    old = LibcudartBinding(str(fake_cudart()))
    monkeypatch.setattr(cuda_module, "cuda_bindings", lambda: iter([_Refused(), old]))
    assert open_cuda().binding is old
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    monkeypatch.setattr(cuda_module, "cuda_bindings", lambda: iter([_Refused(), old]))
    with pytest.raises(DeviceError, match="finds no GPU"):
        open_cuda()


class _Refused:
    """A binding newer than the driver."""

    name = "too new"

    def call(self, function, *arguments):
        return {"cudaDriverGetVersion": (0, 12040), "cudaRuntimeGetVersion": (0, 13000)}.get(function, (35, 0))


# --- the real libraries, without a driver ---


def real_libraries():
    found = []
    for path in cudart.cudart_paths():
        try:
            found.append(LibcudartBinding(path))
        except OSError:
            continue
    return found


def without_driver(runtime):
    if runtime.call("cudaDriverGetVersion")[1]:
        pytest.skip("this machine has a driver: the calls would do something")


@pytest.fixture(params=["bindings", "library"])
def real(request):
    """A binding of a real library of NVIDIA."""
    if request.param == "bindings":
        if cudart.cuda_runtime is None:
            pytest.skip("needs cuda-python (pip install cuda-python)")
        return CudaPythonBinding()
    libraries = real_libraries()
    if not libraries:
        pytest.skip("there is no libcudart here")
    return libraries[0]


def test_the_real_bindings_have_every_call_with_its_results(real):
    without_driver(real)
    quiet = ("cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetLastError")  # may work without a driver
    for function, (outputs, inputs) in cudart.SIGNATURES.items():
        status, *results = real.call(function, *ARGUMENTS.get(function, (0,) * len(inputs)))
        assert status == 35 or (status == 0 and function in quiet), function
        assert len(results) == len(outputs), function
        assert all(type(result) in (int, float) for result in results), function


def test_the_real_bindings_describe_a_status(real):
    assert real.error_text(2).startswith("cudaErrorMemoryAllocation")
    assert "999999" in real.error_text(999999) or "unrecognized" in real.error_text(999999)
    without_driver(real)
    assert real.device_name(0) == (35, "")
    assert real.pointer_device(4096)[0] == 35


def test_a_missing_driver_is_a_device_error(real, monkeypatch):
    without_driver(real)
    monkeypatch.setattr(cuda_module, "cuda_bindings", lambda: iter([real]))
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        open_cuda()


def test_a_missing_binding_is_a_missing_library_error(monkeypatch):
    monkeypatch.setattr(cuda_module, "cuda_bindings", lambda: iter([]))
    with pytest.raises(MissingLibraryError):
        open_cuda()
    assert issubclass(MissingLibraryError, Y7Error)
