"""One training step: forward, loss, backward, and now and then an update of weights and moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.distributed import DistributedContext, synced
from yolov7_deploy.training.ema import ModelEma
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.loss import DetectionLoss, LossOptions, LossParts, scaled_gains
from yolov7_deploy.training.optimizer import Schedule, make_optimizer, set_rates
from yolov7_deploy.training.sample import Batch

SMALLEST_SIZE, LARGEST_SIZE = 0.5, 1.5  # of multi-scale training
SCALE_GROWTH_STEPS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What one step says, of all processes together; losses after their gains."""

    box: float
    objectness: float
    classes: float
    positives: float
    stop: bool

    @property
    def is_finite(self) -> bool:
        """No NaN and no infinity."""
        return bool(np.isfinite([self.box, self.objectness, self.classes]).all())


class TrainStep:
    """A network that learns; the same steps on one device, or shared by several processes.

    Args:
        model: In training form; it becomes the learner's.
        hyp: The recipe.
        options: See `TrainOptions`.
        schedule: Rates and accumulation of each step.
        world: The processes.
    """

    def __init__(
        self,
        model: Yolov7,
        *,
        hyp: Hyperparameters,
        options: TrainOptions,
        schedule: Schedule,
        world: DistributedContext,
    ) -> None:
        self.options, self.schedule, self.world = options, schedule, world
        on_gpu = world.device.type == "cuda"
        self.half = on_gpu if options.half is None else options.half
        # Half on a GPU needs a scaled loss; bfloat16, which processors have, reaches as far as float32.
        self._half_type = torch.float16 if on_gpu else torch.bfloat16
        self.model: nn.Module = model
        self._frozen = frozen_layers(options.freeze, model)
        _freeze(model, self._frozen, options)
        _place(model, world.device)
        if options.sync_bn:
            self.model = synced(model, world)
        gains = scaled_gains(hyp, levels=len(model.variant.strides), classes=model.classes, size=options.img)
        self.loss = DetectionLoss(
            model.head.anchors,
            strides=model.variant.strides,
            classes=model.classes,
            gains=gains,
            options=LossOptions(ota=options.ota, assigner=options.assigner, constraint=options.constraint),
            world=world,
        ).to(world.device)
        self.stride = max(model.variant.strides)
        self.average = ModelEma(self.model)
        self.optimizer = make_optimizer(self.model, schedule, adam=options.adam)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=self.half and on_gpu, growth_interval=SCALE_GROWTH_STEPS
        )
        self._network = self._shared(self.model)

    def _shared(self, model: nn.Module) -> nn.Module:
        if self.world.size == 1:
            return model
        places = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=places)

    def train_mode(self) -> None:
        """Everything learns but frozen layers, whose statistics stay too."""
        self.model.train()
        layers = self.model.get_submodule("model")
        assert isinstance(layers, nn.ModuleList)
        for index in self._frozen:
            layers[index].eval()

    def learn(self, batch: Batch, *, epoch: int, step: int, in_epoch: int, stop: bool = False) -> StepMetrics:
        """One step.

        Args:
            batch: This process's images.
            epoch: From 0.
            step: Of the whole training, from 0.
            in_epoch: Of this epoch, from 0.
            stop: This process wants to stop; the numbers say whether any does.
        """
        set_rates(self.optimizer, self.schedule, step, epoch)
        parts = self.losses(batch, size=self.size(epoch, in_epoch))
        numbers = self._numbers(parts, stop)
        if not numbers.is_finite:
            return numbers
        self.scaler.scale(parts.total).backward()  # type: ignore[no-untyped-call]
        if step % self.schedule.accumulate(step) == 0:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update(self.model)
        return numbers

    def size(self, epoch: int, in_epoch: int) -> int | None:
        """Side of the images of a step in multi-scale training; `None` is as they come."""
        if not self.options.multi_scale:
            return None
        rng = np.random.default_rng((self.options.seed, epoch, in_epoch))
        return int(rng.choice(training_sizes(self.options.img, self.stride)))

    def losses(self, batch: Batch, *, size: int | None = None) -> LossParts:
        """Forward and loss of a batch; nothing learns yet.

        Args:
            batch: This process's images.
            size: Side that they are brought to; `None` leaves them.
        """
        images = self._images(batch.images, size)
        targets = batch.targets.to(self.world.device, non_blocking=True)
        with torch.autocast(self.world.device.type, dtype=self._half_type, enabled=self.half):
            raws = self._network(images)
        parts: LossParts = self.loss(raws, targets)
        return parts

    def _images(self, images: Tensor, size: int | None) -> Tensor:
        """uint8 [B, H, W, 3] to float [B, 3, H, W] 0..1, channels last as it came."""
        x = images.to(self.world.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        if size is None:
            return x
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    def _numbers(self, parts: LossParts, stop: bool) -> StepMetrics:
        one = parts.box.new_tensor([float(parts.positives), float(stop)])
        values = torch.cat((torch.stack((parts.box, parts.objectness, parts.classes)), one))
        box, objectness, classes, positives, stops = self.world.add(values).tolist()
        return StepMetrics(box=box, objectness=objectness, classes=classes, positives=positives, stop=stops > 0)

    # --- keeping and going on -----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later process needs to go on, in memory of its own on the host."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        found |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    found[f"optimizer.{kind}.{name}"] = value
            if parameter.grad is not None:
                found[f"gradient.{name}"] = parameter.grad
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)
            for name, tensor in found.items()
        }

    @property
    def scale(self) -> tuple[float, float]:
        """Scale of the loss in mixed precision, and steps since it last grew."""
        kept = self.scaler.state_dict()
        return (float(kept["scale"]), float(kept["_growth_tracker"])) if kept else (0.0, 0.0)

    def load(self, tensors: Mapping[str, Tensor], *, updates: int, scale: tuple[float, float]) -> None:
        """Goes on from what `tensors` gave.

        Raises:
            KeyError: It is of another network.
        """
        self.model.load_state_dict(_under("model.", tensors))
        self.average.load(_under("average.", tensors), updates=updates)
        gradients = _under("gradient.", tensors)
        kept = _under("optimizer.", tensors)
        for name, parameter in self.model.named_parameters():
            for key in [key for key in kept if key.partition(".")[2] == name]:
                kind, value = key.partition(".")[0], kept[key]
                # A step counter of Adam stays on the host, as the optimiser itself has it.
                place = "cpu" if kind == "step" else parameter.device
                layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
                self.optimizer.state[parameter][kind] = value.to(place).contiguous(memory_format=layout)
            if name in gradients:
                parameter.grad = torch.empty_like(parameter).copy_(gradients[name])
        if self.half and scale[0] > 0:
            now = self.scaler.state_dict()
            self.scaler.load_state_dict({**now, "scale": scale[0], "_growth_tracker": int(scale[1])})


