"""A libnvinfer that runs engines, for NVIDIA's real Python bindings of TensorRT 8, 10 and 11.

The bindings call virtual functions of C++ objects: runtimes, engines and execution contexts. Here such an object is a
few words of memory with a table of functions that ctypes makes of Python functions. They answer with the objects of
`fake_trt_runtime.py`, so an engine is an ONNX file, and ONNX Runtime computes its outputs.

The position of a function in its table is from NVIDIA's public headers (class VRuntime, VCudaEngine and
VExecutionContext in include/NvInferImpl.h, branches release/8.6, 10.0 to 10.16, 11.0 and 11.1 of
github.com/NVIDIA/TensorRT). Within a major version, new functions are added at the end. A call of a function that is
not answered is a violation, and so is an object that is destroyed before what was created from it.

For x86-64: a result that does not fit into registers is memory of the caller, whose address comes before `this`.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from typing import ClassVar, NamedTuple

from tests.fakes import fake_trt_runtime

MAX_DIMS = 8
TABLE_SLOTS = 128
OBJECT_WORDS = 64
DELETING_DESTRUCTOR = 1  # position; 0 is the destructor that does not free the memory
USER_MANAGED = 2  # ExecutionContextAllocationStrategy
# Values of DataType, TensorIOMode and ILogger::Severity.
DATA_TYPES = {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "UINT8": 5, "INT64": 8}
IO_MODES = {"INPUT": 1, "OUTPUT": 2}
SEVERITIES = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}

DIMS = "Dims"  # a result in memory of the caller


class Function(NamedTuple):
    """A virtual function: its position by major version, its result, and its arguments after `this`."""

    positions: dict
    result: object
    arguments: tuple


def at(eight, ten, eleven):
    """Return the positions in TensorRT 8, 10 and 11; `None` where it does not exist."""
    return {major: position for major, position in ((8, eight), (10, ten), (11, eleven)) if position is not None}


class Interface:
    """A C++ object whose virtual functions are methods of this object, named as in `FUNCTIONS`.

    It exists until C++ destroys it.
    """

    FUNCTIONS: ClassVar[dict[str, Function]] = {}

    def __init__(self, library, parent=None):
        self.library, self.parent, self.children = library, parent, 0
        table = library.table_of(type(self))
        # The table of the interface, and a pointer to its implementation, which is the same object.
        self.memory = (c_void_p * OBJECT_WORDS)()
        self.address = ctypes.addressof(self.memory)
        self.memory[0], self.memory[1] = table, self.address
        library.objects[self.address] = self
        if parent is not None:
            parent.children += 1

    def destroyed(self):
        """C++ has destroyed the object."""
        if self.children:
            self.library.violate(f"{type(self).__name__} was destroyed before what was created from it")
        if self.parent is not None:
            self.parent.children -= 1
        del self.library.objects[self.address]


class RuntimeObject(Interface):
    """An IRuntime."""

    FUNCTIONS: ClassVar = {
        "deserialize": Function(at(2, 3, 3), c_void_p, (c_void_p, c_size_t)),
        "set_host_code_allowed": Function(at(20, 21, 20), None, (c_bool,)),
        "host_code_allowed": Function(at(21, 22, 21), c_bool, ()),
    }

    def __init__(self, library, logger):
        super().__init__(library)
        self.fake = library.trt.Runtime(Logger(logger, library.major))

    def deserialize(self, data, size):
        engine = self.fake.deserialize_cuda_engine(ctypes.string_at(data, size))
        return EngineObject(self, engine).address if engine else None

    def set_host_code_allowed(self, value):
        self.fake.engine_host_code_allowed = value

    def host_code_allowed(self):
        return self.fake.engine_host_code_allowed


class EngineObject(Interface):
    """An ICudaEngine."""

    FUNCTIONS: ClassVar = {
        "create_context": Function(at(None, 5, 5), c_void_p, (c_int32,)),
        "create_context_without_memory": Function(at(13, 6, None), c_void_p, ()),
        "memory_size": Function(at(14, 7, None), c_size_t, ()),
        "memory_size_v2": Function(at(None, 52, 44), c_int64, ()),
        "profiles": Function(at(22, 10, 8), c_int32, ()),
        "shape": Function(at(34, 19, 15), DIMS, (c_char_p,)),
        "data_type": Function(at(35, 20, 16), c_int32, (c_char_p,)),
        "io_mode": Function(at(38, 23, 19), c_int32, (c_char_p,)),
        "profile_shape": Function(at(44, 29, 25), DIMS, (c_char_p, c_int32, c_int32)),
        "tensors": Function(at(45, 30, 26), c_int32, ()),
        "name": Function(at(46, 31, 27), c_void_p, (c_int32,)),
    }

    def __init__(self, runtime, fake):
        super().__init__(runtime.library, runtime)
        self.fake = fake
        self.names = [ctypes.create_string_buffer(name.encode()) for name in fake.tensors]

    def create_context(self, strategy):
        if strategy != USER_MANAGED:
            self.library.violate("TensorRT allocates the memory of a context, and not the caller")
        return self.create_context_without_memory()

    def create_context_without_memory(self):
        context = self.fake.create_execution_context_without_device_memory()
        return ContextObject(self, context).address if context else None

    def memory_size(self):
        return self.fake.device_memory_size

    memory_size_v2 = memory_size

    def profiles(self):
        return self.fake.num_optimization_profiles

    def shape(self, name):
        return self.fake.get_tensor_shape(name.decode())

    def data_type(self, name):
        return DATA_TYPES[self.fake.get_tensor_dtype(name.decode()).name]

    def io_mode(self, name):
        return IO_MODES[self.fake.get_tensor_mode(name.decode()).name]

    def profile_shape(self, name, profile, selector):
        return self.fake.get_tensor_profile_shape(name.decode(), profile)[selector]

    def tensors(self):
        return self.fake.num_io_tensors

    def name(self, index):
        return ctypes.addressof(self.names[index])


class ContextObject(Interface):
    """An IExecutionContext."""

    FUNCTIONS: ClassVar = {
        "set_memory": Function(at(11, 10, 10), None, (c_void_p,)),
        "set_memory_v2": Function(at(None, 49, 48), None, (c_void_p, c_int64)),
        "profile": Function(at(14, 11, 11), c_int32, ()),
        "set_profile": Function(at(25, 17, 16), c_bool, (c_int32, c_void_p)),
        "set_input_shape": Function(at(29, 21, 20), c_bool, (c_char_p, c_void_p)),
        "shape": Function(at(30, 22, 21), DIMS, (c_char_p,)),
        "set_address": Function(at(32, 24, 23), c_bool, (c_char_p, c_void_p)),
        "enqueue": Function(at(44, 37, 36), c_bool, (c_void_p,)),
    }

    def __init__(self, engine, fake):
        super().__init__(engine.library, engine)
        self.fake = fake

    def destroyed(self):
        super().destroyed()
        self.fake.engine.alive.discard(self.fake)  # it may be referenced by queued work

    def set_memory(self, address):
        self.fake.set_device_memory(address, fake_trt_runtime.SCRATCH_BYTES)

    def set_memory_v2(self, address, nbytes):
        self.fake.set_device_memory(address, nbytes)

    def profile(self):
        return self.fake.active_optimization_profile

    def set_profile(self, profile, stream):
        return self.fake.set_optimization_profile_async(profile, stream)

    def set_input_shape(self, name, dims):
        return self.fake.set_input_shape(name.decode(), self.library.read_dims(dims))

    def shape(self, name):
        return self.fake.get_tensor_shape(name.decode())

    def set_address(self, name, address):
        return self.fake.set_tensor_address(name.decode(), address)

    def enqueue(self, stream):
        return self.fake.execute_async_v3(stream)


class Logger:
    """TensorRT's ILogger, a C++ object that the bindings created."""

    POSITION: ClassVar = at(0, 0, 4)  # of `log`; from 11.0 on, functions of IVersionedInterface come first

    def __init__(self, address, major):
        self.address = address
        table = ctypes.cast(address, ctypes.POINTER(ctypes.POINTER(c_void_p))).contents
        self.function = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p)(table[self.POSITION[major]])

    def log(self, severity, text):
        self.function(self.address, SEVERITIES[severity.name], text.encode())


