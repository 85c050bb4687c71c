"""Files for the part `int8`: FP16 and INT8 networks, and the INT8 detections and AP of ONNX Runtime."""

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

from tests.gpu.comparison import SCORE_SAME
from tests.gpu.int8 import ACCURACY, BATCHES, FILE, IMAGES, LABELS, MODELS, NOT_TRAINED, REFERENCE
from tests.gpu.networks import untrained
from tests.gpu.weights import set_synthetic_weights, without_shared_weights, without_weights
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.evaluation.synthetic_image import street_scene, synthetic_image
from yolov7_deploy.image import Image, fit_letterbox, read_image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import INPUT_NAME, OnnxModel
from yolov7_deploy.options import ExportOptions, Int8Options, QuantizeOptions, ValOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.quantize import Quantizer

SIDE = 640  # input size
MAX_DET = 300  # as in the evaluation protocol
MAX_CALIBRATION = 96  # maximum number of calibration images
MAX_LABELLED = 100  # maximum number of images for AP
COMPARED_IMAGES = 8  # number of images whose detections are compared
SYNTHETIC_IMAGES = 8  # number of synthetic images, used if there are no others
SYNTHETIC_DETECTIONS = 150  # detections per image above the threshold of a network with synthetic weights
FP16_FILE = "yolov7.onnx"  # file of the other parts with the FP16 weights of trained YOLOv7, stored once
FLOAT, INT8 = "fp32.onnx", "int8.onnx"  # complete files at batch 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A network to export, with its metadata and the default threshold of its files."""

    network: Yolov7
    metadata: ModelMetadata
    trained: bool
    side: int
    conf: float = ExportOptions().conf

    def exported(self, batch: int) -> OnnxModel:
        """Export the network in float32."""
        options = ExportOptions(input_hw=(self.side, self.side), batch=batch, conf=self.conf, max_det=MAX_DET)
        model = export_onnx(self.network, self.metadata, options)
        if not self.trained:
            set_synthetic_weights(model.proto)
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
    """Write files and references of the models; takes ten minutes with trained weights, mostly calibration and AP.

    Args:
        folder: Output folder.
        models: Some of `MODELS`.
        weights: Trained YOLOv7 weights; without them, and for all other models, weights are synthetic.
        data: Labelled dataset: trained YOLOv7 is calibrated on the training images, and its AP is measured on the
            others. Without it, calibration uses synthetic images, as for synthetic weights, and AP is not measured.
        side: Input size.
        batches: Batch sizes of the files.
    """
    known: dict[str, str] = {}
    if (folder / FP16_FILE).exists():
        without_shared_weights((folder / FP16_FILE).read_bytes(), known, file=FP16_FILE)
    for name in models:
        started = time.monotonic()
        trained = weights if name == MODELS[0] else None
        labelled = data if trained else None
        dataset = open_dataset(labelled, limit=MAX_LABELLED) if labelled else None
        with tempfile.TemporaryDirectory() as made:
            work = Path(made)
            synthetic = _synthetic_folder(work / "synthetic", side)
            canvases = _canvases(dataset, synthetic, side)
            source = _trained(trained, side) if trained else _untrained(name, side, work, canvases[0])
            _write_files(folder, name, source, known, work, calibration=labelled or synthetic, batches=batches)
            _write_reference(folder / REFERENCE.format(name), work, canvases, trained=source.trained)
            if name == MODELS[0]:
                _write_accuracy(folder, name, work, dataset, trained=source.trained)
        print(f"INT8 files of {name}: {time.monotonic() - started:.0f} s", flush=True)


# --- networks and images ----------------------------------------------------------------------------------------------


def _trained(weights: Path, side: int) -> Source:
    checkpoint = load_checkpoint(weights)
    return Source(network=fuse(build_model(checkpoint)), metadata=checkpoint.metadata, trained=True, side=side)


def _untrained(name: str, side: int, work: Path, canvas: Image) -> Source:
    """Return a network with synthetic weights, whose threshold gives as many detections as a crowded image has."""
    network, metadata = untrained(name)
    source = Source(network=network, metadata=metadata, trained=False, side=side)
    source.exported(1).save(work / FLOAT)
    with Detector(work / FLOAT, device="cpu") as detector:
        scores = detector(canvas, conf=0.0).scores  # sorted, best first
    return replace(source, conf=float(scores[:SYNTHETIC_DETECTIONS][-1]))


def _synthetic_folder(folder: Path, side: int) -> Path:
    """Write synthetic images to a folder and return it."""
    folder.mkdir()
    images = [street_scene(), *(synthetic_image((side, side), seed=seed) for seed in range(1, SYNTHETIC_IMAGES))]
    for number, image in enumerate(images):
        write_image(folder / f"{number}.png", image)
    return folder


