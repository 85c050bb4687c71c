"""Arguments of the Detector: what is accepted in several forms, and what is refused before a file is opened."""

import collections
import contextlib
import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.sample_images import CONF, IMAGES, MAX_DET, assert_identical, assert_same
from tests.support.small_models import HW
from yolov7_deploy import detector as detector_module
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, ImageError, UsageError
from yolov7_deploy.image import as_bgr, read_image
from yolov7_deploy.options import Thresholds
from yolov7_deploy.sources import open_source
from yolov7_deploy.sources.video import VideoWriter
from yolov7_deploy.visualize import write_image

SAME_SIZE = [IMAGES[0], IMAGES[4]]

# --- opening --------------------------------------------------------------------------------------------------------

INVALID = [
    *({"conf": value} for value in (5, -0.1, float("nan"), "0.5", [0.5], True, None.__class__)),
    *({"iou": value} for value in (1.1, "x", False)),
    *({"max_det": value} for value in (0, -1, 1.5, "100", True)),
    *({"multi_label": value} for value in ("no", 1, [])),
    {"class_agnostic": "yes"},
    *({"half": value} for value in ("yes", 1, 0.5)),
    *(
        {"img": value}
        for value in ("640", 640.0, 0, -1, True, (640,), (1, 2, 3), (640, "480"), (640.0, 480), {}, 10**9)
    ),
    *({"device": value} for value in (None, 0.0, True, ["cpu"], b"cpu")),
]


@pytest.mark.parametrize("options", INVALID, ids=str)
def test_an_invalid_option_is_refused_before_the_file_is_opened(tmp_path, options):
    with pytest.raises(UsageError) as caught:
        Detector(tmp_path / "absent.onnx", **options)
    assert next(iter(options)) in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize("weights", [None, 7, b"yolov7.onnx", {"model": 1}, ["a.onnx"], torch.nn.Identity()])
def test_weights_that_are_not_a_path_are_refused(weights):
    with pytest.raises(UsageError, match="weights must be a path"):
        Detector(weights)


@pytest.mark.parametrize("classes", [["persn"], ["thing 9"], [7], [-1], [0.5], [True], None.__class__, [None], b"x"])
def test_invalid_classes_close_the_file(files, monkeypatch, classes):
    opened = []

    def open_and_keep(*args, **options):
        opened.append(open_runtime(*args, **options))
        return opened[-1]

    open_runtime = detector_module.open_runtime
    monkeypatch.setattr(detector_module, "open_runtime", open_and_keep)
    with pytest.raises(UsageError, match="class"):
        Detector(files("none"), device="cpu", classes=classes)
    with pytest.raises(UsageError, match="closed"):
        opened[0].infer([IMAGES[0]], [detector_module.fit_letterbox(IMAGES[0].shape[:2], HW)], Thresholds())


def test_options_of_numpy_and_torch_are_converted(files):
    with Detector(
        files("none"),
        device=torch.device("cpu"),
        img=[np.int64(HW[0]), torch.tensor(HW[1])],
        conf=np.float32(0.5),
        max_det=np.int32(7),
        multi_label=np.bool_(True),
        classes=np.array([3, 1]),
    ) as detector:
        assert (detector.device, detector.input_hw) == ("cpu", HW)
        assert detector.thresholds == Thresholds(conf=0.5, max_det=7, multi_label=True, classes=(1, 3))
        assert [type(value) for value in (detector.thresholds.conf, detector.thresholds.max_det)] == [float, int]


@pytest.mark.parametrize("kind", ["torch", "none"])
@pytest.mark.parametrize("device", [7, np.int64(7)])
def test_the_number_of_a_gpu_is_a_device(files, kind, device):
    with pytest.raises(DeviceError, match=r"7|CUDA"):
        Detector(files(kind), img=HW, device=device)


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "plugin"])
@pytest.mark.parametrize("convert", [list, tuple, set, iter, lambda names: names[0]])
def test_classes_may_be_names(detectors, kind, convert):
    detector = detectors(kind)
    everything = detector(IMAGES[0])
    name = everything.names[0]
    assert_identical(detector(IMAGES[0], classes=convert([name])), everything.filter(classes=name))
    assert_identical(detector.batch([IMAGES[0]], classes=[name.upper(), 0])[0], everything.filter(classes=[name, 0]))


