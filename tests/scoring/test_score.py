"""`y7 score` without Ray: inputs, shards, resuming, and the errors of both."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest

from tests.support.sample_images import noise
from yolov7_deploy._output_folder import lock_run_folder
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DatasetError, SourceError, UsageError
from yolov7_deploy.scoring import score as score_module
from yolov7_deploy.scoring.input import open_input
from yolov7_deploy.scoring.output import SETTINGS, Shards, ShardWriter
from yolov7_deploy.scoring.score import ScoreOptions, chunk_size, score
from yolov7_deploy.visualize import write_image

IMAGES = 7
NAMES = ("a.png", "b.png", "deep/c.png", "deep/d.png", "e.png", "f.png", "g.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of six images, one of them in a subfolder, and a broken one in the middle."""
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(NAMES):
        write_image(folder / name, noise(90 + seed, 120, seed))
    (folder / "deep" / "d.png").write_bytes(b"not an image")
    (folder / "notes.doc").write_text("left out")
    return folder


@pytest.fixture(scope="module")
def model(files):
    return files("plugin")


def run(images, output, model, *, column=None, progress=lambda done, total: None, **options):
    detector = {"device": "cpu"}
    return score(
        open_input(str(images), column=column),
        output,
        weights=model,
        detector=detector,
        options=ScoreOptions(**{"batch": 2, "shard_size": 3, **options}),
        progress=progress,
    )