def _place(model: nn.Module, device: torch.device) -> None:
    """Moves a model; convolutions get their channels last, which other parameters with four axes do not gain from."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def training_sizes(img: int, stride: int) -> range:
    """The sizes of multi-scale training: multiples of the stride from half to one and a half of `img`."""
    low, high = math.ceil(img * SMALLEST_SIZE / stride), math.floor(img * LARGEST_SIZE / stride)
    return range(low * stride, high * stride + 1, stride)


def frozen_layers(freeze: tuple[int, ...], model: Yolov7) -> tuple[int, ...]:
    """One number is the first so many layers, several are just these.

    Raises:
        UsageError: There is no such layer, or nothing would be left to learn.
    """
    chosen = tuple(range(freeze[0])) if len(freeze) == 1 else freeze
    last = len(model.layers) - 1
    if chosen and (max(chosen) > last or len(set(chosen)) > last):
        raise UsageError(
            f"--freeze {','.join(map(str, freeze))}: {model.variant.name} has layers 0..{last}, and one must learn.",
            fix=f"For example: --freeze {last // 2}",
        )
    return chosen


def _freeze(model: Yolov7, frozen: tuple[int, ...], options: TrainOptions) -> None:
    """Takes gradients from frozen layers, and from auxiliary branches that nobody asks."""
    still = set(frozen)
    head = model.layers[-1]
    if options.auxiliary == "none":
        still |= set(head.sources[model.head.levels :])
        for name, parameter in model.head.named_parameters():
            parameter.requires_grad_(not name.startswith("m2."))
    for index in still:
        model.model[index].requires_grad_(requires_grad=False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"--freeze {','.join(map(str, frozen))}: the other layers of {model.variant.name} have nothing to learn.",
            fix=f"For example: --freeze {len(model.layers) // 2}",
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
