"""The cores that a process may use, with and without the limits of a container."""

import os

import pytest

from yolov7_deploy.hardware import system
from yolov7_deploy.hardware.system import has_vnni, limit_cores, usable_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not show CPU affinity")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that writes the files of a machine with given hardware threads, and counts its cores."""

    def count(threads, files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(threads))
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return usable_cores(tmp_path)

    return count


def siblings(**groups):
    return {
        f"sys/devices/system/cpu/cpu{name[1:]}/topology/thread_siblings_list": text for name, text in groups.items()
    }


def test_without_any_files_every_thread_is_a_core(machine):
    assert machine(range(6), {}) == 6


def test_two_threads_of_one_core_count_once(machine):
    assert machine([0, 1, 4, 5], siblings(t0="0,4\n", t1="1,5\n", t4="0,4\n", t5="1,5\n")) == 2


def test_only_threads_available_to_the_process_count(machine):
    assert machine([1, 4], siblings(t0="0,4\n", t1="1,5\n", t4="0,4\n", t5="1,5\n")) == 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000\n", 8), ("300000 100000\n", 3), ("150000 100000\n", 2), ("10000 100000\n", 1)]
)
def test_a_container_with_cgroup_v2_has_its_quota(machine, quota, cores):
    assert machine(range(8), {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota}) == cores


def test_the_smallest_quota_of_all_parent_groups_counts(machine):
    files = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/cpu.max": "500000 100000\n",
    }
    assert machine(range(8), files) == 2


@pytest.mark.parametrize(("quota", "cores"), [("-1\n", 8), ("400000\n", 4)])
def test_a_container_with_cgroup_v1_has_its_quota(machine, quota, cores):
    # The path is that of the host, which does not exist inside the container.
    files = {
        "proc/self/cgroup": "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert machine(range(8), files) == cores


@pytest.mark.parametrize(("limit", "cores"), [(1, 1), (0.5, 1), (1.5, 2), (100, 6)])
def test_a_process_that_shares_a_machine_uses_a_share_of_the_cores(machine, monkeypatch, limit, cores):
    monkeypatch.setattr(system, "_core_limit", None)
    limit_cores(limit)
    assert machine(range(6), {}) == cores


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "4:cpu:/../..\n"])
def test_limits_that_cannot_be_read_are_ignored(machine, text):
    files = {"proc/self/cgroup": text, "sys/fs/cgroup/cpu.max": "200000 0\n"}
    assert machine(range(8), files) == 8


def test_without_cpu_affinity_the_number_of_cores_is_none(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() is None


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [("flags\t\t: fpu avx512_vnni\n", True), ("flags : fpu avx_vnni", True), ("flags : fpu avx2", False), ("", None)],
)
def test_vnni_is_known_only_where_the_system_lists_the_flags(tmp_path, cpuinfo, expected):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert has_vnni(tmp_path) is expected
