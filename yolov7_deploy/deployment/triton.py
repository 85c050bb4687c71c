"""A model repository for the Triton Inference Server, with its client and the command that starts the server.

OUTPUT/client.py                 a client for this model
OUTPUT/NAME/config.pbtxt         the configuration
OUTPUT/NAME/labels.txt           one class name a line
OUTPUT/NAME/1/model.onnx         the model (`model.plan` for TensorRT), and `model.py` for the Python backend
"""

from __future__ import annotations

import re
import shlex
import shutil
import struct
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from yolov7_deploy._output_folder import check_new_folder, new_folder
from yolov7_deploy.deployment.served_model import (
    ServedModel,
    check_batch,
    image_shape,
    label_lines,
    read_served_model,
)
from yolov7_deploy.deployment.triton_config import (
    LABELS,
    TRITON_MAX_BATCH,
    TRITON_NAME,
    WARMUP_IMAGE,
    TritonModel,
    TritonOptions,
    TritonTensor,
    text_format,
    triton_config,
)
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import LoadError, UsageError
from yolov7_deploy.hub import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES
from yolov7_deploy.image import PAD_GREY
from yolov7_deploy.metadata import NMS_OUTPUTS, ModelMetadata
from yolov7_deploy.options import Thresholds, file_thresholds
from yolov7_deploy.output_layout import TensorSpec
from yolov7_deploy.tensorrt.engine import Engine, record_path

ASSETS = Path(__file__).parent.parent / "assets" / "triton"
VERSION = "1"
CLIENT, CONFIG = "client.py", "config.pbtxt"
IMAGE_INPUT = "image"  # of the Python backend: the bytes of an image file
PORTS = (8000, 8001, 8002)  # HTTP, gRPC, metrics
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
# What the client of a network sends, by the type of the input.
_UINT8_CLIENT = {"KIND": "UINT8", "IMPORTS": "", "PIXELS": "letterbox.apply(image_bgr)[None]"}
_FLOAT_CLIENT = {
    "KIND": "FP32",
    "IMPORTS": ", to_network_input",
    "PIXELS": "to_network_input([letterbox.apply(image_bgr)])",
}
# In the server's container, by the suffix of the file.
_EXTRAS = {".onnx": "cpu", **dict.fromkeys(CHECKPOINT_SUFFIXES, "export"), **dict.fromkeys(ENGINE_SUFFIXES, "tensorrt")}


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonRepository:
    """A model repository that was written.

    Attributes:
        path: Its folder.
        name: Name of the model.
        backend: What runs the network.
        max_batch: Maximum batch size; 1 for a file with a fixed batch.
        command: The command that starts the server, which needs Docker.
        notes: What the server needs besides.
    """

    path: Path
    name: str
    backend: str
    max_batch: int
    command: str
    notes: tuple[str, ...] = ()


def write_triton_repository(weights: Path, output: Path, options: TritonOptions | None = None) -> TritonRepository:
    """Write a model repository with one model; a file is copied, never linked.

    Args:
        weights: A model file.
        output: A new or empty folder.
        options: See `TritonOptions`.

    Raises:
        LoadError: The file cannot be opened, or not be served by this backend; the fix is what to type instead.
        UsageError: The folder has other files or cannot be written, or an option contradicts the file.
    """
    options = options or TritonOptions()
    check_new_folder(output)
    name = options.name or _model_name(weights)
    backend = _backend(weights, options.backend)
    model = _python_model(weights, options) if backend == "python" else _network_model(weights, backend, options)
    _check_device(model, options.device)
    with new_folder(output) as folder:
        _write_model(folder / name, name, model, options)
        (folder / CLIENT).write_text(_client(name, model), encoding="utf-8")
    return TritonRepository(
        path=output,
        name=name,
        backend=backend,
        max_batch=max(model.max_batch, 1),
        command=_docker_command(output, model, options),
        notes=model.notes,
    )


