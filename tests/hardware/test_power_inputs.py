"""The rails of Jetson boards: lines of tegrastats of several releases, sysfs trees, and what of it is the input."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.boards import laid_out
from yolov7_deploy.hardware.ina3221 import read_rails
from yolov7_deploy.hardware.power import INPUTS, find_input
from yolov7_deploy.hardware.tegrastats import Tegrastats, TegrastatsSample, read_line, read_one_line

RECORDED = Path(__file__).parents[1] / "fixtures" / "tegrastats.txt"


def recorded_lines() -> dict[str, str]:
    """The recorded lines by board and release: `nano, R32`."""
    rows = RECORDED.read_text().splitlines()
    return {rows[i][3:].partition(":")[0]: rows[i + 1] for i in range(len(rows)) if rows[i].startswith("## ")}


LINES = recorded_lines()


def program(folder, text):
    """A tegrastats that says the same line every hundredth of a second."""
    (folder / "line").write_text(f"{text}\n")
    path = folder / "tegrastats"
    path.write_text(f"#!/bin/sh\nwhile /bin/cat {folder}/line; do /bin/sleep 0.01; done\n")
    path.chmod(0o755)
    return str(path)


# --- lines of tegrastats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rails", "watts"),
    [
        ("nano, R32", "POM_5V_IN", 0.900),
        ("tx1, R32", "VDD_IN", 2.532),
        ("tx2, R32", "VDD_IN", 2.003),
        ("agx_xavier, R31", "GPU CPU SOC CV VDDRQ SYS5V", 0.463 + 0.618 + 2.936 + 0.309 + 3.306),
        ("agx_xavier, R35", "GPU CPU SOC CV VDDRQ SYS5V", 0.467 + 0.467 + 1.245 + 0.311 + 2.768),
        ("xavier_nx, R35", "VDD_IN", 5.079),
        ("agx_orin, R36", "VDD_GPU_SOC VDD_CPU_CV VIN_SYS_5V0", 3.150 + 14.312 + 4.968),
        ("orin_nano, R36", "VDD_IN", 5.263),
        ("orin_nano_busy, R36", "VDD_IN", 16.321),
        ("thor, R38", "VIN", 26.686),
        ("agx_orin, R39.2", "VDD_GPU_SOC VDD_CPU_CV VIN_SYS_5V0", 5.139 + 3.268 + 5.500),
    ],
)
def test_the_input_of_a_board_is_what_goes_in_now_and_nothing_twice(name, rails, watts):
    line = read_line(LINES[name])
    whole = find_input(line.rails_w)
    assert " ".join(whole.rails) == rails
    assert sum(line.rails_w[rail] for rail in whole.rails) == pytest.approx(watts)


@pytest.mark.parametrize(
    ("name", "gpu", "memory", "ram", "temperature_c"),
    [
        ("tx1, R28", (39, 76), (1, 1600), (3607, 3983), None),
        ("nano, R32", (0, None), (0, None), (613, 3964), 41.0),
        ("tx1, R32", (0, 76), (7, 408), (1179, 3983), 39.0),
        ("tx2, R32", (0, 114), (13, 40), (1345, 7829), 41.0),
        ("agx_xavier, R35", (0, 114), (0, 1331), (None, None), 35.0),
        ("xavier_nx, R35", (0, 510), (0, 1600), (2690, 6854), 37.5),
        ("agx_orin, R36", (14, 407), (1, 2133), (13983, 62780), 69.125),
        ("orin_nano, R36", (0, None), (None, None), (2639, 7620), 45.968),
        ("orin_nano_busy, R36", (99, 612), (61, 2133), (6712, 7620), 58.625),
        ("thor, R38", (None, None), (None, None), (86905, 125772), 39.906),
        ("thor_clocks, R38", (None, 1000), (2, 1866), (4722, 7844), None),
        ("agx_orin, R39.2", (12, 1300), (3, 3199), (20642, 62817), 47.625),
    ],
)
def test_clocks_loads_memory_and_temperature_are_read_from_every_release(name, gpu, memory, ram, temperature_c):
    line = read_line(LINES[name])
    assert (line.gpu_percent, line.gpu_mhz) == gpu
    assert (line.memory_percent, line.memory_mhz) == memory
    assert (line.ram_used_mb, line.ram_mb) == ram
    assert line.temperature_c == temperature_c


def test_every_recorded_line_is_looked_at():
    assert len(LINES) == 13


def test_of_several_clusters_the_fastest_is_the_clock():
    assert read_line("GR3D_FREQ 75%@[611,0] APE 150").gpu_mhz == 611


def test_a_part_that_is_switched_off_has_no_temperature():
    line = read_line("CV0@-256C GPU@-256C tj@49.2C thermal@48C")
    assert line.temperatures_c == {"tj": 49.2, "thermal": 48.0}
    assert line.temperature_c == 49.2


@pytest.mark.parametrize("text", ["", "\n", "tegrastats: command not found", "GR3D_FREQ", "VDD_IN mW/mW", "RAM /MB"])
def test_text_that_is_no_line_says_nothing(text):
    assert read_line(text) == TegrastatsSample()


PIECES = ["RAM", "VDD_IN", "GR3D_FREQ", "5mW/5mW", "0%", "@[1,]", "9@", "-1C", "/"]


@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES)))
def test_no_text_makes_the_reader_fail(pieces):
    line = read_line(pieces if isinstance(pieces, str) else " ".join(pieces))
    assert all(math.isfinite(watts) for watts in line.rails_w.values())


# --- the program ------------------------------------------------------------------------------------------------------


def test_a_first_line_comes_from_the_program_and_the_program_ends(tmp_path):
    assert read_one_line(program(tmp_path, LINES["orin_nano, R36"])).rails_w["VDD_IN"] == 5.263


def test_a_program_that_ends_at_once_or_is_none_gives_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.tegrastats.FIRST_LINE_TIMEOUT_S", 0.2)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)
    assert read_one_line(str(silent)) is None
    assert read_one_line(str(tmp_path / "absent")) is None


def test_a_program_that_will_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.tegrastats._STOP_TIMEOUT_S", 0.2)
    stubborn = tmp_path / "stubborn"
    ignoring = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn.write_text(f"#!{sys.executable}\n{ignoring}print('RAM 1/2MB', flush=True)\ntime.sleep(600)\n")
    stubborn.chmod(0o755)
    with Tegrastats(lambda line: None, program=str(stubborn)) as child:
        assert child.wait_for_a_line()
        process = child._child
    assert process.returncode == -9


# --- sysfs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("board", "rails", "watts"),
    [
        ("nano_4.6.1", ("POM_5V_IN",), 2.875),
        ("agx_xavier_4.6.1", ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), 32.850),
        ("orin_nx_5.1.3", ("VDD_IN",), 4.984 * 1.856),
        ("agx_orin_6.0", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 19.752 * 0.48 + 4.968 * 0.953),
        ("thor_7.2", ("VIN",), 36.834),
    ],
)
def test_the_monitors_of_a_board_tell_its_input(board, rails, watts, tmp_path):
    found = read_rails(laid_out(board, tmp_path))
    whole = find_input(found)
    assert whole.rails == rails
    assert sum(found[name].read_w() for name in whole.rails) == pytest.approx(watts)


def test_shunt_voltages_and_unconnected_channels_are_no_rails(tmp_path):
    assert sorted(read_rails(laid_out("agx_orin_6.0", tmp_path))) == [
        "VDDQ_VDD2_1V8AO",
        "VDD_CPU_CV",
        "VDD_GPU_SOC",
        "VIN_SYS_5V0",
    ]


def test_thor_without_its_second_chip_has_the_sum_of_its_module(tmp_path):
    root = laid_out("thor_7.2", tmp_path)
    (root / "sys/class/hwmon/hwmon6/power1_input").write_text("garbage\n")
    assert find_input(read_rails(root)).rails == ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")


def test_a_rail_that_does_not_answer_is_none_and_half_a_set_is_no_input(tmp_path):
    root = laid_out("agx_orin_6.0", tmp_path)
    (root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr2_input").unlink()
    found = read_rails(root)
    assert "VDD_CPU_CV" not in found
    assert find_input(found) is None


def test_no_set_of_rails_hides_another_one_that_holds_more():
    for number, known in enumerate(INPUTS):
        assert not any(set(earlier.rails) <= set(known.rails) for earlier in INPUTS[:number])


def test_other_machines_have_no_rails(tmp_path):
    assert read_rails(tmp_path) == {}
