"""Worker processes started through joblib, on this machine or a cluster, and the choice of how many.

A small model cannot keep several cores busy: as many workers with one thread each then train more
than one worker with all threads.  A large one can.  Which it is, is measured on the model at hand.
All workers run the same function, whoever starts them: loky on this machine, Dask or Ray on others.
They read and write the study's storage, and learn from it when to stop.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib

from pipeline.errors import KnownError, require_package
from pipeline.locks import LiveMark
from pipeline.progress import Reporter
from pipeline.search.confirmation import ConfirmTask, confirm_once
from pipeline.search.deadline import ENDLESS, Deadline
from pipeline.search.queue import CALLED_BACK, DISTANCE
from pipeline.search.space import space_size
from pipeline.study_file import Study, cores

if TYPE_CHECKING:
    import optuna

    from pipeline.search.study import StudyRunner

WORTH_SECONDS = 60.0
"""Training that lies ahead, in seconds, below which starting workers is not tried: it takes 10 to 20 seconds."""

WORTH_RATIO = 1.15
"""Workers must train at least so many times as much as one process with all threads."""

MEASURED_SECONDS = 1.5
"""For how long the workers train side by side to be measured."""

MEETING_SECONDS = 180.0
"""How long a worker that is ready waits for the others before it measures alone."""

CONNECTING_SECONDS = 10
"""How long a Dask scheduler may take to answer."""

MAXIMUM_DEATHS = 20
"""Deaths of workers that a study takes; a trial is given up earlier, so that one alone cannot reach it."""

LAST_SECONDS = 5.0
"""How long a worker may take to put its trial back when the process that started it is gone."""

DEATHS = ("TerminatedWorkerError", "KilledWorker", "RayActorError", "ActorDiedError", "WorkerCrashedError")
"""Names of the errors by which loky, Dask and Ray tell that a worker died."""

_runner: StudyRunner | None = None
_one_at_a_time = threading.Lock()
_device: LiveMark | None = None


class Pool:
    """Worker processes that keep their engines between calls.

    Args:
        study: the study; its storage must hold it before `search`.
        count: processes.
        threads: threads of each.

    Attributes:
        on_death: called when a worker has died, before new ones are started.
        finished: returns how many trials have ended: only deaths without one in between are counted.
        until: when the study's time is up, by `time.time()`.
    """

    def __init__(self, study: Study, count: int, threads: int) -> None:
        self.study, self.count, self.threads = study, count, threads
        self.backend = study.config.workers.backend
        self.token = uuid.uuid4().hex
        self.until = math.inf
        self._kept = False
        self.on_death: Callable[[], object] = lambda: None
        self.finished: Callable[[], int] = lambda: 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep a cluster that is started here until the end of the study: its workers have traced by then."""
        if self.backend == "loky":  # which keeps its workers by itself
            yield
            return
        with backend(self.study, self.count, self.threads):
            self._kept = True
            try:
                yield
            finally:
                self._kept = False

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

    def call_back(self, study: optuna.Study) -> None:
        """Tell workers on other machines, through the storage, that this process has been interrupted."""
        if self.backend != "loky":
            study.set_user_attr(CALLED_BACK, self.token)

    def _run(self, function: Any, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the function's results from the workers, in order; an interruption of this process ends them.

        When a worker dies, joblib ends the others too; then they are started again, with what is left.
        """
        local = self.backend == "loky"
        parent, done, deaths, before = os.getpid(), 0, 0, self.finished()
        while done < len(arguments):
            calls = [
                joblib.delayed(_in_worker)(
                    function, self.study, self.threads, parent if local else None, self.token, self.until, a
                )
                for a in arguments[done:]
            ]
            try:
                with nullcontext() if self._kept else backend(self.study, self.count, self.threads):
                    parallel = joblib.Parallel(
                        n_jobs=max(self.count, 2),  # with one, joblib would run it in this process
                        batch_size=1,
                        pre_dispatch="all",
                        return_as="list" if self.backend == "ray" else "generator",
                    )
                    for result in parallel(calls):
                        done += 1
                        yield result
            except Exception as error:
                if type(error).__name__ not in DEATHS:
                    raise
                deaths = deaths + 1 if self.finished() == before else 1
                before = self.finished()
                if deaths > MAXIMUM_DEATHS:
                    raise KnownError(
                        f"{self.study.path}: worker processes died {deaths} times, the last time with: "
                        f"{' '.join(str(error).split())[:200]} Lower workers.count if memory ran out."
                    ) from error
                self.on_death()


def decide(runner: StudyRunner, epochs: int, deadline: Deadline = ENDLESS) -> tuple[dict[str, Any], Pool | None]:
    """Measure whether one worker per core trains more than this process with all threads.

    Args:
        runner: the study, whose engine is ready.
        epochs: epochs of training that lie ahead, all trials and folds together.
        deadline: the time of the study.

    Returns:
        The choice as it is stored ({"count", "reason"}), and the workers if there are to be any.
    """
    config, engine = runner.config, runner.prepared.engine
    count = int(min(cores(), DISTANCE, config.trials, space_size(config.search)))
    together = f"one worker with {cores()} threads"
    if count < 2:
        return {"count": 1, "reason": "one worker (one core)"}, None
    if engine.on_gpu and len(devices()) > 1:
        count = min(len(devices()), config.trials)
        return {"count": count, "reason": f"{count} workers, one for each GPU"}, Pool(runner.study, count, 1)
    if engine.on_gpu:
        return {"count": 1, "reason": "one worker (it has the GPU to itself)"}, None
    if config.workers.threads != "auto":
        return {"count": 1, "reason": "one worker (its threads are set in the study file)"}, None
    optimizer = config.search.optimizers[-1]
    seconds = engine.seconds_per_epoch(optimizer, runner.prepared.splits[0])
    ahead = min(seconds * epochs, max(deadline.left, 0.0))
    if ahead < WORTH_SECONDS:
        return {"count": 1, "reason": f"{together} (about {ahead:.0f} s of training ahead)"}, None
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


@contextmanager
def backend(study: Study, count: int, threads: int) -> Iterator[None]:
    """Choose the joblib backend of a study, connected to its cluster.

    Raises:
        KnownError: when its package is missing or the cluster cannot be reached.
    """
    settings = study.config.workers
    if settings.backend == "loky":
        _hush_tracker()
        with joblib.parallel_config(backend="loky", inner_max_num_threads=threads, idle_worker_timeout=3600):
            yield
        return
    require_package("distributed" if settings.backend == "dask" else "ray", "workers.backend", extra=settings.backend)
    if settings.backend == "dask":
        with _dask(study.path, settings.address, count), joblib.parallel_config(backend="dask", retries=0):
            yield
        return
    with _ray(study.path, settings.address, count):
        yield


def _hush_tracker() -> None:
    """Let the process that tidies up after loky's workers do so without a warning, when an interruption ends them."""
    said = os.environ.get("PYTHONWARNINGS", "")
    if LEAKS not in said:
        os.environ["PYTHONWARNINGS"] = f"{said},{LEAKS}".lstrip(",")


LEAKS = (
    "ignore::UserWarning:joblib.externals.loky.backend.resource_tracker,"
    "ignore::UserWarning:multiprocessing.resource_tracker"
)
"""Filters of warnings, as the environment of a process takes them."""


def cluster_size(study: Study) -> int:
    """Return how many workers the cluster of a study has; the cores of this machine where it is started here."""
    settings = study.config.workers
    if settings.address is None:
        return cores()
    with backend(study, 1, 1):
        if settings.backend == "dask":
            from distributed import get_client

            return max(1, len(get_client().scheduler_info(n_workers=-1)["workers"]))
        import ray

        return max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextmanager
def _dask(path: Path, address: str | None, count: int) -> Iterator[None]:
    """Connect to a Dask scheduler, or start a cluster on this machine."""
    from distributed import Client, LocalCluster

    if address is None:
        with LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
            yield
        return
    try:
        client = Client(address, timeout=CONNECTING_SECONDS)
    except (OSError, ValueError) as error:
        raise KnownError(
            f"{path}: workers.address must be that of a running Dask scheduler, got '{address}' ({error}). Start one "
            "with 'dask scheduler', and workers with 'dask worker ADDRESS --nthreads 1'."
        ) from error
    with client:
        yield


@contextmanager
def _ray(path: Path, address: str | None, count: int) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine."""
    import ray
    from ray.util.joblib import register_ray

    began = not ray.is_initialized()
    if began:
        try:
            if address not in (None, "auto", "local"):
                _answers(str(address))  # Ray itself would go on trying for minutes
            ray.init(
                address=address,
                num_cpus=count if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise KnownError(
                f"{path}: workers.address must be that of a running Ray cluster, got '{address}' "
                f"({' '.join(str(error).split())[:200]}). Start one with 'ray start --head'."
            ) from error
    try:
        register_ray()
        with joblib.parallel_config(backend="ray"):
            yield
    finally:
        if began:
            ray.shutdown()


def _answers(address: str) -> None:
    """Raise an error when nothing listens at "host:port"."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        raise ValueError("expected host:port")
    with socket.create_connection((host, int(port)), timeout=CONNECTING_SECONDS):
        pass


def _in_worker(
    function: Any,
    study: Study,
    threads: int,
    parent: int | None,
    token: str,
    until: float,
    arguments: tuple[Any, ...],
) -> Any:
    """In a worker: prepare the study once, then call the function with its runner.

    A process has one model: where a cluster gives one several threads, its tasks wait for each other.
    """
    global _runner
    with _one_at_a_time:
        if _runner is None or (_runner.study.path, _runner.token) != (study.path, token):
            if parent is not None:
                threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
            os.environ["TF_NUM_INTRAOP_THREADS"] = str(threads)
            os.environ["TF_NUM_INTEROP_THREADS"] = "1"
            claim_device()
            from pipeline.search.prepare import prepare
            from pipeline.search.study import StudyRunner

            reporter = Reporter(quiet=True)
            _runner = StudyRunner(prepare(study, reporter), reporter, parent=parent, token=token)
        _runner.deadline = Deadline(study.config.timeout or math.inf, until)
        if parent is not None:
            return function(_runner, *arguments)
        try:
            return function(_runner, *arguments)
        except KeyboardInterrupt:  # called back; raised further, it would end a cluster's worker
            return None


def devices() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name.strip() for name in allowed.split(",") if name.strip() and name.strip() != "-1"]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def claim_device() -> str | None:
    """Take a GPU of this machine for this process alone, where there are several; return its name.

    The claim is a lock file, which the operating system drops with the process.  TensorFlow must not
    have been imported yet.
    """
    global _device
    names = devices()
    if len(names) < 2 or _device is not None:
        return None
    for name in names:
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        mark = LiveMark(Path(tempfile.gettempdir()) / f"lrtune-{os.getuid()}-gpu-{digest}.lock")
        mark.__enter__()
        if mark.alone:
            mark.share()
            _device = mark
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return name
        mark.__exit__()
    return None  # more workers than devices: this one shares them all


def _end_with(parent: int) -> None:
    """End this worker when the process that started it is gone; a trial that runs goes back first."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(LAST_SECONDS)
    os._exit(1)


def _search(runner: StudyRunner) -> None:
    runner.join()


def _confirm(runner: StudyRunner, task: ConfirmTask) -> Any:
    runner.restore()
    return confirm_once(runner.prepared, task, runner.deadline)


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
