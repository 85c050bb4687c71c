"""Files for deployment reports: a dataset whose names are markup, and files that are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from yolov7_deploy.datasets.synthetic import CLASS_NAMES, write_shapes
from yolov7_deploy.metadata import METADATA_KEY

SIZE = 96
CLASS = "<script>alert('class')</script>"
IMAGE = '<img src=x onerror="alert(2)">.png'


def write_hostile_shapes(folder: Path, *, images: int) -> Path:
    """Write a shapes dataset; a class and the image with the most objects have names that are markup."""
    data = write_shapes(folder, train=1, val=images, size=SIZE, seed=5)
    labels = sorted((folder / "labels" / "val").iterdir(), key=lambda path: len(path.read_text().splitlines()))
    name = labels[-1].stem
    labels[-1].rename(labels[-1].with_stem(Path(IMAGE).stem))
    (image,) = (folder / "images" / "val").glob(f"{name}.*")
    image.rename(image.with_name(IMAGE))
    text = data.read_text(encoding="utf-8")
    assert CLASS_NAMES[0] in text
    data.write_text(text.replace(CLASS_NAMES[0], f'"{CLASS}"', 1), encoding="utf-8")
    return data


def write_nan(source: Path, target: Path, *, layer: int, channels: slice) -> None:
    """Write an ONNX file with NaN in the weights of some output channels of the convolution at a position."""
    model = onnx.load(source)
    conv = [node for node in model.graph.node if node.op_type == "Conv"][layer]
    (weight,) = (one for one in model.graph.initializer if one.name == conv.input[1])
    values = numpy_helper.to_array(weight).copy()
    values[channels] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, target)


def swap_channels(source: Path, target: Path) -> None:
    """Write an ONNX file that reads RGB as BGR, and says that it was made from other weights."""
    model = onnx.load(source)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    (weight,) = (one for one in model.graph.initializer if one.name == first.input[1])
    swapped = np.ascontiguousarray(numpy_helper.to_array(weight)[:, ::-1])
    weight.CopyFrom(numpy_helper.from_array(swapped, weight.name))
    (entry,) = (one for one in model.metadata_props if one.key == METADATA_KEY)
    entry.value = re.sub('"source_sha256":"[0-9a-f]*"', f'"source_sha256":"{"0" * 64}"', entry.value)
    onnx.save(model, target)
