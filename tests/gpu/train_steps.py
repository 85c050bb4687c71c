"""Training steps on a device: images per second, time per stage, and losses compared with a CPU."""

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

from tests.gpu.environment import Environment
from tests.gpu.targets import Targets
from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.distributed import CPU, DistributedContext
from yolov7_deploy.training.hyperparameters import PRESETS, default_preset
from yolov7_deploy.training.initialization import initialize_model
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import StepMetrics, TrainStep

Tensors = Mapping[str, torch.Tensor]

NO_GPU = "nothing is compared without a GPU"
SMALL_LEARNING_RATE = 1e-5  # keeps the loss finite although the images are noise
STEPS = 1000  # steps per epoch, of which only the first are run
WARM_STEPS, WARM_PART = 6, 0.4  # minimum steps, and part of the measured seconds
STAGED_STEPS = 20
PAIR = 2  # steps measured together: with a batch of 32, every second one updates the weights
COMPARED_STEPS, COMPARED_IMAGES = 3, 4
MAX_LOSS_DIFFERENCE = 1e-3  # relative difference of a float32 loss; a different summation order gives 1e-6
LOSSES = ("box", "obj", "cls")
STAGED = (
    "stages are timed in separate steps, in which the host waits for the device before and after each stage; "
    "rest is the remaining time of these steps. images_per_s and step_ms are measured without stage timing."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the measurements.

    Attributes:
        img: Image size.
        variants: Variants, the smallest first.
        batches: Batch sizes.
        nominal: Nominal batch size (images per update of the weights).
        seconds: Seconds per measurement.
        workers: Number of loader processes.
        sets: Number of sets of generated images, each written by one process.
        train, val: Training and validation images per set.
        training_s: Approximate time of the complete training; 0 means two epochs.
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
    """The measurements of training in one run of the part.

    Attributes:
        env: Environment of the part.
        targets: Targets of the part.
        sizes: Sizes of the measurements.
        device: Device of the networks.
        folder: Folder for images and runs.
        ends: Time (`time.monotonic`) at which the part ends.
        rates: Images per second of each variant with its loader, once measured.
    """

    env: Environment
    targets: Targets
    sizes: Sizes
    device: torch.device
    folder: Path
    ends: float
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """The dataset YAML of the generated images."""
        return self.folder / "shapes.yaml"


class Stepper:
    """Runs training steps one after the other and checks that their losses are finite."""

    def __init__(self, train_step: TrainStep) -> None:
        self.train_step, self.steps = train_step, 0

    def __call__(self, batch: Batch) -> StepMetrics:
        """Run one step and return its metrics."""
        metrics = self.train_step.run(batch, epoch=0, step=self.steps, epoch_step=self.steps)
        assert metrics.is_finite, f"the loss is not finite in step {self.steps}: {metrics}"
        self.steps += 1
        return metrics


def new_stepper(
    sizes: Sizes,
    variant: str,
    batch: int,
    *,
    device: torch.device,
    half: bool,
    small_steps: bool,
    classes: Sequence[str],
) -> Stepper:
    """Return a stepper of a new network with its default hyperparameters, which begins with the warm-up.

    With `small_steps` there is no warm-up and the learning rate is tiny: gradients are accumulated as in later steps,
    and the weights hardly change.
    """
    hyp = PRESETS[default_preset(variant, pretrained=False)]
    if small_steps:
        hyp = replace(hyp, warmup_epochs=0.0, lr0=SMALL_LEARNING_RATE)
    options = TrainOptions(batch=batch, img=sizes.img, half=half)
    schedule = Schedule(
        hyp=hyp, epochs=options.epochs, steps_per_epoch=STEPS, batch=batch, nominal_batch=sizes.nominal, linear=False
    )
    model = initialize_model(variant, tuple(classes)).model
    distributed = DistributedContext(device=device)
    train_step = TrainStep(model, hyp=hyp, options=options, schedule=schedule, distributed=distributed)
    train_step.train()
    return Stepper(train_step)


def noise_batch_on(images: int, img: int, device: torch.device) -> Batch:
    """Return a batch of noise, in page-locked memory for a GPU as from a loader."""
    batch = noise_batch(images, img)
    return batch.pin_memory() if device.type == "cuda" else batch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def convolutions(*, tf32: bool) -> Iterator[None]:
    """Set whether float32 convolutions may use TF32; the networks contain no other matrix multiplications."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# --- images per second ------------------------------------------------------------------------------------------------


def step_speed(bench: Bench, variant: str, batch: int, *, half: bool, tf32: bool = True) -> dict[str, Any]:
    """Return images per second of `TrainStep.run` on one batch of noise, peak memory, and the time of each stage."""
    device, sizes = bench.device, bench.sizes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images = noise_batch_on(batch, sizes.img, device)
    with convolutions(tf32=tf32):
        stepper = new_stepper(sizes, variant, batch, device=device, half=half, small_steps=True, classes=COCO_NAMES)
        rate = images_per_s(stepper, images, seconds=sizes.seconds)
        stages = stage_ms(stepper, images, steps=bench.env.choose(STAGED_STEPS, PAIR))
    step_total = stages.pop("step")
    return {
        "images_per_s": round(rate, 1),
        "step_ms": round(1e3 * batch / rate, 2),
        "steps": stepper.steps,
        "img": sizes.img,
        "objects_per_image": OBJECTS,
        "precision": precision(stepper.train_step, tf32=tf32),
        "memory_gb": peak_gb(device),
        "staged_step_ms": round(step_total, 2),
        "stage_ms": {name: round(value, 3) for name, value in stages.items()},
        "stage_share": {name: round(value / step_total, 4) for name, value in stages.items()},
        "note": STAGED,
    }


def precision(train_step: TrainStep, *, tf32: bool) -> str:
    """Return the precision of the forward pass."""
    if train_step.half:
        return "float16" if train_step.scaler.is_enabled() else "bfloat16"
    return "float32, convolutions in TF32 (torch's default)" if tf32 else "float32"


def peak_gb(device: torch.device) -> dict[str, float] | None:
    """Return the peak memory of tensors, and the memory that torch reserved for them."""
    if device.type != "cuda":
        return None
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"tensors": round(allocated / 1e9, 2), "reserved": round(reserved / 1e9, 2)}


def images_per_s(stepper: Stepper, batch: Batch, *, seconds: float) -> float:
    """Return images per second of steps on the same batch, after a warm-up."""

    def pairs(least: int, seconds: float) -> tuple[int, float]:
        synchronize(device)
        started, done = time.perf_counter(), 0
        while done < least or time.perf_counter() - started < seconds:
            for _ in range(PAIR):
                stepper(batch)
            done += PAIR
        synchronize(device)
        return done, time.perf_counter() - started

    device = stepper.train_step.distributed.device
    if seconds:
        pairs(WARM_STEPS, WARM_PART * seconds)
    done, elapsed = pairs(PAIR, seconds)
    return done * len(batch.images) / elapsed


# --- stages -----------------------------------------------------------------------------------------------------------


class StageTimer:
    """Measures the seconds of each stage of a step, and synchronizes the device before and after it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same work and measures its time."""

        def call(*arguments: object) -> object:
            synchronize(self.device)
            started = time.perf_counter()
            result = work(*arguments)
            synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            return result

        return call


def stage_ms(stepper: Stepper, batch: Batch, *, steps: int) -> dict[str, float]:
    """Return mean milliseconds of each stage of `TrainStep.run`, of the `rest`, and of the complete `step`.

    Updates of the weights are averaged over all steps: with a batch of 32 they occur in every second step.
    """
    train_step = stepper.train_step
    timer = StageTimer(train_step.distributed.device)
    patched: tuple[tuple[str, Any, str], ...] = (
        ("images", train_step, "_prepare_images"),
        ("forward", train_step, "_network"),
        ("assignment", train_step.loss, "assign"),
        ("loss", train_step.loss, "forward"),
        ("backward", torch.Tensor, "backward"),
        ("optimizer", train_step.scaler, "step"),
        ("ema", train_step.ema, "update"),
    )
    step = timer.timed("step", stepper)
    with ExitStack() as changed:
        for stage, owner, name in patched:
            changed.enter_context(patch.object(owner, name, timer.timed(stage, getattr(owner, name))))
        for _ in range(steps):
            step(batch)
    found = {stage: timer.seconds.get(stage, 0.0) * 1e3 / steps for stage, _, _ in patched}
    found["loss"] -= found["assignment"]  # assignment is called by the loss
    step_total = timer.seconds["step"] * 1e3 / steps
    return {**found, "rest": step_total - sum(found.values()), "step": step_total}


# --- comparison with a CPU --------------------------------------------------------------------------------------------


def compare_devices(bench: Bench, variant: str) -> dict[str, Any]:
    """Compare float32 losses of the first training steps of both devices, with the same weights and images.

    The device starts each step from the weights of the CPU. Otherwise both would soon differ by percents, as two
    summation orders on one CPU do, because rounding decides which positions are positives in the next step. For the
    same reason, the relative distance of the updates is recorded but not a target.
    """
    sizes = bench.sizes
    batch = noise_batch_on(COMPARED_IMAGES, sizes.img, CPU)
    here, there = (
        new_stepper(sizes, variant, COMPARED_IMAGES, device=device, half=False, small_steps=False, classes=COCO_NAMES)
        for device in (bench.device, CPU)
    )
    with convolutions(tf32=False):
        steps = [compare_step(here, there, batch) for _ in range(COMPARED_STEPS)]
    target, most = f"{variant}: losses in float32 as on a CPU", max(max(step["difference"].values()) for step in steps)
    if bench.device.type == "cuda":
        bench.targets.at_most(target, most, MAX_LOSS_DIFFERENCE)
    else:
        bench.targets.skip(target, NO_GPU)
    return {"images": COMPARED_IMAGES, "img": sizes.img, "max_difference": most, "steps": steps}


def compare_step(here: Stepper, there: Stepper, batch: Batch) -> dict[str, Any]:
    """Run one step of both from the weights of `there`; return losses and updates with their relative differences."""
    before = there.train_step.state_tensors()
    here.train_step.load_state(before, ema_updates=there.train_step.ema.updates, grad_scale=(0.0, 0.0))
    ours, theirs = here(batch), there(batch)
    return {
        "device": asdict(ours),
        "cpu": asdict(theirs),
        "difference": {name: abs(getattr(ours, name) / getattr(theirs, name) - 1) for name in LOSSES},
        "update_difference": update_distance(before, here.train_step.state_tensors(), there.train_step.state_tensors()),
    }


def update_distance(before: Tensors, here: Tensors, there: Tensors) -> float:
    """Return the distance of two updates of the weights, relative to the length of the second."""
    names = [name for name in there if name.startswith("model.") and name.endswith((".weight", ".bias"))]
    difference = sum(float((here[name] - there[name]).double().square().sum()) for name in names)
    length = sum(float((there[name] - before[name]).double().square().sum()) for name in names)
    return math.sqrt(difference / max(length, sys.float_info.min))
