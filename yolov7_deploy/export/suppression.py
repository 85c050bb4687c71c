"""Decoding and greedy suppression in standard operators of fixed size.

Best class per anchor, then the `candidates` best anchors, then their classes: no (anchor, class) pair among the best
can hide in another anchor, because its anchor would outscore it. Only those candidates are decoded. Suppression is
iterated to its fixed point, which is the greedy result: a candidate falls if a better, surviving one of its class
overlaps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from yolov7_deploy.errors import UsageError
from yolov7_deploy.export.graph import GraphWriter
from yolov7_deploy.model.variants import Anchors
from yolov7_deploy.options import ExportOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsPlan:
    """All that the end of the graph needs to know.

    Attributes:
        columns: 5 + C.
        cells: float32 [A, 5], per anchor the cell's column and row, stride, anchor width and height.
        anchors, strides: As the head has them.
        candidates: How many enter suppression, at most the number of anchors.
        options: What the user asked for.
    """

    columns: int
    cells: npt.NDArray[np.float32]
    anchors: Anchors
    strides: tuple[int, ...]
    candidates: int
    options: ExportOptions

    @classmethod
    def of(cls, strides: Sequence[int], anchors: Anchors, classes: int, options: ExportOptions) -> NmsPlan:
        """The plan for a head of these strides and anchors; `options.input_hw` must be given.

        Raises:
            UsageError: The input size does not fit the stride, or has fewer anchors than `max_det`.
        """
        assert options.input_hw is not None, "filled in by export_onnx"
        height, width = options.input_hw
        stride = max(strides)
        if height % stride or width % stride or height < stride or width < stride:
            up = [max(1, -(-side // stride)) * stride for side in (height, width)]
            raise UsageError(
                f"--img {height} {width} is no multiple of this model's stride {stride}.", fix=f"--img {up[0]},{up[1]}"
            )
        cells = _cells((height, width), strides, anchors)
        candidates = min(options.max_candidates, len(cells))
        if options.nms != "none" and candidates < options.max_det:
            raise UsageError(
                f"An input of {height}x{width} has only {len(cells)} anchors, fewer than max_det {options.max_det}.",
                fix=f"--max-det {candidates}",
            )
        return cls(
            columns=5 + classes,
            cells=cells,
            anchors=anchors,
            strides=tuple(strides),
            candidates=candidates,
            options=options,
        )


def _cells(input_hw: tuple[int, int], strides: Sequence[int], anchors: Anchors) -> npt.NDArray[np.float32]:
    """Column, row, stride, anchor width, anchor height of every anchor, in the order of the decoded output."""
    levels = []
    for stride, level in zip(strides, anchors, strict=True):
        height, width = input_hw[0] // stride, input_hw[1] // stride
        rows, columns = np.divmod(np.arange(height * width), width)
        for anchor_w, anchor_h in level:
            constant = np.full_like(rows, 1, dtype=np.float32)
            levels.append(np.stack([columns, rows, stride * constant, anchor_w * constant, anchor_h * constant], 1))
    return np.concatenate(levels).astype(np.float32)


def detect_from_heads(
    writer: GraphWriter, heads: Sequence[str], conf: str, iou: str, plan: NmsPlan
) -> tuple[str, str, str, str]:
    """Head maps to the four NMS outputs; only the candidates are decoded."""
    opset = plan.options.opset
    raw = by_column(writer, heads, plan)  # [B, 5 + C, A]
    objectness = writer.node("Squeeze", writer.slice(raw, 1, 4, 5), writer.constant([1], "axis"))
    score = writer.node("Sigmoid", objectness)
    if plan.columns > 6:  # with one class, its logit is never trained and the score is the objectness
        best = writer.reduce_max(writer.slice(raw, 1, 5, plan.columns), 1, opset=opset)
        score = writer.node("Mul", score, writer.node("Sigmoid", best))
    _, anchor = writer.top_k(score, plan.candidates)  # [B, K]
    chosen = writer.node("Expand", writer.unsqueeze(anchor, 1), writer.constant([1, plan.columns, 1], "shape"))
    columns = writer.node("Transpose", writer.node("GatherElements", raw, chosen, axis=2), perm=[0, 2, 1])
    y = writer.node("Sigmoid", columns)  # [B, K, 5 + C]
    cell = writer.node("Gather", writer.constant(plan.cells, "cells"), anchor, axis=0)  # [B, K, 5]
    centre, size = decode(writer, y, cell, axis=2)
    scores = writer.slice(y, 2, 4, 5)
    if plan.columns > 6:
        scores = writer.node("Mul", scores, writer.slice(y, 2, 5, plan.columns))
    boxes = corners(writer, centre, size, axis=2)
    pairs = best_pairs(writer, boxes, scores, plan, multi_label=plan.options.multi_label)
    return suppress(writer, *pairs, conf, iou, plan, inclusive=False)


def by_column(writer: GraphWriter, heads: Sequence[str], plan: NmsPlan) -> str:
    """Head maps of all levels as float32 [B, 5 + C, A]."""
    levels = []
    for head in heads:
        x = writer.node("Cast", head, name="float32", to=TensorProto.FLOAT)
        x = writer.node("Reshape", x, writer.constant([0, 3, plan.columns, -1], "shape"))
        x = writer.node("Transpose", x, perm=[0, 2, 1, 3])
        levels.append(writer.reshape(x, [0, plan.columns, -1]))
    return writer.node("Concat", *levels, axis=2)


def decode(writer: GraphWriter, y: str, cell: str, *, axis: int) -> tuple[str, str]:
    """Centre (2 y - 0.5 + cell) * stride and size (2 y)^2 * anchor, from columns along `axis` of y and cell."""
    two = writer.constant(2.0, "two")
    centre = writer.node("Mul", writer.slice(y, axis, 0, 2), two)
    centre = writer.node("Sub", centre, writer.constant(0.5, "half"))
    centre = writer.node("Add", centre, writer.slice(cell, axis, 0, 2))
    centre = writer.node("Mul", centre, writer.slice(cell, axis, 2, 3))
    doubled = writer.node("Mul", writer.slice(y, axis, 2, 4), two)
    size = writer.node("Mul", writer.node("Mul", doubled, doubled), writer.slice(cell, axis, 3, 5))
    return centre, size


def corners(writer: GraphWriter, centre: str, size: str, *, axis: int) -> str:
    """Centres and sizes as xyxy along `axis`."""
    half = writer.node("Mul", size, writer.constant(0.5, "half"))
    return writer.node(
        "Concat", writer.node("Sub", centre, half), writer.node("Add", centre, half), name="corners", axis=axis
    )


def best_pairs(
    writer: GraphWriter, boxes: str, scores: str, plan: NmsPlan, *, multi_label: bool
) -> tuple[str, str, str]:
    """The K best (box, class) pairs of boxes [B, K, 4] with scores [B, K, C].

    Gives boxes [B, K, 4], scores [B, K] and class ids int64 [B, K], best first.
    """
    count, classes = plan.candidates, plan.columns - 5
    if not multi_label or classes == 1:
        score, best = writer.top_k(scores, 1)
        one = writer.constant([2], "axis")
        return boxes, writer.node("Squeeze", score, one), writer.node("Squeeze", best, one)
    score, pair = writer.top_k(writer.reshape(scores, [0, -1]), count)
    width = writer.constant(classes, "classes")
    row = writer.node("Div", pair, width)
    class_id = writer.node("Sub", pair, writer.node("Mul", row, width))
    return gather_rows(writer, boxes, row), score, class_id


def suppress(
    writer: GraphWriter,
    boxes: str,
    score: str,
    class_id: str,
    conf: str,
    iou: str,
    plan: NmsPlan,
    *,
    inclusive: bool,
) -> tuple[str, str, str, str]:
    """Candidates, best first, to the four outputs.

    Args:
        writer: Takes the nodes.
        boxes, score, class_id: xyxy [B, K, 4], float32 [B, K], int64 [B, K].
        conf, iou: Tensors [1].
        plan: The sizes.
        inclusive: Thresholds include equality (EfficientNMS_TRT) or not (official YOLOv7).
    """
    valid = writer.node("GreaterOrEqual" if inclusive else "Greater", score, conf)
    overlaps = _overlaps(writer, boxes, iou, inclusive=inclusive)
    if not plan.options.class_agnostic:
        same = writer.node("Equal", writer.unsqueeze(class_id, 2), writer.unsqueeze(class_id, 1))
        overlaps = writer.node("And", overlaps, same)
    rank = np.arange(plan.candidates, dtype=np.float32)
    better = writer.node("Less", writer.constant(rank[:, None], "rank"), writer.constant(rank[None], "rank"))
    beats = writer.node("Cast", writer.node("And", overlaps, better), name="beats", to=TensorProto.FLOAT)
    keep = _fixed_point(writer, writer.node("Cast", valid, to=TensorProto.FLOAT), beats, plan)
    return _packed(writer, boxes, score, class_id, keep, plan)


def gather_rows(writer: GraphWriter, boxes: str, row: str) -> str:
    """boxes[b, row[b, k]] for [B, N, 4] and [B, K]."""
    index = writer.node("Expand", writer.unsqueeze(row, 2), writer.constant([1, 1, 4], "shape"))
    return writer.node("GatherElements", boxes, index, axis=1)


def _overlaps(writer: GraphWriter, boxes: str, iou: str, *, inclusive: bool) -> str:
    """Bool [B, K, K]: intersection above iou * union, which needs no division by an empty union."""
    sides = [writer.slice(boxes, 2, side, side + 1) for side in range(4)]  # [B, K, 1] each
    turned = [writer.node("Transpose", side, perm=[0, 2, 1]) for side in sides]
    zero = writer.constant(0.0, "zero")

    def shared(low: int, high: int) -> str:
        begin = writer.node("Max", sides[low], turned[low])
        return writer.node("Max", writer.node("Sub", writer.node("Min", sides[high], turned[high]), begin), zero)

    intersection = writer.node("Mul", shared(0, 2), shared(1, 3))
    area = writer.node("Mul", writer.node("Sub", sides[2], sides[0]), writer.node("Sub", sides[3], sides[1]))
    both = writer.node("Add", area, writer.node("Transpose", area, perm=[0, 2, 1]))
    union = writer.node("Sub", both, intersection)
    return writer.node("GreaterOrEqual" if inclusive else "Greater", intersection, writer.node("Mul", union, iou))


def _fixed_point(writer: GraphWriter, valid: str, beats: str, plan: NmsPlan) -> str:
    """Float [B, K], 1 where a candidate survives: iterates keep = valid and not (keep @ beats) until nothing changes.

    The n best candidates are final after n rounds, so K rounds are always enough; real pictures take a few.
    """
    body = GraphWriter(prefix=f"{beats}_round__", constants_as_nodes=True)
    keep_in, go_in, round_in = (body.unique(name) for name in ("keep", "go", "round"))
    hits = body.node("MatMul", body.unsqueeze(keep_in, 1), beats)
    hit = body.node("Squeeze", hits, body.constant([1], "axis"))
    alive = body.node("Cast", body.node("Less", hit, body.constant(0.5, "half")), to=TensorProto.FLOAT)
    keep_out = body.node("Mul", valid, alive)
    change = body.node("Abs", body.node("Sub", keep_out, keep_in))
    largest = body.node("ReduceMax", change, keepdims=0)
    go_out = body.node("Greater", largest, body.constant(0.5, "half"))
    graph = helper.make_graph(
        body.nodes,
        f"{beats}_round",
        [
            helper.make_tensor_value_info(round_in, TensorProto.INT64, []),
            helper.make_tensor_value_info(go_in, TensorProto.BOOL, []),
            helper.make_tensor_value_info(keep_in, TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info(go_out, TensorProto.BOOL, []),
            helper.make_tensor_value_info(keep_out, TensorProto.FLOAT, None),
        ],
    )
    rounds = writer.constant(plan.candidates, "rounds")
    go = writer.constant(np.array(True), "go")
    return writer.node("Loop", rounds, go, valid, name="survivors", body=graph)


def _packed(
    writer: GraphWriter, boxes: str, score: str, class_id: str, keep: str, plan: NmsPlan
) -> tuple[str, str, str, str]:
    """Survivors to the front, zeros behind them. Scores above a threshold are positive, so keep * score orders them."""
    limit = plan.options.max_det
    det_scores, row = writer.top_k(writer.node("Mul", keep, score), limit)
    present = writer.node(
        "Cast", writer.node("Greater", det_scores, writer.constant(0.0, "zero")), to=TensorProto.FLOAT
    )
    count = writer.node("ReduceSum", present, writer.constant([1], "axis"), keepdims=1)
    kept_boxes = writer.node("Mul", gather_rows(writer, boxes, row), writer.unsqueeze(present, 2))
    kept_class = writer.node("Cast", writer.node("GatherElements", class_id, row, axis=1), to=TensorProto.INT32)
    present_int = writer.node("Cast", present, to=TensorProto.INT32)
    return (
        writer.node("Cast", count, name="count", to=TensorProto.INT32),
        kept_boxes,
        det_scores,
        writer.node("Mul", kept_class, present_int),
    )
