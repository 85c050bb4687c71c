"""Quantization-aware training: it starts from calibration, resumes bit for bit, and its files need no calibration."""

import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.small_models import fused_tiny, metadata_of
from tests.support.training_runs import (
    RecordingCallback,
    assert_same_run,
    assert_same_weights,
    load_weights,
    resume_run,
    small_request,
    train_small,
)
from yolov7_deploy.checkpoint import load_checkpoint, save_checkpoint
from yolov7_deploy.checkpoint.loader import load_quantization
from yolov7_deploy.checkpoint.quantization import TrainedQuantization, TrainedRange
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import CheckpointError, ExportError, FusionError, TrainingError, UsageError
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, ValOptions
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_cache import save_calibration
from yolov7_deploy.precision.fake_quantize import load_fake_quantized
from yolov7_deploy.precision.qat import to_trained_int8
from yolov7_deploy.training import run as training
from yolov7_deploy.training.checkpoints import QatOptions
from yolov7_deploy.training.hyperparameters import PRESETS
from yolov7_deploy.training.qat import trained_checkpoint
from yolov7_deploy.workflows.export import export_weights
from yolov7_deploy.workflows.functions import export, train

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_charts")

QAT = {"weights": str(bundled_weights()), "hyp": PRESETS["qat"], "nominal_batch": 2}


@pytest.fixture(scope="module")
def trained(data, one_torch_thread, tmp_path_factory):
    """The folder of a finished training of two epochs for CPUs."""
    folder = tmp_path_factory.mktemp("qat") / "run"
    train_small(data, folder, epochs=2, qat=QatOptions(target="cpu"), **QAT)
    return folder


def test_the_checkpoint_has_fused_weights_and_a_scale_for_every_pair(trained):
    checkpoint = load_checkpoint(trained / "last.safetensors")
    assert not checkpoint.training and checkpoint.variant == "yolov7-tiny" and "for INT8 (cpu)" in repr(checkpoint)
    assert build_model(checkpoint).fused
    quantization = checkpoint.quantization
    assert (quantization.target, quantization.reduce_range, quantization.images) == ("cpu", True, 6)
    network = load_fake_quantized(checkpoint)
    assert [one.tensor for one in quantization.ranges] == list(network.placement.pairs)
    assert set(load_weights(trained)) == {name for name in network.state_dict() if not name.startswith("quantizers.")}


def test_weights_biases_and_scales_are_trained(trained, data, tmp_path):
    start = fuse(build_model(load_checkpoint(bundled_weights()))).state_dict()
    last = load_weights(trained)
    changed = {name.rpartition(".")[2] for name in last if not torch.equal(last[name], start[name])}
    assert changed == {"weight", "bias"}
    state, _ = training.load_run_state(trained)
    before = {one.tensor: one for one in state.quantization.ranges}
    after = {one.tensor: one for one in load_quantization(trained / "last.safetensors").ranges}
    assert {name: one.zero for name, one in after.items()} == {name: one.zero for name, one in before.items()}
    moved = {name for name in after if after[name].scale != before[name].scale}
    assert len(moved) > 40
    ratios = [after[name].scale / before[name].scale for name in moved]
    assert min(ratios) > 0.8 and max(ratios) < 1.25


