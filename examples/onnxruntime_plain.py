"""Detect with ONNX Runtime alone: the ten lines of `detect` are all that an exported file needs.

    pip install onnxruntime opencv-python-headless
    python onnxruntime_plain.py yolov7.onnx street.jpg

`y7 export --weights yolov7` writes the file. Its boxes are those of `Detector("yolov7.onnx")`. Thresholds are optional
inputs of the graph: pass `"conf_threshold": np.array([0.4], np.float32)` beside the image.
"""

import math
import sys

import cv2
import numpy as np
import onnxruntime


def detect(session: onnxruntime.InferenceSession, image_bgr: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes [N, 4] xyxy in image pixels, scores [N] and class ids [N] of an image uint8 BGR [H, W, 3]."""
    (high, wide), (height, width) = image_bgr.shape[:2], session.get_inputs()[0].shape[2:]
    scale = min(height / high, width / wide)
    resized = cv2.resize(image_bgr, (max(1, round(wide * scale)), max(1, round(high * scale))))
    y, x = (height - resized.shape[0]) / 2, (width - resized.shape[1]) / 2  # the padding; an odd pixel goes last
    sides = (math.floor(y), math.ceil(y), math.floor(x), math.ceil(x))
    canvas = cv2.copyMakeBorder(resized, *sides, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    tensor = canvas[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255  # [1, 3, H, W], RGB
    count, boxes, scores, class_ids = (output[0] for output in session.run(None, {"images": tensor}))
    boxes = ((boxes - [x, y, x, y]) / scale).clip(0, [wide, high, wide, high])
    return boxes[: count[0]], scores[: count[0]], class_ids[: count[0]]


def check(session: onnxruntime.InferenceSession) -> None:
    """Exit if the file is not one that `detect` can run: float32 images of one size, and NMS inside."""
    images, outputs = session.get_inputs()[0], [output.name for output in session.get_outputs()]
    is_fixed = images.type == "tensor(float)" and all(isinstance(side, int) for side in images.shape[1:])
    if not is_fixed or images.shape[0] not in (1, "batch") or outputs[:1] != ["num_dets"]:
        sys.exit(
            f"The file has the input {images.type} {images.shape} and the outputs {', '.join(outputs)}.\n"
            "Export it with a fixed size, a batch of 1 and NMS inside:  y7 export --weights yolov7.pt"
        )


def main() -> None:
    """Print the objects of an image."""
    if len(sys.argv) != 3:
        sys.exit("usage: python onnxruntime_plain.py MODEL.onnx IMAGE")
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    check(session)
    image_bgr = cv2.imread(sys.argv[2])
    if image_bgr is None:
        sys.exit(f"{sys.argv[2]} cannot be read: the file is missing, or not an image.")
    for box, score, class_id in zip(*detect(session, image_bgr), strict=True):
        print(class_id, f"{score:.3f}", *(f"{side:.1f}" for side in box))


if __name__ == "__main__":
    main()
