"""The family tree of everything that is raised on purpose.

Every error has three parts: what happened with the real values, why, and what to type next.
The command line prints them without a traceback and exits with 1.
"""

from __future__ import annotations


class Y7Error(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What happened and why, with the real values.
        fix: What to type or change next; printed on its own line.
    """

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n{self.fix}" if self.fix else self.message


class UsageError(Y7Error):
    """An option or argument that cannot mean anything, or contradicts another."""


class MissingLibraryError(Y7Error):
    """A library of an optional extra is not installed."""


class LoadError(Y7Error):
    """A model file that cannot be opened: absent, truncated, of another kind, or of another machine."""


class CheckpointError(LoadError):
    """Weights that do not describe a YOLOv7: keys missing, left over or of a wrong shape."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that asks for code this package never runs; the message names what it asked for."""


class FusionError(Y7Error):
    """A model that cannot be fused (it already is, or holds a block without a fusion rule)."""


class ExportError(Y7Error):
    """A graph that could not be written, or an option no runtime can honour."""


class EngineError(Y7Error):
    """An engine that TensorRT could not build here, or a build option that this TensorRT does not have."""


class PluginError(Y7Error):
    """A TensorRT plugin library that is not ours, is damaged or of another kind, or cannot be built here."""


class ParityError(Y7Error):
    """Two forms of the same model that disagree beyond tolerance."""


class ImageError(Y7Error):
    """An image that cannot be read or is not an image."""


class SourceError(Y7Error):
    """A folder, video, camera, stream or list with nothing to read in it."""


class DatasetError(Y7Error):
    """A dataset whose files are missing, malformed or contradict each other."""


class TrainingError(Y7Error):
    """A training that cannot go on: its loss is no number any more, or its files cannot be written."""


class DeviceError(Y7Error):
    """A device that this machine or this runtime does not have, or that ran out of memory."""


_EXTRAS = {
    "faster_coco_eval": "val",
    "google": "export",
    "matplotlib": "bench",
    "onnx": "export",
    "onnxruntime": "cpu",
    "onnxsim": "export",
    "safetensors": "export",
    "tensorboard": "train",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "export",
    "yaml": "val",
}


def missing_library(error: ModuleNotFoundError, purpose: str) -> MissingLibraryError:
    """What to say of a library that is not installed, with the extra that brings it.

    Args:
        error: The failed import of a library.
        purpose: Completes "torch is needed ...".

    Raises:
        ModuleNotFoundError: The import of a file of this package failed, which no installation mends.
    """
    library = (error.name or "").partition(".")[0]
    if library in ("", "yolov7_deploy"):
        raise error
    extra = _EXTRAS.get(library)
    package = f"'yolov7-deploy[{extra}]'" if extra else "yolov7-deploy"
    return MissingLibraryError(f"{library} is needed {purpose}.", fix=f"pip install {package}")
