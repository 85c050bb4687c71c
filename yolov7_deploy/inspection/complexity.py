"""Cost of a network, compared with the paper: layers, parameters in training and deploy form, and FLOPs.

Networks are built on torch's meta device, which has shapes but no data: no memory, no weights, a second at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from yolov7_deploy.checkpoint import Checkpoint, load_checkpoint
from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.model.layer_table import Anchors, Layer, Variant
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.paper import ABLATIONS, TABLE_1, VARIANTS, PaperRow, paper_row

Form = Literal["both", "training", "deploy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Complexity:
    """Cost of one variant for a number of classes.

    Attributes:
        variant: Official name.
        classes: Number of classes.
        layers: Number of layers in deploy form; fusing does not change it.
        layers_training: Number of layers in training form, including auxiliary branches.
        parameters_training: Parameters in training form, with implicit knowledge and auxiliary branches.
        parameters_deploy: Parameters in deploy form as published, before BatchNorm and RepConv are fused.
        parameters_fused: Parameters after fusing.
        paper_size: Input size in the paper's tables (for tiny that of Table 2, 640).
        gflops_paper: GFLOPs of the fused network at `paper_size`.
        size: Input size of the two numbers below.
        gflops: GFLOPs of the fused network at `size`.
        gflops_training: GFLOPs of the training form with its auxiliary branches at `size`.
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
    """Cost of one layer.

    Attributes:
        index: Official number, `N` of the checkpoint keys `model.N....`.
        kind: Official class name.
        c_out: Output channels.
        kernel_stride: Kernel size and stride as `3/2`; `/2` for blocks that halve the resolution, `x2` for upsampling.
        reduction: Input pixels per output cell; `None` for heads, which have several.
        sources: Numbers of the input layers, in concatenation order; -1 is the image.
        parameters: Parameters before fusing.
        parameters_fused: Parameters after fusing; `None` if only the training form has the layer.
        form: `training` or `deploy` if only that form has the layer, else `both`.
    """

    index: int
    kind: str
    c_out: int
    kernel_stride: str
    reduction: int | None
    sources: tuple[int, ...]
    parameters: int
    parameters_fused: int | None
    form: Form


