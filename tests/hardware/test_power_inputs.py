"""Power rails of Jetson boards: tegrastats lines of several releases, sysfs trees, and which rails are the input."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.boards import laid_out
from yolov7_deploy.hardware.jetson import Tegrastats, TegrastatsSample, parse_tegrastats, read_tegrastats
from yolov7_deploy.hardware.power import POWER_INPUTS, find_power_input, read_rails

RECORDED = Path(__file__).parents[1] / "fixtures" / "tegrastats.txt"


def recorded_lines() -> dict[str, str]:
    """Return the recorded lines by board and release (`nano, R32`)."""
    rows = RECORDED.read_text().splitlines()
    return {rows[i][3:].partition(":")[0]: rows[i + 1] for i in range(len(rows)) if rows[i].startswith("## ")}


LINES = recorded_lines()


def program(folder, text):
    """Write a tegrastats that prints the same line every hundredth of a second, and return its path."""
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
def test_the_input_of_a_board_is_its_current_power_and_counts_no_rail_twice(name, rails, watts):
    sample = parse_tegrastats(LINES[name])
    power_input = find_power_input(sample.rails_w)
    assert " ".join(power_input.rails) == rails
    assert sum(sample.rails_w[rail] for rail in power_input.rails) == pytest.approx(watts)


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
    sample = parse_tegrastats(LINES[name])
    assert (sample.gpu_percent, sample.gpu_mhz) == gpu
    assert (sample.memory_percent, sample.memory_mhz) == memory
    assert (sample.ram_used_mb, sample.ram_mb) == ram
    assert sample.temperature_c == temperature_c


def test_every_recorded_line_is_parsed():
    assert len(LINES) == 13


def test_the_clock_is_that_of_the_fastest_cluster():
    assert parse_tegrastats("GR3D_FREQ 75%@[611,0] APE 150").gpu_mhz == 611


def test_a_part_that_is_switched_off_does_not_have_a_temperature():
    sample = parse_tegrastats("CV0@-256C GPU@-256C tj@49.2C thermal@48C")
    assert sample.temperatures_c == {"tj": 49.2, "thermal": 48.0}
    assert sample.temperature_c == 49.2


@pytest.mark.parametrize("text", ["", "\n", "tegrastats: command not found", "GR3D_FREQ", "VDD_IN mW/mW", "RAM /MB"])
def test_other_text_is_an_empty_sample(text):
    assert parse_tegrastats(text) == TegrastatsSample()


FRAGMENTS = ["RAM", "VDD_IN", "GR3D_FREQ", "5mW/5mW", "0%", "@[1,]", "9@", "-1C", "/"]


@given(st.text(max_size=200) | st.lists(st.sampled_from(FRAGMENTS)))
def test_the_parser_accepts_any_text(fragments):
    sample = parse_tegrastats(fragments if isinstance(fragments, str) else " ".join(fragments))
    assert all(math.isfinite(watts) for watts in sample.rails_w.values())


# --- the program ------------------------------------------------------------------------------------------------------


def test_the_first_sample_is_read_and_the_program_is_stopped(tmp_path):
    assert read_tegrastats(program(tmp_path, LINES["orin_nano, R36"])).rails_w["VDD_IN"] == 5.263


def test_a_program_that_ends_at_once_or_is_missing_has_no_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.jetson.FIRST_LINE_TIMEOUT_S", 0.2)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)
    assert read_tegrastats(str(silent)) is None
    assert read_tegrastats(str(tmp_path / "absent")) is None


def test_a_program_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.jetson._STOP_TIMEOUT_S", 0.2)
    ignoring_sigterm = tmp_path / "ignoring_sigterm"
    ignoring = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    ignoring_sigterm.write_text(f"#!{sys.executable}\n{ignoring}print('RAM 1/2MB', flush=True)\ntime.sleep(600)\n")
    ignoring_sigterm.chmod(0o755)
    with Tegrastats(lambda sample: None, program=str(ignoring_sigterm)) as running:
        assert running.wait_for_sample()
        process = running._process
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
def test_the_monitors_of_a_board_give_its_input(board, rails, watts, tmp_path):
    found = read_rails(laid_out(board, tmp_path))
    power_input = find_power_input(found)
    assert power_input.rails == rails
    assert sum(found[name].read_w() for name in power_input.rails) == pytest.approx(watts)


def test_shunt_voltages_and_unconnected_channels_are_not_rails(tmp_path):
    assert sorted(read_rails(laid_out("agx_orin_6.0", tmp_path))) == [
        "VDDQ_VDD2_1V8AO",
        "VDD_CPU_CV",
        "VDD_GPU_SOC",
        "VIN_SYS_5V0",
    ]


def test_thor_without_its_second_chip_has_the_sum_of_its_module(tmp_path):
    root = laid_out("thor_7.2", tmp_path)
    (root / "sys/class/hwmon/hwmon6/power1_input").write_text("garbage\n")
    assert find_power_input(read_rails(root)).rails == ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")


def test_a_rail_that_does_not_answer_is_left_out_and_a_part_of_a_set_is_not_an_input(tmp_path):
    root = laid_out("agx_orin_6.0", tmp_path)
    (root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr2_input").unlink()
    found = read_rails(root)
    assert "VDD_CPU_CV" not in found
    assert find_power_input(found) is None


def test_no_set_of_rails_hides_a_larger_one():
    for number, known in enumerate(POWER_INPUTS):
        assert not any(set(earlier.rails) <= set(known.rails) for earlier in POWER_INPUTS[:number])


def test_other_machines_do_not_have_rails(tmp_path):
    assert read_rails(tmp_path) == {}
