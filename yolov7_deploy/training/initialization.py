"""Initial weights of a training: random, or as many as possible from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.heads import BOX_AND_OBJECTNESS
from yolov7_deploy.model.layer_table import Anchors
from yolov7_deploy.model.yolov7 import Yolov7, new_model

ANCHORS_PER_LEVEL = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InitializedModel:
    """A model in training form, and a summary of the origin of its weights."""

    model: Yolov7
    summary: str


def initialize_model(
    variant: str,
    class_names: tuple[str, ...],
    *,
    checkpoint: Checkpoint | None = None,
    anchors: Anchors | None = None,
    auxiliary: str = "partial",
    seed: int = 0,
) -> InitializedModel:
    """Return a model for these classes, with all weights of a checkpoint that fit.

    Tensors of the same name and shape are copied. From a checkpoint in deploy form, the model gives the same output as
    that checkpoint. If the classes differ, the head keeps the rows of boxes and objectness, and those of classes of the
    same name.

    Args:
        variant: Official name.
        class_names: Classes to detect.
        checkpoint: Initial weights; `None` initializes them randomly.
        anchors: Anchors in input pixels; by default those of the checkpoint, or of the variant.
        auxiliary: See `Yolov7`.
        seed: Seed of the random weights.

    Raises:
        UsageError: The checkpoint is for another variant.
    """
    if checkpoint is not None:
        require_variant(checkpoint, variant)
    anchors = anchors or (checkpoint.anchors if checkpoint else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(variant, classes=len(class_names), training_form=True, anchors=anchors, auxiliary=auxiliary)
    if checkpoint is None:
        return InitializedModel(model=model, summary=f"random weights of seed {seed}")
    return InitializedModel(model=model, summary=_load_matching(model, checkpoint, class_names))


def require_variant(checkpoint: Checkpoint, variant: str) -> None:
    """Check that a checkpoint is for this variant.

    Raises:
        UsageError: It is for another variant.
    """
    if checkpoint.variant != variant:
        raise UsageError(
            f"{checkpoint.source} is {checkpoint.variant}, not {variant}.",
            fix=f"--variant {checkpoint.variant}, or other weights",
        )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Check that weights can initialise a training.

    Raises:
        UsageError: They were trained for INT8 already, and are fused.
    """
    if checkpoint.quantization is not None:
        raise UsageError(
            f"{checkpoint.source} was already trained for INT8 ({checkpoint.quantization.target}): its BatchNorm "
            "layers are folded into the convolutions.",
            fix="Start from the float weights of that training, which  y7 info  names; an unfinished run goes on with  "
            "y7 train --resume --save-dir DIR",
        )


@torch.no_grad()
def _load_matching(model: Yolov7, checkpoint: Checkpoint, class_names: tuple[str, ...]) -> str:
    own = model.state_dict()
    given = _rename_head(checkpoint, head=len(model.layers) - 1)
    matching = [name for name in own if name in given and own[name].shape == given[name].shape and "anchor" not in name]
    same_classes = class_names == checkpoint.class_names
    copied = {name: given[name] for name in matching if same_classes or not _has_class_rows(name, model)}
    merged = {
        name: _merge_classes(own[name], given[name], class_names, checkpoint.class_names)
        for name in own
        if name in given and name not in copied and _has_class_rows(name, model)
    }
    neutral = {} if checkpoint.training else _neutral_implicit_knowledge(model)
    loaded = {**neutral, **copied, **merged}
    model.load_state_dict({**own, **loaded})
    trainable = [name for name in own if "anchor" not in name]
    random = [name for name in trainable if name not in loaded]
    summary = f"{checkpoint.source}: {len(copied)} of {len(trainable)} tensors"
    if merged:
        known = sum(name in checkpoint.class_names for name in class_names)
        summary += f", the head's boxes and {known} of its {len(class_names)} classes"
    return summary + (f"; {len(random)} are random" if random else "")


def _rename_head(checkpoint: Checkpoint, *, head: int) -> dict[str, Tensor]:
    """Return the tensors with the head's index in training form, where auxiliary layers may precede the head."""
    last = max(int(name.split(".")[1]) for name in checkpoint.tensors)
    prefix = f"model.{last}."
    return {
        name.replace(prefix, f"model.{head}.", 1) if name.startswith(prefix) else name: tensor
        for name, tensor in checkpoint.tensors.items()
    }


def _neutral_implicit_knowledge(model: Yolov7) -> dict[str, Tensor]:
    """Return implicit knowledge without effect: the deploy form has it folded into the head's convolutions."""
    prefix, own = f"model.{len(model.layers) - 1}.", model.state_dict()
    added = {name: torch.zeros_like(own[name]) for name in own if name.startswith(f"{prefix}ia.")}
    return added | {name: torch.ones_like(own[name]) for name in own if name.startswith(f"{prefix}im.")}


def _has_class_rows(name: str, model: Yolov7) -> bool:
    """Return whether the tensor has a row for each class."""
    head = f"model.{len(model.layers) - 1}."
    return name.startswith((f"{head}m.", f"{head}m2.", f"{head}im."))


def _merge_classes(own: Tensor, given: Tensor, names: tuple[str, ...], given_names: tuple[str, ...]) -> Tensor:
    """Return the tensor with the given rows of boxes, objectness and common classes; `im` has its rows in axis 1."""
    axis = 1 if own.shape[0] == 1 else 0
    merged_rows, given_rows = _split_rows(own.clone(), axis), _split_rows(given, axis)
    merged_rows[:, :BOX_AND_OBJECTNESS] = given_rows[:, :BOX_AND_OBJECTNESS]
    for index, name in enumerate(names):
        if name in given_names:
            given_index = given_names.index(name)
            merged_rows[:, BOX_AND_OBJECTNESS + index] = given_rows[:, BOX_AND_OBJECTNESS + given_index]
    merged: Tensor = merged_rows.flatten(0, 1).movedim(0, axis).contiguous()
    return merged


def _split_rows(tensor: Tensor, axis: int) -> Tensor:
    """Return [3, 5 + C, ...]: the axis split into anchors and outputs per anchor."""
    moved = tensor.movedim(axis, 0)
    return moved.reshape(ANCHORS_PER_LEVEL, -1, *moved.shape[1:])
