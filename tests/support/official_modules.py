"""Pickle networks as the official code does: modules of classes named `models.yolo.Model` and so on.

The classes exist only while a test writes a file; they are removed before the file is read.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

HEAD = 77
LEVELS = 3


class Conv(nn.Module):
    def __init__(self, c_in: int, c_out: int, act: nn.Module, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=eps)
        self.act = act


class Implicit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.ones(1, channels, 1, 1))


class ImplicitA(Implicit):
    pass


class ImplicitM(Implicit):
    pass


class MP(nn.Module):
    pass


class Detect(nn.Module):
    def __init__(self, classes: int, anchors: torch.Tensor) -> None:
        super().__init__()
        rows = 3 * (5 + classes)
        self.nc, self.stride = classes, torch.tensor([8.0, 16.0, 32.0])
        self.grid = [torch.zeros(1)] * LEVELS
        self.register_buffer("anchors", anchors / self.stride.view(-1, 1, 1))
        self.register_buffer("anchor_grid", anchors.clone().view(LEVELS, 1, -1, 1, 1, 2))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.m = nn.ModuleList(nn.Conv2d(8, rows, 1) for _ in range(LEVELS))


class IDetect(Detect):
    def __init__(self, classes: int, anchors: torch.Tensor) -> None:
        super().__init__(classes, anchors)
        self.ia = nn.ModuleList(ImplicitA(8) for _ in range(LEVELS))
        self.im = nn.ModuleList(ImplicitM(3 * (5 + classes)) for _ in range(LEVELS))


class Model(nn.Module):
    """The first convolution and the head of yolov7-tiny; the layers between them have no weights."""

    def __init__(
        self,
        *,
        classes: int = 2,
        training_form: bool = True,
        act: nn.Module | None = None,
        eps: float = 1e-3,
        names: object = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        head = (IDetect if training_form else Detect)(classes, ANCHORS)
        stem = Conv(3, 32, act or nn.LeakyReLU(0.1, inplace=True), eps)
        self.model = nn.Sequential(stem, *(MP() for _ in range(HEAD - 1)), head)
        self.yaml = {"nc": classes, "anchors": [[10, 13]], "head": [[-1, 1, "Conv", [64, "nn.LeakyReLU(0.1)"]]]}
        self.names = [f"thing {i}" for i in range(classes)] if names is None else names
        for index, layer in enumerate(self.model):
            layer.i, layer.f, layer.type = index, -1, "models.common.Conv"


# Other anchors than those of the paper, as of a model trained on other data.
ANCHORS = torch.arange(1.0, 19.0).view(LEVELS, 3, 2) * 1.5

_MODULES = {
    "models.common": (Conv, MP, ImplicitA, ImplicitM),
    "models.yolo": (Detect, IDetect, Model),
}


@contextmanager
def official_classes() -> Iterator[None]:
    """Pickle the classes above under their official names within the context."""
    before = {kind: kind.__module__ for kinds in _MODULES.values() for kind in kinds}
    for module_name, kinds in {"models": (), **_MODULES}.items():
        module = types.ModuleType(module_name)
        for kind in kinds:
            kind.__module__ = module_name
            setattr(module, kind.__name__, kind)
        sys.modules[module_name] = module
    try:
        yield
    finally:
        for kind, module_name in before.items():
            kind.__module__ = module_name
        for module_name in ("models", *_MODULES):
            del sys.modules[module_name]


def save_official(value: object, path: Path) -> Path:
    """Write a value that contains official modules with `torch.save`, and return the path."""
    with official_classes():
        torch.save(value, path)
    return path
