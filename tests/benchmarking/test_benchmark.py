"""The benchmark: frames, consistency of results, a whole run on a small network, and its text output."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.support.sample_images import noise
from tests.support.small_models import HW
from tests.support.speed_reports import speed_report, speed_row
from yolov7_deploy._console import write_json
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.benchmarking.benchmark import (
    ConsistencyChecker,
    Frames,
    measure_speed,
    read_frames,
    same_detections,
    synthetic_frames,
)
from yolov7_deploy.benchmarking.report import STAGES, SpeedReport, describe_speed, paper_speed, read_ap
from yolov7_deploy.benchmarking.sampling import stage_time
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, SourceError, UsageError
from yolov7_deploy.image import Image
from yolov7_deploy.options import BenchOptions

QUICK = BenchOptions(duration_s=0.2, warmup_s=0.5)
FRAMES = Frames(images=(noise(128, 192), noise(90, 60, 1), noise(300, 400, 2)), description="three of noise")


# --- frames and consistency -------------------------------------------------------------------------------------------


def test_batches_contain_every_image_and_share_no_memory():
    images: tuple[Image, ...] = tuple(np.full((2, 2, 3), number, np.uint8) for number in range(3))
    frames = Frames(images=images, description="")
    numbers = [[int(image[0, 0, 0]) for image in batch] for batch in frames.batches(2)]
    assert numbers == [[0, 1], [2, 0]]
    (batch,) = frames.batches(7)
    assert [int(image[0, 0, 0]) for image in batch] == [0, 1, 2, 0, 1, 2, 0]
    assert len({image.ctypes.data for image in batch}) == 7


@pytest.mark.parametrize("hw", [(1080, 1920), (48, 64), (9, 7), (1, 1)])
def test_the_synthetic_image_has_the_requested_size(hw):
    assert synthetic_frames(hw).hw == hw


def test_an_empty_folder_is_rejected(tmp_path):
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
        (found(0.9, 0.6, 0.26), True),  # close to the threshold
        (found(0.6, 0.9), False),
        (found(0.9), False),
        (found(0.9, 0.6, 0.5), False),
        (found(0.9, 0.7), False),
        (found(0.9, 0.6, shift=40), False),
        (found(0.9, 0.6, class_id=1), False),
        (found(), False),
    ],
)
def test_results_may_differ_by_rounding_only(later, same):
    results = ConsistencyChecker(conf=0.25)
    results.add(0, [found(0.9, 0.6)])
    results.add(0, [later], thread=3)
    if same:
        results.check()
    else:
        with pytest.raises(DeviceError, match=r"2 detections first .* thread 4\."):
            results.check()


def test_a_box_without_area_is_the_same_as_itself():
    """Clipped at the image border, its IoU is 0 even with itself."""
    flat = replace(found(0.9), boxes=np.array([[640, 10, 640, 90]], np.float32))
    assert same_detections(flat, flat, conf=0.25)


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(request) -> SpeedReport:
    detectors = request.getfixturevalue("detectors")
    options = replace(QUICK, batches=(1, 2), concurrency=(1, 2))
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


def test_there_is_a_row_for_each_batch_at_each_concurrency(measured):
    assert [(one.batch, one.concurrency) for one in measured.rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for one in measured.rows:
        assert tuple(stage.name for stage in one.stages) == STAGES
        assert one.calls >= 20 and one.warmup_calls >= 1
        assert one.host_peak_bytes > 2**24 and one.gpu_peak_bytes is None
        assert (one.under_load is None) == (one.concurrency == 1)
        assert one.energy is not None or one.energy_unavailable


def test_the_stages_add_up_to_the_call(measured):
    """They are measured in other calls of the same run, on a machine with other load."""
    for one in measured.rows:
        parts, end_to_end = sum(one.stage(name).p50 for name in STAGES[:-1]), one.stage("end_to_end")
        assert 0.8 * end_to_end.min <= parts <= 1.2 * end_to_end.p99
        assert one.stage("upload").p50 == 0


def test_the_throughput_of_one_thread_matches_its_latency(measured):
    for one in measured.rows:
        end_to_end = one.stage("end_to_end")
        if one.concurrency == 1:  # calls may be faster here than there, but hardly faster than the fastest
            assert 1 / 3 / end_to_end.p99 <= one.images_per_second / 1e3 / one.batch <= 1.25 / end_to_end.min
        assert one.images == pytest.approx(one.images_per_second * one.seconds, abs=0.51)


def test_a_report_is_the_same_after_writing_and_reading(measured, tmp_path):
    write_json(measured.to_dict(), tmp_path / "report.json")
    assert SpeedReport.load(tmp_path / "report.json") == measured
    again = tmp_path / "again.json"
    write_json(SpeedReport.load(tmp_path / "report.json").to_dict(), again)
    assert again.read_bytes() == (tmp_path / "report.json").read_bytes()


def test_a_report_describes_what_ran(measured, files):
    assert (measured.runtime, measured.precision, measured.nms, measured.device) == (
        "onnxruntime",
        "fp32",
        "plugin",
        "cpu",
    )
    assert measured.weights_sha256 == sha256_hex(files("plugin", batch=None))
    assert (measured.input_hw, measured.frame_hw) == (HW, (128, 192))
    assert {"numpy", "onnxruntime", "python", "system"} <= dict(measured.environment).keys()
    assert "conf 0.6" in dict(measured.settings)["thresholds"]
    assert any("p99 of" in note for note in measured.notes) == any(one.calls < 100 for one in measured.rows)
    assert "NMS is inside the file: it counts as engine time" in measured.notes


@pytest.mark.slow
def test_a_checkpoint_is_measured_too(detectors):
    measured = measure_speed(detectors("torch"), Frames(images=FRAMES.images[:1], description="one"), options=QUICK)
    assert (measured.runtime, measured.nms) == ("pytorch", "host")
    assert "torch" in dict(measured.environment)


def test_a_report_names_the_runtime_that_ran_and_its_version(files):
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'yolov7-deploy[openvino]'")
    with Detector(files("plugin"), img=HW, runtime="openvino") as detector:
        measured = measure_speed(detector, Frames(images=FRAMES.images[:1], description="one"), options=QUICK)
    assert measured.runtime == "openvino"
    assert {"openvino"} == {"openvino", "onnxruntime"} & dict(measured.environment).keys()


class UnstableDetector:
    """A detector that finds nothing after some calls, as with a race or a stale buffer."""

    def __init__(self, detector, calls):
        self._detector, self._left = detector, calls

    def __getattr__(self, name):
        return getattr(self._detector, name)

    def batch(self, images):
        self._left -= 1
        found = self._detector.batch(images)
        return found if self._left > 0 else [one.filter(conf=1.0) for one in found]


@pytest.mark.slow
def test_a_detector_whose_results_change_is_not_measured(plugin):
    assert len(plugin(FRAMES.images[0]))
    with pytest.raises(DeviceError, match="times of such a detector are meaningless"):
        measure_speed(UnstableDetector(plugin, 15), FRAMES, options=QUICK)


def test_batch_sizes_that_the_file_cannot_run_are_rejected(detectors, plugin):
    with pytest.raises(UsageError, match=r"takes at most 1 at once\.\nexport\(\"deterministic\", batch=2\)"):
        measure_speed(plugin, FRAMES, options=BenchOptions(batches=(2,)))
    with pytest.raises(UsageError, match=r"takes at most 1 at once\.\nexport\(\"deterministic\", batch=None\)"):
        measure_speed(plugin, FRAMES, options=BenchOptions(batches=(1, 2)))
    with pytest.raises(UsageError, match=r"fixed batch of 2 and would be padded.*\nbatch=2"):
        measure_speed(detectors("plugin", batch=2), FRAMES, options=BenchOptions(batches=(1,)))
    with pytest.raises(UsageError, match="at most 32 images"):
        measure_speed(detectors("torch"), FRAMES, options=BenchOptions(batches=(33,)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": (0,)},
        {"batches": ()},
        {"batches": ("8",)},
        {"concurrency": (1, 0)},
        {"concurrency": (257,)},
        {"duration_s": -1.0},
        {"duration_s": float("nan")},
        {"warmup_s": float("inf")},
    ],
)
def test_invalid_options_are_rejected(wrong):
    with pytest.raises(UsageError, match=r"must be|is above|is not a time") as raised:
        BenchOptions(**wrong)
    assert raised.value.message.startswith("--")


# --- references and text output----------------------------------------------------------------------------------------


def test_the_papers_row_is_that_of_the_measured_size_if_there_is_one():
    assert (paper_speed("yolov7", (640, 640)).fps, paper_speed("yolov7", (640, 640)).size) == (161, 640)
    assert [paper_speed("yolov7-tiny", (size, size)).size for size in (320, 416, 640)] == [320, 416, 416]
    with pytest.raises(UsageError, match="custom"):
        paper_speed("custom", (640, 640))


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"ap": 0.5, "weights": "a/other.onnx", "images": 5000}, "is about a/other.onnx"),
        ({"ap": 0.5, "weights": "yolov7.onnx", "images": 5000, "weights_sha256": "ff"}, "another file"),
        ({"ap": None, "weights": "yolov7.onnx", "images": 5000}, "ap is None"),
        ({"ap": 51.2, "weights": "yolov7.onnx", "images": 5000}, "ap is 51.2"),
        ({"weights": "yolov7.onnx"}, "ap is missing"),
        ([], "it contains"),
    ],
)
def test_the_ap_of_another_file_is_rejected(document, text, tmp_path):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=text):
        read_ap(path, tmp_path / "yolov7.onnx", sha256="00")


def test_the_ap_of_the_same_file_is_used(tmp_path):
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"ap": 0.512, "weights": "elsewhere/yolov7.onnx", "images": 5000, "more": 1}))
    assert read_ap(path, tmp_path / "yolov7.onnx", sha256="00") == (0.512, str(path))
    path.write_text(json.dumps({"ap": 0.6, "weights": "renamed.onnx", "images": 82, "weights_sha256": "00"}))
    assert read_ap(path, tmp_path / "yolov7.onnx", sha256="00") == (0.6, f"{path}, 82 images")


def test_the_text_shows_what_was_measured_and_what_was_not():
    under_load = stage_time("end_to_end", [30.0] * 20)
    rows = (speed_row(), speed_row(concurrency=4, under_load=under_load))
    text = describe_speed(speed_report(rows=rows, notes=("a note",)))
    for part in (
        "models/yolov7.onnx (yolov7, onnxruntime, fp32) at 640x640 on cpu: AMD EPYC",
        "one synthetic image; 4 detections per image",
        "0.62",
        "host MB",
        "at concurrency 4 a call took p50 30",
        "settings: threads: 2",
        "50.0 W, 9.5 W idle before (a meter)",
        "2400 MHz (a clock)",
        "note: a note",
    ):
        assert part in text
    without = replace(speed_row(), energy=None, energy_unavailable="no permission: sudo this", clocks=None)
    assert "power: not measured. no permission: sudo this" in describe_speed(speed_report(rows=(without,)))


LARGE_MS = {"end_to_end": 12345.6, "engine": 12000.1, "preprocess": 123.4, "upload": 12.34, "download": 1.234}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_tables_fit_100_columns(monkeypatch, is_terminal):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    stages = tuple(stage_time(name, [LARGE_MS.get(name, 1.234)] * 20) for name in STAGES)
    row = speed_row(batch=32, concurrency=16, stages=stages, gpu_peak_bytes=141_000_000_000, images_per_second=1234.5)
    paper = paper_speed("yolov7", (640, 640))
    lines = describe_speed(speed_report(rows=(row,), paper=paper, ap=0.51, ap_source="val.json")).splitlines()
    (heading,) = (number for number, line in enumerate(lines) if line.strip().startswith("batch  "))
    cells = "32 16 12346 12346 12346 123.4 12.3 12000 1.23 1.23 1234 0.62 141000"
    assert lines[heading + 1 + is_terminal].split() == cells.split()
    tables = [line for line in lines if line.strip().startswith(("batch ", "network,", "end to end,", "AP on"))]
    assert len(tables) == 4 and max(map(len, tables)) <= 100


def test_columns_that_were_not_measured_are_left_out():
    row = replace(speed_row(), energy=None)
    (heading,) = (line for line in describe_speed(speed_report(rows=(row,))).splitlines() if line.startswith("batch  "))
    assert heading.split() == ["batch", "threads", "p50", "p90", "p99", "pre", "engine", "post", "img/s", "host", "MB"]


def test_the_accuracy_of_other_classes_is_not_compared_with_the_paper():
    report = speed_report(paper=paper_speed("yolov7", (640, 640)), is_coco=False, ap=0.71, ap_source="val.json")
    text = describe_speed(report)
    assert "points" not in text and "AP on val2017" not in text
    assert "other classes than COCO; its accuracy, AP 71.0 % (val.json), cannot be compared" in text


def test_the_paper_is_compared_with_the_network_time_only():
    beside = speed_report(
        rows=(speed_row(), speed_row(batch=32)), paper=paper_speed("yolov7", (640, 640)), ap=0.51, ap_source="val.json"
    )
    text = describe_speed(beside)
    engine = beside.rows[0].stage("engine").p50
    (line,) = (line for line in text.splitlines() if line.startswith("network, batch 1 "))
    assert line.endswith(f"{engine * 161 / 1000:.3g}x the time")
    assert "161 images/s at batch 1 and 2.8 ms per image at batch 32" in text
    assert "no letterbox, no upload, no NMS" in text
    assert "51.0 % (val.json)" in text and "-0.2 points" in text
    assert not [line for line in text.splitlines() if line.startswith("end to end, batch") and "x the time" in line]
