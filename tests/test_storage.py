"""Storage: opening, tuning, and one clear message for every way in which a database can be unusable."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest

from pipeline.errors import KnownError, StorageError
from pipeline.locks import LiveMark
from pipeline.storage import anchored, open_storage, without_password


def test_sqlite_uses_write_ahead_logging(tmp_path):
    """WAL with synchronous=NORMAL: cheaper commits that a crash does not lose."""
    storage = open_storage(f"sqlite:///{tmp_path}/a.db", create=True)
    with storage.engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert raw.execute("PRAGMA synchronous").fetchone() == (1,)


def test_what_is_not_there_is_not_made_for_reading(tmp_path):
    """Reading commands leave no empty database behind."""
    with pytest.raises(StorageError, match=r"does not exist. Run 'lrtune tune' first"):
        open_storage(f"sqlite:///{tmp_path}/a.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database(tmp_path):
    """The file is named and left as it is."""
    (tmp_path / "a.db").write_text("not a database at all, but long enough to be read as one" * 20)
    before = (tmp_path / "a.db").read_bytes()
    with pytest.raises(StorageError, match=r"a\.db.*not a database. Move the file away"):
        open_storage(f"sqlite:///{tmp_path}/a.db", create=True)
    assert (tmp_path / "a.db").read_bytes() == before


def test_a_locked_database_is_waited_for_and_then_named(tmp_path):
    """Another connection holds the write lock for longer than the timeout in the URL."""
    path = tmp_path / "a.db"
    blocker = sqlite3.connect(path)
    blocker.execute("create table t (x)")
    blocker.commit()
    blocker.execute("begin exclusive")
    with pytest.raises(StorageError, match=r"database is locked. Another program holds it"):
        open_storage(f"sqlite:///{path}?timeout=0.2", create=True)
    blocker.rollback()
    open_storage(f"sqlite:///{path}?timeout=0.2", create=True)


def test_a_read_only_database(tmp_path):
    """A database that cannot be written says so and how to mend it."""
    import optuna

    from pipeline.storage import storage_errors

    open_storage(f"sqlite:///{tmp_path}/a.db", create=True).engine.dispose()
    url = f"sqlite:///file:{tmp_path}/a.db?mode=ro&uri=true"
    storage = open_storage(url, create=False)
    with pytest.raises(StorageError, match=r"readonly.*Make the file and its folder writable"), storage_errors(url):
        optuna.create_study(storage=storage)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////no/such/folder/a.db", "the folder /no/such/folder does not exist"),
        ("nonsense", "cannot be opened"),
        ("nosuchdialect://x", "cannot be opened"),
    ],
)
def test_urls_that_cannot_be_opened(url, message):
    """A missing folder, no URL at all, an unknown kind of database."""
    with pytest.raises(StorageError, match=message):
        open_storage(url, create=True)


def test_a_password_is_never_shown():
    """Not in a URL that can be read, and not in one that cannot."""
    assert "secret" not in without_password("postgresql+psycopg://me:secret@host/db")  # pragma: allowlist secret
    assert "secret" not in without_password("postgresql://me:secret@host:notaport/db")  # pragma: allowlist secret


def test_relative_paths_start_at_the_study_files_folder(tmp_path):
    """Absolute paths and other databases stay as they are."""
    assert anchored("sqlite:///a.db", tmp_path) == f"sqlite:///{tmp_path.resolve()}/a.db"
    assert anchored("sqlite:////x/a.db?timeout=1", tmp_path) == "sqlite:////x/a.db?timeout=1"
    assert anchored("sqlite:///./a.db", tmp_path) == f"sqlite:///{tmp_path.resolve()}/a.db"
    assert anchored("sqlite:///sqlite", tmp_path) == f"sqlite:///{tmp_path.resolve()}/sqlite"
    assert anchored("postgresql://h/db", tmp_path) == "postgresql://h/db"


def test_the_live_mark_is_dropped_by_a_process_that_is_killed(tmp_path):
    """While a process lives, a second one is not alone; after kill -9 it is."""
    path = tmp_path / "mark"
    code = (
        "import sys, time; from pathlib import Path; from pipeline.locks import LiveMark\n"
        "with LiveMark(Path(sys.argv[1])) as m: m.share(); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=os.environ)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with LiveMark(path) as mark:
        assert not mark.alone
    child.kill()
    child.wait()
    with LiveMark(path) as mark:
        assert mark.alone


def test_processes_that_start_together_make_one_database(tmp_path):
    """Four processes open a database that is not there yet; none trips over another's tables."""
    code = "import sys; from pipeline.storage import open_storage; open_storage(sys.argv[1], create=True)"
    url = f"sqlite:///{tmp_path}/a.db"
    children = [subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE) for _ in range(4)]
    for child in children:
        _, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors.decode()


