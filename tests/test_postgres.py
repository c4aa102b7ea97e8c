"""A study on a database server: several machines, some that die or freeze, and a server that crashes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from pipeline.storage import locks_of, open_storage
from tests.conftest import ROOT
from tests.postgres import Server, programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(programs() is None, reason="needs the programs of a PostgreSQL server"),
]

SHORT = ("--confirm.finalists", "0", "--engine.xla", "false", "--workers.count", "1")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that all tests of this file share."""
    one = Server()
    try:
        yield one
    finally:
        one.end()


class Machine:
    """A working folder, a temporary folder and an environment of its own, as another machine has them."""

    def __init__(self, server: Server, folder: Path, name: str) -> None:
        self.folder = folder / name
        for part in ("tmp", "home", "work"):
            (self.folder / part).mkdir(parents=True)
        self.server, self.work = server, self.folder / "work"
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder / "home"),
            "PGPASSWORD": server.password,
            "COLUMNS": "200",
        }

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Run a command in the background."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *map(str, arguments)],
            cwd=self.work,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, timeout: float = 600) -> tuple[int, str, str]:
        """Run a command to its end; return its exit code and what it wrote."""
        child = self.start(*arguments)
        out, err = child.communicate(timeout=timeout)
        return child.returncode, out, err


@pytest.fixture
def study(tiny: Path, server: Server, monkeypatch) -> Iterator[Path]:
    """A tiny study of a name of its own; the server holds no other."""
    monkeypatch.setenv("PGPASSWORD", server.password)
    yield tiny
    storage = open_storage(server.url, create=True)
    for name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)


def stored(server: Server, name: str = "tiny_study") -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a study."""
    return optuna.load_study(study_name=name, storage=open_storage(server.url, create=False)).trials


def wait_for(condition, seconds: float = 120) -> None:
    """Wait until a condition holds; an error counts as not yet."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if condition():
                return
        except Exception:  # the study may not be there yet
            pass
        time.sleep(0.05)
    raise AssertionError("it took too long")


def check_whole(trials: list[optuna.trial.FrozenTrial], count: int) -> None:
    """Every trial ran once, under its own number, with parameters of its own."""
    assert [t.number for t in trials] == list(range(count))
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert len({tuple(sorted(t.params.items())) for t in trials}) == count


