"""Share of assignment and loss in a training step, speed of label assignment, and steps in bfloat16.

python benchmarks/train_loss.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from noise import OBJECTS, noise_batch
from recording import parser, record
from torch.nn import functional as F

from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.assignment import GroundTruth, Predictions, assign_simota
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import PRESETS
from yolov7_deploy.training.initialization import initialize_model
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import TrainStep

ROUNDS = 5


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--img", type=int, default=320)
    arguments.add_argument("--variant", default="yolov7-tiny")
    options = arguments.parse_args()
    train_step, batch = make(options.variant, options.batch, options.img)
    half, _ = make(options.variant, options.batch, options.img, half=True)
    for one in (train_step, half):
        one.run(batch, epoch=0, step=0, epoch_step=0)
    step_s, half_s, loss_s = [], [], []
    raws = raw_maps(train_step, batch)
    for number in range(ROUNDS):
        step_s.append(seconds(lambda number=number: train_step.run(batch, epoch=0, step=number, epoch_step=0)))
        half_s.append(seconds(lambda number=number: half.run(batch, epoch=0, step=number, epoch_step=0)))
        loss_s.append(
            seconds(lambda: train_step.loss([raw.requires_grad_() for raw in raws], batch.targets).total.backward())
        )
    predictions, truth = assignment_inputs(train_step, raws, batch)
    ours = [seconds(lambda: assign_simota(predictions, truth, top_k=10)) for _ in range(ROUNDS)]
    theirs = [seconds(lambda: reference_match(predictions, truth, 10)) for _ in range(ROUNDS)]
    same = agreement(predictions, truth)
    share = float(np.median(loss_s) / np.median(step_s))
    print(f"equal (cell, target) pairs: {same:.2%}")
    print(f"assignment and loss: {share:.1%} of a step of {np.median(step_s):.2f} s")
    print(f"a step in bfloat16: {np.median(step_s) / np.median(half_s):.2f} times as fast as in float32")
    print(f"matching: {np.median(theirs) / np.median(ours):.1f} times as fast as image by image")
    record(
        "train_loss",
        options.machine,
        {
            "variant": options.variant,
            "batch": options.batch,
            "img": options.img,
            "objects_per_image": OBJECTS,
            "classes": len(COCO_NAMES),
            "candidates": len(predictions.image),
            "step_s": [round(value, 4) for value in step_s],
            "bfloat16_step_s": [round(value, 4) for value in half_s],
            "bfloat16_ratio": round(float(np.median(step_s) / np.median(half_s)), 2),
            "assignment_and_loss_s": [round(value, 4) for value in loss_s],
            "share_of_step": round(share, 4),
            "share_limit": 0.15,
            "same_pairs": round(same, 5),
            "matching_s": [round(value, 5) for value in ours],
            "reference_matching_s": [round(value, 5) for value in theirs],
            "matching_ratio": round(float(np.median(theirs) / np.median(ours)), 2),
        },
    )


def make(variant: str, images: int, img: int, *, half: bool = False) -> tuple[TrainStep, Batch]:
    """Return a train step with new weights, and a random batch."""
    hyp, options = PRESETS["tiny"], TrainOptions(batch=images, img=img, half=half)
    schedule = Schedule(hyp=hyp, epochs=10, steps_per_epoch=100, batch=images, nominal_batch=64, linear=False)
    model = initialize_model(variant, COCO_NAMES).model
    train_step = TrainStep(model, hyp=hyp, options=options, schedule=schedule, distributed=DistributedContext())
    train_step.train()
    return train_step, noise_batch(images, img)


def raw_maps(train_step: TrainStep, batch: Batch) -> list[torch.Tensor]:
    """Return the raw head maps of a batch, without gradients."""
    images = batch.images.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return [raw.clone() for raw in train_step.model(images)]


def assignment_inputs(train_step: TrainStep, raws: list[torch.Tensor], batch: Batch) -> tuple[Predictions, GroundTruth]:
    """Return the arguments with which the loss calls `assign_simota`."""
    seen: list[tuple[Predictions, GroundTruth]] = []

    def record_call(predictions: Predictions, truth: GroundTruth, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((predictions, truth))
        return assign_simota(predictions, truth, top_k=top_k)

    import yolov7_deploy.training.loss as module

    module.assign_simota, original = record_call, module.assign_simota
    with torch.no_grad():
        train_step.loss.assign(raws, [], batch.targets)
    module.assign_simota = original
    return seen[0]


def reference_match(predictions: Predictions, truth: GroundTruth, top_k: int) -> list[list[int]]:
    """Match image by image, with a table over targets, candidates and classes, as the rule is usually written."""
    chosen: list[tuple[int, int]] = []
    for image in truth.image.unique():
        rows = (truth.image == image).nonzero().flatten()
        columns = (predictions.image == image).nonzero().flatten()
        if not len(columns):
            continue
        a, b = truth.boxes[rows][:, None], predictions.boxes[columns][None]
        shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
        areas = [(box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b)]
        overlap = shared / (areas[0] + areas[1] - shared)
        y = (predictions.classes[columns].sigmoid() * predictions.objectness[columns, None].sigmoid()).sqrt()
        y = y[None].expand(len(rows), -1, -1)
        expected = F.one_hot(truth.class_ids[rows], y.shape[2]).float()[:, None].expand_as(y)
        logit = torch.log(y / (1 - y))
        cost = F.binary_cross_entropy_with_logits(logit, expected, reduction="none").sum(-1)
        cost = cost - 3 * torch.log(overlap + 1e-8)
        counts = overlap.topk(min(top_k, len(columns)), 1).values.sum(1).int().clamp(min=1)
        marks = torch.zeros_like(cost)
        for row, count in enumerate(counts.tolist()):
            marks[row, cost[row].topk(count, largest=False).indices] = 1
        disputed = marks.sum(0) > 1
        if disputed.any():
            cheapest = cost[:, disputed].argmin(0)
            marks[:, disputed] = 0
            marks[cheapest, disputed.nonzero().flatten()] = 1
        selected = marks.sum(0).nonzero().flatten()
        owner = rows[marks[:, selected].argmax(0)]
        chosen += zip(columns[selected].tolist(), owner.tolist(), strict=True)
    chosen.sort()
    return [[candidate for candidate, _ in chosen], [target for _, target in chosen]]


def agreement(predictions: Predictions, truth: GroundTruth) -> float:
    """Return the share of (prediction, target) pairs that both implementations select.

    A cell that two targets propose is listed twice with one prediction; either entry is correct, so predictions are
    compared instead of their indices.
    """
    numbers = torch.unique(torch.cat((predictions.boxes, predictions.image[:, None]), 1), dim=0, return_inverse=True)[1]
    found = []
    ours = assign_simota(predictions, truth, top_k=10)
    for candidates, targets in (([*ours[0].tolist()], [*ours[1].tolist()]), reference_match(predictions, truth, 10)):
        found.append({(int(numbers[a]), b) for a, b in zip(candidates, targets, strict=True)})
    return len(found[0] & found[1]) / max(map(len, found))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
