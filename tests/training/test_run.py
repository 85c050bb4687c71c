"""A whole training of seconds: what it leaves in its folder, which epoch is best, when it ends, what it refuses."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.support.training_images import NO_OUTLINE
from tests.support.training_runs import (
    SIZE,
    STEPS,
    TRAIN,
    VAL,
    Notes,
    leave_out_charts,
    losses,
    small_request,
    weights,
)
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.samples import Labels
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DatasetError, LoadError, TrainingError, UsageError
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.options import ExportOptions, ValOptions
from yolov7_deploy.training import trainer
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.loggers import read_results
from yolov7_deploy.training.resume_state import load_run_state
from yolov7_deploy.training.run import describe_report, report_document, resume, train
from yolov7_deploy.workflows.export import export_weights

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FILES = {
    "best.safetensors",
    "first_batch.jpg",
    "labels.png",
    "last.safetensors",
    "precision_recall.png",
    "results.csv",
    "results.png",
    "run.json",
    "state.safetensors",
}
TOP = 5  # detections of an image
SAME_AP = 1e-3  # of torch and ONNX Runtime, which add in another order


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished training of two epochs, and who looked on."""
    notes = Notes()
    report = train(small_request(data, tmp_path_factory.mktemp("runs") / "run", epochs=2), watch=notes)
    return report, notes


# --- what is there afterwards -----------------------------------------------------------------------------------------


def test_the_folder_holds_weights_state_table_and_charts_and_nothing_else(done):
    report, _ = done
    assert {path.name for path in report.folder.iterdir()} == FILES
    assert report.weights == report.folder / "best.safetensors"
    assert report.epochs == 2 and report.best_epoch in (1, 2) and report.unreadable == ()


def test_the_table_has_a_line_an_epoch_and_the_watch_sees_the_same(done):
    report, notes = done
    table = read_results(report.folder / "results.csv")
    assert [record.epoch for record in table] == [record.epoch for record in notes.records] == [1, 2]
    for line, seen in zip(table, notes.records, strict=True):
        assert line.box == pytest.approx(seen.box, rel=1e-5) and line.ap == pytest.approx(seen.ap, abs=1e-6)
        assert line.total == pytest.approx(line.box + line.obj + line.cls, rel=1e-5)
        assert line.size == SIZE and line.images_per_s > 0 and line.memory_bytes > 0
    assert notes.steps == [(epoch, step) for epoch in (1, 2) for step in range(1, STEPS + 1)]


def test_the_seconds_of_an_epoch_include_its_validation(done):
    report, notes = done
    table = read_results(report.folder / "results.csv")
    assert all(record.seconds > TRAIN / record.images_per_s for record in table)
    assert report.seconds >= sum(record.seconds for record in notes.records)


def test_run_json_is_what_is_needed_to_repeat_it(done, data):
    report, _ = done
    document = json.loads((report.folder / "run.json").read_text())
    request = small_request(data, report.folder, epochs=2)
    assert document["request"] == json.loads(json.dumps(asdict(request)))
    assert document["images"] == {"train": TRAIN, "val": VAL}
    assert document["classes"] == list(open_dataset(data, split="train").class_names)
    assert document["weights"] is None and len(document["data_sha256"]) == 64


def test_the_weights_are_a_training_checkpoint_with_names_and_anchors(done, data):
    report, _ = done
    checkpoint = load_checkpoint(report.folder / "last.safetensors")
    assert (checkpoint.variant, checkpoint.training) == ("yolov7-tiny", True)
    assert checkpoint.class_names == open_dataset(data, split="train").class_names
    with Detector(report.folder / "last.safetensors", device="cpu", img=SIZE) as detector:
        assert detector.metadata.class_names == checkpoint.class_names


def test_the_state_says_that_it_is_over(done):
    report, _ = done
    state, tensors = load_run_state(report.folder / "state.safetensors")
    assert (state.epoch, state.step, state.best_epoch) == (2, 0, report.best_epoch)
    assert state.updates >= 2 and state.sums.steps == 0
    last = weights(report.folder)
    assert all(tensors[f"average.{name}"].equal(tensor) for name, tensor in last.items())


def test_a_report_is_plain_data_and_words(done):
    report, _ = done
    document = json.loads(json.dumps(report_document(report)))
    assert (document["epochs"], document["best_epoch"]) == (2, report.best_epoch)
    lines = describe_report(report)
    assert lines[0].startswith(f"best epoch {report.best_epoch} of 2: AP ")
    assert lines[-1] == f"Next:  y7 export --weights {report.weights}"


def test_the_watch_hears_of_data_anchors_and_weights(done):
    _, notes = done
    assert f"{TRAIN} images to train on, {VAL} to validate" in notes.said
    assert "yolov7-tiny from random weights of seed 0, on cpu" in notes.said
    assert "can be found" in notes.said


