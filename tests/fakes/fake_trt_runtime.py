"""A fake of TensorRT's Python runtime API, implemented with ONNX Runtime and the fake CUDA runtime.

A plan is a TensorRT header, the batches of its profile, and an ONNX file. `execute_async_v3` enqueues the network on
the stream. When the stream executes it, the network reads its inputs and writes its outputs at the addresses that were
set when it was enqueued. Names exist as in each version. Invalid calls that do not change the result are collected in
`violations`.
"""

import ctypes
import struct
import threading
import weakref
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

VERSIONS = ("8.6.2", "10.3.0", "11.1.0", "1.7.1")
RTX = "1.7.1"
SCRATCH_BYTES = 4096

# Names of classes and members that a version does not have.
ABSENT = {
    "8.6.2": {"device_memory_size_v2", "set_device_memory", "create_execution_context", "create_runtime_config",
              "is_stream_capturable", "ExecutionContextAllocationStrategy", "CudaGraphStrategy", "IPluginV3",
              "all_creators"},
    "10.3.0": {"create_execution_context_without_device_memory", "create_runtime_config", "is_stream_capturable",
               "CudaGraphStrategy", "plugin_creator_list"},
    "11.1.0": {"create_execution_context_without_device_memory", "device_memory_size", "device_memory",
               "is_stream_capturable", "CudaGraphStrategy", "plugin_creator_list"},
    "1.7.1": {"create_execution_context_without_device_memory", "device_memory_size", "plugin_creator_list",
              "init_libnvinfer_plugins"},
}  # fmt: skip
_TYPES = {1: "FLOAT", 2: "UINT8", 6: "INT32", 7: "INT64", 10: "HALF"}
_NUMPY = {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64, "HALF": np.float16}


def plan_of(graph, version, batches=(1, 4)):
    """Return a plan of this TensorRT version, with a profile of these batches if the graph's batch is dynamic."""
    numbers = bytes(int(number) for number in f"{version}.0".split(".")[:4])
    header = (b"vtrt" if version == RTX else b"ftrt") + bytes(20) + numbers + bytes(12)
    return header + struct.pack("<2i", *batches) + graph.SerializeToString()


class _Versioned:
    """An object without the names that its version does not have."""

    absent = frozenset()

    def __getattribute__(self, name):
        if name in object.__getattribute__(self, "absent"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)


class FakeTrt(_Versioned):
    """A fake of the module.

    Args:
        version: One of VERSIONS.
        library: The fake CUDA runtime, loaded with ctypes.

    Attributes:
        violations: Calls with undefined behavior.
        contexts: The attributes of all contexts ever created; `most_contexts` limits how many exist at a time.
        profiles: Number of optimization profiles of an engine, all with the same limits.
        shares_profiles: Several contexts may use one profile. Otherwise the first context gets profile 0 and the later
            ones none; selecting a profile in use is a violation, as it ends the process with the bindings of 8.6 and
            10.3, and raises with those from 10.13 on.
        refusal: If not empty, deserialization fails with this log message.
        failing: `execute_async_v3` returns False.
        records: TensorRT-RTX allows the caller to capture its work in a CUDA graph.
        at_run, at_context, at_capture: Called while the network runs, a context is created, work is captured.
    """

    class ILogger:
        pass

    class IPluginV3:
        pass

    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC="static", USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole")

    def __init__(self, version, library):
        self.absent = ABSENT[version]
        self.__version__, self.library = version, library
        self.__spec__ = ModuleSpec("tensorrt", None)
        rtx = {"set_compute_capability": None} if version == RTX else {}
        self.IBuilderConfig = type("IBuilderConfig", (), rtx)
        self.violations, self.contexts, self.kept, self.loaded = [], [], [], []
        self.most_contexts, self.refusal, self.failing, self.records = 1000, "", False, True
        self.profiles, self.shares_profiles = 1, True
        self.at_run = self.at_context = self.at_capture = lambda: None
        self.host_code_allowed = False
        library.fake_cuda_host_call.argtypes = [ctypes.c_void_p] * 3
        library.fake_cuda_capturing.argtypes = [ctypes.c_void_p]

    def init_libnvinfer_plugins(self, logger, namespace):
        return True

    def get_plugin_registry(self):
        creators = [SimpleNamespace(name=name, plugin_version="1", plugin_namespace="") for name in self.loaded]
        listing = "plugin_creator_list" if "all_creators" in self.absent else "all_creators"
        return SimpleNamespace(**{listing: creators}, load_library=lambda path: self.loaded.append("Y7NMS"))

    def Runtime(self, logger):  # noqa: N802 - TensorRT's name
        return Runtime(self, logger)

    def queue(self, stream, work):
        """Enqueue a function on the stream, as work of the GPU."""

        def call(_):
            try:
                work()
            except Exception as error:  # noqa: BLE001 - C cannot handle exceptions
                self.violations.append(repr(error))
            return 0

        self.kept.append(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(call))
        return self.library.fake_cuda_host_call(stream, self.kept[-1], None)

    def is_recording(self, stream):
        return bool(self.library.fake_cuda_capturing(stream))


