"""A whole training of seconds: what it leaves in its folder, which epoch is best, when it ends, what it refuses."""

import json
from dataclasses import asdict, replace

import pytest
from training_runs import no_charts, one_thread  # noqa: F401 - fixtures
from training_runs import SIZE, STEPS, TRAIN, VAL, Notes, losses, small_request, small_shapes, weights

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.dataset import open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DatasetError, LoadError, UsageError
from yolov7_deploy.measure.accuracy import evaluate
from yolov7_deploy.options import ExportOptions, ValOptions
from yolov7_deploy.pipeline import export_weights
from yolov7_deploy.train import trainer
from yolov7_deploy.train.hyperparameters import Hyperparameters
from yolov7_deploy.train.logs import read_results
from yolov7_deploy.train.run_state import load_run_state
from yolov7_deploy.train.training import describe_report, report_document, train

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
SAME_AP = 1e-3  # of torch and ONNX Runtime, which add in another order
# Enough to find something: objects as they are, one picture again and again.
PLAIN = Hyperparameters(
    warmup_epochs=0.0, lr0=0.002, mosaic=0.0, mixup=0.0, paste_in=0.0, scale=0.0, translate=0.0, fliplr=0.0,
    hsv_h=0.0, hsv_s=0.0, hsv_v=0.0,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_shapes(tmp_path_factory.mktemp("data"))


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
    assert document["pictures"] == {"train": TRAIN, "val": VAL}
    assert document["classes"] == list(open_dataset(data, split="train").class_names)
    assert document["weights"] is None and len(document["data_sha256"]) == 64


def test_the_weights_are_a_training_checkpoint_with_names_and_anchors(done, data):
    report, _ = done
    checkpoint = load_checkpoint(report.folder / "last.safetensors")
    assert (checkpoint.variant, checkpoint.training) == ("yolov7-tiny", True)
    assert checkpoint.class_names == open_dataset(data, split="train").class_names
    with Detector(report.folder / "last.safetensors", device="cpu", img=SIZE) as detector:
        assert detector.info.class_names == checkpoint.class_names


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
    assert f"{TRAIN} pictures to train on, {VAL} to validate" in notes.said
    assert "yolov7-tiny from random weights of seed 0, on cpu" in notes.said
    assert "can be found" in notes.said


def test_weights_that_find_something_are_exported_as_they_are_and_find_the_same(data, tmp_path, no_charts):
    request = small_request(
        data, tmp_path / "run", epochs=25, batch=6, nominal_batch=6, val_every=0, adam=True, hyp=PLAIN
    )
    report = train(request, watch=Notes())
    path = report.folder / "last.safetensors"
    exported = export_weights(path, tmp_path / "last.onnx", options=ExportOptions(input_hw=(SIZE, SIZE), nms="none"))
    assert exported.parity is not None
    found = []
    for file in (path, tmp_path / "last.onnx"):
        with Detector(file, device="cpu", img=SIZE) as detector:
            found.append(evaluate(detector, open_dataset(data, split="train"), options=ValOptions(rect=False)))
    assert found[0].ap > 0.02, "it has to find something for the comparison to mean anything"
    assert found[1].ap == pytest.approx(found[0].ap, abs=SAME_AP)
    assert found[1].ap50 == pytest.approx(found[0].ap50, abs=SAME_AP)
