"""Add decoding and NMS to the graph: none, standard operators, EfficientNMS_TRT, or the operator of this package.

`plugin` appends one node to the raw head maps, `y7::Y7NMS`, which decodes and runs NMS. The node is a model-local ONNX
function of standard operators, so every runtime runs the file; TensorRT uses our plugin of the same name instead.
`standard` adds the operators of that function without the function. `efficient` decodes all anchors and ends with
`EfficientNMS_TRT`, with a function body for runtimes without it. `none` decodes all anchors and runs no NMS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from yolov7_deploy.metadata import NMS_OPERATOR, NMS_OUTPUTS, RAW_OUTPUT, THRESHOLD_INPUTS
from yolov7_deploy.onnx_export.nms_subgraph import (
    NmsInputs,
    NmsPlan,
    add_cells,
    concat_heads,
    corners,
    decode,
    gather_rows,
    greedy_nms,
    overflow_flag,
    select_candidates,
    top_anchors,
    top_pairs,
)
from yolov7_deploy.onnx_export.onnx_model import GraphBuilder

DOMAIN, OP = NMS_OPERATOR
EFFICIENT_DOMAIN, EFFICIENT_OP = "TRT", "EfficientNMS_TRT"
BODY_PREFIX = "y7nms__"
END_PREFIX = "end__"  # of all names of this module, so that they differ from those of the network
# An output of the node, but not of the graph, which has the four usual outputs; in an engine it is an output as well.
OVERFLOW = "y7nms_overflow"
# Without these two attributes TensorRT 10.15 and later prefers the function body to a registered plugin.
_PLUGIN_KEY = {"plugin_version": "1", "plugin_namespace": ""}


def attach_nms(network: onnx.ModelProto, heads: Sequence[str], plan: NmsPlan) -> onnx.ModelProto:
    """Return a copy of the network with decoding and NMS after its head maps [B, 3 * (5 + C), H, W]."""
    model = onnx.ModelProto()
    model.CopyFrom(network)
    graph = model.graph
    del graph.output[:]
    writer = GraphBuilder(prefix=END_PREFIX)
    match plan.options.nms:
        case "none":
            _rename(writer, {RAW_OUTPUT: _decoded(writer, heads, plan)})
            rows = "anchors" if plan.options.dynamic_size else len(plan.cells)
            graph.output.append(_value(RAW_OUTPUT, TensorProto.FLOAT, plan, rows, plan.columns))
        case "standard":
            inputs = NmsInputs(*THRESHOLD_INPUTS)
            candidates = select_candidates(writer, heads, inputs.multi_label, plan)
            results = greedy_nms(writer, *candidates, inputs, plan, inclusive=False)
            _rename(writer, dict(zip(NMS_OUTPUTS, results, strict=True)))
        case "plugin":
            writer.nodes.append(_plugin_node(heads, plan))
            _add_function(model, _plugin_body(heads, plan))
        case "efficient":
            boxes, scores = _efficient_inputs(writer, heads, plan)
            writer.nodes.append(_efficient_node(boxes, scores, plan))
            _add_function(model, _efficient_body(plan))
    graph.node.extend(writer.nodes)
    graph.initializer.extend(writer.initializers)
    if plan.options.nms != "none":
        graph.output.extend(_nms_outputs(plan))
    if plan.options.nms in ("plugin", "standard"):
        options = plan.options
        defaults = (options.conf, options.iou, float(options.multi_label), float(options.class_agnostic))
        for name, value in zip(THRESHOLD_INPUTS, defaults, strict=True):
            _add_threshold(graph, name, value)
    return model


def _rename(writer: GraphBuilder, names: dict[str, str]) -> None:
    """Give results their public names, in all nodes that write or read them; `names` maps public to internal names."""
    public = {internal: name for name, internal in names.items()}
    for node in writer.nodes:
        for tensors in (node.input, node.output):
            tensors[:] = [public.get(name, name) for name in tensors]


def _add_threshold(graph: onnx.GraphProto, name: str, value: float) -> None:
    """Add a graph input with a default value; runtimes without such inputs treat it as a constant."""
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))
    graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [1], [value]))


def _value(name: str, kind: int, plan: NmsPlan, *dims: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [plan.options.batch or "batch", *dims])


def _nms_outputs(plan: NmsPlan) -> list[onnx.ValueInfoProto]:
    count, boxes, scores, classes = NMS_OUTPUTS
    limit = plan.options.max_det
    return [
        _value(count, TensorProto.INT32, plan, 1),
        _value(boxes, TensorProto.FLOAT, plan, limit, 4),
        _value(scores, TensorProto.FLOAT, plan, limit),
        _value(classes, TensorProto.INT32, plan, limit),
    ]


def _plugin_node(heads: Sequence[str], plan: NmsPlan) -> onnx.NodeProto:
    return helper.make_node(
        OP,
        [*heads, *THRESHOLD_INPUTS],
        [*NMS_OUTPUTS, OVERFLOW],
        name="nms",
        domain=DOMAIN,
        anchors=[side for level in plan.anchors for anchor in level for side in anchor],
        strides=list(plan.strides),
        classes=plan.columns - 5,
        max_det=plan.options.max_det,
        max_candidates=plan.candidates,
        **_PLUGIN_KEY,
    )


def _plugin_body(heads: Sequence[str], plan: NmsPlan) -> onnx.FunctionProto:
    inputs = [f"{BODY_PREFIX}head_{level}" for level in range(len(heads))]
    writer = GraphBuilder(prefix=BODY_PREFIX, constants_as_nodes=True)
    thresholds = NmsInputs(*(BODY_PREFIX + name for name in THRESHOLD_INPUTS))
    candidates = select_candidates(writer, inputs, thresholds.multi_label, plan)
    results = greedy_nms(writer, *candidates, thresholds, plan, inclusive=False)
    outputs = [*results, overflow_flag(writer, candidates[1], thresholds.conf, plan)]
    attributes = [a.name for a in _plugin_node(heads, plan).attribute]
    return helper.make_function(DOMAIN, OP, [*inputs, *thresholds], outputs, writer.nodes, _opsets(plan), attributes)


def _opsets(plan: NmsPlan) -> list[onnx.OperatorSetIdProto]:
    return [helper.make_opsetid("", plan.options.opset)]


def _add_function(model: onnx.ModelProto, body: onnx.FunctionProto) -> None:
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid(body.domain, 1))


def _decoded(writer: GraphBuilder, heads: Sequence[str], plan: NmsPlan) -> str:
    """Add the decoded output [B, A, 5 + C]: cx, cy, w, h in input pixels, objectness, class probabilities."""
    y, center, size = _decoded_parts(writer, heads, plan)
    rest = writer.slice(y, 1, 4, plan.columns)
    return writer.node("Transpose", writer.node("Concat", center, size, rest, axis=1), name=RAW_OUTPUT, perm=[0, 2, 1])


def _decoded_parts(writer: GraphBuilder, heads: Sequence[str], plan: NmsPlan) -> tuple[str, str, str]:
    """Add the sigmoids [B, 5 + C, A], centers and sizes [B, 2, A] of all anchors."""
    y = writer.node("Sigmoid", concat_heads(writer, heads, plan))
    if plan.options.dynamic_size:
        cell = writer.unsqueeze(writer.node("Transpose", add_cells(writer, heads, plan), perm=[1, 0]), 0)
    else:
        cell = writer.constant(np.ascontiguousarray(plan.cells.T[None]), "cells")
    center, size = decode(writer, y, cell, axis=1)
    return y, center, size


def _efficient_inputs(writer: GraphBuilder, heads: Sequence[str], plan: NmsPlan) -> tuple[str, str]:
    """Add boxes [B, A, 4] (cx, cy, w, h) and scores [B, A, C] for EfficientNMS_TRT."""
    y, center, size = _decoded_parts(writer, heads, plan)
    boxes = writer.node("Transpose", writer.node("Concat", center, size, axis=1), name="boxes", perm=[0, 2, 1])
    scores = writer.slice(y, 1, 4, 5)
    if plan.columns > 6:
        scores = writer.node("Mul", scores, writer.slice(y, 1, 5, plan.columns))
    if not plan.options.multi_label:
        scores = _best_class_only(writer, scores, plan)
    return boxes, writer.node("Transpose", scores, name="scores", perm=[0, 2, 1])


def _best_class_only(writer: GraphBuilder, scores: str, plan: NmsPlan) -> str:
    """Add scores [B, C, A] with 0 for all but the best class of an anchor, because EfficientNMS_TRT uses every class.

    Of equal scores the first class is the best.
    """
    classes = np.arange(plan.columns - 5, dtype=np.int64)[None, :, None]
    best = writer.node("ArgMax", scores, axis=1, keepdims=1)
    is_best = writer.node("Equal", best, writer.constant(classes, "class_ids"))
    return writer.node("Mul", scores, writer.node("Cast", is_best, name="is_best", to=TensorProto.FLOAT))


def _efficient_node(boxes: str, scores: str, plan: NmsPlan) -> onnx.NodeProto:
    return helper.make_node(
        EFFICIENT_OP,
        [boxes, scores],
        list(NMS_OUTPUTS),
        name="nms",
        domain=EFFICIENT_DOMAIN,
        background_class=-1,
        box_coding=1,
        class_agnostic=int(plan.options.class_agnostic),
        iou_threshold=plan.options.iou,
        max_output_boxes=plan.options.max_det,
        score_activation=0,
        score_threshold=plan.options.conf,
        **_PLUGIN_KEY,
    )


def _efficient_body(plan: NmsPlan) -> onnx.FunctionProto:
    """Return EfficientNMS_TRT as a function for runtimes without it: multi-label, with inclusive thresholds."""
    writer = GraphBuilder(prefix=BODY_PREFIX, constants_as_nodes=True)
    boxes, scores = BODY_PREFIX + "boxes", BODY_PREFIX + "scores"
    conf, iou = (_attribute(writer, name) for name in ("score_threshold", "iou_threshold"))
    agnostic = writer.constant(np.array([plan.options.class_agnostic], np.float32), "class_agnostic")
    best = writer.reduce_max(scores, 2, opset=plan.options.opset)
    anchor = top_anchors(writer, best, plan)
    rows = writer.node("Expand", writer.unsqueeze(anchor, 2), writer.constant([1, 1, plan.columns - 5], "shape"))
    chosen = gather_rows(writer, boxes, anchor, 4)
    chosen_boxes = corners(writer, writer.slice(chosen, 2, 0, 2), writer.slice(chosen, 2, 2, 4), axis=2)
    chosen_scores = writer.node("GatherElements", scores, rows, axis=1)
    pairs = top_pairs(writer, chosen_boxes, chosen_scores, plan)
    inputs = NmsInputs(conf=conf, iou=iou, multi_label="", class_agnostic=agnostic)
    results = greedy_nms(writer, *pairs, inputs, plan, inclusive=True)
    attributes = [a.name for a in _efficient_node(boxes, scores, plan).attribute]
    return helper.make_function(
        EFFICIENT_DOMAIN, EFFICIENT_OP, [boxes, scores], list(results), writer.nodes, _opsets(plan), attributes
    )


def _attribute(writer: GraphBuilder, name: str) -> str:
    """Add a float attribute of the function as a tensor."""
    result = writer.unique(name)
    node = helper.make_node("Constant", [], [result], name=result)
    reference = node.attribute.add()
    reference.name, reference.ref_attr_name, reference.type = "value_float", name, onnx.AttributeProto.FLOAT
    writer.nodes.append(node)
    return result
