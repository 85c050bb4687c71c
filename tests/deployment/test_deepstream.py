"""`y7 deepstream`: the files of an application, the parser in C++, and the errors for what nvinfer cannot run."""

from __future__ import annotations

import configparser
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.served_files import METADATA, PLAN, PLUGIN, save_engine, save_onnx
from yolov7_deploy.cli.app import app
from yolov7_deploy.deployment.deepstream import ASSETS, write_deepstream
from yolov7_deploy.errors import LoadError, UsageError
from yolov7_deploy.metadata import NMS_OUTPUTS
from yolov7_deploy.options import DeepStreamOptions

HEADERS = Path(__file__).parent.parent / "fakes" / "deepstream"
DRIVER = Path(__file__).parent / "parser_driver.cpp"
RELEASES = {"7.1": 71, "9.1": 91}
# Keys of the group [property], as gstnvinfer_property_parser.h of DeepStream 9.1 spells them.
KEYS = {
    *("gpu-id", "gie-unique-id", "process-mode", "network-type", "network-mode", "batch-size", "onnx-file"),
    *("model-engine-file", "infer-dims", "net-scale-factor", "model-color-format", "maintain-aspect-ratio"),
    *("symmetric-padding", "scaling-filter", "num-detected-classes", "labelfile-path", "output-blob-names"),
    *("custom-lib-path", "parse-bbox-func-name", "cluster-mode"),
}
FILES = ["Makefile", "config_infer.txt", "config_tracker.yml", "labels.txt", "run.sh", "yolov7_parser.cpp"]


