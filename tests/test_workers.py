"""Several workers: the same trials as one, nothing lost when one dies, the count chosen by measurement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from pipeline.locks import FileLocks
from pipeline.search import workers
from pipeline.search.queue import DISTANCE, SeenStudy, TrialQueue
from pipeline.search.space import Space
from pipeline.search.study import at_once, seconds_worked
from pipeline.storage import open_storage
from pipeline.study_file import cores, read_study
from tests.conftest import PAUSING_OBJECTIVE, ROOT, pause
from tests.test_study import spawn, stored, tune, wait_for_trials

SPACE = Space(
    optimizers=("sgd", "adam"),
    decays=("constant", "cosine"),
    bounds={"sgd": (1e-3, 1.0), "adam": (1e-4, 1e-1)},
    final_fraction=(0.01, 1.0),
    final_fractions=(),
    learning_rates=(),
)


def queue_on(path: Path, distance: int = DISTANCE) -> TrialQueue:
    """A queue on an empty study in a folder."""
    storage = open_storage(f"sqlite:///{path}/q.db", create=True)
    optuna.create_study(study_name="q", storage=storage, load_if_exists=True)
    return TrialQueue(
        SeenStudy("q", storage),
        SPACE,
        FileLocks(path, "q"),
        distance=distance,
        sampler="tpe",
        seed=0,
    )


def draw(path: Path, width: int, trials: int) -> list[dict[str, object]]:
    """Run so many trials with so many in flight, ending them out of order; return their parameters."""
    queue = queue_on(path)
    running = []
    while True:
        taken = queue.take(trials) if len(running) < width else None
        if taken is not None:
            running.append(taken)
            continue
        if not running:
            break
        done = running.pop()  # the newest first: as far out of order as can be
        params = done.trial.params
        queue.study.tell(done.trial, params["lr_position"] + 0.1 * (params["optimizer"] == "sgd"))
        queue.release(done)
    return [t.params for t in queue.study.trials]


def test_trials_are_the_same_however_many_run_at_once(tmp_path):
    """TPE draws 30 trials one by one, and up to four at once in another order of ending."""
    drawn = []
    for width in (1, 2, DISTANCE):
        folder = tmp_path / str(width)
        folder.mkdir()
        drawn.append(draw(folder, width, 30))
    assert len(drawn[0]) == 30
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_trial_waits_for_those_it_must_see(tmp_path):
    """With four running, a fifth waits for the first; not for the others."""
    queue = queue_on(tmp_path)
    running = [queue.take(10) for _ in range(DISTANCE)]
    assert all(running)
    assert queue.take(10) is None
    queue.study.tell(running[1].trial, 1.0)
    queue.release(running[1])
    assert queue.take(10) is None
    queue.study.tell(running[0].trial, 1.0)
    queue.release(running[0])
    assert queue.take(10).trial.number == DISTANCE
    assert list(tmp_path.glob(".q-trial-0*")) == []


def test_a_live_trial_is_left_alone_and_a_dead_ones_goes_back(tmp_path):
    """Whoever looks: the lock file tells them apart."""
    queue = queue_on(tmp_path)
    taken = queue.take(5)
    assert queue_on(tmp_path).take_back_orphans() == []
    taken.mark.__exit__()  # as the operating system does when the process dies
    assert queue_on(tmp_path).take_back_orphans() == [0]
    trial = queue.study.trials[0]
    assert trial.state == TrialState.WAITING
    assert trial.user_attrs["retries"] == 1
    again = queue.take(5)
    assert again.trial.number == 0
    assert again.trial.params == taken.trial.params


@pytest.mark.slow
def test_two_workers_run_the_very_study_that_one_runs(tiny, tmp_path):
    """Curves to the last digit, confirmation included, and as many trials as asked for."""
    results = []
    for count in (1, 2):
        options = ("--trials", "16", "--workers.count", str(count), "--engine.xla", "false")
        child = spawn(tiny, *options, "--output", str(tmp_path / f"out{count}"), "--fresh")
        _, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors.decode()
        assert len(stored(tiny).trials) == 16
        results.append([(tmp_path / f"out{count}" / name).read_bytes() for name in ("curves.csv", "best.json")])
    assert results[0] == results[1]


def workers_of(child: subprocess.Popen[bytes]) -> list[int]:
    """Return the worker processes that a command has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if parent == child.pid and "popen_loky" in command:
                found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs still."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_worker_that_dies_costs_nothing_and_none_outlives_its_parent(tiny):
    """kill -9 of a worker: its trial runs again and the study goes on.  kill -9 of the parent ends them all."""
    options = ("--trials", "60", "--epochs", "30", "--confirm.finalists", "0", "--workers.count", "2")
    child = spawn(tiny, *options)
    wait_for_trials(tiny, 3, child)
    os.kill(workers_of(child)[0], signal.SIGKILL)
    before = sum(t.state.is_finished() for t in stored(tiny).trials)
    wait_for_trials(tiny, before + 4, child)
    orphans = workers_of(child)
    assert len(orphans) == 2
    child.kill()
    child.wait()
    deadline = time.monotonic() + 300
    while any(is_alive(pid) for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in orphans)
    child = spawn(tiny, *options)
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors.decode()
    trials = stored(tiny).trials
    assert len(trials) == 60
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)


