"""The losses: box (CIoU), objectness and class, for lead and auxiliary heads (paper 4.2).

Every mean is over the positives, or cells, of all processes together: several processes give the loss and the gradients
of one process with all their images.
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
from yolov7_deploy.training.assignment import COARSE, FINE, Candidates, GroundTruth, Predictions, find_candidates, match
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import Hyperparameters

BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # of objectness, fine to coarse
AUXILIARY_WEIGHT = 0.25
OVERLAPS_P5, OVERLAPS_P6 = 10, 20  # how many overlaps say how many positives a target takes
FOCAL_ALPHA = 0.25
EPS = 1e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """What the losses are made of; defaults are the official training.

    Attributes:
        ota: Positives by matching; `False` takes every candidate, as YOLOv5 did.
        assigner: Positives of auxiliary heads (table 6): `independent` (matched on their own predictions),
            `lead-guided` (those of the lead head) or `coarse-to-fine` (matched on the lead's predictions, among five
            cells instead of three).
        constraint: Auxiliary centres reach from -0.5 to 1.5 cells, so that far cells of the coarse assignment never fit
            perfectly (table 7); `False` lets them reach from -1 to 2.
        overlaps: Overlaps that say how many positives a target takes; 10, and 20 with auxiliary heads, where left out.
        official_height: Targets are matched as the official program does it, widths in units of the image's height.
            This differs from the truth in images that are not square only, and exists to be compared with.
    """

    ota: bool = True
    assigner: str = "coarse-to-fine"
    constraint: bool = True
    overlaps: int | None = None
    official_height: bool = False

    def __post_init__(self) -> None:
        if self.assigner not in ASSIGNERS:
            raise UsageError(f"--assigner {self.assigner} is unknown.", fix=f"One of: {', '.join(ASSIGNERS)}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossParts:
    """A loss: `total` has gradients and is multiplied by the batch size; the others are for people.

    Attributes:
        total: What to differentiate: box + objectness + classes, times the images of all processes, times the
            processes.
        box, objectness, classes: After their gains, without gradients; with several processes this one's share of it.
        positives: Positives of the lead heads in this process.
    """

    total: Tensor
    box: Tensor
    objectness: Tensor
    classes: Tensor
    positives: int


@dataclass(slots=True, eq=False)
class _Sums:
    """Box, objectness and class terms so far."""

    box: Tensor
    objectness: Tensor
    classes: Tensor


class DetectionLoss(nn.Module):
    """The loss of raw maps against targets.

    Args:
        anchors: [levels, 3, 2] width and height in cells of their level.
        strides: Pixels per cell of each level.
        classes: C.
        gains: Recipe whose `box`, `obj`, `cls` are used as they are; see `scaled_gains`.
        options: See `LossOptions`.
        world: The processes that train together.
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
        world: DistributedContext,
    ) -> None:
        super().__init__()
        self.strides, self.classes, self.gains = tuple(strides), classes, gains
        self.options, self.world = options, world
        self.register_buffer("anchors", anchors.detach().clone().float(), persistent=False)
        self.register_buffer("class_weight", torch.tensor([gains.cls_pw]), persistent=False)
        self.register_buffer("objectness_weight", torch.tensor([gains.obj_pw]), persistent=False)

    def forward(self, raws: Sequence[Tensor], targets: Tensor) -> LossParts:
        """The loss of a batch.

        Args:
            raws: [B, 3, H, W, 5 + C] per level, fine to coarse; those of auxiliary heads follow, if there are any.
            targets: float32 [N, 6]: image, class, cx, cy, w, h in fractions of the image.
        """
        levels = len(self.strides)
        lead, auxiliary = list(raws[:levels]), list(raws[levels:])
        with torch.no_grad(), torch.autocast(lead[0].device.type, enabled=False):
            fine, coarse = self.positives(lead, auxiliary, targets)
        with torch.autocast(lead[0].device.type, enabled=False):
            zero = lead[0].new_zeros((), dtype=torch.float32)
            sums = _Sums(box=zero, objectness=zero, classes=zero)
            self._add_terms(sums, lead, fine, targets, weight=1.0, reach=FINE)
            if auxiliary:
                reach = FINE if self.options.constraint else COARSE
                self._add_terms(sums, auxiliary, coarse, targets, weight=AUXILIARY_WEIGHT, reach=reach)
            box, objectness = sums.box * self.gains.box, sums.objectness * self.gains.obj
            classes = sums.classes * self.gains.cls
            batch = lead[0].shape[0] * self.world.size
            # Each process holds its share; gradients are averaged over processes, so shares are multiplied by them.
            total = (box + objectness + classes) * (batch * self.world.size)
        return LossParts(
            total=total,
            box=box.detach(),
            objectness=objectness.detach(),
            classes=classes.detach(),
            positives=sum(len(level.cell) for level in fine),
        )

    def positives(
        self, lead: Sequence[Tensor], auxiliary: Sequence[Tensor], targets: Tensor
    ) -> tuple[list[Candidates], list[Candidates]]:
        """Positives per level of the lead heads, and of the auxiliary heads (empty lists without any)."""
        fine = self._assigned(lead, targets, reach=FINE, decode=FINE)
        if not auxiliary:
            return fine, []
        match self.options.assigner:
            case "lead-guided":
                return fine, fine
            case "independent":
                decode = FINE if self.options.constraint else COARSE
                return fine, self._assigned(auxiliary, targets, reach=FINE, decode=decode)
            case _:
                return fine, self._assigned(lead, targets, reach=COARSE, decode=FINE)

    def _assigned(self, raws: Sequence[Tensor], targets: Tensor, *, reach: float, decode: float) -> list[Candidates]:
        grids = [(raw.shape[2], raw.shape[3]) for raw in raws]
        found = find_candidates(targets, grids, self.anchors, anchor_t=self.gains.anchor_t, reach=reach)
        if not self.options.ota:
            return found
        image_hw = (grids[0][0] * self.strides[0], grids[0][1] * self.strides[0])
        most = self.options.overlaps or (OVERLAPS_P6 if len(self.strides) == 4 else OVERLAPS_P5)
        predictions = self._predictions(raws, found, decode)
        positives, target = match(predictions, self._truth(targets, image_hw), most=most)
        ends = torch.tensor([0, *(len(level.cell) for level in found)]).cumsum(0).tolist()
        chosen = []
        for level, start, end in zip(found, ends, ends[1:], strict=False):
            here = (positives >= start) & (positives < end)
            chosen.append(level[positives[here] - start].for_targets(target[here]))
        return chosen

    def _truth(self, targets: Tensor, image_hw: tuple[int, int]) -> GroundTruth:
        height, width = image_hw
        across = height if self.options.official_height else width
        centre, sides = (targets[:, i : i + 2] * targets.new_tensor([across, height]) for i in (2, 4))
        boxes = torch.cat((centre - sides / 2, centre + sides / 2), 1)
        return GroundTruth(boxes=boxes, class_ids=targets[:, 1].long(), image=targets[:, 0].long())

    def _predictions(self, raws: Sequence[Tensor], found: Sequence[Candidates], decode: float) -> Predictions:
        boxes, values = [], []
        for raw, places, anchors, stride in zip(raws, found, self.anchors, self.strides, strict=True):
            value = raw.flatten(0, 3)[places.cell].float()
            centre, sides = decoded(value, anchors[places.anchor], reach=decode)
            cell = torch.stack((places.column, places.row), 1)
            boxes.append(torch.cat((centre + cell - sides / 2, centre + cell + sides / 2), 1) * stride)
            values.append(value)
        value = torch.cat(values)
        return Predictions(
            boxes=torch.cat(boxes),
            objectness=value[:, 4],
            classes=value[:, 5:],
            image=torch.cat([places.image for places in found]),
        )

    def _add_terms(
        self,
        sums: _Sums,
        raws: Sequence[Tensor],
        positives: Sequence[Candidates],
        targets: Tensor,
        *,
        weight: float,
        reach: float,
    ) -> None:
        """Adds this process's share of the means, for one set of heads."""
        shares = self._shares(positives, targets.device)
        balance = BALANCE[len(self.strides)]
        for level, (raw, places) in enumerate(zip(raws, positives, strict=True)):
            flat = raw.flatten(0, 3)
            wanted = flat.new_zeros(len(flat), dtype=torch.float32)
            if len(places.cell):
                value = flat[places.cell].float()
                overlap = self._overlap(value, places, targets, (raw.shape[2], raw.shape[3]), level, reach)
                sums.box = sums.box + weight * shares[level] * (1 - overlap).sum()
                wanted = _last_written(wanted, places.cell, overlap.detach().clamp(min=0))
                if self.classes > 1:
                    classes = self._class_loss(value[:, 5:], targets[places.target, 1].long())
                    sums.classes = sums.classes + weight * shares[level] * classes.sum() / self.classes
            loss = self._cross_entropy(flat[:, 4].float(), wanted, self.objectness_weight)
            sums.objectness = sums.objectness + weight * balance[level] / self.world.size * loss.mean()

    def _shares(self, positives: Sequence[Candidates], device: torch.device) -> list[float]:
        """One over the positives of all processes, per level."""
        counts = torch.tensor([len(places.cell) for places in positives], dtype=torch.float64, device=device)
        return [1 / max(count, 1) for count in self.world.add(counts).tolist()]

    def _overlap(
        self, value: Tensor, places: Candidates, targets: Tensor, grid: tuple[int, int], level: int, reach: float
    ) -> Tensor:
        """CIoU of predicted boxes with their targets, [P]."""
        centre, sides = decoded(value, self.anchors[level][places.anchor], reach=reach)
        boxes = targets[places.target, 2:6] * targets.new_tensor([grid[1], grid[0], grid[1], grid[0]])
        cell = torch.stack((places.column, places.row), 1)
        return complete_iou(centre, sides, boxes[:, :2] - cell, boxes[:, 2:])

    def _class_loss(self, logits: Tensor, class_ids: Tensor) -> Tensor:
        smooth = self.gains.label_smoothing
        wanted = torch.full_like(logits, smooth / 2)
        wanted.scatter_(1, class_ids[:, None], 1 - smooth / 2)
        return self._cross_entropy(logits, wanted, self.class_weight)

    def _cross_entropy(self, logits: Tensor, wanted: Tensor, positive_weight: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=positive_weight, reduction="none")
        if self.gains.fl_gamma == 0:
            return loss
        probability = logits.sigmoid()
        hit = wanted * probability + (1 - wanted) * (1 - probability)
        alpha = wanted * FOCAL_ALPHA + (1 - wanted) * (1 - FOCAL_ALPHA)
        return loss * alpha * (1 - hit) ** self.gains.fl_gamma


