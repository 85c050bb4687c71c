"""Training steps on a device: images per second, the share of each stage, and their losses beside a CPU's."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from noise import OBJECTS, noise_batch

from tests.gpu.environment import Setting
from tests.gpu.targets import Goals
from yolov7_deploy.datasets.coco_classes import COCO_NAMES
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.distributed import CPU, DistributedContext
from yolov7_deploy.training.hyperparameters import PRESETS, preset_for
from yolov7_deploy.training.initialization import starting_model
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import StepMetrics, TrainStep

Tensors = Mapping[str, torch.Tensor]

NO_GPU = "without a GPU nothing is compared"
CALM_RATE = 1e-5  # of the learning rate: images of noise teach nothing, and the loss must stay a number
STEPS = 1000  # of an epoch, of which only the first are done
WARM_STEPS, WARM_PART = 6, 0.4  # the latter of the measured seconds
STAGED_STEPS = 20
PAIR = 2  # steps that are measured together: with a batch of 32 every second one updates the weights
COMPARED_STEPS, COMPARED_IMAGES = 3, 4
MOST_APART = 1e-3  # relative difference of a loss in float32; sums in another order differ by 1e-6
LOSSES = ("box", "objectness", "classes")
STAGED = (
    "each stage is timed in steps of their own, in which the host waits for the device before and after each stage; "
    "rest is what is left of these steps. images_per_s and step_ms are of steps without that."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        img: Side of images.
        variants: Networks, the smallest first.
        batches: Images of a step.
        nominal: Images of an update.
        seconds: Of a measurement.
        workers: Processes that load images.
        sets: Sets of generated images, each made by a process.
        train, val: Images of a set.
        training_s: About how long the whole training may take; 0 is two epochs.
    """

    img: int
    variants: tuple[str, ...]
    batches: tuple[int, ...]
    nominal: int
    seconds: float
    workers: int
    sets: int
    train: int
    val: int
    training_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where training is measured.

    Attributes:
        setting: Of the part.
        goals: Of the part.
        sizes: How much is measured.
        device: Where networks learn.
        folder: For images and runs.
        ends: Time (`time.monotonic`) at which the part ends.
        rates: Images per second of a variant with its loader, once they are known.
    """

    setting: Setting
    goals: Goals
    sizes: Sizes
    device: torch.device
    folder: Path
    ends: float
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """The YAML of the generated images."""
        return self.folder / "shapes.yaml"


class Stepper:
    """Takes one training step after the other, each with finite losses."""

    def __init__(self, learner: TrainStep) -> None:
        self.learner, self.steps = learner, 0

    def __call__(self, batch: Batch) -> StepMetrics:
        """What the step says of itself."""
        numbers = self.learner.learn(batch, epoch=0, step=self.steps, in_epoch=self.steps)
        assert numbers.is_finite, f"the loss is no number in step {self.steps}: {numbers}"
        self.steps += 1
        return numbers


def new_stepper(
    sizes: Sizes, variant: str, batch: int, *, device: torch.device, half: bool, calm: bool, classes: Sequence[str]
) -> Stepper:
    """Steps of a fresh network by its own recipe, the first ones of its warm-up; `calm` ones without warm-up.

    Calm ones add up gradients as later steps do, and learn next to nothing.
    """
    hyp = PRESETS[preset_for(variant, pretrained=False)]
    if calm:
        hyp = replace(hyp, warmup_epochs=0.0, lr0=CALM_RATE)
    options = TrainOptions(batch=batch, img=sizes.img, half=half)
    schedule = Schedule(
        hyp=hyp, epochs=options.epochs, steps=STEPS, batch=batch, nominal_batch=sizes.nominal, linear=False
    )
    model = starting_model(variant, tuple(classes)).model
    learner = TrainStep(model, hyp=hyp, options=options, schedule=schedule, world=DistributedContext(device=device))
    learner.train_mode()
    return Stepper(learner)


def noise_on(images: int, img: int, device: torch.device) -> Batch:
    """Noise, in page-locked memory as a loader gives it where there is a GPU."""
    batch = noise_batch(images, img)
    return batch.pin_memory() if device.type == "cuda" else batch


def synchronize(device: torch.device) -> None:
    """Returns when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def convolutions(*, tf32: bool) -> Iterator[None]:
    """Whether float32 convolutions may round to TF32; the networks multiply no other matrices."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# --- images per second ------------------------------------------------------------------------------------------------


def step_speed(bench: Bench, variant: str, batch: int, *, half: bool, tf32: bool = True) -> dict[str, Any]:
    """Images per second of `TrainStep.learn` on one batch of noise, peak memory, and the share of each stage."""
    device, sizes = bench.device, bench.sizes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images = noise_on(batch, sizes.img, device)
    with convolutions(tf32=tf32):
        stepper = new_stepper(sizes, variant, batch, device=device, half=half, calm=True, classes=COCO_NAMES)
        rate = images_per_s(stepper, images, seconds=sizes.seconds)
        stages = stage_ms(stepper, images, steps=bench.setting.some(STAGED_STEPS, PAIR))
    whole = stages.pop("whole")
    return {
        "images_per_s": round(rate, 1),
        "step_ms": round(1e3 * batch / rate, 2),
        "steps": stepper.steps,
        "img": sizes.img,
        "objects_per_image": OBJECTS,
        "precision": precision(stepper.learner, tf32=tf32),
        "memory_gb": peak_gb(device),
        "staged_step_ms": round(whole, 2),
        "stage_ms": {name: round(value, 3) for name, value in stages.items()},
        "stage_share": {name: round(value / whole, 4) for name, value in stages.items()},
        "note": STAGED,
    }


def precision(learner: TrainStep, *, tf32: bool) -> str:
    """What forward computes in."""
    if learner.half:
        return "float16" if learner.scaler.is_enabled() else "bfloat16"
    return "float32, convolutions in TF32 (torch's default)" if tf32 else "float32"


def peak_gb(device: torch.device) -> dict[str, float] | None:
    """Largest memory of tensors since the count began, and what torch had taken for them."""
    if device.type != "cuda":
        return None
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"tensors": round(allocated / 1e9, 2), "reserved": round(reserved / 1e9, 2)}


def images_per_s(stepper: Stepper, batch: Batch, *, seconds: float) -> float:
    """Of steps on the same batch, after a warm-up."""

    def pairs(least: int, seconds: float) -> tuple[int, float]:
        synchronize(device)
        started, done = time.perf_counter(), 0
        while done < least or time.perf_counter() - started < seconds:
            for _ in range(PAIR):
                stepper(batch)
            done += PAIR
        synchronize(device)
        return done, time.perf_counter() - started

    device = stepper.learner.world.device
    if seconds:
        pairs(WARM_STEPS, WARM_PART * seconds)
    done, took = pairs(PAIR, seconds)
    return done * len(batch.images) / took


# --- stages -----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of each stage of a step, with the device's work done before and after it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, on the clock."""

        def call(*given: object) -> object:
            synchronize(self.device)
            started = time.perf_counter()
            result = work(*given)
            synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            return result

        return call