def test_the_weights_are_exported_as_they_are_and_find_the_same(done, data, tmp_path):
    path = done[0].folder / "last.safetensors"
    exported = export_weights(path, tmp_path / "last.onnx", options=ExportOptions(input_hw=(SIZE, SIZE), nms="none"))
    assert exported.parity is not None
    found, truth = [], None
    for file in (path, tmp_path / "last.onnx"):
        with Detector(file, device="cpu", img=SIZE) as detector:
            truth = truth or own_detections(detector, data)
            found.append(evaluate(detector, truth, options=ValOptions(rect=False)))
    assert found[0].ap > 0.5  # so young a network finds little else than what itself says
    assert found[1].ap == pytest.approx(found[0].ap, abs=SAME_AP)
    assert found[1].ap50 == pytest.approx(found[0].ap50, abs=SAME_AP)


def own_detections(detector, data):
    """The images to validate on, with a network's best detections as their labels."""
    real = open_dataset(data, split="val")
    records = []
    for index in range(len(real)):
        record = real.record(index)
        best = detector(record.path, conf=0.001, max_det=TOP)
        labels = Labels(
            boxes=best.boxes.astype(np.float64) / SIZE,
            class_ids=best.class_ids.astype(np.int64),
            crowd=np.zeros(len(best), dtype=np.bool_),
            polygons=(NO_OUTLINE,) * len(best),
        )
        records.append(replace(record, labels=labels, areas=None))
    return Dataset(records, source="own", class_names=real.class_names, category_ids=real.category_ids)


# --- the best epoch, and the end --------------------------------------------------------------------------------------


class Measured:
    """Stands for the validation: AP as it is told, one a call."""

    def __init__(self, *aps):
        self._aps, self.calls = list(aps), []

    def __call__(self, detector, dataset, *, options, progress):
        self.calls.append(detector.metadata.source)
        ap = self._aps.pop(0)
        report = evaluate(detector, dataset, options=options)
        return replace(report, ap=ap, ap50=ap)


@pytest.fixture
def judged(data, tmp_path, monkeypatch):
    """Trains with these validations; gives report, watch and validations."""
    leave_out_charts(monkeypatch)

    def run(*aps, **changes):
        measured, notes = Measured(*aps), Notes()
        monkeypatch.setattr(trainer, "evaluate", measured)
        request = small_request(data, tmp_path / "run", **{"epochs": len(aps), "batch": 6, **changes})
        return train(request, watch=notes), notes, measured

    return run


def test_the_best_epoch_is_kept_and_later_ones_only_if_they_are_better(judged):
    report, notes, _ = judged(0.1, 0.3, 0.3)
    assert (report.epochs, report.best_epoch, report.accuracy.ap) == (3, 2, 0.3)
    assert [record.ap for record in notes.records] == [0.1, 0.3, 0.3]
    best, last = weights(report.folder, "best.safetensors"), weights(report.folder)
    assert report.weights.name == "best.safetensors"
    assert any(not best[name].equal(last[name]) for name in best)


def test_training_ends_after_patience_epochs_without_progress_and_is_over_for_resume_too(judged):
    report, notes, measured = judged(0.1, 0.3, 0.3, 0.2, 0.7, epochs=9, patience=2)
    assert (report.epochs, report.best_epoch, report.accuracy.ap) == (4, 2, 0.3)
    assert "no progress since epoch 2: training ends" in notes.said
    assert len(read_results(report.folder / "results.csv")) == 4
    later = Notes()
    again = resume(report.folder, watch=later)
    assert (again.epochs, again.best_epoch, later.steps) == (4, 2, [])
    assert "training ends" in later.said
    assert measured.calls == ["last.safetensors"] * 4 + ["best.safetensors"] and again.accuracy.ap == 0.7


def test_epochs_in_between_are_not_validated_but_the_last_is(judged):
    report, notes, _ = judged(0.2, 0.3, epochs=3, val_every=2)
    assert [record.ap for record in notes.records] == [None, 0.2, 0.3]
    assert report.best_epoch == 3


def test_val_every_0_validates_the_last_epoch_only(judged):
    report, notes, _ = judged(0.2, epochs=3, val_every=0, patience=1)
    assert [record.ap for record in notes.records] == [None, None, 0.2]
    assert (report.epochs, report.best_epoch) == (3, 3)


def test_a_validation_that_finds_nothing_is_still_the_best_so_far(judged):
    report, _, _ = judged(None)
    assert report.best_epoch == 1 and report.weights.name == "best.safetensors"
    assert len(describe_report(report)) == 2


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
def test_every_option_trains_an_epoch(data, tmp_path, monkeypatch, changes):
    leave_out_charts(monkeypatch)
    notes = Notes()
    epochs = changes.get("epochs", 1)
    report = train(small_request(data, tmp_path / "run", **{"batch": TRAIN, **changes}), watch=notes)
    assert report.epochs == epochs and len(losses(report.folder)) == epochs
    checkpoint = load_checkpoint(report.weights)
    names = open_dataset(data).class_names
    assert checkpoint.class_names == changes.get("classes", ("object",) if "single_class" in changes else names)
    assert ("new anchors" in notes.said) == ("autoanchor" in changes)
    assert (checkpoint.anchors != find_variant("yolov7-tiny").anchors) == ("autoanchor" in changes)


