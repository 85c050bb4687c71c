"""Jetson boards: model, JetPack, power mode; and the checks before a build for JetPack, TensorRT and DLA."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.boards import BOARDS, about, board, findings, silent, write
from yolov7_deploy.hardware.jetson import find_jetpack, read_board
from yolov7_deploy.hardware.system import run_command
from yolov7_deploy.tensorrt.preflight import PlannedBuild, installed_wheels, preflight

# --- boards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "l4t", "jetpack", "tensorrt", "capability", "mode", "best"),
    [
        ("xavier_nx_5.1.2", "35.4.1", "5.1.2", "8.5.2", "7.2", "MODE_15W_6CORE", "MODE_20W_6CORE"),
        ("orin_nx_5.1.3", "35.5.0", "5.1.3", "8.5.2", "8.7", "MAXN", "MAXN"),
        ("agx_orin_6.0", "36.3.0", "6.0", "8.6.2", "8.7", "MODE_30W", "MAXN"),
        ("orin_nano_super_6.2", "36.4.3", "6.2", "10.3.0", "8.7", "25W", "MAXN_SUPER"),
        ("agx_orin_7.2", "39.2.0", "7.2", "10.16.2", "8.7", "MAXN", "MAXN"),
        ("thor_7.2", "39.2.0", "7.2", "10.16.2", "11.0", "120W", "MAXN"),
    ],
)
def test_a_board_has_its_jetpack_its_tensorrt_and_its_power_mode(name, l4t, jetpack, tensorrt, capability, mode, best):
    found = board(name)
    assert (found.l4t, found.jetpack.name, found.jetpack.tensorrt) == (l4t, jetpack, tensorrt)
    assert found.compute_capability == capability
    assert (found.mode.name, found.highest_mode.name) == (mode, best)


def test_a_container_without_the_release_file_is_recognised_by_its_packages():
    found = board("container_6.2.1")
    assert (found.l4t, found.jetpack.name) == ("36.4.4", "6.2.1")
    assert (found.mode, found.modes, found.highest_mode) == (None, (), None)


def test_a_container_that_shows_only_the_device_tree_is_still_a_board(tmp_path):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    found = read_board(root=tmp_path, run=silent)
    assert (found.l4t, found.jetpack, found.compute_capability) == ("", None, "8.7")


@pytest.mark.parametrize("model", ["", "Raspberry Pi 5 Model B Rev 1.0\0", "NVIDIA DGX Spark\0"])
def test_other_machines_are_not_boards(tmp_path, model):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text(model)
    assert read_board(root=tmp_path, run=silent) is None


def test_the_power_mode_comes_from_the_state_file_where_nvpmodel_does_not_answer():
    found = read_board(root=BOARDS / "xavier_nx_5.1.2", run=silent)
    assert (found.mode.name, found.mode.number) == ("MODE_15W_6CORE", 2)


@pytest.mark.parametrize(
    ("l4t", "name", "tensorrt"),
    [
        ("35.2.1", "5.1", "8.5.2"),
        ("36.4", "6.1", "10.3.0"),
        ("36.5.2", "6.x", "10.3.0"),
        ("38.2.2", "7.0", "10.13"),
        ("38.4.0", "7.1", "10.13"),
        ("40.1", "", "10.16.2"),
    ],
)
def test_a_release_missing_in_the_table_is_treated_as_the_one_before_it(l4t, name, tensorrt):
    jetpack = find_jetpack(l4t)
    assert (jetpack.name, jetpack.tensorrt) == (name, tensorrt)


@pytest.mark.parametrize("l4t", ["", "32.7.1", "35.1", "garbage"])
def test_older_jetpacks_are_unknown(l4t):
    assert find_jetpack(l4t) is None


def test_a_command_that_is_missing_or_fails_has_no_output():
    assert run_command(["no-such-command"]) is None
    assert run_command(["false"]) is None
    assert run_command(["echo", "yes"]) == "yes\n"


# --- JetPack ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("xavier_nx_5.1.2", "8.5.2.2", None),
        ("orin_nx_5.1.3", "8.6.2", "error"),
        ("agx_orin_6.0", "8.6.2.3", None),
        ("agx_orin_6.0", "10.3.0", "error"),
        ("orin_nano_super_6.2", "10.3.0.30", None),
        ("orin_nano_super_6.2", "10.7.0", "note"),
        ("orin_nano_super_6.2", "8.6.2", "note"),
        ("orin_nano_super_6.2", "8.5.2", "warning"),
        ("orin_nano_super_6.2", "11.4.1", "error"),
        ("agx_orin_7.2", "10.16.2.10", None),
        ("agx_orin_7.2", "11.0.0", "warning"),
        ("thor_7.2", "10.3.0", "warning"),
    ],
)
def test_the_installed_tensorrt_is_checked_against_jetpack(name, version, level):
    found = about("jetpack", findings(name, PlannedBuild(product="tensorrt", tensorrt=version)))
    assert [finding.level for finding in found] == ([level] if level else [])
    for finding in found:
        assert version in finding.text and board(name).jetpack.tensorrt in finding.text


def test_a_tensorrt_from_pip_is_named_where_only_jetpacks_own_can_use_the_gpu():
    wheels = ("tensorrt-cu12-libs 10.13.0.35",)
    build = PlannedBuild(product="tensorrt", tensorrt="10.13.0.35")
    (finding,) = about("jetpack", findings("orin_nano_super_6.2", build, wheels=wheels))
    assert finding.level == "error"
    assert "tensorrt-cu12-libs 10.13.0.35" in finding.text and "JetPack 6.2" in finding.text
    assert finding.fix.startswith("pip uninstall -y tensorrt tensorrt-cu12-libs; sudo apt install python3-libnvinfer")
    thor = replace(build, tensorrt="10.16.2")
    assert about("jetpack", findings("thor_7.2", thor, wheels=("tensorrt-cu13-libs 10.16.2",))) == []


def test_an_unknown_jetpack_is_reported(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t186ref\n")
    found = preflight(
        PlannedBuild(product="tensorrt", tensorrt="8.2.1"), root=tmp_path, run=silent, wheels=(), disk=lambda _: None
    )
    (finding,) = about("jetpack", found)
    assert finding.level == "warning" and "L4T 32.7.1" in finding.text


def test_installed_wheels_are_those_of_this_environment():
    # On a machine with classic TensorRT from pip there is one, elsewhere none; never TensorRT-RTX.
    assert all(name.startswith("tensorrt-") and "rtx" not in name for name in installed_wheels())


# --- power mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "number", "best"),
    [
        ("xavier_nx_5.1.2", "8.5.2", 8, "MODE_20W_6CORE"),
        ("agx_orin_6.0", "8.6.2", 0, "MAXN"),
        ("orin_nano_super_6.2", "10.3.0", 2, "MAXN_SUPER"),
        ("thor_7.2", "10.16.2", 0, "MAXN"),
    ],
)
def test_a_slow_power_mode_is_a_warning_with_the_number_of_the_fastest_mode(name, version, number, best):
    (finding,) = about("power_mode", findings(name, PlannedBuild(product="tensorrt", tensorrt=version)))
    assert finding.level == "warning" and best in finding.text
    assert finding.fix == f"sudo nvpmodel -m {number}; sudo jetson_clocks"


@pytest.mark.parametrize("name", ["orin_nx_5.1.3", "agx_orin_7.2"])
def test_the_fastest_power_mode_is_not_a_finding(name):
    assert about("power_mode", findings(name, PlannedBuild(product="tensorrt", tensorrt="8.5.2"))) == []


@pytest.mark.parametrize("names", [("MAXN", "MAXN_SUPER", "40W"), ("MAXN_SUPER", "40W", "MAXN"), ("40W", "25W", "7W")])
def test_the_fastest_mode_is_chosen_by_name_in_any_order(tmp_path, names):
    entries = "".join(f"< POWER_MODEL NAME={name} ID={number} >\n" for number, name in enumerate(names))
    write(tmp_path, etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 38968081\n")
    (tmp_path / "etc/nvpmodel.conf").write_text(entries)
    found = read_board(root=tmp_path, run=silent)
    assert found.highest_mode.name == ("MAXN_SUPER" if "MAXN_SUPER" in names else "40W")


def test_an_unknown_power_mode_is_a_note():
    (finding,) = about("power_mode", findings("container_6.2.1", PlannedBuild(product="tensorrt", tensorrt="10.3.0")))
    assert finding.level == "note"


# --- DLA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("orin_nx_5.1.3", "8.5.2", False),
        ("agx_orin_6.0", "10.7.0", False),
        ("agx_orin_7.2", "10.16.2", True),
        ("agx_orin_7.2", "11.4.0", True),
        ("agx_orin_7.2", "11.4.1", False),
        ("orin_nano_super_6.2", "10.3.0", True),
        ("thor_7.2", "11.4.1", True),
    ],
)
def test_a_dla_core_is_rejected_where_board_or_tensorrt_has_none(name, version, refused):
    found = about("dla", findings(name, PlannedBuild(product="tensorrt", tensorrt=version, dla_core=0)))
    assert [finding.level for finding in found] == (["error"] if refused else [])
