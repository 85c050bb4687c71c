"""Requests to the Ray Serve application: settings, routes, thresholds, bodies and errors, without Ray."""

from __future__ import annotations

import asyncio
import json

import pytest

from yolov7_deploy.errors import DeviceError, ImageError, LoadError, UsageError
from yolov7_deploy.serving.requests import (
    HttpError,
    RequestThresholds,
    check_route,
    error_answer,
    parse_thresholds,
    read_body,
)
from yolov7_deploy.serving.settings import ModelFile, read_settings

SHA256 = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of "foo"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_arguments_are_texts_or_values_and_come_before_the_environment():
    environment = {"Y7_SERVE_WEIGHTS": "a.onnx", "Y7_SERVE_CONF": "0.4", "PATH": "/bin"}
    settings = read_settings({"weights": "b.onnx", "replicas": "2", "max_body_mb": 1.5, "cpus": "1"}, environment)
    assert (settings.weights, settings.conf, settings.replicas, settings.cpus) == ("b.onnx", 0.4, 2, 1.0)
    assert settings.max_body_bytes == 1_500_000
    assert settings.detector_options["conf"] == 0.4


def test_replicas_share_the_cores_of_the_machine():
    assert read_settings({"weights": "a.onnx", "replicas": 10_000}, {}).cpus == 1
    assert read_settings({"weights": "a.onnx", "device": "cuda"}, {}).gpus == 1


@pytest.mark.parametrize(
    "arguments,says",
    [
        ({}, "needs a model file"),
        ({"weigths": "a.onnx"}, "no setting 'weigths'"),
        ({"weights": "a.onnx", "conf": "2"}, "conf must be between 0 and 1"),
        ({"weights": "a.onnx", "conf": "high"}, "conf must be a number, not 'high'"),
        ({"weights": "a.onnx", "replicas": "1.5"}, "replicas must be a whole number"),
        ({"weights": "a.onnx", "replicas": "0"}, "replicas must be at least 1"),
        ({"weights": "a.onnx", "device": "cuda:1"}, "Ray chooses the GPU"),
        ({"weights": "a.onnx", "runtime": "onnx"}, "runtime onnx is unknown"),
        ({"weights": "a.onnx", "cpus": "-1"}, "must not be negative"),
    ],
)
def test_invalid_settings_are_refused(arguments, says):
    with pytest.raises(UsageError, match=says):
        read_settings(arguments, {})


# --- routes and thresholds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method,path,status", [("GET", "/detect", 405), ("POST", "/", 405), ("GET", "/etc/passwd", 404)]
)
def test_other_pages_and_methods_are_refused(method, path, status):
    with pytest.raises(HttpError) as error:
        check_route(method, path)
    assert error.value.status == status
    assert error.value.fix


def test_a_refused_method_names_the_allowed_ones():
    with pytest.raises(HttpError) as error:
        check_route("DELETE", "/detect")
    assert error.value.headers == {"allow": "POST"}


def test_thresholds_are_parameters_of_the_address():
    query = [("conf", "0.4"), ("iou", "0.5"), ("max_det", "10"), ("classes", "person,dog")]
    assert parse_thresholds(query) == RequestThresholds(conf=0.4, iou=0.5, max_det=10, classes="person,dog")
    assert parse_thresholds([]) == RequestThresholds()


@pytest.mark.parametrize(
    "query,says",
    [
        ([("cnf", "0.4")], "no parameter 'cnf'"),
        ([("conf", "0.4"), ("conf", "0.5")], "conf is given twice"),
        ([("conf", "high")], "conf must be a number"),
        ([("max_det", "1.5")], "max_det must be a whole number"),
    ],
)
def test_invalid_parameters_are_refused(query, says):
    with pytest.raises(HttpError, match=says) as error:
        parse_thresholds(query)
    assert error.value.status == 400 and error.value.fix


# --- bodies -----------------------------------------------------------------------------------------------------------


def body(parts, headers=None, max_bytes=10):
    taken = []

    async def stream():
        for part in parts:
            taken.append(part)
            yield part

    try:
        return asyncio.run(read_body(headers or {}, stream(), max_bytes=max_bytes)), taken
    except HttpError as error:
        return error, taken


def test_the_parts_of_a_body_are_joined():
    assert body([b"abc", b"", b"def"]) == (b"abcdef", [b"abc", b"", b"def"])


def test_a_body_is_refused_by_its_declared_size_before_it_is_read():
    error, taken = body([b"x" * 11], {"content-length": "11"})
    assert (error.status, taken) == (413, [])
    assert body([b"x"], {"content-length": "9" * 5000})[0].status == 413


def test_a_body_without_a_size_is_read_only_up_to_the_limit():
    error, taken = body([b"x" * 8, b"x" * 8, b"x" * 8])
    assert (error.status, len(taken)) == (413, 2)


@pytest.mark.parametrize(
    "parts,headers,status", [([], {}, 400), ([b"--x"], {"content-type": "multipart/form-data; boundary=x"}, 415)]
)
def test_empty_bodies_and_forms_are_refused_with_the_command_that_works(parts, headers, status):
    error, _ = body(parts, headers)
    assert error.status == status
    assert "--data-binary" in error.fix


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error,status",
    [
        (ImageError("no image"), 400),
        (UsageError("--conf must be a number", fix="--conf 0.25"), 400),
        (DeviceError("out of memory"), 503),
        (LoadError("gone"), 500),
        (HttpError(418, "teapot"), 418),
    ],
)
def test_an_error_is_an_answer_with_message_and_fix(error, status):
    answer = error_answer(error)
    assert answer.status == status
    assert set(json.loads(answer.body)) == {"error", "fix"}
    assert ("retry-after" in answer.headers) == (status == 503)


def test_options_in_a_message_are_parameters():
    answer = error_answer(UsageError("--conf must be a number.", fix="For example: --conf 0.25"))
    assert json.loads(answer.body) == {"error": "conf must be a number.", "fix": "For example: conf=0.25"}


# --- the model file ---------------------------------------------------------------------------------------------------


def test_a_file_that_is_replaced_while_serving_is_noticed(tmp_path, caplog):
    path = tmp_path / "model.onnx"
    path.write_text("foo")
    file = ModelFile(path, sha256=SHA256)
    assert file.state() == "unchanged"
    path.touch()
    assert file.state() == "unchanged"
    path.write_text("other")
    assert file.state() == "replaced"
    path.unlink()
    assert file.state() == "missing"
    path.write_text("foo")
    assert file.state() == "unchanged"
    assert [record.getMessage().split(" was ")[1].split(";")[0] for record in caplog.records] == ["replaced", "missing"]


def test_a_replica_refuses_a_file_that_was_replaced(tmp_path):
    (tmp_path / "model.onnx").write_text("other")
    with pytest.raises(LoadError, match="not the file that the application was started with") as error:
        ModelFile(tmp_path / "model.onnx", sha256=SHA256)
    assert "Restart the application" in error.value.fix
