"""How many threads compute, and how they wait."""

import os
import subprocess
import sys

import pytest
from ropewalk.processes import usable_cores
from ropewalk.runtime.threads import FreeCores, default_threads

PRINT_SPINCOUNT = "import os, ropewalk; ropewalk.Llama; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind a process to cores")
def test_no_more_than_the_cores_it_may_use():
    allowed = os.sched_getaffinity(0)
    assert 1 <= default_threads() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def put(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def machine(root, siblings):
    """A machine's topology: the logical CPUs of each of its cores."""
    for core in siblings:
        for cpu in core:
            put(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", ",".join(map(str, core)))
    return {cpu for core in siblings for cpu in core}


def test_two_threads_of_one_core_count_once(tmp_path):
    cpus = machine(tmp_path, [(0, 4), (1, 5), (2, 6), (3, 7)])
    assert default_threads(tmp_path, cpus) == 4
    assert default_threads(tmp_path, {0, 4}) == 1
    assert default_threads(tmp_path, {0, 1, 4}) == 2
    assert default_threads(tmp_path / "elsewhere", {0}) == 1  # where the system does not tell


def test_only_performance_cores_of_a_hybrid_processor(tmp_path):
    cpus = machine(tmp_path, [(0, 1), (2, 3), (4,), (5,), (6,), (7,)])
    put(tmp_path, "sys/devices/cpu_core/cpus", "0-3")
    put(tmp_path, "sys/devices/cpu_atom/cpus", "4-7")
    assert default_threads(tmp_path, cpus) == 2
    assert default_threads(tmp_path, {4, 5, 6}) == 3  # bound to the others


def test_capacities_of_cores(tmp_path):
    cpus = machine(tmp_path, [(cpu,) for cpu in range(8)])
    for cpu, capacity in enumerate((1024, 870, 870, 870, 250, 250, 250, 250)):
        put(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", capacity)
    assert default_threads(tmp_path, cpus) == 4
    assert default_threads(tmp_path, {4, 5, 6, 7}) == 4


EIGHT = [(cpu,) for cpu in range(8)]


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("140000 100000", 1), ("10000 100000", 1), ("", 8)],
)
@pytest.mark.parametrize("place", ["", "a.slice", "a.slice/b.scope"])
def test_a_quota_of_control_groups(tmp_path, quota, threads, place):
    cpus = machine(tmp_path, EIGHT)
    put(tmp_path, "proc/self/cgroup", "0::/a.slice/b.scope")
    put(tmp_path, f"sys/fs/cgroup/{place}/cpu.max", quota)
    assert default_threads(tmp_path, cpus) == threads


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("place", ["", "docker/0123"])
def test_a_quota_of_older_control_groups(tmp_path, mount, place):
    cpus = machine(tmp_path, EIGHT)
    put(tmp_path, "proc/self/cgroup", "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n0::/")
    put(tmp_path, f"sys/fs/cgroup/{mount}/{place}/cpu.cfs_quota_us", "300000")
    put(tmp_path, f"sys/fs/cgroup/{mount}/{place}/cpu.cfs_period_us", "100000")
    assert default_threads(tmp_path, cpus) == 3
    put(tmp_path, f"sys/fs/cgroup/{mount}/{place}/cpu.cfs_quota_us", "-1")
    assert default_threads(tmp_path, cpus) == 8


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "0::/../..", ":::::", "4:cpu:/gone\n1:name=systemd:/"])
def test_groups_that_are_not_understood_change_nothing(tmp_path, text):
    cpus = machine(tmp_path, EIGHT)
    put(tmp_path, "proc/self/cgroup", text)
    put(tmp_path, "sys/fs/cgroup/cpu.max", "nonsense")
    assert default_threads(tmp_path, cpus) == 8


def test_workers_heed_the_quota_too(tmp_path):
    put(tmp_path, "proc/self/cgroup", "0::/")
    assert usable_cores(tmp_path) == usable_cores()
    put(tmp_path, "sys/fs/cgroup/cpu.max", "100000 100000")
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_a_waiting_thread_sleeps_unless_the_user_wants_otherwise(settings, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_SPINCOUNT], env=environment | settings, capture_output=True, text=True
    )
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(("others", "threads"), [(0.0, 4), (0.2, 4), (0.5, 3), (1.0, 3), (2.6, 1), (4.0, 1)])
def test_a_core_that_others_use_gets_no_thread(monkeypatch, others, threads):
    monkeypatch.setattr("ropewalk.runtime.threads.usable_cores", lambda: 4)
    seconds = [(100.0, 7.0), (100.0 + others + 1.5, 8.5)]  # in one second: theirs, and 1.5 of our own
    cores = FreeCores(lambda: seconds.pop(0), now=50.0)
    assert cores.threads(16, now=50.1) == 4  # nothing is known yet
    assert cores.threads(16, now=51.0) == threads and cores.threads(2, now=51.1) == min(threads, 2)


def test_threads_that_are_free_again_are_used_again(monkeypatch):
    monkeypatch.setattr("ropewalk.runtime.threads.usable_cores", lambda: 2)
    seconds = [(0.0, 0.0), (2.0, 0.5), (4.0, 2.5)]
    cores = FreeCores(lambda: seconds.pop(0), now=0.0)
    assert [cores.threads(2, now) for now in (1.0, 2.0)] == [1, 2]
