"""`ServedModel`: a file whose network ends with NMS, as a server without this package runs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._text import printable_line
from yolov7_deploy.errors import LoadError, UsageError
from yolov7_deploy.hub import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES, MODEL_SUFFIXES
from yolov7_deploy.inspection.onnx_file import TensorInfo, read_onnx
from yolov7_deploy.metadata import NMS_OUTPUTS, ModelMetadata, NmsMetadata
from yolov7_deploy.output_layout import INPUT_DTYPES, TensorSpec, unknown_layout
from yolov7_deploy.tensorrt.build_record import EngineRecord, EngineTensor, InputShape
from yolov7_deploy.tensorrt.engine import Engine

_RANKS = dict(zip(NMS_OUTPUTS, (2, 3, 2, 2), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model file of this package with NMS inside.

    Attributes:
        path: The file.
        metadata: Its metadata.
        nms: The NMS inside.
        inputs, outputs: All tensors that a server must provide and receives.
        batch_limits: Smallest and largest batch size; `None` for any.
        record: Build record of an engine; `None` for ONNX files.
    """

    path: Path
    metadata: ModelMetadata
    nms: NmsMetadata
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_limits: tuple[int, int | None]
    record: EngineRecord | None = None

    @property
    def has_dynamic_batch(self) -> bool:
        """True if the batch size may vary."""
        return self.batch_limits[0] != self.batch_limits[1]


def read_served_model(path: Path, *, alternative: str = "") -> ServedModel:
    """Return the model in an `.onnx` file, or in an engine with a build record.

    Args:
        path: The file.
        alternative: What else to type for a file that only this package runs, for messages.

    Raises:
        LoadError: The file is missing, damaged, of another kind, of another exporter, without NMS, or an engine that a
            server cannot run; the fix is the command that creates the right file.
    """
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        raise LoadError(
            f"{path} is a checkpoint, which only PyTorch runs.",
            fix=f"Export it:  y7 export --weights {path} --dynamic-batch{alternative}",
        )
    if suffix not in MODEL_SUFFIXES:
        raise LoadError(
            f"{path} is not a model file by its suffix: those end in {', '.join(MODEL_SUFFIXES)}.",
            fix="If it is one, rename it; else pass another file with --weights.",
        )
    read = _read_engine if suffix in ENGINE_SUFFIXES else _read_onnx
    model = read(path, alternative)
    _check_tensors(model)
    return model


def _check_tensors(model: ServedModel) -> None:
    """Check that the file has the image input and the outputs of NMS that its metadata promises."""
    is_expected = (
        [(len(tensor.shape), tensor.dtype in INPUT_DTYPES) for tensor in model.inputs] == [(4, True)]
        and {tensor.name: len(tensor.shape) for tensor in model.outputs}.items() >= _RANKS.items()
        and all(tensor.dtype in ("float32", "int32") for tensor in model.outputs)
    )
    if not is_expected:
        raise unknown_layout(str(model.path), model.inputs, model.outputs, fix=_export(model.metadata))


def image_shape(path: Path, record: EngineRecord) -> InputShape:
    """Return the limits of the image input of an engine.

    Raises:
        LoadError: Its build record has none.
    """
    for shape in record.shapes:
        if len(shape.min) == len(shape.max) == 4:
            return shape
    raise LoadError(
        f"The build record of {path} has no image input.",
        fix=f"Build it again:  y7 build --weights {path.stem}.onnx",
    )


def check_batch(model: ServedModel, batch: int, option: str) -> None:
    """Check that a file takes a batch size.

    Args:
        model: The file.
        batch: The batch size.
        option: The option that asked for it, such as `--max-batch`.

    Raises:
        UsageError: The fix is the command that creates a file for it.
    """
    least, most = model.batch_limits
    if most is None or batch <= most:
        return
    size = f"{model.path} has a fixed batch of {most}" if least == most else f"{model.path} takes at most {most}"
    if model.record is None:
        fix = _export(model.metadata)
    elif least == most:
        fix = f"{_export(model.metadata)}   and build it again."
    else:
        fix = f"y7 build --weights {model.path.stem}.onnx --max-batch {batch} --fixed-thresholds"
    raise UsageError(f"{size}, {option} {batch} asks for more.", fix=fix)


def label_lines(names: Iterable[str]) -> str:
    """Return class names as a file with one line for each class; an empty name, which servers skip, is `class_ID`.

    DeepStream takes a semicolon as the end of a name.
    """
    lines = [printable_line(name).replace(";", ",").strip() for name in names]
    return "".join(f"{line or f'class_{number}'}\n" for number, line in enumerate(lines))


def _read_onnx(path: Path, alternative: str) -> ServedModel:
    file = read_onnx(path)
    if file.metadata is None or not file.metadata.strides:
        raise _foreign(path, alternative)
    metadata, inputs = file.metadata, _specs(tensor for tensor in file.inputs if not tensor.has_default)
    batch = next((tensor.shape[0] for tensor in inputs if tensor.shape), None)
    return ServedModel(
        path=path,
        metadata=metadata,
        nms=_nms(path, metadata, alternative),
        inputs=inputs,
        outputs=_specs(file.outputs),
        batch_limits=(1, None) if batch is None else (batch, batch),
    )


def _read_engine(path: Path, alternative: str) -> ServedModel:
    record = Engine.load(path).record
    if record is None or not record.metadata.strides:
        raise _foreign(path, alternative)
    onnx_file = path.with_suffix(".onnx").name
    if record.product == "tensorrt_rtx":
        raise LoadError(
            f"{path} is an engine of TensorRT-RTX, and servers run engines of TensorRT.",
            fix=f"On the machine of the server:  y7 build --weights {onnx_file} --fixed-thresholds",
        )
    nms = _nms(path, record.metadata, alternative)
    if record.runtime_thresholds:
        raise LoadError(
            f"The thresholds of {path} are inputs of the engine, and servers pass images only.",
            fix=f"y7 build --weights {onnx_file} --fixed-thresholds",
        )
    shape = image_shape(path, record)
    return ServedModel(
        path=path,
        metadata=record.metadata,
        nms=nms,
        inputs=_specs(record.inputs),
        outputs=_specs(record.outputs),
        batch_limits=(shape.min[0], shape.max[0]),
        record=record,
    )


def _specs(tensors: Iterable[TensorInfo | EngineTensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=one.name, dtype=one.dtype, shape=_sizes(one.shape)) for one in tensors)


def _sizes(shape: Iterable[int | str]) -> tuple[int | None, ...]:
    """Return the sizes of a shape in which a dynamic dimension has a name (ONNX) or is -1 (TensorRT)."""
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in shape)


def _nms(path: Path, metadata: ModelMetadata, alternative: str) -> NmsMetadata:
    if metadata.nms is None:
        raise LoadError(
            f"{path} has no NMS inside, so a server would return the decoded rows of all anchors.",
            fix=f"{_export(metadata)}{alternative}",
        )
    return metadata.nms


def _export(metadata: ModelMetadata) -> str:
    return f"y7 export --weights {metadata.source or 'WEIGHTS.pt'} --nms plugin --dynamic-batch"


def _foreign(path: Path, alternative: str) -> LoadError:
    return LoadError(
        f"{path} has no metadata of this package, so its inputs and outputs are not known.",
        fix=f"Export the weights here:  y7 export --weights WEIGHTS.pt --dynamic-batch{alternative}",
    )
