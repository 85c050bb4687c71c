"""Several processes that train together: what one process with all their images would do, and no waiting for ever."""

import re
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.training_runs import (
    HYP,
    Notes,
    arguments,
    assert_same_weights,
    finished,
    leave_out_charts,
    losses,
    small_request,
    started,
)
from tests.support.two_processes import SHAPE, images, new_norm, normed
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.training.distributed import DistributedContext, open_world, synced
from yolov7_deploy.training.initialization import starting_model
from yolov7_deploy.training.loggers import read_results
from yolov7_deploy.training.resume_state import load_run_state
from yolov7_deploy.training.run import train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
MODULE = ["-m", "yolov7_deploy"]
SAME_NORM = {"rtol": 2e-5, "atol": 2e-5}  # float32 added in another order
SAME_HALF = 0.05  # of values up to 4 in bfloat16, which has eight bits
# A network of random weights on images of 64 pixels makes a rounding of 1e-7 in its first layers one of 1e-4 in its
# last ones; the rate is so small that they do not feed back, and candidates need no matching that may flip.
CALM = replace(HYP, lr0=1e-5)
CALM_OPTIONS = {"ota": False, "epochs": 3, "batch": 6, "nominal_batch": 12}
SAME_LOSS = 1e-4  # relative; 1e-5 was seen
SAME_UPDATE = 5e-2  # of all that the training changed; 1.5e-2 was seen, half or twice a gradient would be 0.5 or 1
SOON_S = 60.0  # an end is noticed within a second; starting takes longer


def together(*command: str, script: Path | None = None) -> tuple[int, str, str]:
    """The command in two processes."""
    return finished(started([*TORCHRUN, *(MODULE if script is None else [str(script)]), *command]))


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).parents[1] / "support" / "two_processes.py")
    places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"} for rank in ("0", "1")]
    processes = [
        started([script, str(folder)], env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **place})
        for place in places
    ]
    for code, _, err in map(finished, processes):
        assert code == 0, err
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_a_synced_norm_is_that_of_all_images_together(pair):
    x, weight = images()
    whole = normed(new_norm(), x, weight)
    for name in ("y", "x", "eval"):
        both = torch.cat([found[f"norm.{name}"] for found in pair])
        torch.testing.assert_close(both, whole[name], **SAME_NORM)
    for name in ("weight.grad", "bias.grad"):  # each process has its images' part
        torch.testing.assert_close(sum(found[f"norm.{name}"] for found in pair), whole[name], **SAME_NORM)
    for found in pair:
        for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
            torch.testing.assert_close(found[f"norm.{name}"], whole[name], **SAME_NORM)


def test_a_synced_norm_adds_in_float32_and_gives_what_it_got(pair):
    whole = new_norm()(images()[0])
    both = torch.cat([found["half"] for found in pair])
    assert both.dtype == torch.bfloat16 and both.shape == SHAPE
    torch.testing.assert_close(both.float(), whole, rtol=0, atol=SAME_HALF)


def test_processes_add_agree_and_gather(pair):
    for found in pair:
        assert found["sum"].tolist() == [3.0, 20.0]
        assert found["agreed"] == {"rank": 0, "words": ("a", None)}
        assert found["gathered"] == [("of", 0), ("of", 1)]
        assert found["command"] == "torchrun --nproc-per-node 2 -m yolov7_deploy"


def test_a_process_whose_partner_ended_says_so_at_once(pair):
    assert "Process 0 of 2 waits for another that has ended" in pair[0]["lost"]
    assert pair[0]["seconds"] < SOON_S


def test_one_process_is_a_world_of_its_own():
    world = DistributedContext()
    tensor = torch.ones(2)
    assert world.add(tensor) is tensor and tensor.tolist() == [1, 1]
    assert (world.agreed("x"), world.gathered("x"), world.command, world.is_first) == ("x", ["x"], "y7", True)
    world.wait()
    norm = torch.nn.Sequential(new_norm())
    assert synced(norm, world) is norm and type(norm[0]) is torch.nn.BatchNorm2d


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK or LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "two"}, "The variable WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "The variable LOCAL_RANK is 'x', not a number"),
    ],
)
def test_incomplete_variables_are_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught, open_world("cpu"):
        pass
    assert message in caught.value.message and "torchrun" in caught.value.fix


def test_devices_are_found_by_name_or_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, place in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("1", "cuda:1"), ("cpu", "cpu")):
        with open_world(name) as world:
            assert str(world.device) == place
    with pytest.raises(DeviceError, match="torch sees 2 GPUs here, and number 2 is needed"), open_world("cuda:2"):
        pass
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="names one GPU for several processes"), open_world("cuda:1"):
        pass


