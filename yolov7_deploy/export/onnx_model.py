"""OnnxModel: a graph and its passport, loaded and saved together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy.errors import ExportError, LoadError
from yolov7_deploy.metadata import PASSPORT_KEY, ModelInfo

INPUT_NAME = "images"
NMS_OUTPUTS = ("num_dets", "det_boxes", "det_scores", "det_classes")
RAW_OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A graph and its passport.

    Attributes:
        proto: The graph; treat it as read-only and work on copies.
        info: The passport, also inside `proto.metadata_props`.
    """

    proto: onnx.ModelProto
    info: ModelInfo

    @classmethod
    def of(cls, proto: onnx.ModelProto, info: ModelInfo) -> OnnxModel:
        """Puts the passport into the graph's metadata (the only change made to `proto`)."""
        onnx.helper.set_model_props(proto, {PASSPORT_KEY: info.to_json()})
        return cls(proto, info)

    @classmethod
    def load(cls, path: str | Path) -> OnnxModel:
        """The graph in a file written by `save`.

        Raises:
            LoadError: The file is absent, not ONNX, or carries no passport.
        """
        path = Path(path)
        try:
            proto = onnx.load_model_from_string(path.read_bytes())
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
        except DecodeError as error:
            raise LoadError(f"{path} is not an ONNX file.", fix="Export it:  y7 export --weights yolov7") from error
        passport = {entry.key: entry.value for entry in proto.metadata_props}.get(PASSPORT_KEY)
        if passport is None:
            raise LoadError(
                f"{path} carries no passport of this package.", fix="Export it again:  y7 export --weights yolov7"
            )
        return cls(proto, ModelInfo.from_json(passport))

    def save(self, path: str | Path) -> None:
        """Writes the file under a temporary name and renames it, so a killed run leaves no half file; folders are made.

        Raises:
            ExportError: The disk is full, the folder cannot be written, or the graph is above protobuf's 2 GiB.
        """
        path = Path(path)
        try:
            data = self.proto.SerializeToString(deterministic=True)
            with whole_file(path) as unfinished:
                unfinished.write_bytes(data)
        except (OSError, EncodeError, ValueError) as error:
            raise ExportError(f"{path} cannot be written: {error}.", fix="Choose another place:  --output F") from error
