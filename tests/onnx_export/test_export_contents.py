"""Metadata and nodes of exported files, models and options that are refused, and writing of files."""

import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.support.detecting import (
    CONF,
    IOU,
    NMS_CHOICES,
    NMS_INSIDE,
    NMS_OPTIONS,
    RAW_TOLERANCE,
)
from tests.support.deterministic import fill_model
from tests.support.small_models import HW, exported_tiny, fused_tiny, images, metadata_of, session
from yolov7_deploy.errors import ExportError, LoadError, UsageError
from yolov7_deploy.metadata import METADATA_KEY, NMS_OUTPUTS, THRESHOLD_INPUTS, ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export.nms import OVERFLOW
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions

# --- contents of the file ---------------------------------------------------------------------------------------------


def test_properties_of_other_programs_are_kept():
    model = exported_tiny()
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    helper.set_model_props(proto, {"names": "{0: 'thing'}"})
    for _ in range(2):
        properties = {entry.key: entry.value for entry in OnnxModel.of(proto, model.metadata).proto.metadata_props}
        assert properties == {"names": "{0: 'thing'}", METADATA_KEY: model.metadata.to_json()}


@pytest.mark.parametrize("nms", NMS_CHOICES)
def test_the_same_export_twice_gives_the_same_bytes(nms):
    model = fused_tiny()
    options = ExportOptions(input_hw=HW, nms=nms)
    first, second = (export_onnx(model, metadata_of(model), options).proto for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_export_does_not_modify_the_model():
    model = fuse(fill_model(new_model("yolov7-tiny", classes=2)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, metadata_of(model), ExportOptions(input_hw=HW))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("nms", NMS_CHOICES)
def test_the_file_contains_the_metadata(nms, tmp_path):
    model = exported_tiny(
        nms=nms, batch=None, conf=CONF, iou=IOU, opset=15, max_det=70, multi_label=True, class_agnostic=True
    )
    model.save(tmp_path / "m.onnx")
    loaded = OnnxModel.load(tmp_path / "m.onnx")
    metadata = loaded.metadata
    assert metadata == model.metadata
    assert loaded.proto == model.proto
    assert (metadata.variant, metadata.input_hw, metadata.batch, metadata.opset) == ("yolov7-tiny", HW, None, 15)
    assert metadata.class_names == metadata_of(fused_tiny()).class_names
    assert metadata.anchors == fused_tiny().anchors
    if nms == "none":
        assert metadata.nms is None
        return
    assert (metadata.nms.kind, metadata.nms.conf, metadata.nms.iou, metadata.nms.max_det) == (nms, CONF, IOU, 70)
    assert (metadata.nms.multi_label, metadata.nms.class_agnostic) == (True, True)
    assert metadata.nms.runtime_thresholds == (nms != "efficient")


@pytest.mark.parametrize("nms", NMS_INSIDE)
def test_the_metadata_records_multi_label(nms):
    assert exported_tiny(nms=nms, conf=CONF, iou=IOU, multi_label=False).metadata.nms.multi_label is False


@pytest.mark.parametrize("simplify", [True, False])
def test_the_heads_named_in_the_metadata_are_the_raw_head_maps(simplify):
    model = exported_tiny(nms="plugin", simplify=simplify)
    graph = onnx.ModelProto()
    graph.CopyFrom(model.proto)
    graph.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in model.metadata.heads
    )
    maps = session(graph).run(list(model.metadata.heads), {"images": images()})
    with torch.no_grad():
        net = fused_tiny()
        expected = net.head.maps(net.features(torch.from_numpy(images())))
    assert [m.shape for m in maps] == [(1, 30, HW[0] // s, HW[1] // s) for s in (8, 16, 32)]
    for ours, raw in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours, raw.numpy(), atol=RAW_TOLERANCE * max(1, raw.std().item()))


@pytest.mark.parametrize("nms, domain, op", [("plugin", "y7", "Y7NMS"), ("efficient", "TRT", "EfficientNMS_TRT")])
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_the_nms_node_is_a_function_that_a_tensorrt_plugin_can_replace(nms, domain, op, opset):
    proto = exported_tiny(nms=nms, opset=opset, batch=None, conf=CONF, iou=IOU).proto
    node = proto.graph.node[-1]
    (body,) = proto.functions
    assert (node.domain, node.op_type) == (body.domain, body.name) == (domain, op)
    assert domain in {entry.domain for entry in proto.opset_import}
    assert list(node.output) == [*NMS_OUTPUTS, *([OVERFLOW] if nms == "plugin" else [])]
    assert [output.name for output in proto.graph.output] == list(NMS_OUTPUTS)
    assert proto.ir_version >= 8
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["plugin_version"], attributes["plugin_namespace"]) == (b"1", b"")
    assert {a.type for a in node.attribute if not a.name.startswith("plugin_")} <= {
        onnx.AttributeProto.INT,
        onnx.AttributeProto.INTS,
        onnx.AttributeProto.FLOAT,
        onnx.AttributeProto.FLOATS,
    }
    assert set(body.attribute) == set(attributes)
    assert [(entry.domain, entry.version) for entry in body.opset_import] == [("", opset)]


@pytest.mark.parametrize("nms", ["plugin", "efficient"])
def test_every_name_inside_the_function_has_the_prefix(nms):
    (body,) = exported_tiny(nms=nms, conf=CONF, iou=IOU).proto.functions
    names = {*body.input, *body.output, *names_in(body.node)}
    assert len(names) > 50
    assert {name for name in names if not name.startswith("y7nms__")} == set()


def names_in(nodes):
    """Yield every tensor and node name of nodes and of their subgraphs."""
    for node in nodes:
        yield from (name for name in (node.name, *node.input, *node.output) if name)
        for attribute in node.attribute:
            inner = attribute.g
            yield from (value.name for value in (*inner.input, *inner.output, *inner.initializer))
            yield from names_in(inner.node)


@pytest.mark.parametrize("nms", ["none", "standard"])
def test_without_a_function_all_operators_are_standard(nms):
    proto = exported_tiny(nms=nms, conf=CONF, iou=IOU).proto
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    assert "NonMaxSuppression" not in {node.op_type for node in proto.graph.node}


def test_the_plugin_node_has_all_parameters_as_attributes():
    node = exported_tiny(nms="plugin", **{**NMS_OPTIONS, "max_det": 70}, class_agnostic=True).proto.graph.node[-1]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["strides"] == [8, 16, 32]
    assert attributes["anchors"] == [side for level in fused_tiny().anchors for anchor in level for side in anchor]
    assert {name: attributes[name] for name in ("classes", "max_det", "max_candidates")} == {
        "classes": 5,
        "max_det": 70,
        "max_candidates": 1024,
    }
    assert list(node.input[3:]) == list(THRESHOLD_INPUTS)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unfused_model_is_refused():
    model = new_model("yolov7-tiny", classes=2).eval()
    with pytest.raises(ExportError, match="fused") as caught:
        export_onnx(model, metadata_of(model), ExportOptions(input_hw=HW))
    assert "fuse" in caught.value.fix


@pytest.mark.parametrize("hw, fix", [((100, 128), "--img 128"), ((128, 31), "--img 128x32"), ((0, 64), "--img 32x64")])
def test_a_size_that_is_not_a_multiple_of_the_stride_is_refused(hw, fix):
    with pytest.raises(UsageError, match="stride 32") as caught:
        export_onnx(fused_tiny(), metadata_of(fused_tiny()), ExportOptions(input_hw=hw))
    assert caught.value.fix == fix


def test_a_negative_size_is_refused():
    with pytest.raises(UsageError):
        export_onnx(fused_tiny(), metadata_of(fused_tiny()), ExportOptions(input_hw=(-64, 64)))


def test_more_boxes_than_anchors_are_refused():
    options = ExportOptions(input_hw=(32, 32), max_det=100)
    with pytest.raises(UsageError, match="only 63 anchors") as caught:
        export_onnx(fused_tiny(), metadata_of(fused_tiny()), options)
    assert caught.value.fix == "--max-det 63"
    export_onnx(fused_tiny(), metadata_of(fused_tiny()), replace(options, nms="none"))


@pytest.mark.parametrize(
    "options",
    [
        {"nms": "fast"},
        {"opset": 12},
        {"opset": 22},
        {"batch": 0},
        {"conf": 1.5},
        {"iou": -0.1},
        {"max_det": 0},
        {"max_candidates": 10},
        {"input_kind": "float16"},
    ],
)
def test_invalid_options_are_refused_with_a_fix(options):
    with pytest.raises(UsageError) as caught:
        ExportOptions(**options)
    assert str(next(iter(options.values()))) in caught.value.message
    assert caught.value.fix


def test_more_detections_than_tensorrt_can_sort_are_refused_with_the_limit():
    with pytest.raises(UsageError, match="max_det 5000 is above 3840") as caught:
        ExportOptions(max_det=5000)
    assert caught.value.fix == "--max-det 3840"
    assert ExportOptions(max_det=3840).max_candidates == 3840


def test_the_error_names_a_layer_without_a_translation():
    model = fuse(fill_model(new_model("yolov7-tiny", classes=2)))
    model.model[3].act = torch.nn.Hardswish()
    with pytest.raises(ExportError, match="Hardswish"):
        export_onnx(model, metadata_of(model), ExportOptions(input_hw=HW))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return exported_tiny(nms="none", conf=CONF, iou=IOU)


def test_a_missing_folder_is_created(model, tmp_path):
    model.save(tmp_path / "new" / "m.onnx")
    assert OnnxModel.load(tmp_path / "new" / "m.onnx").metadata == model.metadata


def test_a_path_below_a_file_is_an_error(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot be written") as caught:
        model.save(tmp_path / "file" / "m.onnx")
    assert caught.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_read_only_folder_is_an_error_and_no_file_remains(model, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="cannot be written"):
        model.save(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_path_of_a_folder_is_an_error_and_no_partial_file_remains(model, tmp_path):
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        model.save(tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_keeps_the_old_file_and_leaves_no_partial_one(model, tmp_path, monkeypatch, fault):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"the old file")
    write = type(target).write_bytes

    def fail_halfway(path, data):
        write(path, data[: len(data) // 2])
        raise fault

    monkeypatch.setattr(type(target), "write_bytes", fail_halfway)
    with pytest.raises((ExportError, KeyboardInterrupt)) as caught:
        model.save(target)
    assert isinstance(caught.value, ExportError) == isinstance(fault, OSError)
    monkeypatch.undo()
    assert target.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_saved_file_replaces_the_old_one(model, tmp_path):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"the old file")
    model.save(target)
    assert OnnxModel.load(target).metadata == model.metadata
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_files_that_are_not_of_this_package_are_refused(model, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(LoadError, match="cannot be read"):
        OnnxModel.load(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(LoadError, match="not an ONNX file"):
        OnnxModel.load(path)
    data = model.proto.SerializeToString()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LoadError, match="not an ONNX file"):
        OnnxModel.load(path)
    foreign = onnx.ModelProto()
    foreign.CopyFrom(model.proto)
    del foreign.metadata_props[:]
    onnx.save(foreign, path)
    with pytest.raises(LoadError, match="no metadata"):
        OnnxModel.load(path)


def test_invalid_metadata_is_refused(model, tmp_path):
    broken = onnx.ModelProto()
    broken.CopyFrom(model.proto)
    helper.set_model_props(broken, {"yolov7_deploy": "{}"})
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="metadata"):
        OnnxModel.load(tmp_path / "m.onnx")


def test_the_metadata_is_restored_from_its_json(model):
    assert ModelMetadata.from_json(model.metadata.to_json()) == model.metadata
