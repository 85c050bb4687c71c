"""Decoding and greedy NMS in standard operators with fixed shapes.

With a dynamic input size, only the cells and the number of candidates depend on the shapes of the head maps, so that
they are constants again once a runtime has fixed the size.

The best class of each anchor gives its score; the `candidates` anchors with the best scores are selected, then the best
(anchor, class) pairs among them. A pair of another anchor cannot be among the best: its anchor, whose score is not
lower, would have been selected. Only the selected anchors are decoded. NMS processes the pairs in tiles. Within a tile
it iterates to the fixed point, which is the result of greedy NMS: a candidate is removed if it overlaps a surviving
candidate of its class with a higher score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.layer_table import Anchors
from yolov7_deploy.onnx_export.onnx_model import GraphBuilder
from yolov7_deploy.options import ExportOptions, size_text

TILE = 256  # candidates that are processed at once
_COLUMNS, _GROUP = 7, 6  # of a candidate: xyxy, score, class, group


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsPlan:
    """Parameters of decoding and NMS.

    Attributes:
        columns: Channels per anchor, 5 + C.
        cells: float32 [A, 5]: column and row of the cell, stride, width and height of the anchor; with a dynamic input
            size, those of the default size.
        anchors, strides: Anchors and strides of the head.
        candidates: Number of candidates for NMS, at most the number of anchors; with a dynamic input size, smaller
            inputs have fewer.
        options: The export options.
    """

    columns: int
    cells: npt.NDArray[np.float32]
    anchors: Anchors
    strides: tuple[int, ...]
    candidates: int
    options: ExportOptions

    @classmethod
    def of(cls, strides: Sequence[int], anchors: Anchors, classes: int, options: ExportOptions) -> NmsPlan:
        """Return the plan for a head with these strides and anchors; `options.input_hw` must be set.

        Raises:
            UsageError: The input size does not fit the stride, or has fewer anchors than `max_det`.
        """
        assert options.input_hw is not None, "export_onnx sets it"
        height, width = options.input_hw
        stride = max(strides)
        if height % stride or width % stride or height < stride or width < stride:
            larger = [max(1, -(-side // stride)) * stride for side in (height, width)]
            raise UsageError(
                f"--img {size_text((height, width))} is not a multiple of this model's stride {stride}.",
                fix=f"--img {size_text((larger[0], larger[1]))}",
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
    """Return `NmsPlan.cells`, in the order of the decoded output."""
    levels = []
    for stride, level in zip(strides, anchors, strict=True):
        height, width = input_hw[0] // stride, input_hw[1] // stride
        rows, columns = np.divmod(np.arange(height * width), width)
        for anchor_w, anchor_h in level:
            ones = np.ones_like(rows, dtype=np.float32)
            levels.append(np.stack([columns, rows, stride * ones, anchor_w * ones, anchor_h * ones], 1))
    return np.concatenate(levels).astype(np.float32)


class NmsInputs(NamedTuple):
    """Names of the tensors float32 [1] with the thresholds of NMS; see `Thresholds`."""

    conf: str
    iou: str
    multi_label: str
    class_agnostic: str


def select_candidates(
    writer: GraphBuilder, heads: Sequence[str], multi_label: str, plan: NmsPlan
) -> tuple[str, str, str]:
    """Add the K best (box, class) pairs of the head maps; returns what `top_pairs` returns. Decodes only K anchors."""
    opset = plan.options.opset
    raw = concat_heads(writer, heads, plan)  # [B, 5 + C, A]
    objectness = writer.node("Squeeze", writer.slice(raw, 1, 4, 5), writer.constant([1], "axis"))
    score = writer.node("Sigmoid", objectness)
    if plan.columns > 6:  # with one class, its logit is not trained, and the score is the objectness
        best = writer.reduce_max(writer.slice(raw, 1, 5, plan.columns), 1, opset=opset)
        score = writer.node("Mul", score, writer.node("Sigmoid", best))
    anchor = top_anchors(writer, score, plan)
    chosen = writer.node("Expand", writer.unsqueeze(anchor, 1), writer.constant([1, plan.columns, 1], "shape"))
    columns = writer.node("Transpose", writer.node("GatherElements", raw, chosen, axis=2), perm=[0, 2, 1])
    y = writer.node("Sigmoid", columns)  # [B, K, 5 + C]
    cell = writer.node("Gather", add_cells(writer, heads, plan), anchor, axis=0)  # [B, K, 5]
    center, size = decode(writer, y, cell, axis=2)
    scores = writer.slice(y, 2, 4, 5)
    if plan.columns > 6:
        scores = writer.node("Mul", scores, writer.slice(y, 2, 5, plan.columns))
        scores = _mask_labels(writer, scores, multi_label, plan)
    boxes = corners(writer, center, size, axis=2)
    return top_pairs(writer, boxes, scores, plan)


def add_cells(writer: GraphBuilder, heads: Sequence[str], plan: NmsPlan) -> str:
    """Add `NmsPlan.cells`, float32 [A, 5]; with a dynamic input size, from the shapes of the head maps."""
    if not plan.options.dynamic_size:
        return writer.constant(plan.cells, "cells")
    levels = []
    for head, stride, level in zip(heads, plan.strides, plan.anchors, strict=True):
        shape = writer.node("Shape", head)
        height, width = (writer.slice(shape, 0, axis, axis + 1) for axis in (2, 3))
        grid = writer.node(
            "Concat", writer.constant([3], "anchors"), height, width, writer.constant([1], "one"), axis=0
        )
        column = writer.node("Expand", _count_up(writer, width, [1, 1, -1, 1]), grid)
        row = writer.node("Expand", _count_up(writer, height, [1, -1, 1, 1]), grid)
        sides = np.array([[stride, *anchor] for anchor in level], dtype=np.float32)[:, None, None]
        rest = writer.node("Expand", writer.constant(sides, "anchor"), grid)  # [3, H, W, 3]
        levels.append(writer.reshape(writer.node("Concat", column, row, rest, axis=3), [-1, 5]))
    return writer.node("Concat", *levels, name="cells", axis=0)


def _count_up(writer: GraphBuilder, count: str, shape: Sequence[int]) -> str:
    """Add the floats 0 to count - 1 in a shape; `count` is int64 [1]."""
    scalar = writer.node("Squeeze", count, writer.constant([0], "axis"))
    numbers = writer.node("Range", writer.constant(0, "start"), scalar, writer.constant(1, "step"))
    return writer.reshape(writer.node("Cast", numbers, to=TensorProto.FLOAT), shape)


def candidate_count(writer: GraphBuilder, score: str, plan: NmsPlan) -> str:
    """Add the number of candidates, int64 [1]: `plan.candidates`, or all anchors of a smaller dynamic input.

    Args:
        writer: Receives the nodes.
        score: A tensor [B, A, ...].
        plan: Parameters of NMS.
    """
    most = writer.constant([plan.candidates], "count")
    if not plan.options.dynamic_size:
        return most
    return writer.node("Min", most, writer.slice(writer.node("Shape", score), 0, 1, 2), name="count")


def _mask_labels(writer: GraphBuilder, scores: str, multi_label: str, plan: NmsPlan) -> str:
    """Add scores [B, K, C] with 0 for all but the best class of each box, unless the tensor `multi_label` is 1.

    Of equal scores the first class is the best. Compared with a TopK of the best classes alone, this costs 1 ms on two
    CPU cores (0.3 % of yolov7 at 640).
    """
    best = writer.node("ArgMax", scores, axis=2, keepdims=1)
    classes = np.arange(plan.columns - 5, dtype=np.int64)[None, None]
    is_best = writer.node("Equal", best, writer.constant(classes, "class_ids"))
    counts = writer.node("Or", is_best, writer.node("Greater", multi_label, writer.constant(0.5, "half")))
    return writer.node("Where", counts, scores, writer.constant(0.0, "zero"))


def overflow_flag(writer: GraphBuilder, score: str, conf: str, plan: NmsPlan) -> str:
    """Add a flag, int32 [B, 1]: 1 if the last of the candidates [B, K] is above `conf`, so others may be missing."""
    start = -1 if plan.options.dynamic_size else plan.candidates - 1
    last = writer.slice(score, 1, start, plan.candidates)
    return writer.node("Cast", writer.node("Greater", last, conf), name="overflow", to=TensorProto.INT32)


def top_anchors(writer: GraphBuilder, score: str, plan: NmsPlan) -> str:
    """Add the anchors with the K best scores [B, A], int64 [B, K], ascending, so that ties go to the first anchor."""
    count = candidate_count(writer, score, plan)
    _, anchor = writer.top_k(score, count)
    number = writer.node("Cast", anchor, name="number", to=TensorProto.FLOAT)
    rising, _ = writer.multi_output_node("TopK", number, count, outputs=2, name="rising", axis=-1, largest=0)
    return writer.node("Cast", rising, name="anchor", to=TensorProto.INT64)


def concat_heads(writer: GraphBuilder, heads: Sequence[str], plan: NmsPlan) -> str:
    """Concatenate the head maps of all levels to float32 [B, 5 + C, A]."""
    levels = []
    for head in heads:
        x = writer.node("Cast", head, name="float32", to=TensorProto.FLOAT)
        x = writer.node("Reshape", x, writer.constant([0, 3, plan.columns, -1], "shape"))
        x = writer.node("Transpose", x, perm=[0, 2, 1, 3])
        levels.append(writer.reshape(x, [0, plan.columns, -1]))
    return writer.node("Concat", *levels, axis=2)


def decode(writer: GraphBuilder, y: str, cell: str, *, axis: int) -> tuple[str, str]:
    """Add center (2 y - 0.5 + cell) * stride and size (2 y)^2 * anchor; y and cell have their columns along `axis`."""
    two = writer.constant(2.0, "two")
    center = writer.node("Mul", writer.slice(y, axis, 0, 2), two)
    center = writer.node("Sub", center, writer.constant(0.5, "half"))
    center = writer.node("Add", center, writer.slice(cell, axis, 0, 2))
    center = writer.node("Mul", center, writer.slice(cell, axis, 2, 3))
    doubled = writer.node("Mul", writer.slice(y, axis, 2, 4), two)
    size = writer.node("Mul", writer.node("Mul", doubled, doubled), writer.slice(cell, axis, 3, 5))
    return center, size


def corners(writer: GraphBuilder, center: str, size: str, *, axis: int) -> str:
    """Convert centers and sizes to xyxy along `axis`."""
    half = writer.node("Mul", size, writer.constant(0.5, "half"))
    return writer.node(
        "Concat", writer.node("Sub", center, half), writer.node("Add", center, half), name="corners", axis=axis
    )


def top_pairs(writer: GraphBuilder, boxes: str, scores: str, plan: NmsPlan) -> tuple[str, str, str]:
    """Add the K best (box, class) pairs of boxes [B, K, 4] with scores [B, K, C], ties by box and class.

    Returns:
        Boxes [B, K, 4], scores [B, K] and class ids int64 [B, K], the best first.
    """
    score, pair = writer.top_k(writer.reshape(scores, [0, -1]), candidate_count(writer, scores, plan))
    classes = writer.constant(plan.columns - 5, "classes")
    row = writer.node("Div", pair, classes)
    class_id = writer.node("Sub", pair, writer.node("Mul", row, classes))
    return gather_rows(writer, boxes, row, 4), score, class_id


def greedy_nms(
    writer: GraphBuilder,
    boxes: str,
    score: str,
    class_id: str,
    inputs: NmsInputs,
    plan: NmsPlan,
    *,
    inclusive: bool,
) -> tuple[str, str, str, str]:
    """Add NMS of candidates, the best first, and return the four outputs.

    Candidates are processed in tiles. The survivors of earlier tiles remove candidates from a tile, then NMS runs
    within the tile, and its survivors join the others. The loop ends when every image has `max_det` survivors or no
    candidates above `conf` are left, so the cost depends on the image and not on the number of candidates.

    Args:
        writer: Receives the nodes.
        boxes, score, class_id: xyxy [B, K, 4], float32 [B, K], int64 [B, K].
        inputs: Thresholds; `multi_label` is not used.
        plan: Parameters of NMS.
        inclusive: Thresholds include equality (EfficientNMS_TRT) or not (official YOLOv7).
    """
    rules = _Rules(conf=inputs.conf, iou=inputs.iou, inclusive=inclusive)
    tile = min(TILE, plan.candidates)
    tiles = -(-plan.candidates // tile)
    padding = tiles * tile - plan.candidates
    class_number = writer.node("Cast", class_id, name="class_number", to=TensorProto.FLOAT)
    by_class = writer.node("Less", inputs.class_agnostic, writer.constant(0.5, "half"))
    group = writer.node("Mul", class_number, writer.node("Cast", by_class, to=TensorProto.FLOAT))
    columns = [boxes, *(writer.unsqueeze(column, 2) for column in (score, class_number, group))]
    # [B, K, 7]: xyxy, score, class, and the group within which boxes remove each other: the class, or 0 for all.
    # Rows of zeros are never above a threshold.
    rows = writer.node("Concat", *columns, name="candidates", axis=2)
    rows = writer.node("Pad", rows, _spare_rows(writer, rows, padding + tile, plan))
    rows = writer.reshape(rows, [0, tiles + 1, tile, _COLUMNS])
    no_survivors = writer.slice(writer.reshape(rows, [0, -1, _COLUMNS]), 1, 0, 1)
    no_survivors = writer.node("Mul", no_survivors, writer.constant(0.0, "zero"))
    no_survivors = writer.node("Tile", no_survivors, writer.constant([1, plan.options.max_det, 1], "repeats"))
    survivors = writer.node(
        "Loop",
        writer.constant(tiles, "tiles"),
        writer.constant(np.array(True), "go"),
        no_survivors,
        name="survivors",
        body=_tile_body(rows, tile, rules, plan),
    )
    return _outputs(writer, survivors)


def _spare_rows(writer: GraphBuilder, rows: str, spare: int, plan: NmsPlan) -> str:
    """Add the pads of rows [B, K, 7]: `spare` more rows, and those of candidates that a small dynamic input lacks."""
    if not plan.options.dynamic_size:
        return writer.constant([0, 0, 0, 0, spare, 0], "spare")
    total = writer.constant([plan.candidates + spare], "total")
    missing = writer.node("Sub", total, writer.slice(writer.node("Shape", rows), 0, 1, 2))
    return writer.node(
        "Concat", writer.constant([0] * 4, "before"), missing, writer.constant([0], "after"), name="spare", axis=0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rules:
    """Thresholds and comparisons of NMS; `conf` and `iou` are names of tensors."""

    conf: str
    iou: str
    inclusive: bool

    @property
    def above(self) -> str:
        """Operator that compares a value with a threshold."""
        return "GreaterOrEqual" if self.inclusive else "Greater"


def _tile_body(rows: str, tile: int, rules: _Rules, plan: NmsPlan) -> onnx.GraphProto:
    """Return the loop body for one tile of `rows` [B, T + 1, tile, 7], whose last tile is empty.

    The state of the loop is the survivors so far, [B, max_det, 7].
    """
    body = GraphBuilder(prefix=f"{rows}_tile__", constants_as_nodes=True)
    number, continue_in, survivors_in = (body.unique(name) for name in ("number", "go", "kept"))
    candidates = body.node("Gather", rows, number, name="waiting", axis=1)  # [B, tile, 7]
    score = body.node("Squeeze", body.slice(candidates, 2, 4, 5), body.constant([2], "axis"))
    valid = body.node("Cast", body.node(rules.above, score, rules.conf), name="valid", to=TensorProto.FLOAT)
    hit = body.node("Cast", _overlaps(body, survivors_in, candidates, rules), name="hit", to=TensorProto.FLOAT)
    survivor_score = body.node("Squeeze", body.slice(survivors_in, 2, 4, 5), body.constant([2], "axis"))
    is_survivor = body.node(
        "Cast", body.node("Greater", survivor_score, body.constant(0.0, "zero")), to=TensorProto.FLOAT
    )
    valid = body.node("Mul", valid, _not_hit(body, is_survivor, hit))
    rank = np.arange(tile, dtype=np.float32)
    better = body.node("Less", body.constant(rank[:, None], "rank"), body.constant(rank[None], "rank"))
    removes = body.node(
        "Cast", body.node("And", _overlaps(body, candidates, candidates, rules), better), to=TensorProto.FLOAT
    )
    survives = _fixed_point(body, valid, removes, tile)
    joined = body.node("Concat", survivors_in, body.node("Mul", candidates, body.unsqueeze(survives, 2)), axis=1)
    joined_score = body.node("Squeeze", body.slice(joined, 2, 4, 5), body.constant([2], "axis"))
    best, row = body.top_k(joined_score, body.constant([plan.options.max_det], "count"))
    survivors_out = gather_rows(body, joined, row, _COLUMNS)
    continue_out = _has_work_left(body, rows, number, best, rules)
    return _loop_body(body, f"{rows}_tile", (number, continue_in, survivors_in), (continue_out, survivors_out))


def _has_work_left(body: GraphBuilder, rows: str, number: str, best: str, rules: _Rules) -> str:
    """Add a bool: an image has fewer than `max_det` survivors, and a candidate above the threshold in its next tile."""
    following = body.node("Gather", rows, body.node("Add", number, body.constant(1, "one")), axis=1)
    first = body.slice(body.slice(following, 1, 0, 1), 2, 4, 5)  # score of its best candidate [B, 1, 1]
    has_more = body.node("Cast", body.node(rules.above, first, rules.conf), to=TensorProto.FLOAT)
    last = body.slice(best, 1, -1, 2**31 - 1)  # [B, 1]: 0 if there are fewer than max_det survivors
    has_space = body.node("Cast", body.node("LessOrEqual", last, body.constant(0.0, "zero")), to=TensorProto.FLOAT)
    continues = body.node("Mul", has_space, body.node("Squeeze", has_more, body.constant([2], "axis")))
    largest = body.node("ReduceMax", continues, keepdims=0)
    return body.node("Greater", largest, body.constant(0.5, "half"))


def _overlaps(writer: GraphBuilder, first: str, second: str, rules: _Rules) -> str:
    """Add a bool [B, N, M] for rows [B, N, 7] and [B, M, 7]: of one group, and intersection above iou * union.

    The comparison needs no division, so two empty boxes are not a special case.
    """
    used = (0, 1, 2, 3, _GROUP)
    a = {column: writer.slice(first, 2, column, column + 1) for column in used}  # [B, N, 1] each
    transposed = writer.node("Transpose", second, perm=[0, 2, 1])
    b = {column: writer.slice(transposed, 1, column, column + 1) for column in used}  # [B, 1, M] each
    zero = writer.constant(0.0, "zero")

    def shared(low: int, high: int) -> str:
        length = writer.node("Sub", writer.node("Min", a[high], b[high]), writer.node("Max", a[low], b[low]))
        return writer.node("Max", length, zero)

    def area(sides: Mapping[int, str]) -> str:
        return writer.node("Mul", writer.node("Sub", sides[2], sides[0]), writer.node("Sub", sides[3], sides[1]))

    intersection = writer.node("Mul", shared(0, 2), shared(1, 3))
    union = writer.node("Sub", writer.node("Add", area(a), area(b)), intersection)
    overlaps = writer.node(rules.above, intersection, writer.node("Mul", union, rules.iou))
    return writer.node("And", overlaps, writer.node("Equal", a[_GROUP], b[_GROUP]))


def _not_hit(writer: GraphBuilder, active: str, hits: str) -> str:
    """Add a float [B, M]: 1 where no active row (float [B, N]) of the matrix [B, N, M] is 1."""
    # Not a MatMul, because TensorRT-RTX has none in float32 for Turing.
    active_hits = writer.node("Mul", writer.unsqueeze(active, 2), hits)
    count = writer.node("ReduceSum", active_hits, writer.constant([1], "axis"), keepdims=0)
    return writer.node("Cast", writer.node("Less", count, writer.constant(0.5, "half")), to=TensorProto.FLOAT)


def _fixed_point(writer: GraphBuilder, valid: str, removes: str, tile: int) -> str:
    """Add a float [B, tile]: 1 where a candidate survives.

    Iterates keep = valid and not removed by a kept candidate, until nothing changes. The n best candidates are final
    after n iterations, so `tile` iterations are always enough; real images need a few.

    Args:
        writer: Receives the nodes.
        valid: float [B, tile], 1 for the candidates that may survive.
        removes: float [B, tile, tile], 1 where the first candidate removes the second if it survives.
        tile: Number of candidates.
    """
    body = GraphBuilder(prefix=f"{removes}_round__", constants_as_nodes=True)
    number, continue_in, keep_in = (body.unique(name) for name in ("number", "go", "keep"))
    keep_out = body.node("Mul", valid, _not_hit(body, keep_in, removes))
    change = body.node("Abs", body.node("Sub", keep_out, keep_in))
    continue_out = body.node("Greater", body.node("ReduceMax", change, keepdims=0), body.constant(0.5, "half"))
    graph = _loop_body(body, f"{removes}_round", (number, continue_in, keep_in), (continue_out, keep_out))
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
    """Return a loop body with one float tensor as state: (iteration, condition, state) to (condition, state)."""
    kinds = (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT)
    scalars: tuple[list[int] | None, ...] = ([], [], None)
    given = [helper.make_tensor_value_info(*entry) for entry in zip(inputs, kinds, scalars, strict=True)]
    returned = [helper.make_tensor_value_info(*entry) for entry in zip(outputs, kinds[1:], scalars[1:], strict=True)]
    return helper.make_graph(body.nodes, name, given, returned)


def _outputs(writer: GraphBuilder, survivors: str) -> tuple[str, str, str, str]:
    """Add the four outputs from rows [B, max_det, 7]: the survivors, then zeros."""
    scores = writer.node("Squeeze", writer.slice(survivors, 2, 4, 5), writer.constant([2], "axis"))
    present = writer.node("Cast", writer.node("Greater", scores, writer.constant(0.0, "zero")), to=TensorProto.INT32)
    number = writer.node("ReduceSum", present, writer.constant([1], "axis"), name="number", keepdims=1)
    classes = writer.node("Squeeze", writer.slice(survivors, 2, 5, 6), writer.constant([2], "axis"))
    return (
        number,
        writer.slice(survivors, 2, 0, 4),
        writer.node("Identity", scores),
        writer.node("Cast", classes, name="classes", to=TensorProto.INT32),
    )


def gather_rows(writer: GraphBuilder, x: str, row: str, columns: int) -> str:
    """Add x[b, row[b, k]], [B, K, columns], for x [B, N, columns] and row [B, K]."""
    index = writer.node("Expand", writer.unsqueeze(row, 2), writer.constant([1, 1, columns], "shape"))
    return writer.node("GatherElements", x, index, axis=1)
