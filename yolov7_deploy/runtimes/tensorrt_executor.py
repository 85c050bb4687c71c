"""An executor of a TensorRT engine: a stream, contexts, buffers and CUDA graphs, used by one thread at a time.

A run queues upload, letterbox, inference and download, and the host waits once, at the end. Repeated work is captured
as a CUDA graph, so that the host does not launch every layer separately:

* Address and size of a frame are data (a table in the upload), so one graph serves frames of every size.
* A small upload of as many bytes as last time is part of the graph. A large one is split into pieces before the graph,
  while the host writes the rest (`Staging`); the graph then starts with the letterbox.
* The behaviour of a graph is undefined after its context has changed its shape, and NVIDIA recommends one context for
  each shape. An executor has one for each of the last few shapes. They share scratch memory, since they never run at
  the same time. A context runs once without a graph before a capture, because TensorRT defers some work to that run.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import DeviceError, ImageError, LoadError, UsageError
from yolov7_deploy.image import Image, Letterbox, to_network_input
from yolov7_deploy.metadata import THRESHOLD_INPUTS
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.base import TimingBreakdown
from yolov7_deploy.runtimes.cuda import Array, Cuda, DeviceBuffer, Event, Graph, PinnedBuffer, Stream
from yolov7_deploy.runtimes.device_arrays import GpuImage, host_image
from yolov7_deploy.runtimes.letterbox_kernel import Kernels
from yolov7_deploy.runtimes.staging import PIECE_BYTES, Staging, align
from yolov7_deploy.runtimes.tensorrt_engine import GRAPH_LOCK, Shape, TrtEngine

HostOrGpuImages = Sequence[Image | GpuImage]
Results = dict[str, npt.NDArray[Any]]
_Step = Callable[[], None]

MAX_SHAPES = 4  # input shapes with a context; beyond it, the least recently used one is replaced
MAX_GRAPHS_PER_SHAPE = 4
# Keys of graphs that do not depend on the number of uploaded bytes: upload in pieces, and upload of whole canvases.
_PIECES, _CANVASES = -1, -2
_EVENTS = 5  # before, between and after the four steps


@dataclass(frozen=True, kw_only=True, slots=True)
class _OutputView:
    """Start, shape and type of an output in the memory for outputs."""

    start: int
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def end(self) -> int:
        return self.start + int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class _InputSteps:
    """The steps before inference; without `letterbox`, whole canvases are uploaded."""

    upload: _Step
    letterbox: _Step | None = None


@dataclass(kw_only=True, slots=True)
class _ShapeState:
    """One input shape: its context, the layout of its outputs, and its captured graphs.

    Attributes:
        outputs: All outputs; those that are downloaded come first and end at `download_bytes`.
        has_run: True if the context has run since it was given this shape.
        last_used: Bytes of the last upload.
        graphs: Captured graphs by bytes of their upload, `_PIECES` or `_CANVASES`; least recently used first.
        results: Views of the outputs that are read in the page-locked memory, once it exists.
    """

    shape: Shape
    context: Any
    outputs: dict[str, _OutputView]
    download_bytes: int
    has_run: bool = False
    last_used: int = 0
    graphs: OrderedDict[int, Graph] = field(default_factory=OrderedDict)
    results: Results = field(default_factory=dict)

    def drop_graphs(self) -> None:
        """Free the captured graphs."""
        while self.graphs:
            self.graphs.popitem()[1].close()


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorResult:
    """Outputs of a run: `arrays` are views of page-locked memory that are valid until the executor's next run."""

    arrays: Results
    preprocess_ms: float
    inference_ms: float
    timing: TimingBreakdown | None


