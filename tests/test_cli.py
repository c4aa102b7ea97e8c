"""The command line: exit codes, messages, nothing written on bad input, no TensorFlow where none is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_OBJECTIVE

COMMANDS = ("tune", "range-test", "report", "status", "check", "fit", "init", "dashboard")


CALL = """
import sys
sys.argv = ["lrtune", *{!r}]
from pipeline.cli import main
try:
    main()
except SystemExit:
    pass
"""


def modules_after(code: str) -> set[str]:
    """Return the modules that a fresh Python has imported after running some code."""
    script = f"{code}\nimport sys, json; sys.stderr.write('\\n@' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.rpartition("@")[2]))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *[[c, "--help"] for c in COMMANDS]])
def test_help_imports_nothing_heavy(arguments):
    """Help imports neither TensorFlow nor Keras, nor pandas, Optuna or scikit-learn."""
    loaded = modules_after(CALL.format(arguments))
    assert not loaded & {"tensorflow", "keras", "pandas", "optuna", "sklearn", "plotly"}


def test_status_imports_no_tensorflow(tiny):
    """Even with a study to show; checked where there is none yet, too."""
    assert not modules_after(CALL.format(["status", str(tiny)])) & {
        "tensorflow",
        "keras",
        "pandas",
        "sklearn",
        "optuna",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(lrtune_here, command):
    """Help says what the command does and how to call it."""
    done = lrtune_here(command, "--help")
    assert done.returncode == 0
    example = "objectives/digits.py" if command == "init" else "studies/digits.toml"
    assert f"Example: lrtune {command} {example}" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["tune"],
        ["tune", "STUDY", "--trails", "3"],
        ["tune", "STUDY", "extra"],
        ["tune", "STUDY", "--trials"],
    ],
)
def test_wrong_usage_is_exit_code_2(lrtune_here, tiny, arguments):
    """Unknown commands, missing arguments, unknown options."""
    done = lrtune_here(*[str(tiny) if a == "STUDY" else a for a in arguments])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if "--trails" in arguments:
        assert "did you mean 'trials'" in done.stderr


def bad_studies() -> dict[str, tuple[str | None, str, str]]:
    """Return study text, objective text and the message expected, by what is wrong."""
    good = 'objective = "tiny.py"\ntrials = 2\nepochs = 1\n'
    loss = "keras.losses.SparseCategoricalCrossentropy(from_logits=True)"
    diverging = TINY_OBJECTIVE.replace(loss, "lambda y, p: p[:, 0] * float('nan')")
    return {
        "missing study": (None, TINY_OBJECTIVE, "does not exist"),
        "broken study": ("objective = [", TINY_OBJECTIVE, "is not valid TOML"),
        "unknown key": (good + "epoch = 3", TINY_OBJECTIVE, "did you mean 'epochs'"),
        "missing objective": ('objective = "nowhere.py"', TINY_OBJECTIVE, "does not exist"),
        "objective does not import": (good, "import nothing_like_this", "cannot be imported"),
        "no build_model": (good, "def load_data(): pass", "must define build_model()"),
        "uncompiled": (good, TINY_OBJECTIVE.replace("model.compile(", "dict("), "compiled model"),
        "lengths": (good, TINY_OBJECTIVE.replace("y[:100])", "y[:99])"), "same number of samples"),
        "nan": (good, TINY_OBJECTIVE.replace("return (x", "x[3] = np.nan; return (x"), "x has 4 NaN or infinite"),
        "labels": (good, TINY_OBJECTIVE.replace('"int64")', '"int64") + 5'), "labels from 0 to 1"),
        "folds": (good + "[validation]\nfolds = 101", TINY_OBJECTIVE, "validation"),
        "rare class": (good, TINY_OBJECTIVE.replace("return (x", "y[:] = 0; y[:3] = 1; return (x"), "class, got 3"),
        "shape": (good, TINY_OBJECTIVE.replace("Input((4,))", "Input((5,))"), "tiny.py: the model cannot be built"),
        "monitor": (good + 'monitor = "val_f1"', TINY_OBJECTIVE, "it has val_loss, val_accuracy"),
        "diverges": (good, diverging, "the first batch must have a finite loss, got nan"),
        "sampler package": (good + '[sampler]\nname = "cma-es"', TINY_OBJECTIVE, "needs the package cmaes"),
        "storage folder": (good + '[storage]\nurl = "sqlite:///no/where.db"', TINY_OBJECTIVE, "does not exist"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_studies())
def test_bad_input_is_one_message_exit_code_1_and_nothing_written(lrtune_here, tmp_path, monkeypatch, name):
    """`tune` refuses before it writes: no database, no results folder, no traceback."""
    monkeypatch.setattr("pipeline.search.samplers.PACKAGES", {"cma-es": "cmaes_that_is_not_installed"})
    text, objective, message = bad_studies()[name]
    (tmp_path / "tiny.py").write_text(objective)
    study = tmp_path / "bad.toml"
    if text is not None:
        study.write_text(text)
    before = {p.name for p in tmp_path.iterdir()}
    done = lrtune_here("tune", study)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == before


def test_an_unwritable_results_folder_is_refused_before_any_work(lrtune_here, tiny):
    """The place is taken by a file; no database is made either."""
    (tiny.parent / "taken").write_text("")
    done = lrtune_here("tune", tiny, "--output", tiny.parent / "taken")
    assert done.returncode == 1
    assert "is a file" in done.stderr
    assert not (tiny.parent / "studies.db").exists()


@pytest.mark.parametrize("kind", ["not a database", "locked"])
def test_an_unusable_database_is_one_message(lrtune_here, tiny, kind):
    """A file of text, and a database that another program holds."""
    import sqlite3

    path = tiny.parent / "studies.db"
    if kind == "locked":
        blocker = sqlite3.connect(path)
        blocker.execute("create table t (x)")
        blocker.commit()
        blocker.execute("begin exclusive")
    else:
        path.write_text("plain text " * 100)
    done = lrtune_here("tune", tiny, "--storage.url", "sqlite:///studies.db?timeout=0.3")
    assert done.returncode == 1
    assert kind in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tiny.parent / "tiny_study").exists()


def test_check_trains_one_batch_and_changes_nothing(lrtune_here, tiny):
    """A sound study is described on standard output; the folder stays as it is."""
    done = lrtune_here("check", tiny)
    assert done.returncode == 0, done.stderr
    assert "sound. 100 samples, 3 folds, 5 steps per epoch, optimizing val_loss (min)" in done.stdout
    assert {p.name for p in tiny.parent.iterdir()} - {"__pycache__"} == {"tiny.py", "tiny_study.toml"}


def test_tune_then_everything_that_reads_it(lrtune, tiny):
    """One study through tune, status, report, a second tune and range-test, with quiet standard error."""
    done = lrtune("tune", tiny)
    assert done.returncode == 0, done.stderr
    assert "Train with " in done.stdout and "report.html" in done.stdout
    for stage in ("study", "data", "engine", "range test", "trials", "done"):
        assert stage in done.stderr
    for chatter in ("oneDNN", "cuda", "rebuild TensorFlow", "WARNING", "absl"):
        assert chatter not in done.stderr
    assert "\x1b[" not in done.stderr + done.stdout

    status = lrtune("status", tiny)
    assert status.returncode == 0
    assert "8 of 8 trials" in status.stdout and "confirmed on fresh seeds" in status.stdout

    (tiny.parent / "tiny_study" / "report.html").unlink()
    assert lrtune("report", tiny).returncode == 0
    assert (tiny.parent / "tiny_study" / "report.html").exists()

    again = lrtune("tune", tiny)
    assert again.returncode == 0
    assert "8 of 8 trials are there" in again.stderr

    ranged = lrtune("range-test", tiny, "--output", tiny.parent / "ranges")
    assert ranged.returncode == 0
    assert [line.split()[0] for line in ranged.stdout.splitlines()] == ["optimizer", "sgd", "adam"]
    assert {p.name for p in (tiny.parent / "ranges").iterdir()} == {"range_test.csv", "bounds.csv", "range_test.html"}


def test_reading_a_study_that_is_not_there(lrtune_here, tiny):
    """Status, report and dashboard name the command that makes it, and make nothing."""
    for command in ("status", "report", "dashboard"):
        done = lrtune_here(command, tiny)
        assert done.returncode == 1
        assert "lrtune tune" in done.stderr
    assert not (tiny.parent / "studies.db").exists()


def test_the_dashboard_serves_the_study_on_this_machine_only(lrtune, tiny):
    """It listens on 127.0.0.1 and knows the study by its name, with readable parameters."""
    import socket

    assert lrtune("tune", tiny, "--trials", "3", "--confirm.finalists", "0").returncode == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "dashboard", str(tiny), "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}/" in server.stdout.readline().decode()
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                    studies = json.load(answer)["study_summaries"]
                break
            except OSError:
                time.sleep(0.1)
        assert [s["study_name"] for s in studies] == ["tiny_study"]
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/api/studies/{studies[0]['study_id']}", timeout=5
        ) as answer:
            detail = json.load(answer)
        assert {p["name"] for p in detail["trials"][1]["params"]} >= {"optimizer", "decay", "lr_position"}
        listening = [
            line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if f":{port:04X} " in line
        ]
        assert listening and all(address.startswith("0100007F:") for address in listening)
    finally:
        server.terminate()
        server.wait(timeout=10)


def test_init_writes_a_study_file_that_is_all_defaults(lrtune_here, tmp_path):
    """It reads without mistakes, changes no default, is never overwritten, and its comments are true."""
    from pipeline.study_file import StudyConfig, read_study

    (tmp_path / "mine.py").write_text(TINY_OBJECTIVE)
    done = lrtune_here("init", tmp_path / "mine.py")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "mine.toml"
    assert read_study(path).config == StudyConfig(objective="mine.py")
    lines = path.read_text().splitlines()
    sweeps = [
        line
        for line in lines
        if line.startswith(
            ("# learning_rate", "# timeout", "# steps_per_epoch", "# patience", "# fraction", "# batch_size     =")
        )
    ]
    assert len(sweeps) == 7
    path.write_text("\n".join(line.removeprefix("# ") for line in lines[3:] if line not in sweeps))
    assert read_study(path).config == StudyConfig(objective="mine.py")
    again = lrtune_here("init", tmp_path / "mine.py")
    assert again.returncode == 1
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("def (", "is not valid Python"),
        ("def build_model(): pass", "must define load_data()"),
    ],
)
def test_init_refuses_what_is_no_objective(lrtune_here, tmp_path, text, message):
    """Nothing is written for a file that is missing, broken or lacks a function; nothing of it is run."""
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    done = lrtune_here("init", tmp_path / "mine.py")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "mine.toml").exists()


def test_fit_trains_on_everything_and_saves_a_model_that_loads(lrtune_here, tiny):
    """The saved model gives the printed test loss on the test set, and nothing else saw that set."""
    import keras
    import numpy as np

    assert lrtune_here("tune", tiny, "--trials", "4").returncode == 0
    done = lrtune_here("fit", tiny)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("test "))
    model = keras.models.load_model(tiny.parent / "tiny_study" / "model.keras")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 4)).astype("float32")
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).astype("int64")
    loss, accuracy = model.evaluate(x[100:], y[100:], verbose=0)
    assert float(printed["loss"]) == pytest.approx(loss, rel=1e-3)
    assert float(printed["accuracy"]) == pytest.approx(accuracy, rel=1e-3)


def test_fit_before_tune_names_the_command(lrtune_here, tiny):
    """Without a study there is nothing to fit."""
    done = lrtune_here("fit", tiny)
    assert done.returncode == 1
    assert "lrtune tune" in done.stderr
