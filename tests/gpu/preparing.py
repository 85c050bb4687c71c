"""What must be brought to the GPU machine, made on one without a GPU: libraries, ONNX files, reference outputs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from tests.gpu import ROOT
from tests.gpu.components import pack
from tests.gpu.environment import KERNELS, PLUGIN, SUPPRESSED, Array
from tests.gpu.int8_files import write_int8
from tests.gpu.networks import untrained
from tests.gpu.nms import (
    ANCHORS,
    CLASSES,
    CONF,
    END_BATCHES,
    END_FILE,
    IOU,
    MAX_CANDIDATES,
    MAX_DET,
    SIDES,
    STRIDES,
)
from tests.gpu.weights import make_up, stripped
from yolov7_deploy.evaluation import synthetic_image as street
from yolov7_deploy.export.nms import attach_nms
from yolov7_deploy.export.nms_subgraph import NmsPlan
from yolov7_deploy.export.onnx_exporter import export_onnx
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.hub import OFFICIAL_NAMES, find_local_weights, find_weights
from yolov7_deploy.image import fit_letterbox, read_image, to_network_input
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.precision.fp16 import to_fp16

ARCHITECTURE = "90"
MADE_UP = {"yolov7-tiny": 640, "yolov7-w6": 1280}  # networks with made-up weights, and their input's side
ROWS = 2000  # of a raw output that are compared
# pytest and what it needs, since the tests' own cases run on the GPU too; what the soak reads memory with; what judges
# AP, which only the Python version of this machine can import.
SITE = ("psutil", "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "yaml", "faster_coco_eval")
SCORED = 200  # pairs of anchor and class that pass the threshold where NMS is inside
CONFIDENT = 0.3  # of the detections that an engine must find again


def build_kernels(folder: Path, architecture: str) -> None:
    """liby7_kernels.so for one architecture, CUDA runtime inside, by the project's own CMake."""
    with tempfile.TemporaryDirectory() as work:
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", "-DY7_KERNELS_ONLY=ON"]
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        subprocess.run(
            ["cmake", "-S", str(ROOT / "plugins"), "-B", work, *options, f"-DCMAKE_CUDA_COMPILER={nvcc}"], check=True
        )
        subprocess.run(["cmake", "--build", work, "--target", "y7_kernels"], check=True)
        shutil.copy(Path(work, KERNELS), folder / KERNELS)


def write_ends(folder: Path) -> None:
    """Decode and NMS as networks of their own, head maps as inputs, without function bodies."""
    for batch in END_BATCHES:
        for kind in (np.float32, np.float16):
            for end in ("efficient", "plugin") + (("none",) if batch == 1 else ()):
                path = folder / END_FILE.format(kind=end, type=kind.__name__, batch=batch)
                onnx.save(nms_end(end, kind, batch), path)


def nms_end(end: str, kind: type, batch: int) -> onnx.ModelProto:
    """What `y7 export --nms END` puts behind the head maps of YOLOv7 at 640."""
    options = ExportOptions(
        input_hw=(640, 640), batch=batch, nms=end, conf=CONF, iou=IOU, max_det=MAX_DET, max_candidates=MAX_CANDIDATES
    )
    plan = NmsPlan.of([int(stride) for stride in STRIDES], ANCHORS, CLASSES, options)
    heads = [f"head_{level}" for level in range(len(SIDES))]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    inputs = [
        helper.make_tensor_value_info(name, element, [batch, 3 * (5 + CLASSES), side, side])
        for name, side in zip(heads, SIDES, strict=True)
    ]
    graph = helper.make_graph([], "end", inputs, [])
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", options.opset)], ir_version=8)
    model = attach_nms(network, heads, plan)
    del model.functions[:]  # TensorRT takes the plugin of that name
    return model