def test_a_sampler_that_unpickles_from_the_storage_is_refused_on_a_server(tiny, monkeypatch):
    """Whoever can write to a shared database could else run code on every worker."""
    from pipeline.progress import Reporter
    from pipeline.search import prepare as module
    from pipeline.study_file import read_study

    monkeypatch.setattr(module, "check_sampler", lambda name: None)  # its package may be missing
    keys = {"sampler.name": "cma-es", "storage.url": "postgresql+psycopg://me@127.0.0.1:1/x"}
    with pytest.raises(KnownError, match=r"cma-es.*pickled"):
        module.prepare(read_study(tiny, keys), Reporter(quiet=True))


@pytest.mark.parametrize("trials", [0, 3, 260])
def test_trials_are_read_as_optuna_reads_them(tmp_path, trials):
    """The quick reading gives what Optuna's own gives: every state, value and time, for all and for a few."""
    import optuna
    from optuna.trial import TrialState

    storage = open_storage(f"sqlite:///{tmp_path}/a.db", create=True)
    other = optuna.create_study(storage=storage, study_name="another")
    other.optimize(lambda t: t.suggest_float("x", 0, 1), 2)
    study = optuna.create_study(storage=storage, study_name="a", sampler=optuna.samplers.RandomSampler(0))
    odd = [float("nan"), float("inf"), float("-inf"), 1e-300, 0.1]
    for number in range(trials):
        trial = study.ask()
        trial.suggest_categorical("optimizer", ["sgd", "adam", None, 3])
        trial.suggest_float("rate", 1e-5, 1, log=True)
        trial.suggest_int("size", 1, 9)
        trial.set_user_attr("curves", {"ä": [[0.1, float("inf")], []], "n": None})
        storage.set_trial_system_attr(trial._trial_id, "note", [number])
        trial.report(odd[number % 5], number % 7)
        state = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, None)[number % 4]
        if state is not None:
            study.tell(trial, odd[1 + number % 4] if state == TrialState.COMPLETE else None, state)
    if trials:
        study.enqueue_trial({"rate": 0.5})
        other.optimize(lambda t: t.suggest_float("x", 0, 1), 2)
    ids = [frozen._trial_id for frozen in study.get_trials(deepcopy=False)]

    def facts(trial):
        kept = {name: value for name, value in vars(trial).items() if name != "_values"}
        ordered = {k: dict(sorted(v.items())) if isinstance(v, dict) and k != "_params" else v for k, v in kept.items()}
        return repr((ordered, list(trial.params.items()), trial.values))

    def read(cls, *arguments):
        return [facts(trial) for trial in cls._get_trials(storage, study._study_id, *arguments)]

    questions = [(None, set(), -1), ((TrialState.RUNNING, TrialState.WAITING), set(), -1), ((), set(), -1)]
    if trials:
        questions += [(None, {ids[0]}, ids[-2]), (None, set(ids[:-1]), ids[-2]), (None, set(), ids[-1])]
    for question in questions:
        assert read(type(storage), *question) == read(optuna.storages.RDBStorage, *question)
    assert len(read(type(storage), None, set(), -1)) == (trials + 1 if trials else 0)