def y7(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def config_of(folder):
    parser = configparser.ConfigParser()
    parser.read(folder / "config_infer.txt")
    return {section: dict(parser[section]) for section in parser.sections()}


# --- the files --------------------------------------------------------------------------------------------------------


def test_an_onnx_file_becomes_an_application(tmp_path):
    model = save_onnx(tmp_path / "x.onnx")
    write_deepstream(model, tmp_path / "app", DeepStreamOptions(streams=4))
    assert names(tmp_path / "app") == sorted([*FILES, "model.onnx"])
    config = config_of(tmp_path / "app")
    properties = config["property"]
    assert set(properties) <= KEYS
    assert properties["infer-dims"] == "3;128;192"
    assert float(properties["net-scale-factor"]) == 1 / 255
    assert properties["output-blob-names"].split(";") == list(NMS_OUTPUTS)
    assert {key: properties[key] for key in ("batch-size", "network-mode", "cluster-mode", "num-detected-classes")} == {
        "batch-size": "4",
        "network-mode": "0",
        "cluster-mode": "4",
        "num-detected-classes": "5",
    }
    assert (properties["onnx-file"], properties["model-engine-file"]) == (
        "model.onnx",
        "model.onnx_b4_gpu0_fp32.engine",
    )
    assert config["class-attrs-all"] == {"pre-cluster-threshold": "0.25"}
    assert (tmp_path / "app/model.onnx").read_bytes() == model.read_bytes()
    assert (tmp_path / "app/labels.txt").read_text().splitlines() == list(METADATA.class_names)


def test_an_engine_is_opened_as_it_is(tmp_path):
    engine = save_engine(tmp_path / "x.engine", batches=(1, 8), plugin=PLUGIN, nms_by="plugin")
    application = write_deepstream(engine, tmp_path / "app", DeepStreamOptions(streams=8, conf=0.5))
    properties = config_of(tmp_path / "app")["property"]
    assert properties["model-engine-file"] == "model.engine"
    assert "onnx-file" not in properties
    assert (tmp_path / "app/model.engine").read_bytes() == PLAN
    assert config_of(tmp_path / "app")["class-attrs-all"] == {"pre-cluster-threshold": "0.5"}
    assert "minDetectorConfidence: 0.5\n" in (tmp_path / "app/config_tracker.yml").read_text()
    assert any("export Y7_PLUGIN=" in note for note in application.notes)


def test_a_file_with_a_fixed_batch_keeps_it(tmp_path):
    model = save_onnx(tmp_path / "x.onnx", batch=4)
    write_deepstream(model, tmp_path / "app", DeepStreamOptions(streams=2))
    assert config_of(tmp_path / "app")["property"]["batch-size"] == "4"


def test_no_placeholder_is_left(tmp_path):
    write_deepstream(save_onnx(tmp_path / "x.onnx"), tmp_path / "app")
    for name in FILES:
        text = (tmp_path / "app" / name).read_text()
        assert not {"@CONF@", "@MAX_DET@", "@STREAMS@"} & set(text.split()), name
        assert "@STREAMS" not in text


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture
def application(tmp_path):
    """An application for three streams, with a compiled parser, and a `gst-launch-1.0` that prints its arguments."""
    write_deepstream(save_onnx(tmp_path / "x.onnx"), tmp_path / "my app", DeepStreamOptions(streams=3))
    (tmp_path / "my app/libyolov7_parser.so").touch()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/gst-launch-1.0"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    return tmp_path / "my app"


def run(application, *uris, **variables):
    environment = {**os.environ, "PATH": f"{application.parent}/bin:{os.environ['PATH']}", **variables}
    command = ["sh", str(application / "run.sh"), *uris]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("count", [1, 3])
def test_the_pipeline_has_every_stream_and_its_name_unchanged(application, count):
    uris = [f"rtsp://user:pa ss'\"*@camera{number}/a?b=$HOME&c=!" for number in range(count)]
    words = run(application, *uris).stdout.splitlines()
    assert words[:2] == ["-e", "nvstreammux"]
    assert [word.removeprefix("uri=") for word in words if word.startswith("uri=")] == uris
    assert [word for word in words if word.startswith("mux.sink_")] == [f"mux.sink_{number}" for number in range(count)]
    assert f"batch-size={count}" in words
    assert f"config-file-path={application}/config_infer.txt" in words
    assert f"ll-config-file={application}/config_tracker.yml" in words
    assert words.count("nvurisrcbin") == count


def test_the_last_element_can_be_chosen(application):
    words = run(application, "file:///video.mp4", SINK="fakesink sync=0").stdout.splitlines()
    assert words[words.index("nvdsosd") + 1 :][:3] == ["!", "fakesink", "sync=0"]


def test_no_streams_too_many_and_a_missing_parser_are_errors(application):
    assert run(application).returncode == 2
    assert "1 to 3 streams" in run(application, *["rtsp://x"] * 4).stderr
    (application / "libyolov7_parser.so").unlink()
    missing = run(application, "rtsp://x")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert f"make -C {application}" in missing.stderr


# --- the parser -------------------------------------------------------------------------------------------------------


def compile_driver(folder, release):
    """Compile the parser and its tests with both sanitizers, against the headers of a release."""
    program = folder / f"driver-{release}"
    sources = [str(ASSETS / "yolov7_parser.cpp"), str(DRIVER)]
    options = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", f"-DDEEPSTREAM={RELEASES[release]}"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["g++", *options, *sanitizers, f"-I{HEADERS}", "-o", str(program), *sources]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs g++")
    return program


def drive(program, iterations, seed, **variables):
    command = [str(program), str(iterations), str(seed)]
    environment = {**os.environ, **variables}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (ran.returncode, ran.stdout) == (0, "passed\n"), ran.stderr
    return ran.stderr


def test_the_parser_reads_nothing_outside_of_its_tensors(tmp_path):
    program = compile_driver(tmp_path, "9.1")
    drive(program, 20_000, 0)
    drive(program, 1, 0, Y7_PLUGIN="/opt/liby7_plugin.so")  # it asks TensorRT to load this plugin


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_the_parser_survives_millions_of_random_tensors(release, tmp_path):
    program = compile_driver(tmp_path, release)
    for seed in range(4):
        drive(program, 500_000, seed)


