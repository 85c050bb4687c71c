"""What the part `int8` needs on the GPU machine: half and INT8 files, and what ONNX Runtime finds with INT8."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.gpu.comparing import SCORE_SAME
from tests.gpu.int8 import ACCURACY, BATCHES, FILE, IMAGES, LABELS, MODELS, NOT_TRAINED, REFERENCE
from tests.gpu.networks import untrained
from tests.gpu.weights import make_up, stripped, unshared
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation import synthetic_image as street
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.evaluation.synthetic_image import drawn_image
from yolov7_deploy.export.onnx_exporter import export_onnx
from yolov7_deploy.export.onnx_model import INPUT_NAME, OnnxModel
from yolov7_deploy.image import Image, fit_letterbox, read_image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.options import ExportOptions, Int8Options, QuantizeOptions, ValOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.quantize import Quantizer

SIDE = 640
MAX_DET = 300  # of the evaluation protocol
CALIBRATED = 96  # images at most
LABELLED = 100  # images at most that AP is measured on
SHOWN = 8  # images whose detections are compared
DRAWN = 8  # images where no others are used
FOUND = 150  # detections in an image above the threshold of a network with made-up weights
HALF_FILE = "yolov7.onnx"  # of the other parts, with the half weights of trained YOLOv7, which travel once
FLOAT, INT8 = "fp32.onnx", "int8.onnx"  # whole, at batch 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A network to export: with its metadata, and the threshold that its files fall back to."""

    network: Yolov7
    metadata: ModelMetadata
    trained: bool
    side: int
    conf: float = ExportOptions().conf

    def exported(self, batch: int) -> OnnxModel:
        """In float32."""
        options = ExportOptions(input_hw=(self.side, self.side), batch=batch, conf=self.conf, max_det=MAX_DET)
        model = export_onnx(self.network, self.metadata, options)
        if not self.trained:
            make_up(model.proto)
        return model


def write_int8(
    folder: Path,
    *,
    models: Iterable[str] = MODELS,
    weights: Path | None = None,
    data: Path | None = None,
    side: int = SIDE,
    batches: Sequence[int] = BATCHES,
) -> None:
    """Files and references of the models; ten minutes with trained weights, mostly calibration and AP.

    Args:
        folder: Where everything goes that travels.
        models: Of MODELS.
        weights: Trained YOLOv7; its weights are made up where there are none, those of every other model always.
        data: Labelled images: trained YOLOv7 is calibrated on those for training, and judged on the others. Where
            there are none, it is calibrated on drawn ones, as are made-up weights, and no AP is measured.
        side: Of the input.
        batches: Of the files.
    """
    known: dict[str, str] = {}
    if (folder / HALF_FILE).exists():
        unshared((folder / HALF_FILE).read_bytes(), known, file=HALF_FILE)
    for name in models:
        started = time.monotonic()
        trained = weights if name == MODELS[0] else None
        labelled = data if trained else None
        dataset = open_dataset(labelled, limit=LABELLED) if labelled else None
        with tempfile.TemporaryDirectory() as made:
            work = Path(made)
            drawn = _drawn(work / "drawn", side)
            canvases = _canvases(dataset, drawn, side)
            source = _trained(trained, side) if trained else _untrained(name, side, work, canvases[0])
            _write_files(folder, name, source, known, work, calibration=labelled or drawn, batches=batches)
            _write_reference(folder / REFERENCE.format(name), work, canvases, trained=source.trained)
            if name == MODELS[0]:
                _write_accuracy(folder, name, work, dataset, trained=source.trained)
        print(f"INT8 files of {name}: {time.monotonic() - started:.0f} s", flush=True)


# --- networks and images --------------------------------------------------------------------------------------------


def _trained(weights: Path, side: int) -> Source:
    checkpoint = load_checkpoint(weights)
    return Source(network=fuse(build_model(checkpoint)), metadata=checkpoint.metadata, trained=True, side=side)


def _untrained(name: str, side: int, work: Path, canvas: Image) -> Source:
    """With a threshold that lets through as many detections as a crowded image has."""
    network, metadata = untrained(name)
    source = Source(network=network, metadata=metadata, trained=False, side=side)
    source.exported(1).save(work / FLOAT)
    with Detector(work / FLOAT, device="cpu") as detector:
        scores = detector(canvas, conf=0.0).scores  # the best first
    return replace(source, conf=float(scores[:FOUND][-1]))


def _drawn(folder: Path, side: int) -> Path:
    """A folder of images that nobody must bring."""
    folder.mkdir()
    images = [street(), *(drawn_image((side, side), seed=seed) for seed in range(1, DRAWN))]
    for number, image in enumerate(images):
        write_image(folder / f"{number}.png", image)
    return folder


