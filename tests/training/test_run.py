"""A complete training run: the files in its folder, the best epoch, early stopping, options, and refused requests."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.support.training_images import NO_OUTLINE
from tests.support.training_runs import (
    IMAGE_SIZE,
    STEPS,
    TRAIN_IMAGES,
    VAL_IMAGES,
    RecordingCallback,
    load_weights,
    read_losses,
    resume_run,
    small_request,
    train_small,
)
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._version import __version__
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.samples import Labels
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DatasetError, LoadError, TrainingError, UsageError
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.options import ExportOptions, ValOptions
from yolov7_deploy.training import trainer
from yolov7_deploy.training.checkpoints import load_run_state
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.loggers import read_results
from yolov7_deploy.workflows.export import export_weights

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FILES = {
    "best.safetensors",
    "confusion_matrix.png",
    "first_batch.jpg",
    "labels.png",
    "last.safetensors",
    "precision_recall.png",
    "results.csv",
    "results.png",
    "run.json",
    "state.safetensors",
    "val_examples.jpg",
}
MAX_LABELS = 5  # detections of an image that become labels
AP_TOLERANCE = 1e-3  # of torch and ONNX Runtime, which sum in another order


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """The report of a finished run of two epochs, and its callback."""
    callback = RecordingCallback()
    return train_small(data, tmp_path_factory.mktemp("runs") / "run", callback, epochs=2), callback


# --- files and reports ------------------------------------------------------------------------------------------------


def test_the_folder_has_weights_state_table_and_charts_and_nothing_else(done):
    report, _ = done
    assert {path.name for path in report.folder.iterdir()} == FILES
    assert report.weights == report.folder / "best.safetensors"
    assert report.epochs == 2 and report.best_epoch in (1, 2) and report.unreadable == ()


def test_the_table_has_a_line_per_epoch_with_the_values_of_the_callback(done):
    report, callback = done
    table = read_results(report.folder / "results.csv")
    assert [record.epoch for record in table] == [record.epoch for record in callback.records] == [1, 2]
    for line, record in zip(table, callback.records, strict=True):
        assert line.box == pytest.approx(record.box, rel=1e-5) and line.ap == pytest.approx(record.ap, abs=1e-6)
        assert line.total == pytest.approx(line.box + line.obj + line.cls, rel=1e-5)
        assert line.size == IMAGE_SIZE and line.images_per_s > 0 and line.memory_bytes > 0
    assert callback.steps == [(epoch, step) for epoch in (1, 2) for step in range(1, STEPS + 1)]


def test_the_seconds_of_an_epoch_include_its_validation(done):
    report, callback = done
    table = read_results(report.folder / "results.csv")
    assert all(record.seconds > TRAIN_IMAGES / record.images_per_s for record in table)
    assert report.seconds >= sum(record.seconds for record in callback.records)


def test_run_json_has_what_is_needed_to_repeat_the_run(done, data):
    report, _ = done
    document = json.loads((report.folder / "run.json").read_text())
    request = small_request(data, report.folder, epochs=2)
    assert document["request"] == json.loads(json.dumps(asdict(request)))
    assert document["images"] == {"train": TRAIN_IMAGES, "val": VAL_IMAGES}
    assert document["classes"] == list(open_dataset(data, split="train").class_names)
    assert document["weights"] is None and len(document["data_sha256"]) == 64


def test_the_weights_are_a_training_checkpoint_with_class_names_and_anchors(done, data):
    report, _ = done
    checkpoint = load_checkpoint(report.folder / "last.safetensors")
    assert (checkpoint.variant, checkpoint.training) == ("yolov7-tiny", True)
    assert checkpoint.class_names == open_dataset(data, split="train").class_names
    with Detector(report.folder / "last.safetensors", device="cpu", img=IMAGE_SIZE) as detector:
        assert detector.metadata.class_names == checkpoint.class_names


def test_the_weights_carry_their_training_size_classes_version_and_source(done, data):
    report, _ = done
    for name in ("last.safetensors", "best.safetensors"):
        checkpoint = load_checkpoint(report.folder / name)
        assert (checkpoint.training_size, checkpoint.version) == (IMAGE_SIZE, __version__)
        assert checkpoint.class_names == open_dataset(data, split="train").class_names
        assert checkpoint.origin == ""  # trained from random weights


def test_detection_and_export_use_the_training_size_by_default(done, tmp_path):
    best = done[0].weights
    with Detector(best, device="cpu") as detector:
        assert detector.input_hw == (IMAGE_SIZE, IMAGE_SIZE)
    exported = export_weights(best, tmp_path / "best.onnx", options=ExportOptions()).metadata
    assert (exported.input_hw, exported.training_size) == ((IMAGE_SIZE, IMAGE_SIZE), IMAGE_SIZE)
    with Detector(tmp_path / "best.onnx", device="cpu") as detector:
        assert detector.input_hw == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("option", ["rect", "multi_scale"])
def test_a_training_at_several_sizes_stores_the_nominal_one(done, data, tmp_path, no_charts, option):
    weights = done[0].weights
    report = train_small(data, tmp_path / "run", weights=str(weights), img=96, val_every=0, **{option: True})
    checkpoint = load_checkpoint(report.folder / "last.safetensors")
    assert checkpoint.training_size == 96
    assert (checkpoint.origin, checkpoint.origin_sha256) == (weights.name, sha256_hex(weights))


def test_the_state_of_a_finished_run_is_at_the_end_of_its_last_epoch(done):
    report, _ = done
    state, tensors = load_run_state(report.folder)
    assert (state.epoch, state.step, state.best_epoch) == (2, 0, report.best_epoch)
    assert state.ema_updates >= 2 and state.sums.steps == 0
    last = load_weights(report.folder)
    assert all(tensors[f"ema.{name}"].equal(tensor) for name, tensor in last.items())


def test_a_report_is_available_as_plain_data_and_as_text(done):
    report, _ = done
    document = json.loads(json.dumps(report.to_dict()))
    assert (document["epochs"], document["best_epoch"]) == (2, report.best_epoch)
    lines = report.summary().splitlines()
    assert lines[0].split() == ["class", "images", "objects", "P", "R", "AP50", "AP"]
    assert lines[1].startswith("all ") and any(line.startswith("at conf 0.25: ") for line in lines)
    assert lines[-3].startswith(f"best epoch {report.best_epoch} of 2: AP ")
    assert lines[-1] == f"Next:  y7 export --weights {report.weights}"


def test_the_callback_gets_messages_about_dataset_anchors_and_weights(done):
    _, callback = done
    assert f"{TRAIN_IMAGES} training images, {VAL_IMAGES} validation images" in callback.text
    assert "yolov7-tiny from random weights of seed 0, on cpu" in callback.text
    assert "best possible recall" in callback.text
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        assert f"\n{split}: 0 of {count} images have no label file" in callback.text


def test_the_exported_weights_find_the_same_objects(done, data, tmp_path):
    path = done[0].folder / "last.safetensors"
    options = ExportOptions(input_hw=(IMAGE_SIZE, IMAGE_SIZE), nms="none")
    exported = export_weights(path, tmp_path / "last.onnx", options=options)
    assert exported.parity is not None
    reports, truth = [], None
    for file in (path, tmp_path / "last.onnx"):
        with Detector(file, device="cpu", img=IMAGE_SIZE) as detector:
            truth = truth or label_with_detections(detector, data)
            reports.append(evaluate(detector, truth, options=ValOptions(rect=False)))
    assert reports[0].ap > 0.5  # a network that has hardly been trained finds little but its own detections
    assert reports[1].ap == pytest.approx(reports[0].ap, abs=AP_TOLERANCE)
    assert reports[1].ap50 == pytest.approx(reports[0].ap50, abs=AP_TOLERANCE)


def label_with_detections(detector, data):
    """Return the validation dataset with a network's best detections as its labels."""
    dataset = open_dataset(data, split="val")
    records = []
    for index in range(len(dataset)):
        record = dataset.record(index)
        best = detector(record.path, conf=0.001, max_det=MAX_LABELS)
        labels = Labels(
            boxes=best.boxes.astype(np.float64) / IMAGE_SIZE,
            class_ids=best.class_ids.astype(np.int64),
            crowd=np.zeros(len(best), dtype=np.bool_),
            polygons=(NO_OUTLINE,) * len(best),
        )
        records.append(replace(record, labels=labels, areas=None))
    return Dataset(records, source="own", class_names=dataset.class_names, category_ids=dataset.category_ids)


