"""Fakes of TensorRT and a GPU for emulated runs; the engines are ONNX files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import engine_build
from tests.gpu.environment import Environment
from tests.gpu.int8 import EMULATED_BATCHES, MODELS
from tests.gpu.int8_files import write_int8
from tests.gpu.weights import with_weights
from tests.support import trt_kit
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.precision.int8_summary import summarize_int8
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx, prepare_graph

SIDE = 128  # input size of the networks


@contextmanager
def fake_environment(env: Environment) -> Iterator[Environment]:
    """Yield the environment with small files for the part `int8`, a fake TensorRT that runs them, and a fake GPU."""
    folder = env.result.parent / "emulated"
    folder.mkdir()
    write_int8(folder, models=MODELS[:1], side=SIDE, batches=EMULATED_BATCHES)
    with fake_tensorrt(folder):
        yield replace(env, folder=folder)


@contextmanager
def fake_tensorrt(folder: Path) -> Iterator[None]:
    """Replace `y7 build`: it writes engines to this folder, which ONNX Runtime runs through TensorRT's API."""
    with pytest.MonkeyPatch.context() as change:
        kit = trt_kit.TrtEnvironment(folder, change)

        def build(
            _: Environment, onnx: Path, plugin: Path | None, *, level: str, into: Path, more: Sequence[str] = ()
        ) -> Path:
            complete = into / onnx.name
            complete.write_bytes(with_weights(onnx.read_bytes(), onnx.parent))
            return engine_of(kit, open_onnx(complete), complete.with_suffix(".engine"))

        change.setattr(engine_build, "build", build)
        yield
        assert not kit.trt.violations, kit.trt.violations


def engine_of(kit: Any, model: OnnxModel, path: Path) -> Path:
    """Write an engine of the same graph, with an inspector's table of its convolutions, and return its path."""
    batch = model.metadata.batch or 1
    prepared = prepare_graph(model, use_plugin=False)
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
    """Return the convolutions as TensorRT's inspector lists them, and one reformat layer."""
    layers: list[dict[str, object]] = [{"Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "Reformat"}]
    for cost in summarize_int8(model.proto).convolutions:
        weights = {"Type": "Int8" if cost.is_int8 else "Half", "Count": 1}
        layers.append({"Name": cost.name, "LayerType": "CaskConvolution", "Weights": weights})
    return json.dumps({"Layers": layers, "Bindings": []})
