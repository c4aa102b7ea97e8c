"""For notebooks: a range test, a whole study and a plot from Python, with the defaults of the commands.

`from pipeline import range_test, tune, trials, LearningRateFinder`.  The objects that come back
display themselves; their figures are plotly figures.
"""

from __future__ import annotations

import functools
import html
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import KnownError
from pipeline.progress import Reporter, sparkline
from pipeline.report.doubts import NOTHING_REMEDY, learned_nothing
from pipeline.report.export import best_json, keras_code, write_results
from pipeline.report.figures.range_tests import RangeTestInfo, draw_range_test, draw_range_tests
from pipeline.report.page import render
from pipeline.report.range_page import range_test_info_of
from pipeline.report.records import Recommendation, StudyRecord, curves_frame, load_record, recommend, trials_frame
from pipeline.report.summary import summary
from pipeline.search.range_test import RangeTest, analyse_ramp, ramp, run_range_test
from pipeline.study_file import Study, read_study, study_of
from pipeline.study_template import as_toml
from pipeline.training.divergence import RANGE_TEST_RULE, diverges
from pipeline.training.optimizers import DEFAULT_OPTIMIZERS, OPTIMIZERS, find_optimizer
from pipeline.training.splits import Split

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from pipeline.search.fit import Fitted


# -- range test ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeTests:
    """Range tests of one model, one per optimizer; a notebook shows them as a table.

    Attributes:
        tests: the result by optimizer.
    """

    tests: Mapping[str, RangeTest]

    def __getitem__(self, optimizer: str) -> RangeTest:
        """Return the range test of an optimizer."""
        return self.tests[optimizer]

    @property
    def suggested(self) -> dict[str, float]:
        """Return the learning rate to try first, by optimizer."""
        return {name: test.suggested for name, test in self.tests.items()}

    @property
    def bounds(self) -> pd.DataFrame:
        """Return a row per optimizer: low, suggested, high, status."""
        import pandas as pd

        keys = ("optimizer", "low", "suggested", "high", "status")
        return pd.DataFrame([{key: getattr(test, key) for key in keys} for test in self.tests.values()])

    def figure(self) -> go.Figure:
        """Return the smoothed losses of all optimizers over the learning rate, bounds and marks included."""
        return draw_range_tests(self._infos())

    def _infos(self) -> list[RangeTestInfo]:
        return [range_test_info_of(test) for test in self.tests.values()]

    def __repr__(self) -> str:
        lines = []
        for i in self._infos():
            numbers = f"{i.low:>9.3g} {i.suggested:>10.3g} {i.high:>9.3g}"
            lines.append(f"{i.optimizer:<12} {sparkline(i.smoothed):<20} {numbers}  {i.status}")
        return "\n".join([f"{'optimizer':<12} {'smoothed loss':<20} {'low':>9} {'suggested':>10} {'high':>9}", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(i.optimizer)}</th><td><code>{sparkline(i.smoothed)}</code></td><td>{i.low:.3g}</td>"
            f"<td><b>{i.suggested:.3g}</b></td><td>{i.high:.3g}</td>"
            f"<td>{html.escape(f'{i.status}: {i.note}')}</td></tr>"
            for i in self._infos()
        )
        heads = "".join(f"<th>{h}</th>" for h in ("optimizer", "smoothed loss", "low", "suggested", "high", "status"))
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def range_test(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    optimizers: Sequence[str] = DEFAULT_OPTIMIZERS,
    batch_size: int = 32,
    steps: int = 60,
    low: float = 1e-6,
    high: float = 10.0,
    epochs: int = 30,
    seed: int = 0,
) -> RangeTests:
    """Run a learning rate range test per optimizer from the model's present weights (Smith 2015, 2018).

    The model is left as it was: weights, optimizer, compiled loss and metrics, random state.

    Args:
        model: a compiled Keras model; its own optimizer is not used.
        x, y: samples and targets as `fit` takes them: arrays or frames, or dicts, tuples or lists of them.
        optimizers: names as in a study file.
        batch_size: samples per step.
        steps: mini-batches of the ramp.
        low, high: first and last learning rate.
        epochs: length of the runs that the bounds are for, in epochs.
        seed: seed of the shuffle.

    Raises:
        KnownError: when model and data do not fit, or an optimizer is unknown.
    """
    from pipeline.search.soundness import first_loss
    from pipeline.training.data import make_data
    from pipeline.training.engine import Engine

    for name in optimizers:
        find_optimizer(name)
    data = make_data("range_test", x, y)
    with _left_as_it_was(model) as keep:
        engine = Engine(lambda: model, data, batch_size=batch_size, seed=seed, frozen_bytes=0)
        keep()  # what the engine had to build
        samples = np.arange(data.samples, dtype=np.int32)
        split = Split(samples, samples[: min(len(samples), batch_size)], seed)
        total = epochs * split.steps_per_epoch(batch_size)
        first_loss(engine, optimizers[0], split, "range_test")
        return RangeTests(
            {
                name: run_range_test(engine, name, split, low=low, high=high, steps=steps, total_steps=total)
                for name in optimizers
            }
        )


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[Callable[[], None]]:
    """Put a model's variables, optimizer and training functions, and Python's random states, back at the end.

    Yields a function that keeps the variables that are new since, as a model has when it is built.
    """
    import random

    kept: dict[int, tuple[Any, Any]] = {}

    def keep() -> None:
        kept.update({id(v): (v, v.numpy()) for v in model.variables if id(v) not in kept})

    keep()
    optimizer = model.optimizer
    states = np.random.get_state(), random.getstate()
    try:
        yield keep
    finally:
        model.optimizer = optimizer
        for variable, value in kept.values():
            variable.assign(value)
        model.train_function = model.test_function = None
        np.random.set_state(states[0])
        random.setstate(states[1])