# --- the best epoch and early stopping --------------------------------------------------------------------------------


class FakeEvaluate:
    """A fake of `evaluate` that returns a given AP per call."""

    def __init__(self, *aps):
        self._aps, self.calls = list(aps), []

    def __call__(self, detector, dataset, *, options, progress):
        self.calls.append(detector.metadata.source)
        ap = self._aps.pop(0)
        report = evaluate(detector, dataset, options=options)
        return replace(report, ap=ap, ap50=ap)


@pytest.fixture
def train_with_aps(data, tmp_path, monkeypatch, no_charts):
    """Return a function that trains with given APs, and returns the report, the callback and the fake."""

    def run(*aps, **changes):
        fake, callback = FakeEvaluate(*aps), RecordingCallback()
        monkeypatch.setattr(trainer, "evaluate", fake)
        report = train_small(data, tmp_path / "run", callback, **{"epochs": len(aps), "batch": 6, **changes})
        return report, callback, fake

    return run


def test_the_best_weights_are_replaced_by_those_of_a_better_epoch_only(train_with_aps):
    report, callback, _ = train_with_aps(0.1, 0.3, 0.3)
    assert (report.epochs, report.best_epoch, report.accuracy.ap) == (3, 2, 0.3)
    assert [record.ap for record in callback.records] == [0.1, 0.3, 0.3]
    best, last = load_weights(report.folder, "best.safetensors"), load_weights(report.folder)
    assert report.weights.name == "best.safetensors"
    assert any(not best[name].equal(last[name]) for name in best)


