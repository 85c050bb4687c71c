"""Verification passes right exports of any network, also dense and untrained ones, and fails wrong ones."""

import contextlib
import json
import tempfile
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.support.detecting import NMS_CHOICES
from tests.support.deterministic import fill_model
from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny, fused_tiny, metadata_of, tiny
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.cli.app import app
from yolov7_deploy.errors import ParityError, UsageError
from yolov7_deploy.evaluation import verification
from yolov7_deploy.evaluation.parity import compare, comparison_thresholds, make_artifact
from yolov7_deploy.evaluation.verification import (
    ArtifactAccuracy,
    accuracy_failures,
    common_input_hw,
    verify_artifacts,
)
from yolov7_deploy.metadata import CLASS_AGNOSTIC_INPUT, CONF_INPUT, IOU_INPUT, MULTI_LABEL_INPUT
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export import nms_subgraph
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.runtimes.base import installed_runtimes, open_runtime
from yolov7_deploy.runtimes.onnxruntime import OrtRuntime
from yolov7_deploy.runtimes.pytorch import PytorchRuntime
from yolov7_deploy.workflows.export import export_weights

IMAGE = noise(*HW)


@pytest.fixture(scope="module")
def reference():
    model = fused_tiny()
    return make_artifact("torch", PytorchRuntime(model, metadata_of(model)), None, input_hw=HW)


@pytest.fixture
def parity(reference, tmp_path):
    """Return a function that compares an exported model with the network in PyTorch."""

    def run(model, images=(IMAGE,), against=reference):
        path = tmp_path / "model.onnx"
        model.save(path)
        runtime = OrtRuntime.open(path, device="cpu", input_hw=None)
        other = make_artifact("ONNX Runtime", runtime, path, input_hw=HW)
        return compare(against, other, images, thresholds=comparison_thresholds(model.metadata))

    return run


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("nms", NMS_CHOICES)
def test_every_file_is_compared_stage_by_stage_in_every_runtime(reference, tmp_path, nms, runtime):
    model, path = exported_tiny(nms=nms), tmp_path / "model.onnx"
    model.save(path)
    if runtime not in installed_runtimes(path, "cpu"):
        pytest.skip(f"{runtime} is not installed")
    with contextlib.closing(open_runtime(path, device="cpu", input_hw=None, runtime=runtime)) as opened:
        artifact = make_artifact(runtime, opened, path, input_hw=HW)
        report = compare(reference, artifact, [IMAGE], thresholds=comparison_thresholds(model.metadata))
    assert report.ok and report.compared > 0, report
    inside = [] if nms == "none" else ["nms"]
    assert [stage.stage for stage in report.stages] == ["head", "decode", *inside, "detections"]


def save(model, path, **fields):
    metadata = metadata_of(model)
    checkpoint = Checkpoint(
        tensors=model.state_dict(),
        variant=metadata.variant,
        training=False,
        class_names=metadata.class_names,
        anchors=model.anchors,
        **fields,
    )
    save_checkpoint(checkpoint, path)
    return path


# --- right files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nms", "classes", "options"),
    [
        ("plugin", 5, {}),
        ("plugin", 5, {"multi_label": True}),
        ("plugin", 5, {"class_agnostic": True}),
        ("plugin", 1, {}),
        ("standard", 5, {}),
        ("efficient", 5, {}),
        ("efficient", 5, {"multi_label": True}),
        ("efficient", 1, {}),
        ("none", 5, {}),
        ("none", 1, {}),
    ],
    ids=str,
)
def test_a_right_export_of_a_dense_network_passes(parity, nms, options, classes):
    model = fused_tiny(classes)
    against = make_artifact("torch", PytorchRuntime(model, metadata_of(model)), None, input_hw=HW)
    report = parity(exported_tiny(classes, nms=nms, **options), against=against)
    assert report.ok, report
    assert report.compared >= 50 and report.first_failure is None
    expected = ["head", "decode", "detections"] if nms == "none" else ["head", "decode", "nms", "detections"]
    assert [stage.stage for stage in report.stages] == expected


@pytest.mark.parametrize("nms", ["plugin", "none"])
def test_a_right_fp16_export_of_a_dense_network_passes(parity, nms):
    report = parity(to_fp16(exported_tiny(nms=nms), [IMAGE]))
    assert report.ok and report.compared == 300, report


@pytest.mark.parametrize(("nms", "precision"), [("none", "fp32"), ("plugin", "fp16"), ("efficient", "fp32")])
def test_a_right_export_of_saturated_scores_passes(tmp_path, nms, precision):
    """With these weights most scores are 0 or 1, so hundreds of boxes are tied."""
    weights = save(fill_model(new_model("yolov7-tiny", classes=3)), tmp_path / "w.safetensors")
    options = ExportOptions(input_hw=HW, nms=nms)
    report = export_weights(weights, tmp_path / "m.onnx", options=options, precision=precision)
    assert report.parity.ok and report.parity.compared >= 100


