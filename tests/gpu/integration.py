"""The CUDA layer of the package on a real device, through every binding that can be opened."""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np

from tests.gpu.environment import Environment
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.runtimes.cuda import Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream
from yolov7_deploy.runtimes.cudart import cuda_bindings

LARGE = 64 * 2**20


def check(env: Environment) -> None:
    """Check copies, graphs, events and errors, once per binding."""
    bindings = [env.open_cuda()] if env.emulated else [Cuda(binding) for binding in cuda_bindings()]
    for cuda in bindings:
        name = cuda.binding.name
        try:
            count = cuda.device_count()
        except DeviceError as error:
            env.record(name, f"error: {error.message}")
            continue
        cuda.set_device(0)
        env.record(name, {"devices": count, "versions": cuda.versions(), **asdict(cuda.device())})
        check_copies(env, cuda)
        check_graph(cuda)
        check_errors(cuda)
        check_array_interfaces(env, cuda)
        env.record(f"{name} works", True)


def check_copies(env: Environment, cuda: Cuda) -> None:
    """Check that a large buffer survives upload, device copy and download, and that events measure time."""
    nbytes = env.choose(LARGE, 4096)
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
    env.record(f"{cuda.binding.name} upload_gb_s", round(rate, 2))
    asynchronous_s = queue_time(env, cuda)
    env.record(f"{cuda.binding.name} queue_us", round(asynchronous_s * 1e6, 1))


def queue_time(env: Environment, cuda: Cuda) -> float:
    """Return the seconds until the call of a large pinned upload returns."""
    nbytes = env.choose(LARGE, 4096)
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
    """Check that a graph copies the memory as it is at launch, and that freeing other memory does not break capture."""
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
                assert (down.array == value).all(), "the graph copied other values"


def check_errors(cuda: Cuda) -> None:
    """Check that out of memory, an unknown device and a failed capture raise `DeviceError`, and CUDA still works."""
    _, total = cuda.memory()
    for wrong in (lambda: DeviceBuffer(cuda, (4 * total,), np.uint8), lambda: cuda.set_device(99)):
        try:
            wrong()
        except DeviceError:
            continue
        raise AssertionError("no error was raised")
    with Stream(cuda) as stream:
        try:
            Graph(stream, stream.synchronize)
        except DeviceError:
            stream.synchronize()
            return
    raise AssertionError("a capture that synchronizes did not fail")


def check_array_interfaces(env: Environment, cuda: Cuda) -> None:
    """Check that torch and cupy, if installed, read a DeviceBuffer without a copy."""
    if env.emulated:
        return
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Stream(cuda) as stream, DeviceBuffer(cuda, (2, 3), np.float32) as buffer:
        stream.upload(buffer, values)
        stream.synchronize()
        for name in ("torch", "cupy"):
            try:
                library = __import__(name)
            except ImportError:
                env.record(f"{name} reads it", "not installed")
                continue
            view = library.as_tensor(buffer, device="cuda") if name == "torch" else library.asarray(buffer)
            pointer = view.data_ptr() if name == "torch" else view.data.ptr
            assert pointer == buffer.pointer, f"{name} made a copy"
            host = view.cpu().numpy() if name == "torch" else library.asnumpy(view)
            assert (host == values).all(), f"{name} reads something else"
            env.record(f"{name} reads it", "without a copy")
