"""`y7 score` on Ray: two actors equal one process, a killed actor or command loses nothing, and errors keep their text.

Everything runs on 127.0.0.1. Ray takes seconds to start, so these tests are slow; `test_score.py` has those without it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import DeviceError, LoadError, SourceError, UsageError
from yolov7_deploy.scoring.input import open_input
from yolov7_deploy.scoring.score import ScoreOptions, prepare_ray, score

prepare_ray(is_local=True)
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'yolov7-deploy[ray]'")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ray_proof  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
IMAGES = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder of images, with an unreadable one, and a model file with dynamic batch size."""
    folder = tmp_path_factory.mktemp("inputs")
    write_shapes(folder / "shapes", train=IMAGES - 1, val=1, size=160, seed=1)
    images, model = folder / "shapes" / "images" / "train", folder / "model.onnx"
    (images / "broken.png").write_bytes(b"not an image")
    ray_proof._export(model, 160)
    return images, model


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    ray_proof.run_score(*inputs, output, workers=0)
    return output


def test_two_actors_write_the_same_files_as_one_process(inputs, alone, tmp_path):
    run = ray_proof.run_score(*inputs, tmp_path / "out", workers=2)
    assert ray_proof.equal_files(alone, run.folder)
    assert len(run.report.workers) == 2 and min(run.report.workers.values()) > 0
    assert [Path(item.path).name for item in run.report.unreadable] == ["broken.png"]


def test_killing_an_actor_loses_no_image(inputs, alone, tmp_path):
    run = ray_proof.run_score(*inputs, tmp_path / "out", workers=2, kill=True)
    assert ray_proof.equal_files(alone, run.folder)
    assert len(run.report.workers) == 3


def test_a_killed_command_resumes(inputs, alone, tmp_path):
    processed, kept = ray_proof.run_killed_command(*inputs, tmp_path / "out")
    assert ray_proof.equal_files(alone, tmp_path / "out")
    assert processed < IMAGES and kept > 0


def command(images, model, output, *options):
    line = ["score", "--weights", model, "--input", images, "--output", output, "--workers", "2", *options]
    return [sys.executable, "-m", "yolov7_deploy", *map(str, line)]


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_and_all_workers(inputs, tmp_path, number, code):
    process = subprocess.Popen(
        command(*inputs, tmp_path / "out", "--shard-size", 8), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "out").glob("part-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    children = ray_proof.psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    _, alive = ray_proof.psutil.wait_procs(children, timeout=30)
    assert alive == []


def run(images, model, output, **options):
    detector = {"device": options.pop("device", "cpu")}
    chosen = ScoreOptions(**{"workers": 1, "cpus": 1, **options})
    return score(open_input(str(images)), output, weights=model, detector=detector, options=chosen)


def test_an_error_of_a_worker_has_the_text_it_has_without_ray(inputs, tmp_path):
    images, _ = inputs
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(LoadError) as here:
        run(images, tmp_path / "model.onnx", tmp_path / "here", workers=0, cpus=None)
    with pytest.raises(LoadError) as there:
        run(images, tmp_path / "model.onnx", tmp_path / "there")
    assert (there.value.message, there.value.fix) == (here.value.message, here.value.fix)


def test_more_gpus_than_there_are_is_an_error(inputs, tmp_path):
    with pytest.raises(DeviceError, match="1 workers with 99 GPUs each need 99, but Ray has"):
        run(*inputs, tmp_path / "out", gpus=99)


def test_one_gpu_cannot_be_chosen(inputs, tmp_path):
    with pytest.raises(UsageError, match="Ray chooses the GPU of each worker"):
        run(*inputs, tmp_path / "out", device="cuda:1")
    assert not (tmp_path / "out").exists()


def test_an_address_without_a_cluster_is_an_error(inputs, tmp_path):
    with pytest.raises(UsageError, match="Ray does not answer at 127"):
        run(*inputs, tmp_path / "out", address=f"127.0.0.1:{ray_proof.free_port()}")


def test_a_machine_that_is_too_busy_to_start_ray_is_an_error(inputs, tmp_path, monkeypatch):
    def time_out(**options):
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(DeviceError, match="Ray did not start: The current node timed out") as error:
        run(*inputs, tmp_path / "out")
    assert "--workers" in error.value.fix


def test_a_folder_that_ray_cannot_use_is_an_error_with_the_variable_that_sets_another(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))  # no path of a socket fits
    with pytest.raises(DeviceError, match=r"Ray did not start: .*path length") as error:
        run(*inputs, tmp_path / "out")
    assert "RAY_TMPDIR=" in error.value.fix
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize(
    "code,says",
    [
        ("os.kill(os.getpid(), 9)", "4 workers died while they processed the same"),  # what the system does
        ("bytearray(1 << 62)", "A worker ran out of memory"),
    ],
)
def test_memory_that_runs_out_in_workers_ends_the_run_with_the_reason(inputs, tmp_path, monkeypatch, code, says):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'default_worker.py' in ' '.join(sys.orig_argv):\n"
        "    import yolov7_deploy.scoring.scorer as scorer\n"
        f"    scorer._read = lambda item: {code}\n"
    )
    with pytest.raises(DeviceError, match=says) as error:
        run(*inputs, tmp_path / "out")
    assert "fewer workers" in error.value.fix


def test_images_in_a_parquet_file_are_read_by_the_workers(inputs, tmp_path):
    import pyarrow
    import pyarrow.parquet

    images, model = inputs
    data = [path.read_bytes() for path in sorted(images.iterdir())]
    pyarrow.parquet.write_table(pyarrow.table({"image": data}), tmp_path / "i.parquet", row_group_size=50)
    here = run(tmp_path / "i.parquet", model, tmp_path / "here", workers=0, cpus=None)
    there = run(tmp_path / "i.parquet", model, tmp_path / "there", workers=2)
    assert ray_proof.equal_files(tmp_path / "here", tmp_path / "there")
    assert here.detections == there.detections > 0


def test_an_input_without_any_readable_image_is_an_error(inputs, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match="None of the 1 images can be read"):
        run(tmp_path / "images", inputs[1], tmp_path / "out")