def _canvases(dataset: Dataset | None, drawn: Path, side: int) -> list[Image]:
    """Images in the size of the input, so that only the network differs between machines."""
    paths = sorted(drawn.iterdir()) if dataset is None else [dataset.path(i) for i in range(min(SHOWN, len(dataset)))]
    images = map(read_image, paths)
    return [fit_letterbox((one.shape[0], one.shape[1]), (side, side)).apply(one) for one in images]


# --- what travels -----------------------------------------------------------------------------------------------------


def _write_files(
    folder: Path,
    name: str,
    source: Source,
    known: dict[str, str],
    work: Path,
    *,
    calibration: Path,
    batches: Sequence[int],
) -> None:
    """Half and INT8 at each batch size, without what is there already; FLOAT and INT8 whole into `work`."""
    whole = source.exported(1)
    options = QuantizeOptions(cache=None if source.trained else work / "calibration.npz")
    images = open_calibration(calibration, limit=CALIBRATED)
    quantized = Quantizer(whole, images, options, say=lambda words: print(words, flush=True)).run()
    made_up = set() if source.trained else {tensor.name for tensor in whole.proto.graph.initializer}
    for batch in batches:
        model = whole if batch == 1 else source.exported(batch)
        # In front of decoding the network is the same for every batch size, and so are its ranges.
        for lower in (in_half(model), to_int8(model, quantized.calibration, Int8Options())):
            file = FILE.format(model=name, precision=lower.metadata.precision, batch=batch)
            proto = onnx.ModelProto()
            proto.CopyFrom(lower.proto)
            (folder / file).write_bytes(unshared(stripped(proto, made_up), known, file=file))
    whole.save(work / FLOAT)
    quantized.model.save(work / INT8)


def in_half(model: OnnxModel) -> OnnxModel:
    """What `to_fp16` makes of it, which would run sixteen images in more memory than many machines have: here one."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model.proto)
    _batch_of(opened).dim_param = "batch"  # the network in front of decoding takes any
    half = to_fp16(OnnxModel(opened, replace(model.metadata, batch=None)), [street()])
    _batch_of(half.proto).dim_value = model.metadata.batch or 1
    return OnnxModel.of(half.proto, replace(half.metadata, batch=model.metadata.batch))


def _batch_of(proto: onnx.ModelProto) -> onnx.TensorShapeProto.Dimension:
    images = next(entry for entry in proto.graph.input if entry.name == INPUT_NAME)
    return images.type.tensor_type.shape.dim[0]


def _write_reference(path: Path, work: Path, canvases: Sequence[Image], *, trained: bool) -> None:
    """The canvases, what ONNX Runtime finds in them with INT8, and above which score it must be found again."""
    arrays: dict[str, Any] = {"canvases": np.stack(canvases), "trained": np.array(trained)}
    count = 0
    with Detector(work / INT8, device="cpu") as detector:
        arrays["least"] = np.array(detector.thresholds.conf + SCORE_SAME if trained else 0.0)
        for number, canvas in enumerate(canvases):
            found = detector(canvas)
            parts = {"boxes": found.boxes, "scores": found.scores, "classes": found.class_ids}
            arrays |= {f"{part}_{number}": rows for part, rows in parts.items()}
            count += int((found.scores > arrays["least"]).sum())
    assert count or not trained, "nothing is detected in the images: give others with --data"
    np.savez_compressed(path, **arrays)


def _write_accuracy(folder: Path, name: str, work: Path, dataset: Dataset | None, *, trained: bool) -> None:
    """AP and predictions of ONNX Runtime in float32 and in INT8, and the images; or why there are none."""
    told: dict[str, object] = {}
    if dataset is None:
        told["skipped"] = "no labelled images were given to prepare" if trained else NOT_TRAINED
    else:
        for file in (FLOAT, INT8):
            with Detector(work / file, device="cpu") as detector:
                report = evaluate(detector, dataset, options=ValOptions(rect=False, batch=1))
            told[Path(file).stem] = {"ap": report.ap, "images": report.images, "predictions": report.predictions}
            print(f"{name} {file} in ONNX Runtime: AP {report.ap} on {report.images} images", flush=True)
        _copy_labelled(folder, dataset)
    (folder / ACCURACY.format(name)).write_text(json.dumps(told), encoding="utf-8")


def _copy_labelled(folder: Path, dataset: Dataset) -> None:
    """The images into one folder, and their ground truth as COCO has it."""
    paths = [dataset.path(index) for index in range(len(dataset))]
    assert len({path.name for path in paths}) == len(paths), f"two images of {dataset.source} have one name"
    (folder / IMAGES).mkdir()
    for path in paths:
        shutil.copy(path, folder / IMAGES)
    truth = dataset.ground_truth(range(len(dataset)))
    (folder / LABELS).write_text(json.dumps(truth), encoding="utf-8")
