"""The CUDA seam of the package on a real device, through every binding that opens."""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np

from tests.gpu.environment import Setting
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.runtimes.cuda import Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream
from yolov7_deploy.runtimes.cudart import runtimes

LARGE = 64 * 2**20


def check(setting: Setting) -> None:
    """Copies, graphs, events and errors, once per binding."""
    bindings = [setting.open_cuda()] if setting.emulated else [Cuda(runtime) for runtime in runtimes()]
    for cuda in bindings:
        name = cuda.runtime.name
        try:
            count = cuda.device_count()
        except DeviceError as error:
            setting.record(name, f"refused: {error.message}")
            continue
        cuda.set_device(0)
        setting.record(name, {"devices": count, "versions": cuda.versions(), **asdict(cuda.device())})
        check_copies(setting, cuda)
        check_graph(cuda)
        check_errors(cuda)
        check_neighbours(setting, cuda)
        setting.record(f"{name} works", True)


def check_copies(setting: Setting, cuda: Cuda) -> None:
    """A large buffer goes up, is moved on the device and comes back; the clock of events runs."""
    nbytes = setting.some(LARGE, 4096)
    up, down = (PinnedBuffer(cuda, (nbytes,), np.uint8) for _ in range(2))
    with (
        Stream(cuda) as stream,
        DeviceBuffer(cuda, (nbytes,), np.uint8) as a,
        DeviceBuffer(cuda, (nbytes,), np.uint8) as b,
    ):
        up.array[:] = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
        with Event(cuda) as start, Event(cuda) as end:
            start.record(stream)
            stream.upload(a, up.array)
            end.record(stream)
            stream.copy(b.pointer, a.pointer, nbytes)
            stream.download(down.array, b)
            stream.synchronize()
            rate = nbytes / max(end.seconds_since(start), 1e-9) / 1e9
        assert (up.array == down.array).all(), "the copy differs"
        stream.fill(b, 7)
        stream.download(down.array, b)
        stream.synchronize()
        assert (down.array == 7).all(), "the fill differs"
    setting.record(f"{cuda.runtime.name} upload_gb_s", round(rate, 2))
    asynchronous_s = queue_time(setting, cuda)
    setting.record(f"{cuda.runtime.name} queue_us", round(asynchronous_s * 1e6, 1))


def queue_time(setting: Setting, cuda: Cuda) -> float:
    """Seconds until the call of a large pinned upload returns."""
    nbytes = setting.some(LARGE, 4096)
    pinned = PinnedBuffer(cuda, (nbytes,), np.uint8)
    with Stream(cuda) as stream, DeviceBuffer(cuda, (nbytes,), np.uint8) as buffer:
        stream.upload(buffer, pinned.array)
        stream.synchronize()
        started = time.perf_counter()
        stream.upload(buffer, pinned.array)
        elapsed = time.perf_counter() - started
        stream.synchronize()
    return elapsed


def check_graph(cuda: Cuda) -> None:
    """A graph copies what the memory holds at launch, and freeing something else does not spoil its recording."""
    up, down = (PinnedBuffer(cuda, (1024,), np.int32) for _ in range(2))
    unrelated = DeviceBuffer(cuda, (1024,), np.uint8)
    with Stream(cuda) as stream, DeviceBuffer(cuda, (1024,), np.int32) as buffer:

        def work() -> None:
            stream.upload(buffer, up.array)
            unrelated.close()
            stream.download(down.array, buffer)

        with Graph(stream, work) as graph:
            for value in (3, 8):
                up.array[:] = value
                graph.launch(stream)
                stream.synchronize()
                assert (down.array == value).all(), "the graph copied something else"


def check_errors(cuda: Cuda) -> None:
    """Out of memory, an unknown device and a broken recording are our errors, and everything works afterwards."""
    _, total = cuda.memory()
    for wrong in (lambda: DeviceBuffer(cuda, (4 * total,), np.uint8), lambda: cuda.set_device(99)):
        try:
            wrong()
        except DeviceError:
            continue
        raise AssertionError("no error came")
    with Stream(cuda) as stream:
        try:
            Graph(stream, stream.synchronize)
        except DeviceError:
            stream.synchronize()
            return
    raise AssertionError("a recording that waits came through")


def check_neighbours(setting: Setting, cuda: Cuda) -> None:
    """torch and cupy read a DeviceBuffer without a copy, where they are installed."""
    if setting.emulated:
        return
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Stream(cuda) as stream, DeviceBuffer(cuda, (2, 3), np.float32) as buffer:
        stream.upload(buffer, values)
        stream.synchronize()
        for name in ("torch", "cupy"):
            try:
                library = __import__(name)
            except ImportError:
                setting.record(f"{name} reads it", "not installed")
                continue
            view = library.as_tensor(buffer, device="cuda") if name == "torch" else library.asarray(buffer)
            pointer = view.data_ptr() if name == "torch" else view.data.ptr
            assert pointer == buffer.pointer, f"{name} made a copy"
            host = view.cpu().numpy() if name == "torch" else library.asnumpy(view)
            assert (host == values).all(), f"{name} reads something else"
            setting.record(f"{name} reads it", "without a copy")
