"""The commented study file that `lrtune init` writes: every key with its default."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import KnownError, ObjectiveError, did_you_mean
from pipeline.user_code import training_line

TEMPLATE = """\
# {name}: which learning rate, decay scheme and optimizer suit {objective}?
# Check it with 'lrtune check', run it with 'lrtune tune'.  What is commented out shows the default.

objective = "{objective}"       # or {{ path = "{objective}", kwargs = {{ units = 64 }} }} for parameters
# monitor     = "val_loss"      # any compiled metric with "val_" before it
{epochs}
{batch_size}
# steps_per_epoch = 500         # for tf.data datasets without an end
# trials      = 60              # in all, over every restart
# timeout     = "2h"            # in all; without it there is no limit
# seed        = 0
# test_fraction = 0.2           # held out when load_data returns only (x, y)
# fraction    = 0.1             # a quick run on this share of the training samples; or limit = 5000

[search]
# optimizers     = ["sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw"]
# decays         = ["constant", "linear", "step", "exponential", "time", "cosine"]
# final_fraction = {{ low = 0.001, high = 1.0 }}       # last rate over first rate
# learning_rate  = {{ low = 1e-4, high = 1e-1 }}       # given: no range test
# learning_rate  = {{ values = [0.1, 0.01, 0.001] }}   # a sweep: exactly these
# batch_size     = {{ values = [32, 64, 128] }}        # and momentum, weight_decay, warmup_fraction, clipnorm

[range_test]
# low   = 1e-6
# high  = 10.0
# steps = 60                    # or epochs = 1

[validation]
{scheme}
# folds  = 5

[pruning]
# pruner = "median"             # or "percentile", "successive-halving", "hyperband", "none"

[workers]
# count = "auto"                # processes side by side, by measurement; or a number

[stop]
# patience = 20                 # given: end after so many trials that are not 1% better than the best

[confirm]
# finalists = 3                 # 0: no confirmation
# repeats   = 5

[tensorboard]
# logs = false                  # the learning curves for TensorBoard too

[storage]
# url = "sqlite:///studies.db"  # or postgresql+psycopg://user@host/database, for many machines
"""

SCHEME = '# scheme = "k-fold"             # or "repeated-k-fold", "group-k-fold", "time-series", "hold-out", "given"'
BY_GROUPS = 'scheme = "group-k-fold"         # by groups(), which the objective has; or one of the others'


def new_study(objective: Path) -> tuple[Path, list[str]]:
    """Write a study file beside an objective, under its name.

    Args:
        objective: the Python file with `build_model` and `load_data`; it is read, not run.

    Returns:
        The study file, and what was seen in the objective, a line each.

    Raises:
        ObjectiveError: when the objective is missing, is no Python, or lacks a function.
        KnownError: when the study file exists or cannot be written.
    """
    if objective.suffix != ".py":
        raise ObjectiveError(f"{objective}: must be a Python file (.py) with build_model and load_data.")
    try:
        tree = ast.parse(objective.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ObjectiveError(f"{objective}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except SyntaxError as error:
        raise ObjectiveError(f"{objective}: is not valid Python: {error.msg} (line {error.lineno}).") from None
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for wanted in ("build_model", "load_data"):
        if wanted not in names and "*" not in names:
            raise ObjectiveError(f"{objective}: must define {wanted}(){did_you_mean(wanted, names) if names else ''}")
    study = objective.with_suffix(".toml")
    notes, line = [], training_line(objective)
    if line is not None:
        notes.append(
            f"{objective} trains whenever it is imported (line {line}); put that under 'if __name__ == \"__main__\":'"
        )
    constants = _constants(tree)
    text = TEMPLATE.format(
        name=study.name,
        objective=objective.name.replace("\\", "\\\\").replace('"', '\\"'),
        scheme=BY_GROUPS if any(_gives_groups(node) for node in tree.body) else SCHEME,
        epochs=_key_line("epochs", 30, "length of a run; decays end with it", constants),
        batch_size=_key_line("batch_size", 32, "tf.data datasets bring their own", constants),
    )
    try:
        with study.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise KnownError(f"{study}: exists already. Edit it, or move it away first.") from None
    except OSError as error:
        raise KnownError(f"{study}: cannot be written: {error.strerror}.") from None
    return study, notes


def _gives_groups(node: ast.stmt) -> bool:
    """Return whether a statement defines a function `groups` that can be called without arguments."""
    if not isinstance(node, ast.FunctionDef) or node.name != "groups":
        return False
    given = node.args
    return len(given.posonlyargs + given.args) == len(given.defaults) and None not in given.kw_defaults


def _constants(tree: ast.Module) -> dict[str, int]:
    """Return whole numbers above 0 that a program names in capitals."""
    found = {}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper() and isinstance(value, ast.Constant):
                found[target.id] = value.value
    return {name: value for name, value in found.items() if type(value) is int and value > 0}


def _key_line(key: str, default: int, says: str, constants: Mapping[str, int]) -> str:
    """Return a key's line: the program's own value where it names one, else the default, commented out."""
    names = (key.upper(), f"N_{key.upper()}", f"NUM_{key.upper()}", *(("BATCH",) if key == "batch_size" else ()))
    name = next((name for name in names if name in constants), None)
    if name is None:
        return f"# {key:<11} = {default:<15} # {says}"
    return f"{key:<11} = {constants[name]:<17} # {name} of the objective; {says}"


def as_toml(keys: Mapping[str, Any]) -> str:
    """Return keys of a study file as TOML; keys without a value are left out.

    Args:
        keys: nested tables of numbers, texts, flags and lists.

    >>> print(as_toml({"objective": {"path": "a.py", "kwargs": {}}, "search": {"decays": ["cosine"]}}), end="")
    objective = "a.py"
    <BLANKLINE>
    [search]
    decays = ["cosine"]
    """
    objective = keys.get("objective")
    if isinstance(objective, Mapping) and not objective.get("kwargs"):
        keys = {**keys, "objective": objective["path"]}
    inline = ("objective",)
    lines = [f"{_key(k)} = {toml_value(v)}" for k, v in keys.items() if v is not None and not _is_table(k, v, inline)]
    for name, table in keys.items():
        if _is_table(name, table, inline):
            lines += [
                "",
                f"[{_key(name)}]",
                *(f"{_key(k)} = {toml_value(v)}" for k, v in table.items() if v is not None),
            ]
    return "\n".join(lines) + "\n"


def _is_table(name: str, value: Any, inline: tuple[str, ...]) -> bool:
    return isinstance(value, Mapping) and name not in inline


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)


def toml_value(value: Any) -> str:
    """Return a value as it stands in a study file."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
