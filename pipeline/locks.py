"""Who works on what: locks between the processes of a study, on one machine or on many.

On one machine these are lock files, which the operating system drops when their process dies.
Over a database server they are the server's advisory locks, which it drops when a connection is
lost, or when the process that holds one says nothing for a minute: a machine that freezes keeps
nobody waiting.  Whoever held such a lock asks it, before a step that counts, whether it still does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

FROZEN_SECONDS = 60
"""A process that holds a server's lock and says nothing for so many seconds loses it."""


class LostLock(Exception):
    """A lock that was lost while it was needed; what it was for is begun again."""


Check = Callable[[], None]
"""Raises `LostLock` when a lock is no longer held."""


class Locks(Protocol):
    """The locks of a study.

    Attributes:
        machine: what tells this machine from others, or None where a study runs on one alone.
    """

    machine: str | None

    def exclusively(self, purpose: str, *, slow: bool = False) -> AbstractContextManager[Check]:
        """Wait for a lock and hold it alone, among all processes of the study.

        Args:
            purpose: what is locked.
            slow: whether it is held for long, so that a silent holder keeps it.
        """

    def mark(self, purpose: str) -> LiveMark:
        """Return the lock file that tells processes of this machine who lives."""


class FileLocks:
    """Lock files in a folder: for a study on one machine.

    Args:
        folder: where they lie.
        stem: begins their names.
    """

    machine: str | None = None

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem

    @contextmanager
    def exclusively(self, purpose: str, *, slow: bool = False) -> Iterator[Check]:
        """Hold the lock file; the operating system never takes it from a living process."""
        with exclusively(self._path(purpose)):
            yield lambda: None

    def mark(self, purpose: str) -> LiveMark:
        """Return the lock file of a purpose."""
        return LiveMark(self._path(purpose))

    def _path(self, purpose: str) -> Path:
        return self.folder / f".{self.stem}-{purpose}.lock"


class ServerLocks:
    """Advisory locks of a PostgreSQL server: for a study on many machines.

    Args:
        engine: SQLAlchemy's engine of the server, for the locks alone.
        place: the storage's URL without its password.
        study: the study's name.
        patiently: calls a function again while the server cannot be reached.
    """

    def __init__(self, engine: Any, place: str, study: str, patiently: Callable[[Callable[[], Any]], Any]) -> None:
        self.study, self.patiently, self._engine = study, patiently, engine
        self.machine: str | None = machine()
        digest = hashlib.blake2b(f"{place} {study}".encode(), digest_size=8).hexdigest()
        self._files = FileLocks(Path(tempfile.gettempdir()), f"lrtune-{os.getuid()}-{digest}")

    @contextmanager
    def exclusively(self, purpose: str, *, slow: bool = False) -> Iterator[Check]:
        """Hold the server's lock inside a transaction, which ends with the process or its connection."""
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        key = int.from_bytes(hashlib.blake2b(f"{self.study}/{purpose}".encode(), digest_size=8).digest(), signed=True)

        def acquire() -> Any:
            connection = self._engine.connect()
            try:
                limit = 0 if slow else FROZEN_SECONDS * 1000
                connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = {limit}"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            except BaseException:
                connection.close()
                raise
            return connection

        connection = self.patiently(acquire)

        def check() -> None:
            try:
                connection.execute(text("SELECT 1"))
            except SQLAlchemyError as error:
                raise LostLock(purpose) from error

        try:
            yield check
        finally:
            with contextlib.suppress(SQLAlchemyError):  # a lost connection holds no lock
                connection.close()

    def mark(self, purpose: str) -> LiveMark:
        """Return a lock file outside the study's folder, which other machines may share."""
        return self._files.mark(purpose)


def machine() -> str:
    """Return what tells this machine and user from others: processes with the same share its lock files."""
    folder = Path(tempfile.gettempdir())
    path = folder / f"lrtune-{os.getuid()}-machine"
    with exclusively(folder / f"lrtune-{os.getuid()}-machine.lock"):
        if not path.exists() or not path.read_text(encoding="utf-8").strip():
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        return f"{socket.gethostname()}-{path.read_text(encoding='utf-8').strip()}"


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold a lock file alone, among the processes of this machine; waits for its turn."""
    import fcntl

    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class LiveMark:
    """A lock file that is held while a process works on a study, on this machine.

    The operating system drops the lock when the process ends, however it ends.  Whoever can take
    it alone knows that no process here still runs a trial of the study, so that trials left
    running belong to nobody.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None
        self.alone = False

    def __enter__(self) -> LiveMark:
        import fcntl

        self._file = open(self.path, "a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.alone = True
        except OSError:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return self

    def share(self) -> None:
        """Let other processes join, once stale trials have been dealt with."""
        import fcntl

        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)

    def __exit__(self, *_: object) -> None:
        # The file stays: removing it would race with a process that has just opened it.
        if self._file is not None:
            self._file.close()
            self._file = None


class Heart:
    """Tells the storage every so many seconds that this process still runs its trials.

    Args:
        beat: called with a trial's id.
        seconds: between two beats.
    """

    def __init__(self, beat: Callable[[int], object], seconds: float) -> None:
        self.beat, self.seconds = beat, seconds
        self._trials: set[int] = set()
        self._thread: threading.Thread | None = None

    def start(self, trial_id: int, *, now: bool = True) -> None:
        """Beat for a trial from now on, the first time at once unless that has been done."""
        if now:
            self.beat(trial_id)
        self._trials.add(trial_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def stop(self, trial_id: int) -> None:
        """Beat no longer for a trial."""
        self._trials.discard(trial_id)

    def _run(self) -> None:
        import time

        while True:
            time.sleep(self.seconds)
            for trial_id in tuple(self._trials):
                with contextlib.suppress(Exception):  # the next beat may get through
                    self.beat(trial_id)
