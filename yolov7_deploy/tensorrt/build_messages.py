"""What passes between the process that asks for an engine and the one in which TensorRT builds it, as JSON files."""

from __future__ import annotations

from dataclasses import dataclass

from yolov7_deploy.tensorrt.build_record import (
    DlaUse,
    EngineTensor,
    HardwareCompatibility,
    InputShape,
    NetworkLayer,
    Product,
)

# Files in the folder that both see.
JOB, MODEL, PLAN, REPORT, LOG = "job.json", "model.onnx", "engine.plan", "report.json", "log.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """A TensorRT that is installed here.

    Attributes:
        product, version: Which one.
        abi: Shell of plugins it loads, `v2` or `v3`.
        fault: Why no builder can be made; empty where it can.
        gpu, compute_capability, driver, cuda: The GPU it would build on; empty without one.
        targets: Compute capabilities it can name and build for without such a GPU.
        dla_cores: Cores of the deep learning accelerator.
        plugins: Names of the plugins it comes with.
    """

    product: Product
    version: str
    abi: str = "v3"
    fault: str = ""
    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""
    cuda: str = ""
    targets: tuple[str, ...] = ()
    dla_cores: int = 0
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildJob:
    """What the builder shall do with `MODEL`; see `EngineOptions` for the fields that are called alike.

    Attributes:
        precision: Of the graph: `fp32`, `fp16` or `int8`.
        plugin: Library to load before parsing, empty for none.
        shapes: Of the inputs with an open batch.
        timing_cache: A file, or a folder in which each device has a file; empty for no cache.
    """

    product: Product
    precision: str
    plugin: str = ""
    targets: tuple[str, ...] = ()
    shapes: tuple[InputShape, ...] = ()
    workspace_bytes: int = 0
    opt_level: int = -1
    timing_cache: str = ""
    timing_cache_asked: bool = False
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    sparse: bool = False
    dla: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParserFault:
    """What the ONNX parser says of a node; `op` and `name` are empty where it only knows the node's number."""

    node: int
    name: str
    op: str
    words: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why there is no engine, in the two parts of our errors, or the faults of the parser."""

    message: str
    fix: str = ""
    parser: tuple[ParserFault, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What the builder did; `failure` is `None` where `PLAN` was written."""

    failure: Failure | None = None
    installation: Installation | None = None
    strongly_typed: bool = False
    flags: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    dla: DlaUse | None = None
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    network_layers: tuple[NetworkLayer, ...] = ()
    workspace_bytes: int = 0
    optimization_level: int = -1
    timing_cache: str = ""
    listing: str = ""
    inspector: str = ""
    device_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()
