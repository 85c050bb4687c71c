"""What one pass of a network asks of a GPU, kernel by kernel: operations to do and elements to move.

The list is that of the network itself: it runs on torch's meta device (shapes without numbers), and every operator that
would launch a kernel on a GPU is written down. Nothing here knows how a block is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.model.yolov7 import Yolov7

CONVOLUTION = "convolution"
_ALLOCATION = {"empty", "empty_like", "detach"}
_ACTIVATIONS = {"silu_", "leaky_relu_"}
_CONCATENATION = "cat"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel launch for one image. With a batch of B everything but `weights` is B times as much.

    Attributes:
        layer: Official number of the layer it belongs to.
        kind: Official class name of that layer.
        operator: torch's name of it: `convolution`, `silu_`, `cat`.
        flops: Two for each multiply-accumulate of a convolution; 0 for all others, which memory bounds.
        weights: Elements of weights and biases read.
        read: Elements of activations read.
        written: Elements of activations written.
        pixels: Cells of the output map; rows of the matrix that a convolution computes, for one image.
        filters: Output channels of a convolution: columns of that matrix.
        depth: Products summed for one element of it, c_in * k * k; 0 for all others.
    """

    layer: int
    kind: str
    operator: str
    flops: int
    weights: int
    read: int
    written: int
    pixels: int
    filters: int
    depth: int


@lru_cache(maxsize=64)
def eager_kernels(variant: str, input_hw: tuple[int, int]) -> tuple[Kernel, ...]:
    """What PyTorch launches for the fused network and the decoding of its boxes, in order.

    Args:
        variant: Official name.
        input_hw: Height and width of the image in pixels.

    Raises:
        UsageError: Unknown variant, or a size that its strides do not divide.
    """
    architecture = find_variant(variant)
    check_size(variant, input_hw)
    with torch.device("meta"):
        model = Yolov7(architecture, fused=True).eval()
    recorder = _Recorder()
    handles = [
        block.register_forward_pre_hook(_entering(recorder, layer.index, layer.kind))
        for layer, block in zip(model.layers, model.model, strict=True)
    ]
    try:
        with torch.no_grad(), recorder:
            model.predict(torch.empty(1, 3, *input_hw, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(recorder.kernels)


@lru_cache(maxsize=64)
def compiled_kernels(variant: str, input_hw: tuple[int, int]) -> tuple[Kernel, ...]:
    """What is left of `eager_kernels` in a TensorRT engine.

    Activations are done where the convolution writes, concatenation is where its inputs are written, and the decoding
    of a level is one kernel that reads the map once and writes the boxes once.

    Raises:
        UsageError: As for `eager_kernels`.
    """
    kernels = eager_kernels(variant, input_hw)
    head = kernels[-1].layer
    compiled: list[Kernel] = []
    for kernel in kernels:
        if kernel.layer == head:
            if kernel.operator == CONVOLUTION:
                decoding = replace(kernel, operator="decode", flops=0, weights=0, read=kernel.written, depth=0)
                compiled += [kernel, decoding]
        elif kernel.operator not in _ACTIVATIONS and (kernel.operator != _CONCATENATION or kernel.kind == "ReOrg"):
            compiled.append(kernel)
    return tuple(compiled)


def check_size(variant: str, input_hw: tuple[int, int]) -> None:
    """Whether the variant takes images of this size.

    Raises:
        UsageError: Unknown variant, or a side that is no multiple of its largest stride.
    """
    stride = max(find_variant(variant).strides)
    for side in input_hw:
        if side < stride or side % stride:
            raise UsageError(
                f"{variant} takes input sides that are multiples of {stride}, not {side}.",
                fix=f"For example: {max(round(side / stride), 1) * stride}",
            )


def _entering(recorder: _Recorder, index: int, kind: str) -> Any:  # noqa: ANN401 - a hook of torch is untyped
    def note(*_: object) -> None:
        recorder.layer, recorder.kind = index, kind

    return note


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Writes down every operator that computes something; those that only look at memory differently cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self.layer, self.kind = -1, ""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator of torch
        types: Any,  # noqa: ANN401 - not looked at
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator gives
        result = func(*args, **(kwargs or {}))
        operator = func._schema.name.partition("::")[2]
        if operator not in _ALLOCATION and not _is_view(func):
            self.kernels.append(self._kernel(operator, _tensors(args), _tensors(result)[0]))
        return result

    def _kernel(self, operator: str, inputs: list[Tensor], output: Tensor) -> Kernel:
        flops = weights = filters = depth = 0
        if operator == CONVOLUTION:
            image, *parameters = inputs
            inputs, weights = [image], sum(tensor.numel() for tensor in parameters)
            filters, depth = output.shape[1], parameters[0][0].numel()
            flops = 2 * depth * output.numel()
        return Kernel(
            layer=self.layer,
            kind=self.kind,
            operator=operator,
            flops=flops,
            weights=weights,
            read=sum(tensor.numel() for tensor in inputs),
            written=output.numel(),
            pixels=output.shape[-2:].numel(),
            filters=filters,
            depth=depth,
        )


def _is_view(operator: Any) -> bool:  # noqa: ANN401 - an operator of torch
    returns = operator._schema.returns
    return any(given.alias_info is not None and not given.alias_info.is_write for given in returns)


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def gigabytes(kernels: Iterable[Kernel], *, batch: int, bytes_per_element: int) -> float:
    """What the kernels move in all, 10^9 bytes."""
    elements = sum(kernel.weights + batch * (kernel.read + kernel.written) for kernel in kernels)
    return elements * bytes_per_element / 1e9