def test_a_misspelled_class_is_refused_with_a_suggestion(detector):
    for call in (detector, lambda image, **options: detector.submit(image, **options).result(timeout=60)):
        with pytest.raises(UsageError, match="no class 'think 1'") as caught:
            call(IMAGES[0], classes=["think 1"])
        assert "thing 1" in caught.value.fix


@pytest.mark.parametrize("options", [{"conf": "0.5"}, {"iou": None.__class__}, {"max_det": 2.5}, {"classes": [1.5]}])
def test_an_option_of_a_call_of_the_wrong_type_is_refused(detector, options):
    for call in (detector, lambda image, **options: detector.batch([image], **options)):
        with pytest.raises(UsageError):
            call(IMAGES[0], **options)


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [iter, tuple, collections.deque, lambda images: (i for i in images), np.stack])
def test_a_batch_is_any_iterable_of_images(plugin, convert):
    detector = plugin
    found = detector.batch(convert(SAME_SIZE))
    assert len(found) == 2
    for ours, image in zip(found, SAME_SIZE, strict=True):
        np.testing.assert_allclose(ours.scores, detector(image).scores, atol=1e-5)
    assert len(detector.profile(convert(SAME_SIZE))[0]) == 2


def test_a_generator_is_read_while_the_network_runs(detectors):
    detector, read, pending = detectors("plugin", batch=1), [], []

    def images():
        for number in range(4):
            read.append(number)
            yield SAME_SIZE[number % 2]

    run = detector._detect
    detector._detect = lambda items, *args, **options: pending.append(len(read)) or run(items, *args, **options)
    try:
        assert len(detector.batch(images())) == 4
    finally:
        del detector._detect
    assert pending == [1, 2, 3, 4]


def test_an_empty_generator_gives_an_empty_list(detector):
    assert detector.batch(image for image in ()) == []
    assert detector.batch(np.empty((0, 64, 64, 3), np.uint8)) == []


SINGLE = (
    *(IMAGES[0], IMAGES[0][:, :, 0], torch.zeros(3, 64, 64), np.array(3)),
    *("street.jpg", Path("street.jpg"), b"street.jpg", {"a": IMAGES[0]}, None, 3),
)


@pytest.mark.parametrize("images", SINGLE, ids=lambda images: type(images).__name__)
def test_a_single_image_is_not_a_batch(detector, images):
    for call in (detector.batch, detector.profile):
        with pytest.raises(UsageError, match="batch needs several images") as caught:
            call(images)
        assert "detector(image)" in caught.value.fix


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_the_bytes_of_a_file_are_an_image(detector, tmp_path, form):
    write_image(tmp_path / "a.png", IMAGES[0])
    data = form((tmp_path / "a.png").read_bytes())
    expected = detector(IMAGES[0])
    assert_identical(detector(data), expected)
    assert_same(detector([data, IMAGES[0]])[0], expected)
    assert_identical(detector.submit(data).result(timeout=60), expected)
    (streamed,) = detector.stream(data)
    assert_identical(streamed[1], expected)
    np.testing.assert_array_equal(expected.plot(data), expected.plot(IMAGES[0]))


def test_an_open_file_is_refused_with_the_expression_that_reads_it(detector, tmp_path):
    write_image(tmp_path / "a.png", IMAGES[0])
    with (tmp_path / "a.png").open("rb") as file, pytest.raises(ImageError, match="BufferedReader") as caught:
        detector(file)
    assert "image.read()" in caught.value.fix