# --- wrong files ------------------------------------------------------------------------------------------------------


def with_constant(model, name, value):
    """Return a file whose NMS reads a constant instead of an input."""
    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([value], np.float32), "wrong"))
    node = next(node for node in proto.graph.node if name in node.input)
    node.input[:] = ["wrong" if entry == name else entry for entry in node.input]
    return OnnxModel.of(proto, model.metadata)


@pytest.mark.parametrize("convert", [lambda model: model, lambda model: to_fp16(model, [IMAGE])], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "value"),
    [(IOU_INPUT, 0.55), (IOU_INPUT, 0.35), (CLASS_AGNOSTIC_INPUT, 1), (MULTI_LABEL_INPUT, 1), (CONF_INPUT, 0.999)],
)
def test_nms_with_another_rule_fails(parity, name, value, convert):
    report = parity(with_constant(convert(exported_tiny(nms="plugin")), name, value))
    assert report.first_failure.stage == "nms", report


def centre_and_size(writer, center, size, *, axis):
    return writer.node("Concat", center, size, axis=axis)


def x_and_y_swapped(writer, center, size, *, axis):
    half = writer.node("Mul", size, writer.constant(0.5, "half"))
    low, high = writer.node("Sub", center, half), writer.node("Add", center, half)
    parts = [writer.slice(low, axis, 1, 2), writer.slice(low, axis, 0, 1), high]
    return writer.node("Concat", *parts, axis=axis)


def full_size_as_half(writer, center, size, *, axis):
    return writer.node("Concat", writer.node("Sub", center, size), writer.node("Add", center, size), axis=axis)


def shifted(writer, center, size, *, axis):
    half = writer.node("Mul", size, writer.constant(0.5, "half"))
    one = writer.node("Add", center, writer.constant(1.0, "one"))
    return writer.node("Concat", writer.node("Sub", one, half), writer.node("Add", one, half), axis=axis)


@pytest.mark.parametrize("corners", [centre_and_size, x_and_y_swapped, full_size_as_half, shifted])
def test_nms_with_wrong_box_corners_fails(parity, monkeypatch, corners):
    monkeypatch.setattr(nms_subgraph, "corners", corners)
    model = fused_tiny()
    wrong = export_onnx(model, metadata_of(model), ExportOptions(input_hw=HW))
    assert parity(wrong).first_failure.stage == "nms"


def with_weights(change):
    """Export the network with changed weights."""
    model = tiny()
    with torch.no_grad():
        change(model)
    return export_onnx(fuse(model), metadata_of(model), ExportOptions(input_hw=HW))


def swap_input_channels(model):
    model.model[0].conv.weight.copy_(model.model[0].conv.weight.flip(1))


def swap_classes(model):
    for layer in model.head.m:
        rows = layer.weight.reshape(3, 10, *layer.weight.shape[1:])
        rows[:, [5, 6]] = rows[:, [6, 5]].clone()


def swap_width_and_height(model):
    for layer in model.head.m:
        rows = layer.weight.reshape(3, 10, *layer.weight.shape[1:])
        rows[:, [2, 3]] = rows[:, [3, 2]].clone()


@pytest.mark.parametrize("change", [swap_input_channels, swap_classes, swap_width_and_height])
def test_swapped_channels_fail(parity, change):
    assert parity(with_weights(change)).first_failure.stage == "head"


def test_swapped_anchors_of_two_heads_fail(parity):
    model, metadata = fused_tiny(), metadata_of(fused_tiny())
    wrong = replace(metadata, anchors=(metadata.anchors[1], metadata.anchors[0], metadata.anchors[2]))
    exported = export_onnx(model, wrong, ExportOptions(input_hw=HW))
    assert parity(exported).first_failure.stage == "decode"


def test_a_file_that_finds_nothing_fails(parity):
    silent = with_constant(exported_tiny(nms="plugin"), CONF_INPUT, 1)
    report = parity(silent)
    assert not report.ok and report.first_failure.stage == "nms"
    assert report.stages[-1].differences["missing"] > 0


# --- nothing to compare -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained():
    """A network as a training begins: no score is above 0.01."""
    torch.manual_seed(0)
    return new_model("yolov7-tiny", classes=3)


def test_conf_is_lowered_until_there_are_detections(untrained, tmp_path):
    weights = save(untrained, tmp_path / "w.safetensors")
    report = export_weights(weights, tmp_path / "m.onnx", options=ExportOptions(input_hw=HW)).parity
    assert report.ok and report.verified and report.compared > 0
    assert 0 < report.conf < 0.01


@pytest.mark.parametrize("multi_label", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_fixed_conf_is_lowered_in_a_copy_of_the_file(untrained, tmp_path, monkeypatch, multi_label):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    weights = save(untrained, tmp_path / "w.safetensors")
    options = ExportOptions(input_hw=HW, nms="efficient", multi_label=multi_label)
    report = export_weights(weights, tmp_path / "m.onnx", options=options).parity
    assert report.ok and report.compared > 0 and 0 < report.conf < 0.01
    assert OnnxModel.load(tmp_path / "m.onnx").metadata.nms.conf == 0.25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "w.safetensors"]


