"""The driver that measures the CUDA kernels, on the CUDA emulation: all its cases equal its own reference."""

import json
import subprocess

import pytest

from tests.fakes.emulated_kernels import EMULATION, ROOT, SOURCES, compile_emulated

DRIVER = ROOT / "benchmarks" / "kernel_driver.cpp"


def build_driver(folder, source):
    """Compile the driver and link it with the emulated kernels; return its path."""
    library = compile_emulated("nms.cu", "letterbox.cu")
    program = folder / "kernel_driver"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    command += [f"-I{EMULATION}", f"-I{SOURCES}", str(source), str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def run_driver(program, *options):
    """Return the exit code and the rows by case."""
    done = subprocess.run([program, *options], stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, {row["case"]: row for row in json.loads(done.stdout)["rows"]}


def test_every_case_of_the_driver_equals_its_reference(tmp_path):
    code, rows = run_driver(build_driver(tmp_path, DRIVER), "--seeds", "1", "--calls", "1")
    assert code == 0
    assert all(row["equal"] and row["us"] > 0 for row in rows.values())
    assert rows["clusters"]["pairs"][0] > 5 * rows["clusters"]["kept"][0] > 100, "many anchors detect one object"
    assert rows["clusters_batch8"]["batch"] == 8
    assert 4000 < rows["low_conf"]["pairs"][0] < 32768 < rows["refill"]["pairs"][0]
    assert {"letterbox_1080p", "letterbox_odd"} < set(rows)
    for name in ("clusters", "low_conf", "refill"):
        same = {**rows[name], "case": f"{name}_nhwc", "us": rows[f"{name}_nhwc"]["us"]}
        assert rows[f"{name}_nhwc"] == same, "the memory layout changes no result"


@pytest.mark.parametrize(
    ("case", "right", "wrong"),
    [
        ("clusters", "shared > options.iou *", "shared > 0.3f * options.iou *"),
        ("letterbox_odd", "(sum + 2) >> 2", "(sum + 1) >> 2"),
    ],
)
def test_the_driver_reports_a_difference(tmp_path, case, right, wrong):
    text = DRIVER.read_text()
    assert text.count(right) == 1
    changed = tmp_path / "changed.cpp"
    changed.write_text(text.replace(right, wrong))
    code, rows = run_driver(build_driver(tmp_path, changed), "--seeds", "3", "--case", case)
    assert code == 1
    assert not rows[case]["equal"]
