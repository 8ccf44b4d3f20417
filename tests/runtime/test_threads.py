"""How many threads compute, and how they wait."""

import os
import subprocess
import sys

import pytest
from ropewalk.runtime.threads import default_threads

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
