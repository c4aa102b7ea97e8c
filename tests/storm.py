"""Kill, freeze and starve a study at random moments, and compare it with one that was left in peace.

Small studies run as real processes, on SQLite and on a PostgreSQL server of their own.  At random
moments a worker, the command that started it, all processes or the database server is killed with
SIGKILL, or a worker is stopped for longer than its heartbeat and then wakes.  Whatever was killed is
started again.  At its end every study must be the one that an undisturbed run gives, curve by curve.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna

from pipeline.search.queue import MAXIMUM_RETRIES
from pipeline.storage import open_storage
from tests.conftest import ROOT, TINY_OBJECTIVE, TINY_STUDY
from tests.postgres import Server

OPTIONS = ["--epochs", "150", "--confirm.finalists", "0", "--engine.xla", "false"]
OPTIONS += ["--workers.at_once", "4", "--checkpoint.minutes", "0.01"]


class Storm:
    """One study under attack.

    Args:
        folder: an empty folder.
        server: the database server, or None for SQLite.
        rng: source of everything random.
        trials: trials of the study.
    """

    def __init__(self, folder: Path, server: Server | None, rng: random.Random, trials: int = 16) -> None:
        self.folder, self.server, self.rng, self.trials = folder, server, rng, trials
        (folder / "tiny.py").write_text(TINY_OBJECTIVE)
        self.study = folder / f"storm{rng.randrange(10**9)}.toml"
        self.study.write_text(TINY_STUDY)
        self.url = server.url if server else f"sqlite:///{folder / 'studies.db'}"
        self.options = [*OPTIONS, "--trials", str(trials), "--storage", self.url, "--storage.heartbeat", "1"]
        self.main: subprocess.Popen[bytes] | None = None
        self.helper: subprocess.Popen[bytes] | None = None
        self.done = Counter[str]()
        self.seen: dict[int, Any] = {}
        self.faults: list[str] = []

    def run(self, kills: int, seconds: float = 400) -> None:
        """Run the study to its end, with so many attacks on the way."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._start()
            self._look()
            time.sleep(self.rng.uniform(0.05, 2.5))
            if sum(self.done.values()) < kills and self._running():
                self._attack()
            assert self.main is not None
            code = self.main.poll()
            if code == 0:
                break
            if code == 1 and "Check that the database is there" in self._said()[-400:]:
                continue  # begun while the server was away: refused at once, to be started again
            if code not in (None, -signal.SIGKILL):
                self.faults.append(f"the command ended with {code}: {self._said()[-600:]}")
                break
        else:
            self.faults.append(f"the study did not end: {self._said()[-600:]}")
        self._end()
        self._look()
        self._check()

    def _start(self) -> None:
        """Start what is not running: the command with two workers or one, and now and then a worker by hand."""
        if self.main is None or self.main.poll() not in (None, 0):
            count = str(self.rng.choice((1, 2)))
            self.main = self._spawn("tune", str(self.study), *self.options, "--workers.count", count)
        if self.server and self.seen and (self.helper is None or self.helper.poll() is not None):
            self.helper = self._spawn("worker", str(self.study), *self.options, TMPDIR=str(self.folder / "elsewhere"))

    def _spawn(self, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        for place in env.values():
            Path(place).mkdir(exist_ok=True)
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline", *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PGPASSWORD": Server.password, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _attack(self) -> None:
        main = self.main
        assert main is not None
        workers = children_of(main.pid)
        choices = ["command", "all"]
        choices += ["worker"] * 3 if workers else []
        choices += ["server"] if self.server else []
        choices += ["helper", "freeze"] if self.helper is not None and self.helper.poll() is None else []
        choice = self.rng.choice(choices)
        self.done[choice] += 1
        if choice == "worker":
            kill(self.rng.choice(workers))
        elif choice == "command":
            main.kill()
        elif choice == "all":
            for pid in (main.pid, *workers):
                kill(pid)
            if self.helper is not None:
                self.helper.kill()
        elif choice == "server":
            assert self.server is not None
            self.server.kill()
            time.sleep(self.rng.uniform(0, 3))
            self.server.start()
        elif choice == "helper":
            assert self.helper is not None
            self.helper.kill()
        elif choice == "freeze":
            assert self.helper is not None
            self.helper.send_signal(signal.SIGSTOP)
            time.sleep(self.rng.uniform(2, 6))
            with contextlib.suppress(ProcessLookupError):
                self.helper.send_signal(signal.SIGCONT)
        for child in (main, self.helper):
            if child is not None and choice in ("command", "all", "helper"):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.2)

    def _running(self) -> bool:
        """Return whether the study has begun; before that there is nothing to lose."""
        return bool(self.seen) or self.rng.random() < 0.05

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        storage = open_storage(self.url, create=False)
        try:
            return optuna.load_study(study_name=self.study.stem, storage=storage).trials
        finally:
            storage.engine.dispose()

    def _look(self) -> None:
        """Compare every finished trial with what was seen of it before."""
        try:
            trials = self._trials()
        except Exception:  # not there yet
            return
        for trial in trials:
            if trial.state.is_finished():
                facts = (trial.state, trial.value, trial.params, trial.user_attrs.get("curves"))
                if self.seen.setdefault(trial.number, facts) != facts:
                    self.faults.append(f"trial {trial.number} changed after its end")
            elif trial.number in self.seen:
                self.faults.append(f"trial {trial.number} was finished and is {trial.state.name} now")

    def _end(self) -> None:
        for child in (self.main, self.helper):
            if child is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(60)
                child.kill()
                child.wait()

    def _check(self) -> None:
        trials = self._trials()
        if [t.number for t in trials] != list(range(self.trials)):
            self.faults.append(f"{len(trials)} trials instead of {self.trials}")
        for trial in trials:
            if not trial.state.is_finished():
                self.faults.append(f"trial {trial.number} is {trial.state.name} at the end")
            if trial.user_attrs.get("retries", 0) > MAXIMUM_RETRIES:
                self.faults.append(f"trial {trial.number} was tried {trial.user_attrs['retries']} times more")
        given_up = [t.number for t in trials if t.state == optuna.trial.TrialState.FAIL]
        if given_up:
            self.faults.append(f"given up: {given_up}")
        results = self.folder / self.study.stem
        try:
            json.loads((results / "best.json").read_text())
            if not (results / "report.html").read_text().rstrip().endswith("</html>"):
                self.faults.append("report.html is cut off")
            self.curves = (results / "curves.csv").read_bytes()
        except (OSError, ValueError) as error:
            self.faults.append(f"results: {error}")
            self.curves = b""
        left = [p.name for p in results.rglob("*") if p.name.startswith(".") or "checkpoint" in p.name]
        if left:
            self.faults.append(f"left behind: {left}")

    def _said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def kill(pid: int) -> None:
    """kill -9, where the process still is."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """Return the worker processes of a command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == pid and "popen_loky" in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
    return found


