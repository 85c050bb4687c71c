"""Quantization-aware training of the bundled network: what INT8 loses with calibration alone, and after a few epochs.

Standard INT8 for CPUs goes through the commands: `train(qat=True)`, `export`, and AP of the file in ONNX Runtime and
OpenVINO beside that of the fake-quantized PyTorch network, on more images: sums in another order round some values to
the next integer, which changes AP by chance. INT8 is made hard by emulating activations of fewer bits,
with ranges that calibration chooses for these bits; that network is trained and evaluated in PyTorch.

python benchmarks/qat.py --work FOLDER

An interrupted benchmark measures only the missing cases when the script is run again with the same folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from recording import parser, record

from yolov7_deploy.checkpoint import Checkpoint, load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, Int8Options, TrainOptions, ValOptions
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.fake_quantize import FakeQuantizedYolov7, load_fake_quantized, scale_name
from yolov7_deploy.precision.histogram import Histogram, choose_range
from yolov7_deploy.precision.qat import calibrated_network
from yolov7_deploy.runtimes.pytorch import PytorchRuntime
from yolov7_deploy.training.augment import Augmentation
from yolov7_deploy.training.dataloader import TrainLoader
from yolov7_deploy.training.dataset import ImageStore
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import PRESETS
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.train_step import TrainStep
from yolov7_deploy.workflows.functions import export, train

TRAIN_IMAGES, VAL_IMAGES, IMAGE_SIZE, SEED = 240, 500, 320, 1  # the network was trained on images of seed 0
EQUALITY_IMAGES = 2000  # on which the AP of the file and that of the PyTorch network are compared
STANDARD = ValOptions(rect=False)
RUNTIMES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--work", type=Path, required=True, help="folder for dataset and runs")
    arguments.add_argument("--img", type=int, default=160)
    arguments.add_argument("--bits", type=int, nargs="*", default=[6], help="of emulated activations")
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--batch", type=int, default=8)
    options = arguments.parse_args()
    data = write_shapes(options.work / "shapes", train=TRAIN_IMAGES, val=VAL_IMAGES, size=IMAGE_SIZE, seed=SEED)
    settings = TrainOptions(
        epochs=options.epochs, batch=options.batch, nominal_batch=options.batch, img=options.img, workers=0
    )
    # Each case has a process with one thread, so that the result does not depend on the number of cores.
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=use_one_thread) as pool:
        names = ["standard INT8 (cpu)", *(f"{bits}-bit activations" for bits in options.bits)]
        many = write_shapes(options.work / "many", train=1, val=EQUALITY_IMAGES, size=IMAGE_SIZE, seed=SEED)
        cases = {name: pool.submit(measure, options.work, name, data, many, settings) for name in names}
    record(
        "qat",
        options.machine,
        {
            "weights": bundled_weights().name,
            "images": {"train": TRAIN_IMAGES, "val": VAL_IMAGES, "equality": EQUALITY_IMAGES, "size": options.img},
            "training": {"epochs": options.epochs, "batch": options.batch, "hyperparameters": "qat"},
            **{name: case.result() for name, case in cases.items()},
        },
    )


def use_one_thread() -> None:
    torch.set_num_threads(1)


def measure(work: Path, name: str, data: Path, many: Path, options: TrainOptions) -> dict[str, object]:
    """Return the result of a case, which an earlier run may have written to a file of its name."""
    path = work / f"{name}.json"
    if not path.exists():
        bench, bits = QatBenchmark(data, options), name.partition("-bit")[0]
        result = bench.measure_hard(int(bits)) if bits.isdigit() else bench.measure_standard(work, many)
        path.write_text(json.dumps(result))
    found: dict[str, object] = json.loads(path.read_text())
    return found


class QatBenchmark:
    """Trainings of the bundled network on one dataset."""

    def __init__(self, data: Path, options: TrainOptions) -> None:
        self._data, self._options = data, options
        self._val: Dataset = open_dataset(data, split="val")
        self._checkpoint: Checkpoint = load_checkpoint(bundled_weights())
        self._model = fuse(build_model(self._checkpoint))
        self.float_ap = self._ap_of_file(bundled_weights())

    # --- AP -----------------------------------------------------------------------------------------------------------

    def _ap_of_file(self, path: Path, runtime: str = "auto") -> float:
        with Detector(path, device="cpu", runtime=runtime, img=self._options.img) as detector:
            return self._ap(detector)

    def _ap_of_network(self, network: Yolov7) -> float:
        """Return the AP of a network in PyTorch; the runtime converts it, but in float32 to the same values."""
        with Detector(bundled_weights(), device="cpu", img=self._options.img) as detector:
            detector._runtime = PytorchRuntime(network.eval(), self._checkpoint.metadata)
            return self._ap(detector)

    def _ap(self, detector: Detector) -> float:
        return round(evaluate(detector, self._val, options=STANDARD).ap or 0.0, 5)

    # --- standard INT8 ------------------------------------------------------------------------------------------------

    def measure_standard(self, work: Path, many: Path) -> dict[str, object]:
        """Return the AP of calibration alone and of the trained file, and that of file and network on many images."""
        options, started = self._options, time.perf_counter()
        export_options = {"img": options.img, "int8_target": "cpu", "verify": False}
        calibrated = export(
            bundled_weights(), work / "ptq.onnx", precision="int8", calib=self._data, **export_options
        ).path
        shutil.rmtree(work / "run", ignore_errors=True)  # of an interrupted benchmark
        report = train(
            self._data, bundled_weights(), qat=True, int8_target="cpu", epochs=options.epochs, batch=options.batch,
            img=options.img, device="cpu", workers=0, save_dir=work / "run", tensorboard=False,
            nominal_batch=options.nominal_batch,
        )  # fmt: skip
        trained = export(report.weights, work / "qat.onnx", precision="int8", **export_options).path
        network = load_fake_quantized(load_checkpoint(report.weights))
        aps = {"float": self.float_ap, "calibrated, OpenVINO": self._ap_of_file(calibrated, "openvino")}
        aps |= {f"trained, {name}": self._ap_of_file(trained, runtime) for name, runtime in RUNTIMES.items()}
        self._val = open_dataset(many, split="val")
        equality = {name: self._ap_of_file(trained, runtime) for name, runtime in RUNTIMES.items()}
        equality["PyTorch"] = self._ap_of_network(network)
        network.set_inner_pairs(enabled=False)
        equality["PyTorch as OpenVINO rounds"] = self._ap_of_network(network)
        result = {
            "ap": aps,
            "equality": equality,
            "best_epoch": report.best_epoch,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print("standard", result, flush=True)
        return result

    # --- fewer bits ---------------------------------------------------------------------------------------------------

    def measure_hard(self, bits: int) -> dict[str, object]:
        """Return the AP with activations of fewer bits: of calibration alone, and after training."""
        started = time.perf_counter()
        network = self._coarse_network(bits)
        calibrated = self._ap_of_network(network)
        print(bits, "bits, calibrated", calibrated, flush=True)
        trained = self._ap_of_network(self._train(network))
        lost = self.float_ap - calibrated
        result = {
            "ap": {"float": self.float_ap, "calibrated": calibrated, "trained": trained},
            "share_won_back": round((trained - calibrated) / lost, 3),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(bits, "bits", result, flush=True)
        return result

    def _coarse_network(self, bits: int) -> FakeQuantizedYolov7:
        """Return a calibrated network for TensorRT whose activations have fewer bits."""
        size = (self._options.img, self._options.img)
        exported = export_onnx(self._model, self._checkpoint.metadata, ExportOptions(input_hw=size, nms="none"))
        calibration = calibrate(exported, open_calibration(self._data))
        network = calibrated_network(self._model, exported, calibration, Int8Options(target="tensorrt")).model
        coarsen(network, calibration.histograms, 2 ** (bits - 1) - 1)
        return network

    def _train(self, network: FakeQuantizedYolov7) -> FakeQuantizedYolov7:
        """Train as `y7 train --qat` does, and return a network with the moving average."""
        options, hyp = self._options, PRESETS["qat"]
        store = ImageStore(open_dataset(self._data, split="train"), size=options.img, cache_bytes=2**28)
        augmentation = Augmentation(hyp=hyp, size=options.img, close_mosaic_epoch=None)
        loader = TrainLoader(store, augmentation, batch=options.batch, workers=0, seed=options.seed)
        schedule = Schedule(
            hyp=hyp, epochs=options.epochs, steps_per_epoch=loader.steps, batch=options.batch,
            nominal_batch=options.nominal_batch, linear=False,
        )  # fmt: skip
        step = TrainStep(
            network, hyp=hyp, options=replace(options, half=False), schedule=schedule, distributed=DistributedContext()
        )
        for epoch in range(options.epochs):
            step.train()
            for index, batch in enumerate(loader.epoch(epoch)):
                metrics = step.run(batch, epoch=epoch, step=epoch * loader.steps + index, epoch_step=index)
            print("epoch", epoch + 1, "box", metrics.box, "obj", metrics.obj, "cls", metrics.cls, flush=True)
        loader.close()
        network.load_state_dict(step.ema.tensors)
        return network


def coarsen(network: FakeQuantizedYolov7, histograms: Mapping[str, Histogram], levels: int) -> None:
    """Give every activation 2 `levels` + 1 integers, and the range that calibration chooses for so many."""
    placement = network.placement
    with torch.no_grad():
        for name, group in placement.scale_groups.items():
            quantizer = network.quantizers[scale_name(placement, name).replace(".", "/")]
            clip = choose_range(Histogram.sum(histograms[one] for one in group), "mse", levels)
            quantizer.scale.fill_(clip / levels)
            quantizer.low, quantizer.high = -levels, levels


if __name__ == "__main__":
    main()
