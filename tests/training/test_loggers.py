"""`results.csv` survives any interruption, TensorBoard shows the same values, and `run.json` describes the run."""

import csv
import dataclasses
import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from yolov7_deploy import __version__
from yolov7_deploy.errors import MissingLibraryError, UsageError
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.loggers import COLUMNS, HEADER, TAGS, EpochRecord, RunLog, read_results, write_run

SIX_DIGITS = 1e-5  # relative precision of the table


def record(epoch=0, **changes):
    values = {
        "epoch": epoch,
        "box": 0.0712345678 * 0.9**epoch,
        "obj": 0.03,
        "cls": 0.02,
        "total": 0.12,
        "positives": 118.5,
        "size": 640,
        "lr_norm": 0.01,
        "lr_weight": 0.01,
        "lr_bias": 0.1,
        "momentum": 0.937,
        "images_per_s": 143.25,
        "seconds": 825.5,
    }
    return EpochRecord(**(values | changes))


def write_epochs(folder, epochs, *, first_epoch=0):
    with RunLog(folder, tensorboard=False, first_epoch=first_epoch) as log:
        for epoch in epochs:
            log.write(record(epoch))
    return log.path


def epochs_in(path):
    return [item.epoch for item in read_results(path)]


def test_a_table_keeps_six_digits(tmp_path):
    records = [
        record(0, ap=0.123456789, ap50=None, memory_bytes=11_811_160_064),
        record(1, box=math.nan, total=math.inf, lr_bias=1.23456789e-7),
    ]
    with RunLog(tmp_path / "new" / "run", tensorboard=False) as log:
        for item in records:
            log.write(item)
    for found, expected in zip(read_results(log.path), records, strict=True):
        for name in COLUMNS:
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert type(ours) is type(theirs), name
            assert ours is None or ours == pytest.approx(theirs, rel=SIX_DIGITS, nan_ok=True), name
    assert read_results(log.path)[0].memory_bytes == 11_811_160_064


def test_a_table_is_plain_csv_with_a_header(tmp_path):
    path = write_epochs(tmp_path, [0, 1])
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"] and tuple(rows[0]) == COLUMNS
    assert rows[0]["ap"] == "" and rows[0]["box"] == "0.0712346" and rows[0]["size"] == "640"


