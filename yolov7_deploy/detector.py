"""Detector: images in, Detections out, with the same results on every runtime."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard, cast, overload

import numpy as np
import numpy.typing as npt

from yolov7_deploy._text import get_logger
from yolov7_deploy.detections import Detections, Speed, find_classes
from yolov7_deploy.errors import ImageError, UsageError, suggests_arguments
from yolov7_deploy.hub import find_weights
from yolov7_deploy.image import (
    PAD_GREY,
    Image,
    ImageBytes,
    Letterbox,
    PilImage,
    as_bgr,
    fit_letterbox,
    fit_rect_letterbox,
    is_pil_image,
    read_image,
)
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import TOPK_LIMIT, Thresholds, file_thresholds, parse_size
from yolov7_deploy.runtimes.base import (
    CallTracker,
    RuntimeResult,
    TimingBreakdown,
    check_rect_supported,
    join_results,
    open_runtime,
)
from yolov7_deploy.runtimes.device_arrays import GpuArray, gpu_hw, is_gpu_array
from yolov7_deploy.sources import Frame, OnError, OneSource, SourceLike, check_on_error, open_source, read_each
from yolov7_deploy.sources.streams import StreamEvent, StreamOptions, StreamSources, resolve_streams
from yolov7_deploy.streams import MAX_AGE_S, Streams

logger = get_logger(__name__)

ImageLike = npt.NDArray[Any] | PilImage | GpuArray | ImageBytes | str | os.PathLike[str]
# `list` is invariant: list[str] would not be a list[ImageLike].
ImageList = list[Any] | tuple[ImageLike, ...] | Iterator[ImageLike]
ClassesLike = int | str | Iterable[int | str]
MAX_BATCH_SIZE = 32  # images that enter a network of dynamic batch size together, as in the paper's batch timings
EMPTY_RESULT = RuntimeResult(
    detections=[],
    preprocess_ms=0,
    inference_ms=0,
    postprocess_ms=0,
    timing=TimingBreakdown(preprocess_ms=0, upload_ms=0, engine_ms=0, download_ms=0, postprocess_ms=0),
)
# Two calls run the network, one prepares its image and one reads results: 1.14 x the throughput of two threads on two
# cores.
SUBMIT_THREADS = 4


class Detector:
    """Detect objects in images with a `.pt`, `.safetensors`, `.onnx` or `.engine` file.

    A Detector may be used from several threads at the same time. Thresholds that are omitted come from the file if NMS
    is inside it, and are the official ones (`Thresholds`) otherwise. Each call may override them.

    It can be sent to other processes: its pickle has the path of the file and the options, and the receiver opens the
    file again. A child process of `os.fork` may use a Detector of its parent on a CPU, where ONNX files are opened
    again at the first call and checkpoints use one thread; on a GPU, every call is refused.

    Args:
        weights: A file, or an official name such as `yolov7-tiny`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or the number of a GPU.
        img: Image size (one number for a square) or (height, width). The default is the fixed size of the file, else
            the training size of the weights, else the paper's size.
        rect: Rectangular input, as in the official detection program: pad each image to the smallest multiple of the
            stride instead of to `img`. It is faster, and boxes differ a little from those of a square. Only for
            checkpoints and for files that take any height and width (`y7 export --dynamic`). Images of a batch run in
            groups of equal input size.
        half: FP16 for checkpoints: by default on a GPU, as in the official program, and not on a CPU. Files with a
            fixed precision refuse any other.
        runtime: What runs an ONNX file: `onnxruntime`, `openvino` (in float32), `openvino-bf16` or `openvino-f16`.
            `auto` is OpenVINO for INT8 and FP16 files on a CPU if it is installed, else ONNX Runtime.
        conf, iou, max_det, multi_label, class_agnostic: See `Thresholds`.
        classes: Keep only these classes: ids, names, or a mix.

    Raises:
        LoadError: The file is missing, broken or of an unknown kind.
        MissingLibraryError: The library that runs this kind of file is not installed.
        DeviceError: There is no such device.
        UsageError: An option is invalid, or contradicts the file.

    Example:
        >>> with Detector("shapes.onnx") as detector:
        ...     detections = detector("street.jpg", conf=0.4)
    """

    @suggests_arguments
    def __init__(
        self,
        weights: str | os.PathLike[str],
        *,
        device: str | int = "auto",
        img: int | tuple[int, int] | None = None,
        rect: bool = False,
        half: bool | None = None,
        runtime: str = "auto",
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: ClassesLike | None = None,
        multi_label: bool | None = None,
        class_agnostic: bool | None = None,
    ) -> None:
        started = time.perf_counter()
        thresholds: dict[str, Any] = {
            "conf": conf,
            "iou": iou,
            "max_det": max_det,
            "multi_label": multi_label,
            "class_agnostic": class_agnostic,
        }
        requested_hw, device = parse_size(img), _device_name(device)
        if half is not None and not isinstance(half, bool):
            raise UsageError(f"half must be True, False or None, not {half!r}.", fix="half=True is FP16.")
        if not isinstance(rect, bool):
            raise UsageError(f"rect must be True or False, not {rect!r}.", fix="rect=True pads to a rectangle.")
        Thresholds(**{name: value for name, value in thresholds.items() if value is not None})  # checks them
        self.path = find_weights(_weights_path(weights))
        self._calls = CallTracker(SUBMIT_THREADS)
        self._runtime = open_runtime(self.path, device=device, input_hw=requested_hw, half=half, runtime=runtime)
        self.metadata: ModelMetadata = self._runtime.metadata
        self.input_hw: tuple[int, int] = requested_hw or self.metadata.default_hw
        self.rect = rect
        # For copies in other processes, which may work in other folders.
        open_file: Callable[..., Detector] = type(self)
        self._open_again = functools.partial(
            open_file, self.path.absolute(), device=device, img=requested_hw, rect=rect, half=half, runtime=runtime
        )
        self._warned_max_det = False
        try:
            if rect:
                check_rect_supported(self.path, self._runtime)
            self.thresholds = self._override(_default_thresholds(self.metadata), classes=classes, **thresholds)
        except BaseException:
            self._runtime.close()
            raise
        logger.info("%s opened on %s in %.2f s", self.path, self.device, time.perf_counter() - started)

    def __repr__(self) -> str:
        size = ("rect up to " if self.rect else "") + "x".join(map(str, self.input_hw))
        what = f"{self.metadata.variant} {self.metadata.precision}, {len(self.class_names)} classes, {size}"
        return f"Detector({str(self.path)!r}: {what}, {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        self._calls.check_open()
        return functools.partial(self._open_again, **asdict(self.thresholds)), ()

    @property
    def runtime(self) -> str:
        """Name of the runtime: `pytorch`, `onnxruntime`, `openvino` or `tensorrt`."""
        return self._runtime.name

    @property
    def device(self) -> str:
        """The device, `cpu` or `cuda:N`."""
        return self._runtime.device

    @property
    def max_batch_size(self) -> int | None:
        """Maximum number of images per run of the network; `None` if the batch size is dynamic."""
        return self._runtime.max_batch_size

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """Execution settings as names and values, such as ("CUDA graph", "on")."""
        return self._runtime.runtime_info

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class id."""
        return self.metadata.class_names

    @overload
    def __call__(
        self,
        image: ImageLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: ClassesLike | None = None,
        max_det: int | None = None,
    ) -> Detections: ...
    @overload
    def __call__(
        self,
        image: ImageList,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: ClassesLike | None = None,
        max_det: int | None = None,
    ) -> list[Detections]: ...
    @suggests_arguments
    def __call__(
        self,
        image: ImageLike | ImageList,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: ClassesLike | None = None,
        max_det: int | None = None,
    ) -> Detections | list[Detections]:
        """Detect the objects in one image, or in each image of a list, tuple or generator; see `batch`.

        An image is an array uint8 BGR [H, W, 3] (also grey, BGRA, uint16), a PIL image, a path, or the bytes of a file.
        An engine also accepts uint8 BGR [H, W, 3] arrays on its GPU (torch, cupy, pycuda, ...), without a copy, by
        DLPack or `__cuda_array_interface__`. It waits for the pending work of the stream that produces the array.

        Args:
            image: One image, or several.
            conf, iou, max_det: See `Thresholds`; for this call only.
            classes: Keep only these classes: ids, names, or a mix.

        Raises:
            ImageError: The image cannot be read, or its type, layout or order of channels is unknown; see `as_bgr`.
            UsageError: A threshold is invalid, or the Detector is closed.
        """
        if isinstance(image, list | tuple) or (isinstance(image, Iterator) and not hasattr(image, "read")):
            return self.batch(image, conf=conf, iou=iou, classes=classes, max_det=max_det)
        thresholds = self._override(self.thresholds, conf=conf, iou=iou, classes=classes, max_det=max_det)
        with self._calls.running():
            return self._detect([cast(ImageLike, image)], thresholds)[0][0]

    @suggests_arguments
    def batch(
        self,
        images: Iterable[ImageLike],
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: ClassesLike | None = None,
        max_det: int | None = None,
        on_error: OnError = "raise",
    ) -> list[Detections]:
        """Detect the objects in several images of any sizes; results are in the order of the images.

        Args:
            images: Any iterable of images, or an array [N, H, W, 3]. A generator is read while the network runs, so its
                images need not fit into memory together.
            conf, iou, classes, max_det: See `Detector`.
            on_error: `skip` gives an image that cannot be read empty Detections with the reason in `error`, and logs
                a warning; `raise` raises the error.

        Raises:
            ImageError, UsageError: See `__call__`; also if `images` is a single image.
        """
        check_on_error(on_error)
        thresholds = self._override(self.thresholds, conf=conf, iou=iou, classes=classes, max_det=max_det)
        iterator = _several(images)
        detections: list[Detections] = []
        with self._calls.running():
            while part := list(itertools.islice(iterator, self.max_batch_size or MAX_BATCH_SIZE)):
                if on_error == "skip":
                    detections += self._detect_readable(part, thresholds)
                else:
                    detections += self._detect(part, thresholds)[0]
        return detections

    def profile(self, images: Iterable[ImageLike]) -> tuple[list[Detections], TimingBreakdown]:
        """Run `batch` with all images in one batch, and measure its stages.

        On a GPU, measuring each stage separately takes longer than the same work without it: for benchmarks.
        """
        batch = list(_several(images))
        started = time.perf_counter()
        with self._calls.running():
            detections, result = self._detect(batch, self.thresholds, timed=True)
        total_ms = (time.perf_counter() - started) * 1e3
        timing = result.timing
        assert timing is not None, "a timed call measures its stages"
        other_ms = timing.upload_ms + timing.engine_ms + timing.download_ms + timing.postprocess_ms
        # Converting images and creating Detections is host work of this class; it counts as preprocessing.
        return detections, replace(timing, preprocess_ms=max(timing.preprocess_ms, total_ms - other_ms))

    def _detect(
        self, items: Sequence[ImageLike], thresholds: Thresholds, *, path: str = "", timed: bool = False
    ) -> tuple[list[Detections], RuntimeResult]:
        """Detect the objects in one batch; `path` is the origin of arrays."""
        images = [self._load(item) for item in items]
        letterboxes = [self._fit(_hw(image)) for image in images]
        result = self._run(images, letterboxes, thresholds, timed=timed)
        paths = [os.fspath(item) if _is_path(item) else path for item in items]
        return self._to_detections(result, letterboxes, paths), result

    def _fit(self, image_hw: tuple[int, int]) -> Letterbox:
        if self.rect:
            return fit_rect_letterbox(image_hw, self.input_hw, stride=self.metadata.stride)
        return fit_letterbox(image_hw, self.input_hw)

    def _detect_readable(self, items: Sequence[ImageLike], thresholds: Thresholds) -> list[Detections]:
        """Detect the objects in a batch; images that cannot be read get empty Detections."""
        found: dict[int, Detections] = {}
        loaded: dict[int, Image] = {}
        for index, item in enumerate(items):
            try:
                loaded[index] = self._load(item)
            except ImageError as error:
                logger.warning("skipped: %s", error.message)
                found[index] = self._without_image(os.fspath(item) if _is_path(item) else "", error.message)
        paths = [os.fspath(item) if _is_path(item) else "" for item in map(items.__getitem__, loaded)]
        detections, _ = self._detect(list(loaded.values()), thresholds)
        for index, path, result in zip(loaded, paths, detections, strict=True):
            found[index] = replace(result, path=path)
        return [found[index] for index in range(len(items))]

    def _without_image(self, path: str, error: str) -> Detections:
        boxes, scores = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.float32)
        return Detections(
            boxes=boxes,
            scores=scores,
            class_ids=scores.astype(np.int64),
            class_names=self.class_names,
            image_hw=(0, 0),
            path=path,
            error=error,
        )

    def _load(self, item: ImageLike) -> Image:
        if _is_path(item):
            return read_image(item)
        if not is_gpu_array(item):
            return as_bgr(item)
        if not self._runtime.takes_gpu_arrays:
            raise UsageError(
                f"{self.path.name} needs images in host memory here; this {type(item).__name__} is on a GPU.",
                fix="Pass image.cpu().numpy() (cupy, pycuda: image.get()); engines accept it after  y7 plugin",
            )
        return cast(Image, item)  # the runtime reads it on the GPU

    @suggests_arguments
    def stream(
        self,
        source: SourceLike | Iterator[OneSource],
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: ClassesLike | None = None,
        max_det: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[tuple[Frame, Detections]]:
        """Yield the frames of a folder, glob, list, generator, video, camera or URL with their detections.

        A live stream yields its newest frame each time; `frame.dropped` counts the skipped ones.

        Args:
            source: See `yolov7_deploy.sources.open_source`; also an iterator of sources, which may be infinite.
            conf, iou, classes, max_det: See `Detector`.
            on_error: `skip` leaves out images and videos that cannot be read, and logs a warning for each.

        Raises:
            SourceError: There is nothing to read, or the stream ended and could not be reopened.
            ImageError: An image cannot be read.
        """
        check_on_error(on_error)
        thresholds = self._override(self.thresholds, conf=conf, iou=iou, classes=classes, max_det=max_det)
        self._calls.check_open()
        for frame in _read_frames(source, on_error):
            with self._calls.running():
                detections, _ = self._detect([frame.image], thresholds, path=frame.path)
            yield frame, detections[0]

    @suggests_arguments
    def streams(
        self,
        sources: Sequence[SourceLike] | StreamSources,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: ClassesLike | None = None,
        max_det: int | None = None,
        batch: int | None = None,
        max_age_s: float = MAX_AGE_S,
        realtime: bool = False,
        reconnects: int = 5,
        on_error: OnError = "raise",
        on_event: Callable[[StreamEvent], None] | None = None,
    ) -> Streams:
        """Detect in several cameras, videos and folders at the same time; their frames share batches.

        Each source is read in a thread. A batch has at most one frame of each: the newest of a camera, and the next
        of a file, whose frames are never dropped. If there are more streams than frames in a batch, those that waited
        longest come first. While the caller works on the results of a batch, the next one runs.

        A lost camera is opened again, with waits from 1 to 30 seconds, for as long as another stream has frames.

        Args:
            sources: See `open_source`; the files of one source are one stream.
            conf, iou, classes, max_det: See `Detector`.
            batch: Maximum number of frames in a batch; by default what the model takes, at most 32. It has fewer if
                they are expected to take longer than half of `max_age_s`.
            max_age_s: Frames of cameras that are older when their batch starts are not used.
            realtime: Play videos at their frame rate, as cameras: frames may be dropped.
            reconnects: Number of consecutive failed attempts to open a camera after which the iteration ends with an
                error, if no other stream has frames.
            on_error: `skip` leaves out images and videos that cannot be read; see `StreamCounters.skipped`.
            on_event: Called when a stream begins, is lost, or ends.

        Returns:
            An iterator of (`StreamFrame`, `Detections`), with counters of each stream.

        Raises:
            SourceError: A file does not exist; while iterating, no camera is left, or a file cannot be read.
            UsageError: `sources` is a single source, or `batch` is more than the model takes.
        """
        thresholds = self._override(self.thresholds, conf=conf, iou=iou, classes=classes, max_det=max_det)
        self._calls.check_open()
        found = sources if isinstance(sources, StreamSources) else resolve_streams(sources, on_error=on_error)
        return Streams(
            found,
            functools.partial(self._detect_frames, thresholds),
            options=StreamOptions(realtime=realtime, reconnects=reconnects),
            max_batch=self._check_batch(batch, streams=len(found.streams)),
            max_age_s=max_age_s,
            on_event=on_event,
        )

    def _check_batch(self, batch: int | None, *, streams: int) -> int:
        """Return the maximum number of frames in a batch; a model that takes one image at a time is logged.

        Raises:
            UsageError: The model does not take that many.
        """
        limit, fix = self.max_batch_size, "y7 export --weights WEIGHTS.pt --dynamic-batch"
        if limit is not None and batch is not None and batch > limit:
            raise UsageError(
                f"{self.path.name} has a fixed batch size of {limit}, less than --batch {batch}.",
                fix=f"Leave --batch out, or export it again:  {fix}",
            )
        if limit == 1 and streams > 1:
            logger.warning(
                "%s has a fixed batch size of 1: the frames of %d streams run one after the other. For batches:  %s",
                *(self.path.name, streams, fix),
            )
        return batch if batch is not None else limit or MAX_BATCH_SIZE

    def _detect_frames(self, thresholds: Thresholds, frames: Sequence[Frame]) -> list[Detections]:
        with self._calls.running():
            detections, _ = self._detect([frame.image for frame in frames], thresholds)
        return [replace(found, path=frame.path) for frame, found in zip(frames, detections, strict=True)]

    @suggests_arguments
    def submit(
        self,
        image: ImageLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: ClassesLike | None = None,
        max_det: int | None = None,
    ) -> Future[Detections]:
        """Detect in a background thread; the future holds the Detections or the error.

        Raises:
            UsageError: The Detector is closed, or Python exits.
        """
        return self._calls.submit(self._detect_one, image, conf=conf, iou=iou, classes=classes, max_det=max_det)

    def _detect_one(self, image: ImageLike, **changes: Any) -> Detections:  # noqa: ANN401 - fields of Thresholds
        return self._detect([image], self._override(self.thresholds, **changes))[0][0]

    def infer(
        self, images: Sequence[Image], letterboxes: Sequence[Letterbox], thresholds: Thresholds
    ) -> list[Detections]:
        """Detect with given letterboxes; images are contiguous uint8 BGR [H, W, 3]."""
        with self._calls.running():
            result = self._run(images, letterboxes, thresholds, timed=False)
        return self._to_detections(result, letterboxes, paths=[""] * len(images))

    def _run(
        self, images: Sequence[Image], letterboxes: Sequence[Letterbox], thresholds: Thresholds, *, timed: bool
    ) -> RuntimeResult:
        """Run the network on each group of images with one canvas size; results are in the order of the images."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, letterbox in enumerate(letterboxes):
            groups.setdefault(letterbox.canvas_hw, []).append(index)
        if len(groups) < 2:
            return self._runtime.infer(images, letterboxes, thresholds, timed=timed) if images else EMPTY_RESULT
        parts = [
            self._runtime.infer([images[i] for i in group], [letterboxes[i] for i in group], thresholds, timed=timed)
            for group in groups.values()
        ]
        return join_results(parts, list(groups.values()))

    def _to_detections(
        self, result: RuntimeResult, letterboxes: Sequence[Letterbox], paths: Sequence[str]
    ) -> list[Detections]:
        count = max(len(letterboxes), 1)
        speed = Speed(
            preprocess_ms=result.preprocess_ms / count,
            inference_ms=result.inference_ms / count,
            postprocess_ms=result.postprocess_ms / count,
        )
        return [
            Detections(
                boxes=letterbox.undo(raw.boxes),
                scores=raw.scores,
                class_ids=raw.class_ids,
                class_names=self.metadata.class_names,
                image_hw=letterbox.source_hw,
                path=path,
                speed=speed,
            )
            for raw, letterbox, path in zip(result.detections, letterboxes, paths, strict=True)
        ]

    def warmup(self, runs: int = 2) -> None:
        """Run a grey image a few times: the first calls on a device are slow."""
        grey = np.full((*self.input_hw, 3), PAD_GREY, dtype=np.uint8)
        for _ in range(runs):
            self(grey)

    def close(self) -> None:
        """Refuse further calls, cancel `submit` calls that have not started, wait for the others, and free the model.

        Calling it twice is fine, also in a callback of a future: a call never waits for itself.
        """
        if self._calls.close():
            self._runtime.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _override(self, thresholds: Thresholds, **changes: Any) -> Thresholds:  # noqa: ANN401 - fields of Thresholds
        given = {name: value for name, value in changes.items() if value is not None}
        if "classes" in given:
            given["classes"] = find_classes(given["classes"], self.metadata.class_names)
        changed = replace(thresholds, **given) if given else thresholds
        return replace(changed, max_det=self._limit_max_det(changed.max_det)) if "max_det" in given else changed

    def _limit_max_det(self, max_det: int) -> int:
        """Return the number of detections that a file with NMS inside can give; a lower one is logged once."""
        limit = max_det if self.metadata.nms is None else self.metadata.nms.max_det
        if max_det > limit and not self._warned_max_det:
            self._warned_max_det = True
            logger.warning(
                "%s gives at most %d detections per image, not %d. For more, export it again with %s.",
                *(self.path.name, limit, max_det, f"max-det {max_det}" if max_det <= TOPK_LIMIT else "nms none"),
            )
        return min(max_det, limit)


def _default_thresholds(metadata: ModelMetadata) -> Thresholds:
    """Return the thresholds of the NMS inside the file, or the official ones without it.

    A file of another exporter (without strides) may return rows down to a score of 0; it gets the official ones, too.
    """
    official = Thresholds()
    if metadata.nms is None:
        return official
    own = file_thresholds(metadata.nms)
    if metadata.strides:
        return own
    return replace(own, conf=max(own.conf, official.conf), max_det=min(own.max_det, official.max_det))


def _read_frames(source: SourceLike | Iterator[OneSource], on_error: OnError) -> Iterator[Frame]:
    if isinstance(source, Iterator) and not hasattr(source, "read"):
        yield from read_each(source, on_error=on_error)
        return
    with open_source(cast(SourceLike, source), on_error=on_error) as frames:
        try:
            yield from frames
        finally:
            for item in frames.skipped:
                logger.warning("skipped %s: %s", item.path, item.reason)


def _hw(image: Image) -> tuple[int, int]:
    return gpu_hw(image) if is_gpu_array(image) else (image.shape[0], image.shape[1])


def _is_path(item: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(item, str | os.PathLike)


def _several(images: Iterable[ImageLike]) -> Iterator[ImageLike]:
    """Return an iterator over images.

    Raises:
        UsageError: It is a single image or path, whose rows or characters would be taken for images.
    """
    shape: Sequence[int] | None = getattr(images, "shape", None)
    is_one = _is_path(images) or is_pil_image(images) or isinstance(images, ImageBytes | Mapping)
    if not is_one and isinstance(images, Iterable) and (shape is None or len(shape) not in (0, 2, 3)):
        return iter(images)
    described = type(images).__name__ + (f" {tuple(shape)}" if shape is not None else "")
    raise UsageError(
        f"batch needs several images, such as a list; this is a single {described}.",
        fix="For one image call detector(image), or detector.batch([image]).",
    )


def _weights_path(weights: object) -> str | Path:
    if isinstance(weights, str):
        return weights
    if isinstance(weights, os.PathLike) and isinstance(weights.__fspath__(), str):
        return Path(weights)
    raise UsageError(
        f"weights must be a path or an official name, not a {type(weights).__name__}.",
        fix="For example: Detector('yolov7.onnx')",
    )


def _device_name(device: object) -> str:
    """Return the name of a device given by name, by number, or as a torch.device."""
    if isinstance(device, Integral) and not isinstance(device, bool):
        return str(int(device))
    if isinstance(device, str) or type(device).__module__ == "torch":
        return str(device)
    raise UsageError(
        f"device must be a name or the number of a GPU, not {device!r}.",
        fix="For example: device='cuda:0', device=0 or device='cpu'",
    )