# -- a whole study ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A finished study; a notebook shows its answer.

    Attributes:
        study: the study file that was written for it, with all keys.
        record: everything that was stored.
        report: the report, an HTML page.
    """

    study: Study
    record: StudyRecord
    report: Path
    _module: ModuleType = field(repr=False)

    @property
    def answer(self) -> Recommendation:
        """Return the recommendation.

        Raises:
            KnownError: when no trial ran through, or none learned anything.
        """
        return answer_of(self.record)

    @property
    def best(self) -> dict[str, Any]:
        """Return the recommendation as in best.json; without its values where no trial learned anything.

        Raises:
            KnownError: when no trial ran through.
        """
        found = recommend(self.record)
        return best_json(self.record, found if found is not None else answer_of(self.record))

    @property
    def code(self) -> str:
        """Return the recommendation as Keras code."""
        return keras_code(self.record, self.answer)

    @property
    def trials(self) -> pd.DataFrame:
        """Return a row per trial, as in trials.csv."""
        return trials_frame(self.record)

    @property
    def curves(self) -> pd.DataFrame:
        """Return a row per trial, fold and epoch, as in curves.csv."""
        return curves_frame(self.record)

    def figure(self, name: str = "landscape") -> go.Figure:
        """Return a figure of the report.

        Args:
            name: "landscape" (value over learning rate), "range tests", "curves" (of the recommendation),
                "importance" or "history".
        """
        from pipeline.report.figures import course, curves, mattered, range_tests

        record = self.record

        def importance() -> go.Figure:
            info = mattered.importance_info(record)
            if info is None:
                raise KnownError("importance: fewer than twelve trials, or only one choice was open.")
            return mattered.draw_importance(info)

        known: dict[str, Callable[[], go.Figure]] = {
            "landscape": lambda: mattered.draw_landscape(mattered.landscape_info(record), record.monitor.label),
            "range tests": lambda: draw_range_tests(range_tests.range_test_info(record)),
            "curves": lambda: curves.draw_curves(curves.curves_info(record, self.answer.trial)),
            "importance": importance,
            "history": lambda: course.draw_history(
                course.history_info(record), record.monitor.label, len(record.trials)
            ),
        }
        if name not in known:
            raise KnownError(f"figure must be one of {', '.join(known)}, got '{name}'.")
        return known[name]()

    def fit(self, folder: Path | str | None = None) -> Fitted:
        """Train the recommendation on all training data, look at the test set once, and save `model.keras`.

        Args:
            folder: where the model is saved; None takes the study's folder.
        """
        place = Path(folder) if folder is not None else self.study.output
        return fit_answer(self.study, self.record, self.answer, place, module=self._module)

    def __repr__(self) -> str:
        return summary(self.record, [self.report]).strip()

    def _repr_html_(self) -> str:
        text = summary(self.record, []).rstrip()
        said, _, code = text.partition("\n\n    ")
        shown = "".join(f"<p>{html.escape(line)}</p>" for line in said.strip().splitlines())
        return (
            f"<div>{shown}<pre>{html.escape(self.code) if code else ''}</pre>"
            f"<p>Report: <code>{html.escape(str(self.report))}</code></p></div>"
        )


def answer_of(record: StudyRecord) -> Recommendation:
    """Return a study's recommendation.

    Raises:
        KnownError: when no trial ran through, or none learned anything.
    """
    found = recommend(record)
    if found is None:
        raise KnownError(f"{record.name}: no trial ran through, so there is no answer.")
    nothing = learned_nothing(record)
    if nothing is not None:
        raise KnownError(f"{record.name}: nothing is recommended. {nothing} {NOTHING_REMEDY}")
    return found


def fit_answer(
    study: Study,
    record: StudyRecord,
    answer: Recommendation,
    folder: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    module: ModuleType | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Train a study's recommendation on all training data, however few of them the study looked at.

    Its keys are those that the study ran with, options of `lrtune tune` included: a decay is laid out
    over the study's epochs, and the model gets the study's parameters.

    Args:
        study: the study.
        record: what it stored.
        answer: its recommendation.
        folder: where the model is saved.
        overrides: values by dotted key that replace the study's.
        module: the objective itself, where the study file names none.
        on_epoch: called with (epochs done, training loss).
    """
    from pipeline.search.fit import fit_recommended
    from pipeline.search.prepare import objective_of

    if record.study_file is not None:
        keys = deepcopy(dict(record.study_file))
        kept = keys.get("objective")
        kwargs = kept.get("kwargs", {}) if isinstance(kept, Mapping) else {}
        keys["objective"] = {"path": study.config.objective.path, "kwargs": kwargs}  # the file may have moved
        study = replace(study, config=study_of(study.path, keys, overrides).config)
    return fit_recommended(
        objective_of(study, limit=None, module=module),
        answer.configuration,
        folder,
        epochs=answer.epochs,
        decay_epochs=study.config.epochs,
        batch_size=record.batch_size(answer.configuration),
        frozen_bytes=round(study.config.engine.frozen_memory * 2**20),
        seed=study.config.seed,
        monitor=record.monitor.name,
        plateau_rates=answer.trial.mean_rates(answer.epochs),
        way=(record.proof or {}).get("way", {}),
        on_epoch=on_epoch,
    )


