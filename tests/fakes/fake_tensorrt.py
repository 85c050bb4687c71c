"""Fake builders of TensorRT 8.5, 8.6, 10.3, 10.13 and 11.1, which cannot create a builder without a GPU.

The names exist as in NVIDIA's Python bindings of each version. Configurations record what is set, in order.
"""

from types import SimpleNamespace

VERSIONS = ("8.5", "8.6", "10.3", "10.13", "11.1")
ALWAYS = "8.5"

# Class, name, first and last version that has it: from the Python bindings of the release branches 8.5 to 11.1.
NAMES = (
    ("DataType", "FLOAT", ALWAYS, None),
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", ALWAYS, "10.16"),
    ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", "9.0", None),
    ("BuilderFlag", "FP16", ALWAYS, "10.16"),
    ("BuilderFlag", "INT8", ALWAYS, "10.16"),
    ("BuilderFlag", "PREFER_PRECISION_CONSTRAINTS", ALWAYS, "10.16"),
    ("BuilderFlag", "GPU_FALLBACK", ALWAYS, None),
    ("BuilderFlag", "SPARSE_WEIGHTS", ALWAYS, None),
    ("BuilderFlag", "VERSION_COMPATIBLE", "8.6", None),
    ("HardwareCompatibilityLevel", "NONE", "8.6", None),
    ("HardwareCompatibilityLevel", "AMPERE_PLUS", "8.6", None),
    ("HardwareCompatibilityLevel", "SAME_COMPUTE_CAPABILITY", "10.9", None),
    ("TacticSource", "CUBLAS", ALWAYS, "10.16"),
    ("TacticSource", "CUBLAS_LT", ALWAYS, "10.16"),
    ("TacticSource", "CUDNN", ALWAYS, "10.16"),
    ("TacticSource", "EDGE_MASK_CONVOLUTIONS", ALWAYS, None),
    ("TacticSource", "JIT_CONVOLUTIONS", ALWAYS, None),
    ("ProfilingVerbosity", "DETAILED", ALWAYS, None),
    ("PreviewFeature", "PROFILE_SHARING_0806", "8.6", "10.16"),
    ("MemoryPoolType", "WORKSPACE", ALWAYS, None),
    ("DeviceType", "DLA", ALWAYS, None),
    ("LayerInformationFormat", "JSON", ALWAYS, None),
    ("IBuilderConfig", "builder_optimization_level", "8.6", None),
    ("INetworkDefinition", "mark_unfused_tensors_as_debug_tensors", "10.12", None),
)
PROPERTIES = {"builder_optimization_level"}  # of a configuration; its other members are methods
CLASSES = (("IProgressMonitor", "9.0"), ("IPluginV3", "10.0"), ("ILogger", ALWAYS))


def _number(version):
    return tuple(map(int, version.split(".")))


def has(version, first, last=None):
    return _number(first) <= _number(version) and (last is None or _number(version) <= _number(last))


def names(version, kind):
    return [name for owner, name, first, last in NAMES if owner == kind and has(version, first, last)]


class Flag(int):
    """A member of an enumeration: a number with a name."""

    def __new__(cls, value, name):
        self = super().__new__(cls, value)
        self.name = name
        return self


class Recorder:
    """Records every attribute that is set and every call, in order."""

    def __init__(self, **results):
        object.__setattr__(self, "done", [])
        object.__setattr__(self, "results", results)

    def __setattr__(self, name, value):
        self.done.append((name, getattr(value, "name", value)))
        object.__setattr__(self, name, value)

    def __getattr__(self, name):
        if name.startswith("__") or name in PROPERTIES:
            raise AttributeError(name)

        def call(*arguments):
            self.done.append((name, *(getattr(argument, "name", argument) for argument in arguments)))
            result = self.results.get(name)
            return result(*arguments) if callable(result) else result

        return call


def tensor(name, shape, dtype="FLOAT"):
    return SimpleNamespace(name=name, shape=shape, dtype=SimpleNamespace(name=dtype))


class Layer:
    """A layer of a parsed network; `precision` and `output_types` are what the product sets."""

    def __init__(self, name, kind, inputs, output):
        self.name, self.type = name, SimpleNamespace(name=kind)
        self.inputs, self.outputs = inputs, [output]
        self.num_inputs, self.num_outputs = len(inputs), 1
        self.precision, self.output_types = None, {}

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]

    def set_output_type(self, index, dtype):
        self.output_types[index] = dtype.name


def chain(*kinds, dtypes=None):
    """Return layers of which each reads the output of the one before; their names are their kinds."""
    layers, tensor_in = [], tensor("images", (1, 3, 64, 64))
    for number, kind in enumerate(kinds):
        output = tensor(f"tensor{number}", (1, 8), dtypes[number] if dtypes else "FLOAT")
        layers.append(Layer(f"{kind.lower()}{number}", kind, [tensor_in, None], output))
        tensor_in = output
    return layers


