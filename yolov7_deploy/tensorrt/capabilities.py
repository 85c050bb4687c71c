"""Which TensorRT is installed and what it can do: the only file that imports `tensorrt` or `tensorrt_rtx`.

It asks whether a name exists and never which version it has: 8.6, 10, 11 and TensorRT-RTX are one program with names
that come and go. Used in the process that builds, and where engines run.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from yolov7_deploy.errors import EngineError
from yolov7_deploy.tensorrt.build_messages import BuildJob, ParserFault
from yolov7_deploy.tensorrt.build_record import TITLES, DlaUse, EngineTensor, InputShape, NetworkLayer, Product

Trt = Any  # the module; its names differ from version to version

# TensorRT's names of types as NumPy has them.
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
# Kernels of these libraries are slow to load and win nothing for convolutions of this kind; they are gone from 11.
_UNWANTED_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")
# Weights as flags: what the types of a graph are worth to a TensorRT that chooses by itself.
_PERMISSIONS = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}
# Layers whose sizes or rounds are known at run time only.
_ALLOCATING = {"NON_ZERO", "TRIP_LIMIT", "NMS"}
_LEVELS = {"ampere_plus": ("AMPERE_PLUS", "ampere+", "8.6"), "same_compute_capability": (
    "SAME_COMPUTE_CAPABILITY", "same-cc", "10.9")}  # fmt: skip


def load_tensorrt(product: Product) -> Trt:
    """The module.

    Raises:
        ImportError: It is not installed, or does not load.
    """
    return importlib.import_module(product)


class Dialect:
    """What one TensorRT understands.

    Args:
        product: Which of the two it is.
        trt: The module.
    """

    def __init__(self, product: Product, trt: Trt) -> None:
        self.product = product
        self.trt = trt
        self.version = str(trt.__version__)
        self.title = f"{TITLES[product]} {self.version}"

    @property
    def abi(self) -> str:
        """Shell of the plugins it loads."""
        return "v3" if hasattr(self.trt, "IPluginV3") else "v2"

    @property
    def ahead_of_time(self) -> bool:
        """It compiles for named compute capabilities and measures nothing here: TensorRT-RTX."""
        return hasattr(self.trt.IBuilderConfig, "set_compute_capability")

    @property
    def targets(self) -> dict[str, str]:
        """Name in the API of each compute capability it can name: `SM86` for `8.6`."""
        names = dir(getattr(self.trt, "ComputeCapability", None))
        numbers = sorted(int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdecimal())
        return {f"{number // 10}.{number % 10}": f"SM{number}" for number in numbers}

    def strongly_typed(self, job: BuildJob) -> bool:
        """Types are the graph's. Where they need not be, only for what cannot be said otherwise, and where it works.

        NVIDIA calls strong typing fully available from 10.12, which also brought the marking of unfused tensors. DLA
        takes no typed graph while builder flags exist.
        """
        flags, network = self.trt.NetworkDefinitionCreationFlag, self.trt.INetworkDefinition
        if not hasattr(self.trt.BuilderFlag, "FP16"):
            return True
        complete = hasattr(flags, "STRONGLY_TYPED") and hasattr(network, "mark_unfused_tensors_as_debug_tensors")
        return complete and job.precision != "fp32" and job.dla is None

    def network_flags(self, *, typed: bool) -> int:
        """Flags of a new network; before 10 the batch is only part of the shapes with a flag."""
        names = ["EXPLICIT_BATCH", *(["STRONGLY_TYPED"] if typed else [])]
        known = self.trt.NetworkDefinitionCreationFlag
        return sum(1 << int(getattr(known, name)) for name in names if hasattr(known, name))

    # --- before the build ---------------------------------------------------------------------------------------------

    def check(self, job: BuildJob, *, compute_capability: str, dla_cores: int) -> None:
        """Refuses what this TensorRT or this machine does not have.

        Raises:
            EngineError: It names the option, and what would have it.
        """
        self._check_levels(job, compute_capability)
        if job.opt_level >= 0 and not hasattr(self.trt.IBuilderConfig, "builder_optimization_level"):
            raise self._lacks("--opt-level", "8.6")
        if job.sparse and not hasattr(self.trt.BuilderFlag, "SPARSE_WEIGHTS"):
            raise self._lacks("--sparse", "8.0")
        if job.timing_cache_asked and self.ahead_of_time:
            raise EngineError(
                f"--timing-cache means nothing to {self.title}: it measures no kernels while it builds.",
                fix="Leave --timing-cache out.",
            )
        if job.dla is not None:
            self._check_dla(job, dla_cores)

    def _check_levels(self, job: BuildJob, compute_capability: str) -> None:
        if job.version_compatible:
            if self.ahead_of_time:
                raise self._moves_otherwise("--version-compatible", "Build once for each version of it.")
            if not hasattr(self.trt.BuilderFlag, "VERSION_COMPATIBLE"):
                raise self._lacks("--version-compatible", "8.6")
        if job.hardware_compatible == "none":
            return
        name, spelling, since = _LEVELS[job.hardware_compatible]
        option = f"--hardware-compatible {spelling}"
        if self.ahead_of_time:
            raise self._moves_otherwise(option, "Name the GPUs instead:  --target sm86,sm89,sm120")
        if not hasattr(getattr(self.trt, "HardwareCompatibilityLevel", None), name):
            raise self._lacks(option, since)
        oldest = "8.0" if name == "AMPERE_PLUS" else "7.5"
        if compute_capability and float(compute_capability) < float(oldest):
            raise EngineError(
                f"{option} needs a GPU of compute capability {oldest} or later; this one has {compute_capability}.",
                fix="Leave it out: the engine then runs on this kind of GPU only.",
            )

    def _check_dla(self, job: BuildJob, cores: int) -> None:
        option = f"--dla {job.dla}"
        if job.dla is not None and job.dla >= cores:
            found = f"counts {cores} on this machine" if cores else "finds none on this machine"
            raise EngineError(
                f"{option}: {self.title} {found}. DLA cores are on Xavier and Orin, with a TensorRT made for them.",
                fix=f"--dla {cores - 1}" if cores else "Leave --dla out.",
            )
        if job.precision == "fp32":
            raise EngineError(f"{option}: a DLA computes in float16 or int8 only.", fix="Export with  --fp16")
        if job.precision == "int8" and hasattr(self.trt.BuilderFlag, "INT8"):
            raise EngineError(
                f"{option}: an int8 file is made of Q/DQ pairs, and with {self.title} a DLA takes none: its INT8 comes "
                "from a float file and a calibration cache.",
                fix="Build the fp16 file here, or the float32 file with a cache:  y7 quantize --weights FILE.onnx "
                "--calib FOLDER --trt-cache F; trtexec --onnx=FILE.onnx --int8 --fp16 --calib=F "
                f"--useDLACore={job.dla} --allowGPUFallback",
            )
        if any(shape.min != shape.max for shape in job.shapes):
            raise EngineError(f"{option}: a DLA takes fixed shapes only.", fix="Fix the batch:  --batch 1")

    def _lacks(self, option: str, since: str) -> EngineError:
        return EngineError(f"{option}: {self.title} does not have it.", fix=f"TensorRT {since} or later has it.")

    def _moves_otherwise(self, option: str, fix: str) -> EngineError:
        return EngineError(f"{option}: {self.title} makes no such engines.", fix=fix)

    # --- the configuration of a build ---------------------------------------------------------------------------------

    def configure(
        self, config: Trt, job: BuildJob, *, typed: bool, layers: Sequence[NetworkLayer] = ()
    ) -> tuple[str, ...]:
        """Sets everything but the profile; gives the names of the builder flags."""
        trt = self.trt
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if job.workspace_bytes:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
        if job.opt_level >= 0:
            config.builder_optimization_level = job.opt_level
        flags = list(self._flags(job, typed=typed, layers=layers))
        for flag in flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if job.hardware_compatible != "none":
            level = _LEVELS[job.hardware_compatible][0]
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
        if job.dla is not None:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = job.dla
        if any(hasattr(trt.TacticSource, name) for name in _UNWANTED_TACTICS):
            config.set_tactic_sources(self._tactics(config))
        if job.targets:
            config.num_compute_capabilities = len(job.targets)
            for place, target in enumerate(job.targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, self.targets[target]), place)
        return tuple(flags)

    def _flags(self, job: BuildJob, *, typed: bool, layers: Sequence[NetworkLayer]) -> Iterator[str]:
        if not typed:
            yield from _PERMISSIONS[job.precision]
        if job.sparse:
            yield "SPARSE_WEIGHTS"
        if job.version_compatible:
            yield "VERSION_COMPATIBLE"
        if job.dla is not None:
            yield "GPU_FALLBACK"
        # Without it TensorRT-RTX may allocate in the middle of a run, which no CUDA graph can hold.
        is_steady = not {layer.type for layer in layers} & _ALLOCATING
        if self.ahead_of_time and is_steady and hasattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            yield "REQUIRE_USER_ALLOCATION"

    def _tactics(self, config: Trt) -> int:
        unwanted = [getattr(self.trt.TacticSource, name, None) for name in _UNWANTED_TACTICS]
        return int(config.get_tactic_sources()) & ~sum(1 << int(source) for source in unwanted if source is not None)

    def add_profile(self, builder: Trt, config: Trt, network: Trt, shapes: Sequence[InputShape]) -> None:
        """One profile for all inputs with open dimensions; none where all are fixed."""
        open_inputs = [tensor.name for tensor in _inputs(network) if -1 in tensor.shape]
        if not open_inputs:
            return
        profile = builder.create_optimization_profile()
        for shape in shapes:
            if shape.name in open_inputs:
                profile.set_shape(shape.name, shape.min, shape.opt, shape.max)
        config.add_optimization_profile(profile)
        # From 10 on always so: several contexts may run with one profile, and several threads with one engine.
        if self.abi == "v2" and hasattr(getattr(self.trt, "PreviewFeature", None), "PROFILE_SHARING_0806"):
            config.set_preview_feature(self.trt.PreviewFeature.PROFILE_SHARING_0806, True)

    # --- plugins ------------------------------------------------------------------------------------------------------

    def register_own_plugins(self, logger: Trt) -> None:
        """The plugins TensorRT comes with, among them EfficientNMS_TRT."""
        if not self.ahead_of_time:
            self.trt.init_libnvinfer_plugins(logger, "")

    def load_plugin(self, path: str) -> None:
        """Brings a plugin library into the registry; 8.5 knows only libraries that enter by themselves."""
        registry = self.trt.get_plugin_registry()
        if hasattr(registry, "load_library"):
            registry.load_library(path)
        else:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    def plugins(self) -> set[tuple[str, str, str]]:
        """Name, version and namespace of what is registered."""
        registry = self.trt.get_plugin_registry()
        creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
        return {(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in creators}

    # --- running an engine --------------------------------------------------------------------------------------------

    def open_plan(self, plan: bytes, logger: Trt, *, version_compatible: bool) -> tuple[Trt, Trt | None]:
        """The runtime, which must outlive the engine, and the engine; `None` where TensorRT refuses the plan.

        Args:
            plan: Of the file.
            logger: Takes the reasons.
            version_compatible: The plan carries a runtime of its own, which may be run.
        """
        runtime = self.trt.Runtime(logger)
        if version_compatible and hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = True
        return runtime, runtime.deserialize_cuda_engine(plan)

    def engine_tensors(self, engine: Trt) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
        """Inputs and outputs of an engine."""
        inputs: list[EngineTensor] = []
        outputs: list[EngineTensor] = []
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype = _numpy_name(engine.get_tensor_dtype(name))
            tensor = EngineTensor(name=name, dtype=dtype, shape=_sides(engine.get_tensor_shape(name)))
            (inputs if engine.get_tensor_mode(name).name == "INPUT" else outputs).append(tensor)
        return tuple(inputs), tuple(outputs)

    def profile(self, engine: Trt, name: str) -> InputShape:
        """The limits of an input in the first profile."""
        smallest, best, largest = map(_sides, engine.get_tensor_profile_shape(name, 0))
        return InputShape(name=name, min=smallest, opt=best, max=largest)

    def scratch_bytes(self, engine: Trt) -> int:
        """Memory of the GPU that a context of this engine works in."""
        is_long = hasattr(engine, "device_memory_size_v2")
        return int(engine.device_memory_size_v2 if is_long else engine.device_memory_size)

    def new_context(self, engine: Trt, *, graphs_inside: bool) -> Trt | None:
        """A context that works in memory of ours (`give_scratch`); `None` where there can be no further one.

        Args:
            engine: Opened.
            graphs_inside: TensorRT-RTX shall record CUDA graphs by itself, for callers that cannot record its work.
        """
        if self.records_by_itself:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if graphs_inside:
                config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            return engine.create_execution_context(config)
        if hasattr(self.trt, "ExecutionContextAllocationStrategy"):
            return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return engine.create_execution_context_without_device_memory()

    def give_scratch(self, context: Trt, pointer: int, nbytes: int) -> None:
        """The memory that a context works in; contexts that never work at once may share it."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(pointer, nbytes)
        else:
            context.device_memory = pointer

    @property
    def records_by_itself(self) -> bool:
        """Contexts can record CUDA graphs of their own: TensorRT-RTX."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def can_record(self, context: Trt, stream: int) -> bool:
        """The caller may record the work of a ready context; only TensorRT-RTX says otherwise, and has its own way."""
        return not (self.records_by_itself and hasattr(context, "is_stream_capturable")) or bool(
            context.is_stream_capturable(stream)
        )

    def take_profile(self, context: Trt, stream: int) -> bool:
        """Makes sure that a context has a profile: before 10 each profile serves one context, unless it is shared."""
        return context.active_optimization_profile >= 0 or bool(context.set_optimization_profile_async(0, stream))

    # --- what came of it ----------------------------------------------------------------------------------------------

    def parser_faults(self, parser: Trt) -> tuple[ParserFault, ...]:
        """What the parser complains of; before 10 it knows nodes by their number only."""
        faults = []
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            name = error.node_name() if hasattr(error, "node_name") else ""
            op = error.node_operator() if hasattr(error, "node_operator") else ""
            faults.append(ParserFault(node=int(error.node()), name=name, op=op, words=error.desc()))
        return tuple(faults)

    def layers(self, network: Trt) -> tuple[NetworkLayer, ...]:
        """The parsed network, layer by layer."""
        layers = (network.get_layer(i) for i in range(network.num_layers))
        return tuple(
            NetworkLayer(
                name=layer.name,
                type=layer.type.name,
                precision=_dtype(layer.get_output(0)) if layer.num_outputs and layer.get_output(0) else "",
            )
            for layer in layers
        )

    def tensors(self, network: Trt) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
        """Inputs and outputs."""
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return tuple(map(_tensor, _inputs(network))), tuple(map(_tensor, outputs))

    def dla_use(self, config: Trt, network: Trt, core: int) -> DlaUse:
        """Which layers the DLA core leaves to the GPU."""
        layers = (network.get_layer(i) for i in range(network.num_layers))
        return DlaUse(core=core, fallback=tuple(layer.name for layer in layers if not config.can_run_on_DLA(layer)))


def _inputs(network: Trt) -> list[Trt]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _tensor(tensor: Trt) -> EngineTensor:
    return EngineTensor(name=tensor.name, dtype=_dtype(tensor), shape=_sides(tensor.shape))


def _sides(shape: Trt) -> tuple[int, ...]:
    return tuple(int(side) for side in shape)


def _dtype(tensor: Trt) -> str:
    return _numpy_name(tensor.dtype)


def _numpy_name(dtype: Trt) -> str:
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())