def tune(
    build_model: Callable[[], Any],
    data: Any,
    *,
    name: str = "study",
    folder: Path | str | None = None,
    progress: bool = True,
    **keys: Any,
) -> Tuned:
    """Run a study as `lrtune tune` does: range tests, trials, confirmation, report.

    Args:
        build_model: function without arguments that returns a compiled Keras model.
        data: what `load_data` returns: `(x_train, y_train), (x_test, y_test)`, or `(x, y)`, or `tf.data`
            datasets; or a function that returns it.
        name: name of the study.
        folder: where study file, storage and results go; a study that is there already is resumed.  None
            takes a new temporary folder.
        progress: whether progress is printed.
        keys: keys of a study file: `trials=20, epochs=10, search={"optimizers": ["adam"]}`.

    Raises:
        KnownError: for everything that would keep the study from running, in one message.
    """
    from pipeline.search.prepare import prepare
    from pipeline.search.study import StudyRunner

    if not callable(build_model) or hasattr(build_model, "train_step"):
        raise KnownError(
            "tune: build_model must be a function that returns a new compiled model whenever it is called, got a "
            f"{type(build_model).__name__}. Put what makes it into a function: def build_model(): ...; return model"
        )
    module = ModuleType("notebook")
    module.build_model = build_model  # type: ignore[attr-defined]
    module.load_data = data if callable(data) else lambda: data  # type: ignore[attr-defined]
    place = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="lrtune-"))
    study = _write_study(place, name, keys)
    reporter = Reporter(quiet=not progress)
    prepared = prepare(study, reporter, module)
    try:
        StudyRunner(prepared, reporter).run()
    finally:
        prepared.objective.build_model.restore()  # a model of the notebook's own is as it was before
    record = load_record(study)
    write_results(record, study.output, render(record))
    return Tuned(study, record, study.output / "report.html", module)


def _write_study(folder: Path, name: str, keys: Mapping[str, Any]) -> Study:
    """Write a study file of the keys given, so that the commands can read the study too."""
    if not name or Path(name).name != name or name.startswith("."):
        raise KnownError(f"name must be a file's name without folders, got '{name}'.")
    folder.mkdir(parents=True, exist_ok=True)
    # A model that lives in this process cannot be loaded by others.
    whole = {"objective": "notebook", **keys, "workers": {"count": 1, **keys.get("workers", {})}}
    path, aside = folder / f"{name}.toml", folder / f".{name}.toml"
    aside.write_text(as_toml(whole), encoding="utf-8")
    try:
        study = read_study(aside)
    except KnownError as error:
        aside.unlink()
        raise KnownError(str(error).replace(f"{aside}: ", "tune: ")) from None
    aside.replace(path)
    return Study(path, study.config, folder / name)


def trials(study_file: Path | str) -> pd.DataFrame:
    """Return a row per trial of a study, as in trials.csv: `trials("studies/digits.toml")`.

    Raises:
        StorageError: when the storage holds no such study.
    """
    return trials_frame(load_record(read_study(Path(study_file))))


# -- a callback ------------------------------------------------------------------------------