def test_a_batch_can_skip_images_that_cannot_be_read(detector, tmp_path, caplog):
    write_image(tmp_path / "a.png", IMAGES[0])
    (tmp_path / "b.png").write_text("not an image")
    images = [str(tmp_path / "a.png"), tmp_path / "b.png", b"nor this", IMAGES[0], tmp_path / "absent.png"]
    with pytest.raises(ImageError, match=r"b\.png"):
        detector.batch(images)
    found = detector.batch(images, on_error="skip")
    assert [bool(one.error) for one in found] == [False, True, True, False, True]
    assert_same(found[0], detector(images[0]))
    assert_same(found[3], detector(IMAGES[0]))
    assert found[1].path == str(images[1]) and len(found[1]) == 0 and found[1].image_hw == (0, 0)
    assert "b.png is not an image" in found[1].error and "error='" in repr(found[1])
    assert found[1].to_dict()["error"] == found[1].error and "error" not in found[0].to_dict()
    assert len([record for record in caplog.records if "skipped" in record.message]) == 3
    assert detector.batch([tmp_path / "b.png"], on_error="skip")[0].error


def test_a_stream_can_skip_images_that_cannot_be_read(detector, tmp_path, caplog):
    for name in ("a.png", "c.png"):
        write_image(tmp_path / name, IMAGES[0])
    (tmp_path / "b.png").write_text("not an image")
    with pytest.raises(ImageError, match=r"b\.png"):
        list(detector.stream(tmp_path))
    sources = (tmp_path, [tmp_path / name for name in ("a.png", "b.png", "c.png")], iter(sorted(tmp_path.iterdir())))
    for source in sources:
        caplog.clear()
        found = list(detector.stream(source, on_error="skip"))
        assert [Path(frame.path).name for frame, _ in found] == ["a.png", "c.png"]
        assert [frame.index for frame, _ in found] == [0, 1]
        assert len([record for record in caplog.records if "skipped" in record.message]) == 1


def test_a_stream_of_a_generator_takes_one_image_after_the_other(detector):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield IMAGES[0]

    frames = detector.stream(endless())
    for number in range(3):
        frame, found = next(frames)
        assert frame.index == frame.item == number and len(taken) == number + 1
        assert_identical(found, detector(IMAGES[0]))


@pytest.mark.parametrize("on_error", ["ignore", None, True, 0])
def test_an_unknown_way_to_handle_errors_is_refused(detector, on_error, tmp_path):
    for call in (
        lambda: detector.batch([IMAGES[0]], on_error=on_error),
        lambda: next(detector.stream(IMAGES[0], on_error=on_error)),
        lambda: open_source(IMAGES[0], on_error=on_error),
    ):
        with pytest.raises(UsageError, match="on_error must be 'raise' or 'skip'"):
            call()


