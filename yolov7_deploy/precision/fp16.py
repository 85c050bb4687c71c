"""Half weights and activations in the network; input, decoding, NMS and outputs stay float32.

The types are in the file, cast by cast, because TensorRT 11 and TensorRT-RTX take nothing else, and because older
TensorRT with its FP16 flag and ONNX Runtime run the very same file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from yolov7_deploy.errors import ExportError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import Image
from yolov7_deploy.precision.activation_ranges import activation_ranges
from yolov7_deploy.precision.fp16_casts import Caster, as_half, check_types, pinned
from yolov7_deploy.precision.subgraph import Network, Weight, data_of, half_weight

logger = logging.getLogger(__name__)

HALF_MAX = 65504.0
HALF_NORMAL = 2.0**-14  # below, bits are lost; below 2**-25, all of them
# Other images reach further than the measured ones, and a convolution's partial sums further than its result.
MARGIN = 4
WIDEST = HALF_MAX / MARGIN
# Here even the largest value of a tensor is so near to half's end that a hundredth of it keeps 7 bits of 11.
FAINTEST = 2.0**-10
# Part of a weight tensor's norm that rounding may cost. Plain rounding costs 2**-12 or less.
WEIGHT_LOSS = 2.0**-8
# The operations a YOLOv7 is made of, which all runtimes have in half. Whatever else is in front of the head stays
# float32: a byte is scaled by division, which is exact only there.
HALF_OPS = frozenset({"Add", "Concat", "Conv", "LeakyRelu", "MaxPool", "Mul", "Resize", "Sigmoid", "Slice"})
_IS = "is "  # begins the reason of a node whose kind stays float32
_NAMED = 8  # nodes named in one note


def to_fp16(model: OnnxModel, images: Sequence[Image]) -> OnnxModel:
    """The same model with half weights and activations; inputs, outputs, decoding and NMS stay float32.

    A node stays float32 where a weight of it, or a value that it reads or makes on one of the images, does not fit
    half: above `WIDEST`, since half ends at 65504 and what is beyond becomes infinite, or wholly below `FAINTEST`,
    where bits are lost until nothing is left. The metadata notes name these nodes and what the weights lost.

    The heads go into our NMS node as half: its function body and its plugin make float32 of them.

    Args:
        model: A float32 graph written by `export_onnx`; it is left as it was.
        images: uint8 BGR, to measure activations on. The more they are like those to come, the better; `MARGIN`
            covers what a few do not show.

    Raises:
        UsageError: There is no image.
        ExportError: The model is of lower precision already, or was not exported by this package.
    """
    _check(model)
    network = Network(model)
    made = [name for node in network.nodes for name in node.output if name in network.floats]
    ranges = activation_ranges(model, network.nodes, made, images)
    kept = float32_reasons(network, ranges)
    half = {name for name in made if network.makers[name].output[0] not in kept}
    caster = Caster(model.proto, floats=network.floats, half=half, heads=model.metadata.heads)
    proto = caster.written()
    check_types(proto)
    notes = _notes(kept, half, [network.weights[name] for name in caster.weights], ranges, len(images))
    logger.info("%s", "; ".join(notes))
    return OnnxModel.of(proto, replace(model.metadata, precision="fp16", notes=(*model.metadata.notes, *notes)))


def _check(model: OnnxModel) -> None:
    metadata, graph = model.metadata, model.proto.graph
    again = "Start from the float32 file:  y7 export --weights WEIGHTS.pt --fp16"
    if metadata.precision != "fp32":
        raise ExportError(f"The model is {metadata.precision} already.", fix=again)
    made = {name for node in graph.node for name in node.output}
    if not metadata.heads or not made.issuperset(metadata.heads):
        raise ExportError(
            "This package did not export the graph, which has no head maps "
            f"{', '.join(metadata.heads) or 'named'}, so where decoding begins is unknown.",
            fix=again,
        )
    found = half_weight(graph)
    if found:
        raise ExportError(f"The metadata says fp32, but {found} is half already.", fix=again)


# --- what stays float32 -------------------------------------------------------------------------------------------


def float32_reasons(network: Network, ranges: Mapping[str, float]) -> dict[str, str]:
    """Why a node stays float32, by its first output; nodes of other types are not among them.

    Args:
        network: Of a float32 graph.
        ranges: Largest magnitude of the tensors that were measured.
    """
    fixed, weights = pinned(network.proto.graph), network.weights
    kept = {}
    for node in network.nodes:
        if node.output[0] not in network.floats:
            continue
        reasons = [] if node.op_type in HALF_OPS and not fixed.intersection(node.output) else [_IS + node.op_type]
        for name in [*data_of(node), *node.output]:
            if name in ranges:
                reasons.append(_range_reason(ranges[name]))
            if name in weights:
                reasons.append(_weight_reason(weights[name]))
        reason = next(filter(None, reasons), "")
        if reason:
            kept[node.output[0]] = reason
    return kept


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


# --- what the metadata says ---------------------------------------------------------------------------------------


def _notes(
    kept: Mapping[str, str], half: set[str], halved: Sequence[Weight], ranges: Mapping[str, float], images: int
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
            f"largest value on {images} image{'s' * (images > 1)}: {ranges[largest]:.4g} ({largest}), limit {WIDEST:g}"
        )
    total = sum(weight.size for weight in halved)
    vanished = sum(int(np.count_nonzero(weight) - np.count_nonzero(as_half(weight))) for weight in halved)
    faint = sum(int(((weight != 0) & (np.abs(weight) < HALF_NORMAL)).sum()) for weight in halved)
    notes.append(f"of {total} half weights, {vanished} became 0 and {faint - vanished} are denormal")
    return tuple(notes)
