"""Decoding and greedy NMS in standard operators of fixed size.

Best class per anchor, then the `candidates` best anchors, then their classes: no (anchor, class) pair among the best
can hide in another anchor, because its anchor would outscore it. Only those candidates are decoded. NMS goes
tile by tile, and within a tile to its fixed point, which is the greedy result: a candidate falls if a better, surviving
one of its class overlaps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from yolov7_deploy.errors import UsageError
from yolov7_deploy.export.graph_builder import GraphBuilder
from yolov7_deploy.model.configs import Anchors
from yolov7_deploy.options import ExportOptions

TILE = 256  # candidates that settle among themselves at once


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsPlan:
    """All that the end of the graph needs to know.

    Attributes:
        columns: 5 + C.
        cells: float32 [A, 5], per anchor the cell's column and row, stride, anchor width and height.
        anchors, strides: As the head has them.
        candidates: How many enter NMS, at most the number of anchors.
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


def select_candidates(writer: GraphBuilder, heads: Sequence[str], plan: NmsPlan) -> tuple[str, str, str]:
    """Head maps to the K best (box, class) pairs, as `top_pairs` gives them; only candidates are decoded."""
    opset = plan.options.opset
    raw = concat_heads(writer, heads, plan)  # [B, 5 + C, A]
    objectness = writer.node("Squeeze", writer.slice(raw, 1, 4, 5), writer.constant([1], "axis"))
    score = writer.node("Sigmoid", objectness)
    if plan.columns > 6:  # with one class, its logit is never trained and the score is the objectness
        best = writer.reduce_max(writer.slice(raw, 1, 5, plan.columns), 1, opset=opset)
        score = writer.node("Mul", score, writer.node("Sigmoid", best))
    anchor = top_anchors(writer, score, plan)
    chosen = writer.node("Expand", writer.unsqueeze(anchor, 1), writer.constant([1, plan.columns, 1], "shape"))
    columns = writer.node("Transpose", writer.node("GatherElements", raw, chosen, axis=2), perm=[0, 2, 1])
    y = writer.node("Sigmoid", columns)  # [B, K, 5 + C]
    cell = writer.node("Gather", writer.constant(plan.cells, "cells"), anchor, axis=0)  # [B, K, 5]
    centre, size = decode(writer, y, cell, axis=2)
    scores = writer.slice(y, 2, 4, 5)
    if plan.columns > 6:
        scores = writer.node("Mul", scores, writer.slice(y, 2, 5, plan.columns))
    boxes = corners(writer, centre, size, axis=2)
    return top_pairs(writer, boxes, scores, plan, multi_label=plan.options.multi_label)


def overflow_flag(writer: GraphBuilder, score: str, conf: str, plan: NmsPlan) -> str:
    """int32 [B, 1]: 1 where the last of the candidates [B, K] passes too, so that weaker ones may be missing."""
    last = writer.slice(score, 1, plan.candidates - 1, plan.candidates)
    return writer.node("Cast", writer.node("Greater", last, conf), name="overflow", to=TensorProto.INT32)


def top_anchors(writer: GraphBuilder, score: str, plan: NmsPlan) -> str:
    """int64 [B, K]: the anchors of the K best scores [B, A], in rising order, so that later ties fall to the first."""
    _, anchor = writer.top_k(score, plan.candidates)
    number = writer.node("Cast", anchor, name="number", to=TensorProto.FLOAT)
    count = writer.constant([plan.candidates], "count")
    rising, _ = writer.multi_output_node("TopK", number, count, outputs=2, name="rising", axis=-1, largest=0)
    return writer.node("Cast", rising, name="anchor", to=TensorProto.INT64)


def concat_heads(writer: GraphBuilder, heads: Sequence[str], plan: NmsPlan) -> str:
    """Head maps of all levels as float32 [B, 5 + C, A]."""
    levels = []
    for head in heads:
        x = writer.node("Cast", head, name="float32", to=TensorProto.FLOAT)
        x = writer.node("Reshape", x, writer.constant([0, 3, plan.columns, -1], "shape"))
        x = writer.node("Transpose", x, perm=[0, 2, 1, 3])
        levels.append(writer.reshape(x, [0, plan.columns, -1]))
    return writer.node("Concat", *levels, axis=2)


