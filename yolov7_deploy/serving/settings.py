"""Settings of the Ray Serve application, from its arguments and the environment, and the model file that it serves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._text import get_logger, suggest
from yolov7_deploy.errors import LoadError, UsageError
from yolov7_deploy.hardware.system import usable_cores
from yolov7_deploy.options import ONNX_RUNTIMES, Thresholds

logger = get_logger(__name__)

State = Literal["unchanged", "replaced", "missing"]

PREFIX = "Y7_SERVE_"  # of environment variables: Y7_SERVE_WEIGHTS, Y7_SERVE_CONF, ...
_EXAMPLE = "serve run yolov7_deploy.serving:app weights=yolov7.onnx"
_LOWEST = {"replicas": 1, "max_batch_size": 1, "batch_wait_ms": 0, "max_body_mb": 0.001, "max_queued": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Settings of the application.

    Attributes:
        weights: The model file, or an official name; it must exist on every machine that runs a replica.
        device: `auto`, `cpu` or `cuda`.
        runtime: What runs an ONNX file, see `Detector`.
        img: Image size, one number for a square; `None` is that of the file.
        conf, iou, max_det: Default thresholds; `None` is the value in the model file.
        replicas: Number of models.
        cpus: CPU cores of each replica, which are also the threads of its model; by default those of this machine,
            divided.
        gpus: GPUs of each replica.
        max_batch_size: Maximum number of images that enter the network together.
        batch_wait_ms: How long the first image of a batch waits for others.
        max_body_mb: Maximum size of an image file, in units of 10^6 bytes.
        max_queued: Maximum number of images that wait; further requests are answered with 503.
    """

    weights: str
    device: str = "auto"
    runtime: str = "auto"
    img: int | None = None
    conf: float | None = None
    iou: float | None = None
    max_det: int | None = None
    replicas: int = 1
    cpus: float = 0.0
    gpus: float = 0.0
    max_batch_size: int = 8
    batch_wait_ms: float = 5.0
    max_body_mb: float = 20.0
    max_queued: int = 200

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("conf", "iou", "max_det") if getattr(self, name) is not None}
        Thresholds(**given)
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"{name} must be at least {lowest}, not {getattr(self, name)}.", fix=f"{name}=8")
        if min(self.cpus, self.gpus) < 0:
            raise UsageError("cpus and gpus must not be negative.", fix="For example: cpus=2 gpus=1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"device {self.device} is not known here; Ray chooses the GPU of a replica.",
                fix="device=cpu, or  device=cuda gpus=1",
            )
        if self.runtime not in ONNX_RUNTIMES:
            raise UsageError(f"runtime {self.runtime} is unknown.", fix=suggest(self.runtime, ONNX_RUNTIMES))

    @property
    def max_body_bytes(self) -> int:
        """Maximum size of an image file in bytes."""
        return round(self.max_body_mb * 1e6)

    @property
    def detector_options(self) -> dict[str, Any]:
        """The arguments of `Detector` besides the file."""
        return {name: getattr(self, name) for name in ("device", "runtime", "img", "conf", "iou", "max_det")}


def read_settings(arguments: Mapping[str, object], environment: Mapping[str, str] = os.environ) -> ServeSettings:
    """Return the settings of the application.

    Args:
        arguments: `key=value` of `serve run`, or `args` of a configuration file; they take precedence.
        environment: Variables such as `Y7_SERVE_WEIGHTS`.

    Raises:
        UsageError: A setting is unknown or invalid, or there are no weights.
    """
    kinds = {field.name: str(field.type) for field in fields(ServeSettings)}
    variables = {
        name.removeprefix(PREFIX).lower(): text for name, text in environment.items() if name.startswith(PREFIX)
    }
    given = {**variables, **arguments}
    for name in given:
        if name not in kinds:
            raise UsageError(f"The application has no setting {name!r}.", fix=suggest(name, kinds))
    if not given.get("weights"):
        raise UsageError("The application needs a model file.", fix=_EXAMPLE)
    settings = ServeSettings(**{name: _parse(name, value, kinds[name]) for name, value in given.items()})
    cpus = settings.cpus or max(1, (usable_cores() or os.cpu_count() or 1) // settings.replicas)
    gpus = settings.gpus or float(settings.device == "cuda")
    return replace(settings, cpus=float(cpus), gpus=gpus)


def _parse(name: str, value: object, kind: str) -> Any:  # noqa: ANN401 - the value of any field
    convert: Callable[[Any], Any] = next(c for c in (str, int, float) if kind.startswith(c.__name__))
    if value is None or (value == "" and "None" in kind):
        return None
    try:
        return convert(value)
    except (TypeError, ValueError) as error:
        whole = "a whole number" if convert is int else "a number"
        raise UsageError(f"{name} must be {whole}, not {value!r}.", fix=f"For example: {name}=1") from error


class ModelFile:
    """The file of a model that is served.

    A server keeps the model that it has opened, whatever happens to the file. But a replica that starts later would
    open the new file, and answers would depend on the replica. So a replica refuses a file other than the one that the
    application was started with.

    Args:
        path: The file.
        sha256: Its digest when the application was started.

    Raises:
        LoadError: The file is another one now.
    """

    def __init__(self, path: Path, *, sha256: str) -> None:
        self.path, self.sha256 = path, sha256
        self._stamp, self._state = _stamp(path), self._compare()
        if self._state != "unchanged":
            raise LoadError(
                f"{path} is {self._state}: it is not the file that the application was started with, and the other "
                "replicas still use that.",
                fix="Restart the application to serve the new file, or restore the old one.",
            )

    def state(self) -> State:
        """Return whether the file is unchanged; the content is read again only if the file looks different."""
        stamp = _stamp(self.path)
        if stamp != self._stamp:
            self._stamp, self._state = stamp, self._compare()
            if self._state != "unchanged":
                logger.warning("%s was %s; the model that was opened stays in use", self.path, self._state)
        return self._state

    def _compare(self) -> State:
        try:
            return "unchanged" if sha256_hex(self.path) == self.sha256 else "replaced"
        except OSError:
            return "missing"


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file: inode, size and time of the last change."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
