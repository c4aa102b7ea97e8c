"""What the storage costs per trial: trials that do nothing and trials of 0.2 s, by storage and number of workers.

    python -m benchmarks.overhead [trials] [workers ...]

The workers are processes that take, report and tell trials exactly as a study's do, with 5 folds of
20 epochs each; only the training is left out, so that they need no TensorFlow.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna

from pipeline.progress import Reporter
from pipeline.search import running
from pipeline.search.queue import SeenStudy
from pipeline.search.study import StudyRunner
from pipeline.search.trial import Monitor, Outcome
from pipeline.storage import LAYOUT
from pipeline.study_file import read_study
from tests.postgres import Server, programs

FOLDS, EPOCHS = 5, 20
KEYS = 'objective = "none.py"\nepochs = 20\n[validation]\nfolds = 5\n[confirm]\nfinalists = 0\n'


def runner_of(path: Path, url: str, trials: int, workers: int) -> StudyRunner:
    """Return a runner whose model needs no training."""
    keys = {"storage.url": url, "trials": trials, "workers.at_once": max(4, workers)}
    engine = SimpleNamespace(xla=False, plain=set())
    prepared: Any = SimpleNamespace(
        study=read_study(path, keys),
        engine=engine,
        splits=(),
        monitor=Monitor("val_loss", "min"),
        objective=SimpleNamespace(path=None),
        inline=False,
    )
    return StudyRunner(prepared, Reporter(quiet=True))


def set_up(runner: StudyRunner) -> None:
    """Create the study as `tune` does."""
    storage = runner._open()
    name = runner.study.name
    optuna.create_study(study_name=name, storage=storage, direction="minimize")
    study = SeenStudy(name, storage)
    tests = {
        optimizer: {"low": 1e-4, "suggested": 1e-3, "high": 1e-1, "status": "ok", "extended": False}
        for optimizer in runner.config.search.optimizers
    }
    facts = {
        "layout": LAYOUT,
        "about": {"versions": {}, "monitor": "val_loss", "mode": "min"},
        "range_test": tests,
        "xla": False,
        "plain": [],
        "widens": True,
        "distance": int(runner.config.workers.at_once),
        "definition": {},
    }
    for key, value in facts.items():
        study.set_user_attr(key, value)


def pretend(seconds: float) -> Any:
    """Return a `run_trial` that takes so long and reports what a real one reports."""

    def run_trial(*_: Any, on_epoch: Any, on_fold: Any, checkpoint: Any, **__: Any) -> Outcome:
        position = checkpoint.load()
        names = ("loss", "accuracy", "val_loss", "val_accuracy")
        curves = {name: [[0.123456 + fold * 0.01 + epoch * 0.001 for epoch in range(EPOCHS)] for fold in range(FOLDS)]
                  for name in names}  # fmt: skip
        for fold in range(FOLDS):
            for epoch in range(EPOCHS):
                on_epoch(fold, epoch, curves["val_loss"][fold][epoch])
            on_fold(fold, 0.1 + 0.01 * fold)
            if fold + 1 < FOLDS:
                checkpoint.after_fold(replace(position, fold=fold + 1, curves=curves))
        time.sleep(seconds)
        return Outcome(curves=curves, value=0.1, value_std=0.01, best_epoch=3)

    return run_trial


def work(path: Path, url: str, trials: int, workers: int, seconds: float, barrier: Any, ended: Any) -> None:
    """Run trials until none is left."""
    running.run_trial = pretend(seconds)
    runner = runner_of(path, url, trials, workers)
    runner._open()
    study = runner._find()
    assert study is not None
    with runner.locks.mark("live") as mark:
        mark.share()
        queue = runner._queue(study)
        barrier.wait()
        runner.search(queue)
        ended.put(time.perf_counter())


def measure(server: Server | None, trials: int, workers: int, seconds: float) -> float:
    """Return the wall-clock seconds of a study."""
    with tempfile.TemporaryDirectory(prefix="lrtune-overhead-") as folder:
        path = Path(folder) / f"o{time.monotonic_ns()}.toml"
        path.write_text(KEYS)
        url = server.url if server else f"sqlite:///{folder}/studies.db"
        set_up(runner_of(path, url, trials, workers))
        # Processes made from one that has imported everything: many start at once, and share what they only read.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipeline.search.running", "pipeline.search.study", "benchmarks"])
        barrier, ended = context.Barrier(workers + 1), context.Queue()
        children = [context.Process(target=work, args=(path, url, trials, workers, seconds, barrier, ended))
                    for _ in range(workers)]  # fmt: skip
        for child in children:
            child.start()
        barrier.wait(300)
        began = time.perf_counter()
        last = max(float(ended.get()) for _ in children)
        for child in children:
            child.join()
        return last - began


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    counts = [int(a) for a in sys.argv[2:]] or [1, 2, 8, 32]
    server = Server() if programs() is not None else None
    if server is not None:
        os.environ["PGPASSWORD"] = server.password
    try:
        print(f"{trials} trials, {os.cpu_count()} cores")
        print("storage      workers   nothing: ms per trial, trials per s    0.2 s: share of time that is not training")
        for name, place in (("SQLite", None), ("PostgreSQL", server)):
            if name == "PostgreSQL" and server is None:
                continue
            for workers in counts:
                nothing = measure(place, trials, workers, 0.0)
                longer = measure(place, max(trials // 3, 20 * workers), workers, 0.2)
                useful = 0.2 * max(trials // 3, 20 * workers) / workers
                print(
                    f"{name:11s} {workers:7d} {1000 * nothing / trials:12.1f} {trials / nothing:15.1f} "
                    f"{100 * (longer - useful) / longer:26.1f}%",
                    flush=True,
                )
    finally:
        if server is not None:
            server.end()


if __name__ == "__main__":
    main()
