"""The layers of an engine as one table, whichever TensorRT wrote them down.

The EngineInspector tells JSON in two forms: up to 10.x tensors have one `Format/Datatype` and the engine lists the
names of its `Bindings`; from 11.0 on `Format` and `DataType` are apart and `I/O Tensors` are objects. An engine built
without detailed profiling verbosity lists bare names. An engine that was built without a GPU was never inspected: of
it there is what its builder told (`engine/listing.py`), or else the layers of the parsed network, before TensorRT fused
anything.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from yolov7_deploy.errors import LoadError
from yolov7_deploy.tensorrt.build_record import EngineRecord, NetworkLayer

Detail = Literal["names", "detailed", "compiled", "network"]

# Words for an element type, in any of the forms, and what they are called here.
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
_COMPUTED = ("int8", "fp8", "fp4", "int4", "fp16", "bf16", "fp32", "fp64")
_WIDE = {"two": 2, "four": 4, "eight": 8, "sixteen": 16, "thirty-two": 32}
# TensorRT 8 and 9 list every layer once per optimization profile.
_OTHER_PROFILE = re.compile(r"\[profile [1-9]\d*\]")
_COPY_NAME = "Reformatting CopyNode"
# What its compiler calls convolutions; the last is one with its activation, for which it writes a kernel of its own.
_CONVOLUTIONS = {"conv", "correlation", "gemm", "runtime_fusion"}
_COMPILED_PLUGIN = "custom_layer"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensor:
    """A tensor that a layer takes or gives.

    Attributes:
        name: As TensorRT calls it.
        shape: Empty where it is not told or the tensor has no dimensions; -1 where a dimension is open.
        dtype: `fp16`, `int8`, `int32`, ...; empty where it is not told, as with dynamic shapes.
        format: Layout under TensorRT's own name (`LINEAR`, `HWC8`, `CHW32`); empty where it is not told.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    format: str = ""

    @property
    def stored_bytes(self) -> int | None:
        """Size in memory, channels padded as the layout wants it; `None` where shape or type are not known."""
        if not self.shape or min(self.shape) < 0 or self.dtype not in _BITS:
            return None
        vector = int(found[0]) if (found := re.search(r"\d+$", self.format)) else 1
        sides = [-(-side // vector) * vector if i == 1 else side for i, side in enumerate(self.shape)]
        return prod(sides) * _BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One layer as it runs, or one layer of the parsed network.

    Attributes:
        name: TensorRT joins the names of what it fused with ` + `.
        type: `CaskConvolution`, `Reformat`, `kgen`, ... as TensorRT says it; empty where only names are known.
        inputs, outputs: Tensors; empty where only names are known.
        precision: What it computes in: the type of its weights, or else of its tensors; empty where not known.
        tactic: Name of the kernel, or its number.
        weights_bytes: Weights and bias; `None` where it has none or does not tell.
        plugin: Name of the plugin that it is, empty for TensorRT's own layers.
        reformat: It only changes layout or type between other layers.
    """

    name: str
    type: str = ""
    inputs: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    precision: str = ""
    tactic: str = ""
    weights_bytes: int | None = None
    plugin: str = ""
    reformat: bool = False

    @property
    def convolves(self) -> bool:
        """It is a convolution, whatever TensorRT fused with it."""
        return _convolves(self.type)


@dataclass(frozen=True, kw_only=True, slots=True)
class IoTensor:
    """An input or output of the engine; `mode` is empty in the old form, which only lists names.

    `profiles` holds the smallest, best and largest shape of each optimization profile.
    """

    name: str
    mode: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """The layers in the order they run, and the engine's inputs and outputs.

    `detail` is `detailed` or `names` after the builder's profiling verbosity, `compiled` for layers as the builder
    listed them, or `network` for layers as parsed.
    """

    detail: Detail
    layers: tuple[EngineLayer, ...]
    io: tuple[IoTensor, ...] = ()

    @property
    def types(self) -> dict[str, int]:
        """Layers by type, the most frequent first."""
        return _counts(layer.type for layer in self.layers)

    @property
    def precisions(self) -> dict[str, int]:
        """Layers by precision, the most frequent first; reformats, which compute nothing, are not among them."""
        return _counts(layer.precision for layer in self.layers if not layer.reformat)

    @property
    def convolutions(self) -> dict[str, int]:
        """Convolutions by precision, the most frequent first."""
        return _counts(layer.precision for layer in self.layers if layer.convolves)

    @property
    def reformats(self) -> int:
        """Layers that only change layout or type; `Reformat` layers made of a quantisation do its work."""
        return sum(layer.reformat for layer in self.layers)

    @property
    def plugins(self) -> tuple[str, ...]:
        """Names of the plugins inside, in order of appearance."""
        return tuple(dict.fromkeys(layer.plugin for layer in self.layers if layer.plugin))

    @property
    def weights_bytes(self) -> int | None:
        """Of all layers that tell; `None` if none does."""
        told = [layer.weights_bytes for layer in self.layers if layer.weights_bytes is not None]
        return sum(told) if told else None

    @property
    def peak_activation_bytes(self) -> int | None:
        """Largest sum of tensors that live at one time; `None` unless every shape and type is known.

        TensorRT lets tensors share memory where it can (a Concat of its inputs, a layer that does nothing), which the
        table does not tell, so an execution context may take less.
        """
        return _peak(self.layers) if self.layers and self.detail == "detailed" else None


def read_inspector(text: str) -> LayerTable:
    """The table of what `EngineInspector.get_engine_information` gave as JSON, in either form.

    Raises:
        LoadError: The text is not JSON or not of an engine.
    """
    try:
        raw = json.loads(text.rstrip("\0 \n"), strict=False)
        # A lone surrogate can stand in JSON and in a Python text, but could not be printed or written.
        raw = json.loads(json.dumps(raw, ensure_ascii=False).encode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"it is no JSON ({error})") from error
    if isinstance(raw, list):  # one object a layer, as trtexec and get_layer_information give them
        raw = {"Layers": raw}
    entries = _member(raw, "Layers")
    if not isinstance(entries, list):
        raise _unreadable("it has no list of layers")
    layers = tuple(read_layer(entry) for entry in entries if not _of_another_profile(entry))
    detailed = any(isinstance(entry, dict) for entry in entries)
    listed = _member(raw, "I/O Tensors", "Bindings")
    io = [_io(entry) for entry in listed if not _of_another_profile(entry)] if isinstance(listed, list) else []
    return LayerTable(detail="detailed" if detailed else "names", layers=layers, io=tuple(io))


def parsed_network(layers: Iterable[NetworkLayer]) -> LayerTable:
    """The table of a network as the parser made it."""
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
        f"The inspector's text about the engine cannot be read: {reason}.",
        fix="Build the engine again:  y7 build --weights NAME.onnx",
    )


# --- one layer --------------------------------------------------------------------------------------------------------


def read_layer(entry: object) -> EngineLayer:
    """A layer from its object in the inspector's JSON, or from its bare name; what is missing or odd stays empty."""
    if not isinstance(entry, dict):
        name = entry if isinstance(entry, str) else ""
        return EngineLayer(name=name, reformat=name.startswith(_COPY_NAME))
    name, kind = _text(entry, "Name"), _text(entry, "LayerType")
    inputs, outputs = _tensors(entry, "Inputs"), _tensors(entry, "Outputs")
    reformat = kind == "Reformat" and _text(entry, "Origin") != "QDQ"
    return EngineLayer(
        name=name,
        type=kind,
        inputs=inputs,
        outputs=outputs,
        precision=_precision(entry, inputs, outputs),
        tactic=_text(entry, "TacticName") or _text(entry, "TacticValue"),
        weights_bytes=_weights(entry),
        plugin=(_text(entry, "PluginType", "PluginName") or name) if _is_plugin(kind) else "",
        reformat=reformat,
    )


def _precision(entry: Mapping[str, object], inputs: Iterable[LayerTensor], outputs: Iterable[LayerTensor]) -> str:
    weights = _member(entry, "Weights")
    if isinstance(weights, dict) and (dtype := _dtype(_text(weights, "Type"))):
        return dtype
    if _convolves(_text(entry, "LayerType")):
        # Biases and scales are among the constants too; they are long in one direction only.
        matrices = [tensor for tensor in _tensors(entry, "Constants") if sum(side > 1 for side in tensor.shape) > 1]
        if matrices and (dtype := max(matrices, key=lambda tensor: prod(tensor.shape)).dtype):
            return dtype
    told = [tensor.dtype for tensor in (*inputs, *outputs) if tensor.dtype]
    return next((dtype for dtype in told if dtype in _COMPUTED), told[0] if told else _dtype(_text(entry, "Precision")))


def _weights(entry: Mapping[str, object]) -> int | None:
    """Bytes of weights and bias, and of constants that newer versions list like tensors."""
    sizes: list[int] = []
    for name in ("Weights", "Bias"):
        group = _member(entry, name)
        if isinstance(group, dict):
            count, dtype = _member(group, "Count"), _dtype(_text(group, "Type"))
            if isinstance(count, int) and count > 0 and dtype in _BITS:
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


# --- words ------------------------------------------------------------------------------------------------------------


def _is_plugin(kind: str) -> bool:
    return "plugin" in kind.lower() or kind == _COMPILED_PLUGIN


def _convolves(kind: str) -> bool:
    return kind.lower() in _CONVOLUTIONS or "convolution" in kind.lower()


def _dtype(text: str) -> str:
    """The element type that a text names: `Row major linear FP16 format`, `Half`, `DataType.HALF`; or nothing."""
    found = _DTYPE_WORD.search(text.lower())
    return _DTYPES[found[1]] if found else ""


def _layout(text: str) -> str:
    """The layout that a text describes, under the name of TensorRT's `TensorFormat`; empty where there is none."""
    if named := re.search(r"\bk?(D?HWC\d*|CD?HW\d+|LINEAR|DLA_\w+)\b", text):
        return named[1]
    words = text.lower()
    deep = "3 spatial" in words
    if wide := re.search(r"(\S+) wide channel vectorized", words):
        number = _WIDE.get(wide[1])
        return f"{'CDHW' if deep else 'CHW'}{number}" if number else ""
    if "channel major" in words:
        multiple = re.search(r"channel (?:%|==) (\d+)", words)
        return f"{'DHWC' if deep else 'HWC'}{multiple[1] if multiple else ''}"
    return "LINEAR" if "row major" in words or "linear" in words else ""


def _member(raw: object, *names: str) -> object:
    """The value under the first of the names that is there; capitals, spaces and signs in a key do not matter."""
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
    return tuple(sides) if all(type(side) is int for side in sides) else ()


def _counts(words: Iterable[str]) -> dict[str, int]:
    return dict(Counter(word for word in words if word).most_common())


def _peak(layers: Iterable[EngineLayer]) -> int | None:
    """The most bytes of tensors between the layer that writes them and the last that reads them."""
    order = list(layers)
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, layer in enumerate(order):
        for tensor in (*layer.inputs, *layer.outputs):
            size = tensor.stored_bytes
            if size is None:
                return None
            sizes[tensor.name] = max(size, sizes.get(tensor.name, 0))
            first.setdefault(tensor.name, at)
            last[tensor.name] = at
    change = [0] * (len(order) + 1)
    for name, size in sizes.items():
        change[first[name]] += size
        change[last[name] + 1] -= size
    peak = live = 0
    for step in change:
        live += step
        peak = max(peak, live)
    return peak if sizes else None


# The layers that a builder lists when an engine is done, where there is no GPU to open the engine and look.
#
# TensorRT-RTX 1.7 with detailed profiling verbosity logs one message: `Layers:`, a line a layer, and the engine's
# inputs and outputs. The layers are fused, and their types decided; which kernels run them, TensorRT-RTX decides on
# the GPU. The text is a log's and no interface, so a line of another form is left out.

_Entry: TypeAlias = dict[str, object]  # as in the inspector's JSON

_LAYER, _TENSOR = "Name: ", "{ Name: "
# What stands between name, type, inputs, constants, outputs, kernel and the rest of a line.
_MARKS = (", LayerType: ", ", Inputs: [", "], Constants: [", "], Outputs: [", "], TacticName: ", ", StreamId: ")
_SUFFIX = re.compile(r"_myl[0-9]+_[0-9]+$")  # that the compiler puts behind the name of a node
_SIDE = re.compile(r"-?[0-9]{1,18}")  # of a tensor
_MOST_SIDES = 8  # of a tensor of TensorRT


def read_listing(text: str) -> LayerTable | None:
    """The table of a builder's list; `None` where no line of it is a layer."""
    entries = (_entry(line) for line in text.splitlines())
    layers = tuple(read_layer(entry) for entry in entries if entry is not None)
    return LayerTable(detail="compiled", layers=layers) if layers else None


def layers_of(record: EngineRecord) -> tuple[LayerTable | None, tuple[str, ...]]:
    """The best table that a record has, and why it is not a better one.

    As the engine runs where it was inspected, else as its builder listed them, else as they were parsed; `None` where
    nothing is known. A text that cannot be read costs only itself.
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
    return (parsed_network(record.network_layers) if record.network_layers else None), notes


def _entry(line: str) -> _Entry | None:
    """A line as the object that the inspector's JSON has for the layer; `None` for a line of another form."""
    if not line.startswith(_LAYER):
        return None
    parts, rest = [], line.removeprefix(_LAYER)
    for mark in _MARKS:
        part, found, rest = rest.partition(mark)
        if not found:
            return None
        parts.append(part)
    name, kind, inputs, constants, outputs, tactic = parts
    tensors = {"Inputs": inputs, "Constants": constants, "Outputs": outputs}
    listed = {key: list(_listed_tensors(text)) for key, text in tensors.items()}
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "PluginName": _SUFFIX.sub("", name), **listed}


def _listed_tensors(text: str) -> Iterator[_Entry]:
    for piece in text.split(_TENSOR)[1:]:
        name, _, rest = piece.partition(", Dimensions: [")
        sides, _, rest = rest.partition("]")
        dtype = rest.partition(", Datatype: ")[2].partition(",")[0]
        layout = rest.partition(", Format: ")[2].partition(" }")[0]
        yield {"Name": name, "Dimensions": _sides(sides), "DataType": dtype, "Format": layout}


def _sides(text: str) -> list[int]:
    sides = text.split(",")
    are_sides = len(sides) <= _MOST_SIDES and all(map(_SIDE.fullmatch, sides))
    return [int(side) for side in sides] if are_sides else []
