"""`y7 bench`: options, printed output, written files, and rejected input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.small_models import HW
from tests.support.speed_reports import speed_report, speed_row
from yolov7_deploy._console import write_json
from yolov7_deploy.benchmarking.report import SpeedReport
from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.bench import find_network, parse_frame, parse_numbers, report_complete_rows
from yolov7_deploy.errors import DeviceError, LoadError, SourceError, UsageError, Y7Error
from yolov7_deploy.evaluation.synthetic_image import synthetic_image
from yolov7_deploy.visualize import write_image

ATTEMPTS = 3  # for a comparison that may be too noisy for a verdict
QUICK = ("--duration", "0.1", "--warmup", "0.3", "--frame", "48x64", "--device", "cpu")
TIMEOUT_S = 120


@pytest.fixture(autouse=True)
def _short_slices(monkeypatch):
    """Use short slices: long ones stabilise the clocks, which is not tested here."""
    monkeypatch.setattr("yolov7_deploy.benchmarking.benchmark.SLICE_S", 0.005)


@pytest.fixture
def bench(files, tmp_path, monkeypatch):
    """Return a function that runs the command on the small network, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights=None, quick=QUICK):
        path = files("plugin") if weights is None else weights
        typed = ["bench", "--weights", str(path), *quick, *map(str, arguments)]
        result = CliRunner().invoke(app, typed)
        if isinstance(result.exception, Y7Error):
            raise result.exception
        return result

    return run


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- parsing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"), [("1", (1,)), ("1,8,32", (1, 8, 32)), ("1 8", (1, 8)), (" 4, 2 ", (4, 2))]
)
def test_lists_of_numbers_may_have_commas_or_spaces(text, numbers):
    assert parse_numbers(text, "batch") == numbers


@pytest.mark.parametrize("text", ["abc", "", ",", "1.5", "-1", "1;2", "9999999", "²"])
def test_other_lists_are_rejected(text):
    with pytest.raises(UsageError, match=r"is not a list of numbers") as raised:
        parse_numbers(text, "batch")
    assert raised.value.message.startswith("--batch ")


def test_a_frame_is_height_x_width():
    assert parse_frame("1080x1920") == (1080, 1920)
    for text in ("0x5", "1920", "axb", "99999x1", "1080x1920x3"):
        with pytest.raises(UsageError, match="is not an image size"):
            parse_frame(text)


# --- output -----------------------------------------------------------------------------------------------------------


def test_a_table_is_printed_and_nothing_written(bench, tmp_path):
    result = bench("--batch", "1", "--concurrency", "1,2")
    assert result.exit_code == 0, result.output
    assert "img/s" in result.stdout and "one synthetic image, 48x64" in result.stdout
    assert "at concurrency 2 a call took" in result.stdout
    assert all_files(tmp_path) == []


def test_spellings_of_the_official_program_are_accepted(bench, files):
    typed = ["--batch-size", "1", "--img-size", "128x192", "--conf-thres", "0.7", "--iou-thres", "0.5", "--json", "-"]
    report = json.loads(bench(*typed, weights=files("plugin")).stdout)
    assert "conf 0.7, iou 0.5" in dict(report["settings"])["thresholds"]
    assert CliRunner().invoke(app, ["benchmark", "--help"]).exit_code == 0


def test_standard_output_contains_only_the_report(bench):
    result = bench("--json", "-")
    assert json.loads(result.stdout)["kind"] == "y7 bench"
    assert "img/s" in result.stderr


