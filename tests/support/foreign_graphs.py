"""ONNX files in the layouts of other exporters: graphs that return the same rows for every image."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HW = (320, 256)
CELLS = 40 * 32 + 20 * 16 + 10 * 8  # of strides 8, 16 and 32
BOX = (120.0, 100.0, 200.0, 140.0)  # x0, y0, x1, y1
CENTRE = (160.0, 120.0, 80.0, 40.0)  # the same as cx, cy, w, h
DOG, SCORE = 16, 0.75
FLOATS = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("float16"): TensorProto.FLOAT16}
NAMES = str({number: f"name {number}" for number in range(80)})


def constant_graph(rows, *, shape=None, images=TensorProto.FLOAT, image_shape=(1, 3, *HW), name="output", **properties):
    """Return a graph with one output, or several if `rows` is a dict.

    Args:
        rows: Array, or arrays by name.
        shape: Declared shape of a single output, where it differs.
        images: Type of the input.
        image_shape: Shape of the input.
        name: Name of a single output.
        properties: Key-value metadata.
    """
    arrays = rows if isinstance(rows, dict) else {name: rows}
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
    ]
    weights, outputs = [numpy_helper.from_array(np.float32(0), "zero")], []
    for key, array in arrays.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        weights.append(numpy_helper.from_array(array, f"{key}_rows"))
        nodes.append(helper.make_node("Cast", ["nothing"], [f"{key}_nothing"], to=kind))
        nodes.append(helper.make_node("Add", [f"{key}_rows", f"{key}_nothing"], [key]))
        outputs.append(helper.make_tensor_value_info(key, kind, shape or array.shape))
    inputs = [helper.make_tensor_value_info("images", images, image_shape)]
    return _model(nodes, inputs, outputs, weights, properties)


def cells_graph(columns, bias, *, per_cell=1, transpose=False, side=None):
    """Return a network of dynamic input size with the rows of strides 8, 16 and 32, all of them with the same values.

    Args:
        columns: Values for each row.
        bias: The row, [columns].
        per_cell: Rows for each cell.
        transpose: Return [B, rows, columns] and not [B, columns, rows].
        side: Declared size of the input; dynamic by default.
    """
    nodes, weights = [], [numpy_helper.from_array(np.tile(np.float32(bias), per_cell), "bias")]
    weights.append(numpy_helper.from_array(np.array([0, columns, -1]), "shape"))
    for stride in (8, 16, 32):
        weights.append(numpy_helper.from_array(np.zeros((columns * per_cell, 3, 1, 1), np.float32), f"w{stride}"))
        inputs = ["images", f"w{stride}", "bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"map{stride}"], strides=[stride, stride]))
        if per_cell > 1:
            split = numpy_helper.from_array(np.array([0, per_cell, columns, -1]), f"split{stride}")
            weights.append(split)
            nodes.append(helper.make_node("Reshape", [f"map{stride}", split.name], [f"anchors{stride}"]))
            nodes.append(helper.make_node("Transpose", [f"anchors{stride}"], [f"columns{stride}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"columns{stride}", "shape"], [f"rows{stride}"]))
        else:
            nodes.append(helper.make_node("Reshape", [f"map{stride}", "shape"], [f"rows{stride}"]))
    last = "all" if transpose else "output"
    nodes.append(helper.make_node("Concat", [f"rows{stride}" for stride in (8, 16, 32)], [last], axis=2))
    if transpose:
        nodes.append(helper.make_node("Transpose", ["all"], ["output"], perm=[0, 2, 1]))
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, side or "height", side or "width"])
    shape = ["batch", "a", "b"]
    return _model(nodes, [image], [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)], weights, {})


def _model(nodes, inputs, outputs, weights, properties):
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(proto, properties)
    return proto


def saved(proto, path):
    onnx.save(proto, path)
    return path


def anchors_rows(classes=80, *, rows=3 * CELLS, batch=1):
    """Return the output of the official --grid with one dog."""
    array = np.zeros((batch, rows, 5 + classes), np.float32)
    array[:, 7, :5] = *CENTRE, 1
    array[:, 7, 5 + DOG % classes] = SCORE
    if classes == 1:
        array[:, 7, 4:] = SCORE
    return array


def cells_rows(classes=80, *, cells=CELLS, batch=1):
    """Return the output of a YOLOv8 with one dog."""
    array = np.zeros((batch, 4 + classes, cells), np.float32)
    array[:, :4, 7] = CENTRE
    array[:, 4 + DOG % classes, 7] = SCORE
    return array


def end_to_end_rows(rows=300, *, batch=1):
    """Return the output of a YOLOv10 with one dog, and rows of low scores as it has them."""
    array = np.zeros((batch, rows, 6), np.float32)
    array[:, 0] = *BOX, SCORE, DOG
    array[:, 1] = *BOX, 0.01, DOG
    return array


def official_rows(images=(0,)):
    """Return the output of the official --grid --end2end --max-wh with one dog in each of the images."""
    return np.array([[image, *BOX, DOG, SCORE] for image in images], np.float32).reshape(-1, 7)


def nms_rows(names=("num_dets", "det_boxes", "det_scores", "det_classes"), *, batch=1, rows=100):
    """Return the four outputs of EfficientNMS_TRT with one dog."""
    boxes, scores = np.zeros((batch, rows, 4), np.float32), np.zeros((batch, rows), np.float32)
    classes = np.zeros((batch, rows), np.int32)
    boxes[:, 0], scores[:, 0], classes[:, 0] = BOX, SCORE, DOG
    return dict(zip(names, (np.ones((batch, 1), np.int32), boxes, scores, classes), strict=True))
