"""The deployment report: what its page says, that names cannot become markup, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.report_files import CLASS, IMAGE, SIZE, swap_channels, write_hostile_shapes, write_nan
from tests.support.small_models import exported_tiny
from tests.support.speed_reports import speed_report
from yolov7_deploy import Detector, export, report
from yolov7_deploy._console import write_json
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.cli.app import app
from yolov7_deploy.errors import DatasetError, LoadError, ParityError, UsageError
from yolov7_deploy.evaluation.verification import verify_artifacts
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.workflows.report_page import MAX_BYTES, render_page

WRONG = "swapped<script>alert(1).onnx"
VOID = {"br", "img", "link", "meta", "wbr"}


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text of the element so far) in order, and the open ones."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for index in self.open:
            self.elements[index][2].append(data)

    def find(self, tag, **attributes):
        """Return attributes and text of the elements of a tag with these attributes."""
        return [
            (found, " ".join("".join(text).split()))
            for name, found, text in self.elements
            if name == tag and attributes.items() <= found.items()
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset with hostile names, an exported file, a wrong one, and speeds of the first."""
    folder = tmp_path_factory.mktemp("report")
    write_hostile_shapes(folder / "shapes", images=6)
    export("yolov7-tiny-shapes", folder / "good.onnx", img=SIZE, verify=False)
    swap_channels(folder / "good.onnx", folder / WRONG)
    speed = speed_report(
        "yolov7-tiny", size=SIZE, weights_sha256=sha256_hex(folder / "good.onnx"), is_coco=False, end_to_end_ms=12.25
    )
    write_json(speed.to_dict(), folder / "bench.json")
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return report(
        "yolov7-tiny-shapes",
        [folder / "good.onnx", folder / WRONG],
        folder / "shapes" / "shapes.yaml",
        folder / "report.html",
        runtime="onnxruntime",
        stage_limit=2,
        duration_s=0,
        bench=[folder / "bench.json"],
    )


@pytest.fixture(scope="module")
def text(result):
    return result.path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def make(folder, output, *against, **options):
    """Write the report of one file, or of others, on two images."""
    chosen = {"runtime": "onnxruntime", "stage_limit": 1, "duration_s": 0, "limit": 2, **options}
    data = chosen.pop("data", folder / "shapes" / "shapes.yaml")
    return report(bundled_weights(), against or [folder / "good.onnx"], data, output, **chosen)


# --- contents ---------------------------------------------------------------------------------------------------------


def test_a_wrong_artifact_is_at_the_top_in_red_and_with_the_stage(result, page):
    sections = [(found, words) for found, words in page.find("section")]
    first, words = sections[0]
    assert first["class"] == "verdict bad" and first["id"] == "verdict"
    assert "FAILED: 1 of 2 artifacts did not pass" in words
    assert WRONG in words and "differs from" in words and "'head'" in words
    assert not result.ok and any("'head'" in failure for failure in result.failures)
    rows = [row for _, row in page.find("tr", **{"class": "fail"})]
    assert any(row.startswith(WRONG) and "✗ FAILED" in row for row in rows)
    assert not any(row.startswith("good.onnx") for row in rows)


def test_an_exported_file_passes_and_is_not_reported_as_different(folder, tmp_path):
    result = make(folder, tmp_path / "good.html", limit=4)
    page = Page(result.path.read_text())
    assert result.ok and page.find("section")[0][0]["class"] == "verdict good"
    assert "Verified" in page.find("title")[0][1]
    assert page.find("section")[1][0]["id"] == "warnings"  # the speed was not measured
    (good,) = result.artifacts[1:]
    assert good.drop is not None and good.drop.points == pytest.approx(0, abs=0.01)


def test_a_loss_that_may_be_chance_is_at_the_top_in_yellow(result):
    reference, good, _ = result.artifacts
    reason = ("UNDECIDED: good.onnx may lose more than --max-drop 0.3: AP falls by 0.31 points.",)
    parts = [report_of for report_of in result.verification.reports if report_of.ok]
    verification = replace(result.verification, reports=tuple(parts), failures=reason, undecided=reason)
    good = replace(good, failures=reason, undecided=reason)
    undecided = replace(result, artifacts=(reference, good), verification=verification, images=())
    page = Page(render_page(undecided, progress=lambda done, total: None))
    first, words = page.find("section")[0]
    assert first["class"] == "verdict undecided" and words.startswith("⚠ UNDECIDED: these images are too few")
    assert "falls by 0.31 points" in words and "FAILED" not in words and "Undecided" in page.find("title")[0][1]
    assert page.find("tr", **{"class": "fail"}) == [] and not undecided.ok
    assert any("⚠ undecided" in row for _, row in page.find("tr"))


