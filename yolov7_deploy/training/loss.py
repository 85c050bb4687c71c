"""The losses: box (CIoU), objectness and class, for lead and auxiliary heads (paper section 4.2).

Each mean is over the positives, or cells, of all processes: several processes compute the loss and the gradients of a
single process with all their images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import ASSIGNERS
from yolov7_deploy.training.assignment import (
    COARSE,
    FINE,
    Candidates,
    GroundTruth,
    Predictions,
    assign_simota,
    find_candidates,
)
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import Hyperparameters

BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # objectness weight of each level, fine to coarse
AUXILIARY_WEIGHT = 0.25
TOP_K = {3: 10, 4: 20}  # summed IoUs of SimOTA, by number of levels: P5 and P6 models
FOCAL_ALPHA = 0.25
EPS = 1e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Variants of the losses; the defaults are those of the official training.

    Attributes:
        ota: Assign positives with SimOTA; `False` takes every candidate, as in YOLOv5.
        assigner: Positives of auxiliary heads (table 6): `independent` (from their own predictions), `lead-guided`
            (those of the lead head) or `coarse-to-fine` (from the lead head's predictions, with up to five cells per
            target instead of three).
        constraint: Limit the centres that auxiliary heads predict to -0.5 to 1.5 cells, so that far cells of the coarse
            assignment never fit perfectly (table 7); `False` allows -1 to 2 cells.
        official_height: Compute the targets' widths for SimOTA in units of the image height, as the official program
            does. This is wrong for images that are not square, and exists for comparisons.
    """

    ota: bool = True
    assigner: str = "coarse-to-fine"
    constraint: bool = True
    official_height: bool = False

    def __post_init__(self) -> None:
        if self.assigner not in ASSIGNERS:
            raise UsageError(f"--assigner {self.assigner} is unknown.", fix=f"One of: {', '.join(ASSIGNERS)}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossParts:
    """The loss of a batch; only `total` has gradients.

    Attributes:
        total: The value to differentiate: (box + obj + cls) * images of all processes * number of processes.
        box, obj, cls: Losses multiplied by their gains; with several processes, the share of this process.
        positives: Number of positives of the lead heads in this process.
    """

    total: Tensor
    box: Tensor
    obj: Tensor
    cls: Tensor
    positives: int


@dataclass(slots=True, eq=False)
class _LossTerms:
    """Box, objectness and class terms accumulated so far, without gains."""

    box: Tensor
    obj: Tensor
    cls: Tensor


class DetectionLoss(nn.Module):
    """The loss of the network's raw outputs against the targets.

    Args:
        anchors: [levels, 3, 2] width and height in cells of their level.
        strides: Pixels per cell of each level.
        classes: Number of classes C.
        gains: Hyperparameters whose `box`, `obj` and `cls` are used unchanged; see `scale_gains`.
        options: See `LossOptions`.
        distributed: The processes that train together.
    """

    anchors: Tensor
    class_weight: Tensor
    objectness_weight: Tensor

    def __init__(
        self,
        anchors: Tensor,
        *,
        strides: Sequence[int],
        classes: int,
        gains: Hyperparameters,
        options: LossOptions,
        distributed: DistributedContext,
    ) -> None:
        super().__init__()
        self.strides, self.classes, self.gains = tuple(strides), classes, gains
        self.options, self.distributed = options, distributed
        self.register_buffer("anchors", anchors.detach().clone().float(), persistent=False)
        self.register_buffer("class_weight", torch.tensor([gains.cls_pw]), persistent=False)
        self.register_buffer("objectness_weight", torch.tensor([gains.obj_pw]), persistent=False)

    def forward(self, raw_outputs: Sequence[Tensor], targets: Tensor) -> LossParts:
        """Return the loss of a batch.

        Args:
            raw_outputs: [B, 3, H, W, 5 + C] per level, fine to coarse, followed by those of auxiliary heads, if any.
            targets: float32 [N, 6]: image, class, cx, cy, w, h in fractions of the image.
        """
        levels = len(self.strides)
        lead, auxiliary = list(raw_outputs[:levels]), list(raw_outputs[levels:])
        with torch.no_grad(), torch.autocast(lead[0].device.type, enabled=False):
            lead_positives, auxiliary_positives = self.assign(lead, auxiliary, targets)
        with torch.autocast(lead[0].device.type, enabled=False):
            zero = lead[0].new_zeros((), dtype=torch.float32)
            terms = _LossTerms(box=zero, obj=zero, cls=zero)
            self._add_terms(terms, lead, lead_positives, targets, weight=1.0, offset=FINE)
            if auxiliary:
                offset = FINE if self.options.constraint else COARSE
                self._add_terms(terms, auxiliary, auxiliary_positives, targets, weight=AUXILIARY_WEIGHT, offset=offset)
            box, obj = terms.box * self.gains.box, terms.obj * self.gains.obj
            cls = terms.cls * self.gains.cls
            batch = lead[0].shape[0] * self.distributed.world_size
            # Each process has its share of the means. DistributedDataParallel averages gradients over processes, so
            # the shares are multiplied by their number.
            total = (box + obj + cls) * (batch * self.distributed.world_size)
        return LossParts(
            total=total,
            box=box.detach(),
            obj=obj.detach(),
            cls=cls.detach(),
            positives=sum(len(level.flat_index) for level in lead_positives),
        )

    def assign(
        self, lead: Sequence[Tensor], auxiliary: Sequence[Tensor], targets: Tensor
    ) -> tuple[list[Candidates], list[Candidates]]:
        """Return the positives per level of the lead heads, and of the auxiliary heads (empty without any)."""
        fine = self._assign(lead, targets, offset=FINE, decode_offset=FINE)
        if not auxiliary:
            return fine, []
        match self.options.assigner:
            case "lead-guided":
                return fine, fine
            case "independent":
                decode_offset = FINE if self.options.constraint else COARSE
                return fine, self._assign(auxiliary, targets, offset=FINE, decode_offset=decode_offset)
            case _:
                return fine, self._assign(lead, targets, offset=COARSE, decode_offset=FINE)

    def _assign(
        self, raw_outputs: Sequence[Tensor], targets: Tensor, *, offset: float, decode_offset: float
    ) -> list[Candidates]:
        grids = [(raw.shape[2], raw.shape[3]) for raw in raw_outputs]
        candidates = find_candidates(targets, grids, self.anchors, anchor_t=self.gains.anchor_t, offset=offset)
        if not self.options.ota:
            return candidates
        image_hw = (grids[0][0] * self.strides[0], grids[0][1] * self.strides[0])
        predictions = self._predictions(raw_outputs, candidates, decode_offset)
        truth = self._ground_truth(targets, image_hw)
        positives, target = assign_simota(predictions, truth, top_k=TOP_K[len(self.strides)])
        ends = torch.tensor([0, *(len(level.flat_index) for level in candidates)]).cumsum(0).tolist()
        chosen = []
        for level, start, end in zip(candidates, ends, ends[1:], strict=False):
            in_level = (positives >= start) & (positives < end)
            chosen.append(level[positives[in_level] - start].with_targets(target[in_level]))
        return chosen

    def _ground_truth(self, targets: Tensor, image_hw: tuple[int, int]) -> GroundTruth:
        height, width = image_hw
        width_unit = height if self.options.official_height else width
        centres, sides = (targets[:, i : i + 2] * targets.new_tensor([width_unit, height]) for i in (2, 4))
        boxes = torch.cat((centres - sides / 2, centres + sides / 2), 1)
        return GroundTruth(boxes=boxes, class_ids=targets[:, 1].long(), image=targets[:, 0].long())

    def _predictions(
        self, raw_outputs: Sequence[Tensor], candidates: Sequence[Candidates], decode_offset: float
    ) -> Predictions:
        boxes, values = [], []
        for raw, level, anchors, stride in zip(raw_outputs, candidates, self.anchors, self.strides, strict=True):
            value = raw.flatten(0, 3)[level.flat_index].float()
            centres, sides = decode_boxes(value, anchors[level.anchor], offset=decode_offset)
            cell = torch.stack((level.column, level.row), 1)
            boxes.append(torch.cat((centres + cell - sides / 2, centres + cell + sides / 2), 1) * stride)
            values.append(value)
        value = torch.cat(values)
        return Predictions(
            boxes=torch.cat(boxes),
            objectness=value[:, 4],
            classes=value[:, 5:],
            image=torch.cat([level.image for level in candidates]),
        )

    def _add_terms(
        self,
        terms: _LossTerms,
        raw_outputs: Sequence[Tensor],
        positives: Sequence[Candidates],
        targets: Tensor,
        *,
        weight: float,
        offset: float,
    ) -> None:
        """Add this process's share of the means, for one set of heads."""
        shares = self._shares(positives, targets.device)
        balance = BALANCE[len(self.strides)]
        for level, (raw, chosen) in enumerate(zip(raw_outputs, positives, strict=True)):
            flat = raw.flatten(0, 3)
            objectness = flat.new_zeros(len(flat), dtype=torch.float32)
            if len(chosen.flat_index):
                value = flat[chosen.flat_index].float()
                iou = self._complete_iou(value, chosen, targets, (raw.shape[2], raw.shape[3]), level, offset)
                terms.box = terms.box + weight * shares[level] * (1 - iou).sum()
                objectness = _scatter_last(objectness, chosen.flat_index, iou.detach().clamp(min=0))
                if self.classes > 1:
                    classes = self._class_loss(value[:, 5:], targets[chosen.target, 1].long())
                    terms.cls = terms.cls + weight * shares[level] * classes.sum() / self.classes
            loss = self._cross_entropy(flat[:, 4].float(), objectness, self.objectness_weight)
            terms.obj = terms.obj + weight * balance[level] / self.distributed.world_size * loss.mean()

    def _shares(self, positives: Sequence[Candidates], device: torch.device) -> list[float]:
        """Return 1 / (positives of all processes) for each level."""
        counts = torch.tensor([len(level.flat_index) for level in positives], dtype=torch.float64, device=device)
        return [1 / max(count, 1) for count in self.distributed.all_reduce_sum(counts).tolist()]

    def _complete_iou(
        self, value: Tensor, chosen: Candidates, targets: Tensor, grid: tuple[int, int], level: int, offset: float
    ) -> Tensor:
        """Return the CIoU of predicted boxes and their targets, [P]."""
        centres, sides = decode_boxes(value, self.anchors[level][chosen.anchor], offset=offset)
        boxes = targets[chosen.target, 2:6] * targets.new_tensor([grid[1], grid[0], grid[1], grid[0]])
        cell = torch.stack((chosen.column, chosen.row), 1)
        return complete_iou(centres, sides, boxes[:, :2] - cell, boxes[:, 2:])

    def _class_loss(self, logits: Tensor, class_ids: Tensor) -> Tensor:
        smoothing = self.gains.label_smoothing
        labels = torch.full_like(logits, smoothing / 2)
        labels.scatter_(1, class_ids[:, None], 1 - smoothing / 2)
        return self._cross_entropy(logits, labels, self.class_weight)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, positive_weight: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=positive_weight, reduction="none")
        if self.gains.fl_gamma == 0:
            return loss
        probability = logits.sigmoid()
        p_true = labels * probability + (1 - labels) * (1 - probability)
        alpha = labels * FOCAL_ALPHA + (1 - labels) * (1 - FOCAL_ALPHA)
        return loss * alpha * (1 - p_true) ** self.gains.fl_gamma


