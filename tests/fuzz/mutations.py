"""Damage to bytes, text and JSON; every change comes from one random generator, so a seed determines the file."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

Bytes = Sequence[bytes]
Mutator = Callable[[random.Random, bytes, Bytes], bytes]

# Lengths, counts and numbers that break readers: signs, powers of two, values out of range for float64 and int64.
EDGES = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
NUMBERS = (
    *(*EDGES, -1, -2, -(2**31), -(2**63), 10**18, 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "é" * 300,
    "x" * 70_000,
    "../../..",
    "/",
    "~",
    "~no-such-user",
    "nan",
    "1e999",
    *("\x1b]0;title\x07", "\x1b[2J", "\u202egpj.exe", "\u2028", "a\nb", "\x9b1m", "\ufeff", "x" * 2_000_000),
)
WORDS = (
    *(b"null", b"true", b"[]", b"{}", b'""', b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 25, b"9" * 5000, b"**", b"*"),
    *(b"[", b"?", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"~", b"~x/", b"/dev/null", b"http://[", b"0:0", b"!!binary x"),
    *(b"<<: *a", b"&a", b"*a", b"!!python/name:os.system", b"2001-99-99", b"1:1:1", b"---", b"\t", b"\r", b"%"),
)
LARGEST = 4 * 2**20  # maximum size of a damaged file, so that its size cannot be the problem


def mutate_bytes(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return data with one to six changes; rarely only noise, or nothing."""
    kind = rng.random()
    if kind < 0.02:
        return b""
    if kind < 0.05:
        return data[: rng.choice((0, 1, 2, 4, 8, 16))] + rng.randbytes(rng.randrange(400))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_CHANGES)(rng, changed, others)
        del changed[LARGEST:]
    return bytes(changed)


def _position(rng: random.Random, data: bytearray) -> int:
    """Return a position, half of the time in the first or last hundred bytes, where headers and tables are."""
    if not data:
        return 0
    near = min(len(data), 100)
    return rng.choice((rng.randrange(near), len(data) - 1 - rng.randrange(near), *(rng.randrange(len(data)),) * 2))


def span(rng: random.Random, data: bytearray) -> tuple[int, int]:
    """Return start and end of up to 4096 bytes."""
    start = _position(rng, data)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 12)))


def _truncate(rng: random.Random, data: bytearray, _: Bytes) -> None:
    del data[_position(rng, data) :]


def _flip_bits(rng: random.Random, data: bytearray, _: Bytes) -> None:
    for _bit in range(min(len(data), rng.choice((1, 1, 2, 8, 64)))):
        data[_position(rng, data)] ^= 1 << rng.randrange(8)


def _set_bytes(rng: random.Random, data: bytearray, _: Bytes) -> None:
    for _byte in range(min(len(data), rng.choice((1, 1, 2, 8)))):
        data[_position(rng, data)] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))


def _insert(rng: random.Random, data: bytearray, _: Bytes) -> None:
    at = _position(rng, data)
    data[at:at] = rng.choice((rng.randbytes(rng.randrange(64)), bytes(rng.randrange(2000)), rng.choice(WORDS)))


def _delete(rng: random.Random, data: bytearray, _: Bytes) -> None:
    start, stop = span(rng, data)
    del data[start:stop]


def _repeat(rng: random.Random, data: bytearray, _: Bytes) -> None:
    start, stop = span(rng, data)
    times = rng.choice((1, 1, 2, 50))
    at = rng.choice((stop, _position(rng, data)))
    data[at:at] = data[start:stop] * times


def _fill(rng: random.Random, data: bytearray, _: Bytes) -> None:
    start, stop = span(rng, data)
    data[start:stop] = rng.choice((b"\0", b"\xff")) * (stop - start)


def _splice(rng: random.Random, data: bytearray, others: Bytes) -> None:
    if others and data:
        other = rng.choice(others)
        at = _position(rng, data)
        source = rng.choice((at, rng.randrange(len(other) + 1)))
        data[at:] = other[source:]


def _edit_number(rng: random.Random, data: bytearray, _: Bytes) -> None:
    """Overwrite 1, 2, 4 or 8 bytes, which may be a size, with an edge value in either byte order."""
    width = rng.choice((1, 2, 4, 8))
    at = _position(rng, data)
    if rng.random() < 0.3:
        at -= at % width
    value = rng.choice((*EDGES, rng.randrange(1 << 20), len(data) + rng.randrange(-9, 9)))
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))


_CHANGES: tuple[Callable[[random.Random, bytearray, Bytes], None], ...] = (
    _truncate,
    _flip_bits,
    _set_bytes,
    _insert,
    _delete,
    _repeat,
    _fill,
    _splice,
    _edit_number,
    _edit_number,
)


def mutate_text(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return text with changed words, numbers and lines, or one time in four with changed bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data, others)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(5)
        lines = data.splitlines(keepends=True)
        if kind == 0 and lines:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines) * rng.choice((1, 1, 100)))
            data = b"".join(lines)
        elif kind == 1 and lines:
            lines.pop(rng.randrange(len(lines)))
            data = b"".join(lines)
        elif kind == 2:
            data = _replaced(rng, data, rb"-?\d[\d.]*", str(rng.choice(NUMBERS)).encode())
        elif kind == 3:
            data = _replaced(rng, data, rb"[^\s,:\[\]{}]+", rng.choice(WORDS))
        else:
            depth = rng.choice((5, 500, 20_000))
            data = _replaced(rng, data, rb"[^\s:]+", rng.choice((b"[", b"{a: ", b'{"a":', b"- ")) * depth)
        data = data[:LARGEST]
    return data