def stage_ms(stepper: Stepper, batch: Batch, *, steps: int) -> dict[str, float]:
    """Mean milliseconds of each stage of `TrainStep.learn`, of the `rest`, and of the `whole` step.

    An update counts as often as it comes: with a batch of 32 in every second step.
    """
    learner = stepper.learner
    watch = Stopwatch(learner.world.device)
    places: tuple[tuple[str, Any, str], ...] = (
        ("images", learner, "_images"),
        ("forward", learner, "_network"),
        ("assignment", learner.loss, "positives"),
        ("loss", learner.loss, "forward"),
        ("backward", torch.Tensor, "backward"),
        ("optimizer", learner.scaler, "step"),
        ("average", learner.average, "update"),
    )
    step = watch.timed("whole", stepper)
    with ExitStack() as changed:
        for stage, owner, name in places:
            changed.enter_context(patch.object(owner, name, watch.timed(stage, getattr(owner, name))))
        for _ in range(steps):
            step(batch)
    found = {stage: watch.seconds.get(stage, 0.0) * 1e3 / steps for stage, _, _ in places}
    found["loss"] -= found["assignment"]  # which is a part of it
    whole = watch.seconds["whole"] * 1e3 / steps
    return {**found, "rest": whole - sum(found.values()), "whole": whole}


# --- beside a CPU -----------------------------------------------------------------------------------------------------


def compare_devices(bench: Bench, variant: str) -> dict[str, Any]:
    """Losses in float32 of the first steps of a training, of the same weights on the same images.

    The device takes each step from the weights that the CPU came to: left alone both would soon differ by percents,
    as two ways to add on one CPU do, since the last bits of a loss decide which places are positives in the next step.
    For the same reason the updates, whose distance is told in parts of their length, are not judged.
    """
    sizes = bench.sizes
    batch = noise_on(COMPARED_IMAGES, sizes.img, CPU)
    here, there = (
        new_stepper(sizes, variant, COMPARED_IMAGES, device=device, half=False, calm=False, classes=COCO_NAMES)
        for device in (bench.device, CPU)
    )
    with convolutions(tf32=False):
        steps = [step_apart(here, there, batch) for _ in range(COMPARED_STEPS)]
    goal, most = f"{variant}: losses in float32 as on a CPU", max(max(step["apart"].values()) for step in steps)
    if bench.device.type == "cuda":
        bench.goals.at_most(goal, most, MOST_APART)
    else:
        bench.goals.skip(goal, NO_GPU)
    return {"images": COMPARED_IMAGES, "img": sizes.img, "most_apart": most, "steps": steps}


def step_apart(here: Stepper, there: Stepper, batch: Batch) -> dict[str, Any]:
    """One step of both from the weights of `there`: losses, their relative difference, and that of the updates."""
    before = there.learner.tensors()
    here.learner.load(before, updates=there.learner.average.updates, scale=(0.0, 0.0))
    ours, theirs = here(batch), there(batch)
    return {
        "device": asdict(ours),
        "cpu": asdict(theirs),
        "apart": {name: abs(getattr(ours, name) / getattr(theirs, name) - 1) for name in LOSSES},
        "updates_apart": update_distance(before, here.learner.tensors(), there.learner.tensors()),
    }


def update_distance(before: Tensors, here: Tensors, there: Tensors) -> float:
    """How far apart two updates of the weights are, in lengths of the second."""
    names = [name for name in there if name.startswith("model.") and name.endswith((".weight", ".bias"))]
    apart = sum(float((here[name] - there[name]).double().square().sum()) for name in names)
    length = sum(float((there[name] - before[name]).double().square().sum()) for name in names)
    return math.sqrt(apart / max(length, sys.float_info.min))
