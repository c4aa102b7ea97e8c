"""Open the storage that holds a study: any SQLAlchemy URL, SQLite tuned for a search that resumes.

Reading and writing studies goes through Optuna; this module only opens the database and turns its
errors into messages.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StorageError, reason_of
from pipeline.locks import FileLocks, Locks, ServerLocks, exclusively

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

LAYOUT = 1
"""Version of what lrtune stores in a study's user attributes."""

STALE_BEATS = 3
"""A trial whose process let so many heartbeats pass is taken for dead, on a database server."""

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

    >>> without_password("postgresql://me:secret@host/db")  # pragma: allowlist secret
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


def check_layout(where: object, layout: object) -> None:
    """Refuse a study that another version of lrtune laid out.

    Args:
        where: the study file.
        layout: what the study says of itself.

    Raises:
        StorageError: naming both layouts and the ways out.
    """
    if layout != LAYOUT:
        raise StorageError(
            f"{where}: the study in storage has layout {layout}, this lrtune reads layout {LAYOUT}. "
            "Use the lrtune version that made it, or start anew with --fresh."
        )


def open_storage(url: str, *, create: bool, heartbeat: float = 20.0, patience: float = 300.0) -> RDBStorage:
    """Open a storage.

    Args:
        url: an SQLAlchemy URL; SQLite paths are absolute or relative to the working directory.
        create: make the database when it does not exist.
        heartbeat: seconds between two signs of life of a running trial, on a database server.
        patience: seconds to go on asking a server that cannot be reached.

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
        from pipeline.database import Database, PatientDatabase

        if path is None:
            beat = max(1, round(heartbeat)), max(1, round(STALE_BEATS * heartbeat))
            return PatientDatabase(url, server_arguments(url), beat=beat, patience=patience)
        storage = Database(url, engine_kwargs={"connect_args": connect})
        _tune_sqlite(storage.engine)
    return storage


def locks_of(url: str, folder: Path, study: str, patiently: Callable[[Callable[[], Any]], Any]) -> Locks:
    """Return the locks of a study: the server's on PostgreSQL, else files on this machine.

    Args:
        url: the storage's URL.
        folder: the study file's folder, for a storage that is no file.
        study: the study's name.
        patiently: calls a function again while the server cannot be reached.
    """
    path = sqlite_path(url)
    if path is not None:
        return FileLocks(path.parent, f"{path.name}-{study}")
    if url.startswith("postgresql"):
        from sqlalchemy import create_engine

        engine = create_engine(url, pool_pre_ping=True, pool_size=2, connect_args=server_arguments(url))
        return ServerLocks(engine, without_password(url), study, patiently)
    return FileLocks(folder, f"remote-{study}")


def server_arguments(url: str) -> dict[str, Any]:
    """Return options of a connection that speaks UTF-8 and notices within a minute that its server is gone."""
    if not url.startswith(("postgresql://", "postgresql+psycopg")):
        return {}
    options: dict[str, Any] = {"client_encoding": "utf8", "connect_timeout": 10}
    options |= {"keepalives_idle": 20, "keepalives_interval": 10, "keepalives_count": 3}
    return {name: value for name, value in options.items() if f"{name}=" not in url}


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


def is_of_storage(error: BaseException) -> bool:
    """Return whether an error comes from the database."""
    import sqlalchemy.exc

    # Optuna's own error is told by its name: importing Optuna for that costs a glance its speed.
    of_database = isinstance(error, sqlalchemy.exc.SQLAlchemyError | sqlite3.Error)
    return of_database or type(error).__name__ == "StorageInternalError"


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn the database's errors into one message with its remedy."""
    import sqlalchemy.exc

    shown = without_password(url)
    try:
        yield
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError, ImportError, ModuleNotFoundError) as error:
        raise StorageError(
            f"storage.url: {shown} cannot be opened ({reason_of(error)}). Expected something like "
            "sqlite:///studies.db or postgresql+psycopg://user@host/database, with its driver installed."
        ) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and re.search("runtime optuna version|optuna storage upgrade", str(error)):
            raise StorageError(
                f"storage.url: {shown} was made by another Optuna version ({reason_of(error)}). "
                "Upgrade it with 'optuna storage upgrade', or use another database."
            ) from error
        if not is_of_storage(error):
            raise
        reason = reason_of(error)
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
