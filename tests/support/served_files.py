"""Model files for tests of `y7 triton` and `y7 deepstream`: inputs, outputs and metadata of exports, no networks."""

from dataclasses import replace

import onnx
from onnx import TensorProto, helper

from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.metadata import NMS_OUTPUTS, OVERFLOW_OUTPUT, THRESHOLD_INPUTS, ModelMetadata, NmsMetadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.tensorrt.build_record import EngineRecord, EngineTensor, InputShape, PluginUse
from yolov7_deploy.tensorrt.engine import Engine

PLAN = b"ftrt" + bytes(60)
PLUGIN = PluginUse(path="/opt/liby7_plugin.so", version="1", abi="v3")
METADATA = ModelMetadata(
    variant="yolov7-tiny",
    class_names=tuple(f"thing {number}" for number in range(5)),
    strides=(8, 16, 32),
    anchors=(((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),) * 3,
    input_hw=(128, 192),
    nms=NmsMetadata(
        kind="plugin",
        conf=0.25,
        iou=0.45,
        max_det=300,
        max_candidates=3840,
        multi_label=False,
        class_agnostic=False,
        runtime_thresholds=True,
    ),
    opset=17,
    source="best.pt",
)


def save_onnx(path, **changes):
    """Write a file with the inputs and outputs of an export with a dynamic batch, and metadata with changes."""
    batch, (height, width), limit = changes.get("batch", "batch"), METADATA.input_hw, METADATA.nms.max_det
    value = helper.make_tensor_value_info
    images = value("images", TensorProto.FLOAT, [batch, 3, height, width])
    if changes.get("input_kind") == "uint8":
        images = value("images", TensorProto.UINT8, [batch, height, width, 3])
    thresholds = [value(name, TensorProto.FLOAT, [1]) for name in THRESHOLD_INPUTS]
    outputs = zip(
        NMS_OUTPUTS,
        (TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32),
        ([batch, 1], [batch, limit, 4], [batch, limit], [batch, limit]),
        strict=True,
    )
    graph = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["num_dets"])],
        "served",
        [images, *thresholds],
        [value(*output) for output in outputs],
        initializer=[helper.make_tensor(name, TensorProto.FLOAT, [1], [0.5]) for name in THRESHOLD_INPUTS],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(OnnxModel.of(model, replace(METADATA, **changes)).proto, path)
    return path


def save_engine(path, *, batches=(1, 8), thresholds=False, metadata=METADATA, **changes):
    """Write an engine whose plan is not a network, with its build record, and return the path."""
    height, width = metadata.input_hw
    least, most = batches
    size = most if least == most else -1
    limit = metadata.nms.max_det if metadata.nms else 0
    shapes = ((size, 1), (size, limit, 4), (size, limit), (size, limit), (size, 1))
    types = ("int32", "float32", "float32", "int32", "int32")
    outputs = zip((*NMS_OUTPUTS, OVERFLOW_OUTPUT), types, shapes, strict=True)
    inputs = [EngineTensor(name="images", dtype="float32", shape=(size, 3, height, width))]
    inputs += [EngineTensor(name=name, dtype="float32", shape=(1,)) for name in THRESHOLD_INPUTS if thresholds]
    images = InputShape(
        name="images", min=(least, 3, height, width), opt=(most, 3, height, width), max=(most, 3, height, width)
    )
    record = EngineRecord(
        **{
            "metadata": metadata,
            "plan_bytes": len(PLAN),
            "plan_sha256": sha256_hex(PLAN),
            "product": "tensorrt",
            "tensorrt": "10.3.0.26",
            "compute_capability": "8.6",
            "nms_by": "operators",
            "runtime_thresholds": thresholds,
            "shapes": (images,),
            "inputs": tuple(inputs),
            "outputs": tuple(EngineTensor(name=name, dtype=dtype, shape=shape) for name, dtype, shape in outputs),
            **changes,
        }
    )
    Engine(plan=PLAN, record=record).save(path)
    return path
