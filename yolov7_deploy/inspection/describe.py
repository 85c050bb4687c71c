"""Everything known about a variant, or about the network in a weights file, as one record."""

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
    """A size the paper measures a variant at: our GFLOPs and its row."""

    size: int
    gflops: float
    gflops_training: float
    row: PaperRow


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantRecord:
    """One architecture beside the paper.

    Attributes:
        variant: Official name.
        activation: `silu` or `leaky` (LeakyReLU 0.1).
        strides: Pixels per cell of each head level.
        anchors: Per level three (width, height) in input pixels.
        cost: With COCO's 80 classes, at the size the speed in the paper is for.
        paper: The paper's rows of this model, the largest input first.
        notes: What to know before comparing.
        layers: The layer table.
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
        path: The file.
        size_bytes: Of the file.
        sha256: Digest of the file.
        variant: Official name, told by the tensors.
        form: `training` or `deploy`; the official files are named after it.
        class_names: In class-id order.
        strides: Pixels per cell of each head level.
        anchors: Those of the file.
        own_anchors: They differ from the variant's.
        parameters: Learnable numbers in the file.
        cost: Of this variant with this many classes.
        layers: The layer table with this many classes.
    """

    path: str
    size_bytes: int
    sha256: str
    variant: str
    form: str
    class_names: tuple[str, ...]
    strides: tuple[int, ...]
    anchors: Anchors
    own_anchors: bool
    parameters: int
    cost: Complexity
    layers: tuple[LayerCost, ...]


def describe_variant(name: str) -> VariantRecord:
    """A variant with its cost, its layers and what the paper says.

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


def describe_weights(path: str | Path) -> WeightsRecord:
    """The network in a weights file of any kind that `load_checkpoint` reads; its tensors are checked on the way.

    Raises:
        LoadError: The file cannot be read; see `load_checkpoint`.
        CheckpointError: Its tensors are not those of the variant they look like.
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
        own_anchors=checkpoint.anchors != find_variant(checkpoint.variant).anchors,
        parameters=parameter_count(build_model(checkpoint)),
        cost=complexity(checkpoint.variant, classes=classes),
        layers=layer_costs(checkpoint.variant, classes=classes),
    )


def _paper_rows(name: str) -> list[PaperRow]:
    """One merged row per size; only tiny has several in Table 1."""
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
            f"the paper's {row.params_m}M and {row.gflops}G are the training graph with its auxiliary branches "
            f"({cost.parameters_training / 1e6:.1f}M, {paper[0].gflops_training:.1f}G); deployed it has "
            f"{cost.parameters_fused / 1e6:.1f}M and {paper[0].gflops:.1f}G"
        )
    if any(entry.row.fps for entry in paper):
        notes.append("the paper's FPS are PyTorch FP16 at batch 1, the network's forward pass only")
    return tuple(notes)
