"""GPTQ: weight rounding that keeps the outputs of each convolution, not its weights.

Rounding each weight to the nearest step minimises the error of the weights. What matters is the error of the outputs,
where errors of weights with correlated inputs can cancel. For weights w of one output, integers q in steps of its scale
and inputs x with the second moments H = E[x x'] around their mean, the mean squared error is (w - q) H (w - q)'.

So the input columns are rounded one after the other, and the error of a column is passed on to those that are still to
be rounded (Frantar et al., "GPTQ", ICLR 2023; in the order of Babai's nearest plane algorithm): with the Cholesky
factor R of H + damping = R'R, upper triangular, from the last column to the first,
q_j = round(w_j + sum over k > j of R_jk / R_jj (w_k - q_k)). The bias takes the change of the mean.

The inputs are those of the network that is INT8 up to the convolution. How strong the damping must be depends on how
many there are, so it is chosen for each convolution: rounded for every other image, the weights must have the smallest
error on the images in between, or else they are rounded to the nearest step. Scales stay as they are, and so do the
Q/DQ pairs: only integers in the file change.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from yolov7_deploy._text import get_logger
from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.histogram import LEVELS, REDUCED_LEVELS
from yolov7_deploy.precision.int8 import (
    QuantizedWeight,
    RoundedConvolution,
    check_same_network,
    excluded_outputs,
    insert_qdq,
    integer_bias,
    tensor_ranges,
)
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.qdq_placement import place_qdq
from yolov7_deploy.precision.subgraph import Network, node_inputs

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
AnyArray = npt.NDArray[np.generic]
Tensors = dict[str, AnyArray]

ROUNDING_IMAGES = 32
POSITIONS = 400  # of each image: all of a map of 20x20
DAMPINGS = (1.0, 0.1, 0.01)  # in units of the mean second moment of an input, from strong to weak
MEMORY_BYTES = 1e9  # limit for the tensors that stay in memory between convolutions
_BLOCK = 64  # columns whose errors are passed on together


def round_weights(
    model: OnnxModel,
    calibration: Calibration,
    images: Sequence[Image],
    options: Int8Options,
    *,
    progress: Progress | None = None,
) -> dict[str, RoundedConvolution]:
    """Return INT8 weights and biases of the convolutions, by their outputs, for `to_int8`.

    Convolutions with groups, with weights that another one shares, or with more or fewer than two dimensions are left
    out: theirs are rounded to the nearest step. The result depends only on the arguments: positions are drawn with a
    fixed seed.

    Args:
        model: A float32 graph; it is not modified.
        calibration: Calibration of this graph.
        images: Calibration images, uint8 BGR; 32 are enough.
        options: Those of the quantization.
        progress: Called with the number of finished convolutions and of all.

    Raises:
        ExportError: The calibration belongs to another network, or an excluded layer does not exist.
    """
    start = time.perf_counter()
    network = Network(model)
    check_same_network(network, calibration)
    placement = place_qdq(network, excluded_outputs(network, options.exclude), for_cpu=options.target != "tensorrt")
    ranges = tensor_ranges(network, placement, calibration, options)
    proto = insert_qdq(network, placement, ranges, calibration.input_means, options)
    quantized = Network(OnnxModel.of(proto, model.metadata))
    run = _StepwiseRun(quantized, proto.graph.input[0].name, [network_input(one, model.metadata) for one in images])
    layers = [_Layer(network, quantized, output) for output in _supported(network, placement.convolutions)]
    rounded = {}
    for done, layer in enumerate(layers, 1):
        halves = _Moments(layer), _Moments(layer)
        for number, data in enumerate(run.get(layer.data)):
            halves[number % 2].add(data.astype(np.float32, copy=False), seed=number)
        rounded[layer.output] = layer.round(*halves, REDUCED_LEVELS if options.reduce_range else LEVELS)
        layer.store(rounded[layer.output])
        if progress:
            progress(done, len(layers))
    logger.info("rounded %d convolutions on %d images, %.1f s", len(rounded), len(images), time.perf_counter() - start)
    return rounded


def _supported(network: Network, outputs: Sequence[str]) -> Iterator[str]:
    """Yield the outputs of the convolutions whose weights can be fitted."""
    readers = Counter(name for node in network.nodes for name in node.input)
    for output in outputs:
        node = network.producers[output]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        has_padding = attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        is_plain = attributes.get("group", 1) == 1 and has_padding and network.weights[node.input[1]].ndim == 4
        has_constant_bias = len(node.input) < 3 or not node.input[2] or node.input[2] in network.weights
        if is_plain and has_constant_bias and readers[node.input[1]] == 1:
            yield output


class _StepwiseRun:
    """A network on several images, run as far as the tensor that is asked for; constants may change in between.

    Only tensors that later nodes read stay in memory. Where they would take more than `MEMORY_BYTES` (the first maps
    are the largest), nothing is kept, and the next request runs these nodes again.

    Args:
        network: The network.
        name: Its input.
        images: The input for each image.
    """

    def __init__(self, network: Network, name: str, images: Sequence[AnyArray]) -> None:
        self._network, self._start = network, 0
        self._states: list[Tensors] = [{name: array} for array in images]
        self._ends = {name: index + 1 for index, node in enumerate(network.nodes) for name in node.output}
        self._last_use = {name: index for index, node in enumerate(network.nodes) for name in node_inputs(node)}

    def get(self, name: str) -> Iterator[AnyArray]:
        """Yield a tensor for each image; requests are in execution order."""
        stop = max(self._start, self._ends.get(name, 0))
        nodes = self._network.nodes[self._start : stop]
        wanted = [output for node in nodes for output in node.output if self._is_needed(output, stop, name)]
        runner = self._runner(nodes, wanted) if wanted else None
        states: list[Tensors] | None = []
        for state in self._states:
            found: Tensors = {**state, **(runner.run(state) if runner else {})}
            yield found[name]
            found = {key: value for key, value in found.items() if self._last_use.get(key, -1) >= stop}
            if sum(value.nbytes for value in found.values()) * len(self._states) > MEMORY_BYTES:
                states = None
            if states is not None:
                states.append(found)
        if states is not None:
            self._states, self._start = states, stop

    def _is_needed(self, output: str, stop: int, name: str) -> bool:
        return output == name or self._last_use.get(output, -1) >= stop

    def _runner(self, nodes: Sequence[onnx.NodeProto], names: Sequence[str]) -> NetworkRunner:
        types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in self._states[0].items()}
        inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
        return NetworkRunner(self._network.proto, nodes, names, inputs=inputs)


class _Layer:
    """One convolution, in float32 and in the INT8 graph.

    Args:
        network: The float32 network.
        quantized: The INT8 network, whose constants `store` changes.
        output: Output of the convolution, in both.

    Attributes:
        output: See above.
        data: Its input in the INT8 graph.
        weight, matrix, bias: float32 [O, I, kH, kW], the same as [O, d], and [O].
        steps: Scales of the INT8 weights [O, 1].
    """

    def __init__(self, network: Network, quantized: Network, output: str) -> None:
        node, int8_node = network.producers[output], quantized.producers[output]
        self.output, self.data = output, int8_node.input[0]
        self.weight = network.weights[node.input[1]]
        self.matrix = self.weight.reshape(len(self.weight), -1)
        has_bias = len(node.input) > 2 and node.input[2]
        self.bias = network.weights[node.input[2]] if has_bias else np.zeros(len(self.weight), np.float32)
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        self._strides = attributes.get("strides", [1, 1])
        self._dilations = attributes.get("dilations", [1, 1])
        self._pads = attributes.get("pads", [0, 0, 0, 0])
        constants = {tensor.name: tensor for tensor in quantized.proto.graph.initializer}
        self._integers, self._scales = (constants[name] for name in quantized.producers[int8_node.input[1]].input[:2])
        self.steps = numpy_helper.to_array(self._scales)[:, None]
        self._int8_bias = [constants[name] for name in int8_node.input[2:] if name in constants]
        if not self._int8_bias:
            self._int8_bias = [constants[name] for name in quantized.producers[int8_node.input[2]].input[:2]]

    def draw_inputs(self, data: FloatArray, *, seed: int) -> FloatArray:
        """Return the inputs of random positions of a map [B, I, H, W], in the order of the weights: [d, POSITIONS]."""
        top, left, bottom, right = self._pads
        padded = np.pad(data[0], ((0, 0), (top, bottom), (left, right)))
        offsets = [
            (i * self._dilations[0], j * self._dilations[1])
            for i in range(self.weight.shape[2])
            for j in range(self.weight.shape[3])
        ]
        height, width = (
            (size - 1 - last) // stride + 1
            for size, last, stride in zip(padded.shape[1:], offsets[-1], self._strides, strict=True)
        )
        drawn = np.random.default_rng(seed).permutation(height * width)[:POSITIONS]
        rows, columns = np.divmod(np.sort(drawn), width)
        rows, columns = rows * self._strides[0], columns * self._strides[1]
        return np.stack([padded[:, rows + i, columns + j] for i, j in offsets], axis=1).reshape(-1, rows.size)

    def round(self, first: _Moments, second: _Moments, levels: int) -> RoundedConvolution:
        """Return the weights with which the outputs change least, and their bias; see the module.

        Args:
            first: Moments of some of the images.
            second: Those of the others.
            levels: The largest integer.
        """
        both, damping = first + second, self._choose_damping(first, second, levels)
        integers = self._nearest(levels) if damping is None else self._rounded(both, damping, levels)
        quantized = QuantizedWeight(integers.reshape(self.weight.shape).astype(np.int8), self.steps[:, 0])
        return RoundedConvolution(quantized, self.bias - both.mean_change(integers))

    def _choose_damping(self, first: _Moments, second: _Moments, levels: int) -> float | None:
        """Return the one with which weights rounded for the first moments have the smallest error with the second.

        `None` stands for the nearest step, which is also for a single image: nothing can be tried on another one.
        """
        if not second.count:
            return None
        best = nearest = second.error(self._nearest(levels))
        chosen = None
        for damping in DAMPINGS:
            error = second.error(self._rounded(first, damping, levels))
            if error >= best:
                break
            best, chosen = error, damping
        logger.debug("%s: damping %s, error %.3g instead of %.3g", self.output, chosen, best, nearest)
        return chosen

    def _nearest(self, levels: int) -> FloatArray:
        integers: FloatArray = np.clip(np.rint(self.matrix / self.steps), -levels, levels)
        return integers

    def _rounded(self, moments: _Moments, damping: float, levels: int) -> FloatArray:
        """Return the integers [O, d] for the moments; the nearest ones if the damping is too weak for float32."""
        squares = moments.around_means()
        squares[np.diag_indices_from(squares)] += damping * squares.diagonal().mean() + np.finfo(np.float32).tiny
        try:
            return round_columns(self.matrix / self.steps, squares, levels)
        except np.linalg.LinAlgError:
            return self._nearest(levels)

    def store(self, rounded: RoundedConvolution) -> None:
        """Replace weights and bias in the INT8 graph."""
        _replace(self._integers, rounded.weight.values)
        bias, *scales = self._int8_bias
        if scales:
            _replace(bias, integer_bias(rounded.bias, numpy_helper.to_array(scales[0])))
        else:
            _replace(bias, rounded.bias)


def _replace(tensor: onnx.TensorProto, values: AnyArray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


class _Moments:
    """Means and second moments of the inputs of a convolution.

    Attributes:
        count: Number of positions.
    """

    def __init__(self, layer: _Layer) -> None:
        inputs = layer.matrix.shape[1]
        self._layer, self.count = layer, 0
        self._inputs, self._squares = np.zeros(inputs, np.float32), np.zeros((inputs, inputs), np.float32)

    def add(self, data: FloatArray, *, seed: int) -> None:
        """Add positions of an image, given as the quantized input [B, I, H, W]."""
        inputs = self._layer.draw_inputs(data, seed=seed)
        self.count += inputs.shape[1]
        self._inputs += inputs.sum(axis=1)
        self._squares += inputs @ inputs.T

    def __add__(self, other: _Moments) -> _Moments:
        both = _Moments(self._layer)
        both.count = self.count + other.count
        both._inputs, both._squares = self._inputs + other._inputs, self._squares + other._squares
        return both

    def around_means(self) -> FloatArray:
        """Return the second moments around the means [d, d]."""
        means = self._inputs / np.float32(self.count)
        moments: FloatArray = self._squares / np.float32(self.count) - np.outer(means, means)
        return moments

    def error(self, integers: FloatArray) -> float:
        """Return the mean squared change of the outputs that INT8 weights make, without that of their means."""
        change = integers * self._layer.steps - self._layer.matrix
        return float(np.einsum("od,od->", change @ self.around_means(), change, dtype=np.float64))

    def mean_change(self, integers: FloatArray) -> FloatArray:
        """Return the change of the mean outputs [O] that INT8 weights make."""
        change = integers * self._layer.steps - self._layer.matrix
        means: FloatArray = change @ self._inputs / np.float32(self.count)
        return means


def round_columns(steps: FloatArray, moments: FloatArray, levels: int) -> FloatArray:
    """Return integers q near `steps` with a small error (q - steps) H (q - steps)' of each row.

    The columns with the largest moments come first: later ones make up for them.

    Args:
        steps: Weights in units of their scales [O, d].
        moments: H, positive definite [d, d].
        levels: The largest integer.
    """
    order = np.argsort(moments.diagonal(), kind="stable")
    factor = np.linalg.cholesky(moments[np.ix_(order, order)]).T.astype(np.float32)
    factor /= factor.diagonal()[:, None]
    steps = steps[:, order].astype(np.float32)
    errors = np.zeros_like(steps)
    for stop in range(len(order), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        passed_on = errors[:, stop:] @ factor[start:stop, stop:].T
        for column in range(stop - 1, start - 1, -1):
            wanted = steps[:, column] + passed_on[:, column - start]
            errors[:, column] = steps[:, column] - np.clip(np.rint(wanted), -levels, levels)
            passed_on += np.outer(errors[:, column], factor[start:stop, column])
    integers = np.empty_like(steps)
    integers[:, order] = np.rint(steps - errors)
    return integers
