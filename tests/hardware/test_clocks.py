"""Clocks, throttling and memory: NVML with a fake library, CPUs and boards with trees of files."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading

import pytest

from tests.fakes.faked_cuda import install_fake_nvml
from tests.hardware.test_power_inputs import LINES, program
from tests.support.boards import laid_out, recorded, silent, wait_until, write
from yolov7_deploy.hardware.clocks import Clocks, open_clock_monitor, read_jetson_gpu_clock
from yolov7_deploy.hardware.machine import gpu_memory_used, host_peak_bytes

GPU = "0000:3b:00.0 Tesla V100-SXM2-16GB"
USUAL = "clock.1=1380 clock.2=877 highest.1=1530 temperature.0=61 limit=300000"


@pytest.fixture
def nvml(monkeypatch):
    """Return a function that installs the fake NVML with given answers."""

    def install(answers="", *options):
        monkeypatch.setenv("FAKE_GPUS", GPU)
        monkeypatch.setenv("FAKE_NVML", answers)
        install_fake_nvml(monkeypatch, *options)

    return install


def measured(monitor, readings=1):
    """Return the clocks over at least this many readings."""
    with monitor:
        wait_until(lambda: len(monitor._readings) >= readings)
    return monitor.clocks


def cpu(root, *mhz, max_mhz=3500, governor="performance"):
    """Create the files of a machine with frequency scaling and these core clocks."""
    for core, value in enumerate(mhz):
        folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{value * 1000}\n")
        (folder / "cpuinfo_max_freq").write_text(f"{max_mhz * 1000}\n")
        (folder / "scaling_governor").write_text(f"{governor}\n")
    return root


# --- GPU --------------------------------------------------------------------------------------------------------------


def test_the_clocks_of_a_gpu_are_those_of_nvml(nvml):
    nvml(f"{USUAL} reasons=0")
    assert measured(open_clock_monitor("cuda:0")) == Clocks(
        source="NVML", mhz=1380, mhz_max=1530, memory_mhz=877, temperature_c=61, power_limit_w=300
    )


def test_several_readings_give_the_median_clock_and_the_highest_temperature(nvml, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.clocks.PERIOD_S", 0.05)
    text = "clock.1=1200,1400,1380 temperature.0=50,64,52"
    nvml(text)
    clocks = measured(open_clock_monitor("cuda"), readings=4)
    assert (clocks.mhz, clocks.temperature_c) == (1380, 64)


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        (0x0, ()),
        (0x1, ()),  # idle
        (0x2, ()),  # application clocks
        (0x4, ("software power cap",)),
        (0x8, ("hardware slowdown",)),
        (0x20, ("software thermal slowdown",)),
        (0x48, ("hardware slowdown", "hardware thermal slowdown")),
        (0x80, ("hardware power brake",)),
        (0x8000000000000000, ()),  # from a future driver
    ],
)
@pytest.mark.parametrize("options", [(), ("-DOLD_DRIVER",)])
def test_the_throttle_reasons_of_a_gpu_have_names(nvml, mask, reasons, options):
    nvml(f"{USUAL} reasons={mask}", *options)
    assert measured(open_clock_monitor("cuda:0")).throttled == reasons


def test_throttling_at_any_reading_is_reported(nvml, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.clocks.PERIOD_S", 0.02)
    nvml(f"{USUAL} reasons=0,4,32,4,0")
    clocks = measured(open_clock_monitor("cuda:0"), readings=5)
    assert clocks.throttled == ("software power cap", "software thermal slowdown")


def test_missing_sensors_of_a_gpu_are_none(nvml):
    nvml("clock.1=900 limit=!4")
    assert measured(open_clock_monitor("cuda:0")) == Clocks(source="NVML", mhz=900)


def test_a_gpu_that_is_lost_keeps_its_earlier_readings(nvml, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.clocks.PERIOD_S", 0.02)
    nvml("clock.1=900,900,!15 temperature.0=50,!15")
    clocks = measured(open_clock_monitor("cuda:0"), readings=4)
    assert (clocks.mhz, clocks.temperature_c) == (900, 50)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:x", "tpu"])
def test_a_missing_device_does_not_have_clocks(nvml, device):
    nvml(USUAL)
    assert open_clock_monitor(device) is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_block_even_after_an_error(nvml, error):
    nvml(USUAL)
    monitor = open_clock_monitor("cuda:0")
    with pytest.raises(error), monitor:
        raise error
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("y7-")]
    assert monitor.clocks.mhz == 1380


def test_a_monitor_that_was_never_entered_has_only_the_limits(nvml):
    nvml(USUAL)
    assert open_clock_monitor("cuda:0").clocks == Clocks(source="NVML", mhz_max=1530, power_limit_w=300)


# --- CPU --------------------------------------------------------------------------------------------------------------


def test_the_clock_of_a_cpu_is_that_of_its_fastest_core(tmp_path):
    root = cpu(tmp_path, 800, 3400, 1200)
    assert measured(open_clock_monitor("cpu", root=root, run=silent)) == Clocks(
        source="sysfs", mhz=3400, mhz_max=3500, mode="performance"
    )


def test_only_some_of_many_cores_are_read(tmp_path):
    root = cpu(tmp_path, *range(100, 200))
    for folder in root.glob("sys/devices/system/cpu/*/cpufreq"):
        if int(folder.parent.name[3:]) % 7:
            (folder / "scaling_cur_freq").write_text("garbage")
    assert measured(open_clock_monitor("cpu", root=root, run=silent)).mhz == 198


def test_a_hot_cpu_reports_its_temperature_and_its_throttling(tmp_path):
    root = cpu(tmp_path, 2000, 2000)
    count = "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"
    write(root, **{count: "7", "sys/class/hwmon/hwmon2/name": "coretemp"})
    write(root, **{"sys/class/hwmon/hwmon2/temp1_input": "93000", "sys/class/hwmon/hwmon1/name": "nvme"})
    write(root, **{"sys/class/hwmon/hwmon1/temp1_input": "120000"})
    monitor = open_clock_monitor("cpu", root=root, run=silent)
    assert measured(monitor).throttled == ()
    with monitor:
        (root / count).write_text("9")
    assert monitor.clocks.throttled == ("CPU too hot",)
    assert monitor.clocks.temperature_c == 93


def test_a_virtual_machine_without_scaling_reports_the_clock_of_proc_cpuinfo(tmp_path):
    write(tmp_path, **{"proc/cpuinfo": "processor\t: 0\ncpu MHz\t\t: 2445.428\n\nprocessor\t: 1\ncpu MHz\t\t: 0.000\n"})
    assert measured(open_clock_monitor("cpu", root=tmp_path, run=silent)) == Clocks(
        source="/proc/cpuinfo", mhz=2445.428
    )


def test_a_machine_without_readable_clocks_does_not_have_a_monitor(tmp_path):
    assert open_clock_monitor("cpu", root=tmp_path, run=silent) is None
    write(tmp_path, **{"proc/cpuinfo": "cpu MHz : unknown\n"})
    assert open_clock_monitor("cpu", root=tmp_path, run=silent) is None


def test_files_that_vanish_or_become_garbage_keep_the_earlier_readings(tmp_path):
    root = cpu(tmp_path, 3000)
    current = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    monitor = open_clock_monitor("cpu", root=root, run=silent)
    with monitor:
        current.unlink()
    assert monitor.clocks.mhz == 3000
    current.write_text("nan\n")
    assert measured(monitor).mhz is None


def test_the_clocks_of_this_machine_are_plausible():
    monitor = open_clock_monitor("cpu")
    assert monitor is None or measured(monitor).mhz is None or 100 < monitor.clocks.mhz < 10_000


# --- Jetson -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("board", "mhz", "max_mhz", "mode", "temperature_c"),
    [
        ("nano_4.6.1", 921.6, 921.6, "", 41.0),
        ("agx_xavier_4.6.1", 1377.0, 1377.0, "clocks fixed by jetson_clocks", None),
        ("orin_nx_5.1.3", 612.0, 918.0, "MAXN", 51.25),
        ("agx_orin_6.0", 1300.5, 1300.5, "MODE_30W, clocks fixed by jetson_clocks", None),
        ("thor_7.2", 1575.0, 1575.0, "120W", None),
    ],
)
def test_a_board_reports_the_clock_of_its_gpu_and_its_mode(board, mhz, max_mhz, mode, temperature_c, tmp_path):
    monitor = open_clock_monitor("cuda:0", root=laid_out(board, tmp_path), run=recorded(board))
    assert measured(monitor) == Clocks(source="sysfs", mhz=mhz, mhz_max=max_mhz, mode=mode, temperature_c=temperature_c)


def test_a_board_that_throttles_reports_the_reasons(tmp_path):
    root = laid_out("orin_nx_5.1.3", tmp_path)
    monitor = open_clock_monitor("cuda:0", root=root, run=silent)
    with monitor:
        (root / "sys/class/thermal/cooling_device7/cur_state").write_text("1\n")
        (root / "sys/class/hwmon/hwmon4/oc3_event_cnt").write_text("40\n")
    assert monitor.clocks.throttled == ("gpu too hot", "over-current")


@pytest.mark.parametrize("content", ["-256000", "", "nan", None])
def test_the_temperature_of_a_gpu_that_is_switched_off_is_none(tmp_path, content):
    root = laid_out("orin_nx_5.1.3", tmp_path)
    sensor = root / "sys/class/thermal/thermal_zone1/temp"
    sensor.unlink() if content is None else sensor.write_text(content)
    assert measured(open_clock_monitor("cuda:0", root=root, run=silent)).temperature_c is None


def test_a_board_whose_clock_is_hidden_is_read_through_tegrastats(tmp_path):
    root = laid_out("orin_nx_5.1.3", tmp_path / "root")
    (root / "sys/class/devfreq").rename(root / "hidden")
    path = program(tmp_path, LINES["orin_nano_busy, R36"])
    clocks = measured(
        open_clock_monitor("cuda:0", root=root, run=recorded("orin_nx_5.1.3"), tegrastats=path), readings=2
    )
    assert clocks == Clocks(source="tegrastats", mhz=612, memory_mhz=2133, temperature_c=58.625, mode="MAXN")


def test_a_board_that_shows_nothing_does_not_have_a_monitor(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    root = laid_out("orin_nx_5.1.3", tmp_path)
    (root / "sys/class/devfreq").rename(root / "hidden")
    assert open_clock_monitor("cuda:0", root=root, run=silent) is None


def test_the_cpu_of_a_board_has_its_governor_and_the_power_mode(tmp_path):
    root = cpu(laid_out("orin_nx_5.1.3", tmp_path), 1984, governor="schedutil")
    assert measured(open_clock_monitor("cpu", root=root, run=recorded("orin_nx_5.1.3"))).mode == "schedutil, MAXN"


def test_a_clock_with_equal_limits_is_fixed(tmp_path):
    assert read_jetson_gpu_clock(laid_out("agx_orin_6.0", tmp_path / "a")).fixed
    assert not read_jetson_gpu_clock(laid_out("orin_nx_5.1.3", tmp_path / "b")).fixed
    assert read_jetson_gpu_clock(tmp_path / "c") is None


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_gpu_is_that_of_nvml(nvml):
    nvml("used=1073741824")
    assert gpu_memory_used("cuda:0") == 2**30
    assert gpu_memory_used("cuda:5") is None
    assert gpu_memory_used("cpu") is None
    nvml("used=!3")
    assert gpu_memory_used("cuda:0") is None


def test_the_gpu_memory_of_a_board_is_the_memory_that_the_board_uses(tmp_path):
    root = laid_out("orin_nx_5.1.3", tmp_path)
    assert gpu_memory_used("cuda:0", root=root) == (15910784 - 13112004) * 1024
    (root / "proc/meminfo").write_text("MemTotal: lots\n")
    assert gpu_memory_used("cuda:0", root=root) is None


PEAK_STEPS = """
from yolov7_deploy.hardware.machine import host_peak_bytes
before = host_peak_bytes()
held = bytearray(b"1") * 400_000_000
del held
print(host_peak_bytes() - before)
"""


def test_the_peak_of_a_process_follows_its_memory():
    """In a separate process: garbage of other tests must not count, and the kernel counts pages in batches."""
    done = subprocess.run([sys.executable, "-c", PEAK_STEPS], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) > 200_000_000


def test_without_proc_the_peak_is_that_since_the_start(tmp_path):
    since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert host_peak_bytes(tmp_path) >= since_start
