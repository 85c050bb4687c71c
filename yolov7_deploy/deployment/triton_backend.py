"""The model of Triton's Python backend: image files go in, boxes in their pixels come out.

Triton imports `TritonPythonModel` from the `model.py` of the repository, and calls `execute` with the requests of one
batch. It provides the module `triton_python_backend_utils` (README.md of github.com/triton-inference-server/
python_backend).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as triton

from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.metadata import NMS_OUTPUTS

IMAGE_INPUT = "image"
Arrays = tuple[npt.NDArray[Any], ...]


class TritonPythonModel:
    """A Detector that answers batches of requests; Triton requires this name and these methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model of the repository on the device of this instance.

        Args:
            args: Triton's description of the instance: `model_config` as JSON, `model_repository` (the model's folder),
                `model_version`, `model_instance_kind` (`CPU` or `GPU`) and `model_instance_device_id`.
        """
        entries = json.loads(args["model_config"])["parameters"]
        parameters = {name: entry["string_value"] for name, entry in entries.items()}
        is_gpu = args["model_instance_kind"] == "GPU"
        self._detector = Detector(
            Path(args["model_repository"]) / args["model_version"] / parameters["weights"],
            device=f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu",
            conf=float(parameters["conf"]),
            iou=float(parameters["iou"]),
            max_det=int(parameters["max_det"]),
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, each with one or several images; all images run together.

        A request with an image that cannot be decoded gets an error, which names the image by its position.
        """
        images = [_images(request) for request in requests]
        detections = iter(self._detector.batch([image for part in images for image in part], on_error="skip"))
        return [self._respond([next(detections) for _ in part]) for part in images]

    def finalize(self) -> None:
        """Free the model."""
        self._detector.close()

    def _respond(self, detections: Sequence[Detections]) -> Any:  # noqa: ANN401 - an InferenceResponse
        reasons = [f"image {index}: {found.error}" for index, found in enumerate(detections) if found.error]
        if reasons:
            return triton.InferenceResponse(error=triton.TritonError("; ".join(reasons)))
        arrays = to_arrays(detections, self._detector.thresholds.max_det)
        return triton.InferenceResponse(
            output_tensors=[triton.Tensor(name, array) for name, array in zip(NMS_OUTPUTS, arrays, strict=True)]
        )


def to_arrays(detections: Sequence[Detections], max_det: int) -> Arrays:
    """Return the outputs of a request, in the order of `NMS_OUTPUTS`, with zeros after the last detection.

    They are int32 [N, 1], float32 [N, K, 4] x0, y0, x1, y1 in image pixels, float32 [N, K] and int32 [N, K].
    """
    count = len(detections)
    numbers = np.array([[len(found)] for found in detections], np.int32).reshape(count, 1)
    boxes, scores = np.zeros((count, max_det, 4), np.float32), np.zeros((count, max_det), np.float32)
    classes = np.zeros((count, max_det), np.int32)
    for row, found in enumerate(detections):
        boxes[row, : len(found)] = found.boxes
        scores[row, : len(found)] = found.scores
        classes[row, : len(found)] = found.class_ids
    return numbers, boxes, scores, classes


def _images(request: Any) -> list[bytes]:  # noqa: ANN401 - an InferenceRequest
    """Return the image files of a request, an input BYTES [N, 1]."""
    return [bytes(image) for image in triton.get_input_tensor_by_name(request, IMAGE_INPUT).as_numpy().ravel()]
