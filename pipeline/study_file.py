"""The study file: TOML in, frozen configuration out, every mistake reported at once.

A study file is data and runs no code.  Keys that change what a trial's value means are part of
the study's definition (see `Study.definition`): a study is only resumed under the same ones.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.errors import StudyFileError, did_you_mean
from pipeline.storage import anchored
from pipeline.training.decays import DECAYS, DEFAULT_DECAYS, LOWEST_FRACTION, LOWEST_RATE
from pipeline.training.optimizers import DEFAULT_OPTIMIZERS, OPTIMIZERS

PRUNERS = ("median", "percentile", "successive-halving", "hyperband", "none")
BACKENDS = ("loky", "dask", "ray")
SAMPLERS = ("tpe", "random", "grid", "qmc", "cma-es", "gp")


def seconds(text: Any) -> float:
    """Return a duration in seconds: a number, or numbers with units s, m, h, d.

    >>> seconds("1h 30m")
    5400.0
    """
    if isinstance(text, bool):
        raise ValueError('must be a duration such as "2h", "90m" or a number of seconds')
    if isinstance(text, int | float):
        value = float(text)
    else:
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd]?)", str(text).lower())
        if not parts or not re.fullmatch(r"(\s*\d+(?:\.\d+)?\s*[smhd]?)+\s*", str(text).lower()):
            raise ValueError('must be a duration such as "2h", "90m" or a number of seconds')
        value = sum(float(number) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for number, unit in parts)
    if not value > 0:
        raise ValueError("must be above 0 seconds")
    return value


def one_of(kind: str, known: Iterable[str]) -> BeforeValidator:
    """Return a validator for a name out of a list, with the nearest one in its message."""
    names = tuple(known)

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"must be the name of {kind} in quotes")
        if value not in names and value.replace("_", "-") in names:
            return value.replace("_", "-")
        if value not in names:
            raise ValueError(f"'{value}' is not {kind}{did_you_mean(value, names)}")
        return value

    return BeforeValidator(check)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Section(BaseModel):
    """A table of the study file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Rate = Annotated[float, Field(ge=LOWEST_RATE, le=1e6, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=LOWEST_FRACTION, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


class RateChoice(Section):
    """Learning rates: `{ low, high }` to search between them, or `{ values }` for a sweep."""

    low: Rate | None = None
    high: Rate | None = None
    values: tuple[Rate, ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> RateChoice:
        _check_choice(self.low, self.high, self.values)
        return self


class FractionChoice(Section):
    """Final fractions: `{ low, high }` or `{ values }`."""

    low: Fraction | None = None
    high: Fraction | None = None
    values: tuple[Fraction, ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> FractionChoice:
        _check_choice(self.low, self.high, self.values)
        return self


def _check_choice(low: float | None, high: float | None, values: tuple[float, ...] | None) -> None:
    if values is not None:
        if low is not None or high is not None:
            raise ValueError("takes { low, high } or { values }, not both")
        if not values:
            raise ValueError("values must hold at least one number, got []")
        if len(set(values)) < len(values):
            raise ValueError(f"values must differ, got {list(values)}")
    elif low is None or high is None:
        raise ValueError("takes { low = ..., high = ... } or { values = [...] }")
    elif low >= high:
        raise ValueError(f"low must be below high, got low={low:g}, high={high:g}. Swap them?")


SEARCHED_VALUES = 5
"""A range of a further dimension is searched at so many values: each is an optimizer traced once."""


class SettingChoice(Section):
    """Values of a further dimension: `{ low, high }`, searched at five values between them, or `{ values }`."""

    low: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    high: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    values: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> SettingChoice:
        _check_choice(self.low, self.high, self.values)
        return self

    def spread(self, spacing: str) -> tuple[float, ...]:
        """Return the values to choose from.

        Args:
            spacing: "linear", "log", or "one minus" for values that approach 1.
        """
        if self.values is not None:
            return self.values
        assert self.low is not None and self.high is not None
        if spacing == "one minus":
            found = 1.0 - np.geomspace(1.0 - self.low, 1.0 - self.high, SEARCHED_VALUES)
        elif spacing == "log" and self.low > 0:
            found = np.geomspace(self.low, self.high, SEARCHED_VALUES)
        else:
            found = np.linspace(self.low, self.high, SEARCHED_VALUES)
        return tuple(float(f"{value:.4g}") for value in found)


class BatchSizeChoice(Section):
    """Batch sizes: `{ low, high }`, searched at the powers of two times `low`, or `{ values }`."""

    low: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    high: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    values: tuple[Annotated[int, Field(ge=1, le=10_000_000)], ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> BatchSizeChoice:
        _check_choice(self.low, self.high, self.values)
        return self

    def spread(self) -> tuple[int, ...]:
        """Return the batch sizes to choose from.

        >>> BatchSizeChoice(low=16, high=100).spread()
        (16, 32, 64)
        """
        if self.values is not None:
            return self.values
        assert self.low is not None and self.high is not None
        return tuple(self.low << power for power in range((self.high // self.low).bit_length()))


SETTINGS = {"momentum": "one minus", "weight_decay": "log", "warmup_fraction": "linear", "clipnorm": "log"}
"""Further dimensions of the search, and how a range of them is spread."""


class RangeTestSection(Section):
    """`[range_test]`: the ramp of the learning rate range test."""

    low: Rate = 1e-6
    high: Rate = 10.0
    steps: Annotated[int, Field(ge=10, le=100_000)] = 60
    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    window: Annotated[int, Field(ge=1, le=10_000)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> RangeTestSection:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low={self.low:g}, high={self.high:g}. Swap them?")
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError(
                f"steps and epochs both say how long the ramp is, got {self.steps} and {self.epochs:g}. Remove one."
            )
        return self

    def length(self, steps_per_epoch: int) -> int:
        """Return the length of the ramp in steps."""
        return self.steps if self.epochs is None else max(10, round(self.epochs * steps_per_epoch))


class SearchSection(Section):
    """`[search]`: what is sampled."""

    optimizers: tuple[Annotated[str, one_of("an optimizer", OPTIMIZERS)], ...] = DEFAULT_OPTIMIZERS
    decays: tuple[Annotated[str, one_of("a decay scheme", DECAYS)], ...] = DEFAULT_DECAYS
    final_fraction: FractionChoice = FractionChoice(low=0.001, high=1.0)
    learning_rate: RateChoice | None = None
    momentum: SettingChoice | None = None
    weight_decay: SettingChoice | None = None
    warmup_fraction: SettingChoice | None = None
    clipnorm: SettingChoice | None = None
    batch_size: BatchSizeChoice | None = None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Return the batch sizes to choose from; none where they are not searched."""
        return self.batch_size.spread() if self.batch_size is not None else ()

    def settings(self) -> dict[str, tuple[float, ...]]:
        """Return the values to choose from of every further dimension that is searched."""
        given = {name: getattr(self, name) for name in SETTINGS}
        found = {name: choice.spread(SETTINGS[name]) for name, choice in given.items() if choice is not None}
        return {**found, "batch_size": self.batch_sizes} if self.batch_sizes else found

    @field_validator("momentum", "warmup_fraction")
    @classmethod
    def _below_one(cls, value: SettingChoice | None) -> SettingChoice | None:
        highest = max((value.high or 0.0, *(value.values or ()))) if value is not None else 0.0
        if highest >= 1:
            raise ValueError(f"must be below 1, got {highest:g}")
        return value

    @field_validator("clipnorm")
    @classmethod
    def _above_zero(cls, value: SettingChoice | None) -> SettingChoice | None:
        if value is not None and min(v for v in (value.low, *(value.values or ())) if v is not None) <= 0:
            raise ValueError("must be above 0; leave the key out for no clipping")
        return value

    @model_validator(mode="after")
    def _has_an_optimizer(self) -> SearchSection:
        for name in ("momentum", "weight_decay"):
            if getattr(self, name) is not None and not any(name in OPTIMIZERS[o].settings for o in self.optimizers):
                able = ", ".join(o for o, spec in OPTIMIZERS.items() if name in spec.settings)
                raise ValueError(f"{name} is searched, but no optimizer here has it; add one of {able}")
        return self

    @field_validator("optimizers", "decays")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one, got []")
        doubles = sorted({name for name in value if value.count(name) > 1})
        if doubles:
            raise ValueError(f"must name each only once, got '{doubles[0]}' {value.count(doubles[0])} times")
        return value


class ObjectiveSection(Section):
    """`[objective]`: the Python file, and values for the parameters of its functions."""

    path: Annotated[str, Field(min_length=1)]
    kwargs: dict[str, Any] = {}


def _objective_table(value: Any) -> Any:
    """Take a bare path for a table."""
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, dict):
        raise ValueError("must be a path in quotes, or a table with path and kwargs")
    return value


def _storage_table(value: Any) -> Any:
    """Take a bare URL for a table."""
    if isinstance(value, str):
        return {"url": value}
    if not isinstance(value, dict):
        raise ValueError("must be a URL in quotes, or a table with url, heartbeat and patience")
    return value


SCHEMES = ("k-fold", "repeated-k-fold", "group-k-fold", "time-series", "hold-out", "given")


class ValidationSection(Section):
    """`[validation]`: how training samples are set aside to judge a trial."""

    scheme: Annotated[str, one_of("a validation scheme", SCHEMES)] = "k-fold"
    folds: Annotated[int, Field(ge=2, le=1000)] = 5
    repeats: Annotated[int, Field(ge=2, le=1000)] = 2
    gap: Annotated[int, Field(ge=0)] = 0
    fraction: OpenFraction = 0.2
    stratify: bool = True

    @property
    def fold_count(self) -> int:
        """Return the runs of a trial: its folds, over all repeats; a hold-out is one."""
        if self.scheme in ("hold-out", "given"):
            return 1
        return self.folds * (self.repeats if self.scheme == "repeated-k-fold" else 1)

    def unused(self) -> list[str]:
        """Return the keys that the scheme does not look at."""
        used = {
            "k-fold": {"folds", "stratify"},
            "repeated-k-fold": {"folds", "repeats", "stratify"},
            "group-k-fold": {"folds", "stratify"},
            "time-series": {"folds", "gap"},
            "hold-out": {"fraction", "stratify"},
            "given": set(),
        }[self.scheme]
        return sorted({"folds", "repeats", "gap", "fraction", "stratify"} - used)


class PruningSection(Section):
    """`[pruning]`: when a hopeless trial ends."""

    pruner: Annotated[str, one_of("a pruner", PRUNERS)] = "median"
    percentile: Annotated[float, Field(gt=0, lt=100)] = 25.0


class SamplerSection(Section):
    """`[sampler]`: how configurations are drawn."""

    name: Annotated[str, one_of("a sampler", SAMPLERS)] = "tpe"


class StopSection(Section):
    """`[stop]`: when more trials are not worth it, before their number is reached."""

    patience: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.01


class TensorboardSection(Section):
    """`[tensorboard]`: the learning curves once more, as logs for TensorBoard."""

    logs: bool = False


class MlflowSection(Section):
    """`[mlflow]`: the trials once more, as runs of MLflow."""

    runs: bool = False
    tracking_uri: Annotated[str, Field(min_length=1)] | None = None


class ConfirmSection(Section):
    """`[confirm]`: the finalists and the Keras default once more on fresh seeds."""

    finalists: Annotated[int, Field(ge=0, le=100)] = 3
    repeats: Annotated[int, Field(ge=2, le=1000)] = 5


class EngineSection(Section):
    """`[engine]`: how training is compiled."""

    xla: bool | Literal["auto"] = "auto"
    frozen_memory: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 2048.0


class CheckpointSection(Section):
    """`[checkpoint]`: what a trial that is cut off goes on from."""

    minutes: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 5.0
    disk: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 2048.0


class WorkersSection(Section):
    """`[workers]`: processes that train side by side."""

    count: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    backend: Annotated[str, one_of("a joblib backend that can be used here", BACKENDS)] = "loky"
    address: Annotated[str, Field(min_length=1)] | None = None
    at_once: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"

    @property
    def threads_each(self) -> int:
        """Return the threads of each of `count` workers: the cores shared out, where none are set."""
        if self.threads != "auto":
            return int(self.threads)
        return max(1, cores() // (1 if self.count == "auto" else int(self.count)))


class StorageSection(Section):
    """`[storage]`: where trials are kept."""

    url: Annotated[str, Field(min_length=1)] = "sqlite:///studies.db"
    heartbeat: Annotated[float, BeforeValidator(seconds)] = 20.0
    patience: Annotated[float, BeforeValidator(seconds)] = 300.0


class StudyConfig(Section):
    """A whole study file."""

    objective: Annotated[ObjectiveSection, BeforeValidator(_objective_table)]
    monitor: Annotated[str, Field(min_length=1)] = "val_loss"
    mode: Literal["auto", "min", "max"] = "auto"
    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 30
    batch_size: Annotated[int, Field(ge=1, le=10_000_000)] = 32
    steps_per_epoch: Annotated[int, Field(ge=1)] | None = None
    trials: Annotated[int, Field(ge=1, le=10_000_000)] = 60
    timeout: Annotated[float, BeforeValidator(seconds)] | None = None
    trial_timeout: Annotated[float, BeforeValidator(seconds)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    test_fraction: OpenFraction = 0.2
    limit: Annotated[int, Field(ge=1)] | None = None
    fraction: OpenFraction | None = None
    range_test: RangeTestSection = RangeTestSection()
    search: SearchSection = SearchSection()
    validation: ValidationSection = ValidationSection()
    pruning: PruningSection = PruningSection()
    sampler: SamplerSection = SamplerSection()
    stop: StopSection = StopSection()
    confirm: ConfirmSection = ConfirmSection()
    engine: EngineSection = EngineSection()
    tensorboard: TensorboardSection = TensorboardSection()
    mlflow: MlflowSection = MlflowSection()
    checkpoint: CheckpointSection = CheckpointSection()
    storage: Annotated[StorageSection, BeforeValidator(_storage_table)] = StorageSection()
    workers: WorkersSection = WorkersSection()

    @field_validator("fraction")
    @classmethod
    def _one_limit(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("limit") is not None:
            raise ValueError(f"limit says already how many training samples to use; remove one of the two, got {value}")
        return value


WITHOUT_MEANING = (
    "trials",
    "timeout",
    "trial_timeout",
    "stop",
    "confirm",
    "checkpoint",
    "storage",
    "engine",
    "workers",
    "tensorboard",
    "mlflow",
)
"""Keys that change how much of a study is run, and how, but not what a trial's value means."""


@dataclass(frozen=True)
class Study:
    """A study file that was read, with the places it names.

    Attributes:
        path: the study file.
        config: its keys, with defaults filled in.
        output: folder of the results.
        options: the command line's words that replaced keys of the file, for a command that says the same again.
    """

    path: Path
    config: StudyConfig
    output: Path
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the study's name: the file's stem."""
        return self.path.stem

    @property
    def storage_url(self) -> str:
        """Return the storage's URL; a relative SQLite path starts at the study file's folder."""
        return anchored(self.config.storage.url, self.path.resolve().parent)

    def definition(self) -> dict[str, Any]:
        """Return the keys that change what a trial's value means, flat, for comparison on resume."""
        config = self.config.model_dump(mode="json")
        for key in WITHOUT_MEANING:
            config.pop(key)
        if self.config.pruning.pruner != "percentile":
            config["pruning"].pop("percentile")
        # Absent when unused, as in earlier versions.
        for table, names in (
            (config, ("steps_per_epoch", "limit", "fraction")),
            (config["search"], (*SETTINGS, "batch_size")),
            (config["range_test"], ("window", "epochs")),
        ):
            for name in names:
                if table[name] is None:
                    table.pop(name)
        objective = config.pop("objective")
        for name in self.config.validation.unused():
            if name != "stratify":
                config["validation"].pop(name)
        kwargs = {"objective": {"kwargs": objective["kwargs"]}} if objective["kwargs"] else {}
        return {"objective": objective["path"], **flatten(config), **flatten(kwargs)}


CAME_WITH: Mapping[str, Any] = {}
"""Defaults with which keys came, by dotted path, of those whose default has changed since."""


def default_of(key: str) -> Any:
    """Return the default that a key had when it came, which is what a study meant that was begun before; or None.

    >>> default_of("validation.folds"), default_of("data")
    (5, None)
    """
    if key in CAME_WITH:
        return CAME_WITH[key]
    return flatten(StudyConfig.model_validate({"objective": "-"}).model_dump(mode="json")).get(key)


def given_keys(config: StudyConfig) -> dict[str, Any]:
    """Return the keys that file and options set, as they would stand in a study file; the storage stays out.

    What travels to other machines and into reports: a URL may carry a password.
    """
    return config.model_dump(mode="json", exclude_unset=True, exclude={"storage": {"url"}, "mlflow": {"tracking_uri"}})


def flatten(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables by dotted path.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{path}.{key}" if path else str(key)
        flat |= flatten(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


def key_names(model: type[BaseModel] | None = None, path: str = "") -> list[str]:
    """Return every key of a study file by dotted path, tables included."""
    names: list[str] = []
    for name, field in (model or StudyConfig).model_fields.items():
        names.append(f"{path}{name}")
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += key_names(kind, f"{path}{name}.")
    return names


def read_study(path: Path, overrides: Mapping[str, Any] | None = None, output: Path | None = None) -> Study:
    """Read a study file.

    Args:
        path: the TOML file.
        overrides: values by dotted key that replace those of the file, such as {"workers.count": 2}.
        output: folder of the results, instead of one beside the study file.

    Returns:
        The study.

    Raises:
        StudyFileError: when the file is missing or broken; its message lists every mistake.
    """
    if path.is_dir():
        raise StudyFileError(f"{path}: must be a study file (TOML), got a folder.")
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        nearby = [p.name for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, nearby) if nearby else ". Write one with 'lrtune init your_file.py'"
        raise StudyFileError(f"{path}: does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyFileError(f"{path}: cannot be read: {error}") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyFileError(f"{path}: is not valid TOML: {error}") from None
    return study_of(path, table, overrides, output)


def study_of(
    path: Path, table: dict[str, Any], overrides: Mapping[str, Any] | None = None, output: Path | None = None
) -> Study:
    """Return the study of keys as they stand in a study file, read already; arguments and errors as `read_study`."""
    for key, value in (overrides or {}).items():
        if key == "storage" and isinstance(value, str):
            key = "storage.url"
            if isinstance(table.get("storage"), str):
                table["storage"] = {}
        if key.startswith("objective.") and isinstance(table.get("objective"), str):
            table["objective"] = {"path": table["objective"]}
        place = table
        *parents, last = key.split(".")
        for parent in parents:
            below = place.setdefault(parent, {})
            if not isinstance(below, dict):
                raise StudyFileError(f"--{key}: '{parent}' is not a table in {path}.")
            place = below
        place[last] = value
    try:
        config = StudyConfig.model_validate(_tuples(table))
    except ValidationError as error:
        raise StudyFileError("\n".join(_explain(path, table, error))) from None
    folder = output if output is not None else path.parent / path.stem
    return Study(path, config, folder)


def _tuples(value: Any) -> Any:
    """Turn TOML's lists into tuples and whole numbers stay as they are: strict types want both."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "tuple_type": "must be a list in [ ]",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "model_attributes_type": "must be a table",
    "finite_number": "must be a finite number",
    "literal_error": "must be one of {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
}

_REMEDIES = {
    "objective": 'Name your Python file: objective = "objectives/digits.py".',
    "search.learning_rate": "Write { low = 1e-4, high = 1e-1 } or { values = [0.1, 0.01] }.",
    "search.final_fraction": "Write { low = 0.001, high = 1.0 } or { values = [0.01, 0.1] }.",
}


def _explain(path: Path, table: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Return one line per mistake: file, key, rule, value, remedy."""
    lines: dict[str, str] = {}
    for fault in error.errors():
        place = [part for part in fault["loc"] if not str(part).startswith(("function-", "literal[", "bool"))]
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
        kind, value = fault["type"], fault["input"]
        remedy = f" {_REMEDIES[where]}" if where in _REMEDIES else ""
        if kind == "missing":
            lines[where] = f"{path}: {where}: is required.{remedy}"
        elif kind == "extra_forbidden":
            known = _keys_beside(place[:-1])
            lines[where] = f"{path}: {where}: is not a key of a study file{did_you_mean(str(place[-1]), known)}"
        elif kind == "value_error":
            rule = str(fault["ctx"]["error"])
            shown = "" if "got " in rule or " is not a" in rule or isinstance(value, dict) else f", got {_show(value)}"
            lines[where] = f"{path}: {where}: {rule}{shown}.{remedy if isinstance(value, dict) else ''}".replace(
                "?.", "?"
            )
        else:
            rule = _TYPES.get(kind, fault["msg"]).format(**fault.get("ctx", {}))
            lines.setdefault(where, f"{path}: {where}: {rule}, got {_show(value)}.{remedy}")
    return [_printable(line) for line in lines.values()]


def _printable(text: str) -> str:
    """Return a text without characters that move a terminal's cursor, or that no terminal can show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show(value: Any) -> str:
    """Return a value as it stands in TOML, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, tuple | list):
        text = "[" + ", ".join(_show(item) for item in value) + "]"
    else:
        text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys_beside(place: list[Any]) -> list[str]:
    """Return the keys that the table at `place` knows."""
    model: Any = StudyConfig
    for part in place:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        options = [field.annotation] if field else []
        options += list(getattr(options[0], "__args__", ())) if options else []
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), StudyConfig)
    return list(model.model_fields)