def decode(writer: GraphBuilder, y: str, cell: str, *, axis: int) -> tuple[str, str]:
    """Centre (2 y - 0.5 + cell) * stride and size (2 y)^2 * anchor, from columns along `axis` of y and cell."""
    two = writer.constant(2.0, "two")
    centre = writer.node("Mul", writer.slice(y, axis, 0, 2), two)
    centre = writer.node("Sub", centre, writer.constant(0.5, "half"))
    centre = writer.node("Add", centre, writer.slice(cell, axis, 0, 2))
    centre = writer.node("Mul", centre, writer.slice(cell, axis, 2, 3))
    doubled = writer.node("Mul", writer.slice(y, axis, 2, 4), two)
    size = writer.node("Mul", writer.node("Mul", doubled, doubled), writer.slice(cell, axis, 3, 5))
    return centre, size


def corners(writer: GraphBuilder, centre: str, size: str, *, axis: int) -> str:
    """Centres and sizes as xyxy along `axis`."""
    half = writer.node("Mul", size, writer.constant(0.5, "half"))
    return writer.node(
        "Concat", writer.node("Sub", centre, half), writer.node("Add", centre, half), name="corners", axis=axis
    )


def top_pairs(
    writer: GraphBuilder, boxes: str, scores: str, plan: NmsPlan, *, multi_label: bool
) -> tuple[str, str, str]:
    """The K best (box, class) pairs of boxes [B, K, 4] with scores [B, K, C], ties by box and class.

    Gives boxes [B, K, 4], scores [B, K] and class ids int64 [B, K], best first.
    """
    count, classes = plan.candidates, plan.columns - 5
    if not multi_label or classes == 1:
        of_box, class_of_box = writer.top_k(scores, 1)
        last = writer.constant([2], "axis")
        score, row = writer.top_k(writer.node("Squeeze", of_box, last), count)
        class_id = writer.node("GatherElements", writer.node("Squeeze", class_of_box, last), row, axis=1)
    else:
        score, pair = writer.top_k(writer.reshape(scores, [0, -1]), count)
        width = writer.constant(classes, "classes")
        row = writer.node("Div", pair, width)
        class_id = writer.node("Sub", pair, writer.node("Mul", row, width))
    return gather_rows(writer, boxes, row, 4), score, class_id