def _model_name(weights: Path) -> str:
    """Return the name of the file without what is not allowed in a model's name."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", weights.stem).lstrip(".-")[:100]
    return name if TRITON_NAME.fullmatch(name) else "yolov7"


def _backend(weights: Path, requested: str) -> str:
    """Return the backend for a file.

    Raises:
        UsageError: The requested one runs no such files.
    """
    suffix = weights.suffix.lower()
    natural = "tensorrt" if suffix in ENGINE_SUFFIXES else "python" if suffix in CHECKPOINT_SUFFIXES else "onnxruntime"
    if requested == "tensorrt" and natural != "tensorrt":
        raise UsageError(
            f"--backend tensorrt runs engines, and {weights} is not one.",
            fix="On the machine of the server:  y7 build --weights FILE.onnx --fixed-thresholds",
        )
    if requested == "onnxruntime" and natural != "onnxruntime":
        raise UsageError(
            f"--backend onnxruntime runs ONNX files, and {weights} is not one.",
            fix="Leave --backend out, or pass the .onnx file.",
        )
    return natural if requested == "auto" else requested


def _check_device(model: TritonModel, device: str) -> None:
    if device == "cpu" and model.is_engine:
        raise UsageError(f"--device cpu: {model.file[0]} is an engine, which runs on a GPU.", fix="Leave --device out.")


# --- ONNX Runtime and TensorRT ----------------------------------------------------------------------------------------


def _network_model(weights: Path, backend: str, options: TritonOptions) -> TritonModel:
    """Return a model whose requests are network inputs: Triton runs the file itself."""
    served = read_served_model(weights, alternative="   or serve it as it is:  --backend python")
    max_batch = _max_batch(served, options)
    (images,) = served.inputs
    height, width = served.metadata.default_hw
    is_uint8 = images.dtype == "uint8"
    concrete = (height, width, 3) if is_uint8 else (3, height, width)
    batched = max_batch > 0
    return TritonModel(
        backend=backend,
        file=(weights, "model.plan" if backend == "tensorrt" else "model.onnx"),
        metadata=served.metadata,
        max_batch=max_batch,
        image=_tensor(images, batched=batched, warmup_dims=concrete if batched else (1, *concrete)),
        outputs=tuple(_tensor(tensor, batched=batched) for tensor in served.outputs),
        client=("network", {"HW": f"({height}, {width})", **(_UINT8_CLIENT if is_uint8 else _FLOAT_CLIENT)}),
        notes=_engine_notes(served),
    )


def _max_batch(served: ServedModel, options: TritonOptions) -> int:
    """Return `max_batch_size`: 0 for a file with a fixed batch of 1.

    Raises:
        UsageError: The file does not take the requested batch, or only batches of another size than 1.
    """
    least, most = served.batch_limits
    if least > 1:
        raise UsageError(
            f"{served.path} takes batches of at least {least}, so a server would refuse single images.",
            fix=f"y7 export --weights {served.metadata.source or 'WEIGHTS.pt'} --dynamic-batch",
        )
    if options.max_batch is not None:
        check_batch(served, options.max_batch, "--max-batch")
    if not served.has_dynamic_batch:
        return 0
    return options.max_batch or min(TRITON_MAX_BATCH, most or TRITON_MAX_BATCH)


def _tensor(spec: TensorSpec, *, batched: bool, warmup_dims: tuple[int, ...] = ()) -> TritonTensor:
    sizes = spec.shape[1:] if batched else spec.shape
    dims = tuple(-1 if size is None else size for size in sizes)
    return TritonTensor(name=spec.name, type=_TYPES[spec.dtype], dims=dims, warmup_dims=warmup_dims)


def _engine_notes(served: ServedModel) -> tuple[str, ...]:
    record = served.record
    if record is None:
        return ()
    notes = [
        f"the plan needs the TensorRT that built it, {record.tensorrt}, in the container (--container), and a GPU of "
        f"compute capability {record.compute_capability or 'of the build machine'}"
    ]
    if record.plugin is not None:
        # The backend opens the libraries of `plugins`, which must register themselves (its src/tensorrt.cc).
        notes.append(
            "NMS runs in our plugin: build it with -DY7_STATIC_REGISTRATION=ON (plugins/README.md), mount it, and add "
            "--backend-config=tensorrt,plugins=/plugins/liby7_plugin.so   or build the engine with  --plugin off"
        )
    return tuple(notes)


# --- the Python backend -----------------------------------------------------------------------------------------------


def _python_model(weights: Path, options: TritonOptions) -> TritonModel:
    """Return a model whose requests are image files: a Detector in Triton's Python backend decodes and letterboxes."""
    metadata, thresholds, most = _detector_facts(weights)
    if options.max_batch is not None and most is not None and options.max_batch > most:
        raise UsageError(
            f"{weights} takes at most {most} images at once, --max-batch {options.max_batch} asks for more.",
            fix=f"Leave --max-batch out, or:  y7 export --weights {metadata.source or 'WEIGHTS.pt'} --dynamic-batch",
        )
    file_name = f"model{weights.suffix.lower()}"
    limit = thresholds.max_det
    record = {f"{VERSION}/{record_path(Path(file_name)).name}": record_path(weights)}
    shapes = dict(zip(NMS_OUTPUTS, ((1,), (limit, 4), (limit,), (limit,)), strict=True))
    types = dict(zip(NMS_OUTPUTS, ("int32", "float32", "float32", "int32"), strict=True))
    return TritonModel(
        backend="python",
        file=(weights, file_name),
        metadata=metadata,
        max_batch=options.max_batch or min(TRITON_MAX_BATCH, most or TRITON_MAX_BATCH),
        image=TritonTensor(name=IMAGE_INPUT, type="TYPE_STRING", dims=(1,), warmup_dims=(1,)),
        outputs=tuple(TritonTensor(name=name, type=_TYPES[types[name]], dims=shapes[name]) for name in NMS_OUTPUTS),
        client=("python", {}),
        parameters={
            "weights": file_name,
            "conf": str(thresholds.conf),
            "iou": str(thresholds.iou),
            "max_det": str(limit),
        },
        files={
            f"{VERSION}/model.py": _asset("model.py.in"),
            f"warmup/{WARMUP_IMAGE}": _bytes_element(_grey_image(metadata.default_hw)),
        },
        copies=record if weights.suffix.lower() in ENGINE_SUFFIXES else {},
        notes=("the server's Python needs this package; the command installs it",),
    )


