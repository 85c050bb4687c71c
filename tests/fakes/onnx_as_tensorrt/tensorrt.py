"""A fake of the TensorRT API that the GPU tests use, implemented with ONNX Runtime and the fake CUDA runtime.

A plan is the ONNX file. Networks with plugins, which ONNX Runtime does not support, output zeros.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

__version__ = "8.6.0"
PLUGINS = ["EfficientNMS_TRT", "Y7NMS"]


class Logger:
    WARNING = 1

    def __init__(self, severity):
        self.severity = severity


class NetworkDefinitionCreationFlag:
    EXPLICIT_BATCH = 0


class BuilderFlag:
    FP16 = 0


class TacticSource:
    CUBLAS, CUBLAS_LT, CUDNN = range(3)


class Config:
    def __init__(self):
        self.sources = 7

    def set_flag(self, flag):
        assert flag == BuilderFlag.FP16

    def get_tactic_sources(self):
        return self.sources

    def set_tactic_sources(self, sources):
        assert sources == 0


class Builder:
    def __init__(self, logger):
        self.network = SimpleNamespace(data=None)

    def create_network(self, flags):
        assert flags == 1
        return self.network

    def create_builder_config(self):
        return Config()

    def build_serialized_network(self, network, config):
        return network.data


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse(self, data):
        onnx.load_model_from_string(data)
        self.network.data = data
        return True


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return Engine(onnx.load_model_from_string(plan))


class Engine:
    device_memory_size = 4096

    def __init__(self, model):
        known = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [value for value in model.graph.input if value.name not in known]
        self.tensors = {value.name: value for value in [*self.inputs, *model.graph.output]}
        self.num_io_tensors = len(self.tensors)
        functions = {function.name for function in model.functions}
        foreign = any(node.domain and node.op_type not in functions for node in model.graph.node)
        self.session = None
        if not foreign:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.x64quantprecision", "1")  # exact INT8 without VNNI
            data = model.SerializeToString()
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_shape(self, name):
        return [dim.dim_value for dim in self.tensors[name].type.tensor_type.shape.dim]

    def get_tensor_dtype(self, name):
        return self.tensors[name].type.tensor_type.elem_type

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.arrays = engine, {}

    def set_tensor_address(self, name, address):
        shape, dtype = self.engine.get_tensor_shape(name), nptype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.arrays[name] = np.ndarray(shape, dtype, (ctypes.c_uint8 * size).from_address(address))
        return True

    def execute_async_v3(self, stream):
        assert stream, "the default stream"
        inputs = {value.name: self.arrays[value.name] for value in self.engine.inputs}
        outputs = [name for name in self.arrays if name not in inputs]
        results = self.engine.session.run(outputs, inputs) if self.engine.session else [0] * len(outputs)
        for name, result in zip(outputs, results, strict=True):
            self.arrays[name][...] = result
        return True


def nptype(dtype):
    return onnx.helper.tensor_dtype_to_np_dtype(dtype)


def init_libnvinfer_plugins(logger, namespace):
    assert namespace == ""


def get_plugin_registry():
    creators = [SimpleNamespace(name=name) for name in PLUGINS]
    return SimpleNamespace(load_library=lambda path: True, plugin_creator_list=creators)
