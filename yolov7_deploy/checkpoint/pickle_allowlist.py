"""Allowlist of the names that a YOLOv7 checkpoint may refer to, and their permitted uses; others are refused.

None of them is imported: the reader substitutes inert objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**40
MAX_STORAGE_KEY = 64  # characters; torch writes consecutive numbers, or addresses


@dataclass(slots=True, eq=False, repr=False)
class Module:
    """Inert placeholder for a pickled `torch.nn.Module`: its class name and its attribute dict."""

    class_name: str
    state: dict[object, object] = field(default_factory=dict)


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """A value that is not needed (a NumPy scalar, a device); only its name is kept."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Location of tensor data: `count` elements of `kind` (`torch.HalfStorage`) in archive member `key`."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TensorEntry:
    """A tensor that has not been read; offset and stride count elements, every index is inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class MalformedPickleError(Exception):
    """The pickle is inconsistent; `read_pickle` turns this into a `CheckpointError`."""


def checked_key(value: object) -> object:
    """Return a dict key or set member: a scalar, because hashing nested tuples overflows the C stack.

    Raises:
        MalformedPickleError: It is anything else.
    """
    if value is None or isinstance(value, (str, int, float, bytes)):
        return value
    raise MalformedPickleError(f"a {type(value).__name__} as a key")


def _ordered_dict(arguments: tuple[object, ...]) -> object:
    """Build `OrderedDict()`, or the older `OrderedDict([[key, value], ...])`; dicts keep their order."""
    match arguments:
        case ():
            return {}
        case (list(pairs),):
            return {checked_key(key): value for key, value in map(_pair, pairs)}
    raise MalformedPickleError("an OrderedDict of an unknown form")


def _pair(value: object) -> tuple[object, object]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return value[0], value[1]
    raise MalformedPickleError("a dict entry that is not a pair")


def _set(arguments: tuple[object, ...]) -> object:
    match arguments:
        case ():
            return set()
        case (list(members),):
            return set(map(checked_key, members))
    raise MalformedPickleError("a set of an unknown form")


def _tensor(arguments: tuple[object, ...]) -> object:
    """Build the tensor of `_rebuild_tensor_v2(storage, offset, size, stride, ...)`, inside its storage."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(size), tuple(step), *_):
            if len(size) != len(step) or len(size) > MAX_DIMENSIONS or offset < 0:
                raise MalformedPickleError("a tensor whose size and stride do not match")
            shape, stride = _counts(size), _counts(step)
        case _:
            raise MalformedPickleError("a tensor of an unknown form")
    if math.prod(max(count, 1) for count in shape) > MAX_ELEMENTS:
        raise MalformedPickleError("an implausibly large tensor")
    last = offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.count:
        raise MalformedPickleError(f"a tensor beyond the {storage.count} elements of storage {ascii(storage.key)[:40]}")
    return TensorEntry(storage, offset, shape, stride)


def _counts(values: tuple[object, ...]) -> tuple[int, ...]:
    counts = tuple(value for value in values if isinstance(value, int) and value >= 0)
    if len(counts) != len(values):
        raise MalformedPickleError("a tensor size that is not a count")
    return counts


def _parameter(arguments: tuple[object, ...]) -> object:
    if arguments and isinstance(arguments[0], TensorEntry):
        return arguments[0]
    raise MalformedPickleError("a parameter without a tensor")


def _size(arguments: tuple[object, ...]) -> object:
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return tuple(arguments[0])
    raise MalformedPickleError("a size of an unknown form")


CALLS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "__builtin__.set": _set,
    "__builtin__.frozenset": _set,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


Role = Literal["module", "storage", "call", "inert"]


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A class or function on the stack: its dotted name, and its only permitted use.

    `module` may be instantiated without arguments, `storage` may appear in a persistent id, `call` may be called (a
    function of this module replaces it), `inert` may be called and gives an `Inert` value.
    """

    name: str
    role: Role


_MODULES = {
    "models.yolo": "Model Detect IDetect IAuxDetect IBin IKeypoint MT",
    "models.common": "Conv Concat MP SP SPPCSPC RepConv ReOrg DownC Shortcut ImplicitA ImplicitM ImplicitC Chuncat "
    "Foldcut SPP SPPF Focus Contract Expand DWConv GhostConv RobustConv RobustConv2 Stem Bottleneck BottleneckCSPA "
    "BottleneckCSPB BottleneckCSPC RepConv_OREPA autoShape NMS Classify",
    "models.experimental": "CrossConv Sum MixConv2d Ensemble End2End ONNX_ORT ONNX_TRT ORT_NMS TRT_NMS",
    "torch.nn.modules.container": "Sequential ModuleList ModuleDict",
    "torch.nn.modules.conv": "Conv2d ConvTranspose2d",
    "torch.nn.modules.batchnorm": "BatchNorm2d SyncBatchNorm",
    "torch.nn.modules.activation": "SiLU LeakyReLU ReLU ReLU6 Hardswish Mish Sigmoid GELU",
    "torch.nn.modules.pooling": "MaxPool2d AvgPool2d AdaptiveAvgPool2d",
    "torch.nn.modules.upsampling": "Upsample UpsamplingNearest2d",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.padding": "ZeroPad2d",
    "torch.nn.modules.dropout": "Dropout Dropout2d",
    "torch.nn.parallel.data_parallel": "DataParallel",
    "torch.nn.parallel.distributed": "DistributedDataParallel",
}
_STORAGES = {
    "torch": "HalfStorage FloatStorage DoubleStorage BFloat16Storage LongStorage IntStorage ShortStorage CharStorage "
    "ByteStorage BoolStorage"
}
_INERT = {
    "numpy": "ndarray dtype",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "_codecs": "encode",
    "torch": "device",
    "pathlib": "PosixPath WindowsPath",
    "pathlib._local": "PosixPath WindowsPath",
}
_CALLS = {
    "collections": "OrderedDict",
    "builtins": "set frozenset",
    "__builtin__": "set frozenset",
    "torch": "Size",
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_parameter _rebuild_parameter_with_state",
}


def _table() -> dict[tuple[str, str], GlobalName]:
    roles: tuple[tuple[dict[str, str], Role], ...] = (
        (_MODULES, "module"),
        (_STORAGES, "storage"),
        (_INERT, "inert"),
        (_CALLS, "call"),
    )
    return {
        (module, name): GlobalName(f"{module}.{name}", role)
        for names, role in roles
        for module, listed in names.items()
        for name in listed.split()
    }


KNOWN_NAMES = _table()