def test_the_option_paper_adds_its_row_a_report_and_a_chart(bench, files, tmp_path):
    val = tmp_path / "val.json"
    val.write_text(json.dumps({"ap": 0.35, "weights": str(files("plugin")), "images": 82}))
    result = bench("--paper", "--val-report", val)
    assert "YOLOv7-tiny in the paper" in result.stdout and "0.4 ms per image at batch 32" in result.stdout
    assert "35.0 % (" in result.stdout and ", 82 images)" in result.stdout
    assert all_files(tmp_path) == ["runs/bench/exp/bench.json", "runs/bench/exp/chart.png", "val.json"]
    assert all(f": runs/bench/exp/{name}" in result.stdout for name in ("bench.json", "chart.png"))
    measured = SpeedReport.load("runs/bench/exp/bench.json")
    assert (measured.paper.model, measured.ap) == ("YOLOv7-tiny", 0.35)
    assert Path("runs/bench/exp/chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        (["--paper", "--no-chart"], ["runs/bench/exp/bench.json"]),
        (["--paper", "--no-chart", "--json", "r.json"], ["r.json"]),
        (["--paper", "--json", "a/r.json", "--chart", "b/c.png"], ["a/r.json", "b/c.png"]),
        (["--paper", "--save-dir", "out"], ["out/bench.json", "out/chart.png"]),
        (["--save-dir", "out"], ["out/bench.json"]),
        (["--chart", "c.png"], ["c.png"]),
    ],
)
def test_files_are_written_where_the_options_say(bench, tmp_path, typed, written):
    bench(*typed)
    assert all_files(tmp_path) == written


def test_a_run_is_compared_with_an_earlier_one(bench, tmp_path):
    bench("--json", "old.json")
    result = bench("--compare", "old.json", "--json", "new.json")
    assert "compared with old.json" in result.stdout and "Holm" in result.stdout
    assert {one["stage"] for one in json.loads(Path("new.json").read_text())["comparison"]["differences"]} >= {"engine"}
    old = SpeedReport.load("old.json")
    slow = replace(old, rows=(replace(old.rows[0], stages=tuple(slower(stage, 0.1) for stage in old.rows[0].stages)),))
    write_json(slow.to_dict(), "slow.json")
    # Other programs may disturb a run this short, which is then correctly reported as too noisy.
    verdicts = []
    while verdicts[-1:] != ["slower"] and len(verdicts) < ATTEMPTS:
        text = bench("--compare", "slow.json").stdout
        verdicts += [line.split()[-1] for line in text.splitlines() if " end_to_end " in line]
    assert verdicts[-1] == "slower" and set(verdicts[:-1]) <= {"tell"}


def slower(stage, factor):
    return replace(stage, p50=stage.p50 * factor, blocks=tuple(block * factor for block in stage.blocks))


def test_the_images_of_source_are_used(bench, tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, synthetic_image((64, 64)))
    result = bench("--source", tmp_path / "in", quick=QUICK[:4] + QUICK[6:])
    assert f"frames: 2 images of {tmp_path / 'in'}" in result.stdout


def test_a_file_with_a_fixed_batch_is_measured_with_it(bench, files):
    result = bench("--json", "-", weights=files("plugin", batch=2))
    assert [row["batch"] for row in json.loads(result.stdout)["rows"]] == [2]


# --- estimates --------------------------------------------------------------------------------------------------------


def test_an_estimate_needs_no_weights_and_is_labelled_as_estimate(bench, tmp_path):
    result = bench("--estimate", "orin-nx", "--json", "e.json", weights="yolov7", quick=())
    assert "estimated, not measured: yolov7 at 640x640" in result.stdout
    document = json.loads(Path("e.json").read_text())
    assert (document["kind"], document["measured"]) == ("y7 estimate", False)
    with pytest.raises(UsageError, match="it is not a report of y7 bench"):
        bench("--compare", "e.json")


def test_an_estimate_rejects_options_of_a_measurement(bench):
    with pytest.raises(UsageError, match="measures nothing") as raised:
        bench("--estimate", "v100", "--paper", "--runtime", "openvino", weights="yolov7", quick=())
    assert "--runtime, --paper cannot apply" in raised.value.message


def test_a_file_names_its_network(files, tmp_path):
    assert find_network(str(files("plugin"))) == ("yolov7-tiny", HW)
    assert find_network(str(files("torch"))) == ("yolov7-tiny", None)
    assert find_network("yolov7-w6_training.pt") == ("yolov7-w6", None)
    with pytest.raises(LoadError):
        find_network(str(tmp_path / "absent.onnx"))


