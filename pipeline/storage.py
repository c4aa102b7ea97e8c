"""Open the storage that holds a study: any SQLAlchemy URL, SQLite tuned for a search that resumes.

Reading and writing studies goes through Optuna; this module only opens the database, turns its
errors into messages, and tells on one machine whether the owner of a running trial still lives.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.errors import StorageError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

LAYOUT = 1
"""Version of what lrtune stores in a study's user attributes."""

BUSY_SECONDS = 30
"""How long a locked SQLite database is waited for, in seconds; `?timeout=...` in the URL changes it."""


def sqlite_path(url: str) -> Path | None:
    """Return the database file of a SQLite URL, or None for another kind.

    >>> sqlite_path("sqlite:////tmp/a.db?timeout=1")
    PosixPath('/tmp/a.db')
    """
    if not url.startswith("sqlite:///"):
        return None
    path = url.removeprefix("sqlite:///").split("?")[0].removeprefix("file:")
    return Path(path) if path and path != ":memory:" else None


def anchored(url: str, folder: Path) -> str:
    """Return the URL with a relative SQLite path started at `folder`."""
    path = sqlite_path(url)
    if path is None or path.is_absolute():
        return url
    place, question, options = url.removeprefix("sqlite:///").partition("?")
    prefix = "file:" if place.startswith("file:") else ""
    return f"sqlite:///{prefix}{(folder / path).resolve()}{question}{options}"


def without_password(url: str) -> str:
    """Return the URL as it may be shown.

    >>> without_password("postgresql://me:secret@host/db")
    'postgresql://me:***@host/db'
    """
    from sqlalchemy.engine import make_url

    try:
        return make_url(url).render_as_string(hide_password=True)
    except Exception:  # an unreadable URL is shown only by its scheme: it may hold a password
        return f"{url.split(':', 1)[0]}://..."


def check_exists(url: str) -> None:
    """Refuse a SQLite database that is not there, where reading would make an empty one.

    Raises:
        StorageError: naming the file and the command that makes it.
    """
    path = sqlite_path(url)
    if path is not None and "mode=memory" not in url and not path.exists():
        raise StorageError(f"storage.url: {path} does not exist. Run 'lrtune tune' first.")


def open_storage(url: str, *, create: bool) -> RDBStorage:
    """Open a storage.

    Args:
        url: an SQLAlchemy URL; SQLite paths are absolute or relative to the working directory.
        create: make the database when it does not exist.

    Returns:
        Optuna's storage.

    Raises:
        StorageError: when it does not exist, is no database, is locked, read-only or out of reach.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    path = sqlite_path(url)
    if path is not None and "mode=memory" not in url:
        if not create:
            check_exists(url)
        if path.is_dir():
            raise StorageError(f"storage.url must name a database file, got the folder {path}.")
        if create and not path.parent.is_dir():
            raise StorageError(f"storage.url: the folder {path.parent} does not exist. Create it, or change the URL.")
    connect: dict[str, Any] = {"timeout": BUSY_SECONDS} if path is not None and "timeout=" not in url else {}
    with storage_errors(url), _one_at_a_time(path):
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": connect})
        if path is not None:
            _tune_sqlite(storage.engine)
    return storage


@contextmanager
def _one_at_a_time(path: Path | None) -> Iterator[None]:
    """Let processes that start together make the tables of a SQLite file one after the other."""
    if path is None:
        yield
        return
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    with exclusively(Path(tempfile.gettempdir()) / f"lrtune-{os.getuid()}-{digest}.lock"):
        yield


def _tune_sqlite(engine: Any) -> None:
    """Write-ahead logging and one flush per checkpoint: a commit costs a third, a crash loses none."""
    from sqlalchemy import event

    def pragmas(connection: sqlite3.Connection, _: Any) -> None:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error):  # a read-only database is read as it is
                raise

    event.listen(engine, "connect", pragmas)
    engine.dispose()


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn the database's errors into one message with its remedy."""
    import sqlalchemy.exc

    shown = without_password(url)
    try:
        yield
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError, ImportError, ModuleNotFoundError) as error:
        raise StorageError(
            f"storage.url: {shown} cannot be opened ({_reason(error)}). Expected something like "
            "sqlite:///studies.db or postgresql+psycopg://user@host/database, with its driver installed."
        ) from error
    except Exception as error:
        # Optuna's own error is told by its name: importing Optuna for that costs a glance its speed.
        of_database = isinstance(error, sqlalchemy.exc.SQLAlchemyError | sqlite3.Error)
        if isinstance(error, RuntimeError) and re.search("runtime optuna version|optuna storage upgrade", str(error)):
            raise StorageError(
                f"storage.url: {shown} was made by another Optuna version ({_reason(error)}). "
                "Upgrade it with 'optuna storage upgrade', or use another database."
            ) from error
        if not of_database and type(error).__name__ != "StorageInternalError":
            raise
        reason = _reason(error)
        remedy = "Check that the database is there and can be reached."
        for sign, advice in (
            ("locked", "Another program holds it; end that program, or try again later."),
            ("readonly", "Make the file and its folder writable, or change storage.url."),
            ("read-only", "Make the file and its folder writable, or change storage.url."),
            ("not a database", "Move the file away, or change storage.url."),
            ("malformed", "The file is damaged: restore a copy, or move it away and start again."),
            ("unable to open", "Check that its folder exists and can be written."),
            ("full", "Free some space and run the same command again; nothing that was stored is lost."),
        ):
            if sign in reason:
                remedy = advice
                break
        raise StorageError(f"storage.url: {shown}: {reason}. {remedy}") from error


def _reason(error: BaseException) -> str:
    """Return the innermost error's first line: what the database itself said."""
    while error.__cause__ is not None:
        error = error.__cause__
    original = getattr(error, "orig", None) or error
    return (str(original).strip().splitlines() or [type(original).__name__])[0].rstrip(".")


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

    def alone_now(self) -> bool:
        """Return whether every other process has ended; if so, none can join until `share`."""
        import fcntl

        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            return False
        return True

    def __exit__(self, *_: object) -> None:
        # The file stays: removing it would race with a process that has just opened it.
        if self._file is not None:
            self._file.close()
            self._file = None