def test_a_worker_joins_by_hand(tiny, lrtune, lrtune_here):
    """`lrtune worker` runs what is left of a study, and refuses one that was not begun."""
    ended = lrtune("worker", tiny)
    assert ended.returncode == 1
    assert "Run 'lrtune tune" in ended.stderr
    assert lrtune_here("tune", tiny, "--trials", "4").returncode == 0
    assert lrtune_here("worker", tiny, "--trials", "9").returncode == 0
    assert len(stored(tiny).trials) == 9


@pytest.mark.parametrize(
    ("together", "cores", "count", "reason"),
    [
        (40.0, 2, 2, "2 workers with one thread each (40 against 10 epochs per second"),
        (11.0, 2, 1, "one worker with 2 threads (2 with one thread each: 11 against 10"),
        (99.0, 1, 1, "one core"),
        (99.0, 64, DISTANCE, "workers with one thread each"),
    ],
)
def test_the_count_is_what_trains_more(tiny, monkeypatch, together, cores, count, reason):
    """The measured rates decide; no more workers than leave the trials unchanged."""
    ended = []
    monkeypatch.setattr(workers, "cores", lambda: cores)
    monkeypatch.setattr(workers, "_available_bytes", lambda: 8 * 2**30)
    monkeypatch.setattr(workers, "_resident_bytes", lambda: 2**29)
    monkeypatch.setattr(workers.Pool, "epochs_per_second", lambda *_: together)
    monkeypatch.setattr(workers.Pool, "end", lambda self: ended.append(self.count))
    engine = SimpleNamespace(seconds_per_epoch=lambda *_: 0.1, xla=False, on_gpu=False)
    runner = SimpleNamespace(
        study=read_study(tiny),
        config=read_study(tiny).config,
        prepared=SimpleNamespace(engine=engine, splits=[None]),
        reporter=SimpleNamespace(stage=lambda *_: None),
    )
    choice, pool = workers.decide(runner, epochs=5000)
    assert choice["count"] == count
    assert reason in choice["reason"]
    assert (pool is None) == (count == 1)
    assert ended == ([2] if count == 1 and cores > 1 else [])
    if count > 1:
        monkeypatch.setattr(workers, "_resident_bytes", lambda: 6 * 2**30)
        assert "GB of free memory" in workers.decide(runner, epochs=5000)[0]["reason"]
    engine.on_gpu = True
    assert workers.decide(runner, epochs=5000)[0]["count"] == 1
    engine.on_gpu = False
    little, pool = workers.decide(runner, epochs=10)
    assert little["count"] == 1
    assert pool is None


def test_workers_that_cannot_start_leave_the_study_to_one(tiny, monkeypatch):
    """Whatever the reason, it is said, and the study goes on."""

    def refuse(*_: object) -> float:
        raise OSError("no semaphores here")

    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(workers, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(workers, "_resident_bytes", lambda: 2**20)
    monkeypatch.setattr(workers.Pool, "epochs_per_second", refuse)
    study = tune(tiny)
    assert "workers could not be started: OSError: no semaphores here" in study.user_attrs["workers"]["reason"]
    assert len(study.trials) == 8


def test_seconds_side_by_side_count_once():
    """Two trials at once, a gap, and one more: six seconds of work."""
    start = datetime(2026, 1, 1)
    spans = [(0, 3), (1, 4), (10, 12)]
    trials = [optuna.trial.create_trial(value=0.0, state=TrialState.COMPLETE) for _ in spans]
    for trial, (first, last) in zip(trials, spans, strict=True):
        trial.datetime_start, trial.datetime_complete = (start + timedelta(seconds=s) for s in (first, last))
    assert seconds_worked(trials) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, DISTANCE),
        ({"workers.count": 1}, DISTANCE),
        ({"workers.count": 16}, 16),
        ({"workers.count": 16, "workers.at_once": 2}, 2),
        ({"workers.backend": "ray"}, max(DISTANCE, cores())),
    ],
)
def test_more_workers_than_the_distance_widen_it(tiny, keys, expected):
    """They would else wait for each other."""
    assert at_once(read_study(tiny, keys)) == expected


