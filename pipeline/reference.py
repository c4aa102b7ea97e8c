"""The reference pages and the editors' schema of the study file, made from the code: `make docs` writes them.

A test compares what is in `docs/` with what this module makes, so that neither can drift.
"""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.study_file import BACKENDS, PRUNERS, SAMPLERS, SCHEMES, StudyConfig
from pipeline.training.decays import DECAYS
from pipeline.training.optimizers import OPTIMIZERS

DESCRIPTIONS = {
    "objective": "Your Python file, from the study file's folder or the working directory; or a module; or a table.",
    "objective.path": "The same, where `objective` is a table.",
    "objective.kwargs": "Values for parameters of `build_model`, `load_data` and `groups`, by name.",
    "monitor": 'What is optimized: any compiled metric with `val_` before it.',
    "mode": "Whether less or more of it is better, where Keras cannot tell.",
    "epochs": "Length of a run, in epochs; decays end with it.",
    "batch_size": "Samples per step. `tf.data` datasets bring their own.",
    "steps_per_epoch": "Steps of an epoch, for `tf.data` datasets without an end.",
    "trials": "Trials in all, over every restart and worker; trial 0 is the Keras default.",
    "trial_timeout": "Time that one trial may take; it fails then, and the study goes on.",
    "timeout": 'Time for all of it, over every restart, such as `"2h"`; a number is in seconds.',
    "seed": "Seed of everything random.",
    "test_fraction": "Share held out as the test set when `load_data` returns only `(x, y)`.",
    "limit": "A quick run on so many training samples; `lrtune fit` takes all.",
    "fraction": "The same as a share of the training samples.",
    "range_test": "The learning rate range test.",
    "range_test.low": "First learning rate of the ramp.",
    "range_test.high": "Last learning rate of the ramp.",
    "range_test.steps": "Mini-batches of the ramp, in steps.",
    "range_test.epochs": "The ramp's length in epochs of the first fold, instead of `steps`.",
    "range_test.window": "Steps of the moving average; without it a tenth of the ramp.",
    "search": "What is sampled.",
    "search.optimizers": "Optimizers to choose from.",
    "search.decays": "Decay schemes to choose from.",
    "search.final_fraction": "Last learning rate over the first: a range or values.",
    "search.learning_rate": "Given: no range test; a range to search, or the values of a sweep.",
    "search.momentum": "A further dimension for optimizers that have it; a range is searched at five values.",
    "search.weight_decay": "A further dimension for optimizers that have it; a range is searched at five values.",
    "search.warmup_fraction": "A further dimension: share of the run in which the rate rises linearly first.",
    "search.clipnorm": "A further dimension: every gradient's norm is clipped to this.",
    "search.batch_size": "A further dimension: a range is searched at the powers of two times `low`.",
    "validation": "How training samples are set aside to judge a trial.",
    "validation.scheme": "Without it `group-k-fold` where there is `groups()`, `given` where `load_data` has its own.",
    "validation.folds": "Folds of the K-fold schemes and of the time series.",
    "validation.repeats": "Repeats of `repeated-k-fold`.",
    "validation.gap": "Samples left out between training and validation of `time-series`.",
    "validation.fraction": "Share held out by `hold-out`.",
    "validation.stratify": "Keep the shares of class labels in every fold.",
    "pruning": "When a hopeless trial ends.",
    "pruning.pruner": "The rule, judged after each fold; a hold-out is judged late, by a margin.",
    "pruning.percentile": "Share of the trials, in percent, that `percentile` keeps.",
    "sampler": "How configurations are drawn.",
    "sampler.name": "`cma-es` and `gp` need the packages cmaes and torch.",
    "stop": "When more trials are not worth it, before their number is reached.",
    "stop.patience": "Given: end after so many trials without a gain.",
    "stop.gain": "What counts as a gain: better than the best by more than this share of it.",
    "confirm": "The finalists and the Keras default once more on fresh seeds and splits.",
    "confirm.finalists": "How many; 0 leaves the confirmation out.",
    "confirm.repeats": "Repeats of each, all folds every time.",
    "engine": "How training is compiled.",
    "engine.xla": "Compile with XLA: yes, no, or by measurement.",
    "engine.frozen_memory": "MiB for the outputs of a frozen body; 0 trains the whole model.",
    "tensorboard": "The learning curves once more, as logs for TensorBoard.",
    "tensorboard.logs": "Write them; needs the package (extra `tensorboard`).",
    "mlflow": "The trials once more, as runs of MLflow in an experiment of the study's name.",
    "mlflow.runs": "Write them; needs the package (extra `mlflow`).",
    "mlflow.tracking_uri": "Where to; without it `MLFLOW_TRACKING_URI`, else `mlflow.db` beside the study file.",
    "checkpoint": "What a trial that is cut off goes on from.",
    "checkpoint.minutes": "Time between two checkpoints inside a fold; a longer fold has one at its end anyway.",
    "checkpoint.disk": "MiB that all checkpoints of a study may take; 0 keeps none inside folds.",
    "storage": "Where trials are kept.",
    "storage.url": "Any SQLAlchemy URL; relative SQLite paths start at the study file's folder.",
    "storage.heartbeat": "Time between two signs of life of a running trial on a database server; dead after three.",
    "storage.patience": "How long a database server that cannot be reached is waited for.",
    "workers": "Processes that train side by side.",
    "workers.count": "How many, or by measurement.",
    "workers.threads": "Threads of each; `auto` shares the cores out.",
    "workers.backend": "The joblib backend that starts them: on this machine, or on a cluster of Dask or Ray.",
    "workers.at_once": "Trials that may run at once, whoever runs them: each is drawn by what the trials up to so many "
    "numbers before it have shown. `auto` is `count`, and 4 at least.",
    "workers.address": "Of the Dask scheduler or the Ray cluster; without it one is started on this machine.",
}  # fmt: skip
"""What every key of a study file says, by its dotted name."""