def _canvases(dataset: Dataset | None, synthetic: Path, side: int) -> list[Image]:
    """Return images letterboxed to the input size, so that only the network differs between machines."""
    paths = (
        sorted(synthetic.iterdir())
        if dataset is None
        else [dataset.path(i) for i in range(min(COMPARED_IMAGES, len(dataset)))]
    )
    images = map(read_image, paths)
    return [fit_letterbox((one.shape[0], one.shape[1]), (side, side)).apply(one) for one in images]


# --- written files ----------------------------------------------------------------------------------------------------


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
    """Write FP16 and INT8 files at each batch size without restorable weights, and complete files to `work`."""
    complete = source.exported(1)
    options = QuantizeOptions(cache=None if source.trained else work / "calibration.npz")
    images = open_calibration(calibration, limit=MAX_CALIBRATION)
    quantized = Quantizer(complete, images, options, log=lambda message: print(message, flush=True)).run()
    synthetic_names = set() if source.trained else {tensor.name for tensor in complete.proto.graph.initializer}
    for batch in batches:
        model = complete if batch == 1 else source.exported(batch)
        # Before decoding, the network and its activation ranges are the same for every batch size.
        for lower in (to_fp16_one_image(model), to_int8(model, quantized.calibration, Int8Options())):
            file = FILE.format(model=name, precision=lower.metadata.precision, batch=batch)
            proto = onnx.ModelProto()
            proto.CopyFrom(lower.proto)
            (folder / file).write_bytes(
                without_shared_weights(without_weights(proto, synthetic_names), known, file=file)
            )
    complete.save(work / FLOAT)
    quantized.model.save(work / INT8)


def to_fp16_one_image(model: OnnxModel) -> OnnxModel:
    """Return `to_fp16(model)`, with ranges measured on a single image: a batch of sixteen takes too much memory."""
    dynamic = onnx.ModelProto()
    dynamic.CopyFrom(model.proto)
    _batch_of(dynamic).dim_param = "batch"  # the network before decoding accepts any batch size
    fp16 = to_fp16(OnnxModel(dynamic, replace(model.metadata, batch=None)), [street_scene()])
    _batch_of(fp16.proto).dim_value = model.metadata.batch or 1
    return OnnxModel.of(fp16.proto, replace(fp16.metadata, batch=model.metadata.batch))


def _batch_of(proto: onnx.ModelProto) -> onnx.TensorShapeProto.Dimension:
    images = next(entry for entry in proto.graph.input if entry.name == INPUT_NAME)
    return images.type.tensor_type.shape.dim[0]


def _write_reference(path: Path, work: Path, canvases: Sequence[Image], *, trained: bool) -> None:
    """Write canvases, the INT8 detections of ONNX Runtime in them, and the score above which they must be found."""
    arrays: dict[str, Any] = {"canvases": np.stack(canvases), "trained": np.array(trained)}
    count = 0
    with Detector(work / INT8, device="cpu") as detector:
        arrays["least"] = np.array(detector.thresholds.conf + SCORE_SAME if trained else 0.0)
        for number, canvas in enumerate(canvases):
            found = detector(canvas)
            parts = {"boxes": found.boxes, "scores": found.scores, "classes": found.class_ids}
            arrays |= {f"{part}_{number}": rows for part, rows in parts.items()}
            count += int((found.scores > arrays["least"]).sum())
    assert count or not trained, "nothing is detected in the images: use others with --data"
    np.savez_compressed(path, **arrays)


def _write_accuracy(folder: Path, name: str, work: Path, dataset: Dataset | None, *, trained: bool) -> None:
    """Write AP and predictions of ONNX Runtime in float32 and INT8, and the images; or the reason why not."""
    accuracy: dict[str, object] = {}
    if dataset is None:
        accuracy["skipped"] = "no labelled images were given to prepare" if trained else NOT_TRAINED
    else:
        for file in (FLOAT, INT8):
            with Detector(work / file, device="cpu") as detector:
                report = evaluate(detector, dataset, options=ValOptions(rect=False, batch=1))
            accuracy[Path(file).stem] = {"ap": report.ap, "images": report.images, "predictions": report.predictions}
            print(f"{name} {file} in ONNX Runtime: AP {report.ap} on {report.images} images", flush=True)
        _copy_labelled(folder, dataset)
    (folder / ACCURACY.format(name)).write_text(json.dumps(accuracy), encoding="utf-8")


def _copy_labelled(folder: Path, dataset: Dataset) -> None:
    """Copy the images to one folder and write their ground truth in COCO format."""
    paths = [dataset.path(index) for index in range(len(dataset))]
    assert len({path.name for path in paths}) == len(paths), f"two images of {dataset.source} have the same name"
    (folder / IMAGES).mkdir()
    for path in paths:
        shutil.copy(path, folder / IMAGES)
    truth = dataset.ground_truth(range(len(dataset)))
    (folder / LABELS).write_text(json.dumps(truth), encoding="utf-8")