def complexity(variant: str, *, classes: int = 80, size: int | None = None) -> Complexity:
    """Return layers, parameters and GFLOPs of a variant.

    Args:
        variant: Official name.
        classes: Number of classes.
        size: Width and height of the input in pixels, a multiple of the largest stride; by default that of the paper.

    Raises:
        UsageError: The variant is unknown, there are no classes, or the size is not a multiple of the largest stride.
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
    """Return the number of learnable parameters, without running statistics and anchors."""
    return sum(parameter.numel() for parameter in model.parameters())


def gflops(model: Yolov7, *, size: int) -> float:
    """Return the GFLOPs for one image of `size` x `size` pixels, including auxiliary branches if there are any.

    Counted are 2 x the multiply-accumulates of every convolution, and one more for each output element that a
    BatchNorm shifts (fused: its bias; the head has no BatchNorm). Activations, pooling and decoding are not counted.
    This agrees with the paper within 0.5 %, except for D6, where the paper counts the training form.

    Args:
        model: A model on the meta device.
        size: Width and height of the input in pixels.

    Raises:
        UsageError: The size is not a multiple of the largest stride.
    """
    stride = max(model.variant.strides)
    if size < stride or size % stride:
        raise UsageError(
            f"The input size of {model.variant.name} must be a multiple of {stride}, not {size}.",
            fix=f"For example: {max(round(size / stride), 1) * stride}",
        )
    in_head = set(model.head.modules())
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        # A weight is [c_out, c_in, k, k]: weight[0] has one element per multiply-accumulate of an output element.
        total += output.numel() * (module.weight[0].numel() + (module not in in_head))

    with _hooked([module for module in model.modules() if isinstance(module, nn.Conv2d)], count):
        _run(model, size)
    return 2 * total / 1e9


def layer_costs(variant: str, *, classes: int = 80) -> tuple[LayerCost, ...]:
    """Return the layers in the official numbering: first those of both forms, then those of one form only.

    Raises:
        UsageError: The variant is unknown, or there are no classes.
    """
    training, deploy, fused = _forms(find_variant(variant), classes)
    reductions = _reductions(training)
    shared = len(deploy.layers) - 1
    rows = [_cost(training, index, fused, reductions, "both") for index in range(shared)]
    rows += [_cost(training, index, None, reductions, "training") for index in range(shared, len(training.layers))]
    return (*rows, _cost(deploy, shared, fused, reductions, "deploy"))


@lru_cache(maxsize=8)
def _forms(variant: Variant, classes: int) -> tuple[Yolov7, Yolov7, Yolov7]:
    """Return the network in training form, in deploy form and fused, on the meta device."""
    if classes < 1:
        raise UsageError(f"A detector has at least one class, not {classes}.", fix="For example: 80, as in COCO")
    with torch.device("meta"):
        return (
            # torch.normal, which initializes the implicit knowledge, ignores the device of the context
            Yolov7(variant, classes=classes, training_form=True).to("meta"),
            Yolov7(variant, classes=classes),
            Yolov7(variant, classes=classes, fused=True),
        )


def _run(model: Yolov7, size: int) -> None:
    # Only training mode runs the auxiliary branches, but there BatchNorm raises an error for maps of one cell.
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
    """Return the input pixels per output cell of every layer except the head."""
    side = max(model.variant.strides)
    sides: list[int] = []

    def record_size(_: nn.Module, __: object, output: Tensor) -> None:
        sides.append(output.shape[-1])

    with _hooked(list(model.model)[:-1], record_size):
        _run(model, side)
    return [side // output_side for output_side in sides]


def _cost(model: Yolov7, index: int, fused: Yolov7 | None, reductions: list[int], form: Form) -> LayerCost:
    layer = model.layers[index]
    is_head = index == len(model.layers) - 1
    return LayerCost(
        index=index,
        kind=layer.kind,
        c_out=3 * model.head.columns if is_head else layer.c_out,
        kernel_stride=_kernel_stride(layer),
        reduction=None if is_head else reductions[index],
        sources=layer.sources,
        parameters=parameter_count(model.model[index]),
        parameters_fused=None if fused is None else parameter_count(fused.model[index]),
        form=form,
    )


def _kernel_stride(layer: Layer) -> str:
    match layer.kind:
        case "Conv" | "RepConv" | "MP" | "SP":
            return f"{layer.kernel}/{layer.stride}"
        case "DownC" | "ReOrg":
            return "/2"
        case "Upsample":
            return "x2"
        case _:
            return ""


D6 = "yolov7-d6"
RECOMMENDED = "yolov7-elan3-n"  # the one ablation that is not in the paper


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperCost:
    """Our GFLOPs at an input size for which the paper has a row, and that row."""

    size: int
    gflops: float
    gflops_training: float
    row: PaperRow


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantRecord:
    """One variant compared with the paper.

    Attributes:
        variant: Official name.
        activation: `silu` or `leaky` (LeakyReLU 0.1).
        strides: Stride of each head level in input pixels.
        anchors: Three (width, height) in input pixels for each level.
        cost: Cost with the 80 classes of COCO, at the input size of the speed in the paper.
        paper: The rows of the paper for this model, the largest input first.
        notes: Remarks on the comparison.
        layers: Cost of each layer.
    """

    variant: str
    activation: str
    strides: tuple[int, ...]
    anchors: Anchors
    cost: Complexity
    paper: tuple[PaperCost, ...]
    notes: tuple[str, ...]
    layers: tuple[LayerCost, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsRecord:
    """The network in a weights file.

    Attributes:
        path: Path of the file.
        size_bytes: Size of the file.
        sha256: Digest of the file.
        variant: Official name, recognized by the tensors.
        form: `training` or `deploy`, as in the names of the official files, or `fused INT8 (TARGET)`, of weights that
            were trained for INT8.
        class_names: Class names in order of class id.
        strides: Stride of each head level in input pixels.
        anchors: Anchors of the file.
        custom_anchors: True if they differ from those of the variant.
        training_size: Side in pixels of the square images of the training; `None` if unknown.
        origin, origin_sha256: Name and digest of the file from which this one was made; empty if unknown.
        version: Version of this package that wrote the file; empty for other files.
        parameters: Number of parameters in the file.
        cost: Cost of this variant with this number of classes.
        layers: Cost of each layer with this number of classes.
    """

    path: str
    size_bytes: int
    sha256: str
    variant: str
    form: str
    class_names: tuple[str, ...]
    strides: tuple[int, ...]
    anchors: Anchors
    custom_anchors: bool
    training_size: int | None
    origin: str
    origin_sha256: str
    version: str
    parameters: int
    cost: Complexity
    layers: tuple[LayerCost, ...]


def inspect_variant(name: str) -> VariantRecord:
    """Return a variant, or a network of the paper's ablations, with its cost, its layers and the figures of the paper.

    Raises:
        UsageError: There is no such variant.
    """
    variant = find_variant(name)
    cost = complexity(name)
    paper = tuple(_paper_cost(name, row) for row in _paper_rows(name))
    return VariantRecord(
        variant=name,
        activation=variant.activation,
        strides=variant.strides,
        anchors=variant.anchors,
        cost=cost,
        paper=paper,
        notes=_notes(cost, paper),
        layers=layer_costs(name),
    )


def inspect_weights(path: str | Path) -> WeightsRecord:
    """Return the network in a weights file of any format that `load_checkpoint` reads, after checking its tensors.

    Raises:
        LoadError: The file cannot be read; see `load_checkpoint`.
        CheckpointError: The tensors are not those of the recognized variant.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    classes = len(checkpoint.class_names)
    return WeightsRecord(
        path=str(path),
        size_bytes=path.stat().st_size,
        sha256=checkpoint.source_sha256,
        variant=checkpoint.variant,
        form=_form(checkpoint),
        class_names=checkpoint.class_names,
        strides=checkpoint.strides,
        anchors=checkpoint.anchors,
        custom_anchors=checkpoint.anchors != find_variant(checkpoint.variant).anchors,
        training_size=checkpoint.training_size,
        origin=checkpoint.origin,
        origin_sha256=checkpoint.origin_sha256,
        version=checkpoint.version,
        parameters=parameter_count(build_model(checkpoint)),
        cost=complexity(checkpoint.variant, classes=classes),
        layers=layer_costs(checkpoint.variant, classes=classes),
    )