class TrtExecutor:
    """Runs batches one after the other.

    Args:
        cuda: CUDA on the thread's GPU.
        engine: The engine, which other executors share.
        kernels: Letterbox kernel of the GPU; without it, canvases are created on the host.

    Raises:
        DeviceError: Out of memory, or TensorRT cannot create another context.
    """

    def __init__(self, cuda: Cuda, engine: TrtEngine, kernels: Kernels | None) -> None:
        self._engine, self._kernels = engine, kernels
        self._cuda = cuda
        self._in_place_gpu = cuda.value("cudaGetDevice") if cuda.reads_host_memory() else None
        self._max_shapes = MAX_SHAPES
        self._states: OrderedDict[Shape, _ShapeState] = OrderedDict()  # least recently used first
        self._events: list[Event] = []
        with contextlib.ExitStack() as stack:
            self.stream = stack.enter_context(Stream(cuda))
            self._staging = stack.enter_context(contextlib.closing(Staging(cuda, engine.batch_limits[1])))
            canvas_bytes = int(np.prod(engine.max_shape)) * engine.canvas_dtype.itemsize
            self._canvas = stack.enter_context(DeviceBuffer(cuda, (canvas_bytes,), np.uint8))
            self._scratch = stack.enter_context(DeviceBuffer(cuda, (engine.scratch_bytes,), np.uint8))
            state = self._new_state(self._new_context(), engine.max_shape)
            output_bytes = max(output.end for output in state.outputs.values())
            self._outputs = stack.enter_context(DeviceBuffer(cuda, (output_bytes,), np.uint8))
            self._downloaded = stack.enter_context(PinnedBuffer(cuda, (state.download_bytes,), np.uint8))
            self._bind(state)
            self._states[engine.max_shape] = self._with_graph_support(state)
            self._resources = stack.pop_all()

    def run(
        self,
        images: HostOrGpuImages,
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        batch: int,
        timed: bool = False,
    ) -> ExecutorResult:
        """Run images on canvases of one size; a list shorter than `batch` is padded with its last image.

        Raises:
            DeviceError: Out of memory, the GPU is lost, or TensorRT failed.
            UsageError: An image is on the GPU, and its letterbox can only be applied on the host.
        """
        started = time.perf_counter()
        state = self._state_of(self._engine.input_shape(batch, letterboxes[0].canvas_hw))
        self._staging.set_thresholds(thresholds)
        if self._kernels is not None and not any(letterbox.averages_area for letterbox in letterboxes):
            moved = self._staging.layout(self._in_place(images), letterboxes, batch=batch)
            self._rebind(moved=moved)
            steps = _InputSteps(upload=self._upload, letterbox=partial(self._letterbox, self._kernels, state.shape))
        else:
            canvases, moved = self._staging.canvases(state.shape, self._engine.canvas_dtype)
            self._rebind(moved=moved)
            _write_canvases(canvases, images, letterboxes)
            steps = _InputSteps(upload=partial(self._upload_canvases, canvases))
        execute = self._run_timed if timed else self._run_fast
        return execute(state, steps, started)

    def _in_place(self, images: HostOrGpuImages) -> HostOrGpuImages:
        """Return the images, those in host memory by their address if the GPU reads it; others are staged."""
        gpu = self._in_place_gpu
        if gpu is None:
            return images
        return [image if isinstance(image, GpuImage) else host_image(image, device=gpu) or image for image in images]

    def _rebind(self, *, moved: bool) -> None:
        """Pass the new addresses to every context after the staging memory has moved; graphs contain the old ones."""
        for state in self._states.values() if moved else ():
            state.drop_graphs()
            self._bind(state)

    def _run_fast(self, state: _ShapeState, steps: _InputSteps, started: float) -> ExecutorResult:
        """Queue all steps without waiting between them, as one graph if they repeat."""
        used = self._staging.used
        # Without the letterbox kernel, whole canvases are uploaded, always of the same size.
        is_whole = steps.letterbox is None or (used <= PIECE_BYTES and used == state.last_used)
        state.last_used = used
        sent = 0
        for ready in self._staging.write():
            if not is_whole:
                self.stream.upload(self._staging.device, self._staging.host[sent:ready], offset=sent)
                sent = ready
        prepared = time.perf_counter()
        queue: list[_Step] = [steps.upload] if is_whole else []
        queue += [steps.letterbox] if steps.letterbox else []
        queue += [partial(self._infer, state), partial(self._download, state)]
        key = _CANVASES if steps.letterbox is None else used if is_whole else _PIECES
        self._replay(state, key, queue)
        self.stream.synchronize()
        return self._result(state, preprocess_s=prepared - started, inference_s=time.perf_counter() - prepared)

    def _replay(self, state: _ShapeState, key: int, queue: Sequence[_Step]) -> None:
        """Launch the graph of this key, or queue the steps; they are captured the second time."""

        def work() -> None:
            for step in queue:
                step()

        graph = state.graphs.get(key)
        if graph is None and state.has_run and self._engine.graph_state == "on":
            graph = self._capture(state, key, work)
        if graph is None:
            work()
            state.has_run = True
            return
        state.graphs.move_to_end(key)
        graph.launch(self.stream)

    def _capture(self, state: _ShapeState, key: int, work: _Step) -> Graph | None:
        """Return the graph; `None` if the capture failed, so that the work runs without it and the next run retries."""
        try:
            with GRAPH_LOCK:
                graph = Graph(self.stream, work)
        except DeviceError as error:
            if self._cuda.fault is not None:
                raise
            self._engine.count_capture(error)
            return None
        self._engine.count_capture(None)
        if len(state.graphs) >= MAX_GRAPHS_PER_SHAPE:
            state.graphs.popitem(last=False)[1].close()
        state.graphs[key] = graph
        return graph

    def _run_timed(self, state: _ShapeState, steps: _InputSteps, started: float) -> ExecutorResult:
        """Run step by step without a graph, and measure each with CUDA events."""
        while len(self._events) < _EVENTS:
            self._events.append(self._resources.enter_context(Event(self._cuda)))
        for _ in self._staging.write():
            pass
        prepared = time.perf_counter()
        queue: list[_Step | None] = [steps.upload, steps.letterbox]
        queue += [partial(self._infer, state), partial(self._download, state)]
        self._events[0].record(self.stream)
        for step, event in zip(queue, self._events[1:], strict=True):
            if step is not None:
                step()
            event.record(self.stream)
        self.stream.synchronize()
        state.has_run = True
        step_ms = [1e3 * end.seconds_since(start) for start, end in pairwise(self._events)]
        host_s = prepared - started
        on_gpu = steps.letterbox is not None
        timing = TimingBreakdown(
            preprocess_ms=step_ms[1] if on_gpu else host_s * 1e3,
            upload_ms=step_ms[0] + (host_s * 1e3 if on_gpu else 0.0),
            engine_ms=step_ms[2],
            download_ms=step_ms[3],
            postprocess_ms=0.0,
        )
        return self._result(state, preprocess_s=host_s, inference_s=time.perf_counter() - prepared, timing=timing)

    def _result(
        self, state: _ShapeState, *, preprocess_s: float, inference_s: float, timing: TimingBreakdown | None = None
    ) -> ExecutorResult:
        if not state.results:
            memory = self._downloaded.array
            for name in self._engine.result_names:
                output = state.outputs[name]
                state.results[name] = memory[output.start : output.end].view(output.dtype).reshape(output.shape)
        return ExecutorResult(
            arrays=state.results, preprocess_ms=preprocess_s * 1e3, inference_ms=inference_s * 1e3, timing=timing
        )

    # --- steps --------------------------------------------------------------------------------------------------------

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
            frames=self._staging.frames_address,
            canvas=self._canvas.pointer,
            stream=self.stream.handle,
        )

    def _infer(self, state: _ShapeState) -> None:
        if not state.context.execute_async_v3(self.stream.handle):
            self.stream.cuda.binding.call("cudaGetLastError")
            raise DeviceError(
                f"TensorRT could not run {self._engine.name} with {state.shape[0]} images. Its log:\n"
                f"{self._engine.log.tail}",
                fix="Try fewer images at once; y7 doctor shows the GPU and its libraries.",
            )

    def _download(self, state: _ShapeState) -> None:
        self.stream.download(self._downloaded.array[: state.download_bytes], self._outputs)

    # --- contexts -----------------------------------------------------------------------------------------------------

    def _state_of(self, shape: Shape) -> _ShapeState:
        """Return the state of a shape. A new shape gets a new context, or that of the least recently used shape."""
        if shape not in self._states:
            context = self._new_context() if len(self._states) < self._max_shapes else None
            if context is None:
                self._max_shapes = len(self._states)
                oldest = self._states.popitem(last=False)[1]
                oldest.drop_graphs()
                context = oldest.context
            state = self._new_state(context, shape)
            self._bind(state)
            self._states[shape] = state
        self._states.move_to_end(shape)
        return self._states[shape]

    def _new_context(self) -> Any:  # noqa: ANN401 - TensorRT's
        """Create a context, or return `None` if TensorRT cannot."""
        context = self._engine.new_context(self.stream.handle)
        if context is None:
            return None
        self._engine.capabilities.set_device_memory(context, self._scratch.pointer, self._scratch.nbytes)
        return context

    def _new_state(self, context: Any, shape: Shape) -> _ShapeState:  # noqa: ANN401
        engine = self._engine
        if context is None:
            raise DeviceError(
                f"TensorRT cannot create a context for {engine.name}: each of its optimization profiles is in use, or "
                f"the GPU is out of memory. TensorRT's log:\n{engine.log.tail}",
                fix="An engine of y7 build shares its profile; y7 doctor shows the GPU and its libraries.",
            )
        if engine.is_dynamic and not context.set_input_shape(engine.images.name, shape):
            raise DeviceError(
                f"TensorRT refuses an input of {shape} for {engine.name}. Its log:\n{engine.log.tail}",
                fix="Build it for such inputs:  y7 build --weights NAME.onnx --min-batch 1 --max-batch N",
            )
        outputs, start, download_bytes = {}, 0, 0
        for tensor in engine.outputs:
            output_shape = tuple(int(size) for size in context.get_tensor_shape(tensor.name))
            if min(output_shape, default=1) < 0:
                raise LoadError(
                    f"Output {tensor.name} of {engine.name} has a size that depends on the image: {output_shape}.",
                    fix="Export it with fixed sizes:  y7 export --weights WEIGHTS.pt --engine",
                )
            output = _OutputView(start=start, shape=output_shape, dtype=np.dtype(_numpy_dtype(tensor.dtype)))
            outputs[tensor.name] = output
            download_bytes = output.end if tensor.name in engine.result_names else download_bytes
            start = align(output.end)
        return _ShapeState(shape=shape, context=context, outputs=outputs, download_bytes=download_bytes)

    def _bind(self, state: _ShapeState) -> None:
        thresholds = dict(zip(THRESHOLD_INPUTS, self._staging.threshold_addresses, strict=True))
        addresses = {name: self._outputs.pointer + output.start for name, output in state.outputs.items()}
        for name in self._engine.inputs:
            addresses[name] = thresholds.get(name, self._canvas.pointer)
        for name, address in addresses.items():
            if not state.context.set_tensor_address(name, address):
                raise DeviceError(f"TensorRT refuses the address of {name}: {self._engine.log.tail}", fix="y7 doctor")

    def _with_graph_support(self, state: _ShapeState) -> _ShapeState:
        """Return the first state, or a new one if only TensorRT-RTX itself can capture the work of its context."""
        if self._engine.graphs_inside or self._engine.capabilities.is_stream_capturable(
            state.context, self.stream.handle
        ):
            return state
        self._engine.use_graphs_inside()
        state = self._new_state(self._new_context(), state.shape)
        self._bind(state)
        return state

    def close(self) -> None:
        """Wait for the queued work and free everything, even if the GPU is lost."""
        with contextlib.suppress(DeviceError):
            self.stream.synchronize()
        for state in self._states.values():
            state.drop_graphs()
            state.results.clear()
            state.context = None  # frees the profile and comes before the memory, also if a traceback holds the state
        self._states.clear()
        self._resources.close()