def test_training_stops_early_after_patience_epochs_and_stays_finished_when_resumed(train_with_aps):
    report, callback, fake = train_with_aps(0.1, 0.3, 0.3, 0.2, 0.7, epochs=9, patience=2)
    assert (report.epochs, report.best_epoch, report.accuracy.ap) == (4, 2, 0.3)
    assert "early stopping: no improvement since epoch 2" in callback.text
    assert len(read_results(report.folder / "results.csv")) == 4
    callback = RecordingCallback()
    again = resume_run(report.folder, callback)
    assert (again.epochs, again.best_epoch, callback.steps) == (4, 2, [])
    assert "early stopping" in callback.text
    assert fake.calls == ["last.safetensors"] * 4 + ["best.safetensors"] and again.accuracy.ap == 0.7


def test_with_val_every_the_last_epoch_is_always_validated(train_with_aps):
    report, callback, _ = train_with_aps(0.2, 0.3, epochs=3, val_every=2)
    assert [record.ap for record in callback.records] == [None, 0.2, 0.3]
    assert report.best_epoch == 3


def test_val_every_0_validates_the_last_epoch_only(train_with_aps):
    report, callback, _ = train_with_aps(0.2, epochs=3, val_every=0, patience=1)
    assert [record.ap for record in callback.records] == [None, None, 0.2]
    assert (report.epochs, report.best_epoch) == (3, 3)