def greedy_nms(
    writer: GraphBuilder,
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

    Tile by tile: a tile loses what the survivors so far overlap, then settles among itself, then its survivors join. It
    ends when every image has `max_det` survivors or nothing above `conf` is left, so the cost follows the image
    and not the number of candidates.

    Args:
        writer: Takes the nodes.
        boxes, score, class_id: xyxy [B, K, 4], float32 [B, K], int64 [B, K].
        conf, iou: Tensors [1].
        plan: The sizes.
        inclusive: Thresholds include equality (EfficientNMS_TRT) or not (official YOLOv7).
    """
    rules = _Rules(conf=conf, iou=iou, inclusive=inclusive, class_agnostic=plan.options.class_agnostic)
    tile = min(TILE, plan.candidates)
    tiles = -(-plan.candidates // tile)
    spare = tiles * tile - plan.candidates
    class_number = writer.node("Cast", class_id, name="class_number", to=TensorProto.FLOAT)
    columns = [boxes, writer.unsqueeze(score, 2), writer.unsqueeze(class_number, 2)]
    rows = writer.node("Concat", *columns, name="candidates", axis=2)  # [B, K, 6], zero rows never pass
    rows = writer.node("Pad", rows, writer.constant([0, 0, 0, 0, spare + tile, 0], "spare"))
    rows = writer.reshape(rows, [0, tiles + 1, tile, 6])
    nobody = writer.slice(writer.reshape(rows, [0, -1, 6]), 1, 0, 1)
    nobody = writer.node("Mul", nobody, writer.constant(0.0, "zero"))
    nobody = writer.node("Tile", nobody, writer.constant([1, plan.options.max_det, 1], "repeats"))
    kept = writer.node(
        "Loop",
        writer.constant(tiles, "tiles"),
        writer.constant(np.array(True), "go"),
        nobody,
        name="survivors",
        body=_tile_body(rows, tile, rules, plan),
    )
    return _outputs(writer, kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rules:
    """When a candidate counts and when two overlap; `conf` and `iou` are tensor names."""

    conf: str
    iou: str
    inclusive: bool
    class_agnostic: bool

    @property
    def above(self) -> str:
        return "GreaterOrEqual" if self.inclusive else "Greater"


def _tile_body(rows: str, tile: int, rules: _Rules, plan: NmsPlan) -> onnx.GraphProto:
    """One round: rows [B, T + 1, tile, 6] of the whole, kept [B, max_det, 6] so far; the last tile is empty."""
    body = GraphBuilder(prefix=f"{rows}_tile__", constants_as_nodes=True)
    number, go_in, kept_in = (body.unique(name) for name in ("number", "go", "kept"))
    waiting = body.node("Gather", rows, number, name="waiting", axis=1)  # [B, tile, 6]
    score = body.node("Squeeze", body.slice(waiting, 2, 4, 5), body.constant([2], "axis"))
    valid = body.node("Cast", body.node(rules.above, score, rules.conf), name="valid", to=TensorProto.FLOAT)
    hit = body.node("Cast", _overlaps(body, kept_in, waiting, rules), name="hit", to=TensorProto.FLOAT)
    kept_score = body.node("Squeeze", body.slice(kept_in, 2, 4, 5), body.constant([2], "axis"))
    is_kept = body.node("Cast", body.node("Greater", kept_score, body.constant(0.0, "zero")), to=TensorProto.FLOAT)
    valid = body.node("Mul", valid, _not_hit(body, is_kept, hit))
    rank = np.arange(tile, dtype=np.float32)
    better = body.node("Less", body.constant(rank[:, None], "rank"), body.constant(rank[None], "rank"))
    beats = body.node("Cast", body.node("And", _overlaps(body, waiting, waiting, rules), better), to=TensorProto.FLOAT)
    survives = _fixed_point(body, valid, beats, tile)
    joined = body.node("Concat", kept_in, body.node("Mul", waiting, body.unsqueeze(survives, 2)), axis=1)
    joined_score = body.node("Squeeze", body.slice(joined, 2, 4, 5), body.constant([2], "axis"))
    best, row = body.top_k(joined_score, plan.options.max_det)
    kept_out = gather_rows(body, joined, row, 6)
    go_out = _goes_on(body, rows, number, best, rules)
    return _loop_body(body, f"{rows}_tile", (number, go_in, kept_in), (go_out, kept_out))


def _goes_on(body: GraphBuilder, rows: str, number: str, best: str, rules: _Rules) -> str:
    """Bool: some image has room left and a candidate above the threshold at the head of its next tile."""
    following = body.node("Gather", rows, body.node("Add", number, body.constant(1, "one")), axis=1)
    head = body.slice(body.slice(following, 1, 0, 1), 2, 4, 5)  # [B, 1, 1]
    has_more = body.node("Cast", body.node(rules.above, head, rules.conf), to=TensorProto.FLOAT)
    last = body.slice(best, 1, -1, 2**31 - 1)  # [B, 1]: zero while there is room
    has_room = body.node("Cast", body.node("LessOrEqual", last, body.constant(0.0, "zero")), to=TensorProto.FLOAT)
    wanted = body.node("Mul", has_room, body.node("Squeeze", has_more, body.constant([2], "axis")))
    largest = body.node("ReduceMax", wanted, keepdims=0)
    return body.node("Greater", largest, body.constant(0.5, "half"))


def _overlaps(writer: GraphBuilder, first: str, second: str, rules: _Rules) -> str:
    """Bool [B, N, M] for rows [B, N, 6] and [B, M, 6]: of one class, and intersection above iou * union.

    The comparison needs no division, so two empty boxes are no special case.
    """
    a = [writer.slice(first, 2, side, side + 1) for side in range(6)]  # [B, N, 1] each
    turned = writer.node("Transpose", second, perm=[0, 2, 1])
    b = [writer.slice(turned, 1, side, side + 1) for side in range(6)]  # [B, 1, M] each
    zero = writer.constant(0.0, "zero")

    def shared(low: int, high: int) -> str:
        length = writer.node("Sub", writer.node("Min", a[high], b[high]), writer.node("Max", a[low], b[low]))
        return writer.node("Max", length, zero)

    def area(sides: list[str]) -> str:
        return writer.node("Mul", writer.node("Sub", sides[2], sides[0]), writer.node("Sub", sides[3], sides[1]))

    intersection = writer.node("Mul", shared(0, 2), shared(1, 3))
    union = writer.node("Sub", writer.node("Add", area(a), area(b)), intersection)
    overlaps = writer.node(rules.above, intersection, writer.node("Mul", union, rules.iou))
    if rules.class_agnostic:
        return overlaps
    return writer.node("And", overlaps, writer.node("Equal", a[5], b[5]))


def _not_hit(writer: GraphBuilder, active: str, hits: str) -> str:
    """Float [B, M], 1 where no active row (float [B, N]) of the matrix [B, N, M] hits."""
    # Not a MatMul: TensorRT-RTX has none of float32 for Turing.
    active_hits = writer.node("Mul", writer.unsqueeze(active, 2), hits)
    count = writer.node("ReduceSum", active_hits, writer.constant([1], "axis"), keepdims=0)
    return writer.node("Cast", writer.node("Less", count, writer.constant(0.5, "half")), to=TensorProto.FLOAT)


def _fixed_point(writer: GraphBuilder, valid: str, beats: str, tile: int) -> str:
    """Float [B, tile], 1 where a candidate survives: keep = valid and not hit by a kept one, until nothing changes.

    The n best candidates are final after n rounds, so `tile` rounds are always enough; real images take a few.
    """
    body = GraphBuilder(prefix=f"{beats}_round__", constants_as_nodes=True)
    number, go_in, keep_in = (body.unique(name) for name in ("number", "go", "keep"))
    keep_out = body.node("Mul", valid, _not_hit(body, keep_in, beats))
    change = body.node("Abs", body.node("Sub", keep_out, keep_in))
    go_out = body.node("Greater", body.node("ReduceMax", change, keepdims=0), body.constant(0.5, "half"))
    graph = _loop_body(body, f"{beats}_round", (number, go_in, keep_in), (go_out, keep_out))
    return writer.node(
        "Loop",
        writer.constant(tile, "rounds"),
        writer.constant(np.array(True), "go"),
        valid,
        name="settled",
        body=graph,
    )


def _loop_body(
    body: GraphBuilder, name: str, inputs: tuple[str, str, str], outputs: tuple[str, str]
) -> onnx.GraphProto:
    """A loop that carries one float tensor: (round number, condition, state) to (condition, state)."""
    kinds = (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT)
    scalars: tuple[list[int] | None, ...] = ([], [], None)
    takes = [helper.make_tensor_value_info(*entry) for entry in zip(inputs, kinds, scalars, strict=True)]
    gives = [helper.make_tensor_value_info(*entry) for entry in zip(outputs, kinds[1:], scalars[1:], strict=True)]
    return helper.make_graph(body.nodes, name, takes, gives)


def _outputs(writer: GraphBuilder, kept: str) -> tuple[str, str, str, str]:
    """Rows [B, max_det, 6], survivors in front and zeros behind, as the four outputs."""
    scores = writer.node("Squeeze", writer.slice(kept, 2, 4, 5), writer.constant([2], "axis"))
    present = writer.node("Cast", writer.node("Greater", scores, writer.constant(0.0, "zero")), to=TensorProto.INT32)
    number = writer.node("ReduceSum", present, writer.constant([1], "axis"), name="number", keepdims=1)
    classes = writer.node("Squeeze", writer.slice(kept, 2, 5, 6), writer.constant([2], "axis"))
    return (
        number,
        writer.slice(kept, 2, 0, 4),
        writer.node("Identity", scores),
        writer.node("Cast", classes, name="classes", to=TensorProto.INT32),
    )


def gather_rows(writer: GraphBuilder, x: str, row: str, columns: int) -> str:
    """x[b, row[b, k]] for [B, N, columns] and [B, K]."""
    index = writer.node("Expand", writer.unsqueeze(row, 2), writer.constant([1, 1, columns], "shape"))
    return writer.node("GatherElements", x, index, axis=1)