def _detector_facts(weights: Path) -> tuple[ModelMetadata, Thresholds, int | None]:
    """Return metadata, default thresholds and maximum batch size, also of an engine of another machine.

    Raises:
        LoadError: The file cannot be opened.
        MissingLibraryError: The library that runs it is not installed.
    """
    if weights.suffix.lower() in ENGINE_SUFFIXES:
        return _engine_facts(weights)
    with closing(Detector(weights, device="cpu")) as detector:
        return detector.metadata, detector.thresholds, detector.max_batch_size


def _engine_facts(weights: Path) -> tuple[ModelMetadata, Thresholds, int | None]:
    record = Engine.load(weights).record
    if record is None:
        raise LoadError(
            f"{weights} has no build record, so its class names and thresholds are not known.",
            fix=f"Build it here:  y7 build --weights {weights.with_suffix('.onnx').name}",
        )
    nms = record.metadata.nms
    thresholds = Thresholds() if nms is None else file_thresholds(nms)
    return record.metadata, thresholds, image_shape(weights, record).max[0]


def _grey_image(hw: tuple[int, int]) -> bytes:
    """Return a grey PNG file, with which the server warms up."""
    _, data = cv2.imencode(".png", np.full((*hw, 3), PAD_GREY, np.uint8))
    return data.tobytes()


def _bytes_element(data: bytes) -> bytes:
    """Return an element of a BYTES tensor as Triton serializes it: the length as little-endian uint32, and the data."""
    return struct.pack("<I", len(data)) + data


# --- files ------------------------------------------------------------------------------------------------------------


def _write_model(folder: Path, name: str, model: TritonModel, options: TritonOptions) -> None:
    (folder / VERSION).mkdir(parents=True)
    (folder / CONFIG).write_text(text_format(triton_config(name, model, options)), encoding="utf-8")
    (folder / LABELS).write_text(label_lines(model.metadata.class_names), encoding="utf-8")
    source, file_name = model.file
    shutil.copyfile(source, folder / VERSION / file_name)
    for path, other in model.copies.items():
        shutil.copyfile(other, folder / path)
    for path, content in model.files.items():
        target = folder / path
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)


def _client(name: str, model: TritonModel) -> str:
    template, values = model.client
    text = _asset(f"client_{template}.py.in")
    for key, value in {"NAME": name, **values}.items():
        text = text.replace(f"@{key}@", value)
    return text


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _docker_command(output: Path, model: TritonModel, options: TritonOptions) -> str:
    """Return the command that starts the server on the ports of Triton."""
    gpus = ("--gpus", "all") if options.device == "gpu" or model.is_engine else ()
    ports = tuple(word for port in PORTS for word in ("-p", f"{port}:{port}"))
    server = "tritonserver --model-repository=/models"
    if model.backend == "python":
        suffix = model.file[0].suffix.lower()
        extra = "gpu" if suffix == ".onnx" and gpus else _EXTRAS[suffix]
        server = f"bash -c \"pip install 'yolov7-deploy[{extra}]' && {server}\""
    mount = ("-v", f"{output.absolute()}:/models:ro")
    docker = ("docker", "run", "--rm", "--shm-size=1g", *gpus, *ports, *mount, options.container)
    return f"{shlex.join(docker)} {server}"
