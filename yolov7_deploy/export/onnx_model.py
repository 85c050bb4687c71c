"""OnnxModel: a graph and its metadata, loaded and saved together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy.errors import ExportError, LoadError
from yolov7_deploy.metadata import METADATA_KEY, ModelMetadata

INPUT_NAME = "images"


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A graph and its metadata.

    Attributes:
        proto: The graph; treat it as read-only and work on copies.
        info: The metadata, also inside `proto.metadata_props`.
    """

    proto: onnx.ModelProto
    metadata: ModelMetadata

    @classmethod
    def of(cls, proto: onnx.ModelProto, metadata: ModelMetadata) -> OnnxModel:
        """Puts the metadata into the graph's metadata (the only change made to `proto`)."""
        onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.to_json()})
        return cls(proto, metadata)

    @classmethod
    def load(cls, path: str | Path) -> OnnxModel:
        """The graph in a file written by `save`.

        Raises:
            LoadError: The file is absent, not ONNX, or carries no metadata.
        """
        path = Path(path)
        try:
            proto = onnx.load_model_from_string(path.read_bytes())
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
        except DecodeError as error:
            raise LoadError(f"{path} is not an ONNX file.", fix="Export it:  y7 export --weights yolov7") from error
        metadata = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY)
        if metadata is None:
            raise LoadError(
                f"{path} carries no metadata of this package.", fix="Export it again:  y7 export --weights yolov7"
            )
        return cls(proto, ModelMetadata.from_json(metadata))

    def save(self, path: str | Path) -> None:
        """Writes the file under a temporary name and renames it, so a killed run leaves no half file; folders are made.

        Raises:
            ExportError: The disk is full, the folder cannot be written, or the graph is above protobuf's 2 GiB.
        """
        path = Path(path)
        try:
            data = self.proto.SerializeToString(deterministic=True)
            with atomic_write(path) as unfinished:
                unfinished.write_bytes(data)
        except (OSError, EncodeError, ValueError) as error:
            raise ExportError(f"{path} cannot be written: {error}.", fix="Choose another place:  --output F") from error
