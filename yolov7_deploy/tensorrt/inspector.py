"""The layers of an engine as one table, for every TensorRT version.

The EngineInspector writes JSON in two formats. Up to 10.x, tensors have one `Format/Datatype` and the engine lists the
names of its `Bindings`. From 11.0 on, `Format` and `DataType` are separate and `I/O Tensors` are objects. An engine
that was built without detailed profiling verbosity lists only names. An engine that was built without a GPU was not
inspected: its table comes from the list in the builder's log, or from the parsed network, before TensorRT fuses layers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from yolov7_deploy._serialization import parse_json
from yolov7_deploy.errors import LoadError
from yolov7_deploy.tensorrt.build_record import EngineRecord, NetworkLayer

Detail = Literal["names", "detailed", "compiled", "network"]

# Names of data types in both formats, and their names here.
_DTYPES = {
    "float": "fp32", "fp32": "fp32", "float32": "fp32", "half": "fp16", "fp16": "fp16", "float16": "fp16",
    "bfloat16": "bf16", "bf16": "bf16", "double": "fp64", "fp64": "fp64", "float64": "fp64", "fp8": "fp8",
    "e4m3": "fp8", "fp4": "fp4", "e2m1": "fp4", "int8": "int8", "uint8": "uint8", "int4": "int4", "int16": "int16",
    "uint16": "uint16", "int32": "int32", "uint32": "uint32", "int64": "int64", "uint64": "uint64", "bool": "bool",
}  # fmt: skip
_BITS = {
    "fp64": 64, "int64": 64, "uint64": 64, "fp32": 32, "int32": 32, "uint32": 32, "fp16": 16, "bf16": 16, "int16": 16,
    "uint16": 16, "int8": 8, "uint8": 8, "fp8": 8, "bool": 8, "int4": 4, "fp4": 4,
}  # fmt: skip
_DTYPE_WORD = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(_DTYPES, key=len, reverse=True))})(?![a-z0-9])")
_COMPUTE_TYPES = ("int8", "fp8", "fp4", "int4", "fp16", "bf16", "fp32", "fp64")
_VECTOR_WIDTHS = {"two": 2, "four": 4, "eight": 8, "sixteen": 16, "thirty-two": 32}
# TensorRT 8 and 9 list every layer once per optimization profile.
_OTHER_PROFILE = re.compile(r"\[profile [1-9]\d*\]")
_COPY_NAME = "Reformatting CopyNode"
# Layer types of convolutions in TensorRT-RTX; `runtime_fusion` is a convolution and its activation in one kernel.
_CONVOLUTIONS = {"conv", "correlation", "gemm", "runtime_fusion"}
_COMPILED_PLUGIN = "custom_layer"
_MAX_DIMENSIONS = 8  # nvinfer1::Dims::MAX_DIMS
_MAX_COUNT = 10**18  # of elements; larger numbers are of a damaged file


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensor:
    """An input or output of a layer.

    Attributes:
        name: TensorRT's name.
        shape: Empty if it is unknown or the tensor is a scalar; -1 is a dynamic dimension.
        dtype: `fp16`, `int8`, `int32`, ...; empty if it is unknown, as with dynamic shapes.
        format: TensorRT's name of the memory layout (`LINEAR`, `HWC8`, `CHW32`); empty if it is unknown.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    format: str = ""

    @property
    def stored_bytes(self) -> int | None:
        """Size in memory, with the channel padding of the layout; `None` if shape or type are unknown."""
        if not self.shape or min(self.shape) < 0 or self.dtype not in _BITS:
            return None
        vector = int(found[0]) if (found := re.search(r"\d{1,4}$", self.format)) else 1
        sides = [-(-side // vector) * vector if i == 1 else side for i, side in enumerate(self.shape)]
        return prod(sides) * _BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """A layer of an engine, or of the parsed network.

    Attributes:
        name: TensorRT's name; the names of fused layers are joined with ` + `.
        type: TensorRT's layer type, such as `CaskConvolution`, `Reformat`, `kgen`; empty if only names are known.
        inputs, outputs: Tensors; empty if only names are known.
        precision: Data type of its weights, or else of its tensors; empty if unknown.
        tactic: Name or number of the kernel.
        weights_bytes: Size of weights and bias; `None` if it has none or they are unknown.
        plugin: Name of the plugin; empty for a layer of TensorRT.
        is_reformat: It only changes the layout or type of a tensor between other layers.
    """

    name: str
    type: str = ""
    inputs: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    precision: str = ""
    tactic: str = ""
    weights_bytes: int | None = None
    plugin: str = ""
    is_reformat: bool = False

    @property
    def is_convolution(self) -> bool:
        """True for a convolution, also with fused operations."""
        return _is_convolution(self.type)


@dataclass(frozen=True, kw_only=True, slots=True)
class IoTensor:
    """An input or output of the engine; `mode` is empty in the format that only lists names.

    `profiles` contains the minimum, optimum and maximum shape of each optimization profile.
    """

    name: str
    mode: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """The layers in execution order, and the engine's inputs and outputs.

    `detail` is `detailed` or `names` for an inspected engine, depending on the profiling verbosity of the build,
    `compiled` for the builder's list of layers, or `network` for the parsed network.
    """

    detail: Detail
    layers: tuple[EngineLayer, ...]
    io: tuple[IoTensor, ...] = ()

    @property
    def types(self) -> dict[str, int]:
        """Number of layers per type, the most frequent first."""
        return _counts(layer.type for layer in self.layers)

    @property
    def precisions(self) -> dict[str, int]:
        """Number of layers per precision, the most frequent first; without reformats, which compute nothing."""
        return _counts(layer.precision for layer in self.layers if not layer.is_reformat)

    @property
    def convolutions(self) -> dict[str, int]:
        """Number of convolutions per precision, the most frequent first."""
        return _counts(layer.precision for layer in self.layers if layer.is_convolution)

    @property
    def reformats(self) -> int:
        """Number of layers that only change layout or type; without `Reformat` layers that implement Q/DQ nodes."""
        return sum(layer.is_reformat for layer in self.layers)

    @property
    def plugin_reformats(self) -> int:
        """Number of reformats directly before or after a plugin."""
        read = {tensor.name for layer in self.layers if layer.plugin for tensor in layer.inputs}
        written = {tensor.name for layer in self.layers if layer.plugin for tensor in layer.outputs}
        return sum(
            layer.is_reformat
            and any(tensor.name in written for tensor in layer.inputs)
            | any(tensor.name in read for tensor in layer.outputs)
            for layer in self.layers
        )

    @property
    def plugins(self) -> tuple[str, ...]:
        """Names of the plugins, in execution order."""
        return tuple(dict.fromkeys(layer.plugin for layer in self.layers if layer.plugin))

    @property
    def weights_bytes(self) -> int | None:
        """Sum over the layers whose size is known; `None` if there are none."""
        sizes = [layer.weights_bytes for layer in self.layers if layer.weights_bytes is not None]
        return sum(sizes) if sizes else None

    @property
    def peak_activation_bytes(self) -> int | None:
        """Largest total size of tensors that exist at one time; `None` unless every shape and type is known.

        TensorRT lets tensors share memory where possible (the inputs of a Concat, a no-op), which the table does not
        contain, so an execution context may need less.
        """
        return _peak(self.layers) if self.layers and self.detail == "detailed" else None


def read_inspector(text: str) -> LayerTable:
    """Return the table from the JSON of `EngineInspector.get_engine_information`, in either format.

    Raises:
        LoadError: The text is not JSON, or not of an engine.
    """
    try:
        raw = parse_json(text.rstrip("\0 \n"), strict=False)
        # A lone surrogate is valid in JSON and in a Python string, but cannot be printed or written.
        raw = json.loads(json.dumps(raw, ensure_ascii=False).encode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"it is not JSON ({error})") from error
    if isinstance(raw, list):  # one object per layer, as trtexec and get_layer_information write them
        raw = {"Layers": raw}
    entries = _member(raw, "Layers")
    if not isinstance(entries, list):
        raise _unreadable("it has no list of layers")
    layers = tuple(read_layer(entry) for entry in entries if not _of_another_profile(entry))
    detailed = any(isinstance(entry, dict) for entry in entries)
    listed = _member(raw, "I/O Tensors", "Bindings")
    io = [_io(entry) for entry in listed if not _of_another_profile(entry)] if isinstance(listed, list) else []
    return LayerTable(detail="detailed" if detailed else "names", layers=layers, io=tuple(io))


def network_table(layers: Iterable[NetworkLayer]) -> LayerTable:
    """Return the table of a parsed network."""
    return LayerTable(
        detail="network",
        layers=tuple(
            EngineLayer(
                name=layer.name,
                type=layer.type,
                precision=_dtype(layer.precision),
                plugin=layer.name if "PLUGIN" in layer.type.upper() else "",
            )
            for layer in layers
        ),
    )


def _unreadable(reason: str) -> LoadError:
    return LoadError(
        f"The EngineInspector's description of the engine cannot be read: {reason}.",
        fix="Build the engine again:  y7 build --weights NAME.onnx",
    )


# --- one layer --------------------------------------------------------------------------------------------------------


def read_layer(entry: object) -> EngineLayer:
    """Return a layer from its object in the inspector's JSON, or from its name; missing or invalid fields are empty."""
    if not isinstance(entry, dict):
        name = entry if isinstance(entry, str) else ""
        return EngineLayer(name=name, is_reformat=name.startswith(_COPY_NAME))
    name, kind = _text(entry, "Name"), _text(entry, "LayerType")
    inputs, outputs = _tensors(entry, "Inputs"), _tensors(entry, "Outputs")
    is_reformat = kind == "Reformat" and _text(entry, "Origin") != "QDQ"
    return EngineLayer(
        name=name,
        type=kind,
        inputs=inputs,
        outputs=outputs,
        precision=_precision(entry, inputs, outputs),
        tactic=_text(entry, "TacticName") or _text(entry, "TacticValue"),
        weights_bytes=_weights(entry),
        plugin=(_text(entry, "PluginType", "PluginName") or name) if _is_plugin(kind) else "",
        is_reformat=is_reformat,
    )


def _precision(entry: Mapping[str, object], inputs: Iterable[LayerTensor], outputs: Iterable[LayerTensor]) -> str:
    weights = _member(entry, "Weights")
    if isinstance(weights, dict) and (dtype := _dtype(_text(weights, "Type"))):
        return dtype
    if _is_convolution(_text(entry, "LayerType")):
        # Constants include biases and scales, which have one dimension larger than 1.
        matrices = [tensor for tensor in _tensors(entry, "Constants") if sum(side > 1 for side in tensor.shape) > 1]
        if matrices and (dtype := max(matrices, key=lambda tensor: prod(tensor.shape)).dtype):
            return dtype
    dtypes = [tensor.dtype for tensor in (*inputs, *outputs) if tensor.dtype]
    default = dtypes[0] if dtypes else _dtype(_text(entry, "Precision"))
    return next((dtype for dtype in dtypes if dtype in _COMPUTE_TYPES), default)


def _weights(entry: Mapping[str, object]) -> int | None:
    """Return the bytes of weights and bias, and of the constants that newer versions list like tensors."""
    sizes: list[int] = []
    for name in ("Weights", "Bias"):
        group = _member(entry, name)
        if isinstance(group, dict):
            count, dtype = _member(group, "Count"), _dtype(_text(group, "Type"))
            if isinstance(count, int) and 0 < count < _MAX_COUNT and dtype in _BITS:
                sizes.append(count * _BITS[dtype] // 8)
    sizes += [size for tensor in _tensors(entry, "Constants") if (size := tensor.stored_bytes) is not None]
    return sum(sizes) if sizes else None


def _tensors(entry: Mapping[str, object], name: str) -> tuple[LayerTensor, ...]:
    group = _member(entry, name)
    return tuple(_tensor(item) for item in group) if isinstance(group, list) else ()


def _tensor(item: object) -> LayerTensor:
    if not isinstance(item, dict):
        return LayerTensor(name=item if isinstance(item, str) else "")
    both = _text(item, "Format/Datatype")
    return LayerTensor(
        name=_text(item, "Name"),
        shape=_shape(_member(item, "Dimensions")),
        dtype=_dtype(_text(item, "DataType") or both or _text(item, "Format")),
        format=_layout(_text(item, "Format") or both),
    )


def _io(entry: object) -> IoTensor:
    if not isinstance(entry, dict):
        return IoTensor(name=entry if isinstance(entry, str) else "")
    groups = _member(entry, "ProfileInfo")
    profiles = [
        tuple(_shape(_member(group, key)) for key in ("MinShape", "OptShape", "MaxShape"))
        for group in (groups if isinstance(groups, list) else ())
        if isinstance(group, dict)
    ]
    return IoTensor(
        name=_text(entry, "Name"),
        mode=_text(entry, "IOMode").lower(),
        shape=_shape(_member(entry, "Dimensions")),
        dtype=_dtype(_text(entry, "DataType")),
        profiles=tuple(profile for profile in profiles if all(profile)),
    )


def _of_another_profile(entry: object) -> bool:
    name = _text(entry, "Name") if isinstance(entry, dict) else entry
    return isinstance(name, str) and _OTHER_PROFILE.search(name) is not None


# --- names and values -------------------------------------------------------------------------------------------------


def _is_plugin(kind: str) -> bool:
    return "plugin" in kind.lower() or kind == _COMPILED_PLUGIN


def _is_convolution(kind: str) -> bool:
    return kind.lower() in _CONVOLUTIONS or "convolution" in kind.lower()


def _dtype(text: str) -> str:
    """Return the data type in a text such as `Row major linear FP16 format`, `Half` or `DataType.HALF`, or ''."""
    found = _DTYPE_WORD.search(text.lower())
    return _DTYPES[found[1]] if found else ""


def _layout(text: str) -> str:
    """Return the layout in a text under its name in TensorRT's `TensorFormat`; empty if there is none."""
    if named := re.search(r"\bk?(D?HWC\d{0,4}|CD?HW\d{1,4}|LINEAR|DLA_\w{1,20})\b", text):
        return named[1]
    lower = text.lower()
    is_3d = "3 spatial" in lower
    if wide := re.search(r"\b([a-z-]{1,20}) wide channel vectorized", lower):
        number = _VECTOR_WIDTHS.get(wide[1])
        return f"{'CDHW' if is_3d else 'CHW'}{number}" if number else ""
    if "channel major" in lower:
        multiple = re.search(r"channel (?:%|==) (\d{1,4})", lower)
        return f"{'DHWC' if is_3d else 'HWC'}{multiple[1] if multiple else ''}"
    return "LINEAR" if "row major" in lower or "linear" in lower else ""


def _member(raw: object, *names: str) -> object:
    """Return the value of the first name that exists; case, spaces and punctuation of keys are ignored."""
    if not isinstance(raw, dict):
        return None
    keys = {re.sub(r"[^a-z0-9]", "", str(key).lower()): key for key in raw}
    for name in names:
        key = keys.get(re.sub(r"[^a-z0-9]", "", name.lower()))
        if key is not None:
            value: object = raw[key]
            return value
    return None


def _text(raw: Mapping[str, object], *names: str) -> str:
    value = _member(raw, *names)
    return value if isinstance(value, str) else "" if value is None else str(value)


def _shape(value: object) -> tuple[int, ...]:
    sides = value if isinstance(value, list) else []
    known = len(sides) <= _MAX_DIMENSIONS and all(type(side) is int and abs(side) < _MAX_COUNT for side in sides)
    return tuple(sides) if known else ()


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(value for value in values if value).most_common())


def _peak(layers: Iterable[EngineLayer]) -> int | None:
    """Return the peak of the tensors' sizes, each from the layer that writes it to the last that reads it."""
    order = list(layers)
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, layer in enumerate(order):
        for tensor in (*layer.inputs, *layer.outputs):
            size = tensor.stored_bytes
            if size is None:
                return None
            sizes[tensor.name] = max(size, sizes.get(tensor.name, 0))
            first.setdefault(tensor.name, index)
            last[tensor.name] = index
    change = [0] * (len(order) + 1)
    for name, size in sizes.items():
        change[first[name]] += size
        change[last[name] + 1] -= size
    peak = live = 0
    for step in change:
        live += step
        peak = max(peak, live)
    return peak if sizes else None


# --- the builder's list of layers -------------------------------------------------------------------------------------
#
# Without a GPU the engine cannot be inspected. TensorRT-RTX 1.7 with detailed profiling verbosity logs one message:
# `Layers:`, one line per layer, and the engine's inputs and outputs. The layers are fused and have their final types;
# the kernels are selected later, on the GPU. A log message is not an interface, so lines of another format are ignored.

_Entry: TypeAlias = dict[str, object]  # as in the inspector's JSON

_LAYER, _TENSOR = "Name: ", "{ Name: "
# Separators between name, type, inputs, constants, outputs, kernel and the rest of a line.
_SEPARATORS = (", LayerType: ", ", Inputs: [", "], Constants: [", "], Outputs: [", "], TacticName: ", ", StreamId: ")
_SUFFIX = re.compile(r"_myl[0-9]+_[0-9]+$")  # which the compiler appends to the name of a node
_DIMENSION = re.compile(r"-?[0-9]{1,18}")


def read_listing(text: str) -> LayerTable | None:
    """Return the table of a builder's list of layers; `None` if no line is a layer."""
    entries = (_entry(line) for line in text.splitlines())
    layers = tuple(read_layer(entry) for entry in entries if entry is not None)
    return LayerTable(detail="compiled", layers=layers) if layers else None


def engine_layers(record: EngineRecord) -> tuple[LayerTable | None, tuple[str, ...]]:
    """Return the most detailed table of a record, and notes about descriptions that cannot be read.

    The first that exists of: the inspected engine, the builder's list of layers, the parsed network, `None`.
    """
    notes: tuple[str, ...] = ()
    if record.inspector:
        try:
            return read_inspector(record.inspector), ()
        except LoadError as error:
            notes = (error.message,)
    listed = read_listing(record.listing)
    if listed is not None:
        return listed, notes
    return (network_table(record.network_layers) if record.network_layers else None), notes


def _entry(line: str) -> _Entry | None:
    """Return a line as an object of the inspector's JSON; `None` for a line of another format."""
    if not line.startswith(_LAYER):
        return None
    parts, rest = [], line.removeprefix(_LAYER)
    for separator in _SEPARATORS:
        part, found, rest = rest.partition(separator)
        if not found:
            return None
        parts.append(part)
    name, kind, inputs, constants, outputs, tactic = parts
    tensors = {"Inputs": inputs, "Constants": constants, "Outputs": outputs}
    listed = {key: list(_listed_tensors(text)) for key, text in tensors.items()}
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "PluginName": _SUFFIX.sub("", name), **listed}


def _listed_tensors(text: str) -> Iterator[_Entry]:
    for part in text.split(_TENSOR)[1:]:
        name, _, rest = part.partition(", Dimensions: [")
        shape, _, rest = rest.partition("]")
        dtype = rest.partition(", Datatype: ")[2].partition(",")[0]
        layout = rest.partition(", Format: ")[2].partition(" }")[0]
        yield {"Name": name, "Dimensions": _dimensions(shape), "DataType": dtype, "Format": layout}


def _dimensions(text: str) -> list[int]:
    sizes = text.split(",")
    is_shape = len(sizes) <= _MAX_DIMENSIONS and all(map(_DIMENSION.fullmatch, sizes))
    return [int(size) for size in sizes] if is_shape else []
