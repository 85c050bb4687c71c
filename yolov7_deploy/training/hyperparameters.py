"""The numbers of a training recipe as a readable file, with the official presets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from yolov7_deploy._serialization import shown
from yolov7_deploy.errors import UsageError

PRESET_OF_VARIANT = {"yolov7-tiny": "tiny", "yolov7-tiny-silu": "tiny", "yolov7": "p5", "yolov7x": "p5"}
FRACTIONS = {"flipud", "fliplr", "mosaic", "mixup", "copy_paste", "paste_in", "label_smoothing", "translate"}
MOST = sys.float_info.max
UNUSED = {"iou_t", "fl_gamma_alpha", "loss_ota", "anchors"}  # official keys that change nothing here


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """A training recipe; names and defaults are those of the official file for P5 models from scratch.

    Attributes:
        lr0: Learning rate at the start.
        lrf: Learning rate at the end, as a fraction of `lr0`.
        momentum: Of SGD (Nesterov); the first beta of Adam.
        weight_decay: Of convolution weights, for a nominal batch of 64.
        warmup_epochs: Epochs in which rates, momentum and accumulation rise; at least 1000 steps where there are many.
        warmup_momentum: Momentum at the start.
        warmup_bias_lr: Learning rate of biases at the start.
        box: Gain of the box loss.
        cls: Gain of the class loss, for 80 classes.
        cls_pw: Weight of positives in the class loss.
        obj: Gain of the objectness loss, for images of 640 pixels.
        obj_pw: Weight of positives in the objectness loss.
        anchor_t: Anchors and targets match up to this ratio of their sides.
        fl_gamma: Gamma of the focal loss; 0 is plain cross entropy.
        label_smoothing: Targets of the class loss are this much away from 0 and 1 together.
        hsv_h: Change of the hue, as a fraction.
        hsv_s: Change of the saturation.
        hsv_v: Change of the value.
        degrees: Rotation either way.
        translate: Shift either way, as a fraction of the image.
        scale: Scale from 1 - scale to 1.1 + scale.
        shear: Shear either way in degrees.
        perspective: Up to 0.001 makes sense.
        flipud: Probability of upside down.
        fliplr: Probability of left to right.
        mosaic: Probability of a mosaic; one in five has nine tiles, the others four.
        mixup: Probability of two mosaics laid over each other.
        copy_paste: Fraction of the objects with an outline that are copied to the other side.
        paste_in: Probability that objects with an outline are pasted in from other images.
    """

    lr0: float = 0.01
    lrf: float = 0.1
    momentum: float = 0.937
    weight_decay: float = 0.0005
    warmup_epochs: float = 3.0
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    box: float = 0.05
    cls: float = 0.3
    cls_pw: float = 1.0
    obj: float = 0.7
    obj_pw: float = 1.0
    anchor_t: float = 4.0
    fl_gamma: float = 0.0
    label_smoothing: float = 0.0
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    translate: float = 0.2
    scale: float = 0.9
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mixup: float = 0.15
    copy_paste: float = 0.0
    paste_in: float = 0.15

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST:
                raise UsageError(f"Hyper-parameter {field.name}: {shown(value)} is no number from 0.", fix=_TYPE_PRESET)
            object.__setattr__(self, field.name, float(value))
        wrong = sorted(name for name in FRACTIONS if getattr(self, name) > 1)
        if wrong or self.scale >= 1:
            name = wrong[0] if wrong else "scale"
            raise UsageError(f"Hyper-parameter {name}: {getattr(self, name):g} is above 1.", fix=_TYPE_PRESET)
        if self.anchor_t <= 1:
            raise UsageError(f"Hyper-parameter anchor_t: {self.anchor_t:g} must be above 1.", fix=_TYPE_PRESET)


_TYPE_PRESET = "See a file that works:  y7 train --hyp p5 --show-hyp"

PRESETS: Mapping[str, Hyperparameters] = {
    "tiny": Hyperparameters(lrf=0.01, cls=0.5, obj=1.0, translate=0.1, scale=0.5, mixup=0.05, paste_in=0.05),
    "p5": Hyperparameters(),
    "p6": Hyperparameters(lrf=0.2),
    "custom": Hyperparameters(scale=0.5, mixup=0.0, paste_in=0.0),
}


def preset_for(variant: str, *, pretrained: bool) -> str:
    """The official preset of a variant: its own from scratch, `custom` when weights are given."""
    return "custom" if pretrained else PRESET_OF_VARIANT.get(variant, "p6")


def read_hyperparameters(name_or_path: str, *, changes: Mapping[str, float] | None = None) -> Hyperparameters:
    """A preset by name, or a YAML file in the official form; keys that it leaves out are those of `p5`.

    Args:
        name_or_path: `tiny`, `p5`, `p6`, `custom`, or a file.
        changes: Single values on top.

    Raises:
        UsageError: No such file, no such key, or a value that cannot be meant.
    """
    chosen = PRESETS.get(name_or_path)
    if chosen is None:
        chosen = _with(Hyperparameters(), _read(Path(name_or_path)), name_or_path)
    return _with(chosen, changes or {}, "--set")


def write_hyperparameters(values: Hyperparameters, path: Path) -> None:
    """Writes what `read_hyperparameters` reads.

    Raises:
        UsageError: The file cannot be written.
    """
    try:
        path.write_text(hyperparameters_text(values), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", fix="Choose another path.") from error


def hyperparameters_text(values: Hyperparameters) -> str:
    """The recipe as YAML, one value a line, with all its digits."""
    return "".join(f"{name}: {value!r}\n" for name, value in asdict(values).items())


def _read(path: Path) -> dict[Any, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"--hyp {path}: no preset and no file of this name.", fix=f"One of {', '.join(PRESETS)}, or a YAML file."
        ) from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--hyp {path} cannot be read: {str(error)[:200]}.", fix=_TYPE_PRESET) from error
    if not isinstance(found, dict):
        raise UsageError(f"--hyp {path} is not a list of `name: value` lines.", fix=_TYPE_PRESET)
    return found


def _with(base: Hyperparameters, values: Mapping[Any, Any], source: str) -> Hyperparameters:
    known = {field.name for field in fields(Hyperparameters)}
    unknown = [str(name) for name in values if name not in known | UNUSED]
    if unknown:
        raise UsageError(
            f"{source}: {unknown[0][:80]!r} is no hyper-parameter.", fix=f"The known ones: {', '.join(sorted(known))}"
        )
    return replace(base, **{name: _number(value) for name, value in values.items() if name in known})


def _number(value: Any) -> Any:  # noqa: ANN401 - any value of YAML
    """YAML 1.1 takes 1e-3, without a point, for a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
