"""Engines on evaluators that wait for each other, fail, and kill the process they are in."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import psutil
import pytest
from ropewalk import UserError
from ropewalk.factors import RopeFacts, native_band
from ropewalk.factors.search import InProcess, Processes, Task
from ropewalk.factors.search.on_ray import Ray
from ropewalk.factors.search.pool import InWorker

BAND = native_band(RopeFacts(n_rot=8, freq_base=10000.0, original_context=64))

TRIAL = '''
    """An evaluator that does what it is told to with each passage; workers import it by name."""

    import os, signal, time
    from pathlib import Path
    from ropewalk import UserError
    from ropewalk.factors.search import Result


    class Odd(Exception):
        def __init__(self, first, second):
            super().__init__(first + second)


    class Trial:
        def __init__(self, folder, does):
            self.folder, self.does = Path(folder), does
            if -1 in does:
                self.do(does[-1], -1)

        @property
        def key(self):
            return "trial"

        @property
        def weights(self):
            return [1, 2.5]

        def evaluate(self, task):
            with (self.folder / "log").open("a") as file:
                file.write(f"{task.passage} {os.getpid()}\\n")
            if task.passage in self.does:
                self.do(self.does[task.passage], task.passage)
            return Result(task.passage + 0.25, 0.5, (0.1 + 0.2,), 1e-300)

        def do(self, what, passage):
            mark = self.folder / f"mark{passage}"
            first = not mark.exists()
            mark.touch()
            if what == "die" or what == "die once" and first:
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "exit":
                os._exit(7)
            if what == "user error":
                raise UserError(f"passage {passage}: is bad")
            if what == "odd error":
                raise Odd("very ", "odd")
            if what == "meet":  # returns only once as many tasks are under way at the same time
                give_up = time.monotonic() + 30
                while len(list(self.folder.glob("mark*"))) < 2:
                    assert time.monotonic() < give_up, "alone"
                    time.sleep(0.01)
            if what == "sleep":
                time.sleep(60)


    class Spec:
        key, weights = "spec", (1.0,)

        def __call__(self):
            raise AssertionError("not needed yet")
'''


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importable")
    (folder / "search_trial.py").write_text(textwrap.dedent(TRIAL))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        import search_trial

        yield search_trial


@pytest.fixture(scope="module")
def cluster(trial):
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def make_engine(request, trial, tmp_path):
    """``make_engine(does, n_workers)`` creates an engine; what evaluators do for passage -1, they do when created."""
    kind = getattr(request, "param", Processes)
    if kind is Ray:
        request.getfixturevalue("cluster")
    made = []

    def make(does=None, n_workers=2):
        made.append(kind(partial(trial.Trial, tmp_path, does or {}), n_workers))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


on_each_engine = pytest.mark.parametrize("make_engine", [Processes, Ray], indirect=True)


def tasks(n):
    return [Task(BAND, i) for i in range(n)]


def losses(engine, n):
    results = list(engine.run(tasks(n)))
    assert all(result.by_log_factors == (0.1 + 0.2,) and result.by_log_attention == 1e-300 for _, result in results)
    return {task.passage: result.loss for task, result in results}


def log(folder):
    return [tuple(map(int, line.split())) for line in (folder / "log").read_text().splitlines()]


def gone(pids, within=10.0):
    end = time.monotonic() + within
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def wait_for_lines(folder, n, job):
    while not (folder / "log").exists() or len(log(folder)) < n:
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    return [pid for _, pid in log(folder)]


def test_in_process(trial, tmp_path):
    class Closing(trial.Trial):
        closed = False

        def close(self):
            self.closed = True

    evaluator = Closing(tmp_path, {1: "user error"})
    with InProcess(evaluator) as engine:
        assert (engine.key, engine.weights) == ("trial", [1, 2.5])
        assert losses(engine, 1) == {0: 0.25}
        with pytest.raises(UserError, match="passage 1: is bad"):
            list(engine.run(tasks(2)))
    assert evaluator.closed
    InProcess(trial.Trial(tmp_path, {})).close()


@on_each_engine
def test_two_workers_give_every_result_once(make_engine, tmp_path):
    engine = make_engine({0: "meet", 1: "meet"})
    assert (engine.key, tuple(engine.weights)) == ("trial", (1.0, 2.5))
    assert losses(engine, 9) == {i: i + 0.25 for i in range(9)}
    assert len(log(tmp_path)) == 9
    pids = {pid for _, pid in log(tmp_path)}
    assert len(pids) == 2 and os.getpid() not in pids
    assert losses(engine, 2) == {0: 0.25, 1: 1.25}  # by the same workers and evaluators
    assert {pid for _, pid in log(tmp_path)} == pids
    assert list(engine.run([])) == []
    engine.close()
    assert gone(pids)


def test_results_do_not_depend_on_the_workers(make_engine):
    expected = {i: i + 0.25 for i in range(5)}
    assert losses(make_engine(n_workers=1), 5) == losses(make_engine(n_workers=3), 5) == expected


@on_each_engine
def test_a_lost_workers_task_is_evaluated_again(make_engine, tmp_path):
    assert losses(make_engine({2: "die once"}), 5) == {i: i + 0.25 for i in range(5)}
    assert sorted(passage for passage, _ in log(tmp_path)) == [0, 1, 2, 2, 3, 4]


@on_each_engine
def test_a_task_that_always_kills_its_worker_is_named(make_engine, tmp_path):
    engine = make_engine({1: "die"})
    with pytest.raises(UserError, match=r"passage 1 \(full, context 64\): 3 workers ended while reading it") as found:
        list(engine.run(tasks(3)))
    assert "\n" not in str(found.value)
    assert [passage for passage, _ in log(tmp_path)].count(1) == 3
    assert gone({pid for _, pid in log(tmp_path)})
    engine.close()


def test_workers_that_end_before_they_are_ready(make_engine, tmp_path):
    with pytest.raises(UserError, match="3 in a row ended before they had created their evaluator"):
        list(make_engine({-1: "exit"}, 1).run(tasks(1)))
    (tmp_path / "mark-1").unlink()
    assert losses(make_engine({-1: "die once"}), 2) == {0: 0.25, 1: 1.25}


@on_each_engine
def test_exceptions_arrive_unmodified(make_engine):
    with pytest.raises(UserError, match=r"^passage 1: is bad$") as found:
        list(make_engine({1: "user error"}).run(tasks(3)))
    assert type(found.value) is UserError
    assert isinstance(found.value.__cause__, InWorker) and "in evaluate" in str(found.value.__cause__)
    with pytest.raises(RuntimeError, match=r"^Odd: very odd$"):  # an exception that cannot be sent
        list(make_engine({0: "odd error"}).run(tasks(1)))
    with pytest.raises(UserError, match=r"^passage -1: is bad$"):  # while the evaluator is created
        assert make_engine({-1: "user error"}).key


def test_a_run_after_an_abandoned_one_starts_fresh(make_engine, tmp_path):
    engine = make_engine({1: "sleep"})
    left = engine.run(tasks(2))
    assert next(left)[0].passage == 0
    left.close()
    assert gone({pid for _, pid in log(tmp_path)})
    assert losses(engine, 1) == {0: 0.25}


def test_key_and_weights_that_the_factory_has_start_no_worker(trial):
    engine = Processes(trial.Spec(), 2)
    assert (engine.key, engine.weights) == ("spec", (1.0,))
    assert engine.workers == []
    with pytest.raises(AssertionError, match="not needed yet"):
        list(engine.run(tasks(1)))


def test_the_number_of_workers_is_checked(trial):
    with pytest.raises(UserError, match="workers: 0, expected at least 1"):
        Processes(trial.Spec(), 0)


SCRIPT = """
    import sys
    from functools import partial
    from search_trial import Trial
    from ropewalk.factors import RopeFacts, native_band
    from ropewalk.factors.search import Processes, Task
    from ropewalk.factors.search.on_ray import Ray

    if __name__ == "__main__":
        band = native_band(RopeFacts(n_rot=8, freq_base=10000.0, original_context=64))
        kind = {"Processes": Processes, "Ray": Ray}[sys.argv[1]]
        try:
            with kind(partial(Trial, sys.argv[2], {0: "sleep", 1: "sleep"}), 2, *sys.argv[3:]) as engine:
                for task, result in engine.run([Task(band, 0), Task(band, 1)]):
                    print(result)
        except KeyboardInterrupt:
            print("interrupted")
