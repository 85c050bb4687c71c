"""Looks inside an ONNX file: its raw head maps and decoded output for one canvas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from yolov7_deploy.export.nms import EFFICIENT_OP
from yolov7_deploy.export.onnx_model import RAW_OUTPUT, OnnxModel
from yolov7_deploy.image import FloatArray, Image, to_network_input
from yolov7_deploy.runtimes.base import IntermediateOutputs

_ERRORS_ONLY = 3


class OnnxProbe:
    """An ONNX file of ours, run once more with what lies inside as additional outputs.

    Args:
        path: The file; it is read and not changed.

    Raises:
        LoadError: It is not ONNX, or not ours.
    """

    def __init__(self, path: Path) -> None:
        model = OnnxModel.load(path)
        self._info = model.metadata
        graph = model.proto.graph
        self._scored = [list(node.input) for node in graph.node if node.op_type == EFFICIENT_OP]
        inside = [*self._info.heads, *(name for names in self._scored for name in names)]
        known = {output.name for output in graph.output}
        # Without a type, because maps are half in some files.
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside if name not in known)
        self._wanted = [*inside, *([RAW_OUTPUT] if RAW_OUTPUT in known else [])]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        self._session = onnxruntime.InferenceSession(
            model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """What the file makes of one canvas. A decode that is part of a NMS op cannot be seen."""
        batch = [canvas] * (self._info.batch or 1)
        fed = np.stack(batch) if self._info.input_kind == "uint8" else to_network_input(batch)
        results = dict(zip(self._wanted, self._session.run(self._wanted, {self._input: fed}), strict=True))
        decoded: FloatArray | None = None
        if RAW_OUTPUT in results:
            decoded = results[RAW_OUTPUT][0]
        for boxes, scores in self._scored:
            # The product of objectness and class is what EfficientNMS reads, so the objectness is one here.
            ones = np.ones((results[boxes].shape[1], 1), dtype=np.float32)
            decoded = np.concatenate([results[boxes][0], ones, results[scores][0]], axis=1)
        heads = [results[name][0].astype(np.float32) for name in self._info.heads]
        return IntermediateOutputs(heads=heads, decoded=decoded)
