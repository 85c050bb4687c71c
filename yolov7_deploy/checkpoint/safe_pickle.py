"""Reader for the pickle inside a torch file that executes nothing.

A pickle is a program: the standard unpickler imports and calls whatever the file names. This module is a small stack
machine that implements only the opcodes that describe data. It builds numbers, text, lists, dicts, sets and the
placeholders of `pickle_allowlist`, and refuses every name that is not in the allowlist. Nothing that the file names is
imported, constructed or called, so a malicious file can at worst be refused.

Bytes and nesting are bounded, and one budget counts every opcode and every element that is created or copied: a list
of a million entries is cheap to name again, and expensive to copy again. Integers have at most 64 bits; dict keys and
set members are scalars (hashing a deeply nested tuple overflows the C stack). The result may still be shared or cyclic,
and printing it may not terminate: code that walks it must count its steps.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NoReturn, TypeVar

from yolov7_deploy.checkpoint.pickle_allowlist import (
    CALLS,
    KNOWN_NAMES,
    MAX_STORAGE_KEY,
    GlobalName,
    Inert,
    MalformedPickleError,
    Module,
    Storage,
    TensorEntry,
    checked_key,
)
from yolov7_deploy.errors import CheckpointError, UnsafeCheckpointError

# The official yolov7_training.pt takes 0.16 MB and 103,000 steps; E6E with EMA and optimizer about six times that.
MAX_BYTES = 32 * 2**20
MAX_STEPS = 2_000_000  # opcodes, and elements that are created or copied
MAX_NESTING = 1_000
MAX_INT_BYTES = 9

_SHOWN = 120
_Container = TypeVar("_Container")


def read_pickle(data: bytes, *, source: str, check_storage: Callable[[Storage], None]) -> object:
    """Return the value that a pickle describes: plain data, `Module`, `Inert` and `TensorEntry`.

    Args:
        data: The whole pickle; protocols 2 to 5.
        source: Name for messages.
        check_storage: Called with every storage the pickle names, before any tensor uses it; raises to refuse it.

    Raises:
        UnsafeCheckpointError: It refers to a class or function that is not allowed; the message names it.
        CheckpointError: It is damaged, or larger than any checkpoint.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(
            f"The pickle inside {source} has {len(data)} bytes; YOLOv7 checkpoints stay under {MAX_BYTES}.",
            fix="Save the weights alone:  torch.save(model.state_dict(), 'weights.pt')",
        )
    machine = _Machine(data, source, check_storage)
    try:
        return machine.run()
    except (MalformedPickleError, IndexError, KeyError, ValueError, TypeError, struct.error, MemoryError) as error:
        reason = str(error) if isinstance(error, MalformedPickleError) else type(error).__name__
        raise CheckpointError(
            f"The pickle inside {source} is damaged at byte {machine.at} ({reason}).",
            fix="Copy or download the file again, and compare its size with the original.",
        ) from error


_CONSTANTS: dict[bytes, object] = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_EMPTY: dict[bytes, Callable[[], object]] = {b"]": list, b"}": dict, b"\x8f": set}
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_TEXTS = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q"}
_BYTES = {b"B": "<I", b"C": "<B", b"\x8e": "<Q", b"U": "<B"}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_GETS = {b"h": "<B", b"j": "<I"}
_PUTS = {b"q": "<B", b"r": "<I"}
_SKIPS = {b"\x80": 1, b"\x95": 8}
_EXTENSIONS = {b"\x82": "<B", b"\x83": "<H", b"\x84": "<i"}


