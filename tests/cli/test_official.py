"""Every option of the five scripts of the official program is accepted, mapped, or answered with the line to use.

The parsers are those of the official repository at revision a207844b.
"""

from __future__ import annotations

import shlex

import pytest
import typer
from typer.testing import CliRunner

from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.official import translate
from yolov7_deploy.errors import UsageError

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

SAME = "same"  # the option has the same name and the same values here
TORCHRUN = "CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc-per-node 2 -m yolov7_deploy train --data d.yaml"
# (option as it is typed, what it is here); after an arrow, the line to use instead.
TRAIN_AUX = [
    ("--weights yolov7_training.pt", SAME),
    ("--weights ''", ""),
    ("--cfg cfg/training/yolov7.yaml", "--variant yolov7"),
    ("--cfg cfg/training/yolov7-tiny.yaml", "--variant yolov7-tiny"),
    ("--cfg cfg/training/yolov7-w6-custom.yaml", "--variant yolov7-w6"),
    ("--cfg cfg/yolov7x_my_data.yaml", "--variant yolov7x"),
    ("--cfg ''", ""),
    ("--cfg mine.yaml", "-> y7 train --data d.yaml --variant yolov7"),
    ("--data data/coco.yaml", SAME),
    ("--hyp data/hyp.scratch.p5.yaml", "--hyp p5"),
    ("--hyp data/hyp.scratch.p6.yaml", "--hyp p6"),
    ("--hyp data/hyp.scratch.tiny.yaml", "--hyp tiny"),
    ("--hyp data/hyp.scratch.custom.yaml", "--hyp custom"),
    ("--hyp mine.yaml", SAME),
    ("--epochs 300", SAME),
    ("--batch-size 32", SAME),
    ("--batch 32", SAME),
    ("--img-size 640 640", "--img '640 640'"),
    ("--img 640", SAME),
    ("--rect", SAME),
    ("--resume", SAME),
    ("--resume runs/train/exp", "--resume --save-dir runs/train/exp"),
    ("--resume runs/train/exp/last.safetensors", "--resume --save-dir runs/train/exp"),
    ("--resume old/weights/last.pt", "-> y7 train --data d.yaml --weights old/weights/last.pt"),
    ("--nosave", ""),
    ("--notest", "--val-every 0"),
    ("--noautoanchor", SAME),
    ("--evolve", "-> y7 train --data d.yaml"),
    ("--bucket gs", ""),
    ("--cache-images", ""),
    ("--image-weights", SAME),
    ("--device 0", SAME),
    ("--device cpu", SAME),
    ("--device ''", "--device auto"),
    ("--device 0,1", f"-> {TORCHRUN}"),
    ("--multi-scale", SAME),
    ("--single-cls", SAME),
    ("--adam", SAME),
    ("--sync-bn", SAME),
    ("--local_rank -1", ""),
    ("--workers 8", SAME),
    ("--project runs/train", SAME),
    ("--entity me", ""),
    ("--name yolov7", SAME),
    ("--exist-ok", SAME),
    ("--quad", "-> y7 train --data d.yaml"),
    ("--linear-lr", SAME),
    ("--label-smoothing 0.1", "--set label_smoothing=0.1"),
    ("--upload_dataset", ""),
    ("--bbox_interval -1", ""),
    ("--save_period 10", ""),
    ("--artifact_alias latest", ""),
    ("--v5-metric", ""),
]
TRAIN = [*TRAIN_AUX, ("--freeze 0", SAME), ("--freeze 0 1 2", "--freeze 0,1,2")]
TEST = [
    ("--weights yolov7.pt", SAME),
    ("--weights a.pt b.pt", "-> y7 val --data d.yaml --weights a.pt"),
    ("--data data/coco.yaml", SAME),
    ("--batch-size 32", SAME),
    ("--img-size 640", "--img 640"),
    ("--conf-thres 0.001", SAME),
    ("--conf 0.001", SAME),
    ("--iou-thres 0.65", SAME),
    ("--iou 0.65", SAME),
    ("--task val", "--split val"),
    ("--task test", "--split test"),
    ("--task speed", "-> y7 bench"),
    ("--task study", "-> y7 val --data d.yaml --img 640"),
    ("--device 0", SAME),
    ("--device 0,1", "-> y7 val --data d.yaml --device 0"),
    ("--single-cls", SAME),
    ("--augment", "-> y7 val --data d.yaml"),
    ("--verbose", SAME),  # but it prints the log
    ("--save-txt", "-> y7 detect --source FOLDER --save-txt"),
    ("--save-hybrid", "-> y7 detect --source FOLDER --save-txt"),
    ("--save-conf", "-> y7 detect --source FOLDER --save-txt"),
    ("--save-json", "--predictions predictions.json"),
    ("--project runs/test", SAME),
    ("--name exp", SAME),
    ("--exist-ok", SAME),
    ("--no-trace", ""),
    ("--v5-metric", ""),
]
DETECT = [
    ("--weights yolov7.pt", SAME),
    ("--weights a.pt b.pt", "-> y7 detect --data d.yaml --weights a.pt"),
    ("--source inference/images", SAME),
    ("--img-size 640", "--img 640"),
    ("--conf-thres 0.25", SAME),
    ("--iou-thres 0.45", SAME),
    ("--device 0", SAME),
    ("--view-img", SAME),
    ("--save-txt", SAME),
    ("--save-conf", SAME),
    ("--nosave", SAME),
    ("--classes 0", SAME),
    ("--classes 0 2 3", "--classes 0 --classes 2 --classes 3"),
    ("--agnostic-nms", SAME),
    ("--augment", "-> y7 detect --data d.yaml"),
    ("--update", ""),
    ("--project runs/detect", SAME),
    ("--name exp", SAME),
    ("--exist-ok", SAME),
    ("--no-trace", ""),
]
EXPORT = [
    ("--weights ./yolov7-tiny.pt", SAME),
    ("--img-size 640 640", "--img '640 640'"),
    ("--batch-size 1", SAME),
    ("--dynamic", SAME),
    ("--dynamic-batch", SAME),
    ("--grid", "--nms none"),
    ("--grid --end2end", "--nms efficient"),
    ("--end2end", "--nms efficient"),
    ("--grid --end2end --max-wh 640", "--nms standard"),
    ("--grid --end2end --max-wh 0", "--nms standard --agnostic-nms"),
    ("--grid --include-nms", "--nms efficient"),
    ("--grid --nms plugin", "--nms plugin"),
    ("--topk-all 100", SAME),
    ("--iou-thres 0.45", SAME),
    ("--conf-thres 0.25", SAME),
    ("--device cpu", ""),
    ("--simplify", SAME),
    ("--fp16", SAME),
    ("--int8", SAME),
]
TABLES = {"train": TRAIN, "train-aux": TRAIN_AUX, "val": TEST, "detect": DETECT, "export": EXPORT}
CASES = [(command, typed, here) for command, table in TABLES.items() for typed, here in table]


