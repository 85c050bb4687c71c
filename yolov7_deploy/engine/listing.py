"""The layers that a builder lists when an engine is done, where there is no GPU to open the engine and look.

TensorRT-RTX 1.7 with detailed profiling verbosity logs one message: `Layers:`, a line a layer, and the engine's inputs
and outputs. The layers are fused, and their types decided; which kernels run them, TensorRT-RTX decides on the GPU. The
text is a log's and no interface, so a line of another form is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

from yolov7_deploy.engine.layers import LayerTable, parsed_network, read_inspector, read_layer
from yolov7_deploy.engine.record import EngineRecord
from yolov7_deploy.errors import LoadError

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
    listed = {key: list(_tensors(text)) for key, text in tensors.items()}
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "PluginName": _SUFFIX.sub("", name), **listed}


def _tensors(text: str) -> Iterator[_Entry]:
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
