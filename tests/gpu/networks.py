"""Official networks with random weights."""

from __future__ import annotations

from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, new_model

CLASSES = 80


def untrained(name: str) -> tuple[Yolov7, ModelMetadata]:
    """Return the fused network of an official name, and its metadata."""
    network = fuse(new_model(name))
    classes = tuple(f"class_{number}" for number in range(CLASSES))
    metadata = ModelMetadata(
        variant=name,
        class_names=classes,
        strides=network.head.strides,
        anchors=network.anchors,
        source="random",
    )
    return network, metadata
