"""Architecture and cost of a variant compared with the paper, or of the network in a weights file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.inspection.complexity import Complexity, LayerCost, complexity, layer_costs, parameter_count
from yolov7_deploy.model.configs import Anchors, find_variant
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.paper import TABLE_1, VARIANTS, PaperRow, paper_row

D6 = "yolov7-d6"


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
        form: `training` or `deploy`, as in the names of the official files.
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
    """Return a variant with its cost, its layers and the figures of the paper.

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
        form="training" if checkpoint.training else "deploy",
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


def _paper_rows(name: str) -> list[PaperRow]:
    """Return one merged row per input size; only tiny has several in Table 1."""
    sizes = {row.size for row in TABLE_1 if row.model == VARIANTS[name]} or {None}
    return sorted((paper_row(name, size=size) for size in sizes), key=lambda row: -(row.size or 0))


def _paper_cost(name: str, row: PaperRow) -> PaperCost:
    assert row.size is not None, "every row about YOLOv7 has a size"
    cost = complexity(name, size=row.size)
    return PaperCost(size=row.size, gflops=cost.gflops, gflops_training=cost.gflops_training, row=row)


def _notes(cost: Complexity, paper: tuple[PaperCost, ...]) -> tuple[str, ...]:
    notes = []
    if cost.variant == D6:
        row = paper[0].row
        notes.append(
            f"the paper's {row.params_m}M and {row.gflops}G are for the training form with its auxiliary branches "
            f"({cost.parameters_training / 1e6:.1f}M, {paper[0].gflops_training:.1f}G); the fused network has "
            f"{cost.parameters_fused / 1e6:.1f}M and {paper[0].gflops:.1f}G"
        )
    if any(entry.row.fps for entry in paper):
        notes.append("the paper's FPS are for PyTorch FP16 at batch 1, and for the forward pass only")
    return tuple(notes)
