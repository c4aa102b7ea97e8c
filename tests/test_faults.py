"""What must not end or change a study: a full disk, another clock, another locale, an edited file, company."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_OBJECTIVE, TINY_STUDY
from tests.test_study import spawn, stored, wait_for_trials

pytestmark = pytest.mark.slow

OPTIONS = ("--confirm.finalists", "0", "--engine.xla", "false", "--workers.count", "1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=False)
    if done.returncode:
        pytest.skip("only root can make a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def finished(path: Path) -> dict[int, tuple[object, ...]]:
    """Return what is known of every finished trial."""
    return {t.number: (t.state, t.value, t.params) for t in stored(path).trials if t.state.is_finished()}


def test_a_full_disk_stops_the_study_and_space_lets_it_go_on(small_disk, lrtune):
    """One message; what was stored stays; the same command ends the study."""
    (small_disk / "tiny.py").write_text(TINY_OBJECTIVE)
    study = small_disk / "tiny_study.toml"
    study.write_text(TINY_STUDY)
    first = lrtune("tune", study, *OPTIONS, "--trials", 3, "--output", small_disk.parent / "out")
    assert first.returncode == 0, first.stderr
    filler = small_disk / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 150_000))
    options = (*OPTIONS, "--trials", 100, "--output", small_disk.parent / "out")
    full = lrtune("tune", study, *options)
    assert full.returncode == 1, full.stderr
    assert "Free some space and run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    before = finished(study)
    assert 3 <= len(before) < 100
    filler.unlink()
    again = lrtune("tune", study, *options)
    assert again.returncode == 0, again.stderr
    after = finished(study)
    assert list(after) == list(range(100))
    assert {number: after[number] for number in before} == before


def test_hash_seed_locale_time_zone_and_place_change_no_number(tmp_path):
    """Results to the last digit; a folder with spaces and letters of all kinds; a home that cannot be written."""
    results = []
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o500)
    for name, extra in (
        ("plain", {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C.UTF-8"}),
        ("с пробелом ü 学习", {"PYTHONHASHSEED": "4711", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "HOME": str(home)}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tiny.py").write_text(TINY_OBJECTIVE)
        (folder / "tiny_study.toml").write_text(TINY_STUDY)
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "tune", "tiny_study.toml", *OPTIONS, "--confirm.finalists", "1"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **extra},
            capture_output=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        results.append([(folder / "tiny_study" / file).read_bytes() for file in ("curves.csv", "best.json", "best.py")])
    assert results[0] == results[1]


def test_two_tunes_at_once_share_the_work(tiny):
    """The second joins the first: together they run exactly the trials asked for, and both end well."""
    options = (*OPTIONS, "--trials", "24", "--epochs", "30")
    first = spawn(tiny, *options, "--output", str(tiny.parent / "one"))
    wait_for_trials(tiny, 1, first)
    second = spawn(tiny, *options, "--output", str(tiny.parent / "two"))
    for child in (first, second):
        _, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors.decode()
    assert [t.number for t in stored(tiny).trials] == list(range(24))
    curves = [(tiny.parent / name / "curves.csv").read_bytes() for name in ("one", "two")]
    assert curves[0] == curves[1]


def test_a_study_file_edited_while_it_runs_changes_nothing_of_the_run(tiny, lrtune):
    """The run goes on with the keys it read; the next one is told what was changed."""
    child = spawn(tiny, *OPTIONS, "--trials", "20", "--epochs", "30")
    wait_for_trials(tiny, 1, child)
    tiny.write_text(tiny.read_text().replace("batch_size = 16", "batch_size = 8"))
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors.decode()
    assert len(stored(tiny).trials) == 20
    again = lrtune("tune", tiny, *OPTIONS, "--trials", "20", "--epochs", "30")
    assert again.returncode == 1
    assert "batch_size: was 16, is now 8" in again.stderr


def test_a_clock_that_jumps_changes_no_number(tiny, monkeypatch):
    """Trials that end before they began, by the wall clock: the same results, no negative times."""
    import datetime as real
    import json
    from itertools import cycle

    import optuna.storages._rdb.storage as rdb

    from pipeline.report.export import write_results
    from pipeline.report.page import render
    from pipeline.report.records import load_record
    from pipeline.search.study import seconds_worked
    from pipeline.study_file import read_study
    from tests.test_study import tune

    study = tune(tiny, trials=6)
    expected = [(t.params, t.value) for t in study.trials]

    jumps = cycle([real.timedelta(hours=3), real.timedelta(hours=-5), real.timedelta(days=2)])

    class Jumping(real.datetime):
        @classmethod
        def now(cls, tz: object = None) -> real.datetime:
            return real.datetime.now() + next(jumps)

    monkeypatch.setattr(rdb, "datetime", Jumping)
    study = tune(tiny, fresh=True, trials=6)
    assert [(t.params, t.value) for t in study.trials] == expected
    assert any(t.datetime_complete < t.datetime_start for t in study.trials)
    assert seconds_worked(study.trials) >= 0
    record = load_record(read_study(tiny))
    write_results(record, tiny.parent / "out", render(record))
    assert json.loads((tiny.parent / "out" / "best.json").read_text())


def test_an_older_and_a_newer_layout_are_refused_with_the_remedy(tiny, lrtune):
    """No trial of another layout is mixed in or misread, by any command."""
    from pipeline.storage import LAYOUT
    from tests.test_study import tune

    study = tune(tiny, trials=2)
    for layout in (LAYOUT - 1, LAYOUT + 1):
        study.set_user_attr("layout", layout)
        for command in ("tune", "report", "status", "worker", "fit"):
            done = lrtune(command, tiny)
            assert done.returncode == 1, (command, done.stdout)
            assert f"layout {layout}" in done.stderr and f"reads layout {LAYOUT}" in done.stderr, done.stderr
    study.set_user_attr("layout", LAYOUT)
    assert lrtune("report", tiny).returncode == 0


def test_waiting_for_a_lock_ends_with_a_message(tiny, lrtune):
    """A database that another program holds: waited for as long as the URL says, then named."""
    import sqlite3

    database = tiny.parent / "studies.db"
    sqlite3.connect(database).executescript("CREATE TABLE x (y); PRAGMA journal_mode=DELETE;")
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    done = lrtune("tune", tiny, *OPTIONS, "--storage", f"sqlite:///{database}?timeout=2")
    assert done.returncode == 1
    assert "locked" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - began < 60
    holder.close()
