"""The fused PyTorch network with the rounding of its INT8 file, for quantization-aware training and evaluation.

One source decides where values are rounded: the network is exported to ONNX, `place_qdq` places the Q/DQ pairs, and
every pair becomes a fake quantizer on the traced operation that computes the tensor, read by the same operations. So
the INT8 file of the trained weights has the pairs that calibration alone would give it, and computes what this network
computes. FP16 operations compute in float32 here, and a pair between two operations of ONNX that are one of PyTorch
(the two slices of ReOrg) is left out, because it rounds what is rounded with the same scale.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from yolov7_deploy._serialization import MAX_REPR
from yolov7_deploy._text import printable_line
from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.checkpoint.quantization import INTEGER_LIMITS, TrainedQuantization, TrainedRange
from yolov7_deploy.errors import CheckpointError, ExportError
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx, tensor_origins, trace
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.precision.histogram import LEVELS, REDUCED_LEVELS
from yolov7_deploy.precision.qdq_placement import QdqPlacement, is_pass_through, place_qdq
from yolov7_deploy.precision.subgraph import Network

_QUANTIZERS = "quantizers"
_INT32_LEVELS = 2**31 - 1


class FakeQuantize(torch.autograd.Function):
    """Rounds values to the steps of an integer type: y = (clamp(round(x / s) + z, low, high) - z) s, as in ONNX.

    The gradient of x is passed through inside the range and 0 outside (straight-through estimator). That of the scale
    is the one of LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020, equation 3): round(x / s) - x / s
    inside, and the clamped integer, low - z or high - z, outside.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        low: int,
        high: int,
        gradient_factor: float,
    ) -> Tensor:
        """Round `x`; `scale` and `zero` are one number, or one for each output channel of a weight."""
        lowest, highest = low - zero, high - zero
        ctx.save_for_backward(x, scale, lowest, highest)
        ctx.gradient_factor = gradient_factor
        return torch.div(x, scale).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of `x` and `scale`; that of the scale is multiplied by `gradient_factor`."""
        x, scale, lowest, highest = ctx.saved_tensors
        steps = x / scale
        integers = torch.round(steps).clamp_(lowest, highest)
        error = integers - steps
        inside = error.abs() <= 0.5
        for_scale = None
        if ctx.needs_input_grad[1]:
            error = torch.where(inside, error, integers)
            for_scale = error.mul_(gradient).sum_to_size(scale.shape) * ctx.gradient_factor
        return gradient * inside, for_scale, None, None, None, None


class ActivationQuantizer(nn.Module):
    """A Q/DQ pair with a learned scale.

    Args:
        low: The smallest integer.
        high: The largest one.
        learned: Learn the scale; the range of a sigmoid is known.

    Attributes:
        scale: The step, a float32 number.
        zero: The integer of 0; it is not learned.
        enabled: False passes values through.
    """

    zero: Tensor

    def __init__(self, low: int, high: int, *, learned: bool) -> None:
        super().__init__()
        self.low, self.high, self.enabled = low, high, True
        self.scale = nn.Parameter(torch.ones(()), requires_grad=learned)
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Round a tensor [B, ...].

        LSQ divides the gradient of a scale by the root of (values per image x largest integer), which balances its
        relative change with that of the weights (section 2.2).
        """
        if not self.enabled:
            return x
        factor = (x[0].numel() * self.high) ** -0.5
        rounded: Tensor = FakeQuantize.apply(x, self.scale, self.zero, self.low, self.high, factor)  # type: ignore[no-untyped-call]
        return rounded