@pytest.mark.parametrize("target", ["cpu", pytest.param("tensorrt", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(trained, data, tmp_path, target):
    reference = trained
    if target != "cpu":
        reference = tmp_path / "uninterrupted"
        train_small(data, reference, epochs=2, qat=QatOptions(target=target), **QAT)
    folder = tmp_path / "run"
    callback = RecordingCallback({(2, 1): lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        train_small(data, folder, callback, epochs=2, qat=QatOptions(target=target), **QAT)
    assert callback.steps[-1] == (2, 2)
    resume_run(folder)
    assert_same_run(folder, reference)
    assert_same_weights(folder, reference, name="best.safetensors")
    quantization = load_quantization(folder / "last.safetensors")
    assert quantization == load_quantization(reference / "last.safetensors")


@pytest.mark.slow
def test_the_first_message_is_the_accuracy_of_calibration_alone(data, tmp_path):
    callback = RecordingCallback()
    report = train_small(data, tmp_path / "run", callback, epochs=1, qat=QatOptions(target="tensorrt"), **QAT)
    assert "quantization-aware training for tensorrt: 55 INT8 convolutions, 46 Q/DQ pairs" in callback.text
    assert "before the first epoch: AP " in callback.text
    assert report.summary().endswith("--int8")


# --- the INT8 file ----------------------------------------------------------------------------------------------------


def stored_scales(model):
    """Return the scale that each QuantizeLinear of a file reads, by tensor."""
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}
    return {
        node.input[0]: (float(values[node.input[1]]), int(values[node.input[2]]))
        for node in model.proto.graph.node
        if node.op_type == "QuantizeLinear"
    }


@pytest.mark.parametrize("options", [{}, {"input_kind": "uint8"}, {"batch": None, "simplify": False, "opset": 13}])
def test_the_file_has_the_learned_scales_and_needs_no_calibration(trained, options):
    checkpoint = load_checkpoint(trained / "last.safetensors")
    exported = export_onnx(
        build_model(checkpoint), checkpoint.metadata, ExportOptions(input_hw=(64, 96), nms="none", **options)
    )
    model = to_trained_int8(exported, checkpoint.quantization)
    scales = stored_scales(model)
    scales = {"images" if name == "scaled" else name: one for name, one in scales.items()}
    assert scales == {one.tensor: (one.scale, one.zero) for one in checkpoint.quantization.ranges}
    int8 = model.metadata.int8
    assert (int8.target, int8.method, int8.images, int8.int8_convolutions) == ("cpu", "qat", 6, 55)


def test_a_file_is_exported_and_verified_without_calibration_images(trained, tmp_path):
    report = export(trained / "last.safetensors", tmp_path / "qat.onnx", precision="int8", img=64)
    assert report.metadata.precision == "int8" and report.parity is not None
    assert "trained for INT8 from ranges by mse" in report.metadata.notes[-1]


@pytest.mark.parametrize(
    ("arguments", "problem", "fix"),
    [
        ({"precision": "fp32"}, "last.safetensors was trained for INT8; as fp32", "y7 export --int8"),
        ({"precision": "int8", "calib": "images"}, "--calib has no effect", "Leave it out"),
        ({"precision": "int8", "rounding": "gptq"}, "--rounding gptq has no effect", "Leave it out"),
        (
            {"precision": "int8", "int8_target": "tensorrt"},
            "with weights of 7 bits, not --int8-target tensorrt",
            "--qat",
        ),
        ({"precision": "int8", "reduce_range": False}, "not --full-range", "--full-range"),
        ({"precision": "int8", "engine": True}, "not --int8-target tensorrt", "--int8-target tensorrt"),
    ],
)
def test_an_export_that_contradicts_the_training_is_refused(trained, tmp_path, arguments, problem, fix):
    with pytest.raises(UsageError) as caught:
        if arguments.get("engine"):
            from yolov7_deploy.workflows.export import trained_for_int8

            trained_for_int8(trained / "last.safetensors", for_engine=True)
        else:
            export(trained / "last.safetensors", tmp_path / "x.onnx", img=64, **arguments)
    assert problem in caught.value.message and fix in caught.value.fix
    assert not (tmp_path / "x.onnx").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(data, folder, problem, error=UsageError, **changes):
    with pytest.raises(error) as caught:
        train_small(data, folder, **{"qat": QatOptions(target="cpu"), **QAT, **changes})
    assert problem in caught.value.message and caught.value.fix
    assert not folder.exists()
    return caught.value


@pytest.mark.parametrize("qat", [QatOptions(target="cpu"), None])
def test_weights_that_were_trained_for_int8_already_start_no_training(trained, data, tmp_path, qat):
    weights = str(trained / "last.safetensors")
    refused(data, tmp_path / "run", "already trained for INT8", weights=weights, qat=qat)


def test_a_calibration_of_another_model_is_refused(data, tmp_path):
    model = fused_tiny(classes=6)
    exported = export_onnx(model, metadata_of(model), ExportOptions(input_hw=(64, 64), nms="none"))
    path = tmp_path / "other.npz"
    save_calibration(calibrate(exported, [np.full((64, 64, 3), 7, np.uint8)]), path)
    qat = QatOptions(target="cpu", calib=str(path))
    refused(data, tmp_path / "run", "is a calibration of another model", qat=qat)


@pytest.mark.slow
def test_a_calibration_file_of_the_same_model_replaces_the_images(data, tmp_path):
    checkpoint = load_checkpoint(bundled_weights())
    exported = export_onnx(
        fuse(build_model(checkpoint)), checkpoint.metadata, ExportOptions(input_hw=(96, 96), nms="efficient")
    )
    dataset = open_dataset(data, split="train")
    path = tmp_path / "calibration.npz"
    from yolov7_deploy.image import read_image

    save_calibration(calibrate(exported, [read_image(dataset.path(0))]), path)
    train_small(data, tmp_path / "run", qat=QatOptions(target="cpu", calib=str(path)), **QAT)
    assert load_quantization(tmp_path / "run" / "last.safetensors").images == 1


def test_weights_without_batch_norm_of_another_program_are_refused(data, tmp_path):
    """A fused file does not say what was folded into it, so no file of another program is trusted to be right."""
    checkpoint = load_checkpoint(bundled_weights())
    fused = fuse(build_model(checkpoint))
    save_checkpoint(replace(checkpoint, tensors=fused.state_dict(), training=False), tmp_path / "fused.safetensors")
    error = refused(
        data,
        tmp_path / "run",
        "its BatchNorm layers are gone",
        CheckpointError,
        weights=str(tmp_path / "fused.safetensors"),
    )
    assert "before fusion" in error.fix
    with pytest.raises(FusionError, match="already fused"):
        fuse(fused)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weights": ""}, "--qat trains weights"),
        ({"freeze": (3,)}, "--freeze cannot be used with --qat"),
        ({"half": True}, "--half cannot be used with --qat"),
        ({"autoanchor": True}, "--autoanchor cannot be used with --qat"),
        ({"single_class": True}, "--qat keeps the classes of the weights"),
    ],
)
def test_options_that_contradict_qat_are_refused(data, tmp_path, changes, problem):
    refused(data, tmp_path / "run", problem, **changes)


@pytest.mark.parametrize(("name", "value"), [("calib", "images"), ("int8_target", "cpu"), ("reduce_range", True)])
def test_options_of_qat_without_qat_are_refused(data, name, value):
    with pytest.raises(UsageError, match=f"{name}.* has no effect without qat=True"):
        train(data, bundled_weights(), **{name: value})


@pytest.mark.slow
def test_a_scale_that_became_negative_ends_training(trained):
    checkpoint = load_checkpoint(trained / "last.safetensors")
    network = load_fake_quantized(checkpoint)
    state, _ = training.load_run_state(trained)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors["quantizers.images.scale"].fill_(-0.1)
    with pytest.raises(TrainingError, match=r"range collapsed in epoch 3: the scale of images is -0\.1"):
        trained_checkpoint(network, state, tensors)


@pytest.mark.parametrize(
    ("text", "match"),
    [("{}", "another version"), ("no JSON", "cannot be read"), ('{"schema": 1, "target": "cpu"}', "is missing")],
)
def test_a_damaged_quantization_is_refused(text, match):
    with pytest.raises(ValueError):
        TrainedQuantization.from_json(text)


def test_impossible_ranges_are_refused(trained):
    good = load_quantization(trained / "last.safetensors")
    assert TrainedQuantization.from_json(good.to_json()) == good
    for wrong in (
        {"target": "abacus"},
        {"ranges": ()},
        {"ranges": (TrainedRange(tensor="a", scale=0.0, zero=0),)},
        {"ranges": (TrainedRange(tensor="a", scale=1.0, zero=300),)},
        {"ranges": (TrainedRange(tensor="a", scale=1.0, zero=0),) * 2},
        {"amax": (("a", math.nan),)},
        {"amax": (("a", math.inf),)},
        {"amax": (("a", -1.0),)},
    ):
        with pytest.raises(ValueError):
            replace(good, **wrong)


def test_ranges_of_another_network_are_refused(trained):
    checkpoint = load_checkpoint(trained / "last.safetensors")
    exported = export_onnx(build_model(checkpoint), checkpoint.metadata, ExportOptions(input_hw=(64, 64), nms="none"))
    other = replace(checkpoint.quantization, ranges=checkpoint.quantization.ranges[:5])
    with pytest.raises(ExportError, match="of another network"):
        to_trained_int8(exported, other)
    renamed = replace(
        checkpoint.quantization, ranges=(*other.ranges, TrainedRange(tensor="\x1b[2J", scale=1.0, zero=0))
    )
    for wrong in (other, renamed):
        with pytest.raises(CheckpointError, match=r"as another network: \d+ activation ranges"):
            load_fake_quantized(replace(checkpoint, quantization=wrong))


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_file_has_the_accuracy_of_the_network_in_pytorch(tmp_path):
    """AP in ONNX Runtime and in OpenVINO, which leaves out the pairs before activations.

    Sums in another order round few values to the next integer, but each layer has more of them: on 100 images AP
    differed by 0.0013 in OpenVINO.
    """
    data = write_shapes(tmp_path / "shapes", train=8, val=100, size=320, seed=5)
    request = small_request(data, tmp_path / "run", epochs=1, img=160, qat=QatOptions(target="cpu"), **QAT)
    report = training.train(request, callback=RecordingCallback())
    export_weights(
        report.weights,
        tmp_path / "qat.onnx",
        precision="int8",
        options=ExportOptions(input_hw=(160, 160)),
        verify=False,
    )
    dataset = open_dataset(data, split="val")

    def ap(path, runtime="auto", inner_pairs=True):
        with Detector(path, device="cpu", runtime=runtime, img=160) as detector:
            if not inner_pairs:
                detector._runtime._opened._model.set_inner_pairs(enabled=False)
            return evaluate(detector, dataset, options=ValOptions(rect=False)).ap

    in_pytorch, as_openvino = ap(report.weights), ap(report.weights, inner_pairs=False)
    assert in_pytorch > 0.4
    assert ap(tmp_path / "qat.onnx", "onnxruntime") == pytest.approx(in_pytorch, abs=0.005)
    assert ap(tmp_path / "qat.onnx", "openvino") == pytest.approx(as_openvino, abs=0.005)
