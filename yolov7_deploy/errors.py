"""Exceptions of this package, all derived from `Y7Error`.

Every error has three parts: what happened (with the actual values), why, and what to type next.
The command line prints them without a traceback and exits with code 1.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from yolov7_deploy._python_spelling import in_python
from yolov7_deploy._text import printable, suggest

Function = TypeVar("Function", bound=Callable[..., Any])


class Y7Error(Exception):
    """Base class of all exceptions that this package raises on purpose.

    Its texts can be printed whatever they contain: control characters and other unprintable ones become escapes.
    `message` and `fix` name options and commands as the command line prints them; `str(error)`, which Python shows,
    names arguments and functions (`conf=0.25` for `--conf 0.25`).

    Args:
        message: What happened and why, with the actual values.
        fix: What to type or change next; printed on its own line.

    Example:
        >>> try:
        ...     Detector("yolov7.pt", conf=40)
        ... except Y7Error as error:
        ...     print(error)
        conf must be between 0 and 1, not 40.
        For example: conf=0.25
    """

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.fix = printable(fix)

    def __str__(self) -> str:
        return in_python(f"{self.message}\n{self.fix}" if self.fix else self.message)


class UsageError(Y7Error):
    """An option or argument has an invalid value, or contradicts another one."""


class MissingLibraryError(Y7Error):
    """A library that an optional extra installs is missing, or does not load."""


class LoadError(Y7Error):
    """A model file cannot be opened: it is missing, truncated, of another format, or built for another machine."""


class CheckpointError(LoadError):
    """The weights are not those of a YOLOv7 network: tensors are missing, unexpected or of the wrong shape."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle refers to code that this package never executes; the message names it."""


class FusionError(Y7Error):
    """A model cannot be fused: it already is, or it has a block without a fusion rule."""


class ExportError(Y7Error):
    """An ONNX graph cannot be produced, or an option is one that no runtime supports."""


class EngineError(Y7Error):
    """TensorRT cannot build an engine here, or this TensorRT does not have a build option."""


class PluginError(Y7Error):
    """A TensorRT plugin library is not ours, damaged, of another kind, or cannot be built here."""


class ParityError(Y7Error):
    """Two artifacts of the same model differ by more than the tolerance."""


class ImageError(Y7Error):
    """An image cannot be read, or is not an image."""


class SourceError(Y7Error):
    """A folder, video, camera, stream or list cannot be read or has no images."""


class DatasetError(Y7Error):
    """The files of a dataset are missing, malformed or contradict each other."""


class MissingSplitError(DatasetError):
    """A dataset names no images of the requested split."""


class TrainingError(Y7Error):
    """Training cannot continue: the loss is not finite, or a file cannot be written."""


class DeviceError(Y7Error):
    """A device does not exist on this machine or in this runtime, or is out of memory."""


def suggests_arguments(function: Function, more: Iterable[str] = ()) -> Function:
    """Let a function that gets an argument with an unknown name raise `UsageError`, which suggests the known one.

    Args:
        function: A function or method.
        more: Names that it takes as `**options`.
    """
    named = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
    known = {one.name for one in named}.union(more) - {"self"}
    title = function.__qualname__.removesuffix(".__init__").removesuffix(".__call__")

    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        if not kwargs.keys() <= known:
            name = min(kwargs.keys() - known)
            raise UsageError(f"{title} does not have an argument {name}.", fix=suggest(name, sorted(known)))
        return function(*args, **kwargs)

    return cast(Function, wrapper)


# Library: the extra of this package that installs it.
_EXTRAS = {
    "faster_coco_eval": "val",
    "google": "export",
    "jinja2": "report",
    "matplotlib": "bench",
    "onnx": "export",
    "onnxruntime": "cpu",
    "onnxsim": "export",
    "openvino": "openvino",
    "prometheus_client": "metrics",
    "pyarrow": "ray",
    "ray": "ray",
    "safetensors": "export",
    "starlette": "ray",
    "tensorboard": "train",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch": "export",
    "yaml": "val",
}


def missing_library(error: ModuleNotFoundError, purpose: str) -> MissingLibraryError:
    """Return the error for a library that is not installed; it names the extra that installs it.

    Args:
        error: The failed import of the library.
        purpose: Completes "torch is needed ...".

    Raises:
        ModuleNotFoundError: The module that failed to import belongs to this package, so installing does not help.
    """
    library = (error.name or "").partition(".")[0]
    if library in ("", "yolov7_deploy"):
        raise error
    extra = _EXTRAS.get(library)
    package = f"'yolov7-deploy[{extra}]'" if extra else "yolov7-deploy"
    return MissingLibraryError(f"{library} is needed {purpose}.", fix=f"pip install {package}")


def broken_library(error: ImportError | OSError, library: str, purpose: str) -> MissingLibraryError:
    """Return the error for a library that is installed, but cannot be imported.

    Args:
        error: The failed import.
        library: Name of the library.
        purpose: Completes "torch is needed ...".

    Raises:
        ImportError: The module that failed to import belongs to this package, so installing does not help.
    """
    if (getattr(error, "name", None) or "").partition(".")[0] == "yolov7_deploy":
        raise error
    return MissingLibraryError(
        f"{library} is needed {purpose}; it is installed but does not load: {error}",
        fix="y7 doctor shows what is installed; pip install --force-reinstall  repairs a broken wheel.",
    )


# Messages of torch, cuDNN, oneDNN, CUDA, TensorRT and the C++ standard library.
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|not enough memory|alloc_failed|bad_alloc|could not be allocated|could not create a primitive|"
    r"(?:can't|cannot|failed to) allocate",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | str) -> bool:
    """Return whether an exception, or one in its context, or a log line means that main or GPU memory ran out."""
    if isinstance(error, str):
        return _OUT_OF_MEMORY.search(error) is not None
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(str(error))):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)
