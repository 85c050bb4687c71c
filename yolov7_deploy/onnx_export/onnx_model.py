"""OnnxModel: an ONNX graph and its metadata, loaded and saved together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

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
        onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.to_json()})
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
