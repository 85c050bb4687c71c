"""The FastAPI service answers as a Detector, refuses bad requests with 4xx, and finishes its requests at SIGTERM."""

import http.client
import json
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.detecting import SCORE_TOLERANCE
from yolov7_deploy import Detector

pytestmark = pytest.mark.slow
SCRIPT = "fastapi_service.py"
REQUESTS = 100
CLIENTS = 8
END_TIMEOUT_S = 40


@pytest.fixture(scope="module")
def environment(install):
    return install(SCRIPT)


@contextmanager
def running(environment, weights, cwd):
    """Yield the process of a service on a free port, and its address; ends it."""
    process = environment.start(
        SCRIPT, "--weights", weights, "--device", "cpu", "--port", 0, cwd=cwd, stderr=subprocess.STDOUT
    )
    reader = threading.Thread(target=process.stdout.read)  # so that the pipe is never full
    try:
        address = wait_for_address(process)
        reader.start()
        yield process, address
    finally:
        process.kill()
        process.wait()
        if reader.ident:
            reader.join()
        process.stdout.close()


def wait_for_address(process):
    """Return the address that a service prints when it is ready; fail with its output if it ends before."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
            return found[1]
    pytest.fail("".join(lines))


@pytest.fixture(scope="module")
def service(environment, shapes_onnx, tmp_path_factory):
    with running(environment, shapes_onnx, tmp_path_factory.mktemp("service")) as started:
        yield started[1]


@pytest.fixture(scope="module")
def images(shapes_images):
    return [path.read_bytes() for path in sorted(shapes_images.iterdir())]


def post(address, body, query=""):
    """Return status and decoded JSON of a request."""
    request = urllib.request.Request(f"{address}/detect{query}", data=body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_is_ready_when_it_answers(service):
    with urllib.request.urlopen(f"{service}/health", timeout=10) as response:
        assert json.load(response) == {"status": "ready", "model": "yolov7-tiny", "device": "cpu"}


def test_concurrent_requests_get_the_boxes_of_a_detector(service, images, shapes_onnx):
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda i: post(service, images[i % len(images)]), range(REQUESTS)))
    with Detector(shapes_onnx, device="cpu", runtime="onnxruntime") as detector:
        expected = [json.loads(detector(image).to_json()) for image in images]
    assert sum(len(found["detections"]) for found in expected) > 20
    for i, (status, found) in enumerate(answers):
        assert status == 200
        for ours, theirs in zip(found["detections"], expected[i % len(images)]["detections"], strict=True):
            assert ours["class_name"] == theirs["class_name"]
            assert ours["box"] == pytest.approx(theirs["box"], abs=0.05)
            assert ours["score"] == pytest.approx(theirs["score"], abs=SCORE_TOLERANCE)


def test_thresholds_and_classes_apply_to_one_request(service, images):
    everything = post(service, images[0], "?conf=0.01")[1]["detections"]
    name = everything[0]["class_name"]
    chosen = post(service, images[0], f"?conf=0.01&classes={name}")[1]["detections"]
    assert chosen == [found for found in everything if found["class_name"] == name]
    assert len(post(service, images[0])[1]["detections"]) <= len(everything)


@pytest.mark.parametrize(
    ("body", "query", "status", "text"),
    [
        (b"", "", 422, "is empty"),
        (b"not an image", "", 422, "not an image OpenCV can decode"),
        (None, "?conf=4", 400, "conf must be between 0 and 1"),
        (None, "?iou=nan", 400, "iou"),
        (None, "?max_det=0", 400, "max_det"),
        (None, "?classes=unicorn", 400, "The model has no class 'unicorn'"),
        (None, "?conf=high", 422, "valid number"),
        (b"\xff" * (33 * 2**20), "", 413, "more than 32 MiB"),
    ],
)
def test_bad_requests_are_answered_with_4xx_and_the_reason(service, images, body, query, status, text):
    found, answer = post(service, images[0] if body is None else body, query)
    assert found == status
    assert text in json.dumps(answer, ensure_ascii=False)


def test_the_service_survives_bad_requests(service, images):
    assert post(service, images[0])[0] == 200


def test_sigterm_finishes_the_running_requests_and_refuses_new_ones(environment, images, shapes_onnx, tmp_path):
    """A request whose body is half sent when the signal comes is answered."""
    with running(environment, shapes_onnx, tmp_path) as (process, address):
        host, port = address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.putrequest("POST", "/detect")
        connection.putheader("Content-Length", str(len(images[0])))
        connection.endheaders()
        connection.send(images[0][:100])
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        with pytest.raises(OSError):
            socket.create_connection((host, int(port)), timeout=5).close()
        connection.send(images[0][100:])
        response = connection.getresponse()
        assert response.status == 200 and json.load(response)["detections"]
        connection.close()
        process.wait(timeout=END_TIMEOUT_S)
        assert process.returncode in (0, -signal.SIGTERM)


def test_a_port_in_use_ends_with_a_message(environment, shapes_onnx, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, errors = environment.finish(SCRIPT, "--weights", shapes_onnx, "--port", port, cwd=tmp_path)
    assert code == 3 and "address already in use" in errors and "Traceback" not in errors  # uvicorn: startup failed


def test_missing_weights_end_with_our_message(environment, tmp_path):
    code, _, errors = environment.finish(SCRIPT, "--weights", "missing.onnx", cwd=tmp_path)
    assert code == 1 and "missing.onnx" in errors and "Traceback" not in errors
