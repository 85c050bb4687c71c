"""The seam under the Detector: uint8 images plus geometry go down, boxes in network pixels come up.

Geometry belongs to the Detector, pixels to the backend: on a CPU the letterbox is OpenCV's, on a GPU a kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import LoadError, UsageError, missing_library
from yolov7_deploy.image import FloatArray, Image, Letterbox
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Thresholds

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDetections:
    """Detections of one image in network-input pixels, best score first.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        scores: float32 [N].
        class_ids: int64 [N].
    """

    boxes: FloatArray
    scores: FloatArray
    class_ids: IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingBreakdown:
    """Milliseconds of one call, by where they went; a span that does not exist is 0 (nothing is uploaded on a CPU).

    Attributes:
        preprocess_ms: Letterbox and layout, on the host or on the GPU.
        upload_ms: To the GPU, staging in page-locked memory included.
        engine_ms: The network, with NMS where that is inside the file.
        download_ms: From the GPU.
        postprocess_ms: NMS outside the file, and making the results.
    """

    preprocess_ms: float
    upload_ms: float
    engine_ms: float
    download_ms: float
    postprocess_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeResult:
    """What a backend gives for a list of images: one `RawDetections` each, and where the time went (whole call).

    `inference_ms` is everything between the prepared input and the raw results. `spans` tells the parts where the
    call was `timed`.
    """

    found: list[RawDetections]
    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float
    spans: TimingBreakdown | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class IntermediateOutputs:
    """What happens to one canvas on the way to its detections, as far as a file shows it.

    Attributes:
        heads: Raw head maps float32 [3 * (5 + C), H, W], fine to coarse; empty where they cannot be seen.
        decoded: float32 [A, 5 + C]: cx, cy, w, h, objectness, classes; `None` where NMS follows at once.
    """

    heads: list[FloatArray]
    decoded: FloatArray | None


class Backend(Protocol):
    """A model that runs. `infer` may be called from several threads at once.

    Attributes:
        info: The model's metadata.
        device: Where it runs, `cpu` or `cuda:N`.
        largest_batch: Most images that enter the network at once, `None` where any number may; more are run in parts.
        takes_gpu_arrays: Images may be arrays on the GPU (`yolov7_deploy.runtimes.device_arrays`).
    """

    metadata: ModelMetadata
    device: str
    max_batch_size: int | None
    takes_gpu_arrays: bool

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """What a benchmark must say of how it runs, such as ("CUDA graph", "on"); calls may change it."""
        ...

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """Images (contiguous uint8 BGR) through letterbox, network and NMS; all canvases are of one size.

        Args:
            images: As many as there are letterboxes.
            letterboxes: Where each lands on the canvas.
            thresholds: What is kept.
            timed: Measure every span by itself, which waits for the GPU between them: for benchmarks.
        """
        ...

    def close(self) -> None:
        """Frees what the backend holds; calling it twice is fine."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendRow:
    """One row of the table: which files it opens, and where it lives."""

    name: str
    suffixes: tuple[str, ...]
    module: str
    attribute: str


BACKENDS = (
    BackendRow(
        name="pytorch",
        suffixes=(".pt", ".pth", ".safetensors"),
        module="yolov7_deploy.runtimes.pytorch",
        attribute="PytorchBackend",
    ),
    BackendRow(
        name="onnxruntime",
        suffixes=(".onnx",),
        module="yolov7_deploy.runtimes.onnxruntime",
        attribute="OrtBackend",
    ),
    BackendRow(
        name="tensorrt",
        suffixes=(".engine", ".plan", ".trt"),
        module="yolov7_deploy.runtimes.tensorrt",
        attribute="TrtBackend",
    ),
)


def backend_row(path: Path) -> BackendRow:
    """The backend that opens files with this suffix.

    Raises:
        LoadError: No backend does.
    """
    for row in BACKENDS:
        if path.suffix.lower() in row.suffixes:
            return row
    known = ", ".join(suffix for row in BACKENDS for suffix in row.suffixes)
    raise LoadError(f"{path} has no suffix a backend opens ({known}).", fix="Rename the file, or export it again.")


def open_backend(path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None) -> Backend:
    """The model in `path`, ready to run on `device` (`auto`, `cpu`, `cuda`, `cuda:0`).

    `half` asks for half precision or against it; left out, it is the backend's choice. Files with a precision of
    their own (`.onnx`, `.engine`) refuse another one.

    Raises:
        LoadError: The file is absent or broken.
        MissingLibraryError: The library for this kind of file is not installed.
        DeviceError: The machine or the library has no such device.
    """
    row = backend_row(path)
    if not path.exists():
        raise LoadError(f"{path} does not exist.", fix="Check the path, or export it:  y7 export --weights yolov7")
    try:
        module = importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        raise missing_library(error, f"to run {path.name}") from error
    backend = getattr(module, row.attribute)
    return cast(Backend, backend.open(path, device=device, input_hw=input_hw, half=half))


def check_request_supported(
    path: Path, metadata: ModelMetadata, *, input_hw: tuple[int, int] | None, half: bool | None, export: str = ""
) -> None:
    """Refuses another size or precision than a file has in it.

    Args:
        path: The file.
        info: Its metadata.
        input_hw: The size asked for, if any.
        half: The precision asked for, if any.
        export: What `y7 export` needs more to make such a file.

    Raises:
        UsageError: It names both and the command for the other one.
    """
    if input_hw is not None and metadata.input_hw is not None and input_hw != metadata.input_hw:
        have, want = metadata.input_hw, input_hw
        raise UsageError(
            f"{path} has a fixed input of {have[0]}x{have[1]}, not {want[0]}x{want[1]}.",
            fix=f"y7 export --weights WEIGHTS.pt --img {want[0]},{want[1]} {export}".rstrip(),
        )
    if half is not None and half != (metadata.precision == "fp16"):
        raise UsageError(
            f"{path} is {metadata.precision}; its precision is in the file.",
            fix=f"y7 export --weights WEIGHTS.pt --precision {'fp16' if half else 'fp32'} {export}".rstrip(),
        )