def test_every_worker_claims_a_gpu_of_its_own(tmp_path):
    """Two devices, three processes: the third shares; a device is free again when its process has died."""
    code = (
        "import os, sys, time; from pipeline.search.workers import claim_device; "
        "print(claim_device(), os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "4, GPU-b", "TMPDIR": str(tmp_path)}

    def start() -> tuple[subprocess.Popen[str], str]:
        child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        return child, child.stdout.readline().strip()

    children = [start() for _ in range(3)]
    assert [said for _, said in children] == ["4 4", "GPU-b GPU-b", "None 4, GPU-b"]
    children[1][0].kill()
    children[1][0].wait()
    children.append(start())
    assert children[3][1] == "GPU-b GPU-b"
    for child, _ in children:
        child.kill()
        child.communicate()


@pytest.mark.slow
def test_a_trial_that_takes_too_long_fails_and_one_that_hangs_is_ended(tiny):
    """`trial_timeout` between epochs, and, where an epoch never ends, with its process; the study goes on."""
    (tiny.parent / "tiny.py").write_text(PAUSING_OBJECTIVE)
    options = ("--confirm.finalists", "0", "--engine.xla", "false", "--trial_timeout", "5", "--trials", "12")
    pause(tiny.parent, "0.02")  # else all of them may have ended before the long pause begins
    child = spawn(tiny, *options)

    def causes() -> list[str]:
        return [t.user_attrs["error"] for t in stored(tiny).trials if t.state == TrialState.FAIL]

    def wait_until(happened: Callable[[], bool]) -> None:
        until = time.monotonic() + 300
        while not happened():
            assert child.poll() is None, child.stderr.read().decode()
            assert time.monotonic() < until, causes()
            time.sleep(0.1)

    wait_for_trials(tiny, 2, child)
    pause(tiny.parent, "1000 once")
    wait_until(lambda: any("hung" in cause for cause in causes()))
    slow = len(causes())  # a machine that is busy may have made others too slow
    pause(tiny.parent, "0.4")
    wait_until(lambda: len(causes()) > slow)
    (tiny.parent / "pause").unlink()
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors.decode()
    trials = stored(tiny).trials
    assert len(trials) == 12
    assert all("longer than trial_timeout = 5" in cause for cause in causes())
    assert sum("hung" in cause for cause in causes()) == 1
    assert not [t for t in trials if t.user_attrs.get("retries")]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_sampler_sees_the_best_of_very_many_trials(direction):
    """A thousand: all of the best hundred, others from the whole study, the same each time, in their order."""
    from pipeline.search.queue import BEST_SEEN, SEEN, thinned

    rng = np.random.default_rng(0)
    values = rng.permutation(5000).astype(float)
    trials = [optuna.trial.create_trial(value=value, state=TrialState.COMPLETE) for value in values]
    for number, trial in enumerate(trials):
        trial.number = number
    assert thinned(trials[:SEEN], True) == trials[:SEEN]
    seen = thinned(trials, direction == "minimize")
    numbers = [t.number for t in seen]
    assert len(seen) == SEEN and numbers == sorted(set(numbers))
    best = np.argsort(values if direction == "minimize" else -values)[:BEST_SEEN]
    assert set(best) <= set(numbers)
    assert np.histogram(numbers, 10, (0, 5000))[0].min() > 60
    assert thinned(trials, direction == "minimize") == seen


def test_only_a_trial_that_has_just_been_created_is_known_to_have_left_nothing(tmp_path):
    """One that was interrupted keeps the values it has reported, and ends all the same."""
    from pipeline.database import database_of

    queue = queue_on(tmp_path)
    first = queue.take(3)
    assert first.fresh
    first.trial.report(0.5, 2)
    queue.put_back(first)
    queue.release(first)
    again = queue.take(3)
    assert again.trial.number == 0 and not again.fresh
    values = {2: 0.6, 5: 0.4}
    database = database_of(queue.study._storage)
    database.end_trial(again.trial._trial_id, TrialState.COMPLETE, 0.4, {"curves": {}}, values)
    assert queue.study.trials[0].intermediate_values == {2: 0.5, 5: 0.4}
    assert queue.study.trials[0].value == 0.4


def test_trials_created_at_once_have_numbers_of_their_own(tmp_path):
    """Also where no lock of ours keeps the processes apart."""
    from concurrent.futures import ThreadPoolExecutor

    from pipeline.search.draft import Draft

    queue = queue_on(tmp_path)
    study = queue.study

    def create(_: int) -> int:
        draft = Draft(SeenStudy("q", study._storage), 0)
        draft.user_attrs = {"learning_rate": 0.1}
        return draft.create(alive=False).number

    study.sampler = optuna.samplers.RandomSampler(0)
    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(create, range(40))) == list(range(40))


