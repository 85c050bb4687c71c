"""One slot of an engine: a stream, contexts, buffers and CUDA graphs, used by one thread at a time.

A run is upload, letterbox, inference and download, queued in one go; the host waits once, at the end. What repeats is
launched as one CUDA graph, which saves the host the launches of every layer:

* A frame's place and size are data (a table in the upload), so one graph serves frames of every size.
* Uploads of the same few bytes as last time are part of the graph. Large ones go ahead of it in pieces, while the
  host still writes the rest (`Staging`): the graph then begins with the letterbox.
* NVIDIA leaves it undefined what a graph does after its context took another shape, and advises one context for each
  shape. A slot has one for each of the last few shapes; they share the memory they work in, since they never run at
  once. Before a recording, a context runs once as it is: TensorRT finishes what it put off then.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import DeviceError, LoadError, UsageError
from yolov7_deploy.image import Image, Letterbox, to_network_input
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.base import TimingBreakdown
from yolov7_deploy.runtimes.cuda import Array, Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream
from yolov7_deploy.runtimes.device_arrays import GpuImage
from yolov7_deploy.runtimes.letterbox_kernel import Kernels
from yolov7_deploy.runtimes.tensorrt_engine import CONF, IOU, Shape, TrtEngine
from yolov7_deploy.runtimes.upload import PIECE_BYTES, Staging

Pixels = Sequence[Image | GpuImage]
Results = dict[str, npt.NDArray[Any]]
_Step = Callable[[], None]

SHAPES = 4  # that keep a context, the least recently used goes
GRAPHS = 4  # of each shape
_ALIGNMENT = 256
_PIECES, _CANVASES = -1, -2  # keys of graphs that are not told apart by the bytes of their upload
_MARKS = 5  # before, between and behind the four steps


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """An output among the results: where it begins, its shape and its type."""

    start: int
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def end(self) -> int:
        return self.start + int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """What comes before inference; without a letterbox, canvases go up as they are."""

    upload: _Step
    letterbox: _Step | None = None


@dataclass(kw_only=True, slots=True)
class _Lane:
    """One shape: the context that has it, where its results lie, and what was recorded.

    Attributes:
        results: All outputs; those that are read come first and end at `read`.
        has_run: Since it took its shape.
        last_used: Bytes of the last upload.
    """

    shape: Shape
    context: Any
    results: dict[str, _Result]
    read: int
    has_run: bool = False
    last_used: int = 0
    graphs: OrderedDict[int, Graph] = field(default_factory=OrderedDict)

    def drop_graphs(self) -> None:
        """Forgets what was recorded."""
        while self.graphs:
            self.graphs.popitem()[1].close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run gave: `results` are views of page-locked memory that hold until the slot's next run."""

    results: Results
    preprocess_ms: float
    inference_ms: float
    spans: TimingBreakdown | None


