"""What a checkpoint's pickle may build: three stand-ins, and the few functions a pickle may call, written anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**40


@dataclass(slots=True, eq=False, repr=False)
class Module:
    """Inert stand-in for a pickled `torch.nn.Module`: its class name and its attribute dict, nothing else."""

    class_name: str
    state: dict[object, object] = field(default_factory=dict)


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """A value no checkpoint reader needs (a NumPy scalar, a device); kept as a name only."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the numbers of a tensor lie: `count` elements of `kind` (`torch.HalfStorage`) in member `key`."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TensorEntry:
    """A tensor not read yet; offset and stride count elements, and every index lies inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class MalformedPickleError(Exception):
    """The pickle contradicts itself; becomes a `CheckpointError` at the door."""


def checked_key(value: object) -> object:
    """A dict key or set member: a scalar, because hashing nested tuples overflows the C stack.

    Raises:
        MalformedPickleError: It is anything else.
    """
    if value is None or isinstance(value, (str, int, float, bytes)):
        return value
    raise MalformedPickleError(f"a {type(value).__name__} as a key")


def _ordered_dict(arguments: tuple[object, ...]) -> object:
    """`OrderedDict()`, or the older `OrderedDict([[key, value], ...])`; dicts keep their order."""
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
    """`_rebuild_tensor_v2(storage, offset, size, stride, ...)`, checked to lie inside its storage."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(size), tuple(step), *_):
            shape, stride = _counts(size), _counts(step)
        case _:
            raise MalformedPickleError("a tensor of an unknown form")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS or offset < 0:
        raise MalformedPickleError("a tensor whose size and stride do not belong together")
    if math.prod(max(count, 1) for count in shape) > MAX_ELEMENTS:
        raise MalformedPickleError("a tensor larger than any")
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