def test_numpy_values_are_written_as_numbers(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write(record(np.int64(3), size=np.int64(320), box=np.float32(0.5), ap=np.float64(0.25)))
    (found,) = read_results(log.path)
    assert (found.epoch, found.size, found.box, found.ap) == (3, 320, 0.5, 0.25)


def test_every_line_is_in_the_file_when_write_returns(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    for epoch in range(3):
        log.write(record(epoch))
        assert epochs_in(log.path) == list(range(epoch + 1))


def test_a_resumed_run_replaces_later_epochs_and_keeps_the_bytes_of_earlier_ones(tmp_path):
    path = write_epochs(tmp_path, range(6))
    before = path.read_bytes().splitlines(keepends=True)
    write_epochs(tmp_path, [4, 5, 6], first_epoch=4)
    assert epochs_in(path) == list(range(7))
    assert path.read_bytes().splitlines(keepends=True)[:5] == before[:5]


def test_a_new_run_starts_a_new_table(tmp_path):
    write_epochs(tmp_path, range(6))
    assert epochs_in(write_epochs(tmp_path, [1])) == [1]


def test_a_run_resumed_in_another_folder_starts_a_new_table(tmp_path):
    assert epochs_in(write_epochs(tmp_path, [7], first_epoch=7)) == [7]


@pytest.mark.parametrize("missing_bytes", range(1, len(HEADER) + 400, 13))
def test_a_truncated_table_is_repaired(tmp_path, missing_bytes, caplog):
    path = write_epochs(tmp_path, range(3))
    complete = path.read_bytes()
    path.write_bytes(complete[:-missing_bytes])
    kept = max(complete[:-missing_bytes].count(b"\n") - 1, 0)
    assert epochs_in(path) == list(range(kept))
    write_epochs(tmp_path, range(kept, 5), first_epoch=kept)
    assert epochs_in(path) == list(range(5)) and path.read_bytes().startswith(complete[: complete.index(b"\n") + 1])


def test_an_incomplete_last_line_is_logged(tmp_path, caplog):
    path = write_epochs(tmp_path, range(3))
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0\0")
    assert epochs_in(path) == [0, 1]
    assert "last line is incomplete" in caplog.text


def test_a_killed_process_loses_no_written_epoch(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.training.test_loggers import Path, RunLog, record
log = RunLog(Path({str(tmp_path)!r}), tensorboard=False)
for epoch in range(10**6):
    log.write(record(epoch))
    print(epoch, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    last = int(lines[-1]) if lines[-1].endswith("\n") else int(lines[-2])
    found = epochs_in(tmp_path / "results.csv")
    assert found == list(range(len(found))) and len(found) >= last + 1


def test_an_invalid_line_is_named_in_the_error(tmp_path):
    path = write_epochs(tmp_path, range(3))
    lines = path.read_text().splitlines(keepends=True)
    for wrong, reason in [
        (lines[2].replace("640", "big"), "big"),
        ("1,2,3\n", "3 values where"),
        ("-" + lines[2], "at least 0"),
    ]:
        path.write_text("".join([*lines[:2], wrong, *lines[3:]]))
        with pytest.raises(UsageError, match=rf"results\.csv, line 3: .*{reason}"):
            read_results(path)
        with pytest.raises(UsageError, match="line 3"):
            RunLog(tmp_path, tensorboard=False, first_epoch=3)


def test_a_table_with_windows_line_endings_is_read(tmp_path):
    path = write_epochs(tmp_path, range(3))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert epochs_in(path) == [0, 1, 2]
    write_epochs(tmp_path, [2], first_epoch=2)
    assert epochs_in(path) == [0, 1, 2] and b"\r" not in path.read_bytes()


@pytest.mark.parametrize("content", [b"name,age\nBob,3\n", b"\x89PNG\r\n\x1a\n\x00\xff", b"something", b"\n"])
def test_a_file_with_other_content_is_not_overwritten(tmp_path, content):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    for attempt in (lambda: RunLog(tmp_path, tensorboard=False), lambda: read_results(path)):
        with pytest.raises(UsageError, match="does not begin with the columns"):
            attempt()
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_missing_table_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file") as caught:
        read_results(tmp_path / "results.csv")
    assert "results.csv" in caught.value.fix


def test_a_folder_that_cannot_be_created_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        RunLog(tmp_path / "file" / "run", tensorboard=False)
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(UsageError, match=r"results\.csv cannot be read"):
        RunLog(tmp_path, tensorboard=False)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system does not limit the size of files")
@pytest.mark.parametrize("free_bytes", [0, 1, 40])
def test_a_full_disk_leaves_the_table_unchanged(tmp_path, free_bytes):
    import resource

    log = RunLog(tmp_path, tensorboard=False)
    log.write(record(0))
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + free_bytes, hard))
    try:
        with pytest.raises(UsageError, match="cannot be written: File too large") as caught:
            log.write(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "space" in caught.value.fix and log.path.read_bytes() == before
    log.write(record(1))
    assert epochs_in(log.path) == [0, 1]


def test_a_failed_sync_to_the_disk_leaves_the_table_unchanged(tmp_path, monkeypatch):
    log = RunLog(tmp_path, tensorboard=False)
    log.write(record(0))
    before = log.path.read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="No space left"):
        patch.setattr(os, "fsync", full)
        log.write(record(1))
    assert log.path.read_bytes() == before


def test_a_deleted_table_is_created_again_with_its_header(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.write(record(0))
    log.path.unlink()
    log.write(record(1))
    assert epochs_in(log.path) == [1]


def test_epochs_are_written_once_and_in_order(tmp_path):
    log = RunLog(tmp_path, tensorboard=False, first_epoch=5)
    with pytest.raises(UsageError, match="Epoch 4 comes after epoch 4"):
        log.write(record(4))
    log.write(record(5))
    with pytest.raises(UsageError, match="Epoch 5 comes after epoch 5"):
        log.write(record(5))
    assert epochs_in(log.path) == [5]


@pytest.mark.parametrize("changes", [{"epoch": -1}, {"size": 0}])
def test_a_record_with_an_invalid_epoch_or_size_is_a_usage_error(changes):
    with pytest.raises(UsageError, match="at least"):
        record(**changes)


def test_every_column_but_the_epoch_has_one_tensorboard_tag():
    assert set(TAGS) == set(COLUMNS) - {"epoch"} and len(set(TAGS.values())) == len(TAGS)
    assert (TAGS["box"], TAGS["ap"], TAGS["lr_bias"]) == ("train/box", "val/ap", "lr/bias")


def scalars(folder):
    """Return the values that TensorBoard shows, by tag and step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def write_events(folder, epochs, **options):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    with RunLog(folder, tensorboard=True, **options) as log:
        for epoch in epochs:
            log.write(record(epoch, ap=0.1 * epoch if epoch % 2 else None))


def test_tensorboard_shows_every_value_of_an_epoch(tmp_path):
    write_events(tmp_path, range(4))
    shown = scalars(tmp_path)
    assert set(shown) == set(TAGS.values()) - {
        tag for tag in TAGS.values() if tag.startswith("val/ap") and tag != "val/ap"
    } - {"val/precision", "val/recall", "val/ar100", "speed/memory_bytes"}
    assert shown["val/ap"] == pytest.approx({1: 0.1, 3: 0.3}) and shown["train/size"] == dict.fromkeys(range(4), 640)
    for epoch in range(4):
        assert shown["train/box"][epoch] == pytest.approx(record(epoch).box)


def test_tensorboard_shows_a_repeated_epoch_once(tmp_path):
    write_events(tmp_path, range(6))
    time.sleep(1.1)  # names of event files have complete seconds, and are read in order of their names
    write_events(tmp_path, [3], first_epoch=3)
    assert sorted(scalars(tmp_path)["train/box"]) == [0, 1, 2, 3]


@pytest.fixture
def without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "yolov7_deploy.training.tensorboard", raising=False)


def test_a_missing_tensorboard_is_named_with_its_extra(tmp_path, without_tensorboard):
    with pytest.raises(MissingLibraryError, match="tensorboard is needed to write") as caught:
        RunLog(tmp_path, tensorboard=True)
    assert caught.value.fix == "pip install 'yolov7-deploy[train]'"


def test_a_run_without_tensorboard_logs_it_once_and_continues(tmp_path, without_tensorboard, caplog):
    with caplog.at_level(logging.INFO), RunLog(tmp_path) as log:
        log.write(record(0))
    (line,) = [entry.getMessage() for entry in caplog.records if "TensorBoard" in entry.getMessage()]
    assert "pip install 'yolov7-deploy[train]'" in line and epochs_in(log.path) == [0]


def test_events_are_written_if_tensorboard_is_installed_and_not_declined(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    RunLog(tmp_path / "default").close()
    RunLog(tmp_path / "declined", tensorboard=False).close()
    names = [
        sorted(path.name.split(".")[0] for path in (tmp_path / name).iterdir()) for name in ("default", "declined")
    ]
    assert names == [["events", "results"], ["results"]]


def test_tensorboard_on_a_full_disk_is_a_usage_error(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("yolov7_deploy.training.tensorboard", reason="TensorBoard is not installed")

    class Full:
        def __init__(self, folder, *, purge_step):
            self.calls = 0

        def add_scalar(self, tag, value, step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = flush = add_scalar

    monkeypatch.setattr(tensorboard, "SummaryWriter", Full)
    log = RunLog(tmp_path, tensorboard=True)
    with pytest.raises(UsageError, match=r"The TensorBoard file .* No space left"):
        log.write(record(0))
    assert epochs_in(log.path) == [0], "the table has the epoch anyway"


def test_run_json_has_the_version_and_the_given_document(tmp_path):
    document = {
        "command": ["y7", "train", "--data", "data.yaml"],
        "hyperparameters": Hyperparameters(mixup=0.25),
        "dataset": {"path": Path("data.yaml"), "sha256": "ab12"},
        "seed": np.int64(7),
    }
    write_run(tmp_path / "run", document)
    found = json.loads((tmp_path / "run/run.json").read_text())
    assert found["version"] == __version__ and found["command"][1] == "train" and found["seed"] == 7
    assert found["hyperparameters"] == dataclasses.asdict(Hyperparameters(mixup=0.25))
    assert found["dataset"] == {"path": "data.yaml", "sha256": "ab12"}


def test_a_failed_write_of_run_json_keeps_the_previous_file(tmp_path):
    write_run(tmp_path, {"seed": 1})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UsageError, match="cannot be written"):
        write_run(tmp_path / "run.json", {"seed": 2})
    assert (tmp_path / "run.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
