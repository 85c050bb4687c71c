"""`y7 docker`: the image of a machine, and the lines that build and run it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tests.support.boards import BOARDS
from yolov7_deploy.cli.app import app
from yolov7_deploy.doctor.containers import IMAGES, plan_container
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.hardware.gpu import InstalledGpu
from yolov7_deploy.hardware.machine import Machine, read_jetson

PLAIN = Machine(
    system="Linux", architecture="x86_64", cpu="a CPU", cores=4, usable_cores=2, memory_gb=8.0, gpus=(), jetson=None
)


def gpu(name: str, capability: str) -> InstalledGpu:
    return InstalledGpu(name=name, compute_capability=capability, driver="580.95.05", memory_gb=16.0)


def board(name: str) -> Machine:
    return replace(PLAIN, architecture="aarch64", jetson=read_jetson(BOARDS / name))


V100, T4, RTX5090, P40 = (
    gpu(name, capability)
    for name, capability in (("Tesla V100", "7.0"), ("Tesla T4", "7.5"), ("RTX 5090", "12.0"), ("Tesla P40", "6.1"))
)


@pytest.mark.parametrize(
    ("gpus", "image"),
    [
        ((), "cpu"),
        ((T4,), "server"),
        ((RTX5090, RTX5090), "server"),
        ((gpu("new", ""),), "server"),
        ((V100,), "v100"),
        ((T4, V100), "v100"),
        ((P40,), "cpu"),
        ((P40, T4), "server"),
    ],
)
def test_the_gpus_decide_the_image_of_a_server(gpus, image):
    plan = plan_container(replace(PLAIN, gpus=gpus))
    assert plan.image == image
    assert ("--gpus all" in plan.run) == (image != "cpu")


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("agx_orin_7.2", "jetson-jetpack7"),
        ("thor_7.2", "jetson-jetpack7"),
        ("orin_nano_super_6.2", "jetson-jetpack6"),
        ("container_6.2.1", "jetson-jetpack6"),
    ],
)
def test_the_jetpack_decides_the_image_of_a_jetson(name, image):
    plan = plan_container(board(name))
    assert plan.image == image and "--runtime nvidia" in plan.run
    assert board(name).jetson.model in plan.reason


@pytest.mark.parametrize(("name", "architecture"), [("xavier_nx_5.1.2", "72"), ("orin_nx_5.1.3", "87")])
def test_jetpack_5_gets_the_plan_and_the_source_of_the_plugin_only(name, architecture):
    with pytest.raises(DeviceError) as caught:
        plan_container(board(name))
    assert "there is no image for JetPack 5" in caught.value.message and "plan" in caught.value.message
    assert f"-DCMAKE_CUDA_ARCHITECTURES={architecture}" in caught.value.fix and "trtexec" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "text"),
    [("agx_orin_6.0", "JetPack 6.1 or later"), ("nano_4.6.1", "JetPack 7"), ("agx_xavier_4.6.1", "JetPack 7")],
)
def test_an_older_jetpack_is_an_error_that_names_the_image_to_try(name, text):
    with pytest.raises(DeviceError, match=text) as caught:
        plan_container(board(name))
    assert "y7 docker --image jetson-jetpack6" in caught.value.fix


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_both_lines_are_commands_of_docker(image):
    plan = plan_container(PLAIN, image=image.name)
    tag = f"yolov7-deploy:{image.name}"
    file = f"docker/{image.name}.Dockerfile"
    assert shlex.split(plan.build) == ["docker", "build", "--file", file, "--tag", tag, "."]
    words = shlex.split(plan.run)
    assert words[:3] == ["docker", "run", "--rm"] and words[-2:] == [tag, "doctor"]
    assert "$PWD:/work" in words and "yolov7-deploy-cache:/cache" in words


def test_the_groups_of_the_gpu_are_those_of_the_board(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/group").write_text("root:x:0:\nvideo:x:44:user\nrender:x:104:user\nvideos:x:9:\n")
    run = plan_container(board("thor_7.2"), root=tmp_path).run
    assert "--group-add 44 --group-add 104 " in run and "--group-add 9" not in run
    assert "--group-add" not in plan_container(replace(PLAIN, gpus=(T4,)), root=tmp_path).run


def test_root_of_the_host_is_not_the_user_in_the_container():
    plan = plan_container(PLAIN, is_root=True)
    assert "--user" not in plan.run and "10001" in plan.notes[-1]
    assert '--user "$(id -u):$(id -g)"' in plan_container(PLAIN).run


def test_an_unknown_image_is_an_error_with_the_names():
    with pytest.raises(UsageError) as caught:
        plan_container(PLAIN, image="jetpack8")
    assert all(image.name in caught.value.fix for image in IMAGES)


def test_the_quiet_command_prints_the_two_lines_only():
    result = CliRunner().invoke(app, ["docker", "--image", "v100", "--quiet"])
    assert result.exit_code == 0
    build, run = result.stdout.splitlines()
    assert build.startswith("docker build ") and run.startswith("docker run ") and result.stderr == ""


def test_json_on_standard_output_is_the_only_output_there():
    result = CliRunner().invoke(app, ["docker", "--image", "cpu", "--json", "-"])
    assert json.loads(result.stdout)["image"] == "cpu" and "docker build" in result.stderr
