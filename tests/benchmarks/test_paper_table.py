"""The table in docs/benchmarks.md: the rows of the paper next to the committed results."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.speed_reports import speed_report

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from paper_table import END, START, paper_table, write_between_marks

from yolov7_deploy._console import write_json
from yolov7_deploy.errors import UsageError
from yolov7_deploy.paper import VARIANTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="results")
def results_folder(tmp_path):
    """Return a function that writes a report, `results("h200/bench_a.json", report)`, and returns the folder."""

    def write(name, report):
        write_json(report.to_dict(), tmp_path / name)
        return tmp_path

    return write


def cells(table, model):
    """Return the row of a model, by column heading."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (row,) = [line for line in lines if line[0] == model]
    return dict(zip(lines[0], row, strict=True))


def test_the_page_has_the_table_of_the_committed_results():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.count(START) == page.count(END) == 1, (
        "docs/benchmarks.md needs the two marks of benchmarks/paper_table.py"
    )
    shown = page.partition(START)[2].partition(END)[0]
    assert shown == f"\n{paper_table()}\n", "run:  python benchmarks/paper_table.py --write docs/benchmarks.md"


def test_every_model_of_the_paper_has_one_row_with_empty_cells_for_missing_measurements(tmp_path):
    table = paper_table(tmp_path)
    assert all(cells(table, model)["model"] == model for model in VARIANTS.values())
    assert cells(table, "YOLOv7-W6") == {
        "model": "YOLOv7-W6",
        "size": "1280",
        "params (M)": "70.4",
        "GFLOPs": "360.0",
        "AP val": "54.6",
        "AP test": "54.9",
        "FPS, V100": "84",
        "batch 32 (ms), V100": "7.6",
    }
    assert cells(table, "YOLOv7-tiny")["FPS, V100"] == cells(table, "YOLOv7-tiny")["AP test"] == ""


def test_each_machine_backend_and_precision_has_its_own_columns(results):
    results("h200/bench_yolov7.json", speed_report(machine="NVIDIA H200", runtime="tensorrt", precision="fp16",
                                                   engine_ms=0.8, end_to_end_ms=1.0))  # fmt: skip
    results("h200/bench_yolov7_torch.json", speed_report(machine="NVIDIA H200", runtime="pytorch", precision="fp16",
                                                         engine_ms=40.0, end_to_end_ms=50.0))  # fmt: skip
    table = paper_table(results("cpu-2-core/bench_yolov7.json", speed_report(engine_ms=400.0, end_to_end_ms=500.0)))
    measured = dict(list(cells(table, "YOLOv7").items())[8:])
    assert measured == {
        "cpu-2-core, onnxruntime fp32: engine": "2.50",
        "cpu-2-core, onnxruntime fp32: end to end": "2.00",
        "h200, pytorch fp16: engine": "25.0",
        "h200, pytorch fp16: end to end": "20.0",
        "h200, tensorrt fp16: engine": "1250",
        "h200, tensorrt fp16: end to end": "1000",
    }
    assert set(list(cells(table, "YOLOv7-X").values())[8:]) == {""}
    assert table.endswith("`cpu-2-core` is AMD EPYC.\n`h200` is NVIDIA H200.")


def test_an_image_size_other_than_the_papers_is_shown_after_the_number(results):
    table = paper_table(results("cpu/bench_tiny.json", speed_report("yolov7-tiny", engine_ms=50.0, end_to_end_ms=62.5)))
    assert list(cells(table, "YOLOv7-tiny").values())[-2:] == ["20.0 at 640", "16.0 at 640"]


def test_a_report_without_batch_1_fills_no_cell(results):
    table = paper_table(results("cpu/bench_yolov7.json", speed_report(batch=8)))
    assert list(cells(table, "YOLOv7").values())[-2:] == ["", ""]


def test_reports_of_custom_models_and_files_with_other_names_are_ignored(results, tmp_path):
    results("cpu/bench_mine.json", replace(speed_report(), variant=""))
    results("cpu/bench_mine_too.json", replace(speed_report(), variant=""))
    results("cpu/without_graph.json", speed_report())
    assert paper_table(tmp_path) == paper_table(tmp_path / "absent")


def test_two_reports_for_one_cell_are_an_error_that_names_both(results):
    results("cpu/bench_a.json", speed_report())
    with pytest.raises(UsageError, match=r"bench_a\.json and .*bench_b\.json are both about yolov7") as caught:
        paper_table(results("cpu/bench_b.json", speed_report(engine_ms=1.0)))
    assert "bench_" in caught.value.fix


def test_a_file_that_is_not_a_report_is_named(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "bench_x.json").write_text('{"benchmark": "startup"}')
    with pytest.raises(UsageError, match=r"bench_x\.json.*not a report of y7 bench"):
        paper_table(tmp_path)


def test_writing_replaces_only_the_text_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_between_marks(page, "new")
        assert page.read_text() == f"before\n{START}\nnew\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", START, END, f"{END}\n{START}", f"{START}{END}{START}{END}", f"{START}{END}{END}"])
def test_a_page_without_both_marks_is_not_changed(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(UsageError, match="each once"):
        write_between_marks(page, "new")
    assert page.read_text() == text


def test_the_script_prints_the_table_and_writes_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{START}\n{END}\n")
    script = [sys.executable, str(ROOT / "benchmarks" / "paper_table.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    subprocess.run([*script, "--write", str(page)], check=True)
    assert printed == f"{paper_table()}\n"
    assert page.read_text() == f"{START}\n{printed}{END}\n"


def test_the_script_reports_missing_marks_without_a_traceback(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    script = [sys.executable, str(ROOT / "benchmarks" / "paper_table.py"), "--write", str(page)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "each once" in done.stderr and "Traceback" not in done.stderr