def scaled_gains(values: Hyperparameters, *, levels: int, classes: int, size: int) -> Hyperparameters:
    """The recipe with its gains for other than 3 levels, 80 classes and 640 pixels, as in the official program."""
    share = 3 / levels
    return replace(
        values,
        box=values.box * share,
        cls=values.cls * classes / 80 * share,
        obj=values.obj * (size / 640) ** 2 * share,
    )


def decoded(value: Tensor, anchors: Tensor, *, reach: float) -> tuple[Tensor, Tensor]:
    """Centre relative to the cell and size, both [P, 2] in cells, of raw values [P, 5 + C].

    With y the sigmoid: size = (2 y)^2 anchor, and centre = 2 y - 0.5, or 3 y - 1 where it shall reach further.
    """
    y = value[:, :4].sigmoid()
    return y[:, :2] * (1 + 2 * reach) - reach, (y[:, 2:] * 2) ** 2 * anchors


def complete_iou(centre: Tensor, sides: Tensor, true_centre: Tensor, true_sides: Tensor) -> Tensor:
    """CIoU (arXiv 1911.08287) of boxes given as centre and size [P, 2]; gradients reach the first box only.

    CIoU = IoU - (d^2 / c^2 + alpha v): d between centres, c the diagonal of the enclosing box, v the difference of the
    aspect ratios, alpha = v / (v - IoU + 1).
    """
    low, high = centre - sides / 2, centre + sides / 2
    true_low, true_high = true_centre - true_sides / 2, true_centre + true_sides / 2
    shared = (torch.minimum(high, true_high) - torch.maximum(low, true_low)).clamp(min=0).prod(1)
    width, height = (high - low).unbind(1)
    true_width, true_height = (true_high - true_low).unbind(1)
    height, true_height = height + EPS, true_height + EPS
    union = width * height + true_width * true_height - shared + EPS
    iou = shared / union
    diagonal = (torch.maximum(high, true_high) - torch.minimum(low, true_low)).square().sum(1) + EPS
    distance = (low + high - true_low - true_high).square().sum(1) / 4
    angle = torch.atan(true_width / (true_height + EPS)) - torch.atan(width / (height + EPS))
    v = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + EPS))
    return iou - (distance / diagonal + alpha * v)


def _last_written(wanted: Tensor, cell: Tensor, value: Tensor) -> Tensor:
    """`wanted` with each value at its cell; of several for one cell the last, on every device and every time."""
    ordered, order = torch.sort(cell, stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    spare = torch.cat((wanted, wanted.new_zeros(1)))  # those that are not last go to a place behind the end
    spare[torch.where(is_last, ordered, len(wanted))] = value[order]
    return spare[:-1]