def _write_canvases(canvases: Array, images: HostOrGpuImages, letterboxes: Sequence[Letterbox]) -> None:
    """Letterbox images on the host; the last canvas is repeated to fill the batch."""
    for canvas, image, letterbox in zip(canvases, images, letterboxes, strict=False):
        if isinstance(image, GpuImage):
            raise UsageError(
                "This letterbox is applied on the host, and an image is on the GPU.", fix="Pass image.cpu().numpy()"
            )
        letterboxed = letterbox.apply(image)
        canvas[...] = letterboxed if canvases.dtype == np.uint8 else to_network_input([letterboxed])[0]
    canvases[len(images) :] = canvases[len(images) - 1]


def _numpy_dtype(dtype: str) -> str:
    """Return a NumPy type of the same size; outputs that are not read may have types that NumPy does not know."""
    return {"bfloat16": "uint16"}.get(dtype, dtype)


logger = get_logger(__name__)

MAX_EXECUTORS = 4


class TrtExecutorPool:
    """A bounded pool; the first executor is created at once, the others when they are needed.

    Args:
        make: Creates an executor on the GPU of the calling thread.

    Raises:
        DeviceError: There is not enough memory for one executor.
    """

    def __init__(self, make: Callable[[], TrtExecutor]) -> None:
        self._make, self._limit = make, MAX_EXECUTORS
        self._changed = threading.Condition()
        self._free = [make()]
        self._count = 1
        self._closed = False

    @property
    def limit(self) -> int:
        """Maximum number of executors; fewer than `MAX_EXECUTORS` if memory ran out."""
        return self._limit

    @contextlib.contextmanager
    def acquire(self) -> Iterator[TrtExecutor]:
        """Reserve an executor until the end of the block.

        After an error other than a mistake of the caller, the state of the executor's work is unknown: it is closed,
        and a later call creates a new one.

        Raises:
            UsageError: The pool is closed.
            DeviceError: There is not enough memory for an executor, and no other one to wait for.
        """
        executor = self._take()
        try:
            yield executor
        except (ImageError, UsageError):
            self._give_back(executor)
            raise
        except BaseException:
            self._discard(executor)
            raise
        self._give_back(executor)

    def _take(self) -> TrtExecutor:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._free or self._count < self._limit)
                if self._closed:
                    raise UsageError("This engine is closed.", fix="Open a new Detector, or keep it open longer.")
                if self._free:
                    return self._free.pop()  # the one used last: its memory is in the caches
                self._count += 1
            try:
                return self._make()
            except DeviceError as error:
                self._forget(error)
            except BaseException:
                self._forget(None)
                raise

    def _forget(self, error: DeviceError | None) -> None:
        """Uncount an executor; if it could not be created, limit the pool to those that exist."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()
            if error is None:
                return
            if self._count == 0:
                raise error
            self._limit = self._count
        logger.warning("Concurrent calls are limited to %d: %s", self._count, error.message)

    def _give_back(self, executor: TrtExecutor) -> None:
        with self._changed:
            self._free.append(executor)
            self._changed.notify_all()

    def _discard(self, executor: TrtExecutor) -> None:
        try:
            executor.close()
        finally:
            self._forget(None)

    def close(self) -> None:
        """Wait for the running calls, then close all executors; calling it twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._count)
            executors, self._free, self._count = self._free, [], 0
        for executor in executors:
            executor.close()
