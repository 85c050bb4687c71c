"""Track the objects of a video with ByteTrack of the `trackers` package, and draw their numbers and traces.

    pip install 'yolov7-deploy[cpu]' trackers
    python tracking.py --weights yolov7.onnx --source street.mp4 --output tracked.mp4

`trackers` installs `opencv-python` beside `opencv-python-headless`, which `yolov7-deploy` needs; both have the same
folder `cv2`, and either works. Use an environment of its own, because removing one of them breaks the other.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import supervision as sv
from trackers import ByteTrackTracker

from yolov7_deploy import Detector, Y7Error
from yolov7_deploy.sources import Frame

# ByteTrack continues tracks with detections of low scores, so it needs them; it starts tracks only with high ones.
CONF = 0.1
DEFAULT_FPS = 25.0  # of files that do not state it


def tracked_frames(detector: Detector, source: str) -> Iterator[tuple[Frame, sv.Detections]]:
    """Yield each frame with its tracked objects; `tracker_id` is the number of an object."""
    tracker = None
    for frame, detections in detector.stream(source, conf=CONF):
        tracker = tracker or ByteTrackTracker(frame_rate=frame.fps or DEFAULT_FPS)
        objects = tracker.update(detections.to_supervision(), timestamp=frame.timestamp_s)
        yield frame, objects[objects.tracker_id >= 0]  # -1 is an object that was seen once


class Annotator:
    """Draws boxes, numbers and traces."""

    def __init__(self) -> None:
        self._boxes = sv.BoxAnnotator(color_lookup=sv.ColorLookup.TRACK)
        self._traces = sv.TraceAnnotator(color_lookup=sv.ColorLookup.TRACK)
        self._labels = sv.LabelAnnotator(color_lookup=sv.ColorLookup.TRACK)

    def draw(self, image_bgr: np.ndarray, objects: sv.Detections) -> np.ndarray:
        """Return a copy of the image with the objects."""
        names = objects.data.get("class_name", ())
        labels = [f"#{number} {name}" for number, name in zip(objects.tracker_id, names, strict=True)]
        scene = self._traces.annotate(image_bgr.copy(), objects)
        return self._labels.annotate(self._boxes.annotate(scene, objects), objects, labels=labels)


def video_info(frame: Frame) -> sv.VideoInfo:
    """Return the size and the frame rate of the output."""
    return sv.VideoInfo(width=frame.image.shape[1], height=frame.image.shape[0], fps=frame.fps or DEFAULT_FPS)


def main() -> None:
    """Track, draw, and print how many objects there were of each class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("weights", "source", "output"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    annotator, sink, seen = Annotator(), None, set()
    with Detector(options.weights) as detector, ExitStack() as stack:
        for frame, objects in tracked_frames(detector, options.source):
            sink = sink or stack.enter_context(sv.VideoSink(options.output, video_info(frame)))
            sink.write_frame(annotator.draw(frame.image, objects))
            seen |= set(zip(objects.data.get("class_name", ()), objects.tracker_id.tolist(), strict=True))
    for name in sorted({name for name, _ in seen}):
        print(f"{name}: {sum(other == name for other, _ in seen)}")
    print(f"saved {options.output}")


if __name__ == "__main__":
    try:
        main()
    except (Y7Error, RuntimeError) as error:  # supervision raises RuntimeError if it cannot write the video
        sys.exit(str(error))