def test_a_trial_that_has_another_owner_is_not_ended(tmp_path):
    """A process that was away learns it from the commit itself, not only from the look before."""
    from pipeline.database import database_of

    queue = queue_on(tmp_path)
    taken = queue.take(3)
    database = database_of(queue.study._storage)
    taken.trial.set_user_attr("owner", "somebody else")
    end = (taken.trial._trial_id, TrialState.COMPLETE, 0.4, {"curves": {}}, {0: 0.5})
    assert not database.end_trial(*end, owner="me")
    trial = queue.study.trials[0]
    assert (trial.state, trial.intermediate_values) == (TrialState.RUNNING, {})
    assert "curves" not in trial.user_attrs
    assert database.end_trial(*end, owner="somebody else")
    assert queue.study.trials[0].value == 0.4


def test_a_trial_of_another_number_than_planned_waits_for_its_turn(tmp_path, monkeypatch):
    """As when the answer to a commit was lost and the next trial was asked for: it runs under its own mark later."""
    queue = queue_on(tmp_path)
    for position in (0.1, 0.2):
        queue.study.enqueue_trial({"lr_position": position, "optimizer": "sgd"})
    real = queue.study.ask

    def twice():
        real()  # an answer that was lost
        return real()

    monkeypatch.setattr(queue.study, "ask", twice)
    assert queue.take(2) is None
    monkeypatch.setattr(queue.study, "ask", real)
    assert [t.state for t in queue.study.trials] == [TrialState.RUNNING, TrialState.WAITING]
    assert queue.take_back_orphans(died=False) == [0]
    assert [queue.take(2).trial.params["lr_position"] for _ in range(2)] == [0.1, 0.2]


def test_nobody_speaks_for_a_trial_that_could_not_be_drawn(tmp_path, monkeypatch):
    """Its heart stops, so that other machines see that it has no process."""
    queue = queue_on(tmp_path)
    queue.locks.machine = "here"
    queue.study.enqueue_trial({"lr_position": 0.1, "optimizer": "sgd"})
    monkeypatch.setattr(queue, "space_after", lambda trials, horizon: SimpleNamespace(joint=None))
    monkeypatch.setattr("pipeline.search.queue.make_sampler", lambda *_: optuna.samplers.RandomSampler(0))
    with pytest.raises(AttributeError):
        queue.take(1)
    assert not queue._heart._trials


def test_a_cluster_of_our_own_ends_before_its_trials_are_taken_back(tiny, monkeypatch):
    """Else they would seem to run still, and count as died with the next start."""
    from contextlib import contextmanager

    from pipeline.search.study import StudyRunner

    order = []

    class Interrupted:
        @contextmanager
        def kept(self):
            yield
            order.append("ended")

        def search(self):
            raise KeyboardInterrupt

        def call_back(self, study):
            order.append("called back")

    monkeypatch.setattr(StudyRunner, "_choose_workers", lambda self, study: Interrupted())
    real = TrialQueue.take_back_orphans
    monkeypatch.setattr(
        TrialQueue, "take_back_orphans", lambda self, **said: order.append(str(said)) or real(self, **said)
    )
    with pytest.raises(KeyboardInterrupt):
        tune(tiny)
    assert order == ["{}", "called back", "ended", "{'died': False}"]
