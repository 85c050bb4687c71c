"""See in the FiftyOne App where a file and its original differ, such as INT8 and FP32; the worst images come first.

    pip install 'yolov7-deploy[cpu]' fiftyone
    python fiftyone_compare.py --weights yolov7-int8.onnx --reference yolov7.onnx --source images

The detections of the reference take the place of labels. A detection of the file without a partner of the same class
(IoU of at least 0.5) is extra, one of the reference without a partner is missing. Without `--name` the dataset is
deleted at the end. FiftyOne starts a MongoDB on this machine, or uses that of `FIFTYONE_DATABASE_URI`;
`FIFTYONE_DO_NOT_TRACK=true` stops its usage statistics.
"""

import argparse
import sys
from pathlib import Path

import fiftyone as fo

from yolov7_deploy import Detections, Detector, Y7Error

SHOWN = 10  # images that are printed


def to_fiftyone(detections: Detections) -> fo.Detections:
    """Return the detections as labels of FiftyOne, whose boxes are x, y, width and height as fractions."""
    height, width = detections.image_hw
    labels = []
    for item in detections:
        x1, y1, x2, y2 = item.box
        box = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
        labels.append(fo.Detection(label=item.class_name, bounding_box=box, confidence=item.score))
    return fo.Detections(detections=labels)


def detect(reference: Detector, candidate: Detector, source: str) -> list[fo.Sample]:
    """Return a sample for each image, with the detections of both."""
    samples = []
    for frame, expected in reference.stream(source):
        if frame.number is not None:
            sys.exit(f"{frame.path} is a video; --source takes images.")
        sample = fo.Sample(filepath=str(Path(frame.path).absolute()))
        sample["reference"], sample["candidate"] = to_fiftyone(expected), to_fiftyone(candidate(frame.image))
        samples.append(sample)
    return samples


def find_differences(samples: list[fo.Sample], name: str | None) -> fo.DatasetView:
    """Return a view of the images that differ, those with the most differences first."""
    dataset = fo.Dataset(name, persistent=name is not None)
    dataset.add_samples(samples, progress=False)
    dataset.evaluate_detections("candidate", gt_field="reference", eval_key="eval", progress=False)
    extra, missing = dataset.values("eval_fp"), dataset.values("eval_fn")
    dataset.set_values("extra", extra)
    dataset.set_values("missing", missing)
    dataset.set_values("differences", [sum(both) for both in zip(extra, missing, strict=True)])
    return dataset.match(fo.ViewField("differences") > 0).sort_by("differences", reverse=True)


def report(view: fo.DatasetView, count: int) -> None:
    """Print the totals and the images that differ most."""
    extra, missing = view.sum("extra") or 0, view.sum("missing") or 0
    print(f"{len(view)} of {count} images differ: {missing} detections missing, {extra} extra")
    for sample in view[:SHOWN]:
        print(f"{Path(sample.filepath).name}: {sample.missing} missing, {sample.extra} extra")


def main() -> None:
    """Detect with both files, compare, and open the App."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="the file to examine")
    parser.add_argument("--reference", required=True, help="its original")
    parser.add_argument("--source", required=True, help="images: a folder, a pattern or a file")
    parser.add_argument("--conf", type=float, help="threshold of both; default: those of the files")
    parser.add_argument("--name", help="keep the dataset under this name")
    parser.add_argument("--no-app", action="store_true", help="only print the differences")
    options = parser.parse_args()
    if options.name and fo.dataset_exists(options.name):
        sys.exit(f"FiftyOne already has a dataset {options.name}. Choose another --name.")
    with (
        Detector(options.reference, conf=options.conf) as reference,
        Detector(options.weights, conf=options.conf) as candidate,
    ):
        samples = detect(reference, candidate, options.source)
    view = find_differences(samples, options.name)
    report(view, len(samples))
    if not options.no_app:
        fo.launch_app(view).wait()


if __name__ == "__main__":
    try:
        main()
    except Y7Error as error:
        sys.exit(str(error))
