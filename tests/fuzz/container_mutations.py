"""Damage inside containers whose checksums and lengths stay valid.

A reader that stops at the first wrong checksum would not be tested any further.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

from tests.fuzz.mutations import Bytes, changed_value, mutate_bytes, mutate_json, span


def mutate_zip(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return a torch file with one member damaged, renamed, missing or repeated in a valid archive."""
    if rng.random() < 0.4 or not data.startswith(b"PK"):
        return mutate_bytes(rng, data, others)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    if rng.random() < 0.2:
        at = rng.randrange(len(members))
    name, content = members[at]
    kind = rng.random()
    if kind < 0.05:
        members.pop(at)
    elif kind < 0.1:
        members[at] = (rng.choice((f"{name}.", "data.pkl", "../x", "a/data.pkl", "x/code/y", "constants.pkl")), content)
    elif kind < 0.15:
        members.insert(0, (f"other/{name}", content))
    elif kind < 0.5:
        members[at] = (name, mutate_pickle(rng, content))
    else:
        members[at] = (name, mutate_bytes(rng, content, others))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return packed.getvalue()


# Opcodes and operands to insert into a pickle: hostile calls, loops, huge lengths, marks.
_OPCODES = (
    *(
        b"cos\nsystem\n",
        b"c__builtin__\neval\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ),
    *(b"cnumpy.core.multiarray\nscalar\n", b"cmodels.yolo\nModel\n", b"cbuiltins\nset\n", b"ctorch\nSize\n"),
    *(
        b"ctorch\nFloatStorage\n",
        b"R",
        b"b",
        b"Q",
        b"\x81",
        b"\x85",
        b"\x86",
        b"\x87",
        b"(",
        b"t",
        b"1",
        b"0",
        b"2",
        b".",
    ),
    *(b"}", b"]", b"\x8f", b")", b"N", b"u", b"s", b"a", b"e", b"\x90", b"\x91", b"\x93", b"h\x00", b"h\x05", b"q\x00"),
    *(b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"X\xff\xff\xff\xff", b"B\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"\x8a\xff" + b"\x01" * 255, b"\x8b\xff\xff\xff\x7f", b"I1\n", b"L1L\n"),
    *(
        b"J\xff\xff\xff\xff",
        b"K\xff",
        b"G\x7f\xf8\0\0\0\0\0\0",
        b"(" * 2000,
        b"]" + b"\x85" * 5000,
        b"]2a" * 40,
        b"\x94",
    ),
)


def _text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


# Long names, and names that reprogram a terminal.
_NAMES = (
    b"x" * 200_000,
    b"\x1b]0;title\x07",
    b"\x1b[2J",
    "\u202e".encode(),
    b"\xed\xa0\x80",
    b"",
    b"model.0.conv.weight",
)
# A function, and a list that it copies.
_COPIES = tuple(
    (b"c" + function + b"\n", entry)
    for function, entry in (
        (b"torch\nSize", b"K\1"),
        (b"builtins\nset", b"K\1"),
        (b"__builtin__\nfrozenset", b"N"),
        (b"collections\nOrderedDict", b"K\1K\2\x86"),
        (b"torch._utils\n_rebuild_parameter", b"K\1"),
        (b"numpy\nndarray", b"K\1"),
    )
)


def copy_bomb(rng: random.Random) -> bytes:
    """Return opcodes that push a tuple of many copies of one long list, or of many references to it."""
    function, entry = rng.choice(_COPIES)
    entries, copies = rng.choice((10, 1000, 100_000)), rng.choice((2, 1000, 100_000))
    made = b"](" + entry * entries + b"er\xf0\0\0\0"
    if rng.random() < 0.2:
        return made + b"(" + b"j\xf0\0\0\0" * copies + b"t"
    arguments = b"\x85r\xf2\0\0\0"
    call = b"j\xf1\0\0\0j\xf2\0\0\0R" + rng.choice((b"", b"0"))
    return made + arguments + function + b"r\xf1\0\0\0(" + call * copies + b"t"


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """Return a pickle with inserted, replaced or copied opcodes, or with numbers set to edge values."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            changed[at:at] = rng.choice(_OPCODES)
        elif kind == 4:
            changed[at:at] = copy_bomb(rng) + rng.choice((b"0", b""))
        elif kind == 5:
            texts = [found.span() for found in re.finditer(rb"X(?s:.){4}[\w.]+", bytes(changed))]
            start, stop = rng.choice(texts or [(at, at)])
            changed[start:stop] = _text(rng.choice(_NAMES))
        elif kind == 1:
            opcode = rng.choice(_OPCODES)
            changed[at : at + len(opcode)] = opcode
        elif kind == 2:
            start, stop = span(rng, changed)
            changed[at:at] = changed[start : min(stop, start + 64)]
        else:
            integers = [found.start() for found in re.finditer(rb"[KMJ]", bytes(changed))]
            start = rng.choice(integers or [0]) + 1
            changed[start : start + 4] = struct.pack("<i", rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 3, 17, 80)))
    return bytes(changed)


def mutate_safetensors(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return a safetensors file with a changed header and a correct length field."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if rng.random() < 0.4:
        metadata = header["__metadata__"]
        key = rng.choice(list(metadata))
        value = metadata[key].encode() if key != "format" else b'"pt"'
        metadata[key] = mutate_json(rng, value, ()).decode("utf-8", "replace")
    else:
        header = changed_value(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def mutate_quantization(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return a safetensors file with changed activation ranges, or very many, or names that are very long."""
    if rng.random() < 0.1:
        return mutate_safetensors(rng, data, others)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header["__metadata__"]
    key = next(key for key in metadata if key.endswith("int8"))
    if rng.random() < 0.9:
        metadata[key] = mutate_json(rng, metadata[key].encode(), ()).decode("utf-8", "replace")
    else:
        document, name = json.loads(metadata[key]), rng.choice(("ranges", "amax"))
        document[name] *= rng.choice((3, 3000, 100_000))
        if name == "ranges" and rng.random() < 0.5:
            document[name] = [{**entry, "tensor": str(i)} for i, entry in enumerate(document[name])]
        metadata[key] = json.dumps(document)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def mutate_image(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return an image or video with a huge size, a PNG with valid checksums over damaged chunks, or changed bytes."""
    kind = rng.random()
    if kind < 0.15:
        return oversized(rng, data)
    return mutate_png(rng, data, others) if kind < 0.3 else mutate_bytes(rng, data, others)


def oversized(rng: random.Random, data: bytes, *, hw: tuple[int, int] = (48, 64)) -> bytes:
    """Replace bytes that look like the height and width by huge values."""
    width, order = rng.choice(((2, "big"), (4, "big"), (2, "little"), (4, "little"), (0, "")))
    changed = data[:2000]
    for side in hw:
        new = rng.choice((side, 3_000, 30_000, 32_767, 65_535, 1_000_000))
        if width:
            field = min(new, (1 << 8 * width) - 1).to_bytes(width, order)
            changed = changed.replace(side.to_bytes(width, order), field, rng.choice((1, 1, 2)))
        else:
            changed = changed.replace(str(side).encode(), str(new).encode(), 1)
    return _with_valid_checksum(changed + data[2000:])


def _with_valid_checksum(data: bytes) -> bytes:
    """Return a PNG with a valid header checksum; other files are returned unchanged."""
    if not data.startswith(b"\x89PNG"):
        return data
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]


def mutate_png(rng: random.Random, data: bytes, others: Bytes) -> bytes:
    """Return a PNG with damaged chunks and valid checksums."""
    if not data.startswith(b"\x89PNG"):
        return mutate_bytes(rng, data, others)
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    if rng.random() < 0.2:
        chunks.insert(index, rng.choice(chunks))
    elif rng.random() < 0.2:
        chunks[index] = (rng.choice((b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"IEND")), content)
    elif kind == b"IDAT" and rng.random() < 0.5:
        chunks[index] = (kind, zlib.compress(mutate_bytes(rng, zlib.decompress(content), ())))
    else:
        chunks[index] = (kind, mutate_bytes(rng, content, ()))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(parts)


def changed_message(rng: random.Random, root: Any) -> None:
    """Change one field of a protobuf message: a number, name or bytes, or entries of a repeated field."""
    messages = [root]
    for message in messages:
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                messages.extend(value if field.is_repeated else [value])
    message = rng.choice(messages)
    fields = [field for field, _ in message.ListFields()]
    if rng.random() < 0.1:
        fields = [field for field in message.DESCRIPTOR.fields if field.type != field.TYPE_MESSAGE]
    if not fields:
        return
    field = rng.choice(fields)
    values = getattr(message, field.name)
    if not field.is_repeated:
        if field.type == field.TYPE_MESSAGE or rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, _other_scalar(rng, field, values, messages))
        return
    at = rng.randrange(len(values)) if len(values) else 0
    kind = rng.random()
    if field.type == field.TYPE_MESSAGE:
        if kind < 0.5 and len(values):
            del values[at]
        elif len(values):
            copy = type(values[at])()
            copy.CopyFrom(values[at])
            values.insert(rng.randrange(len(values) + 1), copy)
    elif kind < 0.15 and len(values):
        del values[at]
    elif kind < 0.3 or not len(values):
        values.append(_other_scalar(rng, field, values[at] if len(values) else None, messages))
    else:
        values[at] = _other_scalar(rng, field, values[at], messages)


def _other_scalar(rng: random.Random, field: Any, value: Any, messages: Sequence[Any]) -> Any:
    """Return a value of the field's type: an edge value, or a name used elsewhere in the document."""
    if field.type == field.TYPE_STRING:
        names = [getattr(m, name) for m in messages for name in ("name", "op_type") if hasattr(m, name)]
        return rng.choice((*names, "", "x" * 5000, "a\0b", "é"))
    if field.type == field.TYPE_BYTES:
        return mutate_bytes(rng, value or b"", ())
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e38, float("inf"), float("nan"), 1e-38))
    if field.type == field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    is_unsigned = field.type in (field.TYPE_UINT64, field.TYPE_UINT32)
    limit = 2**31 if field.type in (field.TYPE_INT32, field.TYPE_UINT32) else 2**63
    near = (value or 0) + rng.choice((-1, 1, 2, 100))
    number = rng.choice((near, near, 0, 1, -1, 2, 3, 16, 17, 255, 4096, 10**6, 2**31 - 1, 2**62, -(2**31)))
    return max(0 if is_unsigned else -limit, min(limit - 1, number))
