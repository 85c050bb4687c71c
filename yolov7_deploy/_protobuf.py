"""The wire format of protobuf, in which ONNX files are written: nested lists of (field number, value) pairs.

Production machines have no onnx. Damaged data is a ValueError or IndexError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Value = int | memoryview

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def parse_message(data: memoryview) -> dict[int, list[Value]]:
    """Return the values of every field, in order; strings, packed numbers and messages are still bytes."""
    fields: dict[int, list[Value]] = {}
    for number, value, _ in iterate_fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def iterate_fields(data: memoryview) -> Iterator[tuple[int, Value, memoryview]]:
    """Yield number and value of each field, and its bytes with both."""
    at = 0
    while at < len(data):
        start = at
        key, at = varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value: Value
            value, at = varint(data, at)
        else:
            if kind == _LENGTH:
                size, at = varint(data, at)
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                size = 8 if kind == _EIGHT_BYTES else 4
            else:
                raise ValueError(f"wire type {kind} at byte {at}")
            if not 0 <= size <= len(data) - at:
                raise ValueError(f"{size} bytes announced, {len(data) - at} left")
            value, at = data[at : at + size], at + size
        yield key >> 3, value, data[start:at]


def length_field(number: int, parts: Iterable[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the parts of a field that holds bytes, a text or a message."""
    content = list(parts)
    size = sum(len(part) for part in content)
    return [_varint_bytes(number << 3 | _LENGTH) + _varint_bytes(size), *content]


def _varint_bytes(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return a number stored in groups of seven bits, lowest first, and the position after it."""
    number = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = data[at + index]
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            signed = number - 2**64 if number >= 2**63 else number
            return signed, at + index + 1
    raise ValueError(f"a number longer than {_MAX_VARINT_BYTES} bytes")


def packed(data: memoryview) -> list[int]:
    """Return the numbers of a packed repeated field."""
    numbers: list[int] = []
    at = 0
    while at < len(data):
        number, at = varint(data, at)
        numbers.append(number)
    return numbers


def as_bytes(value: Value) -> memoryview:
    """Return the bytes of a value.

    Raises:
        ValueError: It is a number.
    """
    if isinstance(value, int):
        raise ValueError("a number instead of a message")
    return value


def decode(value: Value) -> str:
    """Return the text of a value."""
    return bytes(as_bytes(value)).decode("utf-8", "replace")


def text(fields: dict[int, list[Value]], number: int) -> str:
    """Return the last text of a field; empty without any."""
    return decode(fields[number][-1]) if number in fields else ""


def integer(fields: dict[int, list[Value]], number: int) -> int:
    """Return the last number of a field; 0 without any.

    Raises:
        ValueError: The field has bytes.
    """
    value = fields[number][-1] if number in fields else 0
    if not isinstance(value, int):
        raise ValueError("bytes instead of a number")
    return value
