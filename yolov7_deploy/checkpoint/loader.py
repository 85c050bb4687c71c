"""Loading of weights files as plain data, without executing anything in them, and saving as safetensors.

Reads official checkpoints of every kind (pickled modules with or without EMA, stripped or deploy files), plain
state dicts, and files written by `save_checkpoint`. The kind is recognised by content, never by suffix.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, open_file
from yolov7_deploy._serialization import parse_json, sha256_hex, short_repr
from yolov7_deploy._text import get_logger, is_unicode, printable_line
from yolov7_deploy._version import __version__
from yolov7_deploy.checkpoint.architecture import ANCHORS_PER_LEVEL, TINY, Architecture, identify_architecture
from yolov7_deploy.checkpoint.module_tree import MAX_TENSORS, read_modules
from yolov7_deploy.checkpoint.pickle_allowlist import Module, TensorEntry
from yolov7_deploy.checkpoint.quantization import TrainedQuantization
from yolov7_deploy.checkpoint.torch_archive import NumberArray, TorchFile, is_safetensors, require_file
from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.errors import CheckpointError, LoadError
from yolov7_deploy.metadata import METADATA_KEY, ModelMetadata
from yolov7_deploy.paper import ABLATIONS

logger = get_logger(__name__)

_T = TypeVar("_T")
Anchors = tuple[tuple[tuple[float, float], ...], ...]

MAX_CLASS_NAME = 1000  # characters

_KEY_ORDER = "key_order"
_QUANTIZATION_KEY = "yolov7_int8"
_TINY_SILU = "yolov7-tiny-silu"
_COUNTER, _VARIANCE = "num_batches_tracked", "running_var"
# Where weights are in a file, most important first: the official program uses the moving average if there is one.
_WEIGHT_KEYS = ("ema", "ema_state_dict", "model_ema", "model", "state_dict", "model_state_dict", "net", "module")
_MAX_NESTING = 4
# Attributes that hold the network in the modules of DataParallel, torch.compile, FSDP, checkpointing and DeepSpeed.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_NOT_WEIGHTS = ("n_averaged",)  # the counter of torch.optim.swa_utils.AveragedModel
_LAYER = re.compile(r"[0-9]{1,6}\.")
_OFFICIAL = re.compile(r"(?:^|\.)(?P<name>model\.[0-9]{1,6}\.)")
_SAVE_AGAIN = (
    "Save it again:  torch.save({'model': model}, 'weights.pt')  or  torch.save(model.state_dict(), 'weights.pt')"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Checkpoint:
    """Weights and their description.

    Attributes:
        tensors: Official names (`model.N....`) in official order; float32, and int64 for `num_batches_tracked`.
            The tensors belong to this checkpoint: copy before changing.
        variant: One of the eight official names, or a network of the paper's ablations.
        training: Training form (implicit tensors, auxiliary heads) or deploy form.
        class_names: One per class, in class-id order.
        anchors: Per level, fine to coarse, three (width, height) in input pixels; those of the file, so that
            anchors fitted to a custom dataset are kept.
        training_size: Side in pixels of the square images of the training; `None` if unknown.
        source: Name of the file; for new weights, of the file from which they were trained or converted.
        source_sha256: Digest of that file.
        origin: Name of the file from which the file `source` was made, if it says so.
        origin_sha256: Digest of that file.
        version: Version of this package that wrote the file; empty for other files.
        quantization: INT8 quantization that the weights were trained for, which are then fused; `None` for others.

    Example:
        >>> checkpoint = load_checkpoint("best.safetensors")
        >>> checkpoint.variant, checkpoint.training_size, len(checkpoint.class_names)
        ('yolov7-tiny', 416, 6)
    """

    tensors: dict[str, torch.Tensor]
    variant: str
    training: bool
    class_names: tuple[str, ...]
    anchors: Anchors
    training_size: int | None = None
    source: str = ""
    source_sha256: str = ""
    origin: str = ""
    origin_sha256: str = ""
    version: str = ""
    quantization: TrainedQuantization | None = None

    def __repr__(self) -> str:
        form = "training" if self.training else "deploy"
        size = f", trained at {self.training_size}" if self.training_size else ""
        int8 = f", for INT8 ({self.quantization.target})" if self.quantization else ""
        return (
            f"Checkpoint({self.source!r}: {self.variant}, {form} form, {len(self.class_names)} classes{size}{int8}, "
            f"{len(self.tensors)} tensors)"
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of each level: 8, 16, 32 and, with four levels, 64."""
        return tuple(8 << level for level in range(len(self.anchors)))

    @property
    def metadata(self) -> ModelMetadata:
        """Metadata of these weights."""
        return ModelMetadata(
            variant=self.variant,
            class_names=self.class_names,
            strides=self.strides,
            anchors=self.anchors,
            training_size=self.training_size,
            source=self.source,
            source_sha256=self.source_sha256,
            version=self.version,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contents:
    """Contents of a weights file before recognition; `metadata` is `None` unless this package wrote the file."""

    arrays: dict[str, NumberArray]
    names: object = None
    activations: frozenset[str] = frozenset()
    metadata: ModelMetadata | None = None
    quantization: TrainedQuantization | None = None

    @property
    def variant(self) -> str:
        """The variant that the file names; empty if it names none."""
        return self.metadata.variant if self.metadata else ""


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load the weights of a file: `ema` if present, else `model`, else the file as a plain state dict.

    Raises:
        LoadError: The file does not exist, is damaged, or is not a weights file; the message says what it is.
        CheckpointError: Its weights are not of a YOLOv7 variant, fused, not finite, or contradict the class names.
        UnsafeCheckpointError: It refers to code that is not allowed; the message names it.

    Example:
        >>> load_checkpoint("best.safetensors").class_names[:2]
        ('circle', 'square')
    """
    start = time.perf_counter()
    file = Path(path)
    require_file(file)
    contents = _read_safetensors(file) if is_safetensors(file) else _read_torch(file)
    source = file.name
    architecture = identify_architecture(
        {key: array.shape for key, array in contents.arrays.items()},
        source=source,
        ablation=contents.variant if contents.variant in ABLATIONS else "",
        fused=contents.quantization is not None,
    )
    metadata = contents.metadata
    checkpoint = Checkpoint(
        tensors={key: _tensor(key, array, source) for key, array in contents.arrays.items()},
        variant=_variant(architecture, contents, source),
        training=architecture.training,
        class_names=_class_names(contents.names, architecture.classes, source),
        anchors=_anchors(contents.arrays, architecture, source),
        training_size=_training_size(metadata, architecture, source),
        source=source,
        source_sha256=sha256_hex(file),
        origin=metadata.source if metadata else "",
        origin_sha256=metadata.source_sha256 if metadata else "",
        version=metadata.version if metadata else "",
        quantization=contents.quantization,
    )
    logger.info(
        "checkpoint: %s -> %s (%s form, %d classes, %d tensors) in %.2f s",
        source,
        checkpoint.variant,
        "training" if checkpoint.training else "deploy",
        len(checkpoint.class_names),
        len(checkpoint.tensors),
        time.perf_counter() - start,
    )
    return checkpoint


def save_checkpoint(checkpoint: Checkpoint, path: str | Path, *, half: bool = False) -> None:
    """Write safetensors with metadata, atomically: same checkpoint, same bytes; missing folders are created.

    Args:
        checkpoint: The checkpoint to write.
        path: Usually `NAME.safetensors`.
        half: Store float16, half the size, as the official files do. Lossless for weights that came from one,
            rounded otherwise.

    Raises:
        CheckpointError: The file cannot be written, or a weight does not fit into float16.

    Example:
        >>> save_checkpoint(load_checkpoint("best.safetensors"), "half.safetensors", half=True)
        >>> load_checkpoint("half.safetensors").origin
        'best.safetensors'
    """
    target = Path(path)
    tensors = {key: _stored(key, tensor, half=half) for key, tensor in checkpoint.tensors.items()}
    metadata = replace(checkpoint.metadata, version=__version__)
    order = json.dumps(list(tensors), separators=(",", ":"))
    header = {"format": "pt", METADATA_KEY: metadata.to_json(), _KEY_ORDER: order}
    if checkpoint.quantization is not None:
        header[_QUANTIZATION_KEY] = checkpoint.quantization.to_json()
    data = _with_sorted_header(safetensors.torch.save(tensors, header))
    try:
        with atomic_write(target) as unfinished:
            unfinished.write_bytes(data)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{target} cannot be written ({getattr(error, 'strerror', None) or error}).",
            fix="Free some space, or choose another path.",
        ) from error


def _stored(key: str, tensor: torch.Tensor, *, half: bool) -> torch.Tensor:
    """Return a contiguous tensor with its own memory, as safetensors requires."""
    plain = tensor.detach().cpu()
    if half and plain.is_floating_point():
        plain = plain.to(torch.float16)
        if not bool(plain.isfinite().all()):
            raise CheckpointError(f"{key} has values beyond float16 (65504).", fix="Save it in float32 (half=False).")
    return plain.clone(memory_format=torch.contiguous_format)


def _with_sorted_header(data: bytes) -> bytes:
    """Return the file with its JSON header sorted; the library writes metadata in random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


@contextlib.contextmanager
def open_safetensors(path: Path, *, max_bytes: int) -> Iterator[Any]:
    """Open a safetensors file for PyTorch; unlike for `safetensors.safe_open`, its name need not be valid Unicode.

    Raises:
        OSError: It does not exist, is not a regular file, or is larger than `max_bytes`.
        safetensors.SafetensorError: It is damaged.
    """
    with open_file(path, max_bytes=max_bytes) as opened:
        name = str(path) if is_unicode(str(path)) else f"/dev/fd/{opened.fileno()}"
        with safetensors.safe_open(name, framework="pt") as file:
            yield file


def _read_safetensors(path: Path) -> _Contents:
    """Read a file of `save_checkpoint`, or any safetensors file with official tensor names."""
    try:
        with open_safetensors(path, max_bytes=MAX_MODEL_BYTES) as file:
            header: dict[str, str] = file.metadata() or {}
            _check_count(len(file.keys()), path.name)
            arrays = {key: _widened(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise _damaged(path, error) from error
    if METADATA_KEY not in header:
        _refuse_training_state(path, arrays)
        return _Contents(arrays=_with_counters(_official_names(arrays)))
    metadata = ModelMetadata.from_json(header[METADATA_KEY])
    order = _key_order(header.get(_KEY_ORDER, "[]"))
    if set(order) == set(arrays):
        arrays = {key: arrays[key] for key in order}
    quantization = _read_quantization(header, path)
    return _Contents(arrays=arrays, names=metadata.class_names, metadata=metadata, quantization=quantization)


def load_quantization(path: str | Path) -> TrainedQuantization | None:
    """Return the INT8 quantization that the weights of a file were trained for; only the header is read.

    Returns:
        `None` for files of other weights or formats, and for files that do not exist.

    Raises:
        LoadError: The file is damaged.
    """
    file = Path(path)
    if not file.is_file() or not is_safetensors(file):
        return None
    try:
        with open_safetensors(file, max_bytes=MAX_MODEL_BYTES) as opened:
            header: dict[str, str] = opened.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error
    return _read_quantization(header, file)


def _read_quantization(header: Mapping[str, str], path: Path) -> TrainedQuantization | None:
    if _QUANTIZATION_KEY not in header:
        return None
    try:
        return TrainedQuantization.from_json(header[_QUANTIZATION_KEY])
    except ValueError as error:
        raise CheckpointError(
            f"The INT8 quantization inside {path.name} cannot be read: {printable_line(str(error))}.",
            fix="Copy the file again, or train it again:  y7 train --qat --weights WEIGHTS --data D.yaml",
        ) from error


def _damaged(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{path.name} is a damaged or truncated safetensors file ({str(error)[:200]!a}).",
        fix="Copy or download the file again, and compare its size with the original.",
    )


def _refuse_training_state(path: Path, names: Iterable[str]) -> None:
    if {"ema.model", "model.model"} <= {".".join(name.split(".", 2)[:2]) for name in names}:
        raise LoadError(
            f"{path.name} is the state from which a training run is resumed, not a weights file.",
            fix=f"Use the weights beside it:  {path.parent / 'best.safetensors'}",
        )


def _widened(tensor: torch.Tensor) -> NumberArray:
    """Return the array of a tensor; NumPy has no bfloat16, so every float becomes float32."""
    array: NumberArray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def _key_order(text: str) -> list[str]:
    try:
        order = parse_json(text)
    except ValueError:
        return []
    return [key for key in order if isinstance(key, str)] if isinstance(order, list) else []


def _read_torch(path: Path) -> _Contents:
    with TorchFile(path) as file:
        weights = _weights(file.root, path.name)
        if isinstance(weights, Module):
            facts = read_modules(weights, source=path.name)
            entries, names, activations = facts.tensors, facts.names, facts.activations
        else:
            entries, names, activations = _plain_entries(weights, path.name), None, frozenset[str]()
        if names is None and isinstance(file.root, dict):
            names = file.root.get("names")
        arrays = {key: file.array(entry) for key, entry in _official_names(entries).items()}
    return _Contents(arrays=_with_counters(arrays), names=names, activations=activations)


def _weights(root: object, source: str) -> Module | dict[object, object]:
    """Return the part of a file that contains the weights (official rule: the moving average if present)."""
    if isinstance(root, Module):
        return root
    if isinstance(root, dict):
        found = _find_weights(root)
        if found is not None:
            return found
        keys = ", ".join(ascii(key[:40])[:40] for key in list(root)[:8] if isinstance(key, str))
        raise CheckpointError(f"{source} contains no weights: neither ema nor model among [{keys}].", fix=_SAVE_AGAIN)
    raise CheckpointError(f"{source} contains a {type(root).__name__} instead of weights.", fix=_SAVE_AGAIN)


def _find_weights(root: dict[object, object], depth: int = 0) -> Module | dict[object, object] | None:
    """Return a module or state dict at one of the usual keys, which may be nested, or the dict itself."""
    for key in _WEIGHT_KEYS:
        value = root.get(key)
        if isinstance(value, Module):
            return value
        if isinstance(value, dict) and value:
            return (_find_weights(value, depth + 1) if depth < _MAX_NESTING else None) or value
    return root if any(isinstance(value, TensorEntry) for value in root.values()) else None


def _plain_entries(weights: dict[object, object], source: str) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    _check_count(len(weights), source)
    for key, entry in weights.items():
        if not isinstance(key, str) or not isinstance(entry, TensorEntry):
            raise CheckpointError(
                f"{short_repr(key)} in the state dict of {source} is a {type(entry).__name__}, not a tensor.",
                fix=_SAVE_AGAIN,
            )
        entries[key] = entry
    return entries


def _check_count(tensors: int, source: str) -> None:
    if tensors > MAX_TENSORS:
        raise CheckpointError(
            f"{source} has {tensors} tensors; no YOLOv7 network has more than {MAX_TENSORS}.", fix=_SAVE_AGAIN
        )


def _official_names(entries: Mapping[str, _T]) -> dict[str, _T]:
    """Return the entries under official names, `model.0.conv.weight`.

    Names of wrapper modules are removed at every level, and so is any other common prefix before `model.N.`. The
    layers alone, saved as `0.conv.weight`, get the prefix `model.`.
    """
    named = {_without_wrappers(key): entry for key, entry in entries.items() if key not in _NOT_WEIGHTS}
    if len(named) < len(entries) - sum(key in _NOT_WEIGHTS for key in entries):
        return dict(entries)
    if named and all(_LAYER.match(key) for key in named):
        return {f"model.{key}": entry for key, entry in named.items()}
    starts = {key: found.start("name") if (found := _OFFICIAL.search(key)) else 0 for key in named}
    if len({key[:start] for key, start in starts.items()}) == 1:
        return {key[starts[key] :]: entry for key, entry in named.items()}
    return named


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _with_counters(arrays: Mapping[str, NumberArray]) -> dict[str, NumberArray]:
    """Add `num_batches_tracked` where a BatchNorm layer lacks it: no variant uses it, and some programs drop it."""
    complete: dict[str, NumberArray] = {}
    for key, array in arrays.items():
        complete[key] = array
        counter = f"{key.removesuffix(_VARIANCE)}{_COUNTER}"
        if key.endswith(_VARIANCE) and counter not in arrays:
            complete[counter] = np.zeros((), dtype=np.int64)
    return complete


def _tensor(key: str, array: NumberArray, source: str) -> torch.Tensor:
    if array.dtype.kind not in "fiub":
        raise CheckpointError(
            f"{ascii(key[:80])[:80]} in {source} has the unsupported dtype {array.dtype}.", fix=_SAVE_AGAIN
        )
    is_integer = key.endswith(_COUNTER) or array.dtype.kind != "f"
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.array(array, dtype=np.int64 if is_integer else np.float32)
    finite = np.isfinite(array) & np.isfinite(values)
    if not finite.all():
        name = ascii(key[:80])[:80]
        raise CheckpointError(
            f"{name} in {source} has {finite.size - int(finite.sum())} values that are not finite float32.",
            fix="Training diverged: use an earlier checkpoint.",
        )
    return torch.from_numpy(values)


def _variant(architecture: Architecture, contents: _Contents, source: str) -> str:
    """Return the variant; only the activation (or the metadata) distinguishes tiny from tiny-silu."""
    activations = contents.activations - {"Identity"}
    variant = architecture.variant
    if variant == TINY and (activations == {"SiLU"} or contents.variant == _TINY_SILU):
        variant = _TINY_SILU
    expected = "LeakyReLU" if variant == TINY else "SiLU"
    if activations and activations != {expected}:
        raise CheckpointError(
            f"{source} has the layers of {variant} with {', '.join(sorted(activations))} activations, not {expected}.",
            fix="The same weights with another activation are another network; no variant fits this one.",
        )
    if contents.variant not in ("", variant):
        raise CheckpointError(
            f"The metadata of {source} names {short_repr(contents.variant)}, but its tensors are {variant}.",
            fix="Save it again.",
        )
    return variant


def _training_size(metadata: ModelMetadata | None, architecture: Architecture, source: str) -> int | None:
    """Return the training size in the metadata, which must suit the network in the file."""
    size, stride = metadata.training_size if metadata else None, 8 << (architecture.levels - 1)
    if size is not None and size % stride:
        raise CheckpointError(
            f"The metadata of {source} gives the training size {size}, not a multiple of this network's stride "
            f"{stride}.",
            fix="Save it again.",
        )
    return size


def _class_names(names: object, classes: int, source: str) -> tuple[str, ...]:
    """Return the names in the file; if it has none, COCO's for 80 classes, else `class_0`, `class_1`, ..."""
    if names is None:
        return COCO_NAMES if classes == len(COCO_NAMES) else tuple(f"class_{i}" for i in range(classes))
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, (str, int, float)) for name in names):
        raise CheckpointError(
            f"The class names in {source} are neither a list of strings nor a dict of strings by class id 0, 1, ...",
            fix="Set  checkpoint['model'].names = ['first', 'second', ...]  where it was created, and save it again.",
        )
    if len(names) != classes:
        raise CheckpointError(
            f"{source} has {len(names)} class names but its head has {classes} classes.",
            fix=f"Set  checkpoint['model'].names  to {classes} names where it was created, and save it again.",
        )
    longest = max((len(name) for name in names if isinstance(name, str)), default=0)
    if longest > MAX_CLASS_NAME:  # a pickle can name one long string millions of times, and each would be copied
        raise CheckpointError(
            f"{source} has a class name of {longest} characters, more than {MAX_CLASS_NAME}.",
            fix="Do not use this file.",
        )
    # Lone surrogates of a damaged name could not be printed or written.
    return tuple(str(name).encode("utf-8", "replace").decode() for name in names)


def _anchors(arrays: Mapping[str, NumberArray], architecture: Architecture, source: str) -> Anchors:
    """Return the anchors in pixels, from the head's buffer of shape (levels, 1, 3, 1, 1, 2)."""
    key = f"model.{architecture.head}.anchor_grid"
    grid = arrays.get(key)
    levels = architecture.levels
    shape = (levels, 1, ANCHORS_PER_LEVEL, 1, 1, 2)
    if grid is None or grid.shape != shape:
        found = "missing" if grid is None else f"of shape {grid.shape}"
        raise CheckpointError(f"{key} in {source} is {found}; it must be of shape {shape}.", fix=_SAVE_AGAIN)
    pairs = grid.astype(np.float64).reshape(levels, ANCHORS_PER_LEVEL, 2).tolist()
    anchors = tuple(tuple((float(width), float(height)) for width, height in level) for level in pairs)
    if min(side for level in anchors for pair in level for side in pair) <= 0:
        raise CheckpointError(f"{key} in {source} contains an anchor that is not positive.", fix=_SAVE_AGAIN)
    return anchors
