"""What is asked of a training, as plain data that a run keeps and goes on with."""

from __future__ import annotations

from dataclasses import dataclass, field

from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.hyperparameters import Hyperparameters


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """A training.

    Attributes:
        data: Dataset YAML, or COCO instances JSON.
        folder: Where everything goes.
        variant: Official name.
        weights: File to begin with; empty is random.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        classes: Only these of the dataset, by name or number; empty is all.
        single_class: All boxes are of one class.
        tensorboard: Write events; `None` is where it is installed.
        hyp: The recipe.
        options: See `TrainOptions`.
    """

    data: str
    folder: str
    variant: str = "yolov7"
    weights: str = ""
    device: str = "auto"
    classes: tuple[str, ...] = ()
    single_class: bool = False
    tensorboard: bool | None = None
    hyp: Hyperparameters = field(default_factory=Hyperparameters)
    options: TrainOptions = field(default_factory=TrainOptions)
