"""Dataclasses from parsed JSON, checked against their annotations (inverse of `dataclasses.asdict`), and SHA-256."""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from yolov7_deploy._bounded_read import MAX_CHECKPOINT_BYTES, open_file

MAX_REPR = 80  # characters of a wrong value in a message
MAX_JSON = 2**24  # characters of metadata, records and reports: their values take up to 33 times as much memory
_MAX_INT = 2**63 - 1

T = TypeVar("T")


def parse_json(text: str | bytes, *, strict: bool = True) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value of a JSON document; with `strict=False`, its texts may have control characters.

    Raises:
        ValueError: It is damaged, nested too deeply, or longer than `MAX_JSON`.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"it has {len(text)} characters of JSON, more than {MAX_JSON}")
    try:
        return json.loads(text, strict=strict)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def from_dict(kind: type[T], raw: dict[str, Any]) -> T:
    """Return a dataclass from its `asdict` after a round trip through JSON; unknown keys are ignored.

    Raises:
        ValueError: A field is missing or of another type; the message names it.
    """
    return kind(**field_values(kind, raw))


def field_values(kind: type, raw: dict[str, Any], *, exclude: str = "") -> dict[str, Any]:
    """Return values for the fields of a dataclass, except the one called `exclude`.

    Raises:
        ValueError: A field is missing or of another type; the message names it.
    """
    hints = _type_hints(kind)
    values = {}
    for member in fields(kind):
        if member.name == exclude:
            continue
        if member.name in raw:
            values[member.name] = _typed(hints[member.name], raw[member.name], member.name)
        elif member.default is MISSING and member.default_factory is MISSING:
            raise ValueError(f"{member.name} is missing")
    return values


def short_repr(value: object) -> str:
    """Return a repr that is short enough for a message, however long or deep the value is."""
    return reprlib.repr(value)[:MAX_REPR]


def sha256_hex(data: bytes | Path) -> str:
    """Return the SHA-256 of bytes, or of the content of a file, in hexadecimal.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    with open_file(data, max_bytes=MAX_CHECKPOINT_BYTES) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@lru_cache
def _type_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)  # 50 us; a document can have 100,000 objects


def _typed(hint: Any, value: Any, name: str) -> Any:  # noqa: ANN401 - any annotation of a field, any JSON value
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(option for option in arguments if option is not type(None))
        return None if value is None else _typed(inner, value, name)
    if get_origin(hint) is tuple and isinstance(value, list):
        each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(each) == len(value):
            return tuple(_typed(each[i], item, f"{name}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is Literal and isinstance(value, str) and value in arguments:
        return value
    if is_dataclass(hint) and isinstance(value, dict):
        return from_dict(cast("type[Any]", hint), value)
    if hint is float:
        # Python reads Infinity and NaN, which JSON does not have.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        raise ValueError(f"{name} is {short_repr(value)}")
    if hint is str and isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # lone surrogates could not be printed or written
    # Integers of JSON have no limit; larger ones than any size or count cannot be converted to floats for a message.
    is_huge = isinstance(value, int) and abs(value) > _MAX_INT
    if isinstance(hint, type) and type(value) is hint and not is_huge:
        return value
    raise ValueError(f"{name} is {short_repr(value)}")