def storm(
    kills: int, seed: int = 0, per_study: int = 8, *, trials: int = 16, postgres: bool = True
) -> tuple[Counter[str], list[str]]:
    """Attack studies until so many attacks have been made; return the attacks by kind and all faults.

    Args:
        kills: attacks in all.
        seed: of everything random.
        per_study: attacks on one study at most.
        trials: trials of a study.
        postgres: run every second study on a database server.
    """
    rng, done, faults = random.Random(seed), Counter[str](), []
    server = Server() if postgres else None
    if server is not None:
        os.environ["PGPASSWORD"] = server.password
    peace: bytes | None = None
    try:
        number = 0
        while peace is None or sum(done.values()) < kills:
            with tempfile.TemporaryDirectory(prefix="lrtune-storm-") as folder:
                on = server if number % 2 else None
                one = Storm(Path(folder), on, rng, trials)
                one.run(0 if peace is None else min(per_study, kills - sum(done.values())))
                if peace is None:
                    peace = one.curves
                elif one.curves != peace:
                    one.faults.append("its curves are not those of the undisturbed study")
                    if os.environ.get("CRASH_KEEP"):
                        shutil.copytree(folder, Path(os.environ["CRASH_KEEP"]) / str(number), dirs_exist_ok=True)
                done += one.done
                faults += [f"study {number} ({'PostgreSQL' if on else 'SQLite'}): {fault}" for fault in one.faults]
                told = ", ".join(f"{name} {count}" for name, count in sorted(one.done.items())) or "left in peace"
                print(
                    f"study {number:3d} {'PostgreSQL' if on else 'SQLite':10s} {told}; faults: {one.faults}", flush=True
                )
            number += 1
    finally:
        if server is not None:
            server.end()
    return done, faults
