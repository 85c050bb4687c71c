"""Writes ONNX nodes one after the other, each call giving the name of its output."""

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
        prefix: In front of every name made here. TensorRT before 10.8 lets names inside a function collide with
            names outside, so bodies use a prefix of their own.
        constants_as_nodes: A function body has no initializers; its constants are nodes.
    """

    def __init__(self, *, prefix: str = "", constants_as_nodes: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._prefix = prefix
        self._constants_as_nodes = constants_as_nodes
        self._names: set[str] = set()
        self._constants: dict[bytes, str] = {}

    def unique(self, wish: str) -> str:
        """`wish` with the prefix, and with a number where it is taken."""
        name, count = self._prefix + wish, 1
        while name in self._names:
            count += 1
            name = f"{self._prefix}{wish}_{count}"
        self._names.add(name)
        return name

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:  # noqa: ANN401 - as onnx has it
        """Adds a node of one output and gives the output's name."""
        return self.multi_output_node(op, *inputs, outputs=1, name=name, **attributes)[0]

    def multi_output_node(self, op: str, *inputs: str, outputs: int, name: str = "", **attributes: Any) -> list[str]:  # noqa: ANN401
        """Adds a node of several outputs and gives their names."""
        wish = name or op.lower()
        results = [self.unique(wish if i == 0 else f"{wish}_{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=results[0], **attributes))
        return results

    def initializer(self, name: str, value: npt.NDArray[Any]) -> str:
        """A named weight."""
        unique = self.unique(name)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), unique))
        return unique

    def constant(self, value: npt.NDArray[Any] | Sequence[int] | float, wish: str = "const") -> str:
        """A constant; equal ones share one name. Integers become int64, floats float32."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        tensor = numpy_helper.from_array(array)
        key = tensor.SerializeToString(deterministic=True)
        if key not in self._constants:
            name = self.unique(wish)
            if self._constants_as_nodes:
                self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
            else:
                tensor.name = name
                self.initializers.append(tensor)
            self._constants[key] = name
        return self._constants[key]

    # Spellings that differ from ONNX's, where an attribute became an input or slices read better.

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        """x[start:stop:step] along one axis."""
        bounds = (self.constant([v], "index") for v in (start, stop, axis, step))
        return self.node("Slice", x, *bounds)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """0 keeps a dimension, -1 is what is left."""
        return self.node("Reshape", x, self.constant(list(shape), "shape"))

    def unsqueeze(self, x: str, axis: int) -> str:
        """A new dimension of one."""
        return self.node("Unsqueeze", x, self.constant([axis], "axis"))

    def top_k(self, x: str, count: int) -> tuple[str, str]:
        """The largest values along the last axis in falling order, and their indices; ties by lower index."""
        values, indices = self.multi_output_node(
            "TopK", x, self.constant([count], "count"), outputs=2, name="topk", axis=-1
        )
        return values, indices

    def reduce_max(self, x: str, axis: int, *, opset: int) -> str:
        """Largest value along an axis, which disappears. The axis became an input with opset 18."""
        if opset >= 18:
            return self.node("ReduceMax", x, self.constant([axis], "axis"), keepdims=0)
        return self.node("ReduceMax", x, axes=[axis], keepdims=0)
