"""Half weights and activations in the network; input, decoding, suppression and outputs stay float32.

The types are in the file, cast by cast, because TensorRT 11 and TensorRT-RTX take nothing else, and because older
TensorRT with its FP16 flag and ONNX Runtime run the very same file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from yolov7_deploy.errors import ExportError
from yolov7_deploy.export.nms import END_PREFIX, OP
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import Image
from yolov7_deploy.precision.ranges import activation_ranges

logger = logging.getLogger(__name__)

HALF_MAX = 65504.0
HALF_NORMAL = 2.0**-14  # below, bits are lost; below 2**-25, all of them
# Other pictures reach further than the measured ones, and a convolution's partial sums further than its result.
MARGIN = 4
WIDEST = HALF_MAX / MARGIN
# Here even the largest value of a tensor is so near to half's end that a hundredth of it keeps 7 bits of 11.
FAINTEST = 2.0**-10
# Part of a weight tensor's norm that rounding may cost. Plain rounding costs 2**-12 or less.
WEIGHT_LOSS = 2.0**-8
# The operations a YOLOv7 is made of, which all runtimes have in half. Whatever else is in front of the head stays
# float32: a byte is scaled by division, which is exact only there.
HALF_OPS = frozenset({"Add", "Concat", "Conv", "LeakyRelu", "MaxPool", "Mul", "Resize", "Sigmoid", "Slice"})
# Inputs behind this one are no data: roi and scales of Resize are float32 by its definition.
_DATA_INPUTS = {"Resize": 1}
_HALF, _FLOAT = "__half", "__float32"  # of the names of casts
_IS = "is "  # begins the reason of a node whose kind stays float32
_NAMED = 8  # nodes named in one note

Weight: TypeAlias = npt.NDArray[np.float32]


def to_fp16(model: OnnxModel, pictures: Sequence[Image]) -> OnnxModel:
    """The same model with half weights and activations; inputs, outputs, decoding and suppression stay float32.

    A node stays float32 where a weight of it, or a value that it reads or makes on one of the pictures, does not fit
    half: above `WIDEST`, since half ends at 65504 and what is beyond becomes infinite, or wholly below `FAINTEST`,
    where bits are lost until nothing is left. The passport notes name these nodes and what the weights lost.

    The heads go into our suppression node as half: its function body and its plugin make float32 of them.

    Args:
        model: A float32 graph written by `export_onnx`; it is left as it was.
        pictures: uint8 BGR, to measure activations on. The more they are like those to come, the better; `MARGIN`
            covers what a few do not show.

    Raises:
        UsageError: There is no picture.
        ExportError: The model is of lower precision already, or was not exported by this package.
    """
    _check(model)
    graph = model.proto.graph
    floats = _float_tensors(model.proto)
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    network = [node for node in graph.node if not _behind_head(node)]
    made = [name for node in network for name in node.output if name in floats]
    ranges = activation_ranges(model, network, made, pictures)
    kept = _kept(network, floats, weights, ranges, pinned=_pinned(graph))
    half = {name for node in network if node.output[0] not in kept for name in node.output if name in floats}
    caster = _Caster(model.proto, floats=floats, half=half, heads=model.info.heads)
    proto = caster.written()
    _check_types(proto)
    notes = _notes(kept, half, [weights[name] for name in caster.weights], ranges, len(pictures))
    logger.info("%s", "; ".join(notes))
    return OnnxModel.of(proto, replace(model.info, precision="fp16", notes=(*model.info.notes, *notes)))


def _check(model: OnnxModel) -> None:
    info, graph = model.info, model.proto.graph
    again = "Start from the float32 file:  y7 export --weights WEIGHTS.pt --fp16"
    if info.precision != "fp32":
        raise ExportError(f"The model is {info.precision} already.", fix=again)
    made = {name for node in graph.node for name in node.output}
    if not info.heads or not made.issuperset(info.heads):
        raise ExportError(
            f"The graph was not exported by this package: it has no head maps {', '.join(info.heads) or 'named'}, so "
            "where decoding begins is unknown.",
            fix=again,
        )
    low = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    found = [tensor.name for tensor in graph.initializer if tensor.data_type in low]
    if found:
        raise ExportError(f"The passport says fp32, but {found[0]} is half already.", fix=again)


def _behind_head(node: onnx.NodeProto) -> bool:
    return bool(node.domain) or node.name.startswith(END_PREFIX)


def _float_tensors(proto: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors of the graph."""
    graph = proto.graph
    weights = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in graph.initializer]
    given = {value.name: value for value in [*weights, *graph.input]}
    # Without the weights themselves, which are copied three times on the way and say nothing about types.
    bare = helper.make_graph(graph.node, "types", list(given.values()), graph.output)
    model = helper.make_model(
        bare, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=proto.functions
    )
    inferred = shape_inference.infer_shapes(model).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _pinned(graph: onnx.GraphProto) -> set[str]:
    """Tensors that must keep their type: outputs of the graph, and what graphs inside nodes take from outside."""
    return {output.name for output in graph.output} | {name for node in graph.node for name in _captured(node)}


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from inner.input
            yield from _captured(inner)