class TrtExecutor:
    """Runs one batch after the other.

    Args:
        cuda: Of the thread's GPU.
        engine: Shared with other slots.
        kernels: Letterbox of the GPU; without, canvases are made on the host.

    Raises:
        DeviceError: There is no memory for it, or TensorRT makes no further context.
    """

    def __init__(self, cuda: Cuda, engine: TrtEngine, kernels: Kernels | None) -> None:
        self._engine, self._kernels = engine, kernels
        self._cuda = cuda
        self._most_shapes = SHAPES
        self._lanes: OrderedDict[Shape, _Lane] = OrderedDict()
        self._events: list[Event] = []
        with contextlib.ExitStack() as made:
            self.stream = made.enter_context(Stream(cuda))
            self._staging = made.enter_context(contextlib.closing(Staging(cuda, engine.batches[1])))
            canvas_bytes = int(np.prod(engine.largest)) * engine.canvas_dtype.itemsize
            self._canvas = made.enter_context(DeviceBuffer(cuda, (canvas_bytes,), np.uint8))
            self._scratch = made.enter_context(DeviceBuffer(cuda, (engine.scratch_bytes,), np.uint8))
            lane = self._shaped(self._new_context(), engine.largest)
            needed = max(result.end for result in lane.results.values())
            self._results = made.enter_context(DeviceBuffer(cuda, (needed,), np.uint8))
            self._read = made.enter_context(PinnedBuffer(cuda, (lane.read,), np.uint8))
            self._bind(lane)
            self._lanes[engine.largest] = self._recordable(lane)
            self._made = made.pop_all()

    def run(
        self,
        images: Pixels,
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        batch: int,
        timed: bool = False,
    ) -> Run:
        """The results of images on canvases of one size; fewer than `batch` are filled up with the last one.

        Raises:
            DeviceError: The GPU is out of memory, or lost, or TensorRT failed.
            UsageError: Images on the GPU with a letterbox that is the host's.
        """
        started = time.perf_counter()
        lane = self._lane(self._engine.shape(batch, letterboxes[0].canvas_hw))
        self._staging.set_thresholds(thresholds)
        if self._kernels is not None and not any(map(_averages, letterboxes)):
            self._follow(moved=self._staging.place(images, letterboxes, batch=batch))
            steps = _Steps(upload=self._upload, letterbox=partial(self._letterbox, self._kernels, lane.shape))
        else:
            canvases, moved = self._staging.canvases(lane.shape, self._engine.canvas_dtype)
            self._follow(moved=moved)
            _write_canvases(canvases, images, letterboxes)
            steps = _Steps(upload=partial(self._upload_canvases, canvases))
        go = self._measured if timed else self._launched
        return go(lane, steps, started)

    def _follow(self, *, moved: bool) -> None:
        """Gives every context the new addresses; what was recorded knows the old ones."""
        for lane in self._lanes.values() if moved else ():
            lane.drop_graphs()
            self._bind(lane)

    def _launched(self, lane: _Lane, steps: _Steps, started: float) -> Run:
        """Everything in one go, as one graph where it repeats."""
        used = self._staging.used
        # Without a letterbox, whole canvases go up, always as many bytes.
        is_whole = steps.letterbox is None or (used <= PIECE_BYTES and used == lane.last_used)
        lane.last_used = used
        sent = 0
        for ready in self._staging.write():
            if not is_whole:
                self.stream.upload(self._staging.device, self._staging.host[sent:ready], offset=sent)
                sent = ready
        prepared = time.perf_counter()
        queue: list[_Step] = [steps.upload] if is_whole else []
        queue += [steps.letterbox] if steps.letterbox else []
        queue += [partial(self._infer, lane), partial(self._download, lane)]
        key = _CANVASES if steps.letterbox is None else used if is_whole else _PIECES
        self._replay(lane, key, queue)
        self.stream.synchronize()
        return self._run(lane, preprocess_s=prepared - started, inference_s=time.perf_counter() - prepared)

    def _replay(self, lane: _Lane, key: int, queue: Sequence[_Step]) -> None:
        """Launches the graph of this key, or queues the work; records it when it comes the second time."""

        def work() -> None:
            for step in queue:
                step()

        graph = lane.graphs.get(key)
        if graph is None and lane.has_run and self._engine.graph_state == "on":
            graph = self._recorded(lane, key, work)
        if graph is None:
            work()
            lane.has_run = True
            return
        lane.graphs.move_to_end(key)
        graph.launch(self.stream)

    def _recorded(self, lane: _Lane, key: int, work: _Step) -> Graph | None:
        try:
            graph = Graph(self.stream, work)
        except DeviceError as error:
            if self._cuda.fault is not None:
                raise
            self._engine.give_up_graphs(error)
            return None
        if len(lane.graphs) >= GRAPHS:
            lane.graphs.popitem(last=False)[1].close()
        lane.graphs[key] = graph
        return graph

    def _measured(self, lane: _Lane, steps: _Steps, started: float) -> Run:
        """One step after the other, with the GPU's own times between them."""
        while len(self._events) < _MARKS:
            self._events.append(self._made.enter_context(Event(self._cuda)))
        for _ in self._staging.write():
            pass
        prepared = time.perf_counter()
        queue: list[_Step | None] = [steps.upload, steps.letterbox]
        queue += [partial(self._infer, lane), partial(self._download, lane)]
        self._events[0].record(self.stream)
        for step, event in zip(queue, self._events[1:], strict=True):
            if step is not None:
                step()
            event.record(self.stream)
        self.stream.synchronize()
        lane.has_run = True
        took = [1e3 * end.seconds_since(start) for start, end in pairwise(self._events)]
        host_s = prepared - started
        on_gpu = steps.letterbox is not None
        spans = TimingBreakdown(
            preprocess_ms=took[1] if on_gpu else host_s * 1e3,
            upload_ms=took[0] + (host_s * 1e3 if on_gpu else 0.0),
            engine_ms=took[2],
            download_ms=took[3],
            postprocess_ms=0.0,
        )
        return self._run(lane, preprocess_s=host_s, inference_s=time.perf_counter() - prepared, spans=spans)

    def _run(
        self, lane: _Lane, *, preprocess_s: float, inference_s: float, spans: TimingBreakdown | None = None
    ) -> Run:
        memory = self._read.array
        results = {
            name: memory[result.start : result.end].view(result.dtype).reshape(result.shape)
            for name, result in lane.results.items()
            if name in self._engine.wanted
        }
        return Run(results=results, preprocess_ms=preprocess_s * 1e3, inference_ms=inference_s * 1e3, spans=spans)

    # --- what is queued -----------------------------------------------------------------------------------------------

    def _upload(self) -> None:
        self.stream.upload(self._staging.device, self._staging.host[: self._staging.used])

    def _upload_canvases(self, canvases: Array) -> None:
        self._upload()  # the thresholds
        self.stream.upload(self._canvas, canvases)

    def _letterbox(self, kernels: Kernels, shape: Shape) -> None:
        kernels.letterbox(
            batch=shape[0],
            canvas_hw=self._engine.canvas_hw(shape),
            dtype=self._engine.canvas_dtype,
            frames=self._staging.addresses[2],
            canvas=self._canvas.pointer,
            stream=self.stream.handle,
        )

    def _infer(self, lane: _Lane) -> None:
        if not lane.context.execute_async_v3(self.stream.handle):
            self.stream.cuda.runtime.call("cudaGetLastError")
            raise DeviceError(
                f"TensorRT could not run {self._engine.name} with {lane.shape[0]} images. It said:\n"
                f"{self._engine.log.words}",
                fix="Try fewer images at once; y7 doctor shows the GPU and its libraries.",
            )

    def _download(self, lane: _Lane) -> None:
        self.stream.download(self._read.array[: lane.read], self._results)

    # --- contexts -----------------------------------------------------------------------------------------------------

    def _lane(self, shape: Shape) -> _Lane:
        """The lane of a shape; a new shape takes a new context, or that of the shape that rested longest."""
        if shape not in self._lanes:
            context = self._new_context() if len(self._lanes) < self._most_shapes else None
            if context is None:
                self._most_shapes = len(self._lanes)
                oldest = self._lanes.popitem(last=False)[1]
                oldest.drop_graphs()
                context = oldest.context
            lane = self._shaped(context, shape)
            self._bind(lane)
            self._lanes[shape] = lane
        self._lanes.move_to_end(shape)
        return self._lanes[shape]

    def _new_context(self) -> Any:  # noqa: ANN401 - TensorRT's
        """`None` where there can be no further one."""
        context = self._engine.new_context()
        if context is None or not self._engine.dialect.take_profile(context, self.stream.handle):
            return None
        self._engine.dialect.give_scratch(context, self._scratch.pointer, self._scratch.nbytes)
        return context

    def _shaped(self, context: Any, shape: Shape) -> _Lane:  # noqa: ANN401
        engine = self._engine
        if context is None:
            raise DeviceError(
                f"TensorRT makes no context to run {engine.name} in. It said:\n{engine.log.words}",
                fix="y7 doctor shows the GPU and its libraries.",
            )
        if engine.is_open and not context.set_input_shape(engine.images.name, shape):
            raise DeviceError(
                f"TensorRT refuses an input of {shape} for {engine.name}. It said:\n{engine.log.words}",
                fix="Build it for such inputs:  y7 build --weights NAME.onnx --min-batch 1 --max-batch N",
            )
        results, at, read = {}, 0, 0
        for output in engine.outputs:
            sides = tuple(int(side) for side in context.get_tensor_shape(output.name))
            if min(sides, default=1) < 0:
                raise LoadError(
                    f"Output {output.name} of {engine.name} has a size that depends on the image: {sides}.",
                    fix="Export it with fixed sizes:  y7 export --weights WEIGHTS.pt --engine",
                )
            results[output.name] = _Result(start=at, shape=sides, dtype=np.dtype(_storage(output.dtype)))
            read = results[output.name].end if output.name in engine.wanted else read
            at = _aligned(results[output.name].end)
        return _Lane(shape=shape, context=context, results=results, read=read)

    def _bind(self, lane: _Lane) -> None:
        conf, iou, _ = self._staging.addresses
        addresses = {name: self._results.pointer + result.start for name, result in lane.results.items()}
        for name in self._engine.inputs:
            addresses[name] = {CONF: conf, IOU: iou}.get(name, self._canvas.pointer)
        for name, address in addresses.items():
            if not lane.context.set_tensor_address(name, address):
                raise DeviceError(f"TensorRT refuses the address of {name}: {self._engine.log.words}", fix="y7 doctor")

    def _recordable(self, lane: _Lane) -> _Lane:
        """The first lane, once more where TensorRT says that nobody but itself can record its work."""
        if self._engine.graphs_inside or self._engine.dialect.can_record(lane.context, self.stream.handle):
            return lane
        self._engine.record_inside()
        lane = self._shaped(self._new_context(), lane.shape)
        self._bind(lane)
        return lane

    def close(self) -> None:
        """Waits for its work and gives everything back, also where the GPU is lost."""
        with contextlib.suppress(DeviceError):
            self.stream.synchronize()
        for lane in self._lanes.values():
            lane.drop_graphs()
        self._lanes.clear()  # contexts before the memory that they work in
        self._made.close()


def _averages(letterbox: Letterbox) -> bool:
    """OpenCV's, not the kernel's."""
    return letterbox.shrink_by_area and letterbox.resized_hw != letterbox.source_hw


def _write_canvases(canvases: Array, images: Pixels, letterboxes: Sequence[Letterbox]) -> None:
    """Letterboxes on the host; the last canvas fills the batch up."""
    for canvas, image, letterbox in zip(canvases, images, letterboxes, strict=False):
        if isinstance(image, GpuImage):
            raise UsageError(
                "This letterbox is made on the host, and an image is on the GPU.", fix="Pass image.cpu().numpy()"
            )
        made = letterbox.apply(image)
        canvas[...] = made if canvases.dtype == np.uint8 else to_network_input([made])[0]
    canvases[len(images) :] = canvases[len(images) - 1]


def _storage(dtype: str) -> str:
    """Outputs that nobody reads may be of types that NumPy does not know."""
    return {"bfloat16": "uint16"}.get(dtype, dtype)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