class FunctionalNvinfer:
    """The functional libnvinfer of this process.

    Args:
        major: Version of the bindings, 8, 10 or 11.

    Attributes:
        trt: The `FakeTrt` that runtimes of the bindings use. Violations are added to its list.
        objects: The objects that C++ has not destroyed, by their address.
    """

    def __init__(self, major):
        self.major, self.trt, self.objects = major, None, {}
        self._tables: dict[type, object] = {}
        self._kept: list[object] = []
        size = c_int32 if major == 8 else c_int64
        self._dims = type("Dims", (ctypes.Structure,), {"_fields_": [("count", c_int32), ("sizes", size * MAX_DIMS)]})
        self._library = ctypes.CDLL(f"libnvinfer.so.{major}")
        self._library.nvinfer_type.restype = c_void_p
        create = ctypes.CFUNCTYPE(c_void_p, c_void_p)(self._guarded(lambda logger: RuntimeObject(self, logger).address))
        self._kept.append(create)
        self._library.nvinfer_use_runtimes(create)

    def violate(self, text):
        """Record a call with undefined behavior."""
        self.trt.violations.append(text)

    def table_of(self, interface):
        """Return the address of the first function in the table of an interface."""
        if interface not in self._tables:
            self._tables[interface] = self._new_table(interface)
        return ctypes.addressof(self._tables[interface]) + 2 * ctypes.sizeof(c_void_p)

    def _new_table(self, interface):
        # Before the functions: the offset of the whole object, and its type, which the bindings ask for.
        table = (c_void_p * (2 + TABLE_SLOTS))(0, self._library.nvinfer_type())
        functions = {slot: self._unanswered(interface, slot) for slot in range(TABLE_SLOTS)}
        functions[DELETING_DESTRUCTOR] = self._method(Function({}, None, ()), lambda one: one.destroyed())
        for name, function in interface.FUNCTIONS.items():
            if self.major in function.positions:
                call = self._method(function, lambda one, *values, name=name: getattr(one, name)(*values))
                functions[function.positions[self.major]] = call
        self._kept += functions.values()
        for slot, function in functions.items():
            table[2 + slot] = ctypes.cast(function, c_void_p).value
        return table

    def _method(self, function, call: Callable):
        """Return a C function that calls a method of the object whose address is `this`."""
        if function.result is DIMS:

            def return_dims(result, this, *values):
                self._write_dims(result, call(self.objects[this], *values))
                return result

            kind = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, *function.arguments)
            return kind(self._guarded(return_dims))
        kind = ctypes.CFUNCTYPE(function.result, c_void_p, *function.arguments)
        return kind(self._guarded(lambda this, *values: call(self.objects[this], *values)))

    def _guarded(self, call):
        """Return a function that records an exception, which C++ cannot handle, and returns 0."""

        def guarded(*values):
            try:
                return call(*values)
            except Exception as error:  # noqa: BLE001 - recorded
                self.violate(repr(error))
                return 0

        return guarded

    def _unanswered(self, interface, slot):
        def call():
            self.violate(f"function {slot} of {interface.__name__} is not answered")
            return 0

        return ctypes.CFUNCTYPE(c_void_p)(call)

    def read_dims(self, address):
        """Return the sizes of a Dims."""
        dims = self._dims.from_address(address)
        return tuple(dims.sizes[: dims.count])

    def _write_dims(self, address, sizes):
        dims = self._dims.from_address(address)
        dims.count = len(sizes)
        dims.sizes[: len(sizes)] = list(sizes)