def test_a_file_that_computes_nan_is_at_the_top_in_red(folder, tmp_path):
    write_nan(folder / "good.onnx", tmp_path / "nan.onnx", layer=0, channels=slice(0, 1))
    result = make(folder, tmp_path / "r.html", folder / "good.onnx", tmp_path / "nan.onnx")
    first, words = Page(result.path.read_text()).find("section")[0]
    assert first["class"] == "verdict bad" and "nan.onnx differs from" in words and "raw / std nan" in words
    assert [one.failures == () for one in result.artifacts] == [True, True, False]


def test_boxes_with_nan_are_an_error_that_names_the_file(folder, tmp_path):
    write_nan(folder / "good.onnx", tmp_path / "nan.onnx", layer=-1, channels=slice(0, 2))  # x and y, not the scores
    with pytest.raises(UsageError, match=r"nan\.onnx: A box or score is NaN"):
        make(folder, tmp_path / "r.html", folder / "good.onnx", tmp_path / "nan.onnx")
    assert not (tmp_path / "r.html").exists()


def test_a_file_that_was_made_from_other_weights_is_a_warning(result):
    assert any(WRONG in one and "(sha256 000000000000), not from the reference" in one for one in result.warnings)
    assert not any("good.onnx says" in one for one in result.warnings)


@pytest.mark.slow
def test_the_numbers_are_those_of_verify(folder, result, text):
    verified = verify_artifacts(
        bundled_weights(),
        [folder / "good.onnx", folder / WRONG],
        data=folder / "shapes" / "shapes.yaml",
        limit=6,
        runtime="onnxruntime",
    )
    for one, row in zip(result.artifacts, verified.accuracy, strict=True):
        assert one.accuracy.ap == row.ap and f"{row.ap:.4f}" in text
    assert result.artifacts[1].sha256 == sha256_hex(folder / "good.onnx") and result.artifacts[1].sha256 in text


def test_speed_is_that_of_the_file_about_the_artifact(folder, result, page):
    good, wrong = result.artifacts[1:]
    assert good.speed_source == str(folder / "bench.json") and wrong.speed is None
    assert any("12.2" in words and words.startswith("good.onnx") for _, words in page.find("tr"))
    assert any("was not measured" in warning and WRONG in warning for warning in result.warnings)


def test_images_are_listed_by_their_difference_with_the_objects_that_differ(result, page):
    assert 0 < len(result.images) <= 6
    values = [record.value for record in result.images]
    assert values == sorted(values, reverse=True) and values[0] > 0.1
    assert {record.worst for record in result.images} == {WRONG}
    images = page.find("img")
    assert len(images) == 2 * len(result.images)
    assert all(found["alt"] and found["src"].startswith("data:image/jpeg;base64,") for found, _ in images)


def test_the_boxes_on_the_images_are_those_of_an_application(result):
    by_name = {one.name: one for one in result.artifacts}
    record = result.images[0]
    with Detector(by_name[record.worst].path, device="cpu", runtime="onnxruntime") as detector:
        detections = detector(result.dataset.path(record.index))
    objects = [one.other for one in record.objects[record.worst] if one.other is not None and one.other.shown]
    expected = [score for score in detections.scores.tolist() if score > 0.25]
    np.testing.assert_allclose(sorted(box.score for box in objects), sorted(expected), atol=1e-5)


@pytest.mark.slow
def test_layers_of_a_quantization_are_ranked(folder, tmp_path):
    path = tmp_path / "int8.onnx"
    images = folder / "shapes" / "images" / "val"
    runner = CliRunner()
    line = ["quantize", "-w", folder / "good.onnx", "--calib", images, "-o", path, "--sensitivity", "--calib-limit", 2]
    done = runner.invoke(app, [*map(str, line), "--json", str(tmp_path / "q.json")])
    assert done.exit_code == 0, done.output
    result = make(folder, tmp_path / "r.html", path, sensitivity=[tmp_path / "q.json"], max_drop=100)
    layers = json.loads((tmp_path / "q.json").read_text())["layers"]
    page = Page(result.path.read_text())
    (section,) = [words for found, words in page.find("section") if found.get("id") == "int8"]
    assert f"The 20 most sensitive of {len(layers)} layers" in section and layers[0]["layer"] in section
    assert "Excluded from INT8: 3 layers" in section and "head: decoding needs float" in section
    with pytest.raises(UsageError, match="is about another file"):
        make(folder, tmp_path / "other.html", sensitivity=[tmp_path / "q.json"])


