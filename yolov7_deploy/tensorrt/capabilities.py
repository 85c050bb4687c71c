"""The capabilities of the installed TensorRT. Only this module imports `tensorrt` and `tensorrt_rtx`.

TensorRT 8.6, 10, 11 and TensorRT-RTX have largely the same API; some names exist in some versions only. This module
tests for the name and never for the version. It is used in the build process and where engines run.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from yolov7_deploy.errors import EngineError
from yolov7_deploy.tensorrt.build_messages import BuildRequest, ParserError
from yolov7_deploy.tensorrt.build_record import TITLES, DlaUse, EngineTensor, InputShape, NetworkLayer, Product

Trt = Any  # the module, or an object of it: their names differ from version to version

# TensorRT's data types and their NumPy names.
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
# These libraries are slow to load and do not speed up convolutions of this kind; TensorRT 11 does not have them.
_UNWANTED_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")
# Builder flags that permit the precisions of a graph, for a network that is not strongly typed.
_PRECISION_FLAGS = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}
# Layers keep the precision that is set for them, if TensorRT has such a kernel.
_PINNING_FLAG = "PREFER_PRECISION_CONSTRAINTS"
# Layers whose output sizes or iteration counts are known at run time only.
_ALLOCATING_LAYERS = {"NON_ZERO", "TRIP_LIMIT", "NMS"}
# Layers that compute or move values, and can be told the precision to do it in.
_PINNABLE_LAYERS = {
    "ACTIVATION", "CONCATENATION", "CONVOLUTION", "ELEMENTWISE", "MATRIX_MULTIPLY", "POOLING", "REDUCE", "RESIZE",
    "SCALE", "SELECT", "SHUFFLE", "SLICE", "UNARY",
}  # fmt: skip
# Name in the API, value of --hardware-compatible, first version that has it.
_LEVELS = {"ampere_plus": ("AMPERE_PLUS", "ampere+", "8.6"), "same_compute_capability": (
    "SAME_COMPUTE_CAPABILITY", "same-cc", "10.9")}  # fmt: skip
# First line of the message in which a builder lists the layers of the engine it has built.
_LISTING_START = "Layers:\n"


def load_tensorrt(product: Product) -> Trt:
    """Import and return the module.

    Raises:
        ImportError: It is not installed, or cannot be loaded.
    """
    return importlib.import_module(product)


def create_logger(trt: Trt, on_message: Callable[[str], None], on_listing: Callable[[str], None] | None = None) -> Trt:
    """Return an ILogger. TensorRT calls it from its own threads.

    Args:
        trt: The module.
        on_message: Called with each message except verbose ones, as `ERROR: text`.
        on_listing: Called with the verbose message that lists the layers of an engine, one of 20,000 in a build.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Trt, message: str) -> None:
            if severity.name != "VERBOSE":
                on_message(f"{severity.name}: {message}")
            elif on_listing is not None and message.startswith(_LISTING_START):
                on_listing(message)

    return Logger()


