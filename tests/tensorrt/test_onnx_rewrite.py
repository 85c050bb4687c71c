"""Files of other exporters as TensorRT and `y7 quantize` open them."""

import logging

import numpy as np
import pytest
from onnx import TensorProto

from tests.support.foreign_graphs import (
    HW,
    NAMES,
    anchors_rows,
    cells_rows,
    constant_graph,
    end_to_end_rows,
    nms_rows,
    official_rows,
    saved,
)
from tests.support.small_models import exported_tiny, images, session, tiny_session
from yolov7_deploy.detector import Detector
from yolov7_deploy.metadata import NMS_OUTPUTS
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx, prepare_graph


@pytest.mark.parametrize(
    "rows",
    [anchors_rows(7), cells_rows(7), end_to_end_rows(), nms_rows(), official_rows()],
    ids=["yolov7", "yolov8", "yolov10", "end2end", "max-wh"],
)
def test_the_assumed_metadata_is_that_of_the_detector(rows, tmp_path):
    path = saved(constant_graph(rows), tmp_path / "m.onnx")
    with Detector(path, device="cpu") as detector:
        assert open_onnx(path).metadata == detector.metadata


def test_class_names_and_float16_images_are_in_the_metadata(tmp_path):
    graph = constant_graph(cells_rows().astype(np.float16), images=TensorProto.FLOAT16, names=NAMES)
    metadata = open_onnx(saved(graph, tmp_path / "m.onnx")).metadata
    assert (metadata.class_names[1], metadata.precision, metadata.input_kind) == ("name 1", "fp16", "float32")


def test_outputs_that_are_not_read_are_named_in_a_warning(tmp_path, caplog):
    graph = constant_graph(np.zeros((1, 300, 38), np.float32))
    with caplog.at_level(logging.WARNING):
        metadata = open_onnx(saved(graph, tmp_path / "m.onnx")).metadata
    assert "Detector does not read these outputs" in caplog.text
    assert "[1, 300, 38]" in metadata.notes[-1]
    assert (metadata.input_hw, metadata.batch, metadata.class_names) == (HW, 1, ())


def test_types_and_sizes_that_do_not_exist_are_no_crash(tmp_path):
    graph = constant_graph(cells_rows())
    graph.graph.output[0].type.tensor_type.elem_type = 999
    graph.graph.output[0].type.tensor_type.shape.dim[2].dim_value = -5
    metadata = open_onnx(saved(graph, tmp_path / "m.onnx")).metadata
    assert metadata.input_hw == HW


def test_fixed_thresholds_are_those_of_the_file():
    options = {"conf": 0.4, "iou": 0.3, "max_det": 50}
    prepared = prepare_graph(exported_tiny(**options), use_plugin=False, fixed_thresholds=True)
    assert [entry.name for entry in prepared.proto.graph.input] == ["images"]
    assert not prepared.runtime_thresholds
    feeds = {"images": images()}
    results = session(prepared.proto).run(list(NMS_OUTPUTS), feeds)
    expected = tiny_session(**options).run(list(NMS_OUTPUTS), feeds)
    assert int(expected[0].sum()) > 0
    for result, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, other)
