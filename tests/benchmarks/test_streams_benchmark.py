"""The proof of many cameras with one model: its verdicts, and in the slow suite the proof itself, in a short form."""

from __future__ import annotations

import argparse
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from yolov7_deploy import Detector, export

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mjpeg_server
import streams

GOOD = {
    "ratio": 0.97,
    "unfairness": 0.02,
    "queue_age_ms": {"p50": 40.0, "max": 120.0},
    "dead_camera": {"its_state": "running"},
    "long_run": {"memory_growth": 0.001, "states": ["running"]},
}


def test_a_good_result_has_no_failures():
    assert streams.failures(GOOD) == []
    assert streams.failures({name: value for name, value in GOOD.items() if name != "long_run"}) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ratio": 0.89}, "ratio"),
        ({"unfairness": 0.11}, "unfairness"),
        ({"queue_age_ms": {"max": 1001.0}}, "older than the limit"),
        ({"dead_camera": {"its_state": "lost"}}, "did not come back"),
        ({"long_run": {"memory_growth": 0.03, "states": ["running"]}}, "memory grew"),
        ({"long_run": {"memory_growth": 0.001, "states": ["lost", "running"]}}, "did not come back"),
    ],
)
def test_each_claim_can_fail(changed, message):
    (failure,) = streams.failures({**GOOD, **changed})
    assert message in failure


def test_a_camera_whose_rate_falls_sends_its_next_frame_after_the_new_interval():
    camera = mjpeg_server.Camera([b"frame"], fps=100)
    with urllib.request.urlopen(camera.address, timeout=5) as stream:
        read_frames(stream, 50)
        camera.set_fps(4)
        begin = time.perf_counter()
        read_frames(stream, 3)
        assert 0.4 < time.perf_counter() - begin < 3  # 2 to 3 intervals, and not those of 50 frames at the new rate
    camera.stop()


def read_frames(stream, count):
    for _ in range(count):
        while not stream.readline().startswith(b"--"):
            pass


def sample(minute, memory_mb):
    return streams.Sample(
        seconds=60.0 * minute,
        memory_mb=memory_mb,
        threads=40,
        files=60,
        frames=100,
        queue_age_s=0.1,
        rate=8.0,
        cores=0.2,
    )


def block(rate, cores):
    return streams.Run(frames=[round(10 * rate)], seconds=10.0, cores=cores, batches=1)


@pytest.mark.parametrize(
    ("bare", "offered", "ratio"), [(100.0, 125.0, 0.95), (150.0, 100.0, 0.95), (190.0, 200.0, 0.5)]
)
def test_the_ratio_is_to_what_the_cameras_offer_if_the_loop_is_faster(bare, offered, ratio):
    one = streams.Round(alone=100.0, fps=10.0, offered=offered, streams=block(95.0, 1.9), bare=block(bare, 1.9))
    assert one.ratio == pytest.approx(ratio)
    assert one.streams.cpu_ms == pytest.approx(20)


def test_the_slope_of_the_memory_leaves_out_the_start():
    growing = [sample(minute, 300.0 if minute < 2 else 400.0 + minute) for minute in range(11)]
    found = streams.summarize(growing)
    assert found["memory_slope_mb_per_hour"] == pytest.approx(60)
    assert found["memory_growth"] == pytest.approx(8 / 402, abs=1e-4)
    assert found["memory_mb"][:3] == [300.0, 300.0, 402.0] and found["seconds"][-1] == 600
    assert streams.summarize([sample(minute, 400.0) for minute in range(11)])["memory_growth"] == 0


def test_the_number_of_a_frame_survives_jpeg():
    import cv2
    import numpy as np

    for number, data in enumerate(mjpeg_server.make_frames((48, 64))):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert mjpeg_server.read_number(image) == number


@pytest.mark.slow
def test_sixteen_cameras_share_one_model_at_the_speed_of_a_bare_loop(tmp_path):
    export("yolov7-tiny-shapes", tmp_path / "shapes.onnx", img=192, batch=None)
    options = argparse.Namespace(cameras=16, height=240, width=320, rounds=5, block_s=10.0, minutes=3.0, long_fps=0.0)
    with Detector(tmp_path / "shapes.onnx", device="cpu", runtime="onnxruntime") as detector:
        result = streams.measure(options, detector)
    assert streams.failures(result) == [], result