def spellings(command: str) -> set[str]:
    """Return the options that the parser of a command knows."""
    parameters = COMMANDS[command].params
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}


def function(command: str) -> str:
    return COMMANDS[command].callback.__name__


@pytest.mark.parametrize(("command", "typed", "here"), CASES, ids=lambda value: value or "nothing")
def test_every_official_option_is_accepted_mapped_or_answered(command, typed, here):
    known = spellings(command)
    arguments = ["--data", "d.yaml", *shlex.split(typed)]
    if here.startswith("-> "):
        with pytest.raises(UsageError) as caught:
            translate(function(command), arguments, known=known)
        assert caught.value.fix == here[3:]
        return
    result = translate(function(command), arguments, known=known)[2:]
    assert result == shlex.split(typed if here == SAME else here)
    options = {argument for argument in result if argument.startswith("--")}
    assert options <= known


@pytest.mark.parametrize("command", TABLES)
def test_the_tables_are_complete(command):
    numbers = {"train": 36, "train-aux": 35, "val": 20, "detect": 18, "export": 16}  # of options of each parser
    prefixes = {"--img", "--batch", "--conf", "--iou", "--nms"}  # abbreviations, and an option of y7
    names = {part for typed, _ in TABLES[command] for part in typed.split() if part.startswith("--")}
    assert len(names - prefixes) == numbers[command]


def test_options_may_be_written_with_an_equals_sign_and_underscores():
    known = spellings("train")
    typed = ["--img_size=640", "640", "--cfg=cfg/yolov7x.yaml", "--batch_size", "8", "--save_period=5"]
    here = ["--img", "640 640", "--variant", "yolov7x", "--batch-size", "8"]
    assert translate("train", typed, known=known) == here


def test_arguments_after_two_dashes_are_not_translated():
    assert translate("train", ["--", "--cfg", "x"], known=set()) == ["--", "--cfg", "x"]


@pytest.mark.parametrize(("command", "option"), [("train", "--cfg"), ("detect", "--weights"), ("export", "--max_wh")])
def test_a_missing_value_is_a_usage_error(command, option):
    with pytest.raises(UsageError, match=r"has no value") as raised:
        translate(command, [option, "--data", "d.yaml"], known=spellings(command))
    assert raised.value.message.startswith(option.replace("_", "-"))


def test_the_line_with_the_options_of_y7_is_printed_with_the_differences(capsys):
    typed = ["--data", "d.yaml", "--cfg", "cfg/training/yolov7.yaml", "--img", "640", "640", "--nosave"]
    translate("train", typed, known=spellings("train"))
    assert capsys.readouterr().err == (
        "With the options of y7:  y7 train --data d.yaml --variant yolov7 --img '640 640'\n"
        "--cfg: the file is not read; its name is the network, and --data has the classes\n"
        "--nosave: the best and the last weights are always written\n"
    )
    translate("train", ["--data", "d.yaml", "--img", "640", "640"], known=spellings("train"))
    assert capsys.readouterr().err == ""


def test_processes_of_torchrun_use_their_own_gpu_and_only_the_first_one_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert translate("train", ["--device", "0,1", "--local_rank", "1"], known=set()) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["train_aux", "train-aux", "train.py", "train_aux.py", "test.py", "detect.py", "test"])
def test_the_names_of_the_official_scripts_are_commands(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and "--weights" in result.output
