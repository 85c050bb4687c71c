"""Build ONNX graphs node by node; every call returns the name of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper


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