# --- rejected input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "error", "text"),
    [
        (["--batch", "0"], UsageError, "--batch 0 must be at least 1"),
        (["--batch", "abc"], UsageError, "not a list of numbers"),
        (["--batch", "8"], UsageError, "takes at most 1 at once.\ny7 export .*--batch 8"),
        (["--concurrency", "0"], UsageError, "--concurrency 0"),
        (["--duration", "nan"], UsageError, "--duration nan"),
        (["--conf", "2"], UsageError, "conf must be"),
        (["--device", "tpu"], DeviceError, "tpu"),
        (["--device", "7"], DeviceError, "cuda:7"),
        (["--half"], UsageError, "is fp32"),
        (["--compare", "absent.json"], UsageError, "absent.json cannot be read"),
        (["--compare", "."], UsageError, "cannot be read"),
        (["--source", "empty"], SourceError, "empty"),
        (["--chart", "c.png", "--no-chart"], UsageError, "contradict"),
        (["--chart", "c.jpg"], UsageError, "a chart is a PNG"),
        (["--save-dir", "file/out"], UsageError, "is not a folder"),
        (["--json", "empty"], UsageError, "it is a folder"),
        (["--val-report", "absent.json"], UsageError, "absent.json cannot be read"),
    ],
)
def test_invalid_input_is_rejected_and_leaves_nothing(bench, tmp_path, typed, error, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    quick = QUICK[:4] if "--source" in typed else QUICK
    with pytest.raises(error) as raised:
        bench(*typed, quick=quick)
    assert re.search(text, f"{raised.value.message}\n{raised.value.fix}")
    assert all_files(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("{", "cannot be compared with"),
        ("[]", "not a report of y7 bench"),
        (json.dumps({"kind": "y7 bench", "schema": 99}), "its schema is 99"),
        (json.dumps({**speed_report().to_dict(), "rows": [{"batch": "one"}]}), "batch is 'one'"),
    ],
)
def test_a_file_that_is_not_a_report_is_not_compared_with(bench, tmp_path, document, text):
    (tmp_path / "old.json").write_text(document)
    with pytest.raises(UsageError, match=text):
        bench("--compare", "old.json")


def test_missing_weights_are_rejected(bench):
    with pytest.raises(LoadError, match=r"absent\.onnx does not exist"):
        bench(weights="absent.onnx")


@pytest.mark.parametrize(("device", "other"), [("v100", "v100"), ("jetson", "orin-nx")])
def test_another_machine_is_named_and_an_estimate_is_offered(tmp_path, device, other):
    done = subprocess.run(
        [sys.executable, "-m", "yolov7_deploy", "bench", "--weights", "yolov7", "--device", device],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""},
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"DeviceError: --device {device}: this machine ")
    assert f"y7 bench --estimate {other}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_reported_after_the_table(files):
    done = run_bench(files("plugin"), "--json", "/dev/full")
    assert done.returncode == 1
    assert "img/s" in done.stdout
    assert "UsageError: /dev/full cannot be written: No space left on device" in done.stderr


def test_a_run_that_ends_early_reports_the_complete_rows(capsys):
    for rows, text in ((0, ""), (1, "Complete rows: 1; nothing is written.\n"), (2, "Complete rows: 2; ")):
        with pytest.raises(KeyboardInterrupt), report_complete_rows() as on_row:
            for _ in range(rows):
                on_row(speed_row())
            raise KeyboardInterrupt
        assert capsys.readouterr().err.startswith(text)


@pytest.mark.slow
def test_ctrl_c_leaves_no_partial_files(files, tmp_path):
    process = subprocess.Popen(
        [*command(files("plugin")), "--concurrency", "1,2", "--duration", "30", "--save-dir", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        while "bench: " not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output == "" and not (tmp_path / "out").exists()


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def command(weights: Path) -> list[str]:
    return [sys.executable, "-m", "yolov7_deploy", "bench", "--weights", str(weights), *QUICK[2:]]


def run_bench(weights: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    typed = [*command(weights), "--duration", "0.1", *arguments]
    return subprocess.run(typed, capture_output=True, text=True, env=ENVIRONMENT, timeout=TIMEOUT_S, check=False)
