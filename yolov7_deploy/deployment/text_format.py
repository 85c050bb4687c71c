"""Protobuf messages in text format, as Triton reads them from `config.pbtxt`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_PRINTABLE = range(0x20, 0x7F)
_ESCAPES = {ord('"'): '\\"', ord("\\"): "\\\\"}


class Symbol(str):
    """The name of a value of an enumeration, which is written without quotes."""

    __slots__ = ()


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