# --- what stays float32 -------------------------------------------------------------------------------------------


def _kept(
    network: Sequence[onnx.NodeProto],
    floats: set[str],
    weights: Mapping[str, Weight],
    ranges: Mapping[str, float],
    *,
    pinned: set[str],
) -> dict[str, str]:
    """Why a node stays float32, by its first output; nodes of other types are not among them."""
    kept = {}
    for node in network:
        if node.output[0] not in floats:
            continue
        reasons = [] if node.op_type in HALF_OPS and not pinned.intersection(node.output) else [_IS + node.op_type]
        for name in [*_data(node), *node.output]:
            if name in ranges:
                reasons.append(_range_reason(ranges[name]))
            if name in weights:
                reasons.append(_weight_reason(weights[name]))
        reason = next(filter(None, reasons), "")
        if reason:
            kept[node.output[0]] = reason
    return kept


def _data(node: onnx.NodeProto) -> Sequence[str]:
    return list(node.input)[: _DATA_INPUTS.get(node.op_type)]


def _range_reason(largest: float) -> str:
    if not largest <= WIDEST:  # as what is no number is not
        return f"has values up to {largest:.3g}"
    return f"has no value above {largest:.3g}" if 0 < largest < FAINTEST else ""


def _weight_reason(weight: Weight) -> str:
    largest = float(np.abs(weight).max(initial=0))
    if not largest <= HALF_MAX:
        return f"has weights up to {largest:.3g}"
    if weight.ndim < 2:  # a bias may vanish: what it is added to is so much larger, or is found in the ranges
        return ""
    lost, norm = np.linalg.norm(weight - weight.astype(np.float16)), np.linalg.norm(weight)
    return f"has weights of at most {largest:.3g}" if lost > WEIGHT_LOSS * norm else ""


# --- the casts ----------------------------------------------------------------------------------------------------