class _Machine:
    """Stack machine of one pickle: stack, marks and memo."""

    def __init__(self, data: bytes, source: str, check_storage: Callable[[Storage], None]) -> None:
        self.data = data
        self.source = source
        self.check_storage = check_storage
        self.at = 0
        self.steps = 0
        self.stack: list[object] = []
        self.outer: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        while True:
            self.spend(1)
            opcode = self.take(1)
            if opcode == b".":
                return self.stack.pop()
            if not self.push_value(opcode):
                action = _ACTIONS.get(opcode)
                if action is None:
                    self.refuse_opcode(opcode)
                action(self)

    def spend(self, count: int) -> None:
        """Count opcodes, and elements that are created or copied."""
        self.steps += count
        if self.steps > MAX_STEPS:
            raise MalformedPickleError(f"more than {MAX_STEPS} opcodes and elements")

    def push_value(self, opcode: bytes) -> bool:
        """Execute an opcode that pushes one value; return False for any other opcode."""
        stack = self.stack
        if opcode in _GETS:
            stack.append(self.memo[self.number(_GETS[opcode])])
        elif opcode in _PUTS:
            self.memo[self.number(_PUTS[opcode])] = stack[-1]
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS:
            stack.append(struct.unpack(_NUMBERS[opcode], self.take(struct.calcsize(_NUMBERS[opcode])))[0])
        elif opcode in _TEXTS:
            stack.append(self.take(self.number(_TEXTS[opcode])).decode("utf-8", "surrogatepass"))
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            self.spend(_TUPLES[opcode])
            stack[-_TUPLES[opcode] :] = [tuple(self.last(_TUPLES[opcode]))]
        elif opcode in _BYTES:
            stack.append(self.take(self.number(_BYTES[opcode])))
        elif opcode in _SKIPS:
            self.take(_SKIPS[opcode])
        else:
            return False
        return True

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise MalformedPickleError("unexpected end of data")
        chunk = self.data[self.at : end]
        self.at = end
        return chunk

    def number(self, layout: str) -> int:
        return int.from_bytes(self.take(struct.calcsize(layout)), "little", signed=layout[-1].islower())

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise MalformedPickleError("unexpected end of data")
        text = self.data[self.at : end].decode("utf-8", "backslashreplace")
        self.at = end + 1
        return text

    def last(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise MalformedPickleError("stack underflow")
        return self.stack[-count:]

    def mark(self) -> None:
        if len(self.outer) >= MAX_NESTING:
            raise MalformedPickleError(f"nested deeper than {MAX_NESTING}")
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        items, self.stack = self.stack, self.outer.pop()
        self.spend(len(items))
        return items

    def push_tuple(self) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def push_frozenset(self) -> None:
        items = frozenset(map(checked_key, self.since_mark()))
        self.stack.append(items)

    def push_long(self) -> None:
        size = self.number("<B")
        if size > MAX_INT_BYTES:
            raise MalformedPickleError(f"an integer of {size} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def pop(self) -> None:
        self.stack.pop()

    def pop_mark(self) -> None:
        self.since_mark()

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def append(self) -> None:
        value = self.stack.pop()
        self.target(list).append(value)

    def appends(self) -> None:
        items = self.since_mark()
        self.target(list).extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.target(dict)[checked_key(key)] = value

    def set_items(self) -> None:
        items = self.since_mark()
        self.target(dict).update(zip(map(checked_key, items[::2]), items[1::2], strict=True))

    def add_items(self) -> None:
        items = self.since_mark()
        self.target(set).update(map(checked_key, items))

    def target(self, kind: type[_Container]) -> _Container:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise MalformedPickleError(f"items for a {type(value).__name__}")
        return value

    def push_global(self) -> None:
        module, name = self.line(), self.line()
        self.stack.append(self.find(module, name))

    def push_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedPickleError("a name that is not text")
        self.stack.append(self.find(module, name))

    def find(self, module: str, name: str) -> GlobalName:
        found = KNOWN_NAMES.get((module, name))
        if found is None:
            self.refuse(f"{module}.{name}")
        return found

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, GlobalName):
            self.refuse(f"a call of a {type(function).__name__}")
        if not isinstance(arguments, tuple):
            raise MalformedPickleError("call arguments that are not a tuple")
        if function.role == "inert":
            self.stack.append(Inert(function.name))
        elif function.role == "call":
            self.spend(sum(map(_elements, arguments)))  # a call copies its arguments
            self.stack.append(CALLS[function.name](arguments))
        else:
            self.refuse(f"a call of {function.name}")

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, GlobalName):
            self.refuse(f"an instance of a {type(kind).__name__}")
        if kind.role != "module" or arguments != ():
            self.refuse(f"an instance of {kind.name} with arguments" if arguments else f"an instance of {kind.name}")
        self.stack.append(Module(kind.name))

    def build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, Module):
            if not isinstance(state, dict):
                raise MalformedPickleError(f"state of {value.class_name} that is not a dict")
            value.state = state
        elif not isinstance(value, (dict, Inert, TensorEntry)):
            # An OrderedDict brings its `_metadata` here and a parameter its attributes; they are not needed.
            name = value.name if isinstance(value, GlobalName) else f"a {type(value).__name__}"
            self.refuse(f"a change of state of {name}")

    def push_storage(self) -> None:
        """Push the storage of a persistent id; torch writes ('storage', class, key, location, element count)."""
        match self.stack.pop():
            case ("storage", GlobalName(name=kind, role="storage"), str(key), _, int(count)) if count >= 0:
                if len(key) > MAX_STORAGE_KEY:
                    raise MalformedPickleError(f"a storage whose name has {len(key)} characters")
                storage = Storage(kind, key, count)
            case _:
                self.refuse("a persistent id of an unknown form")
        self.check_storage(storage)
        self.stack.append(storage)

    def refuse_opcode(self, opcode: bytes) -> NoReturn:
        if opcode == b"i":
            module, name = self.line(), self.line()
            self.refuse(f"{module}.{name}")
        if opcode in _EXTENSIONS:
            self.refuse(f"entry {self.number(_EXTENSIONS[opcode])} of the extension registry")
        if opcode in (b"o", b"\x92", b"P"):
            kinds = {b"o": "OBJ", b"\x92": "NEWOBJ_EX", b"P": "PERSID"}
            self.refuse(f"opcode {kinds[opcode]}")
        raise MalformedPickleError(f"unknown opcode 0x{opcode.hex()}")

    def refuse(self, wanted: str) -> NoReturn:
        shown = wanted if len(wanted) <= _SHOWN else f"{wanted[:_SHOWN]}..."
        shown = shown if shown.isprintable() else ascii(shown)
        raise UnsafeCheckpointError(
            f"{self.source} refers to {shown}, which is not part of a YOLOv7 checkpoint. Nothing in it was executed.",
            fix=_advice(wanted),
        )


def _elements(argument: object) -> int:
    return 1 + (len(argument) if isinstance(argument, (list, tuple, dict, set, frozenset)) else 0)


def _advice(wanted: str) -> str:
    if wanted in ("builtins.getattr", "__builtin__.getattr"):
        return "Models pickled after fuse() refer to this: save the model before fuse(), or save model.state_dict()."
    if wanted.startswith(("models.", "torch.nn.")):
        return "A network with layers of its own cannot be deployed as a YOLOv7 variant."
    return "If you trust its author, ask for the weights only:  torch.save(model.state_dict(), 'weights.pt')"


_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"(": _Machine.mark,
    b"t": _Machine.push_tuple,
    b"\x91": _Machine.push_frozenset,
    b"\x8a": _Machine.push_long,
    b"0": _Machine.pop,
    b"1": _Machine.pop_mark,
    b"\x94": _Machine.memoize,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"\x90": _Machine.add_items,
    b"c": _Machine.push_global,
    b"\x93": _Machine.push_stack_global,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new_object,
    b"b": _Machine.build,
    b"Q": _Machine.push_storage,
}