def test_detections_of_a_file_are_drawn_without_the_image(detector, tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", IMAGES[0])
    for found in (detector(tmp_path / "a.png"), *(found for _, found in detector.stream(tmp_path))):
        np.testing.assert_array_equal(found.plot(), found.plot(IMAGES[0]))
        found.save(tmp_path / "out" / "drawn.png")
        np.testing.assert_array_equal(read_image(tmp_path / "out" / "drawn.png"), found.plot())
    write_image(tmp_path / "a.png", IMAGES[1])
    with pytest.raises(UsageError, match=r"image is 90x60; .* of 128x192 \(height x width\)"):
        found.plot()


def test_detections_of_an_array_or_a_video_are_not_drawn_without_the_image(detector, tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", fps=5, hw=(48, 64))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.finish()
    _, of_video = next(detector.stream(tmp_path / "a.mp4"))
    for found, reason in ((detector(IMAGES[0]), "of an image in memory"), (of_video, "not of an image file")):
        with pytest.raises(UsageError, match=reason) as caught:
            found.plot()
        assert "detections.plot(image)" in caught.value.fix


def test_objects_have_a_short_repr(detector, tmp_path):
    write_image(tmp_path / "a.png", IMAGES[0])
    frame, found = next(detector.stream(tmp_path))
    path = str(tmp_path / "a.png")
    assert repr(found) == f"Detections({found.describe()}, image_hw=(128, 192), path={path!r})"
    assert repr(frame) == f"Frame({path!r}, index=0, image 128x192)"
    assert repr(detector) == f"Detector({str(detector.path)!r}: yolov7-tiny fp32, 5 classes, 128x192, cpu)"
    source = detector.path.name
    checkpoint = load_checkpoint(detector.path)
    assert repr(checkpoint) == f"Checkpoint({source!r}: yolov7-tiny, deploy form, 5 classes, 338 tensors)"
    many = replace(checkpoint.metadata, class_names=tuple(f"a long name of class {i}" for i in range(1000)))
    assert len(repr(many)) < 150 and "1000 classes" in repr(many)


def test_a_list_inside_a_batch_is_refused(detector):
    with pytest.raises(ImageError, match="list"):
        detector.batch([SAME_SIZE])


def test_a_pil_image_gives_the_detections_of_its_array_and_can_be_drawn_on(detector):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed").fromarray(IMAGES[0][:, :, ::-1])
    expected = detector(IMAGES[0])
    for found in (detector(image), detector.batch([image])[0], detector.submit(image).result(timeout=60)):
        assert_identical(found, expected)
    for source in (image, [IMAGES[0], image]):
        assert_identical([found for _, found in detector.stream(source)][-1], expected)
    np.testing.assert_array_equal(expected.plot(image), expected.plot(IMAGES[0]))
    with pytest.raises(UsageError, match="batch needs"):
        detector.batch(image)


@pytest.mark.parametrize("kind", ["torch", "none"])
def test_a_torch_tensor_is_refused_with_the_line_that_converts_it(detectors, kind):
    detector = detectors(kind)
    tensor = torch.from_numpy(IMAGES[0][:, :, ::-1].copy()).permute(2, 0, 1) / 255
    with pytest.raises(ImageError) as caught:
        detector(tensor)
    line = caught.value.fix.removeprefix("Use ").partition("  for RGB")[0]
    np.testing.assert_array_equal(as_bgr(eval(line.strip(), {"image": tensor})), IMAGES[0])
    with pytest.raises(ImageError):
        detector(torch.empty(3, 8, 8, device="meta"))


# --- closing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "none"])
def test_calls_that_race_with_closing_end_or_are_refused(files, kind):
    detector = Detector(files(kind), img=HW, device="cpu", conf=CONF, max_det=MAX_DET)
    expected, outcomes = detector(IMAGES[0]), []
    started = threading.Barrier(3, timeout=60)

    def submit():
        started.wait()
        try:
            for _ in range(200):
                outcomes.append(detector.submit(IMAGES[0]))
        except UsageError as error:
            outcomes.append(error)

    def call():
        started.wait()
        try:
            for _ in range(200):
                outcomes.append(detector(IMAGES[0]))
        except UsageError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work) for work in (submit, call)]
    for thread in threads:
        thread.start()
    started.wait()
    while not any(not isinstance(outcome, UsageError) for outcome in list(outcomes)):
        pass
    detector.close()
    for thread in threads:
        thread.join(60)
    for outcome in outcomes:
        if isinstance(outcome, UsageError):
            assert "closed" in outcome.message
        elif hasattr(outcome, "result"):
            with contextlib.suppress(CancelledError):
                assert_identical(outcome.result(timeout=60), expected)
        else:
            assert_identical(outcome, expected)
    assert any(isinstance(outcome, UsageError) for outcome in outcomes)


def test_a_call_in_progress_is_finished_before_the_model_is_freed(files):
    detector = Detector(files("none", batch=1), device="cpu")

    def images():
        yield IMAGES[0]
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        yield IMAGES[4]

    closing = threading.Thread(target=detector.close)
    assert len(detector.batch(images())) == 2
    closing.join(60)
    with pytest.raises(UsageError, match="closed"):
        detector(IMAGES[0])


def test_a_stream_of_a_closed_detector_is_refused_before_its_source_is_opened(files, tmp_path):
    detector = Detector(files("none"), device="cpu")
    detector.close()
    with pytest.raises(UsageError, match="closed"):
        next(detector.stream(tmp_path / "absent"))


def test_a_subclass_of_path_and_other_path_objects_are_paths(files):
    class Located:
        def __fspath__(self):
            return str(files("none"))

    with Detector(Located(), device="cpu") as detector:
        assert detector.path == files("none")
