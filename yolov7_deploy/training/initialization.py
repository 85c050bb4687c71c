"""The network a training starts from: fresh, or with what a checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.configs import Anchors
from yolov7_deploy.model.heads import BOX_AND_OBJECTNESS
from yolov7_deploy.model.yolov7 import Yolov7, new_model

ANCHORS_PER_LEVEL = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InitializedModel:
    """A network in training form, and in words where its weights come from."""

    model: Yolov7
    words: str


def starting_model(
    variant: str,
    class_names: tuple[str, ...],
    *,
    checkpoint: Checkpoint | None = None,
    anchors: Anchors | None = None,
    auxiliary: str = "partial",
    seed: int = 0,
) -> InitializedModel:
    """A network for these classes, with all that fits of a checkpoint.

    Tensors of the same name and shape are taken, from a deploy form too, which then gives the same output as before.
    Where the classes differ, the head keeps its boxes and objectness, and the rows of classes of the same name.

    Args:
        variant: Official name.
        class_names: What it shall find.
        checkpoint: Weights to begin with; random ones without.
        anchors: Those of the checkpoint, or the variant's, where left out.
        auxiliary: See `Yolov7`.
        seed: Of the random weights.

    Raises:
        UsageError: The checkpoint is of another variant.
    """
    if checkpoint is not None:
        require_variant(checkpoint, variant)
    anchors = anchors or (checkpoint.anchors if checkpoint else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(variant, classes=len(class_names), training_form=True, anchors=anchors, auxiliary=auxiliary)
    if checkpoint is None:
        return InitializedModel(model=model, words=f"random weights of seed {seed}")
    return InitializedModel(model=model, words=_transfer(model, checkpoint, class_names))


def require_variant(checkpoint: Checkpoint, variant: str) -> None:
    """Returns when the checkpoint is of this variant.

    Raises:
        UsageError: It is not.
    """
    if checkpoint.variant != variant:
        raise UsageError(
            f"{checkpoint.source} is {checkpoint.variant}, not {variant}.",
            fix=f"--variant {checkpoint.variant}, or other weights",
        )


@torch.no_grad()
def _transfer(model: Yolov7, checkpoint: Checkpoint, class_names: tuple[str, ...]) -> str:
    own = model.state_dict()
    given = _as_training(checkpoint, head=len(model.layers) - 1)
    same = [name for name in own if name in given and own[name].shape == given[name].shape and "anchor" not in name]
    taken = {name: given[name] for name in same if class_names == checkpoint.class_names or not _by_class(name, model)}
    merged = {
        name: _merged(own[name], given[name], class_names, checkpoint.class_names)
        for name in own
        if name in given and name not in taken and _by_class(name, model)
    }
    neutral = {} if checkpoint.training else _neutral_knowledge(model)
    found = {**neutral, **taken, **merged}
    model.load_state_dict({**own, **found})
    learned = [name for name in own if "anchor" not in name]
    fresh = [name for name in learned if name not in found]
    words = f"{checkpoint.source}: {len(taken)} of {len(learned)} tensors"
    if merged:
        known = sum(name in checkpoint.class_names for name in class_names)
        words += f", the head's boxes and {known} of its {len(class_names)} classes"
    return words + (f"; {len(fresh)} begin as random numbers" if fresh else "")


def _as_training(checkpoint: Checkpoint, *, head: int) -> dict[str, Tensor]:
    """Its tensors under the names of the training form, whose head may stand behind auxiliary layers."""
    last = max(int(name.split(".")[1]) for name in checkpoint.tensors)
    moved = f"model.{last}."
    return {
        name.replace(moved, f"model.{head}.", 1) if name.startswith(moved) else name: tensor
        for name, tensor in checkpoint.tensors.items()
    }


def _neutral_knowledge(model: Yolov7) -> dict[str, Tensor]:
    """Implicit knowledge that changes nothing: a deploy form has its own folded into the head's convolutions."""
    prefix, own = f"model.{len(model.layers) - 1}.", model.state_dict()
    added = {name: torch.zeros_like(own[name]) for name in own if name.startswith(f"{prefix}ia.")}
    return added | {name: torch.ones_like(own[name]) for name in own if name.startswith(f"{prefix}im.")}


def _by_class(name: str, model: Yolov7) -> bool:
    """The tensor has a row for each class."""
    head = f"model.{len(model.layers) - 1}."
    return name.startswith((f"{head}m.", f"{head}m2.", f"{head}im."))


def _merged(own: Tensor, given: Tensor, names: tuple[str, ...], given_names: tuple[str, ...]) -> Tensor:
    """Rows for boxes and objectness, and those of classes that both know; in `im` rows are channels."""
    channel = 1 if own.shape[0] == 1 else 0
    mine = _per_anchor(own.clone(), channel)
    theirs = _per_anchor(given, channel)
    mine[:, :BOX_AND_OBJECTNESS] = theirs[:, :BOX_AND_OBJECTNESS]
    for index, name in enumerate(names):
        if name in given_names:
            mine[:, BOX_AND_OBJECTNESS + index] = theirs[:, BOX_AND_OBJECTNESS + given_names.index(name)]
    merged: Tensor = mine.flatten(0, 1).movedim(0, channel).contiguous()
    return merged


def _per_anchor(tensor: Tensor, channel: int) -> Tensor:
    """[3, 5 + C, ...] of the axis that has a row for each anchor and column."""
    moved = tensor.movedim(channel, 0)
    return moved.reshape(ANCHORS_PER_LEVEL, -1, *moved.shape[1:])
