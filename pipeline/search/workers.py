"""Worker processes on this machine, started through joblib, and the choice of how many.

A small model cannot keep several cores busy: as many workers with one thread each then train more
than one worker with all threads.  A large one can.  Which it is, is measured on the model at hand.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib

from pipeline.errors import KnownError
from pipeline.progress import Reporter
from pipeline.search.confirmation import ConfirmTask, confirm_once
from pipeline.search.queue import DISTANCE
from pipeline.study_file import Study, cores

if TYPE_CHECKING:
    from pipeline.search.study import StudyRunner

WORTH_SECONDS = 60.0
"""Training that lies ahead, in seconds, below which starting workers is not tried: it takes 10 to 20 seconds."""

WORTH_RATIO = 1.15
"""Workers must train at least so many times as much as one process with all threads."""

MEASURED_SECONDS = 1.5
"""For how long the workers train side by side to be measured."""

MEETING_SECONDS = 180.0
"""How long a worker that is ready waits for the others before it measures alone."""

MAXIMUM_DEATHS = 20
"""Deaths of workers that a study takes; a trial is given up earlier, so that one alone cannot reach it."""

LAST_SECONDS = 5.0
"""How long a worker may take to put its trial back when the process that started it is gone."""

_runner: StudyRunner | None = None


class Pool:
    """Worker processes that keep their engines between calls.

    Args:
        study: the study; its storage must hold it before `search`.
        count: processes.
        threads: threads of each.

    Attributes:
        on_death: called when a worker has died, before new ones are started.
    """

    def __init__(self, study: Study, count: int, threads: int) -> None:
        self.study, self.count, self.threads = study, count, threads
        self.on_death: Callable[[], object] = lambda: None

    def search(self) -> None:
        """Let every worker run trials until none is left."""
        for _ in self._run(_search, [()] * self.count):
            pass

    def confirm(self, tasks: Sequence[ConfirmTask]) -> Iterator[Any]:
        """Yield the result of every task, in their order."""
        return self._run(_confirm, [(task,) for task in tasks])

    def epochs_per_second(self, optimizer: str, xla: bool) -> float:
        """Return what all workers train together while they all do."""
        with tempfile.TemporaryDirectory() as folder:
            return float(sum(self._run(_measure, [(optimizer, xla, folder, self.count)] * self.count)))

    def end(self) -> None:
        """End the processes."""
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True, kill_workers=True)

    def _run(self, function: Any, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the function's results from the workers, in order; an interruption of this process ends them.

        When a worker dies, joblib ends the others too; then they are started again, with what is left.
        """
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        parent, done, deaths = os.getpid(), 0, 0
        while done < len(arguments):
            calls = [
                joblib.delayed(_in_worker)(function, self.study, self.threads, parent, a) for a in arguments[done:]
            ]
            try:
                with joblib.parallel_config(
                    backend="loky", inner_max_num_threads=self.threads, idle_worker_timeout=3600
                ):
                    parallel = joblib.Parallel(
                        n_jobs=self.count, batch_size=1, pre_dispatch="all", return_as="generator"
                    )
                    for result in parallel(calls):
                        done += 1
                        yield result
            except TerminatedWorkerError as error:
                deaths += 1
                if deaths > MAXIMUM_DEATHS:
                    raise KnownError(
                        f"{self.study.path}: worker processes died {deaths} times, the last time with: "
                        f"{' '.join(str(error).split())[:200]} Lower workers.count if memory ran out."
                    ) from error
                self.on_death()


def decide(runner: StudyRunner, epochs: int) -> tuple[dict[str, Any], Pool | None]:
    """Measure whether one worker per core trains more than this process with all threads.

    Args:
        runner: the study, whose engine is ready.
        epochs: epochs of training that lie ahead, all trials and folds together.

    Returns:
        The choice as it is stored ({"count", "reason"}), and the workers if there are to be any.
    """
    config, engine = runner.config, runner.prepared.engine
    count = min(cores(), DISTANCE, config.trials)
    together = f"one worker with {cores()} threads"
    if count < 2:
        return {"count": 1, "reason": "one worker (one core)"}, None
    if engine.on_gpu:
        return {"count": 1, "reason": "one worker (it has the GPU to itself)"}, None
    if config.workers.threads != "auto":
        return {"count": 1, "reason": "one worker (its threads are set in the study file)"}, None
    optimizer = config.search.optimizers[-1]
    seconds = engine.seconds_per_epoch(optimizer, runner.prepared.splits[0])
    if seconds * epochs < WORTH_SECONDS:
        return {"count": 1, "reason": f"{together} (about {seconds * epochs:.0f} s of training ahead)"}, None
    needed, free = count * _resident_bytes(), _available_bytes()
    if needed > free / 2:
        return {
            "count": 1,
            "reason": f"{together} ({count} would need {needed / 1e9:.1f} of {free / 1e9:.1f} GB of free memory)",
        }, None
    runner.reporter.stage("workers", f"starting {count} to measure whether they train faster side by side")
    pool = Pool(runner.study, count, 1)
    try:
        side_by_side = pool.epochs_per_second(optimizer, engine.xla and optimizer not in engine.plain)
    except Exception as error:  # whatever keeps processes from starting here: the study runs without them
        pool.end()
        return {
            "count": 1,
            "reason": f"{together} (workers could not be started: {type(error).__name__}: {error})",
        }, None
    figures = f"{side_by_side:.3g} against {1 / seconds:.3g} epochs per second"
    if side_by_side * seconds > WORTH_RATIO:
        return {"count": count, "reason": f"{count} workers with one thread each ({figures} of {together})"}, pool
    pool.end()
    return {"count": 1, "reason": f"{together} ({count} with one thread each: {figures})"}, None


def _in_worker(function: Any, study: Study, threads: int, parent: int, arguments: tuple[Any, ...]) -> Any:
    """In a worker: prepare the study once, then call the function with its runner."""
    global _runner
    if _runner is None or _runner.study.path != study.path:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        os.environ["TF_NUM_INTRAOP_THREADS"] = str(threads)
        os.environ["TF_NUM_INTEROP_THREADS"] = "1"
        from pipeline.search.prepare import prepare
        from pipeline.search.study import StudyRunner

        reporter = Reporter(quiet=True)
        _runner = StudyRunner(prepare(study, reporter), reporter, parent=parent)
    return function(_runner, *arguments)


def _end_with(parent: int) -> None:
    """End this worker when the process that started it is gone; a trial that runs goes back first."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(LAST_SECONDS)
    os._exit(1)


def _search(runner: StudyRunner) -> None:
    runner.join()


def _confirm(runner: StudyRunner, task: ConfirmTask) -> Any:
    return confirm_once(runner.prepared, task)


def _measure(runner: StudyRunner, optimizer: str, xla: bool, folder: str, count: int) -> float:
    """Return epochs per second of this worker, measured while the others train too."""
    engine, split = runner.prepared.engine, runner.prepared.splits[0]
    engine.xla = xla
    engine.seconds_per_epoch(optimizer, split)  # traces, compiles and warms up
    Path(folder, str(os.getpid())).touch()
    waited = time.monotonic()
    while len(os.listdir(folder)) < count and time.monotonic() - waited < MEETING_SECONDS:
        time.sleep(0.01)
    return 1.0 / engine.seconds_per_epoch(optimizer, split, at_least=MEASURED_SECONDS)


def _resident_bytes() -> int:
    """Return the memory of this process, which a worker will need too."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _available_bytes() -> int:
    """Return the memory of the machine that can be had, caches that it would give back included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