class _Caster:
    """Writes a graph again with half tensors, and a cast wherever a value is not of the type its reader wants.

    Args:
        proto: The float32 graph; copied.
        floats: Its float32 tensors.
        half: Those of them that nodes shall make as half.
        heads: The raw maps.

    Attributes:
        weights: New names of the weights that become half.
    """

    def __init__(self, proto: onnx.ModelProto, *, floats: set[str], half: set[str], heads: Sequence[str]) -> None:
        self._proto = onnx.ModelProto()
        self._proto.CopyFrom(proto)
        self._floats, self._half = floats, half
        self._all_heads_half = half.issuperset(heads)
        self.weights = self._half_weights()
        self._casts: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def written(self) -> onnx.ModelProto:
        """The graph in half."""
        graph = self._proto.graph
        for node in graph.node:
            if node.op_type != "Cast":  # takes any type
                self._retype_inputs(node)
            self._nodes.append(node)
        del graph.node[:]
        graph.node.extend(self._nodes)
        self._halve_weights(graph)
        for value in graph.value_info:
            if value.name in self._half:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        return self._proto

    def _half_weights(self) -> dict[str, str]:
        """New names of the weights that become half: the old ones, unless somebody reads them as float32 too."""
        graph = self._proto.graph
        as_half = {name for node in graph.node if self._is_half(node) for name in _data(node)}
        # What callers may feed, and what graphs inside nodes see, is float32 from outside.
        as_float = _pinned(graph) | {entry.name for entry in graph.input}
        for node in graph.node:
            as_float.update(node.input[len(_data(node)) :] if self._is_half(node) else node.input)
        weights = [tensor.name for tensor in graph.initializer if tensor.name in self._floats & as_half]
        return {name: f"{name}{_HALF}" if name in as_float else name for name in weights}

    def _is_half(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._half

    def _retype_inputs(self, node: onnx.NodeProto) -> None:
        data = len(_data(node)) if self._is_half(node) else 0
        for index, name in enumerate(node.input):
            if name not in self._floats:
                continue
            if index < data and name in self.weights:
                node.input[index] = self.weights[name]
            elif node.op_type == OP and self._all_heads_half and name in self._half:
                continue  # the plugin takes half, but all maps of one type
            elif (index < data) != (name in self._half):
                node.input[index] = self._cast(name)

    def _cast(self, name: str) -> str:
        """The value in the other type, in front of its first reader; one cast serves all."""
        if name not in self._casts:
            suffix, kind = (_FLOAT, TensorProto.FLOAT) if name in self._half else (_HALF, TensorProto.FLOAT16)
            self._casts[name] = name + suffix
            self._nodes.append(helper.make_node("Cast", [name], [name + suffix], name=name + suffix, to=kind))
        return self._casts[name]

    def _halve_weights(self, graph: onnx.GraphProto) -> None:
        for tensor in list(graph.initializer):
            if tensor.name in self.weights:
                halved = numpy_helper.from_array(_as_half(numpy_helper.to_array(tensor)), self.weights[tensor.name])
                if halved.name == tensor.name:
                    tensor.CopyFrom(halved)
                else:
                    graph.initializer.append(halved)


def _as_half(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    return values.astype(np.float16)


def _check_types(proto: onnx.ModelProto) -> None:
    """ONNX's own rules, strictly: TensorRT takes the types of the file at their word."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(
            f"The graph is not valid with half types: {str(error).strip().splitlines()[0]}",
            fix="Export it again with this version:  y7 export --weights WEIGHTS.pt --fp16",
        ) from error


# --- what the passport says ---------------------------------------------------------------------------------------


def _notes(
    kept: Mapping[str, str], half: set[str], halved: Sequence[Weight], ranges: Mapping[str, float], pictures: int
) -> tuple[str, ...]:
    """What computes in half, what does not and why, and what the weights lost."""
    notes = [f"fp16: {len(half)} of {len(half) + len(kept)} nodes in front of decoding are half"]
    kinds = sorted({reason for reason in kept.values() if reason.startswith(_IS)})
    if kinds:
        notes.append("float32, not among the half operations: " + ", ".join(kind.removeprefix(_IS) for kind in kinds))
    named = [f"{name} {reason}" for name, reason in kept.items() if not reason.startswith(_IS)]
    if named:
        more = f" and {len(named) - _NAMED} more" * (len(named) > _NAMED)
        notes.append(f"float32 for their values: {'; '.join(named[:_NAMED])}{more}")
    if ranges:
        largest = max(ranges, key=lambda name: ranges[name])
        notes.append(
            f"largest value on {pictures} picture{'s' * (pictures > 1)}: {ranges[largest]:.4g} ({largest}), "
            f"limit {WIDEST:g}"
        )
    total = sum(weight.size for weight in halved)
    vanished = sum(int(np.count_nonzero(weight) - np.count_nonzero(_as_half(weight))) for weight in halved)
    faint = sum(int(((weight != 0) & (np.abs(weight) < HALF_NORMAL)).sum()) for weight in halved)
    notes.append(f"of {total} half weights, {vanished} became 0 and {faint - vanished} are denormal")
    return tuple(notes)