def scale_gains(hyp: Hyperparameters, *, levels: int, classes: int, image_size: int) -> Hyperparameters:
    """Return hyperparameters with the gains scaled as in the official program.

    The given gains are for 3 levels, 80 classes and images of 640 pixels.
    """
    share = 3 / levels
    return replace(
        hyp,
        box=hyp.box * share,
        cls=hyp.cls * classes / 80 * share,
        obj=hyp.obj * (image_size / 640) ** 2 * share,
    )


def decode_boxes(value: Tensor, anchors: Tensor, *, offset: float) -> tuple[Tensor, Tensor]:
    """Return centres relative to the cell, and sizes, both [P, 2] in cells, of raw values [P, 5 + C].

    With y the sigmoid: size = (2 y)^2 anchor; centre = 2 y - 0.5 for the offset `FINE`, 3 y - 1 for `COARSE`.
    """
    y = value[:, :4].sigmoid()
    return y[:, :2] * (1 + 2 * offset) - offset, (y[:, 2:] * 2) ** 2 * anchors


def complete_iou(centres: Tensor, sides: Tensor, true_centres: Tensor, true_sides: Tensor) -> Tensor:
    """Return the CIoU (arXiv 1911.08287) of boxes given as centre and size [P, 2]; only the first get gradients.

    CIoU = IoU - (d^2 / c^2 + alpha v): d the distance of the centres, c the diagonal of the enclosing box, v the
    difference of the aspect ratios, alpha = v / (v - IoU + 1).
    """
    low, high = centres - sides / 2, centres + sides / 2
    true_low, true_high = true_centres - true_sides / 2, true_centres + true_sides / 2
    intersection = (torch.minimum(high, true_high) - torch.maximum(low, true_low)).clamp(min=0).prod(1)
    width, height = (high - low).unbind(1)
    true_width, true_height = (true_high - true_low).unbind(1)
    height, true_height = height + EPS, true_height + EPS
    union = width * height + true_width * true_height - intersection + EPS
    iou = intersection / union
    diagonal = (torch.maximum(high, true_high) - torch.minimum(low, true_low)).square().sum(1) + EPS
    distance = (low + high - true_low - true_high).square().sum(1) / 4
    angle = torch.atan(true_width / (true_height + EPS)) - torch.atan(width / (height + EPS))
    v = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + EPS))
    return iou - (distance / diagonal + alpha * v)


def _scatter_last(base: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return `base` with values at their indices; the last value of an index wins, deterministically on any device."""
    ordered, order = torch.sort(index, stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    padded = torch.cat((base, base.new_zeros(1)))  # values that are overwritten go to the extra element
    padded[torch.where(is_last, ordered, len(base))] = value[order]
    return padded[:-1]
