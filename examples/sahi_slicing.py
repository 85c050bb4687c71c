"""Find small objects in a large image with SAHI, which runs the detector on overlapping slices and joins the results.

    pip install 'yolov7-deploy[cpu]' sahi
    python sahi_slicing.py --weights yolov7.onnx --source aerial.jpg --slice 640 --output sliced.png

`Y7DetectionModel` is all that SAHI needs of a detector; use it with any function of SAHI. A slice as large as the input
of the network is not scaled down, so an object keeps its pixels. `sahi` installs `opencv-python` beside
`opencv-python-headless`, which `yolov7-deploy` needs; use an environment of its own.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sahi.models.base import DetectionModel
from sahi.predict import get_prediction, get_sliced_prediction
from sahi.prediction import ObjectPrediction
from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list

from yolov7_deploy import Detections, Detector, Y7Error
from yolov7_deploy.image import read_image

BATCH = 8  # slices that run together, if the file takes a batch
Shapes = list[list[int]] | None


class Y7DetectionModel(DetectionModel):
    """A Detector as a detection model of SAHI 0.12; the arguments are those of SAHI, and torch is not needed."""

    def set_device(self, device: str | None = None) -> None:
        """Keep the name of the device for the Detector."""
        self.device = device or "auto"

    def load_model(self) -> None:
        """Open `model_path`."""
        self.set_model(Detector(self.model_path, device=self.device, img=self.image_size))

    def set_model(self, model: Detector, **_: Any) -> None:  # noqa: ANN401 - of SAHI's signature
        """Use an open Detector."""
        self.model = model
        self.category_mapping = {str(i): name for i, name in enumerate(model.class_names)}

    def perform_inference(self, image: np.ndarray) -> None:
        """Detect in one image, RGB."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[np.ndarray]) -> None:
        """Detect in several images, RGB; the Detector splits them if its file has a fixed batch size."""
        images_bgr = [image[..., ::-1] for image in images]
        self._original_predictions = self.model.batch(images_bgr, conf=self.confidence_threshold)

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Shapes = None, full_shape_list: Shapes = None
    ) -> None:
        results = self._original_predictions
        shifts = fix_shift_amount_list(shift_amount_list)
        shapes = fix_full_shape_list(full_shape_list) or [result.image_hw for result in results]
        self._object_prediction_list_per_image = [
            to_predictions(*each) for each in zip(results, shifts, shapes, strict=True)
        ]


def to_predictions(detections: Detections, shift: list[int], full_shape: list[int]) -> list[ObjectPrediction]:
    """Return the detections of one slice as objects of SAHI; boxes without an area are left out, as SAHI does."""
    return [
        ObjectPrediction(
            bbox=list(item.box),
            category_id=item.class_id,
            category_name=item.class_name,
            score=item.score,
            shift_amount=shift,
            full_shape=list(full_shape),
        )
        for item in detections
        if item.box[0] < item.box[2] and item.box[1] < item.box[3]
    ]


def main() -> None:
    """Detect in the whole image and in slices, print both numbers and draw the second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("weights", "source", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--slice", type=int, default=640, help="height and width of a slice in pixels")
    parser.add_argument("--conf", type=float, default=0.25)
    options = parser.parse_args()
    model = Y7DetectionModel(model_path=options.weights, confidence_threshold=options.conf)
    image_rgb = np.ascontiguousarray(read_image(options.source)[..., ::-1])
    whole = get_prediction(image_rgb, model)
    side = {"slice_height": options.slice, "slice_width": options.slice}
    sliced = get_sliced_prediction(image_rgb, model, **side, batch_size=BATCH, verbose=0)
    output = Path(options.output)
    sliced.export_visuals(export_dir=str(output.parent), file_name=output.stem)  # SAHI writes PNG
    print(f"{len(whole.object_prediction_list)} objects in the whole image")
    print(f"{len(sliced.object_prediction_list)} objects with slices; saved {output.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main()
    except Y7Error as error:
        sys.exit(str(error))
