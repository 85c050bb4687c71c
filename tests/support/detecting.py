"""Running exported files, and reference detections to compare with."""

import copy

import numpy as np
from onnx import TensorProto, helper

from tests.support.reference_nms import postprocess
from yolov7_deploy.options import Thresholds

# Pixels and probabilities: two float32 implementations add up the same products in another order. The difference is up
# to 1e-5 of raw values, and of boxes up to 1500 pixels wide.

DECODED_TOLERANCE = 2e-2
SCORE_TOLERANCE = 2e-5
# Raw maps of random weights are large, so they are compared relative to their spread (as in test_golden_models).
RAW_TOLERANCE = 2e-4
NMS_CHOICES = ("none", "standard", "plugin", "efficient")
# Exports for tests of lower precision: NMS, opset, batch, input.
EXPORTS = [
    *((nms, opset, 1, "float32") for nms in NMS_CHOICES for opset in (13, 17, 18, 21)),
    *((nms, 17, None, "uint8") for nms in NMS_CHOICES),
    ("plugin", 13, 3, "uint8"),
]
NMS_INSIDE = ("standard", "plugin", "efficient")
CONF, IOU, MAX_DET, MAX_CANDIDATES = 0.5, 0.45, 1000, 1024
NMS_OPTIONS = {"conf": CONF, "iou": IOU, "max_det": MAX_DET, "max_candidates": MAX_CANDIDATES}


def run(model_session, array, **thresholds):
    feeds = {f"{name}_threshold": np.array([value], np.float32) for name, value in thresholds.items()}
    return model_session.run(None, {"images": array, **feeds})


def image_result(result, index=0):
    """Return boxes, scores and class ids of one image; rows beyond `num_dets` must be zero."""
    count, boxes, scores, classes = (part[index] for part in result)
    n = int(count.item())
    assert not boxes[n:].any() and not scores[n:].any() and not classes[n:].any()
    assert (boxes.dtype, scores.dtype, classes.dtype, count.dtype) == (np.float32, np.float32, np.int32, np.int32)
    return boxes[:n], scores[:n], classes[:n]


def assert_same_detections(ours, expected):
    """Check equality up to rounding: neighbours of nearly the same score may be swapped."""
    assert len(ours[1]) == len(expected[1])
    assert (np.diff(ours[1]) <= 0).all()
    np.testing.assert_allclose(ours[1], expected[1], atol=SCORE_TOLERANCE)
    same = (
        (ours[2][:, None] == expected[2][None])
        & (np.abs(ours[1][:, None] - expected[1][None]) <= SCORE_TOLERANCE)
        & (np.abs(ours[0][:, None] - expected[0][None]) <= DECODED_TOLERANCE).all(-1)
    )
    assert same.any(0).all() and same.any(1).all()


def reference(decoded, *, max_candidates=MAX_CANDIDATES, **thresholds):
    chosen = {"conf": CONF, "iou": IOU, "max_det": MAX_DET, **thresholds}
    return postprocess(decoded, Thresholds(**chosen), max_candidates=max_candidates)


def network_nodes(model):
    return [node for node in model.proto.graph.node if not node.domain and not node.name.startswith("end__")]


def nodes_after_heads(model):
    """Return the graph after the heads, with raw maps as inputs; in a complete file, ORT removes pairs of casts."""
    proto = copy.deepcopy(model.proto)
    nodes = [node for node in proto.graph.node if node not in network_nodes(model)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    del proto.graph.input[0]
    proto.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in model.metadata.heads
    )
    return proto
