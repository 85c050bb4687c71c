"""Power meters: NVML with a fake library, RAPL and rails with trees of files, tegrastats with a program."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.fakes.faked_cuda import install_fake_nvml
from tests.hardware.test_power_inputs import LINES, program
from tests.support.boards import laid_out, wait_until
from yolov7_deploy.hardware.gpu import list_cuda_gpus, open_gpu
from yolov7_deploy.hardware.power import PowerIntegrator, SampledPowerMeter, open_power_meter, open_rapl_counter

GPUS = "0000:af:00.0 NVIDIA T4;0000:3b:00.0 Tesla V100-SXM2-16GB"
POWERCAP = "sys/class/powercap"
TOLERANCE = 0.25  # a thread on a busy machine may start and end a measurement of half a second late


@pytest.fixture
def nvml(monkeypatch):
    """Return a function that installs the fake NVML with given answers."""

    def install(answers="", *options, gpus=GPUS):
        monkeypatch.setenv("FAKE_GPUS", gpus)
        monkeypatch.setenv("FAKE_NVML", answers)
        install_fake_nvml(monkeypatch, *options)

    return install


def packages(root, *energies_uj, names=None):
    """Create a RAPL tree with one package for each energy."""
    for number, energy in enumerate(energies_uj):
        folder = root / POWERCAP / f"intel-rapl:{number}"
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{names[number] if names else f'package-{number}'}\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
    return root


def set_energy(root, value, number=0):
    (root / POWERCAP / f"intel-rapl:{number}/energy_uj").write_text(f"{value}\n")


def missing_library(name):
    raise OSError(f"{name}: cannot open shared object file")


def sampling_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("y7-")]


# --- integration of power ---------------------------------------------------------------------------------------------


def test_sampled_watts_are_weighted_by_the_time_between_them():
    integrator = PowerIntegrator(counts_joules=False)
    for time_s, watts in ((0.0, 10.0), (1.0, 20.0), (4.0, 20.0)):
        integrator.add(time_s, watts)
    assert integrator.mean_watts == pytest.approx((15 * 1 + 20 * 3) / 4)
    assert integrator.samples == 3


def test_a_counter_is_read_between_its_first_and_its_last_update():
    integrator = PowerIntegrator(counts_joules=True)
    readings = [(0.00, 100.0), (0.04, 100.0), (0.10, 130.0), (0.15, 130.0), (0.20, 150.0), (0.30, 170.0), (0.39, 170.0)]
    for time_s, joules in readings:
        integrator.add(time_s, joules)
    assert integrator.mean_watts == pytest.approx((170 - 130) / (0.30 - 0.10))
    assert integrator.samples == 3


def test_a_counter_that_restarts_loses_only_that_interval():
    integrator = PowerIntegrator(counts_joules=True)
    for time_s, joules in ((0.0, 990.0), (1.0, 1000.0), (2.0, 1010.0), (3.0, 2.0), (4.0, 12.0), (5.0, 22.0)):
        integrator.add(time_s, joules)
    assert integrator.mean_watts == pytest.approx(10.0)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_reading_that_is_not_finite_is_ignored(value):
    integrator = PowerIntegrator(counts_joules=False)
    for time_s, watts in ((0.0, 10.0), (1.0, value), (2.0, 10.0)):
        integrator.add(time_s, watts)
    assert (integrator.mean_watts, integrator.samples) == (10.0, 2)


@pytest.mark.parametrize("counts_joules", [False, True])
def test_too_few_readings_have_neither_mean_nor_samples(counts_joules):
    integrator = PowerIntegrator(counts_joules=counts_joules)
    assert math.isnan(integrator.mean_watts) and integrator.samples == 0
    integrator.add(0.0, 5.0)
    assert math.isnan(integrator.mean_watts) and integrator.samples == 0


# --- NVML -------------------------------------------------------------------------------------------------------------


def test_the_energy_counter_of_a_gpu_gives_its_mean_power(nvml):
    nvml("energy=7000000@250 power=!3")
    with open_power_meter("cuda:0") as meter:
        wait_until(lambda: meter.samples >= 40)  # the counter moves every 20 ms
    assert meter.source == "NVML (GPU board)"
    assert meter.mean_watts == pytest.approx(250, rel=TOLERANCE)


def test_a_gpu_without_a_counter_is_sampled(nvml):
    nvml("power=1,100000,140000")
    with open_power_meter("cuda") as meter:
        wait_until(lambda: meter.samples >= 3)
    assert 120 < meter.mean_watts < 140  # the first reading is the check that the sensor answers


def test_an_old_driver_without_a_counter_is_sampled(nvml):
    nvml("power=100000", "-DOLD_DRIVER")
    with open_power_meter("cuda:1") as meter:
        wait_until(lambda: meter.samples >= 2)
    assert meter.mean_watts == pytest.approx(100)


def test_a_gpu_is_found_by_its_pci_address_and_not_by_its_number(nvml, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_NVML_LOG", str(tmp_path / "log"))
    nvml("power=100000")
    gpu = open_gpu(1)
    assert (gpu.name, gpu.pci_bus_id) == ("Tesla V100-SXM2-16GB", "0000:3b:00.0")
    assert (tmp_path / "log").read_text() == "0000:3b:00.0\n"
    assert [found.name for found in list_cuda_gpus()] == ["NVIDIA T4", "Tesla V100-SXM2-16GB"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("", "NVML reports neither energy nor power"),
        ("energy=!3 power=!4", "NVML reports neither energy nor power"),
        ("init=!4", "Insufficient Permissions (error 4)"),
        ("handle=!15", "GPU is lost (error 15)"),
        ("handle=!999", "Unknown Error (error 999)"),
    ],
)
def test_the_reason_why_a_gpu_reports_no_power_names_the_gpu(nvml, answers, message):
    nvml(answers)
    reason = open_power_meter("cuda:0")
    assert message in reason and "NVIDIA T4" in reason and "nvidia-smi" in reason


def test_a_gpu_that_cuda_does_not_show_is_named_in_the_reason(nvml, monkeypatch):
    nvml("power=1")
    assert "no GPU cuda:2" in open_power_meter("cuda:2")
    monkeypatch.setattr("yolov7_deploy.hardware.gpu.CUDA_DRIVER", "libno-such-driver.so")
    assert "no GPU cuda:0" in open_power_meter("cuda:0")


def test_without_nvml_the_reason_names_its_library_and_how_to_get_it(nvml, monkeypatch):
    nvml("power=1")
    monkeypatch.setattr("pynvml.nvmlLib", None)
    monkeypatch.setattr("pynvml.CDLL", missing_library)
    reason = open_power_meter("cuda:0")
    assert "libnvidia-ml.so.1 was not found" in reason and "NVIDIA_DRIVER_CAPABILITIES" in reason


def test_a_library_that_is_not_nvml_does_not_crash(nvml, monkeypatch):
    nvml("power=1")
    monkeypatch.setattr("pynvml.nvmlLib", ctypes.CDLL("libc.so.6"))
    reason = open_power_meter("cuda:0")
    assert "error 13" in reason


def test_a_gpu_that_falls_off_the_bus_only_ends_the_readings(nvml):
    nvml("power=90000,90000,90000,!15")
    with open_power_meter("cuda:0") as meter:
        wait_until(lambda: meter.samples >= 2)
        time.sleep(0.1)
    assert meter.mean_watts == pytest.approx(90)
    assert meter.samples == 2  # one of the three was taken when the meter was opened


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", ""])
def test_a_device_of_another_kind_cannot_be_measured(device):
    assert "cannot be measured" in open_power_meter(device)


# --- the thread -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_block_even_after_an_error(nvml, error):
    nvml("power=100000")
    meter = open_power_meter("cuda:0")
    with pytest.raises(error), meter:
        assert sampling_threads()
        raise error
    assert sampling_threads() == []


def test_a_meter_measures_again_when_it_is_entered_again():
    watts = [10.0]
    meter = SampledPowerMeter("test", lambda: watts[0], counts_joules=False, period_s=0.01)
    for value in (10.0, 30.0):
        watts[0] = value
        with meter:
            wait_until(lambda: meter.samples >= 2)
        assert meter.mean_watts == pytest.approx(value)
    assert sampling_threads() == []


def test_a_sensor_that_hangs_does_not_block_the_program_for_long(monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.system.STOP_TIMEOUT_S", 0.1)
    free = threading.Event()
    calls = []

    def read():
        calls.append(1)
        if len(calls) > 1:
            free.wait(10)
        return 5.0

    started = time.perf_counter()
    with SampledPowerMeter("test", read, counts_joules=False, period_s=0.01):
        time.sleep(0.05)
    assert time.perf_counter() - started < 2
    free.set()


def test_a_reading_that_hung_is_not_part_of_the_next_measurement(monkeypatch):
    monkeypatch.setattr("yolov7_deploy.hardware.system.STOP_TIMEOUT_S", 0.1)
    free, ended = threading.Event(), threading.Event()
    first_thread: list[threading.Thread] = []

    def read():
        thread = threading.current_thread()
        if thread is threading.main_thread() or (first_thread and thread is not first_thread[0]):
            return 5.0
        first_thread.append(thread)
        free.wait(10)
        ended.set()
        return 1000.0

    meter = SampledPowerMeter("test", read, counts_joules=False, period_s=0.01)
    with meter:
        wait_until(lambda: first_thread)
    with meter:
        free.set()
        assert ended.wait(10)
        first_thread[0].join(10)
        wait_until(lambda: meter.samples >= 2)
    assert meter.mean_watts == 5.0


def test_an_unexpected_error_in_a_reading_is_raised_and_not_printed(capsys):
    answers = iter([1.0])
    meter = SampledPowerMeter("test", lambda: next(answers), counts_joules=False, period_s=0.01)
    with pytest.raises(StopIteration), meter:
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_a_meter_uses_little_cpu_time(nvml):
    nvml("energy=1@100")
    meter = open_power_meter("cuda:0")
    before = time.process_time()
    with meter:
        time.sleep(1.0)
    assert time.process_time() - before < 0.1


# --- RAPL -------------------------------------------------------------------------------------------------------------


def test_the_energy_of_all_packages_is_summed(tmp_path):
    found = open_rapl_counter(packages(tmp_path, 1_000_000, 5_000_000))
    assert found.energy_j() == 0
    set_energy(tmp_path, 3_000_000, number=0)
    set_energy(tmp_path, 5_500_000, number=1)
    assert found.energy_j() == pytest.approx(2.5)


def test_parts_of_a_package_and_its_parent_are_not_counted_again(tmp_path):
    root = packages(tmp_path, 1, 2, names=["package-0", "psys"])
    for name in ("intel-rapl:0:0", "intel-rapl-mmio:0", "dtpm"):
        (root / POWERCAP / name).mkdir()
        (root / POWERCAP / name / "name").write_text("package-0\n")
    assert [folder.name for folder in open_rapl_counter(root).folders] == ["intel-rapl:0"]


def test_a_counter_that_restarts_is_corrected(tmp_path):
    found = open_rapl_counter(packages(tmp_path, 262_143_000_000))
    set_energy(tmp_path, 671_150)
    assert found.energy_j() == pytest.approx(1.0)
    set_energy(tmp_path, 1_671_150)
    assert found.energy_j() == pytest.approx(2.0)


def test_a_cpu_is_measured_by_a_thread_that_reads_the_counter(tmp_path):
    root = packages(tmp_path, 0, 0)
    meter = open_power_meter("cpu", root=root)
    started = time.perf_counter()
    with meter:
        while (elapsed := time.perf_counter() - started) < 0.5:
            set_energy(root, int(elapsed * 60e6), number=0)
            set_energy(root, int(elapsed * 30e6), number=1)
            time.sleep(0.005)
    assert meter.source == "RAPL (2 CPU packages)"
    assert meter.mean_watts == pytest.approx(90, rel=TOLERANCE)


@pytest.mark.parametrize("content", ["garbage", "", "nan", "1e999", "9" * 5000])
def test_a_counter_that_becomes_garbage_is_ignored(tmp_path, content):
    found = open_rapl_counter(packages(tmp_path, 1_000_000))
    set_energy(tmp_path, content)
    assert found.energy_j() is None
    set_energy(tmp_path, 4_000_000)
    assert found.energy_j() == pytest.approx(3.0)
    assert "cat /sys/class/powercap" in open_rapl_counter(packages(tmp_path / "new", content))


def test_a_counter_that_vanishes_during_a_measurement_leaves_no_mean(tmp_path):
    root = packages(tmp_path, 1_000_000)
    with open_power_meter("cpu", root=root) as meter:
        (root / POWERCAP / "intel-rapl:0/energy_uj").unlink()
    assert math.isnan(meter.mean_watts) and meter.samples == 0


def test_a_machine_without_counters_has_a_reason_and_a_command(tmp_path):
    reason = open_power_meter("cpu", root=tmp_path)
    assert "no energy counter" in reason and "sudo modprobe intel_rapl_msr" in reason


def test_a_counter_for_root_only_has_a_reason_and_a_command():
    with tempfile.TemporaryDirectory() as name:
        root = packages(Path(name), 1, 2)
        Path(name).chmod(0o755)
        for path in root.glob(f"{POWERCAP}/*/energy_uj"):
            path.chmod(0o400)
        with unprivileged_user(root):
            reason = open_power_meter("cpu", root=root)
    counters = " ".join(f"/{POWERCAP}/intel-rapl:{number}/energy_uj" for number in (0, 1))
    assert reason == f"Only root may read the energy counter of this CPU: sudo chmod a+r {counters}"


@contextlib.contextmanager
def unprivileged_user(root):
    """Drop root privileges; without them, remove the permissions of the files."""
    if os.geteuid() != 0:
        for path in root.glob(f"{POWERCAP}/*/energy_uj"):
            path.chmod(0)
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- Jetson -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("board", "source", "watts"),
    [
        ("nano_4.6.1", "INA3221 POM_5V_IN (whole module)", 2.875),
        ("orin_nx_5.1.3", "INA3221 VDD_IN (whole module)", 9.250),
        ("agx_orin_6.0", "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 (whole module)", 14.215),
        ("thor_7.2", "INA238 VIN (module and carrier board)", 36.834),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_board_is_measured_at_its_input_for_every_device(board, source, watts, device, tmp_path):
    with open_power_meter(device, root=laid_out(board, tmp_path)) as meter:
        wait_until(lambda: meter.samples >= 2)
    assert meter.source == source
    assert meter.mean_watts == pytest.approx(watts, abs=0.001)


def test_a_rail_that_vanishes_during_a_measurement_does_not_lower_the_mean(tmp_path):
    root = laid_out("agx_orin_6.0", tmp_path)
    with open_power_meter("cuda", root=root) as meter:
        wait_until(lambda: meter.samples >= 2)
        (root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in1_input").unlink()
        time.sleep(0.15)
    assert meter.mean_watts == pytest.approx(14.215, abs=0.001)


def test_a_container_that_hides_the_monitors_is_measured_through_tegrastats(tmp_path):
    root = laid_out("agx_orin_6.0", tmp_path / "root")
    for chip in root.glob("sys/bus/i2c/drivers/*"):
        chip.rename(root / "hidden")
    meter = open_power_meter("cuda:0", root=root, tegrastats=program(tmp_path, LINES["agx_orin, R36"]))
    assert meter.source == "tegrastats VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 (whole module)"
    with pytest.raises(KeyboardInterrupt), meter:
        wait_until(lambda: meter.samples > 3)
        raise KeyboardInterrupt
    assert meter.mean_watts == pytest.approx(22.430)
    assert sampling_threads() == []


def test_tegrastats_that_was_removed_leaves_no_mean(tmp_path):
    root = laid_out("orin_nx_5.1.3", tmp_path / "root")
    (root / "sys/bus").rename(root / "hidden")
    path = program(tmp_path, LINES["orin_nano, R36"])
    meter = open_power_meter("cuda:0", root=root, tegrastats=path)
    Path(path).unlink()
    with meter:
        pass
    assert math.isnan(meter.mean_watts) and meter.samples == 0


def test_a_board_without_a_monitor_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    root = laid_out("nano_4.6.1", tmp_path / "root")
    (root / "sys/bus").rename(root / "hidden")
    assert "shows no power monitor" in open_power_meter("cuda:0", root=root)
    odd = program(tmp_path, "RAM 1/2MB VDD_NEW 5mW/5mW VDD_ODD 5mW/5mW")
    assert "VDD_NEW, VDD_ODD" in open_power_meter("cuda:0", root=root, tegrastats=odd)