def test_a_study_on_a_server_is_the_study_of_a_file_and_keeps_the_password(study, server, tmp_path):
    """The same curves to the last digit; the password comes from .pgpass and is nowhere to be read."""
    machine = Machine(server, tmp_path, "one")
    machine.env.pop("PGPASSWORD")
    place = machine.folder / "home" / ".pgpass"
    place.write_text(f"127.0.0.1:{server.port}:*:lrtune:{server.password}\n")
    place.chmod(0o600)
    results = []
    for out, extra in (("file", ()), ("server", ("--storage", server.url))):
        code, said, err = machine.run("tune", study, "--output", tmp_path / out, *SHORT, *extra)
        assert code == 0, err
        results.append((tmp_path / out / "curves.csv").read_bytes())
        assert server.password not in said + err
    assert results[0] == results[1]
    check_whole(stored(server), 8)
    with_password = server.url.replace("lrtune@", f"lrtune:{server.password}@")
    code, said, err = machine.run("status", study, "--storage", with_password)
    assert code == 0 and "8 of 8 trials" in said
    code, more, err = machine.run("tune", study, "--output", tmp_path / "server", *SHORT, "--storage", with_password)
    assert code == 0, err
    dump = subprocess.run(
        [server.programs / "pg_dump", "-h", "127.0.0.1", "-p", str(server.port), "-U", "lrtune", "lrtune"],
        env={**os.environ, "PGPASSWORD": server.password},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "tiny_study" in dump
    assert server.password not in dump + said + more + err
    files = [path for path in (tmp_path / "server").rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not any(server.password.encode() in path.read_bytes() for path in files)
    shutil.rmtree(tmp_path / "server")


def test_a_worker_elsewhere_needs_the_name_the_storage_and_the_objective(study, server, tmp_path):
    """It reads the definition from the storage, trains trials of the study, and the total is kept."""
    here, there = Machine(server, tmp_path, "here"), Machine(server, tmp_path, "there")
    shutil.copy(study.parent / "tiny.py", there.work)
    tuning = here.start("tune", study, *SHORT, "--storage", server.url, "--trials", 60, "--epochs", 150)
    wait_for(lambda: sum(t.state.is_finished() for t in stored(server)) >= 1)
    code, _, err = there.run("worker", "tiny_study", "--storage", server.url)
    assert code == 0, err
    _, err = tuning.communicate(timeout=600)
    assert tuning.returncode == 0, err
    trials = stored(server)
    check_whole(trials, 60)
    owners = {str(t.user_attrs["owner"]).split("/")[0] for t in trials}
    assert len(owners) == 2, owners
    code, _, err = there.run("worker", "tiny_studi", "--storage", server.url)
    assert code == 1 and "did you mean 'tiny_study'" in err
    (there.work / "tiny_study").mkdir(exist_ok=True)  # a folder of that name is no study file
    code, _, err = there.run("worker", "tiny_study")
    assert code == 1 and "--storage" in err


def test_a_machine_that_dies_and_one_that_freezes_lose_nothing(study, server, tmp_path):
    """Their trials run again elsewhere, after three heartbeats; the frozen one wakes and changes nothing."""
    machines = [Machine(server, tmp_path, name) for name in ("one", "two", "three")]
    for machine in machines:
        shutil.copy(study.parent / "tiny.py", machine.work)
    options = (*SHORT, "--storage", server.url, "--storage.heartbeat", 1, "--trials", 30, "--epochs", 60)
    tuning = machines[0].start("tune", study, *options)
    wait_for(lambda: stored(server))
    others = [m.start("worker", "tiny_study", "--storage", server.url) for m in machines[1:]]

    def running_on(machine: Machine) -> list[int]:
        token = next((machine.folder / "tmp").glob("lrtune-*-machine")).read_text()
        owners = {t.number: str(t.user_attrs.get("owner")) for t in stored(server) if t.state == TrialState.RUNNING}
        return [number for number, owner in owners.items() if token in owner]

    wait_for(lambda: running_on(machines[1]) and running_on(machines[2]))
    others[0].kill()
    others[1].send_signal(signal.SIGSTOP)
    frozen = running_on(machines[2])
    wait_for(lambda: not running_on(machines[1]) and (not frozen or not set(frozen) & set(running_on(machines[2]))))
    others[1].send_signal(signal.SIGCONT)
    assert others[1].wait(200) == 0, others[1].stderr.read()
    _, err = tuning.communicate(timeout=600)
    assert tuning.returncode == 0, err
    trials = stored(server)
    check_whole(trials, 30)
    assert 1 <= sum(bool(t.user_attrs.get("retries")) for t in trials) <= 2
    for child in others:
        child.communicate()


def test_a_server_that_crashes_and_comes_back_costs_nothing(study, server, tmp_path):
    """kill -9 of the server in the midst: the study waits, says so, and goes on where it was."""
    machine = Machine(server, tmp_path, "one")
    options = (*SHORT, "--storage", server.url, "--trials", 20, "--epochs", 40)
    tuning = machine.start("tune", study, *options)
    wait_for(lambda: sum(t.state.is_finished() for t in stored(server)) >= 3)
    before = {t.number: (t.state, t.value, t.params) for t in stored(server) if t.state.is_finished()}
    server.kill()
    time.sleep(3)
    server.start()
    _, err = tuning.communicate(timeout=600)
    assert tuning.returncode == 0, err
    assert "waiting up to" in err
    trials = stored(server)
    check_whole(trials, 20)
    for number, known in before.items():
        assert (trials[number].state, trials[number].value, trials[number].params) == known


def test_a_worker_that_dies_while_it_takes_a_trial_leaves_it_to_others(server, tmp_path, monkeypatch):
    """At every step of taking one, on a machine that never comes back: others run it, after its heartbeat at most."""
    from pipeline.locks import ServerLocks
    from pipeline.search.queue import SeenStudy, TrialQueue
    from tests.test_workers import SPACE

    monkeypatch.setenv("PGPASSWORD", server.password)

    class Died(BaseException):
        pass

    def queue_on(machine: str, name: str) -> TrialQueue:
        storage = open_storage(server.url, create=True, heartbeat=1.0)
        optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / machine))
        locks = locks_of(server.url, tmp_path, name, lambda call: call())
        assert isinstance(locks, ServerLocks)
        return TrialQueue(SeenStudy(name, storage), SPACE, locks, distance=4, sampler="tpe", seed=0, heartbeat=1.0)

    for step in ("create", "start", "set_user_attr", "suggest_float"):
        for waiting in (False, True):
            name = f"{step}-{waiting}"
            one = queue_on("one", name)
            if waiting:
                one.study.enqueue_trial({"optimizer": "sgd"})
            target = {
                "create": "pipeline.search.draft.Draft.create",
                "start": "pipeline.locks.Heart.start",
                "set_user_attr": "optuna.trial.Trial.set_user_attr",
                "suggest_float": "optuna.trial.Trial.suggest_float",
            }[step]

            def die(*_: object, **__: object) -> None:
                raise Died

            with monkeypatch.context() as patched:
                patched.setattr(target, die)
                with contextlib.suppress(Died):
                    one.take(5)
            one._heart._trials.clear()
            other = queue_on("two", name)
            until = time.monotonic() + 300
            while not other.take_back_orphans() and other.study.get_trials(states=(TrialState.RUNNING,)):
                assert time.monotonic() < until, name
                time.sleep(0.1)
            taken = other.take(5)
            assert taken is not None and taken.trial.number == 0, name
            assert len(taken.trial.params) >= 3
            other.release(taken)
            optuna.delete_study(study_name=name, storage=other.study._storage)


def test_a_server_that_is_not_there_is_one_message(study, server, tmp_path):
    """At the start nothing is waited for; a wrong password is not shown."""
    machine = Machine(server, tmp_path, "one")
    nowhere = server.url.replace(f":{server.port}/", ":1/")
    code, out, err = machine.run("tune", study, *SHORT, "--storage", nowhere)
    assert code == 1 and "storage.url" in err and "Traceback" not in err
    machine.env["PGPASSWORD"] = "wrong-word"  # pragma: allowlist secret
    code, out, err = machine.run("status", study, "--storage", server.url)
    assert code == 1 and "password" in err and "wrong-word" not in out + err