@pytest.mark.slow
def test_the_makefile_compiles_the_parser_with_the_headers_of_deepstream(tmp_path):
    write_deepstream(save_onnx(tmp_path / "x.onnx"), tmp_path / "app")
    (tmp_path / "sdk/sources").mkdir(parents=True)
    (tmp_path / "sdk/sources/includes").symlink_to(HEADERS)
    library = tmp_path / "libnvinfer.so"
    subprocess.run(["gcc", "-shared", "-o", str(library), "-x", "c", "/dev/null"], check=True)
    variables = [f"DEEPSTREAM={tmp_path}/sdk", f"LDFLAGS=-L{tmp_path}", "CXXFLAGS=-O2 -DDEEPSTREAM=91 -Werror"]
    subprocess.run(["make", "-C", str(tmp_path / "app"), *variables], check=True, capture_output=True, text=True)
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(tmp_path / "app/libyolov7_parser.so")], capture_output=True, text=True
    )
    assert "T NvDsInferParseYolov7\n" in symbols.stdout


# --- what nvinfer cannot run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,streams,message,fix",
    [
        ({"nms": None}, 1, "has no NMS inside", "--nms plugin --dynamic-batch"),
        ({"batch": 1}, 2, "fixed batch of 1, --streams 2 asks for more", "--dynamic-batch"),
        ({"input_kind": "uint8"}, 1, "takes uint8 images", "--input float32 --dynamic-batch"),
        ({"precision": "fp16"}, 1, "is fp16", "y7 build --weights"),
        ({"strides": (), "anchors": ()}, 1, "no metadata of this package", "y7 export"),
    ],
)
def test_a_file_that_nvinfer_cannot_run_is_refused_with_the_command_to_type(changes, streams, message, fix, tmp_path):
    model = save_onnx(tmp_path / "x.onnx", **changes)
    with pytest.raises((LoadError, UsageError)) as raised:
        write_deepstream(model, tmp_path / "app", DeepStreamOptions(streams=streams))
    assert message in raised.value.message
    assert fix in raised.value.fix
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize(
    "engine,streams,message,fix",
    [
        ({"thresholds": True}, 1, "are inputs of the engine", "--fixed-thresholds"),
        ({"product": "tensorrt_rtx"}, 1, "TensorRT-RTX", "--fixed-thresholds"),
        ({"batches": (1, 4)}, 5, "takes at most 4, --streams 5 asks for more", "--max-batch 5 --fixed-thresholds"),
    ],
)
def test_an_engine_that_nvinfer_cannot_run_is_refused(engine, streams, message, fix, tmp_path):
    path = save_engine(tmp_path / "x.engine", **engine)
    with pytest.raises((LoadError, UsageError)) as raised:
        write_deepstream(path, tmp_path / "app", DeepStreamOptions(streams=streams))
    assert message in raised.value.message
    assert fix in raised.value.fix


def test_a_checkpoint_is_refused_with_the_export(tmp_path):
    error = y7("deepstream", "--weights", "yolov7-tiny-shapes", "--output", tmp_path / "app").exception
    assert isinstance(error, LoadError)
    assert "--dynamic-batch" in error.fix


@pytest.mark.parametrize("arguments", [["--streams", "0"], ["--streams", "2000"], ["--conf", "1.5"], ["--conf", "nan"]])
def test_invalid_options_are_a_usage_error(arguments, tmp_path):
    error = y7("deepstream", "--weights", "x.onnx", "--output", tmp_path / "app", *arguments).exception
    assert isinstance(error, UsageError)


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/mine").touch()
    error = y7("deepstream", "--weights", "yolov7-tiny-shapes", "--output", tmp_path / "app").exception
    assert isinstance(error, UsageError)
    assert names(tmp_path / "app") == ["mine"]


def test_the_command_prints_what_to_type_next(tmp_path):
    model = save_onnx(tmp_path / "x.onnx")
    result = y7("deepstream", "--weights", model, "--output", tmp_path / "app", "--streams", "2")
    assert result.exit_code == 0
    assert f"  make -C {tmp_path}/app\n" in result.output
    assert f"  sh {tmp_path}/app/run.sh rtsp://CAMERA1 rtsp://CAMERA2\n" in result.output