# Tags that do not fit most values, and the values that they fit least.
YAML_TAGS = (
    *(
        b"!!float",
        b"!!int",
        b"!!bool",
        b"!!null",
        b"!!timestamp",
        b"!!binary",
        b"!!omap",
        b"!!pairs",
        b"!!set",
        b"!!str",
    ),
    *(b"!!seq", b"!!map", b"!!merge", b"!!value", b"!!python/tuple", b"!!python/object/apply:os.system", b"!own", b"!"),
)
YAML_VALUES = (
    *(
        b"",
        b"''",
        b"-",
        b"0x",
        b"0b",
        b"1:x",
        b"_",
        b".",
        b"[]",
        b"{}",
        b"[[a, b]]",
        b"1:1" + b":59" * 400,
        b"2001-1-1",
    ),
    *(b"9" * 5000, b"1" + b":59" * 100_000, b"&a [*a]", b"0o" + b"7" * 500, b"'" + b"x" * 100_000 + b"'"),
)


def mutate_yaml(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return YAML with other tags, or with anchors that aliases and merges repeat; half of the time `mutate_text`."""
    kind = rng.randrange(6)
    if kind < 3:
        return mutate_text(rng, data, others)
    if kind == 3:
        tagged = rng.choice(YAML_TAGS) + b" " + rng.choice((*YAML_VALUES, b"", b""))
        return _replaced(rng, data, rb"(?<=[\s\[{,])[^\s,:\[\]{}]+", tagged)[:LARGEST]
    return (_aliases(rng) + data)[:LARGEST] if rng.random() < 0.5 else (data + _aliases(rng))[:LARGEST]


def _aliases(rng: random.Random) -> bytes:
    """Return lines in which a few anchors are repeated, often exponentially, under keys that are read or not."""
    depth, width = rng.choice((1, 2, 5, 12)), rng.choice((2, 2, 2, 10, 10, 10, 1000))
    first = rng.choice(
        (b"x", b"'" + b"x" * rng.choice((10, 10, 10, 100_000)) + b"'", b"[]", b"{k: 1}", b"1", b"!!set {a, b}")
    )
    last = rng.choice((b"names", b"val", b"train", b"path", b"nc", b"lr0", b"unused"))
    lines = [b"a0: &a0 " + first]
    for level in range(1, depth + 1):
        repeated = b", ".join([b"*a%d" % (level - 1)] * width)
        value = rng.choice((b"[%s]", b"{<<: [%s]}", b"[%s]")) % repeated
        lines.append(b"%s: &a%d %s" % (last if level == depth else b"a%d" % level, level, value))
    return b"\n" + b"\n".join(lines) + b"\n"


def _replaced(rng: random.Random, data: bytes, pattern: bytes, by: bytes) -> bytes:
    found = list(re.finditer(pattern, data))
    if not found:
        return data + by
    start, stop = rng.choice(found).span()
    return data[:start] + by + data[stop:]


def mutate_json(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return a changed document: values of wrong types, huge numbers, missing or repeated items, deep nesting."""
    if rng.random() < 0.15:
        return mutate_text(rng, data, others)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        document = changed_value(rng, document)
    try:
        return json.dumps(document).encode()[:LARGEST]
    except RecursionError:  # nested in several places
        return data.replace(b"{", b"[" * 100_000, 1)


def changed_value(rng: random.Random, document: Any) -> Any:
    """Return a document with one change; `document` itself may be changed."""
    entries = _entries(document) if isinstance(document, (dict, list)) else []
    # The complete document is replaced rarely, because that tests little.
    container, key, value = rng.choice(entries) if entries and rng.random() < 0.98 else (None, None, document)
    new = _other_value(rng, value)
    if container is None:
        return new
    kind = rng.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.25 and isinstance(container, list):
        container.insert(key, value)
    elif kind < 0.25:
        container[rng.choice(TEXTS)] = container.pop(key)
    else:
        container[key] = new
    return document


def _entries(document: Any) -> list[tuple[Any, Any, Any]]:
    found, waiting = [], [document]
    while waiting:
        container = waiting.pop()
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in pairs:
            found.append((container, key, value))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def _other_value(rng: random.Random, value: Any) -> Any:
    kind = rng.randrange(8)
    if kind == 0 and isinstance(value, (int, float)) and abs(value) < 2**60:
        return value * rng.choice((2, -1, 1000)) + rng.choice((0, 1, 0.5))
    if kind == 1:
        return [] if rng.random() < 0.5 else {}
    if kind == 2:
        return [value] * rng.choice((1, 2, 17))
    if kind == 3:
        return _nested(rng, value)
    if kind == 4:
        return {"a": value}
    if kind == 5:
        return rng.choice((None, True, False))
    return rng.choice(NUMBERS) if kind == 6 else rng.choice(TEXTS)


def _nested(rng: random.Random, value: Any) -> Any:
    """Nest a value, mostly less deeply than the limit of Python's JSON writer."""
    for _ in range(rng.choice((1, 30, 200, 850))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value