def _form(checkpoint: Checkpoint) -> str:
    if checkpoint.quantization is not None:
        return f"fused INT8 ({checkpoint.quantization.target})"
    return "training" if checkpoint.training else "deploy"


def _paper_rows(name: str) -> list[PaperRow]:
    """Return one merged row per input size; only tiny has several in Table 1, and our own ablations have none."""
    if name in ABLATIONS:
        return [] if name == RECOMMENDED else [paper_row(name)]
    sizes = {row.size for row in TABLE_1 if row.model == VARIANTS[name]} or {None}
    return sorted((paper_row(name, size=size) for size in sizes), key=lambda row: -(row.size or 0))


def _paper_cost(name: str, row: PaperRow) -> PaperCost:
    size = row.size or find_variant(name).size  # Tables 4 and 5 do not print a size
    cost = complexity(name, size=size)
    return PaperCost(size=size, gflops=cost.gflops, gflops_training=cost.gflops_training, row=row)


def _notes(cost: Complexity, paper: tuple[PaperCost, ...]) -> tuple[str, ...]:
    notes = []
    if cost.variant == D6:
        row = paper[0].row
        notes.append(
            f"the paper's {row.params_m}M and {row.gflops}G are for the training form with its auxiliary branches "
            f"({cost.parameters_training / 1e6:.1f}M, {paper[0].gflops_training:.1f}G); the fused network has "
            f"{cost.parameters_fused / 1e6:.1f}M and {paper[0].gflops:.1f}G"
        )
    if cost.variant in ABLATIONS:
        notes += _ablation_notes(cost, paper)
    if any(entry.row.fps for entry in paper):
        notes.append("the paper's FPS are for PyTorch FP16 at batch 1, and for the forward pass only")
    return tuple(notes)


def _ablation_notes(cost: Complexity, paper: tuple[PaperCost, ...]) -> list[str]:
    """Return how far the counts are from the paper's, or that the paper does not print any."""
    if not paper:
        return ["this network is not in the paper: RepConv without identity where section 4.1 recommends it"]
    row = paper[0].row
    if row.params_m is None or row.gflops is None:
        return [f"{row.source} prints AP only, no parameters and no GFLOPs"]
    parameters, flops = cost.parameters_fused / 1e6 / row.params_m - 1, paper[0].gflops / row.gflops - 1
    return [f"parameters differ from the paper's by {parameters:+.2%}, GFLOPs by {flops:+.2%}"]