def test_a_validation_without_detections_is_still_the_best_so_far(train_with_aps):
    report, _, _ = train_with_aps(None)
    assert report.best_epoch == 1 and report.weights.name == "best.safetensors"
    assert "best epoch" not in report.summary()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("ring", "triangle")},
        {"single_class": True},
        {"rect": True},
        {"image_weights": True, "epochs": 2},
        {"close_mosaic": 5},
        {"multi_scale": True},
        {"adam": True},
        {"freeze": (40,)},
        {"autoanchor": True, "hyp": Hyperparameters(anchor_t=1.2)},
        {"half": True},
        {"linear_lr": True, "ota": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.usefixtures("no_charts")
def test_every_option_trains_an_epoch(data, tmp_path, changes):
    callback = RecordingCallback()
    epochs = changes.get("epochs", 1)
    report = train_small(data, tmp_path / "run", callback, **{"batch": TRAIN_IMAGES, **changes})
    assert report.epochs == epochs and len(read_losses(report.folder)) == epochs
    checkpoint = load_checkpoint(report.weights)
    names = open_dataset(data).class_names
    assert checkpoint.class_names == changes.get("classes", ("object",) if "single_class" in changes else names)
    assert ("new anchors" in callback.text) == ("autoanchor" in changes)
    assert (checkpoint.anchors != find_variant("yolov7-tiny").anchors) == ("autoanchor" in changes)


@pytest.mark.usefixtures("no_charts")
def test_a_yaml_can_name_a_coco_file_for_each_split(data, tmp_path):
    for split in ("train", "val"):
        dataset = open_dataset(data, split=split)
        (tmp_path / f"{split}.json").write_text(json.dumps(dataset.ground_truth(range(len(dataset)))))
    lines = [f"{split}: {data.parent / 'images' / split}" for split in ("train", "val")]
    lines += [f"names: {list(dataset.class_names)}", "annotations: {train: train.json, val: val.json}"]
    (tmp_path / "coco.yaml").write_text("\n".join(lines))
    callback = RecordingCallback()
    report = train_small(tmp_path / "coco.yaml", tmp_path / "run", callback, batch=TRAIN_IMAGES)
    assert f"{TRAIN_IMAGES} training images, {VAL_IMAGES} validation images" in callback.text
    assert report.accuracy.images == VAL_IMAGES


@pytest.mark.usefixtures("no_charts")
def test_new_anchors_that_do_not_fit_better_are_not_used(data, tmp_path):
    callback, matches_nothing = RecordingCallback(), Hyperparameters(anchor_t=1 + 1e-9)
    report = train_small(data, tmp_path / "run", callback, batch=TRAIN_IMAGES, autoanchor=True, hyp=matches_nothing)
    assert "new anchors do not fit better; the current ones are kept" in callback.messages
    assert load_checkpoint(report.weights).anchors == find_variant("yolov7-tiny").anchors


ZERO_LR = Hyperparameters(lr0=0.0, warmup_epochs=0.0)  # no weight changes in training


@pytest.mark.usefixtures("no_charts")
def test_initial_weights_are_loaded_and_recorded(done, data, tmp_path):
    callback, path = RecordingCallback(), done[0].folder / "last.safetensors"
    report = train_small(data, tmp_path / "run", callback, weights=str(path), hyp=ZERO_LR, recalibrate_bn=False)
    assert "yolov7-tiny from last.safetensors: 342 of 342 tensors" in callback.text.replace("\n", " ")
    own, given = load_weights(report.folder), load_weights(path.parent)
    trainable = [name for name in own if "running" not in name and "num_batches" not in name]
    assert all(own[name].equal(given[name]) for name in trainable)
    document = json.loads((report.folder / "run.json").read_text())
    assert document["weights"]["source"] == "last.safetensors" and len(document["weights"]["sha256"]) == 64


@pytest.mark.usefixtures("no_charts")
def test_batchnorm_of_initial_weights_is_recalibrated_on_the_training_images(done, data, tmp_path):
    callback, path = RecordingCallback(), done[0].folder / "last.safetensors"
    report = train_small(data, tmp_path / "run", callback, weights=str(path), hyp=ZERO_LR)
    assert "recalibrated the statistics of 55 BatchNorm layers on 6 images" in callback.text
    own, given = load_weights(report.folder), load_weights(path.parent)
    assert own["model.0.conv.weight"].equal(given["model.0.conv.weight"])
    assert not own["model.0.bn.weight"].equal(given["model.0.bn.weight"])


@pytest.mark.usefixtures("no_charts")
def test_the_same_request_gives_the_same_bytes(done, data, tmp_path):
    again = train_small(data, tmp_path / "run", epochs=2)
    assert read_losses(again.folder) == read_losses(done[0].folder)
    assert (again.folder / "last.safetensors").read_bytes() == (done[0].folder / "last.safetensors").read_bytes()


# --- refused requests -------------------------------------------------------------------------------------------------


def test_a_folder_that_has_a_training_run_is_refused(done, data):
    with pytest.raises(UsageError, match="already has a training run") as caught:
        train_small(data, done[0].folder)
    assert f"y7 train --resume --save-dir {done[0].folder}" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"img": 80}, "--img 80 is not a multiple of yolov7-tiny's stride 32", "--img 96"),
        ({"img": 96, "variant": "yolov7-w6"}, "--img 96 is not a multiple of yolov7-w6's stride 64", "--img 128"),
        ({"auxiliary": "full"}, "--auxiliary full: yolov7-tiny does not have auxiliary heads", "yolov7-w6"),
        ({"auxiliary": "none"}, "--auxiliary none: yolov7-tiny does not have auxiliary heads", "Leave it out"),
        ({"variant": "yolov8"}, "YOLOv7 variant", "yolov7-tiny"),
        ({"img": 32, "batch": 1}, "With one image of 32 pixels, BatchNorm layers of yolov7-tiny have one", "--batch 2"),
        ({"batch": 1, "multi_scale": True}, "With one image of 32 pixels", "--batch 2, or --img 96"),
        ({"freeze": (99,)}, "--freeze 99: yolov7-tiny has layers 0..77", "--freeze 38"),
        ({"device": "gpu"}, "--device gpu is unknown", "auto, cpu, cuda"),
    ],
)
def test_invalid_options_are_refused_with_a_fix(data, tmp_path, changes, message, fix):
    with pytest.raises(UsageError) as caught:
        train_small(data, tmp_path / "run", **changes)
    assert message in caught.value.message and fix in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_weights_of_another_variant_are_refused_before_the_dataset_is_read(done, tmp_path):
    with pytest.raises(UsageError, match=r"is yolov7-tiny, not yolov7\."):
        train_small(tmp_path / "absent.yaml", tmp_path / "run", weights=str(done[0].weights), variant="yolov7")


def test_a_coco_file_alone_is_refused_because_it_has_one_split(tmp_path):
    with pytest.raises(UsageError, match=r"instances\.json has one split") as caught:
        train_small(tmp_path / "instances.json", tmp_path / "run")
    assert "annotations: {train: train.json, val: val.json}" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_missing_dataset_or_weights_file_is_named(data, tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.yaml does not exist"):
        train_small(tmp_path / "absent.yaml", tmp_path / "run")
    with pytest.raises(LoadError, match=r"absent\.pt"):
        train_small(data, tmp_path / "run", weights=str(tmp_path / "absent.pt"))
    assert not (tmp_path / "run").exists()


def test_a_class_that_the_dataset_does_not_have_is_refused(data, tmp_path):
    with pytest.raises(DatasetError, match="does not have class 'unicorn'"):
        train_small(data, tmp_path / "run", classes=("unicorn",))


def test_a_folder_that_cannot_be_created_is_named(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written") as caught:
        train_small(data, tmp_path / "file" / "run")
    assert caught.value.fix == "--save-dir ANOTHER"
