"""Rounding of INT8 weights, nearest and GPTQ: AP and head error beside float32, and time and peak memory of GPTQ.

With activation ranges by `mse` and by `lp`. For TensorRT (8-bit weights) also the parts of the head error: that of
INT8 weights alone, with float activations, and that of INT8 activations alone, with float weights.

python benchmarks/int8_rounding.py --weights yolov7 --calib IMAGES --data D.yaml
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
from int8_methods import MAX_DET, accuracy, head_maps
from onnx import numpy_helper
from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop
from yolov7_deploy.hub import find_weights
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import INT8_ROUNDINGS, ExportOptions, Int8Options
from yolov7_deploy.precision.calibrate import Calibration, calibrate
from yolov7_deploy.precision.calibration_cache import load_calibration, save_calibration
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.int8 import QuantizedWeight, RoundedConvolution, to_int8
from yolov7_deploy.precision.sensitivity import FLOOR_IMAGES, choose_silu_floor, head_error
from yolov7_deploy.precision.subgraph import Network
from yolov7_deploy.precision.weight_rounding import ROUNDING_IMAGES, round_weights

TARGETS, METHODS = ("tensorrt", "cpu"), ("mse", "lp")
Heads = list[dict[str, np.ndarray]]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7")
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--data", required=True, type=Path)
    arguments.add_argument("--head-images", type=int, default=32, help="number of images for the head error")
    arguments.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    arguments.add_argument("--only", choices=TARGETS, help="internal: round the weights for one target")
    arguments.add_argument("--method", choices=METHODS, help="internal: with these ranges")
    arguments.add_argument("--folder", type=Path, help="internal: that of the model and the calibration")
    options = arguments.parse_args()
    if options.only:
        round_one(options.only, options.method, options.folder, options.calib)
        return
    checkpoint = load_checkpoint(find_weights(options.weights))
    model = export_onnx(fuse(build_model(checkpoint)), checkpoint.metadata, ExportOptions(max_det=MAX_DET))
    images, data = open_calibration(options.calib), open_dataset(options.data)
    calibration = calibrate(model, images, count=len(images))
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name) / "model.onnx")
        save_calibration(calibration, Path(name) / "calibration.npz")
        cases = list(product(options.targets, METHODS))
        costs = {
            f"{target}, {method}": measure_rounding(target, method, Path(name), options.calib)
            for target, method in cases
        }
        rounded = {case: load_rounded(Path(name) / "{}-{}.npz".format(*case)) for case in cases}
    reference = accuracy(model, data)
    heads = list(head_maps(model, data, options.head_images))
    rows: dict[str, object] = {"float32": {"ap": reference.ap, "ap50": reference.ap50}}
    for target, method, rounding in product(options.targets, METHODS, INT8_ROUNDINGS):
        chosen = choose(model, calibration, target, method, images=options.calib, rounding=rounding)
        quantized = to_int8(model, calibration, chosen, None if rounding == "nearest" else rounded[target, method])
        report = accuracy(quantized, data)
        row = {
            "ap": report.ap,
            "ap50": report.ap50,
            "drop": asdict(accuracy_drop(data, range(len(data)), reference.predictions, report.predictions)),
            "head_error": error_of(quantized, model, data, heads),
        }
        rows[f"{target}, {method}, {rounding}"] = row
        print(target, method, rounding, row, flush=True)
    weights = rounded.get(("tensorrt", "mse"))
    found_parts = parts(model, calibration, weights, data, heads) if weights else None
    record(
        "int8_rounding",
        options.machine,
        {
            "weights": Path(options.weights).name,
            "calibrated_on": calibration.images,
            "rounded_on": min(ROUNDING_IMAGES, calibration.images),
            "measured_on": len(data),
            "head_error_limit": 0.09,
            "peak_memory_limit_gb": 4,
            "cpu_minutes_limit": 10,
            "rows": rows,
            "parts": found_parts,
            "costs": costs,
        },
    )


def choose(
    model: OnnxModel, calibration: Calibration, target: str, method: str, *, images: str, rounding: str
) -> Int8Options:
    """Return the options that `y7 quantize` would choose."""
    some = list(open_calibration(images, limit=FLOOR_IMAGES))
    options = Int8Options(target=target, method=method)
    return replace(choose_silu_floor(model, calibration, some, options), rounding=rounding)


def error_of(quantized: OnnxModel, model: OnnxModel, data: Dataset, heads: Heads) -> float:
    errors = [
        head_error(expected, found, model.metadata.heads, model.metadata)
        for expected, found in zip(heads, head_maps(quantized, data, len(heads)), strict=True)
    ]
    return float(np.sqrt(np.mean(np.square(errors))))


# --- cost -------------------------------------------------------------------------------------------------------------


def measure_rounding(target: str, method: str, folder: Path, calib: str) -> dict[str, float]:
    """Round the weights in a process of its own."""
    case = ["--only", target, "--method", method, "--folder", str(folder)]
    command = [sys.executable, __file__, *case, "--calib", calib, "--data", "-"]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("cost", target, method, found, flush=True)
    return found


def round_one(target: str, method: str, folder: Path, calib: str) -> None:
    model, calibration = OnnxModel.load(folder / "model.onnx"), load_calibration(folder / "calibration.npz")
    images = list(open_calibration(calib, limit=ROUNDING_IMAGES))
    options = choose(model, calibration, target, method, images=calib, rounding="gptq")
    wall, cpu = time.perf_counter(), time.process_time()
    rounded = round_weights(model, calibration, images, options)
    cost = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    cost["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    arrays = {}
    for output, one in rounded.items():
        arrays |= {f"{output}/v": one.weight.values, f"{output}/s": one.weight.scales, f"{output}/b": one.bias}
    np.savez(folder / f"{target}-{method}.npz", **arrays)
    print(json.dumps(cost))


def load_rounded(path: Path) -> dict[str, RoundedConvolution]:
    with np.load(path) as file:
        outputs = [name[:-2] for name in file.files if name.endswith("/v")]
        return {
            output: RoundedConvolution(QuantizedWeight(file[f"{output}/v"], file[f"{output}/s"]), file[f"{output}/b"])
            for output in outputs
        }


# --- parts of the error -----------------------------------------------------------------------------------------------


def parts(
    model: OnnxModel,
    calibration: Calibration,
    rounded: dict[str, RoundedConvolution],
    data: Dataset,
    heads: Heads,
) -> dict[str, float]:
    """Return the head errors of weights alone and of activations alone, for TensorRT."""
    options = Int8Options(fallback="fp32")
    nearest = to_int8(model, calibration, options)
    fitted = to_int8(model, calibration, replace(options, rounding="gptq"), rounded)
    variants = {
        "weights alone, nearest": with_float_activations(nearest),
        "weights alone, gptq": with_float_activations(fitted),
        "activations alone": with_float_weights(nearest, model),
    }
    return {name: error_of(variant, model, data, heads) for name, variant in variants.items()}


def with_float_activations(quantized: OnnxModel) -> OnnxModel:
    """Return the graph without the pairs on activations."""
    proto = onnx.ModelProto()
    proto.CopyFrom(quantized.proto)
    sources = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    pairs = {n.output[0]: sources[n.input[0]] for n in proto.graph.node if is_back(n) and n.input[0] in sources}
    kept = [node for node in proto.graph.node if node.op_type != "QuantizeLinear" and node.output[0] not in pairs]
    for node in kept:
        node.input[:] = [pairs.get(name, name) for name in node.input]
    return with_nodes(proto, kept, quantized)


def with_float_weights(quantized: OnnxModel, model: OnnxModel) -> OnnxModel:
    """Return the graph with the weights and biases of the float32 model."""
    proto, network = onnx.ModelProto(), Network(model)
    proto.CopyFrom(quantized.proto)
    constants = {tensor.name for tensor in proto.graph.initializer}
    int8 = {node.output[0] for node in proto.graph.node if is_back(node) and node.input[0] in constants}
    for node in proto.graph.node:
        if node.op_type == "Conv" and node.input[1] in int8:
            node.input[1:] = network.producers[node.output[0]].input[1:]
            for name in node.input[1:]:
                if name not in constants:
                    proto.graph.initializer.append(numpy_helper.from_array(network.weights[name], name))
                    constants.add(name)
    return with_nodes(proto, [node for node in proto.graph.node if node.output[0] not in int8], quantized)


def is_back(node: onnx.NodeProto) -> bool:
    return node.op_type == "DequantizeLinear"


def with_nodes(proto: onnx.ModelProto, nodes: list[onnx.NodeProto], quantized: OnnxModel) -> OnnxModel:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return OnnxModel.of(proto, quantized.metadata)


if __name__ == "__main__":
    main()