# --- markup -----------------------------------------------------------------------------------------------------------


def test_names_of_files_and_classes_are_text(page, text):
    assert CLASS in "".join(words for _, words in page.find("th"))
    assert IMAGE in "".join(words for _, words in page.find("h3"))
    assert page.find("script") == []
    assert not [found for _, found, _ in page.elements if any(name.startswith("on") for name in found)]
    assert "<script" not in text.lower()


def test_the_page_loads_nothing(page, text):
    links = [value for _, found, _ in page.elements for name, value in found.items() if name in ("href", "src")]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    assert "url(http" not in text and "@import" not in text
    assert len(text.encode()) < MAX_BYTES


def test_ids_are_unique_and_every_link_has_a_target(page):
    ids = [found["id"] for _, found, _ in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    targets = {found["href"][1:] for _, found, _ in page.elements if found.get("href", "").startswith("#")}
    labels = {name for _, found, _ in page.elements for name in found.get("aria-labelledby", "").split()}
    drawn = set(re.findall(r"url\(#([^)]*)\)", " ".join(str(found) for _, found, _ in page.elements)))
    assert targets and drawn and targets | labels | drawn <= set(ids)


def test_the_page_is_made_for_screen_readers(page):
    assert [len(page.find(tag)) for tag in ("h1", "main", "nav", "header", "footer")] == [1] * 5
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all("scope" in found for found, _ in page.find("th"))
    assert all(found.get("aria-label") for found, _ in page.find("svg"))
    assert all(found["tabindex"] == "0" and found["aria-label"] for found, _ in page.find("div", role="region"))
    assert page.find("html")[0][0]["lang"] == "en"


# --- commands and mistakes --------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_of_a_wrong_file_and_exits_with_an_error(folder, tmp_path):
    *_, output = paths = [tmp_path / "r.json", tmp_path / "r.html"]
    line = ["report", "-w", bundled_weights(), "--against", folder / "good.onnx", folder / WRONG, "--limit", 2]
    line += ["--data", folder / "shapes" / "shapes.yaml", "-o", output, "--duration", 0, "--stage-limit", 1]
    done = CliRunner().invoke(app, [*map(str, line), "--runtime", "onnxruntime", "--json", str(paths[0])])
    assert isinstance(done.exception, ParityError) and "first section" in done.exception.fix
    assert output.is_file() and "FAILED" in done.output
    document = json.loads(paths[0].read_text())
    assert [one["failures"] == [] for one in document["artifacts"]] == [True, True, False]
    assert document["ok"] is False and document["kind"] == "y7 report"


@pytest.mark.parametrize("name", ["page.txt", "model.html", "folder.html", "file/page.html"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.workflows.report_page.collect_report", None)
    (tmp_path / "model.html").write_bytes(b"\x08\x08 not HTML")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError) as raised:
        make(folder, tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "model.html"]
    assert (tmp_path / "model.html").read_bytes() == b"\x08\x08 not HTML"


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"data": "missing.yaml"}, DatasetError, "missing.yaml"),
        ({"limit": 0}, UsageError, "limit=0 leaves no image"),
        ({"duration_s": -1}, UsageError, "not a time"),
        ({"runtime": "tensorflow"}, UsageError, "unknown"),
        ({"bench": ["bench.json"]}, UsageError, "none of the files of this report"),
        ({"bench": ["missing.json"]}, UsageError, "cannot be read"),
        ({"sensitivity": ["bench.json"]}, UsageError, "is not a report of y7 quantize"),
    ],
)
def test_wrong_input_is_explained_and_writes_nothing(options, error, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = replace(speed_report("yolov7-tiny"), weights="other.onnx")
    write_json(other.to_dict(), tmp_path / "bench.json")
    with pytest.raises(error) as raised:
        make(folder, tmp_path / "report.html", **options)
    assert message in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_missing_file_is_refused(folder, tmp_path):
    with pytest.raises(LoadError, match="does not exist"):
        make(folder, tmp_path / "report.html", tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="No file was given to compare"):
        report("yolov7-tiny-shapes", [], folder / "shapes" / "shapes.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_of_another_model_is_refused(folder, tmp_path):
    exported_tiny(5).save(tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="not the same model"):
        make(folder, tmp_path / "report.html", tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["other.onnx"]
