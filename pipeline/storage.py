"""Open the storage that holds a study: any SQLAlchemy URL, SQLite tuned for a search that resumes.

Reading and writing studies goes through Optuna; this module only opens the database, turns its
errors into messages, and goes on asking a server that cannot be reached for a while.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StorageError
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
        if path is None:
            return _open_on_server(url, heartbeat, patience)
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": connect})
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


def _open_on_server(url: str, heartbeat: float, patience: float) -> RDBStorage:
    """Open a server's database with a storage that waits while the server cannot be reached."""
    import optuna

    class PatientStorage(optuna.storages.RDBStorage):
        """Optuna's storage, whose calls are made again while the server cannot be reached."""

        waiting = Patience(patience)

        def __init__(self) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                super().__init__(
                    url,
                    engine_kwargs={"pool_pre_ping": True, "connect_args": server_arguments(url)},
                    heartbeat_interval=max(1, round(heartbeat)),
                    grace_period=max(1, round(STALE_BEATS * heartbeat)),
                )

        def set_trial_state_values(self, trial_id: int, state: Any, values: Any = None) -> bool:
            """Set the state; a commit whose answer was lost counts as made."""
            call = super().set_trial_state_values
            try:
                return bool(self.waiting.call(lambda: call(trial_id, state, values)))
            except optuna.exceptions.UpdateFinishedTrialError:
                if self.waiting.waited and self.get_trial(trial_id).state == state:
                    return True
                raise

    def patient(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
            return self.waiting.call(lambda: method(self, *args, **kwargs))

        return call

    # Not `create_new_trial`: one whose answer was lost is found by the queue as a trial of nobody.
    for name in PATIENT:
        setattr(PatientStorage, name, patient(getattr(optuna.storages.RDBStorage, name)))
    return PatientStorage()


def server_arguments(url: str) -> dict[str, Any]:
    """Return options of a connection that speaks UTF-8 and notices within a minute that its server is gone."""
    if not url.startswith(("postgresql://", "postgresql+psycopg")):
        return {}
    options: dict[str, Any] = {"client_encoding": "utf8", "connect_timeout": 10}
    options |= {"keepalives_idle": 20, "keepalives_interval": 10, "keepalives_count": 3}
    return {name: value for name, value in options.items() if f"{name}=" not in url}


PATIENT = (
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_all_studies",
    "get_trial",
    "_get_trials",
    "_get_stale_trial_ids",
    "set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
)
"""Calls that may be made twice."""


class Patience:
    """Makes a call again while the database cannot be reached.

    Args:
        seconds: how long.

    Attributes:
        on_wait: told once per outage what is waited for.
        waited: whether the last call had to wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waited = False
        self._last_outage = float("-inf")
        self.on_wait: Callable[[str], object] = lambda text: None

    @property
    def seconds_since_outage(self) -> float:
        """Return how long ago the database could last not be reached."""
        return time.monotonic() - self._last_outage

    def call(self, function: Callable[[], Any]) -> Any:
        """Return the function's value.

        Raises:
            Exception: what the function raised, when it is no matter of waiting or the time is over.
        """
        began, pause, self.waited = time.monotonic(), 0.1, False
        while True:
            try:
                return function()
            except Exception as error:
                if not is_transient(error) or time.monotonic() - began + pause > self.seconds:
                    raise
                if not self.waited:
                    self.on_wait(f"{_reason(error)}; waiting up to {self.seconds:.0f} s for the database")
                self.waited = True
                time.sleep(pause)
                self._last_outage = time.monotonic()
                pause = min(2 * pause, 5.0)


def patience_of(storage: Any) -> Patience:
    """Return the patience of a storage; one that is a file needs none."""
    found = getattr(getattr(storage, "_backend", storage), "waiting", None)
    return found if isinstance(found, Patience) else Patience(0)


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error says that a database server cannot be reached, or asks to try again."""
    import sqlalchemy.exc

    while error is not None:
        if isinstance(error, sqlalchemy.exc.DBAPIError):
            code = getattr(error.orig, "sqlstate", None)
            unreachable = isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
            if error.connection_invalidated or (unreachable and code is None):
                return not isinstance(error.orig, sqlite3.Error)
            return code is not None and (code[:2] in ("08", "40") or code in ("57P01", "57P02", "57P03", "25P03"))
        error = error.__cause__ or error.__context__
    return False


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
            f"storage.url: {shown} cannot be opened ({_reason(error)}). Expected something like "
            "sqlite:///studies.db or postgresql+psycopg://user@host/database, with its driver installed."
        ) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and re.search("runtime optuna version|optuna storage upgrade", str(error)):
            raise StorageError(
                f"storage.url: {shown} was made by another Optuna version ({_reason(error)}). "
                "Upgrade it with 'optuna storage upgrade', or use another database."
            ) from error
        if not is_of_storage(error):
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
