"""Lanes: what one call at a time needs to run a network on one size of input, kept for the next call.

On a GPU a lane is page-locked staging memory, buffers, a stream and a CUDA graph of its own, so calls of several
threads run side by side, and the driver is called once for the whole network.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.runtimes.torch_network import TorchNetwork, candidates, split_by_image

logger = logging.getLogger(__name__)

Size = tuple[int, int, int]  # images, height and width of the canvas
Forward = Callable[[], Tensor]
Capture = Callable[[Forward], Forward]

WARM_UPS = 3  # torch's own recommendation: libraries pick kernels and take their workspaces in the first runs
# One capture at a time in a process: its beginning waits for the whole device, which another capture forbids.
_capturing = threading.Lock()


class CapturedGraph:
    """Buffers and stream for `size`, and the network made ready for them. One call at a time.

    The steps of a call are `stage`, `prepare`, `run` and `fetch`, all within `on_stream`; only `fetch` has to wait for
    the device.

    Args:
        network: What runs.
        size: Of the batch.
        capture: Makes a repeatable form of a forward whose input and output stay where they are.
    """

    def __init__(self, network: TorchNetwork, size: Size, *, capture: Capture) -> None:
        self.size = size
        self._network = network
        on_gpu = network.device.type == "cuda"
        self._stream = torch.cuda.Stream(network.device) if on_gpu else None  # type: ignore[no-untyped-call]
        with self.on_stream():
            self._staging = torch.empty((*size, 3), dtype=torch.uint8, pin_memory=on_gpu)
            self._canvases = self._staging.to(network.device)  # the same memory on a CPU
            self._images = network.empty_input(size[0], size[1:])
            self._forward = capture(partial(network.predict, self._images))

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """What torch does in here for this thread is inference, in the order of the lane's stream."""
        with torch.inference_mode(), self._stream_context():
            yield

    def _stream_context(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def stage(self, canvases: Sequence[Image]) -> None:
        """Copies canvases uint8 BGR [H, W, 3] into the lane and starts their way to the device."""
        np.stack(canvases, out=self._staging.numpy())
        self._canvases.copy_(self._staging, non_blocking=self._stream is not None)

    def prepare(self) -> None:
        """Canvases to network input."""
        self._network.prepare(self._canvases, self._images)

    def run(self) -> Tensor:
        """The decoded output float32 [B, A, 5 + C]; with a graph it is overwritten by the next run."""
        return self._forward()

    def fetch(self, decoded: Tensor, conf: float) -> list[FloatArray]:
        """Of each image the rows that can become detections, in memory of their own; see `candidates`."""
        found = candidates(decoded, conf)
        rows, images = (part.to("cpu", non_blocking=self._stream is not None) for part in found)
        self.wait()
        return split_by_image(rows, images, self.size[0])

    def wait(self) -> None:
        """Until the device has done all that was asked of it in this lane; other threads run meanwhile."""
        if self._stream:
            self._stream.synchronize()


class CapturedGraphPool:
    """The lanes of a backend, for any number of threads; a call without a free lane of its size makes one.

    Args:
        make: Makes a lane.
        most: How many may exist; then the least recently used free one is given up, or waited for.
    """

    def __init__(self, make: Callable[[Size], CapturedGraph], *, most: int) -> None:
        self._make, self._most = make, most
        self._changed = threading.Condition()
        self._free: list[CapturedGraph] = []  # least recently used first
        self._count = 0
        self._closed = False

    @contextlib.contextmanager
    def taken(self, size: Size) -> Iterator[CapturedGraph]:
        """A lane that nobody else uses meanwhile. One in which a call failed is not used again."""
        lane = self._take(size)
        try:
            lane = lane or self._make(size)
            yield lane
        except BaseException:
            self._give_back(None)
            raise
        self._give_back(lane)

    def give_up(self) -> int:
        """Frees all lanes that are not in use and says how many those were."""
        with self._changed:
            freed, self._free = self._free, []
            self._count -= len(freed)
            self._changed.notify_all()
            return len(freed)

    def close(self) -> None:
        """Frees all lanes, those in use when their call ends."""
        self._closed = True
        self.give_up()

    def _take(self, size: Size) -> CapturedGraph | None:
        """A free lane, or `None` and the right to make one."""
        with self._changed:
            while True:
                for lane in reversed(self._free):
                    if lane.size == size:
                        self._free.remove(lane)
                        return lane
                if self._count < self._most:
                    self._count += 1
                    return None
                if self._free:
                    self._free.pop(0)
                    return None
                self._changed.wait()

    def _give_back(self, lane: CapturedGraph | None) -> None:
        with self._changed:
            if lane is None or self._closed:
                self._count -= 1
            else:
                self._free.append(lane)
            self._changed.notify()


class Graphs:
    """Makes forwards repeatable with `capture` until that fails; from then on they run as they are."""

    def __init__(self, capture: Capture) -> None:
        self.work = True
        self._capture = capture

    def __call__(self, forward: Forward) -> Forward:
        """The forward in its repeatable form, or itself.

        Raises:
            RuntimeError: Memory ran out.
        """
        with _capturing:
            if not self.work:
                return forward
            try:
                return self._capture(forward)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.work = False
                logger.warning(
                    "A CUDA graph of the network cannot be made here (%s); it runs without, which takes longer.",
                    first_line(error),
                )
                return forward


def capture_graph(forward: Forward) -> Forward:
    """`forward` as a CUDA graph on this thread's stream, after some runs to warm up.

    Raises:
        RuntimeError: It cannot be captured, or memory ran out.
    """
    for _ in range(WARM_UPS):
        forward()
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile; only this one's mistakes spoil the capture.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        output = forward()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def is_out_of_memory(error: BaseException | None) -> bool:
    """Said in several ways; the end of a spoiled capture hides it behind an error of its own."""
    phrases = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
    return error is not None and (
        any(phrase in str(error) for phrase in phrases) or is_out_of_memory(error.__context__)
    )


def first_line(error: Exception) -> str:
    """What an error of torch says before its advice and traces."""
    return str(error).strip().partition("\n")[0]
