"""`y7 triton`: the files of a model repository, and the errors for what cannot be served."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import struct

import numpy as np
import onnx
import pytest
from google.protobuf.text_format import ParseError
from typer.testing import CliRunner

from tests.support.model_config import parameters, parse_config
from tests.support.sample_images import noise
from tests.support.served_files import METADATA, PLAN, PLUGIN, save_engine, save_onnx
from yolov7_deploy.cli.app import app
from yolov7_deploy.deployment.served_model import label_lines
from yolov7_deploy.deployment.triton import write_triton_repository
from yolov7_deploy.deployment.triton_config import Symbol, TritonOptions, map_entries, text_format
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import LoadError, UsageError
from yolov7_deploy.image import decode_image
from yolov7_deploy.metadata import NMS_OUTPUTS, ModelMetadata

HEIGHT, WIDTH = METADATA.input_hw


def y7(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """An export with a dynamic batch."""
    return save_onnx(tmp_path_factory.mktemp("served") / "tiny.onnx")


def written(repository):
    return sorted(path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file())


def config_of(repository):
    (path,) = repository.glob("*/config.pbtxt")
    return parse_config(path.read_text())


# --- the files --------------------------------------------------------------------------------------------------------


def test_an_onnx_file_gets_the_onnx_runtime_backend(onnx_file, tmp_path):
    repository = write_triton_repository(onnx_file, tmp_path / "models")
    assert (repository.name, repository.backend, repository.max_batch) == ("tiny", "onnxruntime", 8)
    assert written(tmp_path / "models") == ["client.py", "tiny/1/model.onnx", "tiny/config.pbtxt", "tiny/labels.txt"]
    assert (tmp_path / "models/tiny/1/model.onnx").read_bytes() == onnx_file.read_bytes()
    config = config_of(tmp_path / "models")
    assert (config.name, config.backend, config.default_model_filename) == ("tiny", "onnxruntime", "model.onnx")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("images", 5, [3, HEIGHT, WIDTH])]
    assert {o.name: list(o.dims) for o in config.output} == {
        "num_dets": [1],
        "det_boxes": [300, 4],
        "det_scores": [300],
        "det_classes": [300],
    }
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert [(warmup.batch_size, list(warmup.inputs[0].value.dims)) for warmup in config.model_warmup] == [
        (1, [3, HEIGHT, WIDTH]),
        (8, [3, HEIGHT, WIDTH]),
    ]
    assert config.version_policy.latest.num_versions == 1
    assert ModelMetadata.from_json(parameters(config)["yolov7_deploy"]) == METADATA


def test_the_configuration_of_a_real_export_names_its_tensors(files, tmp_path):
    write_triton_repository(files("plugin", batch=None), tmp_path / "models", TritonOptions(name="tiny"))
    write_triton_repository(save_onnx(tmp_path / "tiny.onnx"), tmp_path / "other")
    real, expected = config_of(tmp_path / "models"), config_of(tmp_path / "other")
    assert real.input == expected.input
    assert [output.name for output in real.output] == [output.name for output in expected.output]
    assert [output.data_type for output in real.output] == [output.data_type for output in expected.output]


def test_the_options_are_in_the_configuration(onnx_file, tmp_path):
    options = TritonOptions(name="cars", max_batch=16, preferred=(16, 2), queue_delay_ms=0.5, instances=3, device="gpu")
    repository = write_triton_repository(onnx_file, tmp_path / "models", options)
    config = config_of(tmp_path / "models")
    assert (repository.name, config.name, config.max_batch_size) == ("cars", "cars", 16)
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert [(group.count, group.kind) for group in config.instance_group] == [(3, 1)]
    assert "--gpus all" in repository.command


def test_a_fixed_batch_of_one_is_served_without_batching(tmp_path):
    model = save_onnx(tmp_path / "fixed.onnx", batch=1)
    repository = write_triton_repository(model, tmp_path / "models")
    config = config_of(tmp_path / "models")
    assert (repository.max_batch, config.max_batch_size) == (1, 0)
    assert not config.HasField("dynamic_batching")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]


def test_an_engine_gets_the_tensorrt_backend_and_every_output(tmp_path):
    engine = save_engine(tmp_path / "tiny.engine", batches=(1, 4), plugin=PLUGIN, nms_by="plugin")
    repository = write_triton_repository(engine, tmp_path / "models")
    config = config_of(tmp_path / "models")
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("tensorrt", "model.plan", 4)
    assert (tmp_path / "models/tiny/1/model.plan").read_bytes() == PLAN
    # Triton refuses a plan with an output that the configuration does not name.
    assert [output.name for output in config.output] == [*NMS_OUTPUTS, "overflow"]
    assert [group.kind for group in config.instance_group] == [1]
    assert any("10.3.0.26" in note for note in repository.notes)
    assert any("--backend-config=tensorrt,plugins=" in note for note in repository.notes)


def test_a_checkpoint_gets_the_python_backend_with_a_warm_up_image(files, tmp_path):
    repository = write_triton_repository(files("torch"), tmp_path / "models", TritonOptions(name="tiny"))
    assert written(tmp_path / "models") == [
        *("client.py", "tiny/1/model.py", "tiny/1/model.safetensors"),
        *("tiny/config.pbtxt", "tiny/labels.txt", "tiny/warmup/image"),
    ]
    config = config_of(tmp_path / "models")
    assert (repository.backend, repository.max_batch) == ("python", 8)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("image", 6, [1])]
    assert config.model_warmup[1].inputs[0].value.input_data_file == "image"
    assert {key: parameters(config)[key] for key in ("weights", "conf", "max_det")} == {
        "weights": "model.safetensors",
        "conf": "0.25",
        "max_det": "300",
    }
    data = (tmp_path / "models/tiny/warmup/image").read_bytes()
    assert struct.unpack("<I", data[:4]) == (len(data) - 4,)
    assert decode_image(data[4:]).shape == (640, 640, 3)
    assert "pip install 'yolov7-deploy[export]' && tritonserver" in repository.command


def test_the_python_backend_serves_an_engine_of_any_kind_with_its_record(tmp_path):
    engine = save_engine(tmp_path / "a b.engine", thresholds=True, product="tensorrt_rtx")
    repository = write_triton_repository(engine, tmp_path / "models", TritonOptions(backend="python"))
    assert repository.name == "a_b"
    assert {"a_b/1/model.engine", "a_b/1/model.engine.json"} <= set(written(tmp_path / "models"))


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_the_client_is_valid_python_for_the_type_of_the_input(kind, tmp_path):
    write_triton_repository(save_onnx(tmp_path / "x.onnx", input_kind=kind), tmp_path / "models")
    client = (tmp_path / "models/client.py").read_text()
    ast.parse(client)
    assert "@" not in client
    assert ('"UINT8"' in client) == (kind == "uint8")
    assert ("to_network_input" in client) == (kind == "float32")
    if kind == "uint8":
        assert list(config_of(tmp_path / "models").input[0].dims) == [HEIGHT, WIDTH, 3]


def test_the_command_mounts_the_repository_whatever_its_path(onnx_file, tmp_path):
    repository = write_triton_repository(onnx_file, tmp_path / "my models; $HOME")
    words = shlex.split(repository.command)
    assert words[words.index("-v") + 1] == f"{tmp_path}/my models; $HOME:/models:ro"
    assert "--gpus" not in words
    assert words[-2:] == ["tritonserver", "--model-repository=/models"]


def test_the_same_input_gives_the_same_bytes(onnx_file, tmp_path):
    for name in ("one", "two"):
        write_triton_repository(onnx_file, tmp_path / name)
    for path in written(tmp_path / "one"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


# --- text format ------------------------------------------------------------------------------------------------------


def test_texts_of_any_characters_survive_the_text_format():
    name = 'a"b\\c\n\t\x00\x7f é 漢 \U0001f600'
    text = text_format({"name": name, "input": [{"name": name, "data_type": Symbol("TYPE_FP32"), "dims": [1, -1]}]})
    assert text.isascii()
    config = parse_config(text)
    assert (config.name, config.input[0].name, list(config.input[0].dims)) == (name, name, [1, -1])


def test_maps_and_bools_are_written_as_protobuf_reads_them():
    entries = map_entries({"a": {"zero_data": True}, "b": {"dims": []}})
    config = parse_config(text_format({"model_warmup": [{"name": "x", "inputs": entries}]}))
    values = {entry.key: entry.value.zero_data for entry in config.model_warmup[0].inputs}
    assert values == {"a": True, "b": False}


def test_the_parser_of_these_tests_refuses_unknown_fields():
    with pytest.raises(ParseError):
        parse_config('nam: "x"')


def test_labels_have_one_line_for_each_class_whatever_the_names_are():
    assert label_lines(["a b", "", "x\ny", "p;q", "\x1b[31m"]) == "a b\nclass_1\nx\\ny\np,q\n\\x1b[31m\n"


# --- what cannot be served --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,options,message,fix",
    [
        (
            {"nms": None},
            {},
            "has no NMS inside",
            "--nms plugin --dynamic-batch   or serve it as it is:  --backend python",
        ),
        ({"batch": 1}, {"max_batch": 4}, "fixed batch of 1, --max-batch 4 asks for more", "--dynamic-batch"),
        ({"batch": 4}, {}, "takes batches of at least 4", "--dynamic-batch"),
        ({"strides": (), "anchors": ()}, {}, "no metadata of this package", "--backend python"),
        ({}, {"backend": "tensorrt"}, "--backend tensorrt runs engines", "y7 build"),
        ({}, {"preferred": (4, 32)}, "--preferred-batch 32 is above the maximum batch size 8", "--preferred-batch 8"),
    ],
)
def test_an_onnx_file_that_cannot_be_served_is_refused_with_the_command_to_type(
    changes, options, message, fix, tmp_path
):
    model = save_onnx(tmp_path / "x.onnx", **changes)
    with pytest.raises((LoadError, UsageError)) as raised:
        write_triton_repository(model, tmp_path / "models", TritonOptions(**options))
    assert message in raised.value.message
    assert fix in raised.value.fix
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "engine,options,message,fix",
    [
        ({"thresholds": True}, {}, "are inputs of the engine", "y7 build --weights x.onnx --fixed-thresholds"),
        ({"product": "tensorrt_rtx"}, {}, "TensorRT-RTX", "y7 build --weights x.onnx --fixed-thresholds"),
        ({"batches": (1, 4)}, {"max_batch": 8}, "takes at most 4", "--max-batch 8 --fixed-thresholds"),
        ({"batches": (1, 1)}, {"max_batch": 8}, "fixed batch of 1", "build it again"),
        ({}, {"device": "cpu"}, "runs on a GPU", "Leave --device out"),
        ({}, {"backend": "onnxruntime"}, "runs ONNX files", "Leave --backend out"),
    ],
)
def test_an_engine_that_cannot_be_served_is_refused_with_the_command_to_type(engine, options, message, fix, tmp_path):
    path = save_engine(tmp_path / "x.engine", **engine)
    with pytest.raises((LoadError, UsageError)) as raised:
        write_triton_repository(path, tmp_path / "models", TritonOptions(**options))
    assert message in raised.value.message
    assert fix in raised.value.fix


def test_a_file_of_another_kind_is_refused(tmp_path):
    for name, content in (("x.onnx", b"hello"), ("x.engine", b"hello"), ("x.bin", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoadError):
            write_triton_repository(tmp_path / name, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_damaged_files_are_refused(tmp_path):
    """The metadata and the record promise what the file does not have."""
    model = onnx.load(save_onnx(tmp_path / "x.onnx"))
    del model.graph.output[1]
    model.graph.output.append(model.graph.input[0])
    onnx.save(model, tmp_path / "x.onnx")
    engine = save_engine(tmp_path / "x.engine", shapes=())
    for path, options in ((tmp_path / "x.onnx", {}), (engine, {}), (engine, {"backend": "python"})):
        with pytest.raises(LoadError):
            write_triton_repository(path, tmp_path / "models", TritonOptions(**options))


def test_a_file_with_a_fixed_batch_is_not_batched_by_the_python_backend(files, tmp_path):
    options = TritonOptions(backend="python", max_batch=2)
    with pytest.raises(UsageError, match="takes at most 1 images at once"):
        write_triton_repository(files("plugin"), tmp_path / "models", options)


def test_an_output_with_files_or_that_cannot_be_written_is_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/mine.txt").write_text("mine")
    for output, message in (
        (tmp_path / "models", "is not empty"),
        (tmp_path / "models/mine.txt", "is not a folder"),
        (tmp_path / "models/mine.txt/models", "mine.txt is not a folder"),
        (tmp_path / ("x" * 300), "cannot be written"),
        ("/proc/models", "cannot be written"),
    ):
        result = y7("triton", "--weights", "yolov7-tiny-shapes", "--output", output)
        assert isinstance(result.exception, UsageError), output
        assert message in result.exception.message
    assert written(tmp_path) == ["models/mine.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="is read-only"):
        write_triton_repository(tmp_path / "x.onnx", tmp_path / "models")


def test_an_empty_folder_is_used(onnx_file, tmp_path):
    (tmp_path / "models").mkdir()
    write_triton_repository(onnx_file, tmp_path / "models")
    assert (tmp_path / "models/client.py").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--backend", "openvino"], "--backend openvino is unknown"),
        (["--name", "../x"], "--name ../x is not a name"),
        (["--max-batch", "0"], "--max-batch 0 must be at least 1"),
        (["--instances", "-1"], "--instances -1 must be at least 1"),
        (["--queue-delay", "nan"], "--queue-delay nan"),
        (["--queue-delay", "-1"], "--queue-delay -1"),
        (["--preferred-batch", "0"], "--preferred-batch 0"),
        (["--preferred-batch", "4,x"], "--preferred-batch 4,x"),
        (["--device", "tpu"], "--device tpu is unknown"),
    ],
)
def test_invalid_options_are_a_usage_error(arguments, message, tmp_path):
    error = y7("triton", "--weights", "x.onnx", "--output", tmp_path / "models", *arguments).exception
    assert isinstance(error, UsageError)
    assert message in error.message


def test_the_command_prints_the_line_that_starts_the_server_and_json(onnx_file, tmp_path):
    result = y7("triton", "--weights", onnx_file, "--output", tmp_path / "models", "--json", tmp_path / "x.json")
    assert result.exit_code == 0
    assert f"{tmp_path}/models: model tiny, backend onnxruntime, batches up to 8" in result.output
    (line,) = re.findall(r"Start the server:  (docker run .*)", result.output)
    assert json.loads((tmp_path / "x.json").read_text())["command"] == line


# --- the Python backend -----------------------------------------------------------------------------------------------


def test_the_python_model_answers_requests_as_the_detector_does(files, tmp_path, python_backend):
    file = files("plugin", batch=None)
    write_triton_repository(file, tmp_path / "models", TritonOptions(name="tiny", backend="python"))
    images = [python_backend.encode(noise(90, 120, seed)) for seed in range(3)]
    model = python_backend.open(tmp_path / "models", "tiny")
    requests = [[images[0]], [images[1], b"no image"], [images[2], images[0]], []]
    responses = model.execute([python_backend.request(part) for part in requests])
    assert [bool(response.error) for response in responses] == [False, True, False, False]
    assert "image 1: " in responses[1].error.message
    with Detector(file) as detector:
        expected = [detector(image) for image in (images[2], images[0])]
    numbers, boxes, scores, classes = (responses[2].output[name] for name in NMS_OUTPUTS)
    assert numbers[:, 0].tolist() == [len(found) for found in expected]
    for row, found in enumerate(expected):
        np.testing.assert_allclose(boxes[row, : len(found)], found.boxes, atol=1e-3)
        np.testing.assert_allclose(scores[row, : len(found)], found.scores, atol=1e-5)
        assert classes[row, : len(found)].tolist() == found.class_ids.tolist()
        assert not boxes[row, len(found) :].any()
    assert [responses[3].output[name].shape[0] for name in NMS_OUTPUTS] == [0, 0, 0, 0]
    model.finalize()
