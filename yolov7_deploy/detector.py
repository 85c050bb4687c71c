"""Detector: images in, Detections out, whatever is under the floor."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from yolov7_deploy.detections import Detections, Speed
from yolov7_deploy.errors import UsageError
from yolov7_deploy.hub import find_weights
from yolov7_deploy.image import PAD_GREY, Image, Letterbox, as_bgr, fit_letterbox, read_image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.base import RawDetections, RuntimeResult, TimingBreakdown, open_backend
from yolov7_deploy.runtimes.device_arrays import GpuArray, gpu_hw, is_gpu_array
from yolov7_deploy.sources import Frame, SourceLike, open_source

logger = logging.getLogger(__name__)

ImageLike = npt.NDArray[Any] | GpuArray | str | Path
LARGEST_BATCH = 32  # images that enter a network of open batch size at once, as many as in the paper's batch timings
EMPTY_RESULT = RuntimeResult(
    found=[],
    preprocess_ms=0,
    inference_ms=0,
    postprocess_ms=0,
    spans=TimingBreakdown(preprocess_ms=0, upload_ms=0, engine_ms=0, download_ms=0, postprocess_ms=0),
)
SUBMIT_THREADS = 4  # two calls in the network, one being prepared and one being read: 1.14 x two threads on two cores


class Detector:
    """Finds objects in images with a `.pt`, `.safetensors`, `.onnx` or `.engine` file.

    Usable from several threads at once. Thresholds left out are those of the file, where NMS is inside it,
    else the official ones (`Thresholds`); each call may override them.

    Args:
        weights: A file, or an official name such as `yolov7-tiny`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        img: Input side, or (height, width); the file's own, else the paper's size.
        half: Half precision for checkpoints: the default on a GPU, as in the official program, and not on a CPU. Files
            with a precision of their own refuse another one.
        conf, iou, max_det, classes, multi_label, class_agnostic: See `Thresholds`.

    Raises:
        LoadError: The file is absent, broken or of an unknown kind.
        MissingLibraryError: What runs this kind of file is not installed.
        DeviceError: There is no such device.
        UsageError: Options that contradict the file.

    Example:
        >>> with Detector("yolov7.onnx") as detector:
        ...     detections = detector("street.jpg", conf=0.4)
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        device: str = "auto",
        img: int | tuple[int, int] | None = None,
        half: bool | None = None,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Sequence[int] | None = None,
        multi_label: bool | None = None,
        class_agnostic: bool | None = None,
    ) -> None:
        started = time.perf_counter()
        self.path = find_weights(weights)
        wanted_hw = (img, img) if isinstance(img, int) else img
        self._backend = open_backend(self.path, device=device, input_hw=wanted_hw, half=half)
        self.metadata: ModelMetadata = self._backend.metadata
        self.input_hw: tuple[int, int] = wanted_hw or self.metadata.default_hw
        self.thresholds = self._changed(
            _own_thresholds(self.metadata),
            conf=conf,
            iou=iou,
            max_det=max_det,
            classes=tuple(classes) if classes is not None else None,
            multi_label=multi_label,
            class_agnostic=class_agnostic,
        )
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        self._closed = False
        logger.info("%s opened on %s in %.2f s", self.path, self.device, time.perf_counter() - started)

    @property
    def device(self) -> str:
        """Where it runs, `cpu` or `cuda:N`."""
        return self._backend.device

    @property
    def max_batch_size(self) -> int | None:
        """Most images that can enter the network at once; `None` where the file leaves it open."""
        return self._backend.max_batch_size

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """How it runs, in words, such as ("CUDA graph", "on")."""
        return self._backend.runtime_info

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class id."""
        return self.metadata.class_names

    def __call__(
        self,
        image: ImageLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> Detections:
        """The objects in one image: uint8 BGR [H, W, 3] (also grey, BGRA, uint16), or a path.

        An engine takes uint8 BGR [H, W, 3] arrays on its GPU too (torch, cupy, pycuda, ...), without a copy: by DLPack
        or `__cuda_array_interface__`, after what their library's stream has still to do.
        """
        return self.batch([image], conf=conf, iou=iou, classes=classes, max_det=max_det)[0]

    def batch(
        self,
        images: Sequence[ImageLike],
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> list[Detections]:
        """The objects in several images of any sizes, in their order; an empty list gives an empty list."""
        thresholds = self._changed(
            self.thresholds,
            conf=conf,
            iou=iou,
            classes=tuple(classes) if classes is not None else None,
            max_det=max_det,
        )
        size = self.max_batch_size or LARGEST_BATCH
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        return [found for part in parts for found in self._at_once(part, thresholds, timed=False)[0]]

    def profile(self, images: Sequence[ImageLike]) -> tuple[list[Detections], TimingBreakdown]:
        """Like `batch` with all images entering the network together, and where the time of the call went.

        Every span is measured by itself, which on a GPU takes longer than the same work in one go: for benchmarks.
        """
        self._check_open()
        started = time.perf_counter()
        detections, outputs = self._at_once(images, self.thresholds, timed=True)
        total_ms = (time.perf_counter() - started) * 1e3
        spans = outputs.spans
        assert spans is not None, "a backend that was asked to measure its spans"
        inside = spans.upload_ms + spans.engine_ms + spans.download_ms + spans.postprocess_ms
        # Converting images, geometry and results is host work of this class; it counts as preparation.
        return detections, replace(spans, preprocess_ms=max(spans.preprocess_ms, total_ms - inside))

    def _at_once(
        self, items: Sequence[ImageLike], thresholds: Thresholds, *, timed: bool
    ) -> tuple[list[Detections], RuntimeResult]:
        images = [self._image(item) for item in items]
        letterboxes = [fit_letterbox(_hw(image), self.input_hw) for image in images]
        found, outputs = self._infer(images, letterboxes, thresholds, timed=timed)
        paths = [str(item) if isinstance(item, str | Path) else "" for item in items]
        return [replace(one, path=path) for one, path in zip(found, paths, strict=True)], outputs

    def _image(self, item: ImageLike) -> Image:
        if isinstance(item, str | Path):
            return read_image(item)
        if not is_gpu_array(item):
            return as_bgr(item)
        if not self._backend.takes_gpu_arrays:
            raise UsageError(
                f"{self.path.name} takes images in main memory here; this {type(item).__name__} is on a GPU.",
                fix="Pass image.cpu().numpy() (cupy, pycuda: image.get()); engines take it where  y7 plugin  has run.",
            )
        return cast(Image, item)  # for the backend, which knows

    def stream(
        self,
        source: SourceLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> Iterator[tuple[Frame, Detections]]:
        """Frames of a folder, glob, list, video, camera or URL with what is in them, as they come.

        A live stream gives its freshest frame each time; `frame.dropped` counts those it skipped.

        Raises:
            SourceError: There is nothing to read, or the stream is lost for good.
        """
        with open_source(source) as frames:
            for frame in frames:
                found = self(frame.image, conf=conf, iou=iou, classes=classes, max_det=max_det)
                yield frame, replace(found, path=frame.path)

    def submit(
        self,
        image: ImageLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> Future[Detections]:
        """Like a call, but returns at once; the future holds the Detections or the error."""
        self._check_open()
        with self._pool_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="yolov7-deploy")
            return self._pool.submit(self, image, conf=conf, iou=iou, classes=classes, max_det=max_det)

    def infer(
        self, images: Sequence[Image], letterboxes: Sequence[Letterbox], thresholds: Thresholds
    ) -> list[Detections]:
        """The layer below: contiguous uint8 BGR images with a placement each, all of one canvas size."""
        return self._infer(images, letterboxes, thresholds, timed=False)[0]

    def _infer(
        self, images: Sequence[Image], letterboxes: Sequence[Letterbox], thresholds: Thresholds, *, timed: bool
    ) -> tuple[list[Detections], RuntimeResult]:
        self._check_open()
        if not images:
            return [], EMPTY_RESULT
        outputs = self._backend.infer(images, letterboxes, thresholds, timed=timed)
        count = len(images)
        speed = Speed(
            preprocess_ms=outputs.preprocess_ms / count,
            inference_ms=outputs.inference_ms / count,
            postprocess_ms=outputs.postprocess_ms / count,
        )
        return [self._detections(*pair, speed) for pair in zip(outputs.found, letterboxes, strict=True)], outputs

    def warmup(self, runs: int = 2) -> None:
        """Runs a grey image through, so that the first real one is not the slow one."""
        grey = np.full((*self.input_hw, 3), PAD_GREY, dtype=np.uint8)
        for _ in range(runs):
            self(grey)

    def close(self) -> None:
        """Waits for submitted images and frees the model when the last call is out; calling it twice is fine."""
        self._closed = True
        with self._pool_lock:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
        self._backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _detections(self, found: RawDetections, letterbox: Letterbox, speed: Speed) -> Detections:
        return Detections(
            boxes=letterbox.undo(found.boxes),
            scores=found.scores,
            class_ids=found.class_ids,
            class_names=self.metadata.class_names,
            image_hw=letterbox.source_hw,
            speed=speed,
        )

    def _changed(self, thresholds: Thresholds, **changes: Any) -> Thresholds:  # noqa: ANN401 - fields of Thresholds
        given = {name: value for name, value in changes.items() if value is not None}
        classes = given.get("classes") or ()
        unknown = [c for c in classes if not 0 <= c < len(self.metadata.class_names)]
        if unknown:
            raise UsageError(
                f"Class id {unknown[0]} does not exist; the model has {len(self.metadata.class_names)} classes.",
                fix=f"Use ids from 0 to {len(self.metadata.class_names) - 1}.",
            )
        return replace(thresholds, **given) if given else thresholds

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("This Detector is closed.", fix="Open a new one, or keep it open longer.")


def _own_thresholds(metadata: ModelMetadata) -> Thresholds:
    """Those inside the file, else the official ones."""
    if metadata.nms is None:
        return Thresholds()
    nms = metadata.nms
    return Thresholds(
        conf=nms.conf,
        iou=nms.iou,
        max_det=nms.max_det,
        multi_label=nms.multi_label,
        class_agnostic=nms.class_agnostic,
    )


def _hw(image: Image) -> tuple[int, int]:
    return gpu_hw(image) if is_gpu_array(image) else (image.shape[0], image.shape[1])