def records(output):
    return [json.loads(line) for path in sorted(output.glob("part-*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(images, model, tmp_path_factory):
    """Output folder and report of a complete run."""
    output = tmp_path_factory.mktemp("out") / "results"
    return output, run(images, output, model)


# --- results ----------------------------------------------------------------------------------------------------------


def test_the_records_are_those_of_a_detector_in_the_order_of_the_input(images, model, finished):
    output, _ = finished
    with Detector(model, device="cpu") as detector:
        paths = [images / name for name in NAMES]
        expected = [found.to_dict() for found in detector.batch(sorted(paths), on_error="skip")]
    assert records(output) == expected
    assert sum(len(record["detections"]) for record in expected) > 0


def test_unreadable_images_are_counted_and_named_and_not_fatal(images, finished):
    output, report = finished
    (item,) = report.unreadable
    assert item.path == str(images / "deep" / "d.png")
    assert "not an image" in item.reason
    assert json.loads((output / "summary.json").read_text())["unreadable"][0]["path"] == item.path
    assert (report.images, report.processed, report.shards, report.resumed) == (IMAGES, IMAGES, 3, 0)


def test_what_a_folder_has_besides_images_is_named(images):
    assert [item.path for item in open_input(str(images)).left_out] == [str(images / "notes.doc")]


def test_a_run_without_one_readable_image_is_an_error(tmp_path, model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match="None of the 1 images can be read"):
        run(tmp_path / "images", tmp_path / "out", model)


def test_a_list_has_missing_images_and_paths_relative_to_it(images, model, tmp_path):
    (images / "list.txt").write_text("# comment\na.png\ngone.png\n\ndeep\\c.png\n", encoding="utf-8")
    try:
        report = run(images / "list.txt", tmp_path / "out", model)
    finally:
        (images / "list.txt").unlink()
    assert [item.path for item in report.unreadable] == ["gone.png"]
    assert [record["path"] for record in records(tmp_path / "out")] == ["a.png", "gone.png", "deep\\c.png"]


def test_credentials_of_an_address_in_a_list_are_not_shown(tmp_path, model):
    (tmp_path / "list.txt").write_text("http://me:secret@host/a.png\n", encoding="utf-8")
    with pytest.raises(SourceError) as error:
        run(tmp_path / "list.txt", tmp_path / "out", model)
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "secret" not in str(error.value) + written


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_does_only_what_is_missing(images, model, tmp_path, finished):
    output, whole = tmp_path / "out", finished[0]

    def interrupt(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, output, model, progress=interrupt)
    assert [path.name for path in sorted(output.glob("part-*"))] == ["part-00000.jsonl"]
    before = (output / "part-00000.jsonl").stat().st_mtime_ns
    report = run(images, output, model)
    assert (report.resumed, report.processed) == (1, 4)
    assert (output / "part-00000.jsonl").stat().st_mtime_ns == before
    for path in sorted(whole.glob("part-*")):
        assert path.read_bytes() == (output / path.name).read_bytes()


def test_a_finished_run_does_nothing_when_it_is_started_again(images, model, finished, monkeypatch):
    monkeypatch.setattr(score_module, "_runner", lambda *arguments: None)  # would fail if it were called
    report = run(images, finished[0], model)
    assert (report.processed, report.resumed, report.images) == (0, 3, IMAGES)
    assert len(report.unreadable) == 1


@pytest.mark.parametrize(
    "change,says",
    [({"shard_size": 4}, "shard_size was 3 and is 4"), ({"format": "parquet"}, "format was jsonl and is parquet")],
)
def test_a_run_with_other_settings_does_not_resume(images, model, finished, change, says):
    with pytest.raises(UsageError, match=says):
        run(images, finished[0], model, **change)


def test_a_run_with_other_images_does_not_resume(images, model, finished):
    with pytest.raises(UsageError, match="images was 7 and is 2"):
        run(images / "deep", finished[0], model)


def test_a_damaged_shard_is_named_with_the_command_that_repairs_it(images, model, tmp_path):
    output = tmp_path / "out"
    run(images, output, model)
    part = output / "part-00001.jsonl"
    part.write_text(part.read_text().splitlines()[0] + "\n")
    with pytest.raises(SourceError, match=r"part-00001\.jsonl is damaged: it has 1 image instead of 3") as error:
        run(images, output, model)
    assert error.value.fix.endswith(f"rm {part}")
    part.write_text("[" * 100_000 + "\n")
    with pytest.raises(SourceError, match=r"part-00001\.jsonl is damaged: its JSON is nested too deeply"):
        run(images, output, model)
    part.unlink()
    assert run(images, output, model).processed == 3
    (output / SETTINGS).write_text("[" * 100_000)
    with pytest.raises(UsageError, match="cannot be read: its JSON is nested too deeply"):
        run(images, output, model)


# --- output folder ----------------------------------------------------------------------------------------------------


def test_a_folder_with_files_of_others_is_refused(images, model, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(UsageError, match=r"not empty, and y7 score did not write it: it has thesis\.tex"):
        run(images, tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_is_a_file_is_refused(images, model, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="out cannot be written"):
        run(images, tmp_path / "out", model)


def test_two_runs_never_write_into_one_folder(images, model, tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "out", ready, done))
    holder.start()
    try:
        assert ready.wait(10)
        with pytest.raises(UsageError, match="out is being written by process") as error:
            run(images, tmp_path / "out", model)
        assert "mix their results" in error.value.message
    finally:
        done.set()
        holder.join()


def _hold(folder, ready, done):
    with lock_run_folder(folder):
        ready.set()
        done.wait(30)


def test_records_in_any_order_make_sorted_shards(tmp_path):
    shards = Shards(folder=tmp_path, images=5, size=2, format="jsonl")
    writer = ShardWriter(shards)
    for number in (3, 0, 4, 4, 1, 2):
        writer.add(number, json.dumps({"path": str(number), "detections": []}))
    assert writer.written == {0, 1, 2}
    assert [[one["path"] for one in shards.read(i)] for i in range(3)] == [["0", "1"], ["2", "3"], ["4"]]
    assert shards.missing() == []


def test_settings_that_are_not_json_are_reported(images, model, tmp_path):
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(UsageError, match=r"score\.json cannot be read"):
        run(images, tmp_path, model)


# --- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,says",
    [
        ("gone", "does not exist"),
        ("empty", "has no image in it"),
        ("blank.txt", "has no line with a path"),
        ("image.doc", "neither a folder, a list nor a Parquet file"),
        ("binary.txt", "it is not text"),
    ],
)
def test_an_input_without_images_is_refused(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("# nothing\n\n")
    (tmp_path / "image.doc").write_text("text")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SourceError, match=says):
        open_input(str(tmp_path / name))


def test_a_column_needs_a_parquet_file(images):
    with pytest.raises(UsageError, match="column names a column of a Parquet file"):
        open_input(str(images), column="image")


def test_chunks_cover_the_wanted_images_exactly_once(images):
    source = open_input(str(images))
    chunks = list(source.chunks([range(0, 3), range(5, 7)], size=2))
    assert [(chunk.first, chunk.count) for chunk in chunks] == [(0, 2), (2, 1), (5, 2)]
    names = [item.name for chunk in chunks for item in chunk.items()]
    assert names == [source.names[i] for i in (0, 1, 2, 5, 6)]


@pytest.mark.parametrize(
    "images,workers,batch,size", [(10_000, 2, 8, 64), (40, 2, 8, 8), (3, 4, 8, 8), (100, 0, 6, 30)]
)
def test_a_chunk_is_whole_batches_and_every_worker_gets_several(images, workers, batch, size):
    assert chunk_size(images, ScoreOptions(workers=workers, batch=batch)) == size


# --- COCO results -----------------------------------------------------------------------------------------------------


def annotations(path, names=("a.png", "deep/c.png")):
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
                "categories": [{"id": 90, "name": "Thing 0"}, {"id": 91, "name": "thing 1"}],
                "annotations": [],
            }
        )
    )
    return path


