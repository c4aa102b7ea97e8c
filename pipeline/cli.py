"""The command `lrtune`: one thin function per command, and the exit codes in one place.

Results go to standard output, progress to standard error.  Commands that train import TensorFlow
when they run; `--help`, `status`, `report` and `dashboard` never do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer._click.exceptions import ClickException, UsageError

from pipeline import __version__
from pipeline.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_KNOWN_ERROR,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    KnownError,
    NoAnswerError,
    did_you_mean,
)
from pipeline.words import counted

EXIT_CODES = """Exit codes: 0 done; 1 a known error, explained on standard error; 2 wrong usage;
3 unexpected, with the path of a log; 130 interrupted, with the command that resumes."""

app = typer.Typer(
    name="lrtune",
    help="Find the learning rate, decay scheme and optimizer that a Keras model should be trained with.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (TOML).", show_default=False)]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="Folder of the results, instead of one beside the study file.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object, and progress as one JSON object per line."),
]
KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}
KEYS_HELP = "\n\nAny key of the study file can be given as an option: --trials 10 --validation.folds 3."


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        print(f"lrtune {__version__}")
        raise typer.Exit


@app.command(
    context_settings=KEYS,
    help="Run a study, or resume it: range test, trials, confirmation, report." + KEYS_HELP,
    epilog="Example: lrtune tune studies/digits.toml --trials 10",
)
def tune(
    context: typer.Context,
    study: StudyArgument,
    output: OutputOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw away the trials of an earlier run of this study first.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    from pipeline.progress import Reporter
    from pipeline.report.export import check_writable

    settings = _read(context, study, output)
    reporter = Reporter(quiet, as_json)
    check_writable(settings.output)
    _end_gracefully()
    _say_resume(shlex.join(["lrtune", *(word for word in sys.argv[1:] if word != "--fresh")]))
    rates = settings.config.search.learning_rate
    kind = f"a sweep of {len(rates.values)} rates" if rates and rates.values else f"{settings.config.trials} trials"
    reporter.stage("study", f"{settings.name}: {settings.config.objective.path}, {kind}")
    from pipeline.report.dashboard import published
    from pipeline.search.prepare import prepare
    from pipeline.search.study import StudyRunner

    runner = StudyRunner(prepare(settings, reporter), reporter)
    old_copy = published(settings) if fresh else None
    try:
        runner.run(fresh=fresh)
    except KeyboardInterrupt:
        # What is there so far is worth a look; a second Ctrl-C ends at once.
        with contextlib.suppress(Exception):
            _write_report(settings)
        raise
    except NoAnswerError:
        # Its trials say why; results of an earlier study must not stand beside them.
        _write_report(settings)
        raise
    import time

    from pipeline.words import duration

    if old_copy is not None:
        old_copy.unlink(missing_ok=True)
    _write_report(settings, reporter, "json" if as_json else "text")
    reporter.stage("done", f"in {duration(time.monotonic() - reporter.started)}")


@app.command(
    "range-test",
    context_settings=KEYS,
    help="Run only the learning rate range tests: a table and a plot." + KEYS_HELP,
    epilog="Example: lrtune range-test studies/digits.toml",
)
def range_test(
    context: typer.Context,
    study: StudyArgument,
    output: OutputOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    from pipeline.progress import Reporter, sparkline
    from pipeline.report.export import check_writable, write_files

    settings = _read(context, study, output)
    reporter = Reporter(quiet, as_json)
    check_writable(settings.output)
    from pipeline.report.figures.range_tests import compared_finding
    from pipeline.report.range_page import range_test_files, range_test_info_of
    from pipeline.search.prepare import prepare, range_tests
    from pipeline.search.soundness import prove

    prepared = prepare(settings, reporter)
    for doubt in prove(prepared).doubts:
        reporter.stage("doubt", doubt)
    tests = range_tests(prepared, reporter)
    infos = [range_test_info_of(test) for test in tests.values()]
    if not as_json:
        print(f"{'optimizer':<10} {'smoothed loss':<20} {'low':>9} {'suggested':>10} {'high':>9}  status")
    for info in infos if not as_json else ():
        line = sparkline([None if v is None else min(v, 1.5 * (info.smoothed[0] or v)) for v in info.smoothed])
        numbers = f"{info.low:>9.3g} {info.suggested:>10.3g} {info.high:>9.3g}"
        print(f"{info.optimizer:<10} {line:<20} {numbers}  {info.status}: {info.note}")
    reporter.stage("compared", compared_finding(infos))
    written = write_files(settings.output, range_test_files(settings.name, tests))
    for path in written:
        reporter.stage("wrote", str(path))
    if as_json:
        keys = ("optimizer", "low", "suggested", "high", "status", "note")
        bounds = [{key: getattr(info, key) for key in keys} for info in infos]
        _print_json({"study": settings.name, "bounds": bounds, "files": [str(path) for path in written]})


@app.command(
    context_settings=KEYS,
    help="Rebuild report and result files from the storage, without TensorFlow." + KEYS_HELP,
    epilog="Example: lrtune report studies/digits.toml",
)
def report(
    context: typer.Context, study: StudyArgument, output: OutputOption = None, as_json: JsonOption = False
) -> None:
    from pipeline.database import no_garbage
    from pipeline.progress import Reporter
    from pipeline.report.export import check_writable

    settings = _read(context, study, output)
    check_writable(settings.output)
    with no_garbage():  # looking for it among the millions of numbers of a large study costs a quarter of the time
        _write_report(settings, Reporter(as_json=as_json), "json" if as_json else "text")


@app.command(
    help="Compare studies: their answers, what they cost, and their curves on the same axes.",
    epilog="Example: lrtune compare studies/a.toml studies/b.toml --output comparison.html",
)
def compare(
    studies: Annotated[
        list[Path], typer.Argument(metavar="STUDY STUDY...", help="Two study files or more.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", help="The page to write.")] = Path("comparison.html"),
    as_json: JsonOption = False,
) -> None:
    from pipeline.report.compare import compare_rows, compare_text, differences, write_comparison
    from pipeline.report.records import load_record
    from pipeline.study_file import read_study

    if len(studies) < 2:
        raise UsageError("compare needs at least two studies, got one.")
    if output.is_dir():
        raise UsageError(f"--output must name a page to write, got the folder {output}.")
    records = [load_record(read_study(path)) for path in studies]
    written = write_comparison(records, output)
    if as_json:
        _print_json({"studies": compare_rows(records), "notes": differences(records), "file": str(written)})
    else:
        print(f"{compare_text(records)}\n\nPage: {written}")


@app.command(
    context_settings=KEYS,
    help="Show trials by state, the best so far and the time left." + KEYS_HELP,
    epilog="Example: lrtune status studies/digits.toml",
)
def status(context: typer.Context, study: StudyArgument, as_json: JsonOption = False) -> None:
    from pipeline.report.status import status_of

    found = status_of(_read(context, study, None))
    if as_json:
        _print_json(vars(found))
    else:
        print(found.text())


@app.command(
    context_settings=KEYS,
    help="Check study file, objective and data on a few batches, beside model.fit; change nothing." + KEYS_HELP,
    epilog="Example: lrtune check studies/digits.toml",
)
def check(
    context: typer.Context, study: StudyArgument, quiet: QuietOption = False, as_json: JsonOption = False
) -> None:
    from pipeline.progress import Reporter

    settings = _read(context, study, None)
    from pipeline.search.prepare import prepare
    from pipeline.search.soundness import prove

    reporter = Reporter(quiet, as_json)
    prepared = prepare(settings, reporter)
    proof = prove(prepared)
    folds = len(prepared.splits)
    lengths = [split.steps_per_epoch(prepared.engine.batch_size) for split in prepared.splits]
    steps, most = min(lengths), max(lengths)
    if as_json:
        facts = {"study": settings.name, "samples": prepared.objective.train.samples, "folds": folds}
        monitored = {"monitor": prepared.monitor.name, "mode": prepared.monitor.mode}
        told = {"doubts": list(proof.doubts), "notes": list(proof.notes)}
        _print_json({**facts, "steps_per_epoch": steps, **monitored, "first_loss": proof.first_loss, **told})
        return
    for doubt in proof.doubts:
        print(f"Doubt: {doubt}")
    for note in proof.notes:
        print(f"Note: {note}.")
    sound = f"runs, with {counted(len(proof.doubts), 'doubt')}" if proof.doubts else "sound"
    print(
        f"{study}: {sound}. {_samples(prepared)}, {folds if folds > 1 else 'no'} folds, "
        f"{steps if steps == most else f'{steps} to {most}'} steps per epoch, optimizing "
        f"{prepared.monitor.label} ({prepared.monitor.mode}); loss of the first batch {proof.first_loss:.4g}."
    )


def _samples(prepared: Any) -> str:
    """Return how many samples a study has, and what for where they are not split by lrtune."""
    from pipeline.training.data import Data

    objective, held = prepared.objective, prepared.splits[0].sizes[1]
    if isinstance(objective.train, Data) and objective.given is None:
        return str(objective.train.counted)
    trained = objective.train.counted if objective.given is None else f"{objective.given} samples"
    return f"{trained}, {held} more for validation"


@app.command(
    context_settings=KEYS,
    help="Join a study that 'lrtune tune' has begun: run its trials until none is left. A machine without the study "
    "file gives the study's name and the storage; its definition is kept there, and only the objective is needed."
    + KEYS_HELP,
    epilog="Examples: lrtune worker studies/digits.toml; lrtune worker digits --storage postgresql://me@host/lrtune",
)
def worker(
    context: typer.Context,
    study: Annotated[
        Path,
        typer.Argument(metavar="STUDY", help="The study file (TOML); or the study's name, with --storage."),
    ],
    quiet: QuietOption = False,
) -> None:
    from pipeline.progress import Reporter

    reporter = Reporter(quiet)
    if study.suffix == ".toml" or study.is_file():
        settings = _read(context, study, None)
    else:
        from pipeline.search.definition import stored_study

        settings = stored_study(str(study), parse_overrides(context.args))
    _end_gracefully()
    _say_resume(shlex.join(["lrtune", *sys.argv[1:]]))
    from pipeline.search.prepare import prepare
    from pipeline.search.study import StudyRunner

    runner = StudyRunner(prepare(settings, reporter), reporter)
    runner.trials.on_hang = lambda: os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # begins anew
    runner.join()


@app.command(
    context_settings=KEYS,
    help="Open the Optuna dashboard on a study's storage." + KEYS_HELP,
    epilog="Example: lrtune dashboard studies/digits.toml --port 8081",
)
def dashboard(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(metavar="[STUDY]", help="The study file.")] = Path("studies/digits.toml"),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8080,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; the dashboard has no login.")
    ] = "127.0.0.1",
) -> None:
    from pipeline.report.dashboard import serve

    serve(_read(context, study, None), host, port)


@app.command(
    context_settings=KEYS,
    help="Train the recommendation on all training data, evaluate once on the test set, save model.keras." + KEYS_HELP,
    epilog="Example: lrtune fit studies/digits.toml",
)
def fit(
    context: typer.Context,
    study: StudyArgument,
    output: OutputOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    from pipeline.progress import Reporter
    from pipeline.report.export import check_writable
    from pipeline.report.records import load_record

    settings = _read(context, study, output)
    check_writable(settings.output)
    record = load_record(settings)
    from pipeline.api import answer_of, fit_answer

    answer = answer_of(record)
    reporter = Reporter(quiet, as_json)
    used = "training and validation" if record.definition.get("validation.scheme") == "given" else "training"
    reporter.stage("fit", f"{answer.configuration.describe()}, {counted(answer.epochs, 'epoch')} on all {used} data")

    with reporter.bar("epochs", answer.epochs) as bar:
        fitted = fit_answer(
            settings,
            record,
            answer,
            settings.output,
            overrides=parse_overrides(context.args),
            on_epoch=lambda done, loss: bar.update(done, f"loss {loss:.4g}"),
        )
    if as_json:
        _print_json(
            {
                "model": str(fitted.path) if fitted.path else None,
                "saved": fitted.saved,
                "epochs": answer.epochs,
                "test": fitted.test,
                "train": fitted.train,
                "note": fitted.note,
            }
        )
        return
    for name, value in fitted.test.items():
        print(f"test {name} {value:.4g}")
    if fitted.test and fitted.note:
        print(f"Note: {fitted.note}")
    if not fitted.test:
        print("No test samples: load_data() returns none, so nothing was evaluated.")
    if fitted.path is None:
        raise KnownError(f"{study}: {fitted.saved}")
    print(fitted.saved)


@app.command(
    help="Write a commented study file beside your own objective; the objective is read, not run.",
    epilog="Example: lrtune init objectives/digits.py",
)
def init(
    objective: Annotated[
        Path, typer.Argument(metavar="FILE.py", help="Your Python file with build_model and load_data.")
    ],
    quiet: QuietOption = False,
) -> None:
    from pipeline.study_template import new_study

    path, notes = new_study(objective)
    said = shlex.quote(str(path))
    for note in () if quiet else notes:
        print(f"Note: {note}", file=sys.stderr)
    print(f"Wrote {path}. Next: lrtune check {said}, then lrtune tune {said}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _write_report(settings: Any, reporter: Any = None, answer: str = "none") -> None:
    """Write every result file from the storage, publish it in the dashboard, and print the answer.

    Args:
        settings: the study.
        reporter: told when the dashboard cannot have it.
        answer: "text", "json" or "none".
    """
    from pipeline.report.dashboard import publish
    from pipeline.report.export import best_json, write_results
    from pipeline.report.page import render
    from pipeline.report.records import load_record, recommend
    from pipeline.report.summary import summary

    record = load_record(settings)
    paths = write_results(record, settings.output, render(record))
    try:
        publish(settings, record, settings.output / "report.html")
    except KnownError as error:  # a storage that is only read, a folder that is: the files are written all the same
        if reporter is not None:
            reporter.stage("dashboard", f"has no note of this report: {error}")
    if settings.config.tensorboard.logs:
        from pipeline.report.tensorboard import write_logs

        write_logs(record, settings.output / "tensorboard")
    if settings.config.mlflow.runs:
        from pipeline.report.mlflow import tracking_uri, write_runs

        write_runs(record, tracking_uri(settings.config.mlflow.tracking_uri, settings.path.resolve().parent))
    if answer == "text":
        print(summary(record, paths))
    elif answer == "json":
        found = recommend(record)
        best = best_json(record, found) if found is not None else None
        _print_json({"study": record.name, "answer": best, "files": [str(path) for path in paths]})


def _read(context: typer.Context, path: Path, output: Path | None) -> Any:
    """Read the study file with the options that override its keys."""
    from pipeline.study_file import read_study

    return replace(read_study(path, parse_overrides(context.args), output), options=_said_again(context.args))


def _said_again(arguments: list[str]) -> tuple[str, ...]:
    """Return options as they were given, but for where things are kept, which may hold a password.

    >>> _said_again(["--trials", "10", "--storage=sqlite:///a.db", "--monitor", "val_loss"])
    ('--trials', '10', '--monitor', 'val_loss')
    """
    said: list[str] = []
    queue = list(arguments)
    while queue:
        words = [queue.pop(0)]
        if "=" not in words[0] and queue:
            words.append(queue.pop(0))
        if not words[0].startswith(("--storage", "--mlflow")):
            said += words
    return tuple(said)


def parse_overrides(arguments: list[str]) -> Mapping[str, Any]:
    """Turn `--key value` and `--key=value` into values by dotted key, read as TOML.

    Raises:
        UsageError: for an option that is no key of a study file, or has no value.

    >>> parse_overrides(["--trials", "10", "--search.optimizers=['sgd']", "--monitor", "val_loss"])
    {'trials': 10, 'search.optimizers': ['sgd'], 'monitor': 'val_loss'}
    """
    from pipeline.study_file import key_names

    known = key_names()
    found: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--"):
            raise UsageError(f"Got unexpected extra argument ({argument})")
        name, equals, text = argument[2:].partition("=")
        key = name.replace("-", "_")
        if key not in known and not key.startswith("objective.kwargs."):
            raise UsageError(f"No such option: {argument.split('=')[0]}{did_you_mean(name, known)}")
        if not equals:
            if not queue:
                raise UsageError(f"Option --{name} needs a value.")
            text = queue.pop(0)
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


_resume_command = "the same command"


def _say_resume(command: str) -> None:
    global _resume_command
    _resume_command = command


def _on_terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _end_gracefully() -> None:
    """Take SIGTERM for Ctrl-C, and end at once at the second of them.

    A handler in Python waits until TensorFlow comes back from an epoch; a thread that reads the signals' numbers
    from a pipe does not.  The operating system drops this process's locks, so its trial runs again.
    """
    import threading

    signal.signal(signal.SIGTERM, _on_terminate)
    if any(thread.name == "signals" for thread in threading.enumerate()):
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        seen = 0
        while seen < 2:
            seen += sum(number in (signal.SIGINT, signal.SIGTERM) for number in os.read(read, 1))
        _say_interrupted()
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _say_interrupted() -> None:
    print(f"\nInterrupted; nothing that was finished is lost. Resume with: {_resume_command}", file=sys.stderr)


def main() -> None:
    """Run the command line; every exit code is decided here."""
    code = EXIT_DONE
    try:
        result = app(standalone_mode=False, prog_name="lrtune")
        code = result if isinstance(result, int) else EXIT_DONE
    except typer.Exit as stop:
        code = stop.exit_code
    except KnownError as error:
        print(f"lrtune: {error}", file=sys.stderr)
        code = EXIT_KNOWN_ERROR
    except ClickException as error:
        error.show()
        code = error.exit_code if isinstance(error, UsageError) else EXIT_KNOWN_ERROR
        code = EXIT_USAGE if isinstance(error, UsageError) else code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_KNOWN_ERROR
    except Exception as error:
        handle, log = tempfile.mkstemp(prefix="lrtune-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"lrtune {__version__}: {' '.join(sys.argv)}\n\n{traceback.format_exc()}")
        print(
            f"lrtune: unexpected {type(error).__name__}: {error}\nThe traceback is in {log}; please report it.",
            file=sys.stderr,
        )
        code = EXIT_UNEXPECTED
    if code == EXIT_INTERRUPTED:
        _say_interrupted()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
