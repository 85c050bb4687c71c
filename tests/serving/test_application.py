"""The Ray Serve application with two replicas: batches, errors, a replica that dies, and a model file that is replaced.

Everything runs on 127.0.0.1. Ray takes seconds to start, so these tests are slow.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.scoring.score import prepare_ray

prepare_ray(is_local=True)
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'yolov7-deploy[ray]'")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ray_proof  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MAX_BODY_MB = 0.5


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Port of the application, its model file, image files, and their detections by the Detector."""
    folder = tmp_path_factory.mktemp("serve")
    write_shapes(folder / "shapes", train=32, val=1, size=160, seed=2)
    model = folder / "model.onnx"
    ray_proof._export(model, 160)
    files = [path.read_bytes() for path in sorted((folder / "shapes" / "images" / "train").iterdir())]
    with Detector(model, device="cpu") as detector:
        expected = [detector(data).to_dict()["detections"] for data in files]
    settings = {"weights": str(model), "device": "cpu", "replicas": "2", "cpus": "1", "max_body_mb": MAX_BODY_MB}
    with ray_proof.running_application({**settings, "batch_wait_ms": "20"}) as port:
        yield port, model, files, expected


def test_many_clients_get_the_answers_of_the_detector_in_batches(served):
    port, _, files, expected = served
    replies, _ = ray_proof.send(port, files, 200)
    assert ray_proof.wrong_answers(replies, expected) == []
    assert max(reply.batch for reply in replies) > 1


def test_every_request_is_answered_while_a_replica_is_killed(served):
    port, _, files, expected = served
    replies, _ = ray_proof.send(port, files, 200, at_share=lambda: ray_proof.kill_one(ray_proof.REPLICA))
    assert ray_proof.wrong_answers(replies, expected) == []
    assert ray_proof.wait_for_health(port) == "ok"


def test_the_answer_is_the_documented_record(served):
    port, _, files, expected = served
    record = json.loads(ray_proof.post(port, "/detect?conf=0.5&max_det=3&classes=circle,square", files[0]).body)
    assert set(record) == {"path", "image_hw", "detections"}
    wanted = [one for one in expected[0] if one["score"] > 0.5 and one["class_name"] in ("circle", "square")]
    assert len(record["detections"]) == len(wanted[:3])


def test_the_page_and_the_description_are_served(served):
    port, model, _, _ = served
    status, page = ray_proof.get(port, "/")
    assert status == 200 and b"<!doctype html>" in page
    description = json.loads(ray_proof.get(port, "/model")[1])
    assert description["weights"] == model.name and description["input_hw"] == [160, 160]
    assert description["thresholds"] == {"conf": 0.25, "iou": 0.45, "max_det": 300}


@pytest.mark.parametrize(
    "path,body,status,says",
    [
        ("/detect", b"no image", 400, "not an image"),
        ("/detect", b"", 400, "The body is empty"),
        ("/detect?conf=2", None, 400, "conf must be between 0 and 1"),
        ("/detect?cnf=0.5", None, 400, "no parameter 'cnf'"),
        ("/detect?classes=unicorn", None, 400, "no class 'unicorn'"),
        ("/detect", b"x" * 600_000, 413, "more than 0.5 MB"),
        ("/", b"x", 405, "does not take POST"),
        ("/detekt", b"x", 404, "There is no page /detekt"),
    ],
)
def test_a_wrong_request_is_answered_with_the_reason(served, path, body, status, says):
    port, _, files, _ = served
    reply = ray_proof.post(port, path, files[0] if body is None else body)
    assert reply.status == status
    error = json.loads(reply.body)
    assert says in error["error"] and error["fix"]


def test_a_body_without_a_declared_size_is_limited_too(served):
    connection = http.client.HTTPConnection("127.0.0.1", served[0], timeout=60)
    connection.request("POST", "/detect", body=iter([b"x" * 100_000] * 8), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_model_file_that_is_replaced_is_noticed_and_the_old_model_stays_in_use(served):
    port, model, files, expected = served
    backup = model.with_suffix(".backup")
    shutil.copy2(model, backup)
    model.write_bytes(b"another model")
    try:
        health = json.loads(ray_proof.get(port, "/healthz")[1])
        assert (health["status"], health["file"]) == ("ok", "replaced")
        replies, _ = ray_proof.send(port, files, 32)
        assert ray_proof.wrong_answers(replies, expected) == []
    finally:
        backup.replace(model)
    assert json.loads(ray_proof.get(port, "/healthz")[1])["file"] == "unchanged"


def test_a_port_in_use_ends_the_documented_command_with_the_address(served, tmp_path):
    _, model, _, _ = served
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "serve.yaml").write_text(
            f"http_options: {{host: 127.0.0.1, port: {port}}}\n"
            "applications:\n"
            "  - name: yolov7\n"
            "    import_path: yolov7_deploy.serving:app\n"
            f"    args: {{weights: {model}, device: cpu, cpus: 1}}\n"
        )
        done = subprocess.run(
            [Path(sys.executable).with_name("serve"), "run", tmp_path / "serve.yaml"],
            capture_output=True,
            text=True,
            timeout=180,
            env={**os.environ, "RAY_ADDRESS": "local"},  # not the cluster of the fixture
            check=False,
        )
    assert done.returncode != 0
    assert f"127.0.0.1:{port}" in done.stdout + done.stderr
    assert "address already in use" in (done.stdout + done.stderr).lower()
