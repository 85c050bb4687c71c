"""Files of a training run: `last` and `best` weights, and the state from which training resumes bit for bit.

The state is one safetensors file with JSON metadata; no file contains pickled objects.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import MAX_CHECKPOINT_BYTES
from yolov7_deploy._serialization import from_dict, parse_json
from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.checkpoint.loader import open_safetensors, save_checkpoint
from yolov7_deploy.checkpoint.quantization import TrainedQuantization
from yolov7_deploy.errors import LoadError, TrainingError, UsageError
from yolov7_deploy.options import Int8Options, TrainOptions
from yolov7_deploy.training.distributed import launch_command
from yolov7_deploy.training.hyperparameters import Hyperparameters

LAST, BEST, STATE = "last.safetensors", "best.safetensors", "state.safetensors"
SCHEMA = 1
_METADATA_KEY = "yolov7_training"
# Names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class QatOptions:
    """Options of quantization-aware training, besides those of every training.

    Attributes:
        calib: Calibration images (see `open_calibration`), or a calibration file of `y7 quantize`; empty for the
            training images.
        target, method, reduce_range: See `Int8Options`; `method` chooses the ranges from which training starts.
    """

    calib: str = ""
    target: str = "tensorrt"
    method: str = "mse"
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduce_range", self.int8.reduce_range)

    @property
    def int8(self) -> Int8Options:
        """The options of the INT8 file."""
        return Int8Options(target=self.target, method=self.method, reduce_range=self.reduce_range)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """Everything that defines a training run.

    Attributes:
        data: Dataset YAML.
        folder: Folder of the run.
        variant: Official name of the variant.
        weights: Weights file that initialises the model; empty for random weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        classes: Names or numbers of the dataset's classes to train on; empty for all.
        single_class: Merge all classes into one.
        tensorboard: Write TensorBoard events; `None` does so if TensorBoard is installed.
        hyp: Hyperparameters.
        options: See `TrainOptions`.
        qat: Train for INT8 (quantization-aware training); `None` trains in float.
    """

    data: str
    folder: str
    variant: str = "yolov7"
    weights: str = ""
    device: str = "auto"
    classes: tuple[str, ...] = ()
    single_class: bool = False
    tensorboard: bool | None = None
    hyp: Hyperparameters = field(default_factory=Hyperparameters)
    options: TrainOptions = field(default_factory=TrainOptions)
    qat: QatOptions | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSums:
    """Losses and positives summed over the steps of an epoch so far."""

    box: float = 0.0
    obj: float = 0.0
    cls: float = 0.0
    positives: float = 0.0
    steps: int = 0

    def add(self, *, box: float, obj: float, cls: float, positives: float) -> LossSums:
        """Return the sums with one more step."""
        return LossSums(
            box=self.box + box,
            obj=self.obj + obj,
            cls=self.cls + cls,
            positives=self.positives + positives,
            steps=self.steps + 1,
        )

    def mean(self) -> LossSums:
        """Return the means per step."""
        n = max(1, self.steps)
        return LossSums(
            box=self.box / n, obj=self.obj / n, cls=self.cls / n, positives=self.positives / n, steps=self.steps
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Progress of a training run, without its tensors.

    Attributes:
        request: The request that started the run; resuming needs no other options.
        data_sha256: Digest of the file names and labels of all images.
        class_names: Classes of the model.
        anchors: Three (width, height) per level, in input pixels.
        world_size: Number of processes.
        weights_sha256: Digest of the weights file that initialised the model; empty for random weights.
        epoch: Completed epochs.
        step: Completed steps of the current epoch.
        sums: Losses of the current epoch.
        ema_updates: Updates of the moving average.
        grad_scale: Loss scale of mixed precision, and the number of steps since it last grew.
        best_fitness: Best fitness so far, -1 before the first validation.
        best_epoch: Epoch of the best fitness, from 1; 0 before the first validation.
        class_aps: AP of each class at the last validation, for `image_weights`.
        seconds: Training time so far.
        quantization: Calibrated INT8 quantization from which a quantization-aware training started; `None` for others.
    """

    request: TrainRequest
    data_sha256: str
    class_names: tuple[str, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    world_size: int
    weights_sha256: str = ""
    epoch: int = 0
    step: int = 0
    sums: LossSums = LossSums()
    ema_updates: int = 0
    grad_scale: tuple[float, float] = (0.0, 0.0)
    best_fitness: float = -1.0
    best_epoch: int = 0
    class_aps: tuple[float, ...] = ()
    seconds: float = 0.0
    quantization: TrainedQuantization | None = None

    @property
    def is_finished(self) -> bool:
        """True if all epochs are completed, or if there was no improvement for `patience` epochs."""
        patience = self.request.options.patience
        stopped_early = patience > 0 and self.best_epoch > 0 and self.epoch - self.best_epoch >= patience
        return self.epoch >= self.request.options.epochs or stopped_early


def save_run_state(folder: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
    """Write the state of a run atomically.

    Raises:
        TrainingError: Weights, moving average or optimizer state are not finite; or the file cannot be written, and
            the previous one is unchanged.
    """
    # Accumulated gradients may overflow in mixed precision; their update is then skipped.
    _check_finite(folder, state, {name: tensor for name, tensor in tensors.items() if not name.startswith("gradient.")})
    path = folder / STATE
    text = json.dumps({"schema": SCHEMA, **asdict(state)}, sort_keys=True)
    try:
        with atomic_write(path) as temporary:
            _write_tensors(temporary, tensors, {_METADATA_KEY: text})
    except OSError as error:
        resume = f"{launch_command(state.world_size)} train --resume --save-dir {folder}"
        raise TrainingError(
            f"{path} cannot be written ({error.strerror or error}). The previous file is unchanged.",
            fix=f"Free space on the disk, then resume:  {resume}",
        ) from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, one tensor after the other.

    `safetensors.torch.save_file` would write to a temporary file of its own, which stays if the process is killed and
    which only its owner may read; `safetensors.torch.save` needs the memory of all tensors twice.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def find_unfinished_run(project: Path) -> Path:
    """Return the folder of the run in a folder of runs that was saved last and is not finished.

    Raises:
        UsageError: There is none.
    """
    states = sorted(project.glob(f"*/{STATE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in states:
        try:
            if not load_run_state(path.parent, with_tensors=False)[0].is_finished:
                return path.parent
        except LoadError:
            return path.parent  # resuming it explains what is wrong with the file
    if states:
        runs = "The only training run" if len(states) == 1 else f"Each of the {len(states)} training runs"
        raise UsageError(
            f"{runs} in {project} is finished.",
            fix=f"Train the newest one further:  y7 train --data D.yaml --weights {states[0].parent / LAST}",
        )
    raise UsageError(f"There is no training run in {project} to resume.", fix="Name its folder:  --save-dir DIR")


def load_run_state(folder: Path, *, with_tensors: bool = True) -> tuple[RunState, dict[str, Tensor]]:
    """Return the state and the tensors that `save_run_state` wrote; without the tensors, only a header is read.

    Raises:
        LoadError: The file does not exist, is damaged, or is from another version.
    """
    path = folder / STATE
    if not path.is_file():
        raise LoadError(
            f"{path}, which is written after the first step, does not exist, so there is no training to resume.",
            fix="Start it again, or name the folder of another run:  y7 train --resume --save-dir runs/train/exp",
        )
    try:
        with open_safetensors(path, max_bytes=MAX_CHECKPOINT_BYTES) as file:
            metadata: dict[str, str] = file.metadata() or {}
            keys = file.keys() if with_tensors else ()
            tensors = {key: file.get_tensor(key) for key in keys}
        raw = parse_json(metadata[_METADATA_KEY])
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError("it has a different version")
        return from_dict(RunState, raw), tensors
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{path} is damaged, or not a training state of this version ({str(error)[:200]!a}).",
            fix=f"Start a new training from its weights:  y7 train --data D.yaml --weights {folder / LAST}",
        ) from error


def save_last(
    folder: Path, state: RunState, ema: Mapping[str, Tensor], quantization: TrainedQuantization | None = None
) -> None:
    """Write the moving average as `last.safetensors`, a checkpoint for all commands.

    Args:
        folder: Folder of the run.
        state: Progress of the run.
        ema: Weights of the moving average.
        quantization: INT8 quantization that these (fused) weights are trained for.

    Raises:
        TrainingError: The weights are not finite.
        CheckpointError: The file cannot be written.
    """
    request = state.request
    tensors = {name: tensor.cpu() for name, tensor in ema.items()}
    _check_finite(folder, state, tensors)
    checkpoint = Checkpoint(
        tensors=tensors,
        variant=request.variant,
        training=quantization is None,
        class_names=state.class_names,
        anchors=state.anchors,
        training_size=request.options.img,
        source=Path(request.weights).name,
        source_sha256=state.weights_sha256,
        quantization=quantization,
    )
    save_checkpoint(checkpoint, folder / LAST)


def save_best(folder: Path) -> None:
    """Copy `last.safetensors` to `best.safetensors`.

    Raises:
        TrainingError: The file cannot be written.
    """
    path = folder / BEST
    try:
        with atomic_write(path) as temporary:
            shutil.copyfile(folder / LAST, temporary)
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(f"{path} cannot be written ({reason}).", fix="Free space on the disk.") from error


def _check_finite(folder: Path, state: RunState, tensors: Mapping[str, Tensor]) -> None:
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        where = f"epoch {state.epoch + 1}, after step {state.step}"
        path = folder / STATE
        previous = f"{path} has the last finite ones." if path.exists() else "None were saved before."
        raise TrainingError(
            f"The weights are NaN or infinite in {where} (first in {wrong[0]}). {previous}",
            fix="Try a lower learning rate (--set lr0=0.001) or --no-half.",
        )
