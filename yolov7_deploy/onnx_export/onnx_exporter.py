"""Export a fused model to ONNX.

torch.fx traces the model, and this module translates the trace: a fused YOLOv7 has eight kinds of operations, so two
small tables cover every variant and every opset, and nodes have the official layer names. `torch.onnx` is not used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from yolov7_deploy.errors import ExportError
from yolov7_deploy.metadata import ModelMetadata, NmsMetadata
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.onnx_export.nms import attach_nms
from yolov7_deploy.onnx_export.nms_subgraph import NmsPlan
from yolov7_deploy.onnx_export.onnx_model import INPUT_NAME, GraphBuilder, OnnxModel
from yolov7_deploy.options import ExportOptions

IR_VERSION = 8  # the oldest one with model-local functions; ONNX Runtime 1.10 and later read it


def export_onnx(model: Yolov7, metadata: ModelMetadata, options: ExportOptions) -> OnnxModel:
    """Return a fused model, its decoding and NMS as one ONNX graph with metadata.

    Args:
        model: A fused model (`fuse`).
        metadata: Metadata of the weights: names, anchors, source. The fields of the graph are set here.
        options: See `ExportOptions`.

    Raises:
        ExportError: The model is not fused, or has an operation without a translation, which the message names.
        UsageError: The size is not a multiple of the stride, or too small for the requested number of boxes.

    Example:
        >>> checkpoint = load_checkpoint("best.safetensors")
        >>> options = ExportOptions(input_hw=(96, 96))
        >>> export_onnx(fuse(build_model(checkpoint)), checkpoint.metadata, options).save("best.onnx")
    """
    if not model.fused:
        raise ExportError("Only a fused model can be exported.", fix="Call fuse(model) first.")
    input_hw = options.input_hw or metadata.default_hw
    options = replace(options, input_hw=input_hw)
    plan = NmsPlan.of(model.head.strides, model.anchors, model.classes, options)
    writer = GraphBuilder()
    network_input = _preprocess(writer, options)
    heads = _network(writer, trace(model), network_input)
    network = _model(writer, heads, plan, input_hw)
    if options.simplify:
        network = _simplified(network)
    return OnnxModel.of(attach_nms(network, heads, plan), _metadata(metadata, heads, plan))


class _HeadMaps(nn.Module):
    """The network without decoding, up to the raw head maps [B, 3 * (5 + C), H, W]."""

    def __init__(self, net: Yolov7) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.net.head.maps(self.net.features(images))


def trace(model: Yolov7) -> fx.GraphModule:
    """Trace a fused model from its images to the raw head maps; modules are called `net.model.N....`."""
    return fx.symbolic_trace(_HeadMaps(model))


def tensor_origins(traced: fx.GraphModule) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
    """Return the traced operation that computes each tensor of the exported graph.

    Args:
        traced: Result of `trace`.

    Returns:
        The operation of each tensor that is the output of one, and the operation of every tensor: an operation that
        becomes several nodes, such as SiLU, has tensors inside.
    """
    writer, modules = GraphBuilder(), dict(traced.named_modules())
    names, origins = dict[fx.Node, str](), dict[str, fx.Node]()
    for node in traced.graph.nodes:
        before = len(writer.nodes)
        _translate(writer, names, modules, node, INPUT_NAME)
        origins |= {name: node for created in writer.nodes[before:] for name in created.output}
    outputs = {name: node for node, name in names.items()}
    return outputs, origins | outputs


def _preprocess(writer: GraphBuilder, options: ExportOptions) -> str:
    """Convert NHWC BGR 0..255 to NCHW RGB 0..1. The cast is first: TensorRT supports uint8 only as its input."""
    if options.input_kind == "float32":
        return INPUT_NAME
    pixels = writer.node("Cast", INPUT_NAME, name="pixels", to=TensorProto.FLOAT)
    planes = writer.node("Transpose", pixels, name="planes", perm=[0, 3, 1, 2])
    rgb = writer.node("Gather", planes, writer.constant([2, 1, 0], "bgr_to_rgb"), name="rgb", axis=1)
    return writer.node("Div", rgb, writer.constant(255.0, "white"), name="scaled")


def _network(writer: GraphBuilder, traced: fx.GraphModule, network_input: str) -> tuple[str, ...]:
    """Translate every traced operation; return the names of the head maps, the finest level first."""
    modules = dict(traced.named_modules())
    names: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        _translate(writer, names, modules, node, network_input)
    maps: Any = traced.graph.output_node().args[0]
    return tuple(names[map_node] for map_node in maps)


def _translate(
    writer: GraphBuilder, names: dict[fx.Node, str], modules: dict[str, nn.Module], node: fx.Node, network_input: str
) -> None:
    """Translate one traced operation, and store the name of its output."""
    argument: Any = node.args[0] if node.args else None
    match node.op:
        case "placeholder":
            names[node] = network_input
        case "call_module":
            module = modules[str(node.target)]
            translate = _MODULES.get(type(module))
            if translate is None:
                raise _untranslatable(type(module).__name__)
            names[node] = translate(writer, module, names[argument], _layer_name(str(node.target)))
        case "call_function":
            function = _FUNCTIONS.get(node.target)
            if function is None:
                raise _untranslatable(str(node.target))
            names[node] = function(writer, names, node)
        case "output":
            pass
        case _:
            raise _untranslatable(f"{node.op} {node.target}")


def _layer_name(target: str) -> str:
    """Return the official name of a traced layer, such as `model.51`."""
    return target.removeprefix("net.")


def _untranslatable(operation: str) -> ExportError:
    return ExportError(
        f"The model uses {operation}, which has no ONNX translation here.", fix="Add a translation to onnx_exporter.py."
    )


def _model(writer: GraphBuilder, heads: tuple[str, ...], plan: NmsPlan, input_hw: tuple[int, int]) -> onnx.ModelProto:
    options = plan.options
    height, width = ("height", "width") if options.dynamic_size else input_hw
    batch = options.batch or "batch"
    if options.input_kind == "uint8":
        kind, shape = TensorProto.UINT8, [batch, height, width, 3]
    else:
        kind, shape = TensorProto.FLOAT, [batch, 3, height, width]
    outputs = [
        helper.make_tensor_value_info(
            head, TensorProto.FLOAT, [batch, 3 * plan.columns, *_head_hw(input_hw, stride, plan.options)]
        )
        for head, stride in zip(heads, plan.strides, strict=True)
    ]
    graph = helper.make_graph(
        writer.nodes,
        "yolov7",
        [helper.make_tensor_value_info(INPUT_NAME, kind, shape)],
        outputs,
        initializer=writer.initializers,
    )
    return helper.make_model(
        graph,
        producer_name="yolov7_deploy",
        opset_imports=[helper.make_opsetid("", options.opset)],
        ir_version=IR_VERSION,
    )


def _head_hw(input_hw: tuple[int, int], stride: int, options: ExportOptions) -> list[int | str]:
    if options.dynamic_size:
        return [f"height_{stride}", f"width_{stride}"]
    return [side // stride for side in input_hw]


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run onnx-simplifier; the head maps keep their names because they are outputs of this graph."""
    simplified: onnx.ModelProto = onnxsim.simplify(model)[0]  # compares no outputs by default; `y7 export` does
    return simplified


