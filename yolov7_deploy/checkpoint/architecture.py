"""Recognition of the variant and its form from the names and shapes of the tensors alone.

The eight variants have seven layouts of layers, since `yolov7-tiny-silu` has the tensors of `yolov7-tiny`. The layer
index of the head identifies the layout. With four levels it identifies the form, too, because the training form has
four more convolutions (the auxiliary branches) than the deploy form. With three levels both forms have their head at
the same index, and its implicit tensors decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from yolov7_deploy.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

ANCHORS_PER_LEVEL = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Properties that identify a variant.

    Attributes:
        variant: Official name.
        heads: Layer index of the head in training and in deploy form.
        levels: Number of head levels.
        stem: Layer index and output channels of the first convolution (with four levels, layer 0 has no weights).
    """

    variant: str
    heads: tuple[int, int]
    levels: int
    stem: tuple[int, int]


TINY = "yolov7-tiny"

# Head indices and stem widths of the official configurations; `yolov7-tiny-silu` has the tensors of `yolov7-tiny`.
FINGERPRINTS = (
    Fingerprint(variant=TINY, heads=(77, 77), levels=3, stem=(0, 32)),
    Fingerprint(variant="yolov7", heads=(105, 105), levels=3, stem=(0, 32)),
    Fingerprint(variant="yolov7x", heads=(121, 121), levels=3, stem=(0, 40)),
    Fingerprint(variant="yolov7-w6", heads=(122, 118), levels=4, stem=(1, 64)),
    Fingerprint(variant="yolov7-e6", heads=(144, 140), levels=4, stem=(1, 80)),
    Fingerprint(variant="yolov7-d6", heads=(166, 162), levels=4, stem=(1, 96)),
    Fingerprint(variant="yolov7-e6e", heads=(265, 261), levels=4, stem=(1, 80)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Recognised architecture: variant, training or deploy form, classes, layer index and levels of the head."""

    variant: str
    training: bool
    classes: int
    head: int
    levels: int


def identify_architecture(shapes: Shapes, *, source: str, ablation: str = "", fused: bool = False) -> Architecture:
    """Return the architecture of a state dict with official names (`model.N....`), given its shapes by name.

    Only identifying tensors are checked; the full table is compared when the network is built.

    Args:
        shapes: Shapes by name.
        source: Name of the file, for messages.
        ablation: Network of the paper's ablations that the file's metadata names; these have no fingerprints.
        fused: The file says that its weights are fused, which is an error for all others.

    Raises:
        CheckpointError: The weights are fused, or do not belong to a YOLOv7 variant; the message says what was found.
    """
    if not fused:
        _refuse_fused(shapes, source)
    head = max((int(found[1]) for key in shapes if (found := re.match(r"model\.(\d{1,6})\.", key))), default=-1)
    rows = _head_rows(shapes, head)
    implicit = any(key.startswith((f"model.{head}.ia.", f"model.{head}.im.")) for key in shapes)
    auxiliary = any(key.startswith(f"model.{head}.m2.") for key in shapes)
    if ablation and rows:
        return Architecture(
            variant=ablation, training=implicit, classes=_classes(rows, source), head=head, levels=len(rows)
        )
    for known in FINGERPRINTS:
        if head in known.heads and len(rows) == known.levels:
            # If both forms have their head at the same index, the implicit tensors decide.
            training = implicit if known.heads[0] == known.heads[1] else head == known.heads[0]
            _check_stem(shapes, known, source)
            if implicit != training or auxiliary != (training and known.levels == 4):
                raise CheckpointError(
                    f"{source} has the layers of {known.variant} but neither its training nor its deploy head "
                    f"(implicit tensors: {_yes(implicit)}, auxiliary tensors: {_yes(auxiliary)}).",
                    fix="Train and save it with the official configuration of that variant.",
                )
            return Architecture(
                variant=known.variant,
                training=training,
                classes=_classes(rows, source),
                head=head,
                levels=known.levels,
            )
    raise CheckpointError(_unknown(shapes, head, rows, source), fix="Only these variants can be deployed.")


def _head_rows(shapes: Shapes, head: int) -> list[int]:
    """Return the output channels of the head convolutions, level by level; empty if the last layer is not a head."""
    rows: list[int] = []
    while (weight := f"model.{head}.m.{len(rows)}.weight") in shapes:
        if len(shapes[weight]) != 4:
            break
        rows.append(shapes[weight][0])
    return rows


def _classes(rows: list[int], source: str) -> int:
    """Return the number of classes: every level has `anchors * (5 + classes)` output channels."""
    per_anchor, rest = divmod(rows[0], ANCHORS_PER_LEVEL)
    if rest or per_anchor < 6 or len(set(rows)) != 1:
        raise CheckpointError(
            f"The head of {source} has {rows} rows; each level must have 3 * (5 + classes), for example 255.",
            fix="Heads with another number of anchors, keypoints or binned sizes are not supported.",
        )
    return per_anchor - 5


def _check_stem(shapes: Shapes, known: Fingerprint, source: str) -> None:
    layer, width = known.stem
    stem = shapes.get(f"model.{layer}.conv.weight", ())
    if stem[:1] != (width,):
        raise CheckpointError(
            f"{source} has the layers of {known.variant} but a first convolution of shape {stem}, "
            f"where {known.variant} has {width} output channels.",
            fix="Scaled variants (depth_multiple or width_multiple other than 1.0) are not supported.",
        )


def _refuse_fused(shapes: Shapes, source: str) -> None:
    fused = next((key for key in shapes if ".rbr_reparam." in key or key.endswith(".conv.bias")), None)
    if fused is not None:
        raise CheckpointError(
            f"{source} was saved after fuse() (it contains {fused[:80]!a}): its BatchNorm layers are gone.",
            fix="Use the checkpoint from before fusion; this package fuses it and checks the result.",
        )


def _unknown(shapes: Shapes, head: int, rows: list[int], source: str) -> str:
    variants = ", ".join(
        f"{f.variant} (head at layer {' or '.join(map(str, sorted(set(f.heads))))}, {f.levels} levels)"
        for f in FINGERPRINTS
    )
    if head < 0:
        names = ", ".join(ascii(key[:40]) for key in list(shapes)[:3])
        found = f"none of its {len(shapes)} tensors is called model.N... (the first are {names or 'missing'})"
    elif rows:
        found = f"{head + 1} layers with a head of {len(rows)} levels and {rows} rows at layer {head}"
    else:
        found = f"{head + 1} layers, and the last, {head}, is not a detection head (no model.{head}.m.0.weight)"
    return f"{source} is not a YOLOv7 variant: found {found}. Known: {variants}."


def _yes(value: bool) -> str:
    return "yes" if value else "no"