@pytest.fixture(scope="module")
def nothing_found(tmp_path_factory):
    """Folder with weights whose scores are all 0 and their export, and the result of the command."""
    folder = tmp_path_factory.mktemp("nothing")
    model = new_model("yolov7-tiny", classes=3)
    for layer in model.head.m:
        torch.nn.init.constant_(layer.bias, -1e4)
    weights = save(model, folder / "w.safetensors")
    arguments = ["export", "--weights", str(weights), "--img", f"{HW[0]}x{HW[1]}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, CliRunner().invoke(app, [*arguments, "--json", "record.json"])


def test_an_export_without_any_detection_is_called_not_verified(nothing_found):
    folder, result = nothing_found
    assert result.exception is None and (folder / "w.onnx").exists()
    assert "NOT VERIFIED: torch detects nothing on the image" in result.output
    assert "against torch on" not in result.output and "--image FILE" in result.output
    parity = json.loads((folder / "record.json").read_text())["parity"]
    assert (parity["verified"], parity["ok"], parity["compared"]) == (False, False, 0)


def test_verify_fails_if_nothing_can_be_compared(nothing_found, tmp_path):
    folder, _ = nothing_found
    files = ["-w", str(folder / "w.safetensors"), "--against", str(folder / "w.onnx")]
    result = CliRunner().invoke(app, ["verify", *files, "--json", str(tmp_path / "verify.json")])
    assert isinstance(result.exception, ParityError)
    assert "NOT VERIFIED" in result.output and "NOT VERIFIED" in result.exception.message
    assert "within their limits" not in result.output
    assert "--images" in result.exception.fix and "--data" in result.exception.fix
    document = json.loads((tmp_path / "verify.json").read_text())
    assert (document["ok"], document["verified"]) == (False, False)


def test_an_ap_of_zero_verifies_nothing():
    rows = [ArtifactAccuracy(weights=name, precision="fp32", ap=0.0, ap50=0.0) for name in ("a.pt", "b.onnx")]
    assert "NOT VERIFIED: a.pt has AP 0" in accuracy_failures(rows, 0.3)[0]
    found = [replace(row, ap=0.5) for row in rows]
    assert accuracy_failures(found, 0.3) == []


def test_a_limit_without_images_is_refused(files):
    with pytest.raises(UsageError, match="limit=0"):
        verify_artifacts(files(), [files("plugin")], limit=0)


# --- input size -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_compared_at_their_training_size(tmp_path):
    model = tiny()
    trained = save(model, tmp_path / "trained.safetensors", training_size=96)
    torch.save({"model": model.state_dict()}, tmp_path / "same.pt")
    sizes = []
    for order in ([trained, tmp_path / "same.pt"], [tmp_path / "same.pt", trained]):
        report = verify_artifacts(order[0], [order[1]]).reports[0]
        assert report.verified
        sizes.append(next(stage.note for stage in report.stages if stage.stage == "decode"))
    assert sizes == [f"{3 * (12**2 + 6**2 + 3**2)} boxes"] * 2


def test_a_fixed_size_is_preferred_to_a_training_size():
    plain = metadata_of(fused_tiny())
    trained, fixed = replace(plain, training_size=96), replace(plain, input_hw=HW)
    assert common_input_hw([plain, plain]) == (640, 640)
    assert common_input_hw([plain, trained]) == common_input_hw([trained, plain]) == (96, 96)
    assert common_input_hw([trained, fixed]) == HW


def test_a_size_that_does_not_suit_the_checkpoint_is_refused(files, tmp_path):
    model = exported_tiny(nms="none")
    odd = replace(model.metadata, input_hw=(100, 100), heads=())
    weights, path = files(), tmp_path / "odd.onnx"
    onnx.save(odd_network(100), path)
    OnnxModel.of(onnx.load(path), odd).save(path)
    with pytest.raises(UsageError, match="cannot run at 100x100"):
        verify_artifacts(weights, [path])


def odd_network(side):
    """Return a network with an input of any size that detects nothing."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, side, side])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 8, 10])
    zeros = numpy_helper.from_array(np.zeros((1, 8, 10), np.float32), "zeros")
    mean = helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0)
    add = helper.make_node("Add", ["zeros", "mean"], ["output"])
    graph = helper.make_graph([mean, add], "odd", [images], [output], initializer=[zeros])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_the_runtimes_of_a_comparison_are_closed(files, monkeypatch):
    opened, original = [], verification.open_runtime
    monkeypatch.setattr(verification, "open_runtime", lambda *a, **k: opened.append(original(*a, **k)) or opened[-1])
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(verification, "compare", lambda *_, **__: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            verification.compare_stages(files("plugin"), verification.Run(files("none")), [], "cpu")
    assert len(opened) == 4
    for runtime in opened:
        with pytest.raises(UsageError, match="closed"):
            runtime._session.get()