def write_made_up(folder: Path, name: str, side: int, image: Array) -> None:
    """A half network whose weights stay behind, and rows of what ONNX Runtime made of the float32 one."""
    network, metadata = untrained(name)
    model = export_onnx(network, metadata, ExportOptions(input_hw=(side, side), nms="none"))
    made_names = {tensor.name for tensor in model.proto.graph.initializer}
    make_up(model.proto)
    canvas = fit_letterbox((image.shape[0], image.shape[1]), (side, side)).apply(image)
    (output,) = run(model.proto, canvas)
    rows = np.linspace(0, output.shape[1] - 1, ROWS).astype(np.int64)
    np.savez_compressed(folder / f"{name}.npz", canvas=canvas, rows=rows, output=output[0, rows])
    half = to_fp16(OnnxModel.of(model.proto, model.metadata), [image])
    (folder / f"{name}.onnx").write_bytes(stripped(half.proto, made_names))
    scores = np.sort((output[0, :, 4:5] * output[0, :, 5:]).ravel())
    options = ExportOptions(input_hw=(side, side), nms="plugin", conf=float(scores[-SCORED]))
    whole = export_onnx(network, metadata, options)
    make_up(whole.proto)
    half = to_fp16(OnnxModel.of(whole.proto, whole.metadata), [image])
    (folder / SUPPRESSED.format(name)).write_bytes(stripped(half.proto, made_names))


def write_real(folder: Path, weights: str, image: Array) -> None:
    """YOLOv7 with its weights as half, and the detections of its float32 form."""
    with tempfile.TemporaryDirectory() as work:
        whole, half = Path(work, "whole.onnx"), folder / "yolov7.onnx"
        export(weights, whole, "--precision", "fp32")
        export(weights, half, "--precision", "fp16")
        canvas = fit_letterbox((image.shape[0], image.shape[1]), (640, 640)).apply(image)
        proto = onnx.load(whole)
        outputs = dict(zip([output.name for output in proto.graph.output], run(proto, canvas), strict=True))
    confident = int((outputs["det_scores"][0] > CONFIDENT).sum())
    assert confident, "nothing is detected in the image: give another one with --image"
    kept = {name: values[0] for name, values in outputs.items()} | {"num_dets": np.array([confident], np.int32)}
    np.savez_compressed(folder / "yolov7.npz", canvas=canvas, **kept)


def export(weights: str, output: Path, *options: str) -> None:
    """`y7 export` with a threshold low enough that half and float32 lose nothing that is compared."""
    command = [sys.executable, "-m", "yolov7_deploy", "export", "--weights", weights, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--conf", "0.1", "--no-verify", *options], check=True, env=environment)


def run(proto: onnx.ModelProto, canvas: Array) -> list[Array]:
    """The outputs for a canvas, by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # thresholds with defaults are worth a warning to it
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, {"images": to_network_input([canvas])})
    return outputs


def copy_site(folder: Path) -> None:
    """Pure Python packages of this interpreter that the tests import."""
    for name in SITE:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        source = next(iter(spec.submodule_search_locations))
        shutil.copytree(source, folder / "site" / name, ignore=shutil.ignore_patterns("__pycache__"))


def prepare(
    folder: Path,
    *,
    weights: str,
    image_path: Path | None,
    plugin: Path | None,
    architecture: str,
    models: Iterable[str],
    int8: Iterable[str],
    data: Path | None,
) -> None:
    """Writes everything into folder/whole, and as pieces that can travel one by one into folder/pieces."""
    whole = folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    build_kernels(whole, architecture)
    if plugin is not None:
        shutil.copy(plugin, whole / PLUGIN)
    write_ends(whole)
    copy_site(whole)
    image = read_image(image_path) if image_path else street()
    for name in models:
        if name in MADE_UP:
            write_made_up(whole, name, MADE_UP[name], image)
        else:
            write_real(whole, weights, image)
    local = find_local_weights(weights) if weights in OFFICIAL_NAMES else find_weights(weights)
    write_int8(whole, models=int8, weights=local, data=data)
    pack(whole, folder / "pieces")
