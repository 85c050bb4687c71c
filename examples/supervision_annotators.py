"""Draw detections with the annotators of supervision, and count the objects in a zone of the image.

    pip install 'yolov7-deploy[cpu]' supervision
    python supervision_annotators.py --weights yolov7.onnx --source street.jpg --output annotated.jpg

The zone is the left half of the image; replace the polygon with your own.
"""

import argparse
import sys

import numpy as np
import supervision as sv

from yolov7_deploy import Detections, Detector, Y7Error
from yolov7_deploy.image import read_image
from yolov7_deploy.visualize import write_image


def left_half(image_hw: tuple[int, int]) -> sv.PolygonZone:
    """Return the zone; an object is inside if the centre of its box is."""
    height, width = image_hw
    polygon = np.array([(0, 0), (width // 2, 0), (width // 2, height - 1), (0, height - 1)])
    return sv.PolygonZone(polygon, triggering_anchors=(sv.Position.CENTER,))


def annotate(image_bgr: np.ndarray, detections: Detections) -> tuple[np.ndarray, int]:
    """Return a copy of the image with corners, labels and the zone, and the number of objects in the zone."""
    size_wh = (image_bgr.shape[1], image_bgr.shape[0])
    line, text = sv.calculate_optimal_line_thickness(size_wh), sv.calculate_optimal_text_scale(size_wh)
    found = detections.to_supervision()
    labels = [f"{item.class_name} {item.score:.2f}" for item in detections]
    zone = left_half(detections.image_hw)
    inside = int(zone.trigger(found).sum())
    scene = sv.PolygonZoneAnnotator(zone, thickness=line, text_scale=text).annotate(image_bgr.copy())
    scene = sv.BoxCornerAnnotator(thickness=2 * line).annotate(scene, found)
    return sv.LabelAnnotator(text_scale=text, smart_position=True).annotate(scene, found, labels=labels), inside


def main() -> None:
    """Detect, draw and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("weights", "source", "output"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    with Detector(options.weights) as detector:
        image_bgr = read_image(options.source)
        detections = detector(image_bgr)
    annotated, inside = annotate(image_bgr, detections)
    write_image(options.output, annotated)
    print(f"{detections.describe()}; {inside} in the left half; saved {options.output}")


if __name__ == "__main__":
    try:
        main()
    except Y7Error as error:
        sys.exit(str(error))