def _metadata(metadata: ModelMetadata, heads: tuple[str, ...], plan: NmsPlan) -> ModelMetadata:
    options, nms = plan.options, None
    if options.nms != "none":
        nms = NmsMetadata(
            kind=options.nms,  # type: ignore[arg-type]
            conf=options.conf,
            iou=options.iou,
            max_det=options.max_det,
            max_candidates=plan.candidates,
            multi_label=options.multi_label,
            class_agnostic=options.class_agnostic,
            runtime_thresholds=options.nms != "efficient",
        )
    return replace(
        metadata,
        input_hw=None if options.dynamic_size else options.input_hw,
        nominal_hw=options.input_hw if options.dynamic_size else None,
        batch=options.batch,
        input_kind=options.input_kind,
        precision="fp32",
        nms=nms,
        heads=heads,
        opset=options.opset,
    )


def _conv(writer: GraphBuilder, module: nn.Conv2d, x: str, name: str) -> str:
    inputs = [writer.initializer(f"{name}.weight", module.weight.detach().numpy())]
    if module.bias is not None:
        inputs.append(writer.initializer(f"{name}.bias", module.bias.detach().numpy()))
    pad_h, pad_w = (int(p) for p in module.padding)
    return writer.node(
        "Conv",
        x,
        *inputs,
        name=name,
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        pads=[pad_h, pad_w, pad_h, pad_w],
        dilations=list(module.dilation),
        group=module.groups,
    )


