"""docs/troubleshooting.md has a section for each error class, and shows messages that the package really prints."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy

from tests.support.small_models import exported_tiny, fused_tiny
from tests.support.torch_archives import PROTO, name, text, write_archive
from tests.support.training_runs import disable_charts
from yolov7_deploy import Detector, OnnxModel, build_engine, decode_image, errors, fuse, load_checkpoint, to_fp16, train
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.evaluation.parity import ParityReport
from yolov7_deploy.evaluation.parity_stages import StageResult
from yolov7_deploy.hub import bundled_onnx, bundled_weights
from yolov7_deploy.metadata import Int8Metadata
from yolov7_deploy.sources import open_source
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE, find_plugin
from yolov7_deploy.workflows.export import _check_parity

PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CLASSES = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Y7Error)]
PROVIDERS = re.compile(r"\w+ExecutionProvider(?:, \w+ExecutionProvider)*")
NUMBERS = re.compile(r"\d[\d.e+-]*")


def sections() -> dict[str, str]:
    """Return the text of the page below each heading that is a class."""
    parts = re.split(r"^### `(\w+)`$", PAGE, flags=re.MULTILINE)
    texts = [re.split(r"^##? ", text, flags=re.MULTILINE)[0] for text in parts[2::2]]
    return dict(zip(parts[1::2], texts, strict=True))


def test_every_error_class_has_a_section():
    assert list(sections()) == [name for name in CLASSES if name != "Y7Error"]


@pytest.mark.parametrize("name", sorted(sections()))
def test_every_section_shows_a_message_and_says_what_to_do(name):
    text = sections()[name]
    assert re.search(r"^```text\n.+?^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert "**What to do:**" in text


def int8_model(target):
    model = exported_tiny()
    int8 = Int8Metadata(
        target=target,
        reduce_range=False,
        method="mse",
        images=8,
        images_sha256="0" * 64,
        fallback="fp32",
        convolutions=58,
        int8_convolutions=55,
        share=0.99,
        float_layers=(),
    )
    return replace(model, metadata=replace(model.metadata, precision="int8", int8=int8))


def usage():
    Detector(bundled_onnx(), conf=40)


def missing_library(patch):
    patch.setitem(sys.modules, "onnxruntime", None)
    patch.delitem(sys.modules, "yolov7_deploy.runtimes.onnxruntime", raising=False)
    Detector("shapes.onnx", runtime="onnxruntime")


def load():
    Detector("bset.safetensors")


def checkpoint():
    load_checkpoint("other.safetensors")


def unsafe():
    load_checkpoint("surprise.pt")


def fusion():
    fuse(fused_tiny())


def export_error():
    to_fp16(OnnxModel.load(bundled_onnx()), [np.zeros((64, 64, 3), np.uint8)])


def engine():
    build_engine(int8_model("cpu"))


def plugin(patch):
    patch.setenv(PLUGIN_VARIABLE, "notes.txt")
    find_plugin("v3")


def parity():
    differences = {"raw / std": 1.4, "rms / std": 0.21}
    stage = StageResult(stage="head", differences=differences, limits={"raw / std": 0.02, "rms / std": 0.002})
    report = ParityReport(reference="torch", against="onnxruntime", images=2, conf=0.25, stages=(stage,))
    _check_parity("onnxruntime", report, exported_tiny().metadata)


def image():
    decode_image(b"<html>404</html>")


def source():
    open_source("empty")


def dataset():
    open_dataset("twice.yaml")


def missing_split():
    open_dataset("shapes/shapes.yaml", split="test")


def training(patch):
    disable_charts(patch)
    options = {"epochs": 3, "batch": 4, "img": 64, "workers": 0, "device": "cpu"}
    train("shapes/shapes.yaml", variant="yolov7-tiny", hyp={"lr0": 1e30}, **options)


def device():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    Detector("shapes.onnx", device="cuda:7")


CASES = {
    "UsageError": usage,
    "MissingLibraryError": missing_library,
    "LoadError": load,
    "CheckpointError": checkpoint,
    "UnsafeCheckpointError": unsafe,
    "FusionError": fusion,
    "ExportError": export_error,
    "EngineError": engine,
    "PluginError": plugin,
    "ParityError": parity,
    "ImageError": image,
    "SourceError": source,
    "DatasetError": dataset,
    "MissingSplitError": missing_split,
    "TrainingError": training,
    "DeviceError": device,
}
SLOW = {"TrainingError"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the mistakes are made with."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_shapes(folder / "shapes", train=4, val=4, size=64, seed=0)
    shutil.copy(bundled_onnx(), folder / "shapes.onnx")
    shutil.copy(bundled_weights(), folder / "best.safetensors")
    safetensors.numpy.save_file({"conv.weight": np.zeros((8, 3, 3, 3), np.float32)}, folder / "other.safetensors")
    write_archive(folder / "surprise.pt", PROTO + name("posix", "system") + b"(" + text("echo surprise") + b"tR.")
    (folder / "notes.txt").write_text("not a library")
    (folder / "empty").mkdir()
    (folder / "twice.yaml").write_text("train: images\nval: images\nnames: [bus, bus]\n")
    return folder


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in CASES]
)
def test_the_message_of_a_section_is_that_of_the_package(kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    make = CASES[kind]
    with pytest.raises(getattr(errors, kind)) as caught:
        make(monkeypatch) if make.__code__.co_argcount else make()
    assert type(caught.value).__name__ == kind
    shown = re.findall(r"^```text\n(.+?)^```$", sections()[kind], flags=re.DOTALL | re.MULTILINE)
    real = f"{kind}: {caught.value.message}\n{caught.value.fix}".strip()
    assert plain(real.replace(f"{folder}/", "")) in [plain(text) for text in shown]


def plain(text: str) -> str:
    """Return a text without what differs between machines and runs: numbers, providers, line breaks."""
    return " ".join(NUMBERS.sub("0", PROVIDERS.sub("PROVIDERS", text)).split())