class Int8Convolution(nn.Module):
    """A convolution with weights that are rounded to INT8, with one scale for each output channel.

    The scales follow from the weights, as in `quantize_weight`: the largest one of a channel becomes `levels`.

    Args:
        convolution: Its weights are trained.
        levels: The largest integer.
        data: Quantizer of its input, if the bias is rounded, too: to int32, in steps of a product of data and weight.
    """

    def __init__(self, convolution: nn.Conv2d, levels: int, data: ActivationQuantizer | None) -> None:
        super().__init__()
        self.convolution, self.levels, self._data = convolution, levels, (data,)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] to [B, c_out, H', W']."""
        scale = self.weight_scales()
        weight, bias = _round(self.convolution.weight, scale, self.levels), self.convolution.bias
        (data,) = self._data
        if bias is not None and data is not None:
            bias = _round(bias, scale.flatten() * data.scale.detach(), _INT32_LEVELS)
        y: Tensor = self.convolution._conv_forward(x, weight, bias)
        return y

    def weight_scales(self) -> Tensor:
        """Return the scale of each output channel, [c_out, 1, 1, 1]."""
        amax = self.convolution.weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
        scale = torch.where(amax > 0, amax, 1.0) / self.levels
        return scale.clamp_(min=torch.finfo(scale.dtype).tiny)


def _round(values: Tensor, scale: Tensor, levels: int) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32, device=scale.device)
    rounded: Tensor = FakeQuantize.apply(values, scale, zero, -levels, levels, 1.0)  # type: ignore[no-untyped-call]
    return rounded


class FakeQuantizedYolov7(Yolov7):
    """A fused network that computes what its INT8 file computes, with the operations of PyTorch.

    Parameters are those of the fused network under official names, and `quantizers.NAME.scale`, where NAME is that of
    the scale in the ONNX file with `/` for dots.

    Args:
        model: A fused network; it is not modified.
        target: See `Int8Options`.
        reduce_range: Weights of 7 bits; see `Int8Options`.

    Attributes:
        placement: The Q/DQ pairs of the INT8 file.
        quantizers: Fake quantizers, one for each scale.
    """

    def __init__(self, model: Yolov7, *, target: str, reduce_range: bool) -> None:
        # On the meta device, so that no random weights are generated and then overwritten.
        with torch.device("meta"):
            super().__init__(model.variant, classes=model.classes, fused=True)
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.load_state_dict(state, strict=True, assign=True)
        self.requires_grad_(True)
        self.target, self.reduce_range = target, reduce_range
        network = Network(export_network(self))
        self.placement = place_qdq(network, {}, for_cpu=target != "tensorrt")
        self.quantizers = nn.ModuleDict(self._new_quantizers(network))
        # In a tuple, so that its modules, which are those of this network, are not registered twice.
        self._traced = (self._insert_quantizers(network),)

    def head_maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps [B, 3 * (5 + C), H, W] of the heads, fine to coarse, as the INT8 file computes them."""
        maps: list[Tensor] = self._traced[0](images)
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return raw maps [B, 3, H, W, 5 + C], fine to coarse."""
        return [self.head.as_raw(x) for x in self.head_maps(images)]

    def set_inner_pairs(self, *, enabled: bool) -> None:
        """Round before activations as ONNX Runtime does, or not, as OpenVINO; see `QdqPlacement.inner_pairs`."""
        for name in self.placement.inner_pairs:
            self._quantizer(name).enabled = enabled

    @torch.no_grad()
    def load_ranges(self, ranges: Iterable[TrainedRange]) -> None:
        """Set scale and zero; `ranges` are those of all tensors that have a pair."""
        for one in ranges:
            quantizer = self._quantizer(one.tensor)
            quantizer.scale.fill_(one.scale)
            quantizer.zero.fill_(one.zero)

    def _quantizer(self, name: str) -> ActivationQuantizer:
        quantizer = self.quantizers[_key(scale_name(self.placement, name))]
        assert isinstance(quantizer, ActivationQuantizer)
        return quantizer

    # --- the traced network -------------------------------------------------------------------------------------------

    def _new_quantizers(self, network: Network) -> dict[str, nn.Module]:
        low, high = INTEGER_LIMITS[self.target]
        quantizers: dict[str, nn.Module] = {}
        for name in self.placement.pairs:
            producer = network.producers.get(name)
            is_sigmoid = producer is not None and producer.op_type == "Sigmoid"
            key = _key(scale_name(self.placement, name))
            quantizers.setdefault(key, ActivationQuantizer(low, high, learned=not is_sigmoid))
        return quantizers

    def _insert_quantizers(self, network: Network) -> fx.GraphModule:
        """Return the traced network with a quantizer on every tensor that has a pair, and with INT8 weights."""
        traced = trace(self)
        outputs, origins = tensor_origins(traced)
        if self.placement.inner_pairs:
            _split_silu(traced, outputs, origins)
        for name, consumers in self.placement.pairs.items():
            source = outputs.get(name)
            if source is None:
                _check_inside(network, name)
                continue
            with traced.graph.inserting_after(source):
                target = f"{_QUANTIZERS}.{_key(scale_name(self.placement, name))}"
                rounded = traced.graph.create_node("call_module", target, (source,))
            for consumer in dict.fromkeys(origins[consumer] for consumer in consumers):
                consumer.replace_input_with(source, rounded)
        levels = REDUCED_LEVELS if self.reduce_range else LEVELS
        modules: dict[str, Any] = dict(traced.named_modules())
        modules |= {f"{_QUANTIZERS}.{key}": quantizer for key, quantizer in self.quantizers.items()}
        for name in self.placement.convolutions:
            target = str(origins[name].target)
            data = self._quantizer(network.producers[name].input[0]) if self.target != "tensorrt" else None
            modules[target] = Int8Convolution(modules[target], levels, data)
        return fx.GraphModule(modules, traced.graph)


def export_network(model: Yolov7) -> Any:  # noqa: ANN401
    """Return a fused model as ONNX, without NMS."""
    metadata = ModelMetadata(
        variant=model.variant.name,
        class_names=tuple(f"class_{i}" for i in range(model.classes)),
        strides=model.variant.strides,
        anchors=model.anchors,
    )
    return export_onnx(model, metadata, ExportOptions(nms="none", simplify=False))


def scale_name(placement: QdqPlacement, name: str) -> str:
    """Return the tensor after which the scale of a pair is named."""
    return name if name in placement.inner_pairs else placement.scale_groups[name][0]


def _key(name: str) -> str:
    """Return the key of a quantizer; keys of modules have no dots."""
    return name.replace(".", "/")


def _check_inside(network: Network, name: str) -> None:
    """Check that a tensor without an operation of its own in PyTorch holds rounded values already."""
    node = network.producers.get(name)
    if node is None or not is_pass_through(node):
        raise ExportError(
            f"{name} has a Q/DQ pair, but PyTorch does not compute it.",
            fix="Add it to _split_silu in fake_quantize.py.",
        )


def _split_silu(traced: fx.GraphModule, outputs: dict[str, fx.Node], origins: dict[str, fx.Node]) -> None:
    """Replace every SiLU by a sigmoid and a product, as in ONNX, where a pair is between them."""
    names: dict[fx.Node, list[str]] = {}
    for name, node in origins.items():
        names.setdefault(node, []).append(name)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.SiLU):
            continue
        with traced.graph.inserting_before(node):
            sigmoid = traced.graph.call_function(torch.sigmoid, (node.args[0],))
            product = traced.graph.call_function(operator.mul, (node.args[0], sigmoid))
        node.replace_all_uses_with(product)
        traced.graph.erase_node(node)
        for name in names[node]:
            is_product = name in outputs
            origins[name] = outputs[name] = product if is_product else sigmoid


# --- weights files ----------------------------------------------------------------------------------------------------


def load_fake_quantized(checkpoint: Checkpoint) -> FakeQuantizedYolov7:
    """Return the network of weights that were trained for INT8, in eval mode."""
    quantization = checkpoint.quantization
    assert quantization is not None, "the caller checks it"
    return restore_fake_quantized(build_model(checkpoint), quantization).eval()


def restore_fake_quantized(model: Yolov7, quantization: TrainedQuantization) -> FakeQuantizedYolov7:
    """Return a fused network with the ranges of a quantization.

    Raises:
        CheckpointError: The ranges are not those of this network's Q/DQ pairs.
    """
    network = FakeQuantizedYolov7(model, target=quantization.target, reduce_range=quantization.reduce_range)
    differing = set(network.placement.pairs) ^ {one.tensor for one in quantization.ranges}
    if differing:
        raise CheckpointError(
            f"The weights were trained for INT8 as another network: {len(differing)} activation ranges are missing or "
            f"unknown, such as that of {printable_line(min(differing)[:MAX_REPR])}.",
            fix="Copy the file again, or train it again:  y7 train --qat --weights WEIGHTS --data D.yaml",
        )
    network.load_ranges(quantization.ranges)
    return network


def split_state(
    tensors: Mapping[str, Tensor], placement: QdqPlacement
) -> tuple[dict[str, Tensor], tuple[TrainedRange, ...]]:
    """Split the state of a `FakeQuantizedYolov7` into the weights and the range of every tensor that has a pair."""
    prefix = f"{_QUANTIZERS}."
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    ranges = []
    for name in placement.pairs:
        key = f"{prefix}{_key(scale_name(placement, name))}"
        ranges.append(TrainedRange(tensor=name, scale=float(tensors[f"{key}.scale"]), zero=int(tensors[f"{key}.zero"])))
    return weights, tuple(ranges)
