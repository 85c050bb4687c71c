"""The kernels of one pass of a network: operations and memory traffic of each.

The network runs on torch's meta device (shapes without values), and every operator that would launch a kernel on a GPU
is recorded. So this needs no knowledge of how blocks are built.
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
    """One kernel launch for one image. With a batch of B, everything except `weights` is multiplied by B.

    Attributes:
        layer: Official number of its layer.
        kind: Official class name of its layer.
        operator: Name in torch: `convolution`, `silu_`, `cat`.
        flops: Two for each multiply-accumulate of a convolution; 0 for others, which are bound by memory.
        weights: Elements of weights and biases that are read.
        read: Elements of activations that are read.
        written: Elements of activations that are written.
        pixels: Cells of the output map, which are the rows of the matrix product of a convolution.
        filters: Output channels of a convolution, which are its columns.
        depth: Products per element of it, c_in * k * k; 0 for other operators.
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
    """Return the kernels that PyTorch launches for the fused network and the decoding of its boxes, in order.

    Args:
        variant: Official name.
        input_hw: Height and width of the image in pixels.

    Raises:
        UsageError: The variant is unknown, or the size is not a multiple of its strides.
    """
    architecture = find_variant(variant)
    check_input_size(variant, input_hw)
    with torch.device("meta"):
        model = Yolov7(architecture, fused=True).eval()
    recorder = _Recorder()
    handles = [
        block.register_forward_pre_hook(_layer_hook(recorder, layer.index, layer.kind))
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
    """Return the kernels of a TensorRT engine.

    Compared with `eager_kernels`, activations are fused into convolutions, inputs of a concatenation are written in
    place, and decoding a level is one kernel that reads the map once and writes the boxes once.

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


def check_input_size(variant: str, input_hw: tuple[int, int]) -> None:
    """Check that a variant supports images of this size.

    Raises:
        UsageError: The variant is unknown, or the size is not a multiple of its largest stride.
    """
    stride = max(find_variant(variant).strides)
    for side in input_hw:
        if side < stride or side % stride:
            raise UsageError(
                f"{variant} needs input sizes that are multiples of {stride}, not {side}.",
                fix=f"For example: {max(round(side / stride), 1) * stride}",
            )


def _layer_hook(recorder: _Recorder, index: int, kind: str) -> Any:  # noqa: ANN401 - a hook of torch is untyped
    def set_layer(*_: object) -> None:
        recorder.layer, recorder.kind = index, kind

    return set_layer


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Records every operator that launches a kernel; views of memory do not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self.layer, self.kind = -1, ""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator of torch
        types: Any,  # noqa: ANN401 - not used
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of the operator
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
    """Return the memory traffic of all kernels in 10^9 bytes."""
    elements = sum(kernel.weights + batch * (kernel.read + kernel.written) for kernel in kernels)
    return elements * bytes_per_element / 1e9