class TrtCapabilities:
    """The differences between the TensorRT versions, and what the installed one supports.

    Args:
        product: `tensorrt` or `tensorrt_rtx`.
        trt: The module.
    """

    def __init__(self, product: Product, trt: Trt) -> None:
        self.product = product
        self.trt = trt
        self.version = str(trt.__version__)
        self.title = f"{TITLES[product]} {self.version}"

    @property
    def abi(self) -> str:
        """The plugin interface: `v3` (IPluginV3) or `v2` (IPluginV2DynamicExt)."""
        return "v3" if hasattr(self.trt, "IPluginV3") else "v2"

    @property
    def ahead_of_time(self) -> bool:
        """True for TensorRT-RTX, which compiles for given compute capabilities and does not time kernels."""
        return hasattr(self.trt.IBuilderConfig, "set_compute_capability")

    @property
    def targets(self) -> dict[str, str]:
        """Supported build targets: compute capability to its name in the API, `8.6` to `SM86`."""
        names = dir(getattr(self.trt, "ComputeCapability", None))
        numbers = sorted(int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdecimal())
        return {f"{number // 10}.{number % 10}": f"SM{number}" for number in numbers}

    def strongly_typed(self, request: BuildRequest) -> bool:
        """Return whether to build a strongly typed network, in which the graph determines all precisions.

        True where there are no precision flags. Otherwise only for FP16 and INT8 graphs, and only if strong typing is
        complete: NVIDIA calls it fully available from 10.12, which also added the marking of unfused tensors. DLA does
        not support strong typing while precision flags exist.
        """
        flags, network = self.trt.NetworkDefinitionCreationFlag, self.trt.INetworkDefinition
        if not hasattr(self.trt.BuilderFlag, "FP16"):
            return True
        complete = hasattr(flags, "STRONGLY_TYPED") and hasattr(network, "mark_unfused_tensors_as_debug_tensors")
        return complete and request.precision != "fp32" and request.dla is None

    def network_flags(self, *, typed: bool) -> int:
        """Return the creation flags of a network. Before TensorRT 10, explicit batch dimensions need a flag."""
        names = ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if typed else ["EXPLICIT_BATCH"]
        known = self.trt.NetworkDefinitionCreationFlag
        return sum(1 << int(getattr(known, name)) for name in names if hasattr(known, name))

    # --- before the build ---------------------------------------------------------------------------------------------

    def check_request_supported(self, request: BuildRequest, *, compute_capability: str, dla_cores: int) -> None:
        """Check that this TensorRT and this machine support every option.

        Raises:
            EngineError: They do not; the message names the option and the version that supports it.
        """
        self._check_compatibility_levels(request, compute_capability)
        if request.opt_level >= 0 and not hasattr(self.trt.IBuilderConfig, "builder_optimization_level"):
            raise self._unsupported("--opt-level", "8.6")
        if request.sparse and not hasattr(self.trt.BuilderFlag, "SPARSE_WEIGHTS"):
            raise self._unsupported("--sparse", "8.0")
        if request.timing_cache_required and self.ahead_of_time:
            raise EngineError(
                f"--timing-cache has no effect with {self.title}: it does not time kernels during a build.",
                fix="Leave out --timing-cache.",
            )
        if request.dla is not None:
            self._check_dla(request, dla_cores)

    def _check_compatibility_levels(self, request: BuildRequest, compute_capability: str) -> None:
        if request.version_compatible:
            if self.ahead_of_time:
                raise self._not_portable("--version-compatible", "Build once for each version of TensorRT-RTX.")
            if not hasattr(self.trt.BuilderFlag, "VERSION_COMPATIBLE"):
                raise self._unsupported("--version-compatible", "8.6")
        if request.hardware_compatible == "none":
            return
        name, value, first_version = _LEVELS[request.hardware_compatible]
        option = f"--hardware-compatible {value}"
        if self.ahead_of_time:
            raise self._not_portable(option, "List the GPUs instead:  --target sm86,sm89,sm120")
        if not hasattr(getattr(self.trt, "HardwareCompatibilityLevel", None), name):
            raise self._unsupported(option, first_version)
        oldest = "8.0" if name == "AMPERE_PLUS" else "7.5"
        if compute_capability and float(compute_capability) < float(oldest):
            raise EngineError(
                f"{option} requires a GPU of compute capability {oldest} or later; this one has {compute_capability}.",
                fix="Leave it out: the engine then runs on this kind of GPU only.",
            )

    def _check_dla(self, request: BuildRequest, cores: int) -> None:
        option = f"--dla {request.dla}"
        if request.dla is not None and request.dla >= cores:
            found = f"finds {cores} on this machine" if cores else "finds none on this machine"
            raise EngineError(
                f"{option}: {self.title} {found}. Xavier and Orin have DLA cores, with a TensorRT made for them.",
                fix=f"--dla {cores - 1}" if cores else "Leave out --dla.",
            )
        if request.precision == "fp32":
            raise EngineError(f"{option}: a DLA supports only FP16 and INT8.", fix="Export with  --fp16")
        if request.precision == "int8" and hasattr(self.trt.BuilderFlag, "INT8"):
            raise EngineError(
                f"{option}: an INT8 file consists of Q/DQ pairs, which a DLA does not support with {self.title}: its "
                "INT8 needs a float file and a calibration cache.",
                fix="Build the fp16 file here, or the float32 file with a cache:  y7 quantize --weights FILE.onnx "
                "--calib FOLDER --trt-cache F; trtexec --onnx=FILE.onnx --int8 --fp16 --calib=F "
                f"--useDLACore={request.dla} --allowGPUFallback",
            )
        if any(shape.min != shape.max for shape in request.shapes):
            raise EngineError(f"{option}: a DLA supports only fixed shapes.", fix="Fix the batch:  --batch 1")

    def _unsupported(self, option: str, first_version: str) -> EngineError:
        return EngineError(
            f"{option}: {self.title} does not support it.", fix=f"TensorRT {first_version} or later supports it."
        )

    def _not_portable(self, option: str, fix: str) -> EngineError:
        return EngineError(f"{option}: {self.title} does not build such engines.", fix=fix)

    # --- the build ----------------------------------------------------------------------------------------------------

    def pin_float32_layers(self, network: Trt, request: BuildRequest, *, typed: bool) -> int:
        """Set the precision of layers that the graph computes in float32 after a Cast; return their number.

        In a network that is not strongly typed, TensorRT computes them in FP16 where that is faster. Boxes are decoded
        in such layers, and FP16 has steps of half a pixel above 512. In an INT8 graph only layers after the last
        convolution are pinned: the precision of the others is that of their Q/DQ pairs.
        """
        if typed or request.precision == "fp32" or not hasattr(self.trt.BuilderFlag, _PINNING_FLAG):
            return 0
        pinned = list(_float32_layers(network, after_convolutions=request.precision == "int8"))
        for layer in pinned:
            layer.precision = self.trt.DataType.FLOAT
            for index in range(layer.num_outputs):
                layer.set_output_type(index, self.trt.DataType.FLOAT)
        return len(pinned)

    def configure(
        self,
        config: Trt,
        request: BuildRequest,
        *,
        typed: bool,
        layers: Sequence[NetworkLayer] = (),
        has_pinned_layers: bool = False,
    ) -> tuple[str, ...]:
        """Set everything but the optimization profile in a builder configuration; return the names of the flags."""
        trt = self.trt
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if request.workspace_bytes:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
        if request.opt_level >= 0:
            config.builder_optimization_level = request.opt_level
        flags = tuple(self._builder_flags(request, typed=typed, layers=layers))
        flags += (_PINNING_FLAG,) if has_pinned_layers else ()
        for flag in flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if request.hardware_compatible != "none":
            level = _LEVELS[request.hardware_compatible][0]
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
        if request.dla is not None:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = request.dla
        if any(hasattr(trt.TacticSource, name) for name in _UNWANTED_TACTICS):
            config.set_tactic_sources(self._tactic_sources(config))
        if request.targets:
            config.num_compute_capabilities = len(request.targets)
            for index, target in enumerate(request.targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, self.targets[target]), index)
        return flags

    def _builder_flags(self, request: BuildRequest, *, typed: bool, layers: Sequence[NetworkLayer]) -> Iterator[str]:
        if not typed:
            yield from _PRECISION_FLAGS[request.precision]
        if request.sparse:
            yield "SPARSE_WEIGHTS"
        if request.version_compatible:
            yield "VERSION_COMPATIBLE"
        if request.dla is not None:
            yield "GPU_FALLBACK"
        # Without this flag TensorRT-RTX may allocate memory during inference, which a CUDA graph cannot capture.
        allocates = bool({layer.type for layer in layers} & _ALLOCATING_LAYERS)
        if self.ahead_of_time and not allocates and hasattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            yield "REQUIRE_USER_ALLOCATION"

    def _tactic_sources(self, config: Trt) -> int:
        unwanted = [getattr(self.trt.TacticSource, name, None) for name in _UNWANTED_TACTICS]
        return int(config.get_tactic_sources()) & ~sum(1 << int(source) for source in unwanted if source is not None)

    def add_profile(self, builder: Trt, config: Trt, network: Trt, shapes: Sequence[InputShape]) -> None:
        """Add one optimization profile for all inputs with dynamic dimensions, if there are any."""
        dynamic = [tensor.name for tensor in _inputs(network) if -1 in tensor.shape]
        if not dynamic:
            return
        profile = builder.create_optimization_profile()
        for shape in shapes:
            if shape.name in dynamic:
                profile.set_shape(shape.name, shape.min, shape.opt, shape.max)
        config.add_optimization_profile(profile)
        # Several contexts, and so several threads, may use one profile. From TensorRT 10 on this is always enabled.
        if self.abi == "v2" and hasattr(getattr(self.trt, "PreviewFeature", None), "PROFILE_SHARING_0806"):
            config.set_preview_feature(self.trt.PreviewFeature.PROFILE_SHARING_0806, True)

    def parser_errors(self, parser: Trt) -> tuple[ParserError, ...]:
        """Return the errors of the ONNX parser; before TensorRT 10 they identify nodes by index only."""
        errors = []
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            name = error.node_name() if hasattr(error, "node_name") else ""
            op = error.node_operator() if hasattr(error, "node_operator") else ""
            errors.append(ParserError(node=int(error.node()), name=name, op=op, message=error.desc()))
        return tuple(errors)

    def network_layers(self, network: Trt) -> tuple[NetworkLayer, ...]:
        """Return the layers of a parsed network."""
        return tuple(
            NetworkLayer(
                name=layer.name,
                type=layer.type.name,
                precision=_dtype(layer.get_output(0)) if layer.num_outputs and layer.get_output(0) else "",
            )
            for layer in _layers(network)
        )

    def network_tensors(self, network: Trt) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
        """Return the inputs and the outputs of a parsed network."""
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return tuple(map(_tensor, _inputs(network))), tuple(map(_tensor, outputs))

    def dla_use(self, config: Trt, network: Trt, core: int) -> DlaUse:
        """Return the DLA core and the layers that fall back to the GPU."""
        fallback = tuple(layer.name for layer in _layers(network) if not config.can_run_on_DLA(layer))
        return DlaUse(core=core, fallback=fallback)

    # --- plugins ------------------------------------------------------------------------------------------------------

    def register_builtin_plugins(self, logger: Trt) -> None:
        """Register the plugins that are part of TensorRT, such as EfficientNMS_TRT."""
        if not self.ahead_of_time:
            self.trt.init_libnvinfer_plugins(logger, "")

    def load_plugin(self, path: str) -> None:
        """Load a plugin library; with TensorRT 8.5 the library registers its plugins itself."""
        registry = self.trt.get_plugin_registry()
        if hasattr(registry, "load_library"):
            registry.load_library(path)
        else:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    def registered_plugins(self) -> set[tuple[str, str, str]]:
        """Return the name, version and namespace of every registered plugin."""
        registry = self.trt.get_plugin_registry()
        creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
        return {(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in creators}

    # --- inference ----------------------------------------------------------------------------------------------------

    def deserialize_engine(self, plan: bytes, logger: Trt, *, version_compatible: bool) -> tuple[Trt, Trt | None]:
        """Return the runtime, which must exist as long as the engine, and the engine.

        Args:
            plan: Content of the engine file.
            logger: Receives the reasons of a failure.
            version_compatible: The plan contains a runtime that may be executed.

        Returns:
            The engine is `None` if TensorRT cannot deserialize the plan.
        """
        runtime = self.trt.Runtime(logger)
        if version_compatible and hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = True
        return runtime, runtime.deserialize_cuda_engine(plan)

    def engine_tensors(self, engine: Trt) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
        """Return the inputs and the outputs of an engine."""
        inputs: list[EngineTensor] = []
        outputs: list[EngineTensor] = []
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype = _numpy_name(engine.get_tensor_dtype(name))
            tensor = EngineTensor(name=name, dtype=dtype, shape=_shape(engine.get_tensor_shape(name)))
            (inputs if engine.get_tensor_mode(name).name == "INPUT" else outputs).append(tensor)
        return tuple(inputs), tuple(outputs)

    def profile_shapes(self, engine: Trt, name: str, profile: int = 0) -> InputShape:
        """Return the minimum, optimum and maximum shape of an input in an optimization profile."""
        smallest, best, largest = map(_shape, engine.get_tensor_profile_shape(name, profile))
        return InputShape(name=name, min=smallest, opt=best, max=largest)

    def device_memory_bytes(self, engine: Trt) -> int:
        """Return the GPU memory that an execution context of this engine needs for activations."""
        has_64_bit_size = hasattr(engine, "device_memory_size_v2")
        return int(engine.device_memory_size_v2 if has_64_bit_size else engine.device_memory_size)

    def create_context(self, engine: Trt, *, capture_graphs: bool) -> Trt | None:
        """Return an execution context that needs `set_device_memory`; `None` if the profile allows no further context.

        Args:
            engine: A deserialized engine.
            capture_graphs: TensorRT-RTX captures CUDA graphs itself, for callers that cannot capture its work.
        """
        if self.captures_cuda_graphs:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if capture_graphs:
                config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            return engine.create_execution_context(config)
        if hasattr(self.trt, "ExecutionContextAllocationStrategy"):
            return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return engine.create_execution_context_without_device_memory()

    def set_device_memory(self, context: Trt, pointer: int, nbytes: int) -> None:
        """Set the activation memory of a context; contexts that never run concurrently may share it."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(pointer, nbytes)
        else:
            context.device_memory = pointer

    @property
    def captures_cuda_graphs(self) -> bool:
        """True if contexts can capture CUDA graphs themselves: TensorRT-RTX."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def is_stream_capturable(self, context: Trt, stream: int) -> bool:
        """Return whether the caller can capture the work of a context; always true except with TensorRT-RTX."""
        if not self.captures_cuda_graphs or not hasattr(context, "is_stream_capturable"):
            return True
        return bool(context.is_stream_capturable(stream))

    def select_profile(self, context: Trt, profile: int, stream: int) -> bool:
        """Select the optimization profile of a context that has none; return False if TensorRT refuses.

        A profile that another context uses exclusively must not be selected: the Python bindings of 8.6 and 10.3 then
        end the process, those from 10.13 on raise.
        """
        try:
            return bool(context.set_optimization_profile_async(profile, stream))
        except RuntimeError:
            return False


def _layers(network: Trt) -> Iterator[Trt]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _float32_layers(network: Trt, *, after_convolutions: bool) -> Iterator[Trt]:
    """Yield the layers that compute in float32 what a Cast to float32 gave them, directly or through such layers."""
    layers = list(_layers(network))
    inputs = [_tensor_names(layer.get_input, layer.num_inputs) for layer in layers]
    outputs = [_tensor_names(layer.get_output, layer.num_outputs) for layer in layers]
    before_convolution: set[str] = set()  # tensors that a convolution reads, directly or through other layers
    for layer, read, written in zip(reversed(layers), reversed(inputs), reversed(outputs), strict=True):
        if layer.type.name == "CONVOLUTION" or before_convolution & written:
            before_convolution |= read
    float32: set[str] = set()
    for layer, read, written in zip(layers, inputs, outputs, strict=True):
        is_cast = layer.type.name == "CAST"
        if not written or not (is_cast or read & float32) or _dtype(layer.get_output(0)) != "float32":
            continue
        float32 |= written
        is_before = layer.type.name == "CONVOLUTION" or bool(before_convolution & written)
        if layer.type.name in _PINNABLE_LAYERS and not (after_convolutions and is_before):
            yield layer


def _tensor_names(get: Callable[[int], Trt], count: int) -> set[str]:
    """Return the names of the inputs or outputs of a layer; optional inputs may be missing."""
    return {tensor.name for tensor in map(get, range(count)) if tensor is not None}


def _inputs(network: Trt) -> list[Trt]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _tensor(tensor: Trt) -> EngineTensor:
    return EngineTensor(name=tensor.name, dtype=_dtype(tensor), shape=_shape(tensor.shape))


def _shape(shape: Trt) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


def _dtype(tensor: Trt) -> str:
    return _numpy_name(tensor.dtype)


def _numpy_name(dtype: Trt) -> str:
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())
