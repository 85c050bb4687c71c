"""One training step: forward, loss, backward, and every few steps an update of the weights and their average."""

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
from yolov7_deploy.model.layer_table import Variant
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.distributed import DistributedContext, convert_sync_batchnorm
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.loss import DetectionLoss, LossOptions, LossParts, scale_gains
from yolov7_deploy.training.optimizer import ModelEma, Schedule, apply_schedule, build_optimizer
from yolov7_deploy.training.sample import Batch

MIN_SCALE, MAX_SCALE = 0.5, 1.5  # of multi-scale training, relative to the image size
GRAD_SCALE_GROWTH_STEPS = 2000
_IMAGE_SIZE = 2  # separates the random numbers of an image size from those of samples and of an epoch's order


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Metrics of one step, summed over all processes.

    Attributes:
        box, obj, cls: Losses, multiplied by their gains.
        positives: Number of positives of the lead heads.
        stop: True if any process requested to stop.
    """

    box: float
    obj: float
    cls: float
    positives: float
    stop: bool

    @property
    def is_finite(self) -> bool:
        """True if no loss is NaN or infinite."""
        return bool(np.isfinite([self.box, self.obj, self.cls]).all())


class TrainStep:
    """The model under training with its loss, optimizer and moving average.

    Args:
        model: Model in training form; it is changed in place.
        hyp: Hyperparameters.
        options: See `TrainOptions`.
        schedule: Learning rates and gradient accumulation.
        distributed: The processes that train together.
    """

    def __init__(
        self,
        model: Yolov7,
        *,
        hyp: Hyperparameters,
        options: TrainOptions,
        schedule: Schedule,
        distributed: DistributedContext,
    ) -> None:
        self.options, self.schedule, self.distributed = options, schedule, distributed
        on_gpu = distributed.device.type == "cuda"
        self.half = on_gpu if options.half is None else options.half
        # float16 needs loss scaling. CPUs have bfloat16, whose range is that of float32.
        self._half_dtype = torch.float16 if on_gpu else torch.bfloat16
        self.model: nn.Module = model
        self._frozen = frozen_layers(options.freeze, model.variant)
        _disable_gradients(model, self._frozen, options)
        _move_to_device(model, distributed.device)
        if options.sync_bn:
            self.model = convert_sync_batchnorm(model, distributed)
        gains = scale_gains(hyp, levels=len(model.variant.strides), classes=model.classes, image_size=options.img)
        self.loss = DetectionLoss(
            model.head.anchors,
            strides=model.variant.strides,
            classes=model.classes,
            gains=gains,
            options=LossOptions(ota=options.ota, assigner=options.assigner, constraint=options.constraint),
            distributed=distributed,
        ).to(distributed.device)
        self.stride = max(model.variant.strides)
        self.ema = ModelEma(self.model)
        self.optimizer = build_optimizer(self.model, schedule, adam=options.adam)
        self.scaler = torch.amp.GradScaler(
            distributed.device.type, enabled=self.half and on_gpu, growth_interval=GRAD_SCALE_GROWTH_STEPS
        )
        self._network = self._wrap_ddp(self.model)

    def _wrap_ddp(self, model: nn.Module) -> nn.Module:
        if self.distributed.world_size == 1:
            return model
        device_ids = [self.distributed.device.index] if self.distributed.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids)

    def train(self) -> None:
        """Set the model to train mode, except frozen layers, whose BatchNorm statistics stay frozen, too."""
        self.model.train()
        layers = self.model.get_submodule("model")
        assert isinstance(layers, nn.ModuleList)
        for index in self._frozen:
            layers[index].eval()

    def run(self, batch: Batch, *, epoch: int, step: int, epoch_step: int, stop: bool = False) -> StepMetrics:
        """Train on a batch; a loss that is not finite leaves weights and gradients unchanged.

        Args:
            batch: Images of this process.
            epoch: Epoch, from 0.
            step: Step since the start of training, from 0.
            epoch_step: Step in this epoch, from 0.
            stop: This process requests to stop; the metrics pass the request to all processes.
        """
        apply_schedule(self.optimizer, self.schedule, step, epoch)
        parts = self.compute_loss(batch, image_size=self.image_size(epoch, epoch_step))
        metrics = self._reduce_metrics(parts, stop)
        if not metrics.is_finite:
            return metrics
        self.scaler.scale(parts.total).backward()  # type: ignore[no-untyped-call]
        if step % self.schedule.accumulation_steps(step) == 0:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.ema.update(self.model)
        return metrics

    def image_size(self, epoch: int, epoch_step: int) -> int | None:
        """Return the image size of a step of multi-scale training; `None` keeps the size of the batch."""
        if not self.options.multi_scale:
            return None
        rng = np.random.default_rng((self.options.seed, epoch, epoch_step, _IMAGE_SIZE))
        return int(rng.choice(multi_scale_sizes(self.options.img, self.stride)))

    def compute_loss(self, batch: Batch, *, image_size: int | None = None) -> LossParts:
        """Return the loss of a batch, without backward pass.

        Args:
            batch: Images of this process.
            image_size: Resize the images to this size; `None` keeps theirs.
        """
        images = self._prepare_images(batch.images, image_size)
        targets = batch.targets.to(self.distributed.device, non_blocking=True)
        with torch.autocast(self.distributed.device.type, dtype=self._half_dtype, enabled=self.half):
            raw_outputs = self._network(images)
        parts: LossParts = self.loss(raw_outputs, targets)
        return parts

    def _prepare_images(self, images: Tensor, image_size: int | None) -> Tensor:
        """Convert uint8 [B, H, W, 3] to float32 [B, 3, H, W] from 0 to 1, which stays channels-last in memory."""
        x = images.to(self.distributed.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        if image_size is None:
            return x
        return F.interpolate(x, size=(image_size, image_size), mode="bilinear", align_corners=False)

    def _reduce_metrics(self, parts: LossParts, stop: bool) -> StepMetrics:
        counts = parts.box.new_tensor([float(parts.positives), float(stop)])
        values = torch.cat((torch.stack((parts.box, parts.obj, parts.cls)), counts))
        box, obj, cls, positives, stops = self.distributed.all_reduce_sum(values).tolist()
        return StepMetrics(box=box, obj=obj, cls=cls, positives=positives, stop=stops > 0)

    # --- saving and resuming ------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Return copies on the CPU of weights, moving average, optimizer state and accumulated gradients."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.tensors.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer.{key}.{name}"] = value
            if parameter.grad is not None:
                tensors[f"gradient.{name}"] = parameter.grad
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }

    @property
    def grad_scale(self) -> tuple[float, float]:
        """Loss scale of mixed precision, and the number of steps since it last grew; zeros without loss scaling."""
        state = self.scaler.state_dict()
        return (float(state["scale"]), float(state["_growth_tracker"])) if state else (0.0, 0.0)

    def load_state(self, tensors: Mapping[str, Tensor], *, ema_updates: int, grad_scale: tuple[float, float]) -> None:
        """Restore what `state_tensors` returned.

        Raises:
            KeyError, RuntimeError: The tensors are from another network.
        """
        self.model.load_state_dict(_select(tensors, "model."))
        self.ema.load(_select(tensors, "ema."), updates=ema_updates)
        gradients = _select(tensors, "gradient.")
        optimizer_state = _select(tensors, "optimizer.")
        for name, parameter in self.model.named_parameters():
            for state_name in [key for key in optimizer_state if key.partition(".")[2] == name]:
                key, value = state_name.partition(".")[0], optimizer_state[state_name]
                device = "cpu" if key == "step" else parameter.device  # AdamW keeps its step counter on the CPU
                layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
                self.optimizer.state[parameter][key] = value.to(device).contiguous(memory_format=layout)
            if name in gradients:
                parameter.grad = torch.empty_like(parameter).copy_(gradients[name])
        scale, growth_steps = grad_scale
        if self.half and scale > 0:
            state = self.scaler.state_dict()
            self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": int(growth_steps)})


def _move_to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model; convolution weights become channels-last, other parameters with four axes do not."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def multi_scale_sizes(image_size: int, stride: int) -> range:
    """Return the sizes of multi-scale training: multiples of the stride from 0.5 to 1.5 times the image size."""
    low, high = math.ceil(image_size * MIN_SCALE / stride), math.floor(image_size * MAX_SCALE / stride)
    return range(low * stride, high * stride + 1, stride)


def frozen_layers(freeze: tuple[int, ...], variant: Variant) -> tuple[int, ...]:
    """Return the indices of frozen layers: one number N stands for the first N layers, several for themselves.

    Raises:
        UsageError: A layer does not exist, or no layer would be trained.
    """
    chosen = tuple(range(freeze[0])) if len(freeze) == 1 else freeze
    last = len(variant.layers(training=True)) - 1
    if chosen and (max(chosen) > last or len(set(chosen)) > last):
        raise UsageError(
            f"--freeze {','.join(map(str, freeze))}: {variant.name} has layers 0..{last}, and at least one must "
            "be trained.",
            fix=f"For example: --freeze {last // 2}",
        )
    return chosen


def _disable_gradients(model: Yolov7, frozen: tuple[int, ...], options: TrainOptions) -> None:
    """Disable gradients of frozen layers, and of auxiliary branches that are not used."""
    without_gradients = set(frozen)
    head = model.layers[-1]
    if options.auxiliary == "none":
        without_gradients |= set(head.sources[model.head.levels :])
        for name, parameter in model.head.named_parameters():
            parameter.requires_grad_(not name.startswith("m2."))
    for index in without_gradients:
        model.model[index].requires_grad_(requires_grad=False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"--freeze {','.join(map(str, frozen))}: the other layers of {model.variant.name} do not have weights.",
            fix=f"For example: --freeze {len(model.layers) // 2}",
        )


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
