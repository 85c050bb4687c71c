"""What a network costs: layers, parameters in every form, and floating-point operations, as the paper counts them.

Networks are laid on torch's meta device, which has shapes but no numbers: no memory, no weights, a second at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.configs import Layer, Variant, find_variant
from yolov7_deploy.model.yolov7 import Yolov7

Form = Literal["both", "training", "deploy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Complexity:
    """What one variant costs with a number of classes.

    Attributes:
        variant: Official name.
        classes: Number of classes.
        layers: Rows of the deploy table; fusing removes none, it makes them cheaper.
        layers_training: Rows of the training table, auxiliary branches included.
        parameters_training: Learnable numbers of the training form: with implicit knowledge and auxiliary branches.
        parameters_deploy: Of the deploy form as it is published: BatchNorm and RepConv branches not folded.
        parameters_fused: Of what runs in the end.
        paper_size: Input side of the paper's tables (for tiny that of Table 2, 640).
        gflops_paper: Fused, at `paper_size`.
        size: Input side of the two numbers below.
        gflops: Fused, at `size`.
        gflops_training: Of the training graph with its auxiliary branches, at `size`.
    """

    variant: str
    classes: int
    layers: int
    layers_training: int
    parameters_training: int
    parameters_deploy: int
    parameters_fused: int
    paper_size: int
    gflops_paper: float
    size: int
    gflops: float
    gflops_training: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """One row of a layer table.

    Attributes:
        index: Official number, `N` of the checkpoint keys `model.N....`.
        kind: Official class name.
        c_out: Output channels.
        window: Kernel and stride as `3/2`, `/2` where a block halves the resolution by itself, `x2` upsampling.
        reduction: Input pixels per output cell; `None` for heads, which have several.
        sources: Numbers of the layers it reads, in concatenation order; -1 is the image.
        parameters: Learnable numbers before fusion.
        parameters_fused: After it; `None` where only the training form has the layer.
        form: `training` and `deploy` rows exist in that form only.
    """

    index: int
    kind: str
    c_out: int
    window: str
    reduction: int | None
    sources: tuple[int, ...]
    parameters: int
    parameters_fused: int | None
    form: Form


def complexity(variant: str, *, classes: int = 80, size: int | None = None) -> Complexity:
    """Layers, parameters and GFLOPs of a variant.

    Args:
        variant: Official name.
        classes: Number of classes.
        size: Side of a square input in pixels, a multiple of the largest stride; the paper's where absent.

    Raises:
        UsageError: Unknown variant, no classes, or a size its strides do not divide.
    """
    architecture = find_variant(variant)
    at = architecture.size if size is None else size
    training, deploy, fused = _forms(architecture, classes)
    return Complexity(
        variant=variant,
        classes=classes,
        layers=len(deploy.layers),
        layers_training=len(training.layers),
        parameters_training=parameter_count(training),
        parameters_deploy=parameter_count(deploy),
        parameters_fused=parameter_count(fused),
        paper_size=architecture.size,
        gflops_paper=gflops(fused, size=architecture.size),
        size=at,
        gflops=gflops(fused, size=at),
        gflops_training=gflops(training, size=at),
    )


def parameter_count(model: nn.Module) -> int:
    """Learnable numbers; running statistics and anchors are not among them."""
    return sum(parameter.numel() for parameter in model.parameters())


def gflops(model: Yolov7, *, size: int) -> float:
    """Billions of operations for one image of `size` x `size` pixels, auxiliary branches included if there are any.

    2 x the multiply-accumulates of every convolution, and one more for each output element that a BatchNorm shifts
    (fused, its bias; the head has no BatchNorm). Activations, pooling and decoding do not count. This is the paper's
    number within 0.5 %, except for D6, where the paper has the training graph.

    Args:
        model: On the meta device.
        size: In pixels.

    Raises:
        UsageError: The model's strides do not divide the size.
    """
    stride = max(model.variant.strides)
    if size < stride or size % stride:
        raise UsageError(
            f"{model.variant.name} takes input sides that are multiples of {stride}, not {size}.",
            fix=f"For example: {max(round(size / stride), 1) * stride}",
        )
    in_head = set(model.head.modules())
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        # A weight is [c_out, c_in, k, k]: weight[0] is what one output element multiplies and adds up.
        total += output.numel() * (module.weight[0].numel() + (module not in in_head))

    with _hooked([module for module in model.modules() if isinstance(module, nn.Conv2d)], count):
        _run(model, size)
    return 2 * total / 1e9


def layer_costs(variant: str, *, classes: int = 80) -> tuple[LayerCost, ...]:
    """The layer table in the official numbering: rows of both forms first, then those of one form only.

    Raises:
        UsageError: Unknown variant, or no classes.
    """
    training, deploy, fused = _forms(find_variant(variant), classes)
    reductions = _reductions(training)
    shared = len(deploy.layers) - 1
    rows = [_cost(training, index, fused, reductions, "both") for index in range(shared)]
    rows += [_cost(training, index, None, reductions, "training") for index in range(shared, len(training.layers))]
    return (*rows, _cost(deploy, shared, fused, reductions, "deploy"))


@lru_cache(maxsize=8)
def _forms(variant: Variant, classes: int) -> tuple[Yolov7, Yolov7, Yolov7]:
    """Training form, deploy form and fused form, on the meta device."""
    if classes < 1:
        raise UsageError(f"A detector has at least one class, not {classes}.", fix="For example: 80, those of COCO")
    with torch.device("meta"):
        return (
            # torch.normal, which draws the implicit knowledge, does not heed the device of the context
            Yolov7(variant, classes=classes, training_form=True).to("meta"),
            Yolov7(variant, classes=classes),
            Yolov7(variant, classes=classes, fused=True),
        )


def _run(model: Yolov7, size: int) -> None:
    # Only training mode runs the auxiliary branches; its BatchNorm would refuse maps of one cell.
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))


@contextmanager
def _hooked(modules: list[nn.Module], hook: object) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reductions(model: Yolov7) -> list[int]:
    """Input pixels per output cell, of every layer but the head."""
    side = max(model.variant.strides)
    sides: list[int] = []

    def note(_: nn.Module, __: object, output: Tensor) -> None:
        sides.append(output.shape[-1])

    with _hooked(list(model.model)[:-1], note):
        _run(model, side)
    return [side // found for found in sides]


def _cost(model: Yolov7, index: int, fused: Yolov7 | None, reductions: list[int], form: Form) -> LayerCost:
    layer = model.layers[index]
    is_head = index == len(model.layers) - 1
    return LayerCost(
        index=index,
        kind=layer.kind,
        c_out=3 * model.head.columns if is_head else layer.c_out,
        window=_window(layer),
        reduction=None if is_head else reductions[index],
        sources=layer.sources,
        parameters=parameter_count(model.model[index]),
        parameters_fused=None if fused is None else parameter_count(fused.model[index]),
        form=form,
    )


def _window(layer: Layer) -> str:
    match layer.kind:
        case "Conv" | "RepConv" | "MP" | "SP":
            return f"{layer.kernel}/{layer.stride}"
        case "DownC" | "ReOrg":
            return "/2"
        case "Upsample":
            return "x2"
        case _:
            return ""
