"""Training hyperparameters: the official presets, and reading and writing of YAML files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from yolov7_deploy._serialization import short_repr
from yolov7_deploy._text import similar_file, suggest
from yolov7_deploy.datasets.samples import short_reason
from yolov7_deploy.datasets.yaml_file import read_yaml
from yolov7_deploy.errors import UsageError
from yolov7_deploy.paper import ABLATIONS

PRESET_OF_VARIANT = {"yolov7-tiny": "tiny", "yolov7-tiny-silu": "tiny", "yolov7": "p5", "yolov7x": "p5"}
PRESET_OF_VARIANT |= {name: "p5" for name in ABLATIONS if "w6" not in name}
FRACTIONS = (
    *("hsv_h", "hsv_s", "hsv_v", "flipud", "fliplr", "mosaic", "mixup", "copy_paste", "paste_in"),
    *("label_smoothing", "translate"),
)
MAX_VALUE = sys.float_info.max
UNUSED = {"iou_t", "loss_ota", "anchors"}  # official keys without effect here


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """Hyperparameters of a training; names and defaults are those of the official file for P5 models from scratch.

    Attributes:
        lr0: Initial learning rate.
        lrf: Final learning rate, as a fraction of `lr0`.
        momentum: Momentum of SGD (Nesterov), or beta1 of Adam.
        weight_decay: Weight decay of convolution weights, for a nominal batch of 64.
        warmup_epochs: Epochs of warm-up of learning rates, momentum and gradient accumulation, at least 1000 steps in
            long trainings.
        warmup_momentum: Initial momentum.
        warmup_bias_lr: Initial learning rate of biases.
        box: Gain of the box loss.
        cls: Gain of the class loss, for 80 classes.
        cls_pw: Weight of positives in the class loss.
        obj: Gain of the objectness loss, for image size 640.
        obj_pw: Weight of positives in the objectness loss.
        anchor_t: Largest ratio of the sides of anchors and targets that match.
        fl_gamma: Gamma of the focal loss; 0 is plain cross-entropy.
        label_smoothing: Class targets are 1 - x / 2 and x / 2 instead of 1 and 0.
        hsv_h: Largest change of the hue, as a fraction.
        hsv_s: Largest change of the saturation, as a fraction.
        hsv_v: Largest change of the value, as a fraction.
        degrees: Largest rotation, in degrees.
        translate: Largest translation, as a fraction of the image.
        scale: The scale is between 1 - scale and 1.1 + scale.
        shear: Largest shear, in degrees.
        perspective: Largest perspective coefficient; useful up to 0.001.
        flipud: Probability of a vertical flip.
        fliplr: Probability of a horizontal flip.
        mosaic: Probability of a mosaic; one in five has nine tiles, the others four.
        mixup: Probability of blending two mosaics.
        copy_paste: Fraction of the objects with an outline that are pasted again, mirrored.
        paste_in: Probability of pasting objects with an outline from other images.
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
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_VALUE:
                raise UsageError(
                    f"Hyperparameter {field.name}: {short_repr(value)} is not a number of at least 0.", fix=_SHOW_PRESET
                )
            object.__setattr__(self, field.name, float(value))
        for name, is_valid, requirement in (
            *((name, getattr(self, name) <= 1, "is above 1") for name in FRACTIONS),
            ("scale", self.scale < 1, "must be below 1"),
            ("anchor_t", self.anchor_t > 1, "must be above 1"),
            ("momentum", 0 < self.momentum < 1, "must be above 0 and below 1"),
            ("warmup_momentum", self.warmup_momentum < 1, "must be below 1"),
        ):
            if not is_valid:
                raise UsageError(f"Hyperparameter {name}: {getattr(self, name):g} {requirement}.", fix=_SHOW_PRESET)


_SHOW_PRESET = "Print a valid file:  y7 train --hyp p5 --show-hyp"

PRESETS: Mapping[str, Hyperparameters] = {
    "tiny": Hyperparameters(lrf=0.01, cls=0.5, obj=1.0, translate=0.1, scale=0.5, mixup=0.05, paste_in=0.05),
    "p5": Hyperparameters(),
    "p6": Hyperparameters(lrf=0.2),
    "custom": Hyperparameters(scale=0.5, mixup=0.0, paste_in=0.0),
    # Not official. Weights without BatchNorm, which are trained already: small steps, and none faster for biases.
    "qat": Hyperparameters(
        lr0=0.001, lrf=0.05, warmup_epochs=0.0, warmup_bias_lr=0.0, scale=0.5, mixup=0.0, paste_in=0.0
    ),
}


def default_preset(variant: str, *, pretrained: bool, qat: bool = False) -> str:
    """Return the preset of a training: that of the variant from scratch, `custom` for pretrained weights, `qat`."""
    if qat:
        return "qat"
    return "custom" if pretrained else PRESET_OF_VARIANT.get(variant, "p6")


def read_hyperparameters(name_or_path: str, *, changes: Mapping[str, float] | None = None) -> Hyperparameters:
    """Return a preset, or read a YAML file in the official format; missing keys have the values of `p5`.

    Args:
        name_or_path: `tiny`, `p5`, `p6`, `custom`, `qat`, or a file.
        changes: Single values that replace those of the preset or file.

    Raises:
        UsageError: The file does not exist, a key is unknown, or a value is out of range.
    """
    base = PRESETS.get(name_or_path)
    if base is None:
        base = _replace_values(Hyperparameters(), _read(Path(name_or_path)), name_or_path)
    return _replace_values(base, changes or {}, "--set")


def format_hyperparameters(values: Hyperparameters) -> str:
    """Return the hyperparameters as YAML, one per line, without rounding."""
    return "".join(f"{name}: {value!r}\n" for name, value in asdict(values).items())


def _read(path: Path) -> dict[Any, Any]:
    try:
        values = read_yaml(path)
    except FileNotFoundError as error:
        similar = similar_file(path, suffixes=(".yaml", ".yml"))
        meant = "" if similar is None else f"Did you mean {similar}? "
        raise UsageError(
            f"--hyp {path} is neither a preset nor a file.",
            fix=f"{meant}Use one of {', '.join(PRESETS)}, or a YAML file.",
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"--hyp {path} cannot be read: {short_reason(error)}.", fix=_SHOW_PRESET) from error
    if not isinstance(values, dict):
        raise UsageError(f"--hyp {path} is not a list of `name: value` lines.", fix=_SHOW_PRESET)
    return values


def _replace_values(base: Hyperparameters, values: Mapping[Any, Any], source: str) -> Hyperparameters:
    known = {field.name for field in fields(Hyperparameters)}
    unknown = [str(name) for name in values if name not in known | UNUSED]
    if unknown:
        raise UsageError(
            f"{source}: {unknown[0][:80]!r} is not a hyperparameter.", fix=suggest(unknown[0][:80], sorted(known))
        )
    if _number(values.get("loss_ota")) == 0:
        raise UsageError(
            f"{source}: loss_ota: 0 selects the loss without OTA, which is an option here.",
            fix="Leave it out and use --no-ota",
        )
    return replace(base, **{name: _number(value) for name, value in values.items() if name in known})


def _number(value: Any) -> Any:  # noqa: ANN401 - any value of YAML
    """Convert text to a number: YAML 1.1 reads 1e-3, without a decimal point, as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