DURATIONS = ("timeout", "trial_timeout", "storage.heartbeat", "storage.patience")
"""Keys that take a duration."""

NAMES = {
    "search.optimizers": tuple(OPTIMIZERS),
    "search.decays": tuple(DECAYS),
    "validation.scheme": SCHEMES,
    "pruning.pruner": PRUNERS,
    "sampler.name": SAMPLERS,
    "workers.backend": BACKENDS,
}
"""Keys that take names out of a list."""


def _fields(model: type[BaseModel], path: str = "") -> dict[str, Any]:
    """Return the fields of a model and of its tables by dotted name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        found[f"{path}{name}"] = field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.__name__.endswith("Section"):
            found |= _fields(kind, f"{path}{name}.")
    return found


def _kind(key: str, field: Any) -> str:
    """Return in words what a key takes."""
    if key in NAMES:
        listed = ", ".join(f"`{name}`" for name in NAMES[key])
        return f"list of {listed}" if key.startswith("search.") else f"one of {listed}"
    if key in DURATIONS:
        return 'duration such as `"2h"`, or seconds'
    if key == "objective":
        return "path, module or table"
    options = [field.annotation]
    if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(field.annotation) if option is not type(None)]
    words = []
    for option in options:
        while typing.get_origin(option) is typing.Annotated:
            option = typing.get_args(option)[0]
        if typing.get_origin(option) is typing.Literal:
            words += [f'`"{value}"`' for value in typing.get_args(option)]
        elif isinstance(option, type) and issubclass(option, BaseModel):
            words.append("`{ low, high }` or `{ values }`")
        else:
            names = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}
            words.append(names.get(option, "table"))
    return " or ".join(words)


def _default(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "–"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
        return "`{ " + ", ".join(f"{key} = {item:g}" for key, item in value.items()) + " }`"
    return f"`{json.dumps(value)}`"


def study_file_page() -> str:
    """Return the reference of the study file as Markdown, a row per key."""
    fields = _fields(StudyConfig)
    top = [name for name in fields if "." not in name]
    tables = [name for name in top if any(other.startswith(f"{name}.") for other in fields)]
    lines = [
        "# The study file, key by key",
        "",
        "Made from the code by `make docs`. Every key but `objective` has a default; every key is also an option of",
        "the commands: `--trials 10 --validation.folds 3`. Mistakes are reported all at once, with rule, value and",
        "remedy. Editors complete and check study files with [the schema](study-file.schema.json): put",
        "`#:schema docs/study-file.schema.json`, with the path to it, in the first line.",
    ]

    def rows(names: list[str]) -> list[str]:
        heads = ["", "| key | takes | default | says |", "|---|---|---|---|"]
        return heads + [
            f"| `{name.rpartition('.')[2]}` | {_kind(name, fields[name])} | {_default(fields[name])} "
            f"| {DESCRIPTIONS[name]} |"
            for name in names
        ]

    lines += rows([name for name in top if name not in tables or name == "objective"])
    for table in tables:
        if table != "objective":
            lines += ["", f"## `[{table}]`", "", DESCRIPTIONS[table]]
            lines += rows([name for name in fields if name.startswith(f"{table}.")])
    lines += ["", "## `[objective]`", "", "Where the functions of the objective take parameters:"]
    lines += ["", "| key | takes | default | says |", "|---|---|---|---|"]
    lines += [
        f"| `path` | text | required | {DESCRIPTIONS['objective.path']} |",
        f"| `kwargs` | table | `{{}}` | {DESCRIPTIONS['objective.kwargs']} |",
    ]
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """Return a JSON schema of the study file, with descriptions and the names that keys take."""
    found = StudyConfig.model_json_schema()
    definitions = found["$defs"]
    for key in _fields(StudyConfig):
        *parents, name = key.split(".")
        place = found
        for parent in parents:
            place = definitions[place["properties"][parent]["$ref"].rpartition("/")[2]]
        entry = place["properties"][name]
        entry["description"] = DESCRIPTIONS[key].replace("`", "")
        if key in NAMES:
            target = entry["items"] if entry.get("type") == "array" else entry
            target["enum"] = list(NAMES[key])
    table = found["properties"]["objective"]
    found["properties"]["objective"] = {
        "description": table.pop("description"),
        "anyOf": [{"type": "string", "minLength": 1}, {"$ref": table["$ref"]}],
    }
    table = found["properties"]["storage"]
    found["properties"]["storage"] = {
        "description": table.pop("description"),
        "anyOf": [{"type": "string", "minLength": 1}, table],
    }
    for key in DURATIONS:
        *tables, name = key.split(".")
        place = found["$defs"]["StorageSection"] if tables else found
        place["properties"][name] = {
            "description": place["properties"][name]["description"],
            "type": ["number", "string"],
            "exclusiveMinimum": 0,
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "lrtune study file"}


def commands_page() -> str:
    """Return the reference of the commands as Markdown: their own help."""
    import typer
    from typer.testing import CliRunner

    from pipeline.cli import app

    runner, group = CliRunner(), typer.main.get_command(app)
    lines = ["# Commands", "", "Made from `--help` by `make docs`.", ""]
    for name in ["", *group.commands]:  # type: ignore[attr-defined]
        words = [name] if name else []
        text = runner.invoke(app, [*words, "--help"], prog_name="lrtune", terminal_width=100, color=False).output
        body = "\n".join(line.rstrip() for line in text.strip().splitlines())
        lines += [f"## `lrtune {name}`" if name else "## `lrtune`", ""]
        lines += ["```text", body, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """Return everything that is made, by its file name in `docs/`."""
    return {
        "study-file.md": study_file_page(),
        "study-file.schema.json": json.dumps(schema(), indent=2) + "\n",
        "commands.md": commands_page(),
    }


def main() -> None:
    """Write the pages."""
    folder = Path(__file__).resolve().parent.parent / "docs"
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