def test_coco_results_have_the_ids_of_the_annotation_file(images, model, tmp_path):
    report = run(images, tmp_path / "out", model, coco=annotations(tmp_path / "instances.json"))
    rows = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    with Detector(model, device="cpu") as detector:
        found = [detector(images / name).filter(classes=[0, 1]) for name in ("a.png", "deep/c.png")]
    expected = [row for i, one in enumerate(found) for row in one.to_coco(10 + i, category_ids=[90, 91])]
    assert expected and rows == expected
    assert report.coco_rows == len(rows)
    assert report.notes[0].startswith("4 images have no id, such as")
    assert "thing 2" in report.notes[1]


def test_a_file_that_is_not_coco_is_refused_before_the_work(images, model, tmp_path):
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(DatasetError):
        run(images, tmp_path / "out", model, coco=tmp_path / "bad.json")
    assert not (tmp_path / "out").exists()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,says",
    [
        ({"workers": -1}, "--workers must be at least 0"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"shard_size": 0}, "--shard-size must be at least 1"),
        ({"format": "xml"}, "--format xml is unknown"),
        ({"workers": 2, "cpus": float("nan")}, "--cpus must be at least 0"),
        ({"address": "auto"}, "--address has no effect without workers"),
    ],
)
def test_invalid_options_are_refused(options, says):
    with pytest.raises(UsageError) as error:
        ScoreOptions(**options)
    assert error.value.message.startswith(says) and error.value.fix


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet", reason="PyArrow is not installed")


def write_table(path, columns, *, rows=None):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def test_images_in_a_parquet_file_give_the_same_detections(parquet, images, model, finished, tmp_path):
    data = [(images / name).read_bytes() for name in sorted(NAMES)]
    table = write_table(tmp_path / "images.parquet", {"image": data, "path": sorted(NAMES)}, rows=2)
    run(table, tmp_path / "out", model)
    ours, expected = records(tmp_path / "out"), records(finished[0])
    assert [one["path"] for one in ours] == sorted(NAMES)
    assert [one["detections"] for one in ours] == [one["detections"] for one in expected]


def test_a_run_on_a_parquet_file_resumes_in_the_middle_of_a_row_group(parquet, images, model, tmp_path):
    data = [(images / name).read_bytes() for name in sorted(NAMES)]
    table = write_table(tmp_path / "images.parquet", {"image": [{"bytes": one, "path": None} for one in data]}, rows=5)
    run(table, tmp_path / "out", model)
    whole = records(tmp_path / "out")
    (tmp_path / "out" / "part-00001.jsonl").unlink()
    assert run(table, tmp_path / "out", model).processed == 3
    assert records(tmp_path / "out") == whole
    assert [one["path"] for one in whole] == [f"{table}#{row}" for row in range(IMAGES)]


def test_a_parquet_file_of_paths_is_a_list(parquet, images, model, finished, tmp_path):
    table = write_table(tmp_path / "list.parquet", {"path": [str(images / name) for name in sorted(NAMES)]})
    run(table, tmp_path / "out", model)
    assert records(tmp_path / "out") == records(finished[0])


def test_parquet_results_have_the_same_values(parquet, images, model, finished, tmp_path):
    run(images, tmp_path / "out", model, format="parquet")
    shards = Shards(folder=tmp_path / "out", images=IMAGES, size=3, format="parquet")
    for ours, expected in zip((one for i in range(3) for one in shards.read(i)), records(finished[0]), strict=True):
        assert ours.get("error") == expected.get("error") and ours["path"] == expected["path"]
        assert ours["image_hw"] == expected["image_hw"]
        for one, other in zip(ours["detections"], expected["detections"], strict=True):
            assert np.array_equal(np.float32(one["box"]), np.float32(other["box"]))
            assert np.float32(one["score"]) == np.float32(other["score"])
            assert (one["class_id"], one["class_name"]) == (other["class_id"], other["class_name"])


@pytest.mark.parametrize(
    "columns,column,error,says",
    [
        ({"photo": [b"1"]}, None, SourceError, "does not have a column named image, bytes or path"),
        ({"image": [1.5]}, None, UsageError, "neither bytes nor paths"),
        ({"image": [b"1"]}, "photo", SourceError, "does not have a column 'photo'"),
    ],
)
def test_a_parquet_file_without_images_is_refused(parquet, tmp_path, columns, column, error, says):
    with pytest.raises(error, match=says):
        open_input(str(write_table(tmp_path / "t.parquet", columns)), column=column)


def test_a_damaged_parquet_file_is_refused(parquet, tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(SourceError, match="cannot be read as a Parquet file"):
        open_input(str(tmp_path / "t.parquet"))
