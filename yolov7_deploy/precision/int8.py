"""INT8 convolutions as Q/DQ pairs in the file, which every runtime accepts: TensorRT 8.5 to 11, RTX, ONNX Runtime.

Scales are float32 and zero points 0, so any opset from 13 on and any TensorRT takes them. What is not INT8 computes in
half, cast by cast, because TensorRT 11 and TensorRT-RTX believe the types of the file. What stands between an INT8
convolution and the next pair (its activation) is typed float32: TensorRT may compute it inside the kernel of the
convolution, where nothing is stored. Scales of half, and half in between, were tried with TensorRT-RTX 1.7 and change
nothing in the layers it builds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from yolov7_deploy.errors import ExportError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.metadata import Int8Info, ModelMetadata
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration, network_digest
from yolov7_deploy.precision.fp16 import float32_reasons
from yolov7_deploy.precision.fp16_casts import Caster, check_types
from yolov7_deploy.precision.histogram import LEVELS, Histogram, clip_of
from yolov7_deploy.precision.int8_summary import Int8Account, count_int8
from yolov7_deploy.precision.qdq_placement import Placement, float_nodes, place
from yolov7_deploy.precision.subgraph import Network, half_weight, read_by
from yolov7_deploy.precision.weight_quantization import RoundedWeight, round_weight, shifted_by_rounding

logger = logging.getLogger(__name__)

_INT8, _BACK, _SCALE, _ZERO = "__int8", "__from_int8", "__scale", "__zero"  # of the names of what is made here
ZERO = "int8_zero"
_NAMED = 8  # layers named in one note


def to_int8(model: OnnxModel, calibration: Calibration, options: Int8Options) -> OnnxModel:
    """The same model with INT8 convolutions; inputs, outputs, decoding and NMS stay float32.

    Weights have a scale for each output channel, activations one for each tensor, and one for all tensors that a
    Concat, MaxPool or nearest Resize joins. The metadata says what stayed float and why.

    Args:
        model: A float32 graph, of this package or foreign; it is left as it was.
        calibration: What `calibrate` found for this network.
        options: See `Int8Options`.

    Raises:
        ExportError: The model is of lower precision already, has no convolution to quantise, or values without a range;
            the calibration is of another network, or a layer to spare is not in it.
    """
    check_quantizable(model)
    if not model.metadata.heads:  # where decoding begins is unknown, and decoding needs float32
        options = replace(options, rest="fp32")
    network = Network(model)
    _check_calibration(network, calibration)
    placement = place(network, spared_layers(network, options.spare))
    if not placement.convolutions:
        raise ExportError(
            f"No convolution can be INT8: {'; '.join(dict.fromkeys(placement.kept.values())) or 'there is none'}.",
            fix="Only Conv nodes with constant weights are quantised; onnx-simplifier makes weights constant.",
        )
    scales = tensor_scales(placement, calibration, options.method)
    quantized = write_pairs(network, placement, scales, calibration.means if options.correct_bias else {})
    proto = quantized if options.rest == "fp32" else _halved(network, placement, quantized, calibration, model)
    check_types(proto)
    return OnnxModel.of(proto, _metadata(model, proto, placement, calibration, options))


def check_quantizable(model: OnnxModel) -> None:
    """Refuses what has been made smaller already.

    Raises:
        ExportError: It is INT8 or half.
    """
    again = "Start from the float32 file:  y7 export --weights WEIGHTS.pt --int8 --calib FOLDER"
    found = next((node for node in model.proto.graph.node if node.op_type in _QUANTIZED_OPS), None)
    if found is not None:
        raise ExportError(f"The graph is quantised already: it has a {found.op_type} ({found.name}).", fix=again)
    half = half_weight(model.proto.graph)
    if model.metadata.precision != "fp32" or half:
        found_as = model.metadata.precision if half is None else f"half ({half})"
        raise ExportError(
            f"The model is {found_as} already; ranges are measured, and weights rounded, in float32.", fix=again
        )


_QUANTIZED_OPS = {"ConvInteger", "DequantizeLinear", "QLinearConv", "QuantizeLinear"}


def _check_calibration(network: Network, calibration: Calibration) -> None:
    if calibration.network_sha256 != network_digest(network):
        raise ExportError(
            "The calibration is of another network: its nodes or weights differ.",
            fix="Calibrate this one:  y7 quantize --weights FILE.onnx --calib FOLDER",
        )


def spared_layers(network: Network, names: Mapping[str, str]) -> dict[str, str]:
    """The output of each named convolution, and why it is spared.

    Raises:
        ExportError: There is no such convolution; the message names those that are alike.
    """
    known = {node.output[0]: node.output[0] for node in network.convolutions}
    known |= {node.name: node.output[0] for node in network.convolutions if node.name}
    for name in names:
        if name not in known:
            shown = ", ".join(sorted(known)[:_NAMED])
            raise ExportError(f"There is no convolution {name!r} to spare.", fix=f"They are called {shown}, ...")
    return {known[name]: reason for name, reason in names.items()}


def tensor_scales(placement: Placement, calibration: Calibration, method: str) -> dict[str, np.float32]:
    """The scale of each tensor with a pair: its clip, by the method, in 127 steps.

    Tensors that share a scale are judged by all their values together.

    Raises:
        ExportError: Values are infinite or no numbers.
    """
    clips = {
        group: clip_of(Histogram.sum(calibration.histograms[name] for name in group), method)
        for group in dict.fromkeys(placement.groups.values())
    }
    return {name: np.float32(clips[group] / LEVELS) for name, group in placement.groups.items()}


def write_pairs(
    network: Network,
    placement: Placement,
    scales: Mapping[str, np.float32],
    means: Mapping[str, npt.NDArray[np.float64]],
) -> onnx.ModelProto:
    """A copy of the graph with Q/DQ pairs and INT8 weights, otherwise float32.

    Args:
        network: Of the graph.
        placement: Where the pairs go.
        scales: Of each tensor with a pair.
        means: Of the channels that each convolution reads, to correct its bias with; none corrects nothing.
    """
    return _Writer(network, placement, scales, means).written()


class _Writer:
    def __init__(
        self,
        network: Network,
        placement: Placement,
        scales: Mapping[str, np.float32],
        means: Mapping[str, npt.NDArray[np.float64]],
    ) -> None:
        self._network, self._placement, self._scales, self._means = network, placement, scales, means
        self._takes: dict[str, set[str]] = {}
        for name, readers in placement.pairs.items():
            for reader in readers:
                self._takes.setdefault(reader, set()).add(name)
        self._quantized = set(placement.convolutions)
        self._rounded: dict[str, RoundedWeight] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._stored: dict[str, onnx.TensorProto] = {}
        self._paired: set[str] = set()

    def written(self) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._network.proto)
        self._store(ZERO, np.zeros((), dtype=np.int8))
        for node in proto.graph.node:
            taken = self._takes.get(node.output[0], set())
            for index, name in enumerate(node.input):
                if name in taken:
                    node.input[index] = self._pair(name)
            if node.output[0] in self._quantized:
                self._round(node)
            self._nodes.append(node)
        nodes = list(self._nodes)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        self._put_weights(proto.graph)
        return proto

    def _pair(self, name: str) -> str:
        """The tensor behind its pair, which stands in front of the first reader."""
        if name not in self._paired:
            self._paired.add(name)
            scale = self._store(f"{self._placement.groups[name][0]}{_SCALE}", np.array(self._scales[name]))
            self._nodes.append(
                helper.make_node("QuantizeLinear", [name, scale, ZERO], [name + _INT8], name=name + _INT8)
            )
            self._nodes.append(
                helper.make_node("DequantizeLinear", [name + _INT8, scale, ZERO], [name + _BACK], name=name + _BACK)
            )
        return name + _BACK

    def _round(self, node: onnx.NodeProto) -> None:
        name, read = node.input[1], self._reads(node)
        if name not in self._rounded:
            rounded = self._rounded[name] = round_weight(self._network.weights[name])
            stored = [
                self._store(name + _INT8, rounded.values),
                self._store(name + _SCALE, rounded.scales),
                self._store(name + _ZERO, np.zeros(len(rounded.scales), dtype=np.int8)),
            ]
            self._nodes.append(helper.make_node("DequantizeLinear", stored, [name + _BACK], name=name + _BACK, axis=0))
        node.input[1] = name + _BACK
        means = self._means.get(read)
        if means is not None and (len(node.input) < 3 or node.input[2] in self._network.weights):
            shift = shifted_by_rounding(self._network.weights[name], self._rounded[name], means)
            self._correct(node, shift)

    def _reads(self, node: onnx.NodeProto) -> str:
        return str(self._network.makers[node.output[0]].input[0])

    def _correct(self, node: onnx.NodeProto, shift: npt.NDArray[np.float32]) -> None:
        bias = self._network.weights[node.input[2]] if len(node.input) > 2 else np.float32(0)
        corrected = self._store(f"{node.output[0]}__bias", (bias + shift).astype(np.float32))
        node.input[:] = [*node.input[:2], corrected]

    def _store(self, name: str, value: npt.NDArray[np.generic]) -> str:
        if name not in self._stored:
            self._stored[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _put_weights(self, graph: onnx.GraphProto) -> None:
        """Adds what is new, and drops what nobody reads any more."""
        read = {name for node in graph.node for name in read_by(node)} | {output.name for output in graph.output}
        read.update(entry.name for entry in graph.input)
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self._stored.values()])


def _halved(
    network: Network, placement: Placement, quantized: onnx.ModelProto, calibration: Calibration, model: OnnxModel
) -> onnx.ModelProto:
    """What is neither INT8 nor on its way to it, in half; where half cannot hold it, float32."""
    counted = {name: histogram.largest for name, histogram in calibration.histograms.items()}
    kept = float32_reasons(network, counted | dict(calibration.largest))
    half = {
        name
        for node in float_nodes(network, placement)
        if node.output[0] not in kept
        for name in node.output
        if name in network.floats
    }
    floats = network.floats | {name + _BACK for name in placement.pairs}
    return Caster(quantized, floats=floats, half=half, heads=model.metadata.heads).written()


# --- what the metadata says -------------------------------------------------------------------------------------------


def _metadata(
    model: OnnxModel, proto: onnx.ModelProto, placement: Placement, calibration: Calibration, options: Int8Options
) -> ModelMetadata:
    account = count_int8(proto)
    names = {node.output[0]: node.name or node.output[0] for node in proto.graph.node if node.op_type == "Conv"}
    int8 = Int8Info(
        method=options.method,
        images=calibration.images,
        images_sha256=calibration.images_sha256,
        rest=options.rest,
        convolutions=len(account.convolutions),
        int8_convolutions=account.int8_convolutions,
        share=account.share,
        kept=tuple((names[output], reason) for output, reason in placement.kept.items()),
    )
    notes = (*model.metadata.notes, *_notes(int8, account, placement.islands), *calibration.notes)
    logger.info("%s", "; ".join(notes))
    return replace(model.metadata, precision="int8", int8=int8, notes=notes)


def _notes(int8: Int8Info, account: Int8Account, islands: Mapping[str, str]) -> Iterator[str]:
    share = "" if int8.share is None else f", {int8.share:.1%} of all multiply-accumulates"
    yield f"int8: {int8.int8_convolutions} of {int8.convolutions} convolutions{share}; the rest is {int8.rest}"
    yield (
        f"ranges of {sum(account.pairs.values())} tensors in {account.scales} scales, by {int8.method} on "
        f"{int8.images} image{'s' * (int8.images != 1)}"
    )
    for reason in dict.fromkeys(reason for _, reason in int8.kept):
        layers = [layer for layer, why in int8.kept if why == reason]
        more = f" and {len(layers) - _NAMED} more" * (len(layers) > _NAMED)
        yield f"{int8.rest}: {', '.join(layers[:_NAMED])}{more} ({reason})"
    if islands:
        shown = [f"{op} ({name})" for name, op in list(islands.items())[:_NAMED]]
        more = f" and {len(islands) - _NAMED} more" * (len(islands) > _NAMED)
        yield f"float between INT8 convolutions: {', '.join(shown)}{more}"
