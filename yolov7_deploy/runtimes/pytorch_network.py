"""The fused PyTorch network on a device, and the CUDA graphs that replay it.

A captured graph has its own page-locked staging memory, buffers and stream for one input size. Calls of several threads
therefore overlap, and the host launches the whole network with one call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import is_out_of_memory
from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.model.yolov7 import Yolov7

logger = get_logger(__name__)

Size = tuple[int, int, int]  # batch size, height and width of the canvas
Forward = Callable[[], Tensor]
Capture = Callable[[Forward], Forward]

# Recommended by torch: libraries select kernels and allocate their workspaces in the first runs.
WARM_UP_RUNS = 3
# Only one capture at a time in a process: it starts by synchronising the device, which another capture forbids.
_capture_lock = threading.Lock()


class TorchNetwork:
    """A fused model in FP32 or FP16, in channels-last format (NHWC): for tensor cores, and a third faster on CPUs too.

    The head is decoded in float32 in both precisions: FP16 has steps of half a pixel from 512 on, of one from 1024.

    Args:
        model: A fused model in float32; it is converted in place.
        device: Where it runs.
        half: Use FP16.
    """

    def __init__(self, model: Yolov7, device: torch.device, *, half: bool) -> None:
        self.device = device
        self.dtype = torch.float16 if half else torch.float32
        self._model = model.to(device)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # not the anchors of the head
                module.to(self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A divisor on the device: CUDA turns division by a host number into a multiplication, which rounds differently.
        self._white = torch.tensor(255, dtype=torch.float32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # calls use their own streams, which would not wait for the weights

    def empty_input(self, batch: int, canvas_hw: tuple[int, int]) -> Tensor:
        """Allocate a network input [B, 3, H, W]."""
        shape = (batch, 3, *canvas_hw)
        return torch.zeros(shape, dtype=self.dtype, device=self.device).to(memory_format=torch.channels_last)

    def prepare(self, canvases: Tensor, images: Tensor) -> Tensor:
        """Fill `images` [B, 3, H, W] (RGB, 0..1) from canvases uint8 [B, H, W, 3] BGR.

        In FP32 the values equal `to_network_input` bit for bit; FP16 rounds them once.
        """
        return torch.div(canvases.flip(-1).permute(0, 3, 1, 2), self._white, out=images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the head maps [B, 3 * (5 + C), H, W] in the network's precision, fine to coarse."""
        return self._model.head_maps(images)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Decode head maps to float32 [B, A, 5 + C]; see `Detect.decode`."""
        head = self._model.head
        return head.decode([head.as_raw(x).float() for x in maps])

    def predict(self, images: Tensor) -> Tensor:
        """Return float32 [B, A, 5 + C]: cx, cy, w, h in input pixels, objectness, class probabilities."""
        return self.decode(self.maps(images))


def select_candidates(decoded: Tensor, conf: float) -> tuple[Tensor, Tensor]:
    """Select the rows of a decoded output that can become detections, in their order.

    `postprocess` returns the same for these rows as for all anchors: it would drop exactly the other rows, because none
    of their scores exceeds `conf`. Rows with NaN are kept for `postprocess` to handle.

    Args:
        decoded: float32 [B, A, 5 + C].
        conf: See `Thresholds`.

    Returns:
        Rows float32 [K, 5 + C], and the image index of each, int64 [K]. K depends on the data: a GPU is synchronised.
    """
    objectness = decoded[..., 4]
    selected = objectness > conf
    if decoded.shape[2] > 6:
        # Rounding is monotonic, so the best product is that of the best class.
        selected &= ~(objectness * decoded[..., 5:].amax(-1) <= conf)
    images, anchors = selected.nonzero(as_tuple=True)
    return decoded[images, anchors], images


def split_by_image(rows: Tensor, images: Tensor, count: int) -> list[FloatArray]:
    """Split candidates on the host into one array [K_i, 5 + C] for each of `count` images."""
    ends = np.searchsorted(images.numpy(), np.arange(1, count))
    return np.split(rows.numpy(), ends)


class CapturedGraph:
    """The network with buffers and a stream for one input size, captured as a CUDA graph. One call at a time.

    The steps of a call are `upload`, `prepare`, `run` and `download`, all within `on_stream`. Only `download` waits for
    the device.

    Args:
        network: The network to capture.
        size: Size of the input.
        capture: Turns a forward pass whose input and output stay at the same addresses into a replay of it.
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
        """Run this thread's torch code on the stream of this graph, in inference mode."""
        with torch.inference_mode(), self._stream_context():
            yield

    def _stream_context(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def upload(self, canvases: Sequence[Image]) -> None:
        """Copy canvases uint8 BGR [H, W, 3] into page-locked memory and start their copy to the device."""
        np.stack(canvases, out=self._staging.numpy())
        self._canvases.copy_(self._staging, non_blocking=self._stream is not None)

    def prepare(self) -> None:
        """Convert the canvases to the network input."""
        self._network.prepare(self._canvases, self._images)

    def run(self) -> Tensor:
        """Return the decoded output float32 [B, A, 5 + C]; the next run overwrites it."""
        return self._forward()

    def download(self, decoded: Tensor, conf: float) -> list[FloatArray]:
        """Return copies of each image's rows that can become detections; see `select_candidates`."""
        candidates = select_candidates(decoded, conf)
        rows, images = (part.to("cpu", non_blocking=self._stream is not None) for part in candidates)
        self.synchronize()
        return split_by_image(rows, images, self.size[0])

    def synchronize(self) -> None:
        """Wait for the queued work; other Python threads run in the meantime."""
        if self._stream:
            self._stream.synchronize()


class CapturedGraphPool:
    """Captured graphs for any number of threads; a call that finds no free graph of its size captures one.

    Args:
        make: Captures a graph.
        limit: Maximum number of graphs. Beyond it, the least recently used free graph is freed; if none is free, the
            call waits.
    """

    def __init__(self, make: Callable[[Size], CapturedGraph], *, limit: int) -> None:
        self._make, self._limit = make, limit
        self._changed = threading.Condition()
        self._free: list[CapturedGraph] = []  # least recently used first
        self._count = 0
        self._closed = False

    @contextlib.contextmanager
    def acquire(self, size: Size) -> Iterator[CapturedGraph]:
        """Reserve a graph for this thread. A graph is dropped after a call that failed."""
        graph = self._take(size)
        try:
            graph = graph or self._make(size)
            yield graph
        except BaseException:
            self._give_back(None)
            raise
        self._give_back(graph)

    def free_idle(self) -> int:
        """Free all graphs that are not in use; return their number."""
        with self._changed:
            idle, self._free = self._free, []
            self._count -= len(idle)
            self._changed.notify_all()
            return len(idle)

    def close(self) -> None:
        """Free all graphs; those in use are freed at the end of their call."""
        self._closed = True
        self.free_idle()

    def _take(self, size: Size) -> CapturedGraph | None:
        """Return a free graph, or `None` if the caller may capture one."""
        with self._changed:
            while True:
                for graph in reversed(self._free):
                    if graph.size == size:
                        self._free.remove(graph)
                        return graph
                if self._count < self._limit:
                    self._count += 1
                    return None
                if self._free:
                    self._free.pop(0)
                    return None
                self._changed.wait()

    def _give_back(self, graph: CapturedGraph | None) -> None:
        with self._changed:
            if graph is None or self._closed:
                self._count -= 1
            else:
                self._free.append(graph)
            self._changed.notify()


class GraphCapturer:
    """Captures forward passes with `capture` until that fails; from then on, they run without a graph.

    Attributes:
        available: False after a capture failed.
    """

    def __init__(self, capture: Capture) -> None:
        self.available = True
        self._capture = capture

    def __call__(self, forward: Forward) -> Forward:
        """Return a replay of the forward pass, or `forward` itself.

        Raises:
            RuntimeError: Out of memory.
        """
        with _capture_lock:
            if not self.available:
                return forward
            try:
                return self._capture(forward)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.available = False
                logger.warning(
                    "A CUDA graph of the network cannot be captured here (%s); it runs without, which is slower.",
                    first_line(error),
                )
                return forward


def capture_graph(forward: Forward) -> Forward:
    """Capture a forward pass as a CUDA graph on this thread's stream, after a few warm-up runs.

    Raises:
        RuntimeError: It cannot be captured, or out of memory.
    """
    for _ in range(WARM_UP_RUNS):
        forward()
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate during the capture; only an error of this thread invalidates it.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        output = forward()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def first_line(error: Exception) -> str:
    """Return the first line of a torch error, without its advice and stack traces."""
    return str(error).strip().partition("\n")[0]