class Network:
    """A parsed network: a convolution, and NMS as a layer of type `last`, or the given layers."""

    def __init__(self, flags, last="LOOP", batch=1, layers=None):
        self.flags = flags
        self.inputs = [tensor("images", (batch, 3, 64, 64))]
        self.outputs = [tensor("num_dets", (batch, 1), "INT32")]
        self.layers = layers or [
            Layer("model.0.conv", "CONVOLUTION", self.inputs, tensor("head", (batch, 255, 2, 2))),
            Layer("nms", last, [tensor("head", (batch, 255, 2, 2))], self.outputs[0]),
        ]
        self.num_inputs, self.num_outputs, self.num_layers = 1, 1, len(self.layers)

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]

    def get_layer(self, index):
        return self.layers[index]


class TimingCache:
    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b" and more"


class FakeTensorrt:
    """A fake of the module `tensorrt`.

    Args:
        version: One of VERSIONS.
        dla_cores: Number of DLA cores of a builder.
        plan: Result of a build; `None` for a failure.
        good_cache: Content of a timing cache that is valid for this device.
        batch: Batch of the parsed network; -1 is dynamic.
        parser_errors: Errors of the parser: (node, name, op, message).
        verbose: Verbose log messages of a build.
        on_parse: Called with the graph that is parsed.
        layers: Layers of the parsed network.
    """

    def __init__(
        self, version, *, dla_cores=0, plan=b"ftrt plan", good_cache=b"measured", batch=1, parser_errors=(), verbose=(),
        on_parse=lambda graph: None, layers=None,
    ):  # fmt: skip
        self.__version__ = version
        kinds = {kind for kind, *_ in NAMES}
        for kind in sorted(kinds):
            members = names(version, kind)
            if members:
                numbers = {name: Flag(number, name) for number, name in enumerate(members)}
                setattr(self, kind, type(kind, (), numbers))
        for kind in ("IBuilderConfig", "INetworkDefinition"):
            if not hasattr(self, kind):
                setattr(self, kind, type(kind, (), {}))
        for kind, first in CLASSES:
            if has(version, first):
                setattr(self, kind, type(kind, (), {}))
        self.creators = [SimpleNamespace(name="EfficientNMS_TRT", plugin_version="1", plugin_namespace="")]
        self.plan, self.good_cache, self.batch, self.dla_cores = plan, good_cache, batch, dla_cores
        self.parser_errors, self.verbose, self.on_parse = parser_errors, verbose, on_parse
        self.layers = layers
        self.network = self.config = self.profile = None

    def init_libnvinfer_plugins(self, logger, namespace):
        return True

    def get_plugin_registry(self):
        listing = "all_creators" if has(self.__version__, "10.0") else "plugin_creator_list"
        registry = SimpleNamespace(**{listing: self.creators})
        if has(self.__version__, "8.6"):
            registry.load_library = self.load_library
        return registry

    def load_library(self, path):
        if "y7" in path:
            self.creators.append(SimpleNamespace(name="Y7NMS", plugin_version="1", plugin_namespace=""))

    def Builder(self, logger):  # noqa: N802 - TensorRT's name
        def build(network, config):
            for message in self.verbose:
                logger.log(SimpleNamespace(name="VERBOSE"), message)
            return self.plan

        return SimpleNamespace(
            num_DLA_cores=self.dla_cores,
            create_network=self._network,
            create_builder_config=self._config,
            create_optimization_profile=self._profile,
            build_serialized_network=build,
        )

    def Runtime(self, logger):  # noqa: N802
        inspector = SimpleNamespace(get_engine_information=lambda kind: '{"Layers": []}')
        engine = SimpleNamespace(
            create_engine_inspector=lambda: inspector, device_memory_size=4096, device_memory_size_v2=4096
        )
        return SimpleNamespace(engine_host_code_allowed=False, deserialize_cuda_engine=lambda plan: engine)

    def OnnxParser(self, network, logger):  # noqa: N802
        def error(node, name, op, message):
            known = {"node": lambda: node, "desc": lambda: message}
            if has(self.__version__, "10.0"):
                known |= {"node_name": lambda: name, "node_operator": lambda: op}
            return SimpleNamespace(**known)

        def parse(data):
            self.on_parse(data)
            return not errors

        errors = [error(*fields) for fields in self.parser_errors]
        return SimpleNamespace(parse=parse, num_errors=len(errors), get_error=errors.__getitem__)

    def _network(self, flags):
        self.network = Network(flags, batch=self.batch, layers=self.layers)
        return self.network

    def _config(self):
        self.config = Recorder(
            get_tactic_sources=lambda: 0b11111 if has("10.16", self.__version__) else 0b11,
            get_memory_pool_limit=lambda pool: 2**34,
            create_timing_cache=TimingCache,
            set_timing_cache=lambda cache, ignore: cache.data in (b"", self.good_cache),
            get_timing_cache=lambda: TimingCache(self.good_cache),
            can_run_on_DLA=lambda layer: layer.type.name == "CONVOLUTION",
        )
        if hasattr(self.IBuilderConfig, "builder_optimization_level"):
            object.__setattr__(self.config, "builder_optimization_level", 3)
        return self.config

    def _profile(self):
        self.profile = Recorder()
        return self.profile
