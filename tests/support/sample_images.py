"""Images with structure, and the comparison of their detections."""

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from yolov7_deploy.detections import Detections, Speed

# Two runtimes sum in different orders; boxes are up to 1500 pixels wide, and boxes of small images are scaled up.

BOX_TOLERANCE = 0.05
SCORE_TOLERANCE = 2e-5
CONF, MAX_DET = 0.6, 300
NMS_OPTIONS = {"conf": CONF, "iou": 0.45, "max_det": MAX_DET}

needs_no_cuda = pytest.mark.skipif(
    torch.cuda.is_available() or "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this machine has CUDA",
)


def noise(height, width, seed=0):
    """Return an image with structure at every scale, so that images differ after the network."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    fine = rng.integers(-40, 40, (height, width, 3))
    return np.clip(cv2.resize(coarse, (width, height)).astype(int) + fine, 0, 255).astype(np.uint8)


IMAGES = [noise(128, 192), noise(90, 60, 1), noise(300, 400, 2), noise(20, 190, 3), noise(128, 192, 4)]


def assert_same(ours: Detections, expected: Detections):
    """Check equality up to rounding; neighbours of nearly the same score may be swapped."""
    assert len(ours) == len(expected)
    assert ours.image_hw == expected.image_hw
    np.testing.assert_allclose(ours.scores, expected.scores, atol=SCORE_TOLERANCE)
    same = (
        (ours.class_ids[:, None] == expected.class_ids[None])
        & (np.abs(ours.scores[:, None] - expected.scores[None]) <= SCORE_TOLERANCE)
        & (np.abs(ours.boxes[:, None] - expected.boxes[None]) <= BOX_TOLERANCE).all(-1)
    )
    assert same.any(0).all() and same.any(1).all()


def assert_identical(ours: Detections, expected: Detections):
    np.testing.assert_array_equal(ours.boxes, expected.boxes)
    np.testing.assert_array_equal(ours.scores, expected.scores)
    np.testing.assert_array_equal(ours.class_ids, expected.class_ids)


def without_metadata(path, target, change=lambda proto: None):
    """Write the same network without metadata, as other exporters do."""
    proto = onnx.load(path)
    del proto.metadata_props[:]
    change(proto)
    onnx.save(proto, target)
    return target


def find_two(image: np.ndarray) -> Detections:
    """Return a person and a dog for every image, as a detector does."""
    return Detections(
        boxes=[[5, 5, 40, 40], [10, 10, 30, 30]],
        scores=[0.9, 0.5],
        class_ids=[0, 1],
        class_names=("person", "dog"),
        image_hw=image.shape[:2],
        speed=Speed(preprocess_ms=1, inference_ms=2, postprocess_ms=3),
    )


def grey(value: int = 50) -> np.ndarray:
    """Return a small image of one colour."""
    return np.full((48, 64, 3), value, dtype=np.uint8)
