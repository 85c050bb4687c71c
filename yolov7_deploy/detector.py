"""Detector: images in, Detections out, with the same results on every runtime."""

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
from yolov7_deploy.runtimes.base import RuntimeResult, TimingBreakdown, open_runtime, split_batches
from yolov7_deploy.runtimes.device_arrays import GpuArray, gpu_hw, is_gpu_array
from yolov7_deploy.sources import Frame, SourceLike, open_source

logger = logging.getLogger(__name__)

ImageLike = npt.NDArray[Any] | GpuArray | str | Path
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

    Args:
        weights: A file, or an official name such as `yolov7-tiny`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        img: Image size (one number for a square) or (height, width). The default is the fixed size of the file, else
            the paper's size.
        half: FP16 for checkpoints: by default on a GPU, as in the official program, and not on a CPU. Files with a
            fixed precision refuse any other.
        conf, iou, max_det, classes, multi_label, class_agnostic: See `Thresholds`.

    Raises:
        LoadError: The file is missing, broken or of an unknown kind.
        MissingLibraryError: The library that runs this kind of file is not installed.
        DeviceError: There is no such device.
        UsageError: An option contradicts the file.

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
        requested_hw = (img, img) if isinstance(img, int) else img
        self._runtime = open_runtime(self.path, device=device, input_hw=requested_hw, half=half)
        self.metadata: ModelMetadata = self._runtime.metadata
        self.input_hw: tuple[int, int] = requested_hw or self.metadata.default_hw
        self.thresholds = self._override(
            _default_thresholds(self.metadata),
            conf=conf,
            iou=iou,
            max_det=max_det,
            classes=classes,
            multi_label=multi_label,
            class_agnostic=class_agnostic,
        )
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        self._closed = False
        logger.info("%s opened on %s in %.2f s", self.path, self.device, time.perf_counter() - started)

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

    def __call__(
        self,
        image: ImageLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> Detections:
        """Detect the objects in one image: an array uint8 BGR [H, W, 3] (also grey, BGRA, uint16), or a path.

        An engine also accepts uint8 BGR [H, W, 3] arrays on its GPU (torch, cupy, pycuda, ...), without a copy, by
        DLPack or `__cuda_array_interface__`. It waits for the pending work of the stream that produces the array.
        """
        thresholds = self._override(self.thresholds, conf=conf, iou=iou, classes=classes, max_det=max_det)
        return self._detect([image], thresholds, paths=[_path(image)])[0][0]

    def batch(
        self,
        images: Sequence[ImageLike],
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> list[Detections]:
        """Detect the objects in several images of any sizes; results are in the order of the images."""
        thresholds = self._override(self.thresholds, conf=conf, iou=iou, classes=classes, max_det=max_det)
        detections: list[Detections] = []
        for part in split_batches(images, self.max_batch_size or MAX_BATCH_SIZE):
            detections += self._detect(part, thresholds, paths=[_path(image) for image in part])[0]
        return detections

    def profile(self, images: Sequence[ImageLike]) -> tuple[list[Detections], TimingBreakdown]:
        """Run `batch` with all images in one batch, and measure its stages.

        On a GPU, measuring each stage separately takes longer than the same work without it: for benchmarks.
        """
        self._check_open()
        started = time.perf_counter()
        paths = [_path(image) for image in images]
        detections, result = self._detect(images, self.thresholds, paths=paths, timed=True)
        total_ms = (time.perf_counter() - started) * 1e3
        timing = result.timing
        assert timing is not None, "a timed call measures its stages"
        other_ms = timing.upload_ms + timing.engine_ms + timing.download_ms + timing.postprocess_ms
        # Converting images and creating Detections is host work of this class; it counts as preprocessing.
        return detections, replace(timing, preprocess_ms=max(timing.preprocess_ms, total_ms - other_ms))

    def _detect(
        self, items: Sequence[ImageLike], thresholds: Thresholds, *, paths: Sequence[str], timed: bool = False
    ) -> tuple[list[Detections], RuntimeResult]:
        """Detect the objects in one batch."""
        images = [self._load(item) for item in items]
        letterboxes = [fit_letterbox(_hw(image), self.input_hw) for image in images]
        result = self._run(images, letterboxes, thresholds, timed=timed)
        return self._to_detections(result, letterboxes, paths), result

    def _load(self, item: ImageLike) -> Image:
        if isinstance(item, str | Path):
            return read_image(item)
        if not is_gpu_array(item):
            return as_bgr(item)
        if not self._runtime.takes_gpu_arrays:
            raise UsageError(
                f"{self.path.name} needs images in host memory here; this {type(item).__name__} is on a GPU.",
                fix="Pass image.cpu().numpy() (cupy, pycuda: image.get()); engines accept it after  y7 plugin",
            )
        return cast(Image, item)  # the runtime reads it on the GPU

    def stream(
        self,
        source: SourceLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> Iterator[tuple[Frame, Detections]]:
        """Yield the frames of a folder, glob, list, video, camera or URL with their detections.

        A live stream yields its newest frame each time; `frame.dropped` counts the skipped ones.

        Raises:
            SourceError: There is nothing to read, or the stream ended and could not be reopened.
        """
        thresholds = self._override(self.thresholds, conf=conf, iou=iou, classes=classes, max_det=max_det)
        with open_source(source) as frames:
            for frame in frames:
                detections, _ = self._detect([frame.image], thresholds, paths=[frame.path])
                yield frame, detections[0]

    def submit(
        self,
        image: ImageLike,
        *,
        conf: float | None = None,
        iou: float | None = None,
        classes: Sequence[int] | None = None,
        max_det: int | None = None,
    ) -> Future[Detections]:
        """Detect in a background thread; the future holds the Detections or the error."""
        self._check_open()
        with self._pool_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="yolov7-deploy")
            return self._pool.submit(self, image, conf=conf, iou=iou, classes=classes, max_det=max_det)

    def infer(
        self, images: Sequence[Image], letterboxes: Sequence[Letterbox], thresholds: Thresholds
    ) -> list[Detections]:
        """Detect with given letterboxes, all of one canvas size; images are contiguous uint8 BGR [H, W, 3]."""
        result = self._run(images, letterboxes, thresholds, timed=False)
        return self._to_detections(result, letterboxes, paths=[""] * len(images))

    def _run(
        self, images: Sequence[Image], letterboxes: Sequence[Letterbox], thresholds: Thresholds, *, timed: bool
    ) -> RuntimeResult:
        self._check_open()
        return self._runtime.infer(images, letterboxes, thresholds, timed=timed) if images else EMPTY_RESULT

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
        """Wait for the running calls, cancel pending `submit` calls, and free the model; calling it twice is fine."""
        self._closed = True
        with self._pool_lock:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
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
            given["classes"] = tuple(given["classes"])
        unknown = [c for c in given.get("classes", ()) if not 0 <= c < len(self.metadata.class_names)]
        if unknown:
            raise UsageError(
                f"Class id {unknown[0]} does not exist; the model has {len(self.metadata.class_names)} classes.",
                fix=f"Use ids from 0 to {len(self.metadata.class_names) - 1}.",
            )
        return replace(thresholds, **given) if given else thresholds

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("This Detector is closed.", fix="Open a new one, or keep it open longer.")


def _default_thresholds(metadata: ModelMetadata) -> Thresholds:
    """Return the thresholds of the NMS inside the file, or the official ones without it."""
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


def _path(item: ImageLike) -> str:
    return str(item) if isinstance(item, str | Path) else ""