@functools.cache
def learning_rate_finder() -> type:
    """Return the class `LearningRateFinder`; Keras is imported when it is first asked for."""
    from pipeline.training.tensorflow_import import import_tensorflow

    tf: Any
    keras: Any
    tf, keras = import_tensorflow()
    base: Any = keras.callbacks.Callback

    class LearningRateFinder(base):  # type: ignore[misc]
        """Keras callback that runs a learning rate range test inside `fit`, and then puts everything back.

        `finder = LearningRateFinder(); model.fit(x, y, callbacks=[finder]); finder.figure()`.  Fitting ends
        after `steps` batches or when the loss blows up; weights, optimizer and learning rate are restored.

        Args:
            low, high: first and last learning rate.
            steps: mini-batches of the ramp, over as many epochs as `fit` runs.
            total_steps: steps of the runs that the bounds are for; None takes ten times the usual ramp's.
        """

        def __init__(
            self, low: float = 1e-6, high: float = 10.0, steps: int = 60, total_steps: int | None = None
        ) -> None:
            super().__init__()
            self.rates = ramp(low, high, steps)
            self.total_steps = total_steps
            self.losses: list[float] = []
            self._result: RangeTest | None = None

        def on_train_begin(self, logs: Any = None) -> None:
            """Keep what the ramp will change; a model without weights yet is first built on the first batch."""
            model, optimizer = self.model, self.model.optimizer
            rate = getattr(optimizer, "_learning_rate", None)
            if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
                raise KnownError("LearningRateFinder needs an optimizer with a plain learning rate, got a schedule.")
            self._name = _optimizer_name(optimizer)
            self._kept: list[tuple[Any, Any]] = []
            self.losses = []
            self._result = None
            if all(layer.built for layer in model._flatten_layers()):
                self._keep()
                return
            train = model.train_function

            def build_and_train(batches: Any) -> Any:
                model.train_function = train
                batch = next(batches)
                try:  # a trace makes every variable and changes none
                    tf.function(model.train_step, autograph=False).get_concrete_function(batch)
                except Exception as error:
                    raise KnownError(
                        f"LearningRateFinder cannot build this model ({type(error).__name__}: {error}). Call it once "
                        "on a batch before fit."
                    ) from error
                self._keep()
                model.optimizer.learning_rate = self.rates[0]
                return train(itertools.chain([batch], batches))

            model.train_function = build_and_train

        def _keep(self) -> None:
            optimizer = self.model.optimizer
            if not optimizer.built:
                optimizer.build(self.model.trainable_variables)
            self._kept = [(v, v.numpy()) for v in (*self.model.variables, *optimizer.variables)]

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            """Set the rate of this step; metrics start anew, so that `loss` is the batch's own."""
            if self._kept and len(self.losses) < len(self.rates):
                self.model.optimizer.learning_rate = self.rates[len(self.losses)]
            self.model.reset_metrics()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            """Record the loss, and stop at the end of the ramp or when it blows up."""
            if len(self.losses) == len(self.rates):
                return
            self.losses.append(float((logs or {})["loss"]))
            if len(self.losses) == len(self.rates) or diverges(self.losses, RANGE_TEST_RULE) is not None:
                self.model.stop_training = True  # Keras looks at it at the end of the epoch

        def on_train_end(self, logs: Any = None) -> None:
            """Put weights, optimizer and learning rate back."""
            for variable, value in self._kept:
                variable.assign(value)

        @property
        def result(self) -> RangeTest:
            """Return bounds, suggestion and status.

            Raises:
                KnownError: before `fit` has run.
            """
            if not self.losses:
                raise KnownError("LearningRateFinder has nothing to show before model.fit(..., callbacks=[finder]).")
            if self._result is None:
                rates = self.rates[: len(self.losses)]
                self._result = analyse_ramp(self._name, rates, self.losses, total_steps=self.total_steps)
            return self._result

        @property
        def suggested(self) -> float:
            """Return the learning rate to try first."""
            return self.result.suggested

        def figure(self) -> go.Figure:
            """Return the plot: loss over the learning rate, bounds shaded, suggestion marked."""
            return draw_range_test(range_test_info_of(self.result))

        def __repr__(self) -> str:
            return repr(RangeTests({self._name: self.result})) if self.losses else "LearningRateFinder (not run yet)"

        def _repr_html_(self) -> str:
            return RangeTests({self._name: self.result})._repr_html_() if self.losses else html.escape(repr(self))

    return LearningRateFinder


def _optimizer_name(optimizer: Any) -> str:
    """Return the name that a study file has for a Keras optimizer."""
    kind = type(optimizer).__name__
    if kind == "SGD":
        return ("nesterov" if optimizer.nesterov else "momentum") if optimizer.momentum else "sgd"
    for name, spec in OPTIMIZERS.items():
        if spec.keras_class == kind:
            return name
    raise KnownError(f"LearningRateFinder knows the optimizers {', '.join(OPTIMIZERS)}, got {kind}.")
