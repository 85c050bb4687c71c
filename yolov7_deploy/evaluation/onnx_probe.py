"""Intermediate outputs of an ONNX file: its raw head maps, decoded output and NMS results for one canvas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from yolov7_deploy import _protobuf as pb
from yolov7_deploy._process import temporary_folder
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.image import FloatArray, Image, to_network_input
from yolov7_deploy.metadata import NMS_OUTPUTS, RAW_OUTPUT, THRESHOLD_INPUTS
from yolov7_deploy.onnx_export.nms import EFFICIENT_OP
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import file_thresholds, threshold_values
from yolov7_deploy.postprocess import RawDetections
from yolov7_deploy.runtimes.base import IntermediateOutputs
from yolov7_deploy.runtimes.onnx_session import OnnxRuntime

_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number


def copy_with_conf(path: Path, copy: Path, *, conf: float) -> None:
    """Write a copy of an exported file in which the confidence threshold of EfficientNMS_TRT is `conf`.

    Raises:
        LoadError: The file is not ONNX, or was not written by this package.
        ExportError: The copy cannot be written.
    """
    model = OnnxModel.load(path)
    for node in model.proto.graph.node:
        for attribute in node.attribute if node.op_type == EFFICIENT_OP else ():
            if attribute.name == "score_threshold":
                attribute.f = conf
    assert model.metadata.nms is not None, "the file has NMS inside"
    nms = replace(model.metadata.nms, conf=conf)
    OnnxModel.of(model.proto, replace(model.metadata, nms=nms)).save(copy)


def _copy_with_outputs(path: Path, copy: Path, outputs: list[onnx.ValueInfoProto]) -> None:
    """Write a copy of a file with more outputs of its graph; the weights are not decoded and encoded again."""
    added = onnx.GraphProto(output=outputs).SerializeToString()
    with copy.open("wb") as file:
        for number, value, field in pb.iterate_fields(memoryview(path.read_bytes())):
            file.writelines(pb.length_field(_GRAPH, [pb.as_bytes(value), added]) if number == _GRAPH else [field])


class OnnxProbe:
    """Runs a copy of an exported ONNX file that has intermediate tensors as additional outputs.

    Args:
        path: The file; it is not changed.
        runtime: The file in the runtime that runs the copy too, with the same settings.

    Raises:
        LoadError: The file is not ONNX, or was not written by this package.
    """

    def __init__(self, path: Path, runtime: OnnxRuntime) -> None:
        model = OnnxModel.load(path)
        self._metadata = model.metadata
        graph = model.proto.graph
        self._nms_inputs = [list(node.input) for node in graph.node if node.op_type == EFFICIENT_OP]
        added = [*self._metadata.heads, *(name for names in self._nms_inputs for name in names)]
        known = {output.name for output in graph.output}
        # Without a type, because maps are FP16 in some files.
        more = [onnx.ValueInfoProto(name=name) for name in added if name not in known]
        self._outputs = [*added, *(name for name in (RAW_OUTPUT, *NMS_OUTPUTS) if name in known)]
        with temporary_folder("y7-verify") as folder:
            copy = folder / "probe.onnx"
            _copy_with_outputs(path, copy, more)
            self._session = runtime.open_graph(copy)
        self._input = self._session.inputs[0].name
        nms = self._metadata.nms
        self._thresholds = {}
        if nms is not None and nms.runtime_thresholds:
            values = threshold_values(replace(file_thresholds(nms), conf=0.0))
            self._thresholds = {
                name: np.full(1, value, np.float32) for name, value in zip(THRESHOLD_INPUTS, values, strict=True)
            }

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """Return the intermediate outputs for one canvas; decoding that is part of an NMS op has none.

        Raises:
            DeviceError: The runtime cannot run the copy.
        """
        batch = [canvas] * (self._metadata.batch or 1)
        takes_pixels = self._metadata.input_kind == "uint8" or self._session.takes_pixels
        array = np.stack(batch) if takes_pixels else to_network_input(batch)
        inputs = {self._input: array, **self._thresholds}
        results = self._run(inputs)
        decoded: FloatArray | None = None
        if RAW_OUTPUT in results:
            decoded = results[RAW_OUTPUT][0]
        for boxes, scores in self._nms_inputs:
            # EfficientNMS reads final scores. As class probabilities they need an objectness of 1; that of one class
            # is the objectness itself.
            columns = [results[boxes][0], results[scores][0]]
            ones = np.ones((len(columns[0]), 1), dtype=np.float32)
            columns.insert(1 if columns[1].shape[1] > 1 else 2, ones)
            decoded = np.concatenate(columns, axis=1)
        heads = [results[name][0].astype(np.float32) for name in self._metadata.heads]
        detections = None
        if self._metadata.nms is not None:
            count, found_boxes, found_scores, classes = (results[name][0] for name in NMS_OUTPUTS)
            rows = slice(int(count[0]))
            detections = RawDetections(
                boxes=found_boxes[rows], scores=found_scores[rows], class_ids=classes[rows].astype(np.int64)
            )
        return IntermediateOutputs(heads=heads, decoded=decoded, detections=detections)

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        try:
            arrays = self._session.run(self._session.get(), self._outputs, inputs)
        except self._session.errors as error:
            raise DeviceError(
                f"{self._session.library} could not run the file with its intermediate tensors as outputs: "
                f"{self._session.reason(error)}",
                fix="Use another runtime:  --runtime onnxruntime",
            ) from error
        return dict(zip(self._outputs, arrays, strict=True))
