"""TensorRT and a GPU where there are none, for emulated runs: the tests' stand-ins, and engines that are ONNX files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import building
from tests.gpu.environment import Setting
from tests.gpu.int8 import EMULATED_BATCHES, MODELS
from tests.gpu.int8_files import write_int8
from tests.gpu.weights import filled
from tests.support import trt_kit  # of tests/
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.precision.int8_summary import count_int8
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx, prepare_graph

SIDE = 128  # of the networks' input


@contextmanager
def stand_ins(setting: Setting) -> Iterator[Setting]:
    """The same Setting with small files of the part `int8`, a TensorRT that runs them, and a GPU."""
    folder = setting.result.parent / "emulated"
    folder.mkdir()
    write_int8(folder, models=MODELS[:1], side=SIDE, batches=EMULATED_BATCHES)
    with fake_tensorrt(folder):
        yield replace(setting, folder=folder)


@contextmanager
def fake_tensorrt(folder: Path) -> Iterator[None]:
    """`y7 build` makes engines in this folder that ONNX Runtime runs, behind TensorRT's names."""
    with pytest.MonkeyPatch.context() as change:
        kit = trt_kit.Setting(folder, change)

        def build(
            _: Setting, onnx: Path, plugin: Path | None, *, level: str, into: Path, more: Sequence[str] = ()
        ) -> Path:
            whole = into / onnx.name
            whole.write_bytes(filled(onnx.read_bytes(), onnx.parent))
            return engine_of(kit, open_onnx(whole), whole.with_suffix(".engine"))

        change.setattr(building, "build", build)
        yield
        assert not kit.trt.violations, kit.trt.violations


def engine_of(kit: Any, model: OnnxModel, path: Path) -> Path:
    """An engine of the same graph, with an inspector's table of its convolutions."""
    batch = model.metadata.batch or 1
    prepared = prepare_graph(model, own_plugin=False)
    made: Path = kit.engine(
        prepared.proto,
        metadata=model.metadata,
        batches=(batch, batch),
        name=str(path.relative_to(kit.folder)),
        nms_by=prepared.nms_by,
        inspector=_inspected(model),
    )
    return made


def _inspected(model: OnnxModel) -> str:
    """The convolutions as TensorRT lists them, and one layer that changes a layout."""
    layers: list[dict[str, object]] = [{"Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "Reformat"}]
    for cost in count_int8(model.proto).convolutions:
        weights = {"Type": "Int8" if cost.is_int8 else "Half", "Count": 1}
        layers.append({"Name": cost.name, "LayerType": "CaskConvolution", "Weights": weights})
    return json.dumps({"Layers": layers, "Bindings": []})
