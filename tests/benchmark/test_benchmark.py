"""How speed is measured: frames, answers, a whole run on a small network, and the words about it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.support.sample_images import noise
from tests.support.small_models import HW
from tests.support.speeds import report, row, span
from yolov7_deploy._console import write_json
from yolov7_deploy.benchmark.benchmark import measure_speed
from yolov7_deploy.benchmark.consistency import ConsistencyChecker, same_detections
from yolov7_deploy.benchmark.inputs import Frames, drawn_frames, read_frames
from yolov7_deploy.benchmark.references import paper_speed, read_ap
from yolov7_deploy.benchmark.report import SPANS, SpeedReport
from yolov7_deploy.benchmark.report_text import describe_speed
from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import DeviceError, SourceError, UsageError
from yolov7_deploy.hub import file_digest
from yolov7_deploy.image import Image
from yolov7_deploy.options import BenchOptions

QUICK = BenchOptions(duration_s=0.2, warmup_s=0.5)
FRAMES = Frames(images=(noise(128, 192), noise(90, 60, 1), noise(300, 400, 2)), words="three of noise")


# --- frames and answers -----------------------------------------------------------------------------------------------


def test_batches_hold_every_image_and_no_memory_twice():
    images: tuple[Image, ...] = tuple(np.full((2, 2, 3), number, np.uint8) for number in range(3))
    frames = Frames(images=images, words="")
    told = [[int(image[0, 0, 0]) for image in batch] for batch in frames.batches(2)]
    assert told == [[0, 1], [2, 0]]
    (batch,) = frames.batches(7)
    assert [int(image[0, 0, 0]) for image in batch] == [0, 1, 2, 0, 1, 2, 0]
    assert len({image.ctypes.data for image in batch}) == 7


@pytest.mark.parametrize("hw", [(1080, 1920), (48, 64), (9, 7), (1, 1)])
def test_the_drawn_image_has_the_size_asked_for(hw):
    assert drawn_frames(hw).hw == hw


def test_an_empty_folder_is_no_source_of_frames(tmp_path):
    with pytest.raises(SourceError):
        read_frames(tmp_path)


def found(*scores: float, shift: float = 0.0, class_id: int = 0) -> Detections:
    boxes = [[100 * i + shift, 10, 100 * i + 60 + shift, 70] for i in range(len(scores))]
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        class_ids=np.full(len(scores), class_id),
        class_names=("cat", "dog"),
        image_hw=(480, 640),
    )


@pytest.mark.parametrize(
    ("later", "same"),
    [
        (found(0.9, 0.6), True),
        (found(0.9001, 0.5999, shift=0.1), True),
        (found(0.9, 0.6, 0.26), True),  # next to the threshold
        (found(0.6, 0.9), False),
        (found(0.9), False),
        (found(0.9, 0.6, 0.5), False),
        (found(0.9, 0.7), False),
        (found(0.9, 0.6, shift=40), False),
        (found(0.9, 0.6, class_id=1), False),
        (found(), False),
    ],
)
def test_answers_may_round_but_not_change(later, same):
    answers = ConsistencyChecker(conf=0.25)
    answers.keep(0, [found(0.9, 0.6)])
    answers.keep(0, [later], caller=3)
    if same:
        answers.check()
    else:
        with pytest.raises(DeviceError, match=r"2 detections first .* caller 4\."):
            answers.check()


def test_a_box_without_an_area_is_the_same_as_itself():
    """Clipped at the border of the image, it overlaps nothing, not even itself."""
    flat = replace(found(0.9), boxes=np.array([[640, 10, 640, 90]], np.float32))
    assert same_detections(flat, flat, conf=0.25)


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(request) -> SpeedReport:
    detectors = request.getfixturevalue("detectors")
    options = replace(QUICK, batches=(1, 2), threads=(1, 2))
    seen: list[tuple[int, int]] = []
    rows: list[object] = []
    found_report = measure_speed(
        detectors("plugin", batch=None),
        FRAMES,
        options=options,
        progress=lambda done, total: seen.append((done, total)),
        on_row=rows.append,
    )
    assert tuple(rows) == found_report.rows
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    return found_report


def test_there_is_a_row_for_each_batch_with_each_number_of_callers(measured):
    assert [(one.batch, one.threads) for one in measured.rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for one in measured.rows:
        assert tuple(span.name for span in one.spans) == SPANS
        assert one.calls >= 20 and one.warmup_calls >= 1
        assert one.host_peak_bytes > 2**24 and one.gpu_peak_bytes is None
        assert (one.loaded is None) == (one.threads == 1)
        assert one.energy is not None or one.energy_absent


def test_the_spans_together_are_the_call(measured):
    """They are of other calls of the same run, on a machine that does other things as well."""
    for one in measured.rows:
        parts, whole = sum(one.span(name).p50 for name in SPANS[:-1]), one.span("end_to_end")
        assert 0.8 * whole.least <= parts <= 1.2 * whole.p99
        assert one.span("upload").p50 == 0


def test_throughput_of_one_caller_is_what_its_calls_take(measured):
    for one in measured.rows:
        whole = one.span("end_to_end")
        if one.threads == 1:  # calls may be faster here than there, but not by much than the fastest
            assert 1 / 3 / whole.p99 <= one.images_per_second / 1e3 / one.batch <= 1.25 / whole.least
        assert one.images == pytest.approx(one.images_per_second * one.seconds, abs=0.51)


def test_a_report_comes_back_from_its_file_as_it_was(measured, tmp_path):
    write_json(measured.to_dict(), tmp_path / "report.json")
    assert SpeedReport.load(tmp_path / "report.json") == measured
    again = tmp_path / "again.json"
    write_json(SpeedReport.load(tmp_path / "report.json").to_dict(), again)
    assert again.read_bytes() == (tmp_path / "report.json").read_bytes()


def test_a_report_says_what_ran(measured, files):
    assert (measured.backend, measured.precision, measured.nms, measured.device) == (
        "onnxruntime",
        "fp32",
        "plugin",
        "cpu",
    )
    assert measured.weights_sha256 == file_digest(files("plugin", batch=None))
    assert (measured.input_hw, measured.frame_hw) == (HW, (128, 192))
    assert {"numpy", "onnxruntime", "python", "system"} <= dict(measured.environment).keys()
    assert "conf 0.6" in dict(measured.settings)["thresholds"]
    assert any("p99 of" in note for note in measured.notes) == any(one.calls < 100 for one in measured.rows)
    assert "NMS is inside the file: it counts as engine time" in measured.notes


def test_a_checkpoint_is_measured_too(detectors):
    measured = measure_speed(detectors("torch"), Frames(images=FRAMES.images[:1], words="one"), options=QUICK)
    assert (measured.backend, measured.nms) == ("pytorch", "host")
    assert "torch" in dict(measured.environment)


class Forgetful:
    """A detector that finds nothing more after some calls: a race, a stale buffer."""

    def __init__(self, detector, calls):
        self._detector, self._left = detector, calls

    def __getattr__(self, name):
        return getattr(self._detector, name)

    def batch(self, images):
        self._left -= 1
        found = self._detector.batch(images)
        return found if self._left > 0 else [one.filter(conf=1.0) for one in found]


def test_a_detector_whose_answers_change_is_not_measured(plugin):
    assert len(plugin(FRAMES.images[0]))
    with pytest.raises(DeviceError, match="times of such a detector mean nothing"):
        measure_speed(Forgetful(plugin, 15), FRAMES, options=QUICK)


def test_batches_that_the_file_cannot_run_are_refused(detectors, plugin):
    with pytest.raises(UsageError, match=r"takes at most 1 at once\.\ny7 export --weights deterministic --batch 2"):
        measure_speed(plugin, FRAMES, options=BenchOptions(batches=(1, 2)))
    with pytest.raises(UsageError, match=r"fixed batch of 2 and would be filled up.*\n--batch 2"):
        measure_speed(detectors("plugin", batch=2), FRAMES, options=BenchOptions(batches=(1,)))
    with pytest.raises(UsageError, match="at most 32 images"):
        measure_speed(detectors("torch"), FRAMES, options=BenchOptions(batches=(33,)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": (0,)},
        {"batches": ()},
        {"threads": (1, 0)},
        {"threads": (257,)},
        {"duration_s": -1.0},
        {"duration_s": float("nan")},
        {"warmup_s": float("inf")},
    ],
)
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UsageError, match="--"):
        BenchOptions(**wrong)


# --- beside it, and in words ------------------------------------------------------------------------------------------


def test_the_paper_is_beside_it_at_the_size_measured_where_it_has_several():
    assert (paper_speed("yolov7", (640, 640)).fps, paper_speed("yolov7", (640, 640)).size) == (161, 640)
    assert [paper_speed("yolov7-tiny", (side, side)).size for side in (320, 416, 640)] == [320, 416, 416]
    with pytest.raises(UsageError, match="custom"):
        paper_speed("custom", (640, 640))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"ap": 0.5, "weights": "a/other.onnx", "images": 5000}, "is about a/other.onnx"),
        ({"ap": 0.5, "weights": "yolov7.onnx", "images": 5000, "weights_sha256": "ff"}, "another file"),
        ({"ap": None, "weights": "yolov7.onnx", "images": 5000}, "ap is None"),
        ({"ap": 51.2, "weights": "yolov7.onnx", "images": 5000}, "ap is 51.2"),
        ({"weights": "yolov7.onnx"}, "ap is missing"),
        ([], "it holds"),
    ],
)
def test_the_ap_of_another_file_or_of_none_is_refused(document, words, tmp_path):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=words):
        read_ap(path, tmp_path / "yolov7.onnx", sha256="00")


def test_the_ap_of_the_same_file_is_taken(tmp_path):
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"ap": 0.512, "weights": "elsewhere/yolov7.onnx", "images": 5000, "more": 1}))
    assert read_ap(path, tmp_path / "yolov7.onnx", sha256="00") == (0.512, str(path))
    path.write_text(json.dumps({"ap": 0.6, "weights": "renamed.onnx", "images": 82, "weights_sha256": "00"}))
    assert read_ap(path, tmp_path / "yolov7.onnx", sha256="00") == (0.6, f"{path}, 82 images")


def test_the_table_says_what_was_measured_and_what_was_not():
    loaded = span("end_to_end", [30.0] * 20)
    told = describe_speed(report(rows=(row(), row(threads=4, loaded=loaded)), notes=("a note",)))
    for words in (
        "folder/yolov7.onnx (yolov7, onnxruntime, fp32) at 640x640 on cpu: a machine",
        "one drawn image; 4 detections an image",
        "0.62",
        "600 MB host",
        "while 4 called at once, a call took p50 30",
        "settings: threads: 2",
        "50.0 W, 9.5 W idle before (a meter)",
        "2400 MHz (a clock)",
        "note: a note",
    ):
        assert words in told
    without = replace(row(), energy=None, energy_absent="no permission: sudo this", clocks=None)
    assert "power: not measured. no permission: sudo this" in describe_speed(report(rows=(without,)))


def test_the_paper_is_compared_with_the_network_only():
    beside = report(rows=(row(), row(batch=32)), paper=paper_speed("yolov7", (640, 640)), ap=0.51, ap_source="val.json")
    told = describe_speed(beside)
    engine = beside.rows[0].span("engine").p50
    (line,) = (line for line in told.splitlines() if line.startswith("network, batch 1 "))
    assert line.endswith(f"{engine * 161 / 1000:.3g}x its time")
    assert "161 images/s at batch 1 and 2.8 ms an image at batch 32" in told
    assert "no letterbox, no upload, no NMS" in told
    assert "51.0 % (val.json)" in told and "-0.2 points" in told
    assert not [line for line in told.splitlines() if line.startswith("end to end, batch") and "its time" in line]
