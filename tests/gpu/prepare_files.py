"""Writes the files for the GPU machine on one without a GPU: libraries, ONNX files, reference outputs."""

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

from tests.gpu import COMPILED_FOR, ROOT
from tests.gpu.archive import pack
from tests.gpu.environment import KERNELS, NMS_FILE, PLUGIN, Array
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
from tests.gpu.weights import set_synthetic_weights, without_weights
from yolov7_deploy.evaluation.synthetic_image import street_scene
from yolov7_deploy.hub import OFFICIAL_NAMES, find_local_weights, find_weights
from yolov7_deploy.image import fit_letterbox, read_image, to_network_input
from yolov7_deploy.onnx_export.nms import attach_nms
from yolov7_deploy.onnx_export.nms_subgraph import NmsPlan
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.precision.fp16 import to_fp16

ARCHITECTURE = "90"
SYNTHETIC_WEIGHTS = {"yolov7-tiny": 640, "yolov7-w6": 1280}  # networks with synthetic weights, and their input size
ROWS = 2000  # rows of a raw output that are compared
# pytest and its dependencies, because test cases of the project run on the GPU too; psutil for the soak test;
# faster_coco_eval for AP, which only the Python version of this machine can import.
SITE = ("psutil", "pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments", "yaml", "faster_coco_eval")
COMPILED = ("faster_coco_eval",)  # in a folder of that version, after the packages of the GPU machine
SCORED = 200  # (anchor, class) pairs above the threshold in networks with NMS
CONFIDENT = 0.3  # score above which an engine must find the detections of the reference


def build_kernels(folder: Path, architecture: str) -> None:
    """Build liby7_kernels.so for one architecture, with a static CUDA runtime, using the project's CMake files."""
    with tempfile.TemporaryDirectory() as work:
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", "-DY7_KERNELS_ONLY=ON"]
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        subprocess.run(
            ["cmake", "-S", str(ROOT / "plugins"), "-B", work, *options, f"-DCMAKE_CUDA_COMPILER={nvcc}"], check=True
        )
        subprocess.run(["cmake", "--build", work, "--target", "y7_kernels"], check=True)
        shutil.copy(Path(work, KERNELS), folder / KERNELS)


def write_nms_networks(folder: Path) -> None:
    """Write decoding and NMS as separate networks with head maps as inputs, without function bodies."""
    for batch in END_BATCHES:
        for kind in (np.float32, np.float16):
            for end in ("efficient", "plugin") + (("none",) if batch == 1 else ()):
                path = folder / END_FILE.format(kind=end, type=kind.__name__, batch=batch)
                onnx.save(nms_network(end, kind, batch), path)


def nms_network(end: str, kind: type, batch: int) -> onnx.ModelProto:
    """Return the network that `y7 export --nms END` appends to the head maps of YOLOv7 at 640."""
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
    del model.functions[:]  # TensorRT uses the plugin of that name
    return model


def write_synthetic_network(folder: Path, name: str, side: int, image: Array) -> None:
    """Write an FP16 network without its synthetic weights, and rows of ONNX Runtime's output in float32."""
    network, metadata = untrained(name)
    model = export_onnx(network, metadata, ExportOptions(input_hw=(side, side), nms="none"))
    synthetic_names = {tensor.name for tensor in model.proto.graph.initializer}
    set_synthetic_weights(model.proto)
    canvas = fit_letterbox((image.shape[0], image.shape[1]), (side, side)).apply(image)
    (output,) = run(model.proto, canvas)
    rows = np.linspace(0, output.shape[1] - 1, ROWS).astype(np.int64)
    np.savez_compressed(folder / f"{name}.npz", canvas=canvas, rows=rows, output=output[0, rows])
    fp16 = to_fp16(OnnxModel.of(model.proto, model.metadata), [image])
    (folder / f"{name}.onnx").write_bytes(without_weights(fp16.proto, synthetic_names))
    scores = np.sort((output[0, :, 4:5] * output[0, :, 5:]).ravel())
    options = ExportOptions(input_hw=(side, side), nms="plugin", conf=float(scores[-SCORED]))
    with_nms = export_onnx(network, metadata, options)
    set_synthetic_weights(with_nms.proto)
    fp16 = to_fp16(OnnxModel.of(with_nms.proto, with_nms.metadata), [image])
    (folder / NMS_FILE.format(name)).write_bytes(without_weights(fp16.proto, synthetic_names))


def write_trained_network(folder: Path, weights: str, image: Array) -> None:
    """Write YOLOv7 with FP16 weights, and the detections of the float32 network."""
    with tempfile.TemporaryDirectory() as work:
        float32, fp16 = Path(work, "float32.onnx"), folder / "yolov7.onnx"
        export(weights, float32, "--precision", "fp32")
        export(weights, fp16, "--precision", "fp16")
        canvas = fit_letterbox((image.shape[0], image.shape[1]), (640, 640)).apply(image)
        proto = onnx.load(float32)
        outputs = dict(zip([output.name for output in proto.graph.output], run(proto, canvas), strict=True))
    confident = int((outputs["det_scores"][0] > CONFIDENT).sum())
    assert confident, "nothing is detected in the image: use another one with --image"
    kept = {name: values[0] for name, values in outputs.items()} | {"num_dets": np.array([confident], np.int32)}
    np.savez_compressed(folder / "yolov7.npz", canvas=canvas, **kept)


def export(weights: str, output: Path, *options: str) -> None:
    """Run `y7 export` with a threshold below all detections that are compared."""
    command = [sys.executable, "-m", "yolov7_deploy", "export", "--weights", weights, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--conf", "0.1", "--no-verify", *options], check=True, env=environment)


def run(proto: onnx.ModelProto, canvas: Array) -> list[Array]:
    """Return ONNX Runtime's outputs for a canvas."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns about thresholds that have defaults
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact INT8 without VNNI
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, {"images": to_network_input([canvas])})
    return outputs


def copy_site(folder: Path) -> None:
    """Copy the Python packages and modules of this interpreter that the tests import."""
    site = folder / "site"
    site.mkdir()
    for name in SITE:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        target = site / COMPILED_FOR if name in COMPILED else site
        target.mkdir(exist_ok=True)
        if spec.submodule_search_locations:
            source = next(iter(spec.submodule_search_locations))
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif spec.origin is not None:
            shutil.copy(spec.origin, target)


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
    """Write all files to folder/files, and as archive parts of limited size to folder/archive."""
    files = folder / "files"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    build_kernels(files, architecture)
    if plugin is not None:
        shutil.copy(plugin, files / PLUGIN)
    write_nms_networks(files)
    copy_site(files)
    image = read_image(image_path) if image_path else street_scene()
    for name in models:
        if name in SYNTHETIC_WEIGHTS:
            write_synthetic_network(files, name, SYNTHETIC_WEIGHTS[name], image)
        else:
            write_trained_network(files, weights, image)
    local = find_local_weights(weights) if weights in OFFICIAL_NAMES else find_weights(weights)
    write_int8(files, models=int8, weights=local, data=data)
    pack(files, folder / "archive")
