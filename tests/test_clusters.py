"""The same study on clusters: Dask with a scheduler and workers that die, Ray, and addresses that are wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.conftest import ROOT
from tests.test_study import spawn, stored, wait_for_trials

pytestmark = pytest.mark.slow

OPTIONS = ("--engine.xla", "false", "--confirm.finalists", "0")


def run(path: Path, output: str, *options: str) -> bytes:
    """Run a study to its end; return its curves."""
    child = spawn(path, *OPTIONS, *options, "--fresh", "--output", str(path.parent / output))
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors.decode()
    return (path.parent / output / "curves.csv").read_bytes()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """A Dask scheduler with two workers; returns its address."""
    place, children = tmp_path / "scheduler.json", []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}

    def start(*arguments: str) -> None:
        log = open(tmp_path / "dask.log", "a")  # noqa: SIM115
        children.append(
            subprocess.Popen([sys.executable, "-m", *arguments], cwd=tmp_path, env=env, stdout=log, stderr=log)
        )

    common = ("--scheduler-file", str(place), "--no-dashboard")
    start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", *common)
    for _ in range(2):
        start("distributed.cli.dask_worker", "--nthreads", "1", "--host", "127.0.0.1", *common)
    until = time.monotonic() + 300
    while not place.exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    yield json.loads(place.read_text())["address"]
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def workers_of(scheduler: str) -> dict[int, str]:
    """Return the process ids of a scheduler's workers."""
    from distributed import Client

    with Client(scheduler) as client:
        return dict.fromkeys(client.run(os.getpid).values(), scheduler)


def test_dask_runs_the_same_study_and_outlives_a_worker(tiny, scheduler):
    """Two workers behind an address: the curves of one process to the last digit; kill -9 of one costs nothing."""
    options = ("--trials", "20", "--epochs", "20", "--workers.at_once", "4")
    alone = run(tiny, "alone", *options, "--workers.count", "1")
    cluster = ("--workers.backend", "dask", "--workers.address", scheduler)
    child = spawn(tiny, *OPTIONS, *options, *cluster, "--fresh", "--output", str(tiny.parent / "dask"))
    wait_for_trials(tiny, 3, child)
    os.kill(next(iter(workers_of(scheduler))), signal.SIGKILL)
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors.decode()
    assert "2 through dask" in errors.decode()
    assert (tiny.parent / "dask" / "curves.csv").read_bytes() == alone
    assert len(stored(tiny).trials) == 20


def test_an_interruption_calls_the_workers_of_a_cluster_back(tiny, scheduler):
    """Their trials go back into the queue, and the workers live on for the next study."""
    options = ("--trials", "400", "--epochs", "40", "--workers.backend", "dask", "--workers.address", scheduler)
    child = spawn(tiny, *OPTIONS, *options)
    wait_for_trials(tiny, 3, child)
    before = workers_of(scheduler)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 130, errors.decode()
    time.sleep(5)
    count = sum(t.state.is_finished() for t in stored(tiny).trials)
    time.sleep(2)
    trials = stored(tiny).trials
    assert sum(t.state.is_finished() for t in trials) == count
    assert not [t for t in trials if t.state == TrialState.RUNNING]
    assert workers_of(scheduler) == before


def test_ray_runs_the_same_study(tiny):
    """A cluster on this machine: the curves of one process to the last digit."""
    options = ("--trials", "12", "--workers.at_once", "4")
    alone = run(tiny, "alone", *options, "--workers.count", "1")
    assert run(tiny, "ray", *options, "--workers.backend", "ray", "--workers.count", "2") == alone
    assert len(stored(tiny).trials) == 12


@pytest.mark.parametrize(
    ("backend", "address"), [("dask", "tcp://127.0.0.1:9"), ("dask", "nonsense"), ("ray", "127.0.0.1:9")]
)
def test_an_address_without_a_cluster_is_one_message(tiny, lrtune, backend, address):
    """Before anything is trained, with what starts a cluster."""
    done = lrtune("tune", tiny, "--workers.backend", backend, "--workers.address", address)
    assert done.returncode == 1, done.stderr
    assert "workers.address" in done.stderr and address in done.stderr and "Start one with" in done.stderr
    assert "Traceback" not in done.stderr