def _silu(writer: GraphBuilder, _: nn.SiLU, x: str, name: str) -> str:
    return writer.node("Mul", x, writer.node("Sigmoid", x, name=f"{name}.sigmoid"), name=name)


def _leaky(writer: GraphBuilder, module: nn.LeakyReLU, x: str, name: str) -> str:
    return writer.node("LeakyRelu", x, name=name, alpha=module.negative_slope)


def _pool(writer: GraphBuilder, names: dict[fx.Node, str], node: fx.Node) -> str:
    x, kernel = _args(node)
    return writer.node(
        "MaxPool",
        names[x],
        name=_enclosing_layer(node),
        kernel_shape=[kernel] * 2,
        strides=[node.kwargs["stride"]] * 2,
        pads=[node.kwargs["padding"]] * 4,
    )


def _upsample(writer: GraphBuilder, names: dict[fx.Node, str], node: fx.Node) -> str:
    factor = float(node.kwargs["scale_factor"])  # type: ignore[arg-type]
    scales = writer.constant(np.array([1, 1, factor, factor], dtype=np.float32), "scales")
    return writer.node(
        "Resize",
        names[_args(node)[0]],
        "",
        scales,
        name=_enclosing_layer(node),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _cat(writer: GraphBuilder, names: dict[fx.Node, str], node: fx.Node) -> str:
    tensors, axis = _args(node)
    return writer.node("Concat", *(names[tensor] for tensor in tensors), name=_enclosing_layer(node), axis=axis)


def _add(writer: GraphBuilder, names: dict[fx.Node, str], node: fx.Node) -> str:
    return writer.node("Add", *(names[term] for term in _args(node)), name=_enclosing_layer(node))


def _getitem(writer: GraphBuilder, names: dict[fx.Node, str], node: fx.Node) -> str:
    """Translate the strided slices of ReOrg, `x[..., row::2, column::2]`."""
    tensor, index = _args(node)
    x = names[tensor]
    for axis, part in zip((2, 3), index[1:], strict=True):
        x = writer.slice(x, axis, part.start, 2**31 - 1, part.step)
    return x


def _enclosing_layer(node: fx.Node) -> str:
    """Return the name of the layer that called a function, such as `model.51`."""
    stack = list(node.meta.get("nn_module_stack", {}))
    return _layer_name(str(stack[-1])) if stack else node.name


def _args(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


_MODULES: dict[type[nn.Module], Callable[..., str]] = {nn.Conv2d: _conv, nn.SiLU: _silu, nn.LeakyReLU: _leaky}
_FUNCTIONS: dict[object, Callable[[GraphBuilder, dict[fx.Node, str], fx.Node], str]] = {
    F.max_pool2d: _pool,
    F.interpolate: _upsample,
    torch.cat: _cat,
    operator.add: _add,
    operator.getitem: _getitem,
}