# --- whole trainings --------------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_with_all_their_images(data, tmp_path, monkeypatch):
    leave_out_charts(monkeypatch)
    calm = f"--set lr0={CALM.lr0} --no-ota --epochs 3 --batch 6 --nominal-batch 12".split()
    code, out, err = together(*arguments(data, tmp_path / "two", *calm))
    assert code == 0, err
    train(small_request(data, tmp_path / "one", hyp=CALM, **CALM_OPTIONS), watch=Notes())
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=SAME_LOSS)
    one, two = (load_run_state(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert (one[0].updates, one[0].step, two[0].world) == (two[0].updates, two[0].step, 2)
    assert update_differs(one[1], two[1], data) < SAME_UPDATE
    # What is said and written, once.
    assert len(out.splitlines()) == 1 + 3 + 3 and len(read_results(tmp_path / "two" / "results.csv")) == 3
    assert err.count("images to train on") == 1 and "Warning" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    assert not list((tmp_path / "two").glob(".*"))


def update_differs(one, two, data):
    """By how much of what was learned the weights of two trainings differ."""
    begun = starting_model("yolov7-tiny", open_dataset(data).class_names).model.named_parameters()
    pairs = [(one[f"model.{name}"] - start, two[f"model.{name}"] - start) for name, start in begun]
    learned, other = (
        torch.cat([change.detach().flatten() for change in changes]) for changes in zip(*pairs, strict=True)
    )
    return ((learned - other).norm() / learned.norm()).item()


_SCRIPT = """
import os, signal, sys
from yolov7_deploy.cli.app import main
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.train import trainer

learn, calls = trainer.Learner.learn, []

def learn_and_signal(*given, **named):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.SIGINT)
    return learn(*given, **named)

def failing(*given, **named):
    raise DatasetError("Nothing can be validated.", fix="Look at it.")

if "{what}" == "fail":
    trainer.evaluate = failing
else:
    trainer.Learner.learn = learn_and_signal
sys.argv[0] = "y7"
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_in_any_process_stops_all_at_one_step_and_they_go_on(data, tmp_path, rank):
    code, _, err = together(*arguments(data, tmp_path / "whole", "--epochs", "3"))
    assert code == 0, err
    script = tmp_path / "interrupted.py"
    script.write_text(_SCRIPT.format(rank=rank, what="signal"))
    code, _, err = together(*arguments(data, tmp_path / "run", "--epochs", "3"), script=script)
    assert code != 0
    go_on = f"torchrun --nproc-per-node 2 -m yolov7_deploy train --resume --save-dir {tmp_path / 'run'}"
    step = int(re.search(rf"stopped after step (\d) of epoch 2; go on with:  {re.escape(go_on)}", err)[1])
    assert step in (2, 3)  # the fifth of all, or the one that follows
    assert err.count("exitcode  : 130") == 2
    state, _ = load_run_state(tmp_path / "run" / "state.safetensors")
    assert (state.epoch, state.step, state.world) == (1, step, 2)
    code, out, err = together("train", "--resume", "--save-dir", str(tmp_path / "run"))
    assert code == 0 and "best epoch" in out, err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(data, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(_SCRIPT.format(rank=-1, what="fail"))
    started_at = time.monotonic()
    code, _, err = together(*arguments(data, tmp_path / "run"), script=script)
    assert code == 1 and time.monotonic() - started_at < SOON_S
    assert "DatasetError: Nothing can be validated.\nLook at it." in err
    assert "gloo" not in err or "TrainingError: Process 1 of 2 waits for another that has ended" in err
    assert "yolov7_deploy/train" not in err  # no traceback of ours


@pytest.mark.slow
def test_ctrl_c_to_torchrun_keeps_the_state(data, tmp_path):
    process = started([*TORCHRUN, *MODULE, *arguments(data, tmp_path / "run", "--epochs", "100")])
    while not (tmp_path / "run" / "last.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, _, err = finished(process)
    stopped = re.search(r"stopped after step (\d) of epoch (\d+)", err)
    state, _ = load_run_state(tmp_path / "run" / "state.safetensors")
    assert (str(state.step), str(state.epoch + 1)) == stopped.groups()


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(data, tmp_path):
    code, _, err = together(*arguments(data, tmp_path / "run", "--batch", "3"))
    assert code == 1
    assert "--batch 3 cannot be shared by 2 processes.\n--batch 4 (of all together)" in err


@pytest.mark.slow
def test_without_synced_norms_statistics_are_those_of_the_first_process(data, tmp_path):
    code, _, err = together(*arguments(data, tmp_path / "run", "--no-sync-bn", "--batch", "4", "--epochs", "1"))
    assert code == 0 and "Warning" not in err, err
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.slow
def test_images_that_other_processes_could_not_read_are_named(data, tmp_path):
    shutil.copytree(data.parent, tmp_path / "shapes")
    images_of = sorted((tmp_path / "shapes/images/train").iterdir())
    for path in images_of[1:]:
        path.write_bytes(path.read_bytes()[:200])
    single = ["--set", "mosaic=0", "--set", "mixup=0", "--epochs", "1"]
    code, _, err = together(*arguments(tmp_path / "shapes" / data.name, tmp_path / "run", *single))
    assert code == 0, err
    for path in images_of[1:]:  # three of the six are of the second process
        assert err.count(f"left out: {path} ") == 1
