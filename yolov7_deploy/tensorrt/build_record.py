"""EngineRecord: how, where and for what an engine was built, and what of that does not fit another machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from yolov7_deploy._serialization import members_of, shown
from yolov7_deploy.errors import LoadError
from yolov7_deploy.hardware.jetson import version_numbers
from yolov7_deploy.metadata import ModelMetadata

SCHEMA = 1

Product = Literal["tensorrt", "tensorrt_rtx"]
NmsBy = Literal["plugin", "operators", "none"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
AMPERE = (8, 0)  # what TensorRT-RTX builds for, this and later, where no target is named
# Plans marked version compatible also run in these later majors (support matrix of TensorRT 11.4).
_LATER_MAJORS = {8: (10,), 10: (11,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginUse:
    """A plugin library inside an engine: where it was, its version and its shell (`v2` or `v3`)."""

    path: str
    version: str
    abi: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InputShape:
    """The smallest, best and largest shape of an input; three times the same where it is fixed."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTensor:
    """An input or output: `dtype` as NumPy calls it, -1 in `shape` where a dimension is open."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkLayer:
    """A layer as the parser made it, before TensorRT fused anything; `precision` is that of its first output."""

    name: str
    type: str
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DlaUse:
    """The DLA core an engine was built for, and the layers that run on the GPU instead."""

    core: int
    fallback: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMachine:
    """What an engine must fit, as a runtime finds it.

    Attributes:
        product, tensorrt: Which TensorRT and its version.
        compute_capability: `8.6`.
        platform: `linux-x86_64`.
        plugin: The plugin library that is here, `None` without one.
    """

    product: Product
    tensorrt: str
    compute_capability: str
    platform: str
    plugin: PluginUse | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """A field of the record that this machine does not meet.

    Attributes:
        field: Name in the record.
        built, here: Both values, in words.
        repair: What to type.
    """

    field: str
    built: str
    here: str
    repair: str

    def __str__(self) -> str:
        return f"{self.field}: the engine was built {self.built}; this machine has {self.here}.\n{self.repair}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """How, where and for what an engine was built.

    Attributes:
        info: Metadata of the model inside.
        plan_bytes, plan_sha256: Of the plan file.
        product, tensorrt: Which TensorRT built it, and its version.
        cuda, driver: Versions of the CUDA runtime and of the driver, empty where there is none.
        gpu, compute_capability: Where it was built, empty without a GPU.
        targets: Compute capabilities it was built for (TensorRT-RTX only); none means 8.0 and later.
        platform: `linux-x86_64`.
        plugin: The plugin library inside, if any.
        nms_by: Who suppresses: our plugin, operators of the graph, or nobody.
        runtime_thresholds: `conf_threshold` and `iou_threshold` are inputs of the engine.
        strongly_typed: Types are the graph's; otherwise `flags` are permissions.
        flags: Builder flags that were set.
        version_compatible, hardware_compatible: What the plan may be moved to.
        dla: The DLA core, if any.
        shapes: Per input with an open dimension or not.
        inputs, outputs: Tensors of the engine.
        workspace_bytes: Limit given to TensorRT; 0 where it was left to it.
        optimization_level: Of the builder; -1 where this TensorRT has none.
        timing_cache: File that was used, empty for none.
        network_layers: As parsed, which shows who does suppression.
        listing: The builder's own text about the layers it fused; empty where it gave none, or the engine was opened.
        inspector: JSON of the EngineInspector, empty where the engine could not be opened (no GPU).
        device_memory_bytes: What an execution context takes on the GPU; 0 where unknown.
        peak_memory_bytes: Of host memory, in the process that built.
        build_s: Seconds of the build, parsing included.
        onnx_sha256: Of the ONNX file's bytes as given.
        notes: What a reader should know.
        y7_version: Version of this package.
    """

    metadata: ModelMetadata
    plan_bytes: int
    plan_sha256: str
    product: Product
    tensorrt: str
    cuda: str = ""
    driver: str = ""
    gpu: str = ""
    compute_capability: str = ""
    targets: tuple[str, ...] = ()
    platform: str = ""
    plugin: PluginUse | None = None
    nms_by: NmsBy = "none"
    runtime_thresholds: bool = False
    strongly_typed: bool = False
    flags: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    dla: DlaUse | None = None
    shapes: tuple[InputShape, ...] = ()
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    workspace_bytes: int = 0
    optimization_level: int = -1
    timing_cache: str = ""
    network_layers: tuple[NetworkLayer, ...] = field(default=(), repr=False)
    listing: str = field(default="", repr=False)
    inspector: str = field(default="", repr=False)
    device_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    build_s: float = 0.0
    onnx_sha256: str = ""
    notes: tuple[str, ...] = ()
    y7_version: str = ""

    def to_json(self) -> str:
        """Sorted JSON, the same bytes for the same record."""
        record = asdict(self) | {"schema": SCHEMA, "metadata": json.loads(self.metadata.to_json())}
        return json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str = "the build record") -> EngineRecord:
        """The record written by `to_json`; fields of a newer writer are left out.

        Args:
            text: JSON.
            name: What the message calls it.

        Raises:
            LoadError: No record of this schema; the message names the field.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict):
                raise ValueError(f"not an object but {type(raw).__name__}")
            if raw.get("schema") != SCHEMA:
                raise ValueError(f"schema is {shown(raw.get('schema'))}, this version reads {SCHEMA}")
            metadata = ModelMetadata.from_json(json.dumps(raw.pop("metadata", None)))
            return cls(metadata=metadata, **members_of(cls, raw, leave="metadata"))
        except (ValueError, RecursionError, LoadError) as error:
            reason = error.message if isinstance(error, LoadError) else error
            raise LoadError(
                f"{name} cannot be used: {reason}.", fix="Build the engine again:  y7 build --weights NAME.onnx"
            ) from error

    def mismatches(self, machine: EngineMachine, *, engine: str = "NAME.engine") -> list[Mismatch]:
        """What keeps this engine from running on a machine, the most fundamental first; empty if nothing is known to.

        Args:
            machine: Where it shall run.
            engine: Name of the file, for the commands that repair.
        """
        build = f"Build it here:  y7 build --weights {engine.rpartition('.')[0] or engine}.onnx"
        found = [
            self._product(machine, build),
            self._version(machine, build),
            self._capability(machine, build),
            self._platform(machine, build),
            self._plugin(machine, build),
        ]
        return [mismatch for mismatch in found if mismatch is not None]

    def _product(self, machine: EngineMachine, build: str) -> Mismatch | None:
        if machine.product == self.product:
            return None
        here = f"{TITLES[machine.product]} {machine.tensorrt}"
        return Mismatch(field="product", built=f"by {TITLES[self.product]} {self.tensorrt}", here=here, repair=build)

    def _version(self, machine: EngineMachine, build: str) -> Mismatch | None:
        if machine.product != self.product:
            return None
        built, here = version_numbers(self.tensorrt), version_numbers(machine.tensorrt)
        common = min(len(built), len(here))
        if built[:common] == here[:common]:
            return None
        if self.version_compatible and common:
            same_line = built[0] == here[0] and here[:common] > built[:common]
            if same_line or here[0] in _LATER_MAJORS.get(built[0], ()):
                return None
        hint = "" if self.version_compatible else "   (--version-compatible there makes engines for later versions)"
        title = TITLES[self.product]
        return Mismatch(
            field="tensorrt",
            built=f"by {title} {self.tensorrt}",
            here=f"{title} {machine.tensorrt}",
            repair=build + hint,
        )

    def _capability(self, machine: EngineMachine, build: str) -> Mismatch | None:
        here = machine.compute_capability
        wanted = self.targets or ((self.compute_capability,) if self.compute_capability else ())
        if self.product == "tensorrt_rtx" and not self.targets:
            wanted = () if version_numbers(here) >= AMPERE else ("8.0 and later",)
        if not here or not wanted or here in wanted:
            return None
        if self.hardware_compatible == "ampere_plus" and version_numbers(here) >= AMPERE:
            return None
        if self.product == "tensorrt_rtx":
            targets = ",".join(f"sm{text.replace('.', '')}" for text in (*self.targets, here))
            build += f" --target {targets}"
        return Mismatch(
            field="targets" if self.product == "tensorrt_rtx" else "compute_capability",
            built=f"for compute capability {', '.join(wanted)}",
            here=f"compute capability {here}",
            repair=build,
        )

    def _platform(self, machine: EngineMachine, build: str) -> Mismatch | None:
        if not self.platform or not machine.platform or self.platform == machine.platform:
            return None
        return Mismatch(field="platform", built=f"on {self.platform}", here=machine.platform, repair=build)

    def _plugin(self, machine: EngineMachine, build: str) -> Mismatch | None:
        wanted, here = self.plugin, machine.plugin
        if wanted is None or (here and (here.version, here.abi) == (wanted.version, wanted.abi)):
            return None
        return Mismatch(
            field="plugin",
            built=f"with the plugin {wanted.version} ({wanted.abi})",
            here=f"version {here.version} ({here.abi})" if here else "none",
            repair=f"Build the plugin here:  y7 plugin   or without it:  {build.partition('  ')[2]} --plugin off",
        )