def test_weights_to_begin_with_are_named_and_taken(done, data, tmp_path, monkeypatch):
    leave_out_charts(monkeypatch)
    notes, path = Notes(), done[0].folder / "last.safetensors"
    hyp = Hyperparameters(lr0=0.0, warmup_epochs=0.0)
    report = train(small_request(data, tmp_path / "run", weights=str(path), hyp=hyp, rebase_bn=False), watch=notes)
    assert "yolov7-tiny from last.safetensors: 342 of 342 tensors" in notes.said.replace("\n", " ")
    own, given = weights(report.folder), weights(path.parent)
    learned = [name for name in own if "running" not in name and "num_batches" not in name]
    assert all(own[name].equal(given[name]) for name in learned)
    document = json.loads((report.folder / "run.json").read_text())
    assert document["weights"]["source"] == "last.safetensors" and len(document["weights"]["sha256"]) == 64


def test_weights_to_begin_with_get_statistics_of_the_images_and_stay_the_same_network(
    done, data, tmp_path, monkeypatch
):
    leave_out_charts(monkeypatch)
    notes, path = Notes(), done[0].folder / "last.safetensors"
    hyp = Hyperparameters(lr0=0.0, warmup_epochs=0.0)
    report = train(small_request(data, tmp_path / "run", weights=str(path), hyp=hyp), watch=notes)
    assert "statistics of 55 BatchNorm layers are those of 6 images now" in notes.said
    own, given = weights(report.folder), weights(path.parent)
    assert own["model.0.conv.weight"].equal(given["model.0.conv.weight"])
    assert not own["model.0.bn.weight"].equal(given["model.0.bn.weight"])


def test_the_same_request_gives_the_same_bytes(done, data, tmp_path, monkeypatch):
    leave_out_charts(monkeypatch)
    again = train(small_request(data, tmp_path / "run", epochs=2), watch=Notes())
    assert losses(again.folder) == losses(done[0].folder)
    assert (again.folder / "last.safetensors").read_bytes() == (done[0].folder / "last.safetensors").read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_training_is_refused(done, data):
    with pytest.raises(UsageError, match="already holds a training") as caught:
        train(small_request(data, done[0].folder), watch=Notes())
    assert f"y7 train --resume --save-dir {done[0].folder}" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"img": 80}, "--img 80 is no multiple of yolov7-tiny's stride 32", "--img 96"),
        ({"img": 96, "variant": "yolov7-w6"}, "--img 96 is no multiple of yolov7-w6's stride 64", "--img 128"),
        ({"auxiliary": "full"}, "--auxiliary full: yolov7-tiny has no auxiliary heads", "yolov7-w6"),
        ({"auxiliary": "none"}, "--auxiliary none: yolov7-tiny has no auxiliary heads", "Leave it out"),
        ({"variant": "yolov8"}, "'yolov8' is no YOLOv7 variant", "yolov7-tiny"),
        ({"img": 32, "batch": 1}, "One image of 32 pixels leaves yolov7-tiny's BatchNorm one value", "--batch 2"),
        ({"batch": 1, "multi_scale": True}, "One image of 32 pixels", "--batch 2, or --img 96"),
        ({"freeze": (99,)}, "--freeze 99: yolov7-tiny has layers 0..77", "--freeze 38"),
        ({"device": "gpu"}, "--device gpu is unknown", "auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_meant_is_refused(data, tmp_path, changes, message, fix):
    with pytest.raises(UsageError) as caught:
        train(small_request(data, tmp_path / "run", **changes), watch=Notes())
    assert message in caught.value.message and fix in caught.value.fix
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_weights_of_another_variant_are_refused_before_the_data_is_read(done, data, tmp_path):
    request = small_request(tmp_path / "absent.yaml", tmp_path / "run", weights=str(done[0].weights), variant="yolov7")
    with pytest.raises(UsageError, match=r"is yolov7-tiny, not yolov7\."):
        train(request, watch=Notes())


def test_a_dataset_or_weights_that_are_not_there_are_named(data, tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.yaml is not a file"):
        train(small_request(tmp_path / "absent.yaml", tmp_path / "run"), watch=Notes())
    with pytest.raises(LoadError, match=r"absent\.pt"):
        train(small_request(data, tmp_path / "run", weights=str(tmp_path / "absent.pt")), watch=Notes())
    assert not (tmp_path / "run").exists()


def test_a_class_that_the_dataset_does_not_have_is_refused(data, tmp_path):
    with pytest.raises(DatasetError, match="has no class 'unicorn'"):
        train(small_request(data, tmp_path / "run", classes=("unicorn",)), watch=Notes())


def test_a_folder_that_cannot_be_made_is_named(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be made") as caught:
        train(small_request(data, tmp_path / "file" / "run"), watch=Notes())
    assert caught.value.fix == "--save-dir ANOTHER"
