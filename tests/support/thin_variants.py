"""Every variant with an eighth of its channels: the same rows and names, a 64th of the weights, and quick to export."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache

import torch

from tests.support.small_models import metadata_of
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.model.layer_table import Variant
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions

SIDE = 128
_MIN_CHANNELS = 16  # fewer channels are not divided: those of the image, and of its space-to-depth


class Thin(Variant):
    """A variant with an eighth of its channels."""

    def layers(self, *, training, full_auxiliary=False):
        rows = Variant.layers(self, training=training, full_auxiliary=full_auxiliary)
        return tuple(replace(r, c_in=tuple(map(self.thin, r.c_in)), c_out=self.thin(r.c_out)) for r in rows)

    @staticmethod
    def thin(channels):
        return channels if channels < _MIN_CHANNELS else channels // 8


def thin(variant: str) -> Thin:
    """Return a variant with an eighth of its channels."""
    return Thin(**{field.name: getattr(find_variant(variant), field.name) for field in fields(Variant)})


@lru_cache
def thin_model(variant) -> OnnxModel:
    """Return an exported thin variant with random weights; shared, do not modify it."""
    return random_model(thin(variant))


def random_model(variant: Variant) -> OnnxModel:
    """Return an exported variant with random weights at SIDE, not simplified, with decoded output."""
    torch.manual_seed(0)
    model = Yolov7(variant, classes=2, fused=True).eval()
    return export_onnx(model, metadata_of(model), ExportOptions(input_hw=(SIDE, SIDE), nms="none", simplify=False))
