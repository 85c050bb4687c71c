"""Files that take any height and width: every kind of NMS at sizes above and below that of the export."""

import numpy as np
import onnx
import pytest
import torch

from tests.support.detecting import NMS_OPTIONS, assert_same_detections, image_result, reference, run
from tests.support.deterministic import make_image
from tests.support.small_models import HW, exported_tiny, fused_tiny, session
from yolov7_deploy.metadata import ModelMetadata

# The default size, smaller ones with fewer anchors than enter NMS (126 and 378 of at most 1024), and a larger one.
SIZES = [HW, (32, 64), (64, 96), (192, 160)]
LIMITS = {**NMS_OPTIONS, "max_det": 300}
DECODED = {"atol": 2e-2, "rtol": 1e-4}  # boxes in pixels; see tests/support/detecting.py


@pytest.fixture(scope="module", params=[("plugin", 13), ("plugin", 18), ("standard", 17), ("efficient", 17)])
def with_nms(request):
    nms, opset = request.param
    model = exported_tiny(nms=nms, opset=opset, batch=None, dynamic_size=True, **LIMITS)
    return model, session(model.proto)


def decoded_by_torch(images):
    with torch.no_grad():
        return fused_tiny().predict(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("hw", SIZES)
def test_nms_in_the_file_gives_the_reference_at_every_size(with_nms, hw):
    _, opened = with_nms
    images = np.concatenate([make_image(*hw, salt=salt).numpy() for salt in "ab"])
    result = run(opened, images)
    for index, decoded in enumerate(decoded_by_torch(images)):
        expected = reference(decoded, max_det=LIMITS["max_det"])
        assert len(expected.scores) > 1
        assert_same_detections(image_result(result, index), expected)


@pytest.mark.parametrize("hw", SIZES)
def test_without_nms_the_decoded_output_is_that_of_torch(hw):
    opened = session(exported_tiny(nms="none", batch=None, dynamic_size=True).proto)
    images = make_image(*hw, salt="c").numpy()
    np.testing.assert_allclose(run(opened, images)[0], decoded_by_torch(images), **DECODED)


def test_thresholds_change_at_run_time_in_a_small_input():
    opened = session(exported_tiny(nms="plugin", batch=None, dynamic_size=True, **LIMITS).proto)
    images = make_image(32, 64, salt="d").numpy()
    [decoded] = decoded_by_torch(images)
    for conf, iou in ((0.2, 0.9), (0.0, 0.3)):
        expected = reference(decoded, max_det=LIMITS["max_det"], conf=conf, iou=iou)
        assert_same_detections(image_result(run(opened, images, conf=conf, iou=iou)), expected)


def test_the_metadata_states_an_open_size_and_its_default(with_nms):
    model, _ = with_nms
    onnx.checker.check_model(model.proto, full_check=True)
    assert (model.metadata.input_hw, model.metadata.default_hw, model.metadata.batch) == (None, HW, None)
    dims = [dim.dim_param for dim in model.proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "", "height", "width"]
    assert ModelMetadata.from_json(model.metadata.to_json()) == model.metadata


def test_a_fixed_size_has_constant_cells_and_no_shape_operators():
    fixed = exported_tiny(nms="standard", **LIMITS)
    assert not {"Shape", "Range"} & {node.op_type for node in fixed.proto.graph.node}
