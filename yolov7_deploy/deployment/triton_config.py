"""The configuration of a model on the Triton Inference Server: `ModelConfig`, written in the text format of Protobuf.

Names and types are those of model_config.proto in github.com/triton-inference-server/common.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolov7_deploy.errors import UsageError
from yolov7_deploy.hub import ENGINE_SUFFIXES
from yolov7_deploy.metadata import METADATA_KEY, NMS_OUTPUTS, ModelMetadata

LABELS = "labels.txt"
WARMUP_IMAGE = "image"  # in the folder `warmup` of the model
_PRINTABLE = range(0x20, 0x7F)
_ESCAPES = {ord('"'): '\\"', ord("\\"): "\\\\"}
_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}

TRITON_BACKENDS = ("auto", "onnxruntime", "tensorrt", "python")
TRITON_DEVICES = ("auto", "cpu", "gpu")
# NVIDIA's image for servers: "nvcr.io/nvidia/tritonserver:<xx.yy>-py3" in github.com/triton-inference-server/server,
# whose docs/introduction/compatibility.md lists release 26.07 with ONNX Runtime 1.27.
TRITON_CONTAINER = "nvcr.io/nvidia/tritonserver:26.07-py3"
TRITON_MAX_BATCH = 8
# A model's name is the name of a folder, and part of URLs.
TRITON_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonOptions:
    """Options of a Triton model repository.

    Attributes:
        backend: What runs the network in Triton: `onnxruntime`, `tensorrt`, or `python` (this package, which takes
            encoded images and returns boxes in their pixels). `auto` is `tensorrt` for engines, `onnxruntime` for ONNX
            files and `python` for checkpoints.
        name: Name of the model; empty for the name of the file.
        max_batch: Maximum batch size; `None` is that of the file, at most `TRITON_MAX_BATCH`.
        preferred: Batch sizes that Triton waits for; empty for half of the maximum and the maximum.
        queue_delay_ms: How long a request may wait until a batch is full.
        instances: How many instances of the model run at the same time, on each GPU.
        device: `cpu`, `gpu`, or `auto`: a GPU if the server has one.
        container: Docker image of the server, for the command that starts it.
    """

    backend: str = "auto"
    name: str = ""
    max_batch: int | None = None
    preferred: tuple[int, ...] = ()
    queue_delay_ms: float = 2.0
    instances: int = 1
    device: str = "auto"
    container: str = TRITON_CONTAINER

    def __post_init__(self) -> None:
        for name, value, known in (("backend", self.backend, TRITON_BACKENDS), ("device", self.device, TRITON_DEVICES)):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=f"One of: {', '.join(known)}")
        if self.name and not TRITON_NAME.fullmatch(self.name):
            raise UsageError(
                f"--name {self.name} is not a name for a model: letters, digits, '_', '-' and '.', at most 100.",
                fix="For example: --name yolov7",
            )
        for name, number in (("max-batch", self.max_batch), ("instances", self.instances)):
            if number is not None and number < 1:
                raise UsageError(f"--{name} {number} must be at least 1.", fix=f"For example: --{name} 4")
        if not 0 <= self.queue_delay_ms < math.inf:
            raise UsageError(
                f"--queue-delay {self.queue_delay_ms:g} is not a time in milliseconds.",
                fix="For example: --queue-delay 2",
            )
        if any(size < 1 for size in self.preferred):
            raise UsageError(
                f"--preferred-batch {','.join(map(str, self.preferred))} must be at least 1.",
                fix="For example: --preferred-batch 4,8",
            )


class Symbol(str):
    """The name of a value of an enumeration, which is written without quotes."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonTensor:
    """An input or output in the configuration: `dims` as Triton counts them, and concrete sizes for the warm-up."""

    name: str
    type: str
    dims: tuple[int, ...]
    warmup_dims: tuple[int, ...] = ()

    def to_message(self) -> dict[str, Any]:
        """Return the fields of `ModelInput` and `ModelOutput`."""
        return {"name": self.name, "data_type": Symbol(self.type), "dims": list(self.dims)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonModel:
    """Everything that differs between the backends.

    Attributes:
        backend: Name of the backend.
        file: The model file, and its name in the repository.
        metadata: Metadata of the model.
        max_batch: `max_batch_size` of the configuration: 0 if requests must have the batch size of the file.
        image: The input.
        outputs: All outputs.
        parameters: Parameters of the model besides the metadata.
        client: Name of the template of the client, and what replaces its placeholders.
        files: Contents of further files by their path in the model's folder.
        copies: Further files to copy, by their path in the model's folder.
        notes: See `TritonRepository`.
    """

    backend: str
    file: tuple[Path, str]
    metadata: ModelMetadata
    max_batch: int
    image: TritonTensor
    outputs: tuple[TritonTensor, ...]
    client: tuple[str, dict[str, str]]
    parameters: dict[str, str] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_engine(self) -> bool:
        """True if the file runs on a GPU only."""
        return self.file[0].suffix.lower() in ENGINE_SUFFIXES


def triton_config(name: str, model: TritonModel, options: TritonOptions) -> dict[str, Any]:
    """Return the fields of `ModelConfig`, for `text_format`.

    Raises:
        UsageError: An option contradicts the model.
    """
    parameters = {**model.parameters, METADATA_KEY: model.metadata.to_json()}
    outputs = [tensor.to_message() for tensor in model.outputs]
    next(output for output in outputs if output["name"] == NMS_OUTPUTS[3])["label_filename"] = LABELS
    default_file = {} if model.backend == "python" else {"default_model_filename": model.file[1]}
    return {
        "name": name,
        "backend": model.backend,
        **default_file,
        "max_batch_size": model.max_batch,
        "input": [model.image.to_message()],
        "output": outputs,
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [{"count": options.instances, "kind": Symbol(_instance_kind(model, options.device))}],
        **_batching(model.max_batch, options),
        "model_warmup": _warmups(model),
        "parameters": map_entries({key: {"string_value": value} for key, value in parameters.items()}),
    }


def _instance_kind(model: TritonModel, device: str) -> str:
    """Return the kind of the instances; engines run on GPUs only."""
    return "KIND_GPU" if model.is_engine else _KINDS[device]


def _batching(max_batch: int, options: TritonOptions) -> dict[str, Any]:
    """Return the dynamic batcher, or nothing if there are no batches.

    Raises:
        UsageError: A preferred size is larger than the maximum.
    """
    if options.preferred and max(options.preferred) > max(max_batch, 1):
        raise UsageError(
            f"--preferred-batch {max(options.preferred)} is above the maximum batch size {max(max_batch, 1)}.",
            fix=f"For example: --preferred-batch {max(max_batch, 1)}",
        )
    if max_batch < 2:
        return {}
    preferred = options.preferred or (max_batch // 2, max_batch)
    return {
        "dynamic_batching": {
            "preferred_batch_size": sorted(set(preferred)),
            "max_queue_delay_microseconds": round(options.queue_delay_ms * 1000),
        }
    }


def _warmups(model: TritonModel) -> list[dict[str, Any]]:
    """Return requests with a grey image, for the smallest and the largest batch."""
    data: dict[str, Any] = {"zero_data": True} if model.backend != "python" else {"input_data_file": WARMUP_IMAGE}
    image = {"data_type": Symbol(model.image.type), "dims": list(model.image.warmup_dims), **data}
    return [
        {"name": f"batch of {batch}", "batch_size": batch, "inputs": map_entries({model.image.name: image})}
        for batch in sorted({1, max(model.max_batch, 1)})
    ]


# --- Protobuf messages in text format, as Triton reads them from config.pbtxt -----------------------------------------


def text_format(message: Mapping[str, Any]) -> str:
    """Return a message as text; the same message gives the same text.

    Args:
        message: Names and values of the fields: texts, numbers, bools, `Symbol`, messages, or lists of these.
    """
    return "".join(f"{line}\n" for name, value in message.items() for line in _lines(name, value))


def map_entries(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a map field as the list of its entries."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def _lines(name: str, value: Any) -> Iterator[str]:  # noqa: ANN401 - see `text_format`
    if isinstance(value, Mapping):
        yield f"{name} {{"
        yield from (f"  {line}" for field, inner in value.items() for line in _lines(field, inner))
        yield "}"
    elif not isinstance(value, list):
        yield f"{name}: {_scalar(value)}"
    elif any(isinstance(item, Mapping) for item in value):
        yield from (line for item in value for line in _lines(name, item))
    else:
        yield f"{name}: [{', '.join(map(_scalar, value))}]"


def _scalar(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, str) and not isinstance(value, Symbol):
        return _quoted(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    """Return a text in quotes; what is not printable ASCII becomes octal escapes of its UTF-8 bytes."""
    return '"' + "".join(map(_escaped, text.encode("utf-8", errors="replace"))) + '"'


def _escaped(byte: int) -> str:
    return _ESCAPES.get(byte) or (chr(byte) if byte in _PRINTABLE else f"\\{byte:03o}")