"""


def start_script(kind, tmp_path, *address):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(script), kind, str(tmp_path), *address]
    return subprocess.Popen(command, start_new_session=True, **pipes)


def test_nothing_is_left_when_the_parent_is_killed(trial, tmp_path):
    job = start_script("Processes", tmp_path)
    workers = wait_for_lines(tmp_path, 2, job)
    children = [child.pid for child in psutil.Process(job.pid).children(recursive=True)]
    assert set(workers) < set(children)
    job.kill()
    job.wait()
    assert gone(children)


def test_a_killed_parents_actors_leave_the_cluster(cluster, tmp_path):
    job = start_script("Ray", tmp_path, cluster)
    workers = wait_for_lines(tmp_path, 2, job)
    job.kill()
    job.wait()
    assert gone(workers)


def test_ctrl_c_ends_workers_quietly(trial, tmp_path):
    job = start_script("Processes", tmp_path)
    workers = wait_for_lines(tmp_path, 2, job)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = job.communicate(timeout=20)
    assert (out, err, job.returncode) == ("interrupted\n", "", 0)
    assert gone(workers)


def answering(answer):
    """A server for one connection; returns its address."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with server, server.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(answer)
            if not answer:
                connection.recv(1000)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_ray_addresses_that_do_not_answer(trial, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("ropewalk.factors.search.on_ray.TIMEOUT_S", 0.5)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the other tests' cluster may be up
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    addresses = {
        closed: "does not answer",
        f"ray://{closed}": "does not answer",
        answering(b""): "does not answer",
        answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"): "the server that answers there is not Ray",
        "somewhere:": "expected host:port",
    }
    started = time.monotonic()
    for address, message in addresses.items():
        with pytest.raises(UserError) as found:
            Ray(trial.Spec(), 1, address)
        assert str(found.value).startswith(f"ray address {address}: ") and message in str(found.value)
        assert "\n" not in str(found.value)
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(UserError, match=f"^ray address {closed}: does not answer"):
        Ray(trial.Spec(), 1)
    assert time.monotonic() - started < 10


def test_without_ray_the_error_says_how_to_install_it(trial, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^ray: not installed; pip install 'ropewalk\[ray\]'$"):
        Ray(trial.Spec(), 1)
