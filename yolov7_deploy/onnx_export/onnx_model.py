"""OnnxModel: an ONNX graph and its metadata, loaded and saved together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto, helper, numpy_helper

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, read_bytes
from yolov7_deploy.errors import ExportError, LoadError
from yolov7_deploy.metadata import METADATA_KEY, ModelMetadata

INPUT_NAME = "images"


@dataclass(frozen=True, slots=True, repr=False)
class OnnxModel:
    """An ONNX graph and its metadata.

    Attributes:
        proto: The graph; treat it as read-only and modify copies.
        metadata: The metadata, which `proto.metadata_props` contains as well.

    Example:
        >>> OnnxModel.load("shapes.onnx").metadata.precision
        'fp32'
    """

    proto: onnx.ModelProto
    metadata: ModelMetadata

    def __repr__(self) -> str:
        return f"OnnxModel({self.metadata}, {len(self.proto.graph.node)} nodes)"

    @classmethod
    def of(cls, proto: onnx.ModelProto, metadata: ModelMetadata) -> OnnxModel:
        """Return a model after writing its metadata into `proto.metadata_props`; nothing else in `proto` changes."""
        kept = {entry.key: entry.value for entry in proto.metadata_props}  # such as the `names` of ultralytics
        helper.set_model_props(proto, kept | {METADATA_KEY: metadata.to_json()})
        return cls(proto, metadata)

    @classmethod
    def load(cls, path: str | Path) -> OnnxModel:
        """Load a file that `save` wrote.

        Raises:
            LoadError: The file is missing, not ONNX, or has no metadata.
        """
        path = Path(path)
        try:
            proto = onnx.load_model_from_string(read_bytes(path, max_bytes=MAX_MODEL_BYTES))
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
        except DecodeError as error:
            raise LoadError(f"{path} is not an ONNX file.", fix="Export it:  y7 export --weights yolov7") from error
        metadata = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY)
        if metadata is None:
            raise LoadError(
                f"{path} has no metadata of this package.", fix="Export it again:  y7 export --weights yolov7"
            )
        return cls(proto, ModelMetadata.from_json(metadata))

    def save(self, path: str | Path) -> None:
        """Write the file atomically, so that a killed process leaves no partial file; missing folders are created.

        Raises:
            ExportError: The disk is full, the folder is not writable, or the graph exceeds the 2 GiB of protobuf.
        """
        path = Path(path)
        try:
            data = self.proto.SerializeToString(deterministic=True)
            with atomic_write(path) as unfinished:
                unfinished.write_bytes(data)
        except (OSError, EncodeError, ValueError) as error:
            raise ExportError(f"{path} cannot be written: {error}.", fix="Choose another path:  --output F") from error


class GraphBuilder:
    """Nodes and constants of one graph or function body.

    Args:
        prefix: Prefix of every new name. In TensorRT before 10.8, names inside a function may collide with names
            outside, so function bodies have a separate prefix.
        constants_as_nodes: Write constants as `Constant` nodes, because a function body has no initializers.
    """

    def __init__(self, *, prefix: str = "", constants_as_nodes: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._prefix = prefix
        self._constants_as_nodes = constants_as_nodes
        self._names: set[str] = set()
        self._constants: dict[bytes, str] = {}

    def unique(self, name: str) -> str:
        """Return a name that is not used yet: `name` with the prefix, and with a number if that is used already."""
        unique, count = self._prefix + name, 1
        while unique in self._names:
            count += 1
            unique = f"{self._prefix}{name}_{count}"
        self._names.add(unique)
        return unique

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:  # noqa: ANN401 - as in onnx
        """Add a node with one output and return the name of the output."""
        return self.multi_output_node(op, *inputs, outputs=1, name=name, **attributes)[0]

    def multi_output_node(self, op: str, *inputs: str, outputs: int, name: str = "", **attributes: Any) -> list[str]:  # noqa: ANN401
        """Add a node with several outputs and return their names."""
        name = name or op.lower()
        results = [self.unique(name if i == 0 else f"{name}_{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=results[0], **attributes))
        return results

    def initializer(self, name: str, value: npt.NDArray[Any]) -> str:
        """Add a weight and return its unique name."""
        unique = self.unique(name)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), unique))
        return unique

    def constant(self, value: npt.NDArray[Any] | Sequence[int] | float, name: str = "const") -> str:
        """Add a constant and return its name; equal constants share one. Integers become int64, floats float32."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        tensor = numpy_helper.from_array(array)
        key = tensor.SerializeToString(deterministic=True)
        if key not in self._constants:
            unique = self.unique(name)
            if self._constants_as_nodes:
                self.nodes.append(helper.make_node("Constant", [], [unique], name=unique, value=tensor))
            else:
                tensor.name = unique
                self.initializers.append(tensor)
            self._constants[key] = unique
        return self._constants[key]

    # Operators whose attributes or inputs differ between opsets, or are shorter to write this way.

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        """Add x[start:stop:step] along one axis."""
        bounds = (self.constant([v], "index") for v in (start, stop, axis, step))
        return self.node("Slice", x, *bounds)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Add a reshape; 0 keeps a dimension, -1 is inferred."""
        return self.node("Reshape", x, self.constant(list(shape), "shape"))

    def unsqueeze(self, x: str, axis: int) -> str:
        """Add a new dimension of size 1."""
        return self.node("Unsqueeze", x, self.constant([axis], "axis"))

    def top_k(self, x: str, count: str) -> tuple[str, str]:
        """Return the `count` (int64 [1]) largest values along the last axis, descending, and their indices.

        Ties are by lower index.
        """
        values, indices = self.multi_output_node("TopK", x, count, outputs=2, name="topk", axis=-1)
        return values, indices

    def reduce_max(self, x: str, axis: int, *, opset: int) -> str:
        """Add the maximum along an axis, which is removed. The axis is an input from opset 18 on."""
        if opset >= 18:
            return self.node("ReduceMax", x, self.constant([axis], "axis"), keepdims=0)
        return self.node("ReduceMax", x, axes=[axis], keepdims=0)