class Runtime:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    @property
    def engine_host_code_allowed(self):
        return self.trt.host_code_allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value):
        self.trt.host_code_allowed = value

    def deserialize_cuda_engine(self, plan):
        if self.trt.refusal:
            self.logger.log(SimpleNamespace(name="ERROR"), self.trt.refusal)
            return None
        return Engine(self.trt, struct.unpack("<2i", plan[40:48]), onnx.load_model_from_string(plan[48:]))


class Engine(_Versioned):
    device_memory_size = device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, trt, batches, model):
        self.trt, self.batches, self.absent = trt, batches, trt.absent
        graph = model.graph
        self.inputs = [value.name for value in graph.input]
        self.tensors = {value.name: value.type.tensor_type for value in [*graph.input, *graph.output]}
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), trt.profiles
        self.alive = weakref.WeakSet()  # contexts that are not freed
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact INT8 without VNNI
        data = model.SerializeToString()
        self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=_TYPES[self.tensors[name].elem_type])

    def get_tensor_shape(self, name):
        return [dim.dim_value or -1 for dim in self.tensors[name].shape.dim]

    def get_tensor_profile_shape(self, name, profile):
        assert 0 <= profile < self.num_optimization_profiles
        shape = self.get_tensor_shape(name)
        return [[batch, *shape[1:]] for batch in (self.batches[0], *self.batches)]

    def create_runtime_config(self):
        config = SimpleNamespace(cuda_graph_strategy="disabled", allocation="static")
        config.set_execution_context_allocation_strategy = lambda value: setattr(config, "allocation", value)
        return config

    def create_execution_context(self, config):
        strategy = config if isinstance(config, str) else config.allocation
        assert strategy == "user", "the caller allocates the memory"
        assert isinstance(config, str) == ("is_stream_capturable" in self.trt.absent)
        return self._context(getattr(config, "cuda_graph_strategy", "disabled"))

    def create_execution_context_without_device_memory(self):
        return self._context("disabled")

    def _context(self, strategy):
        if len(self.alive) >= self.trt.most_contexts:
            return None
        self.trt.at_context()
        context = Context(self, strategy)
        self.alive.add(context)
        self.trt.contexts.append(SimpleNamespace(strategy=strategy))
        return context


class Context(_Versioned):
    device_memory = 0

    def __init__(self, engine, strategy):
        self.active_optimization_profile = 0 if engine.trt.shares_profiles or not engine.alive else -1
        self.engine, self.trt, self.strategy, self.absent = engine, engine.trt, strategy, engine.absent
        self.shape = tuple(engine.get_tensor_shape("images"))
        self.addresses, self.generation, self.has_run = {}, 0, False
        self.busy = threading.Lock()

    def set_device_memory(self, pointer, nbytes):
        assert nbytes >= SCRATCH_BYTES and pointer % 256 == 0
        object.__setattr__(self, "scratch", pointer)

    def set_optimization_profile_async(self, profile, stream):
        used = {context.active_optimization_profile for context in self.engine.alive if context is not self}
        if profile in used and not self.trt.shares_profiles:
            self.trt.violations.append(f"profile {profile} is in use")
            raise RuntimeError("Unable to set optimization profile.")
        self.active_optimization_profile = profile
        return True

    def set_input_shape(self, name, shape):
        assert name == "images"
        assert self.active_optimization_profile >= 0, "no profile is selected"
        fits = self.engine.batches[0] <= shape[0] <= self.engine.batches[1]
        if fits and tuple(shape) != self.shape:
            self.shape, self.generation, self.has_run = tuple(shape), self.generation + 1, False
        return fits

    def get_tensor_shape(self, name):
        return [self.shape[0] if size == -1 else size for size in self.engine.get_tensor_shape(name)]

    def set_tensor_address(self, name, address):
        assert address % 256 == 0, "TensorRT requires an alignment of 256 bytes"
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream):
        return self.trt.records

    def execute_async_v3(self, stream):
        assert stream, "the default stream"
        assert set(self.addresses) == set(self.engine.tensors), "an address is missing"
        assert -1 not in self.shape, "the shape is open"
        assert getattr(self, "scratch", None) or self.device_memory, "the device memory is not set"
        if self.trt.failing:
            return False
        if self.trt.is_recording(stream):
            self.trt.at_capture()
        if self.trt.is_recording(stream) and (not self.has_run or not self.trt.records):
            self.trt.violations.append("captured work that cannot be captured")
        self.has_run = True
        self.trt.queue(stream, self._work(dict(self.addresses), self.generation))
        return True

    def _work(self, addresses, generation):
        arrays = {name: self._array(name, address) for name, address in addresses.items()}

        def work():
            assert self.generation == generation, "the shape of the context changed after the capture"
            assert self.busy.acquire(blocking=False), "a context runs twice concurrently"
            try:
                self.trt.at_run()
                outputs = [name for name in arrays if name not in self.engine.inputs]
                feeds = {name: arrays[name].copy() for name in self.engine.inputs}
                for name, result in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
                    arrays[name][...] = result
            finally:
                self.busy.release()

        return work

    def _array(self, name, address):
        shape = self.get_tensor_shape(name) if name != "images" else self.shape
        dtype = np.dtype(_NUMPY[self.engine.get_tensor_dtype(name).name])
        size = int(np.prod(shape)) * dtype.itemsize
        return np.ndarray(shape, dtype, (ctypes.c_uint8 * size).from_address(address))
