"""The objective: a plain Python file with `build_model` and `load_data`, loaded and checked.

What is wrong with it becomes one message that says where.  Nothing here trains.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ObjectiveError, did_you_mean
from pipeline.training.batches import read_batches
from pipeline.training.building import Builder, fixed_batch, overrides
from pipeline.training.data import Data, Ragged, joined, leaves, make_data
from pipeline.training.optimizers import OPTIMIZERS, build_optimizer
from pipeline.training.seeds import own_draws, seeding_noticed, set_seed
from pipeline.training.splits import class_labels
from pipeline.training.stream import Stream, is_dataset, make_stream, repeatable_shuffles
from pipeline.training.tensorflow_import import import_tensorflow
from pipeline.user_code import PREFIX, UserCode, describe_fault, layer_names


@dataclass(frozen=True)
class Objective:
    """A model and its data, ready to be searched.

    Attributes:
        where: the file or module, as the study file names it.
        path: the file, or None for a module.
        build_model: returns a compiled model.
        train: samples that the search splits, or the stream of them.
        test: samples that only `lrtune fit` sees, or None; a stream carries its own.
        labels: class index per training sample where the targets are class labels, else None.
        groups: group index per training sample, where the study splits by groups, else None.
        given: training samples before the user's own validation samples, which come last; None without such.
        model_digest: short hash of the model's architecture, loss and metrics.
        only_loss: name of the loss, in lower case without underscores, where nothing is added to it or weighs it.
        own_optimizer: the optimizer that the model was compiled with, in words; None for Keras's default.
        own: the same as a name in `OPTIMIZERS` and a rate, where it is one of them with their settings.
        notes: what its author should know, a line each.
        fixed_batch: samples of the only batches that the model takes, or None where it takes any.
        stateful: whether a layer carries its state from batch to batch.
        seeded: whether the program seeds TensorFlow, which makes `model.fit` repeat one order of samples.
        weighted: whether training samples have weights, and validation samples of the program's own; None without.
    """

    where: str
    path: Path | None
    build_model: Builder
    train: Data | Stream
    test: Data | None
    labels: NDArray[np.int64] | None
    groups: NDArray[np.int64] | None
    given: int | None
    model_digest: str
    only_loss: str | None
    own_optimizer: str | None
    own: tuple[str, float] | None
    notes: tuple[str, ...]
    fixed_batch: int | None = None
    stateful: bool = False
    seeded: bool = False
    weighted: tuple[bool, bool | None] = (False, None)

    @property
    def test_weighted(self) -> bool:
        """Return whether the test samples have weights."""
        return self.test is not None and self.test.sample_weight is not None


def load_objective(
    name: str,
    study_folder: Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    test_fraction: float = 0.2,
    ordered: bool = False,
    grouped: bool | None = False,
    seed: int = 0,
    steps_per_epoch: int | None = None,
    limit: int | float | None = None,
    module: ModuleType | None = None,
) -> Objective:
    """Import an objective, load its data, build its model once, and check them against each other.

    Args:
        name: path or module, as in the study file.
        study_folder: the study file's folder.
        kwargs: values for parameters of its functions; each function gets those that it names.
        test_fraction: share held out as the test set when `load_data` returns only (x, y).
        ordered: samples are in the order of time, so that the last of them are held out.
        grouped: call `groups()`; None does so where it takes no arguments and returns a group per sample.
        seed: seed of that hold-out, and of the choice of fewer samples.
        steps_per_epoch: steps of an epoch, for datasets only.
        limit: training samples to use, as a number, or below 1 as a share of them; None uses all.
        module: the objective itself, where it is no file: it has `build_model` and `load_data`.

    Returns:
        The objective.

    Raises:
        ObjectiveError: for everything that is wrong with it, in one message.
    """
    with repeatable_shuffles() as shuffles, own_draws(seed), seeding_noticed(module is not None) as seeded:
        set_seed(seed)  # what the file makes at its top is then the same in every process
        return _load(
            UserCode(name, study_folder, module),
            shuffles,
            seeded,
            dict(kwargs or {}),
            test_fraction,
            ordered,
            grouped,
            seed,
            steps_per_epoch,
            limit,
        )


def _load(
    code: UserCode,
    shuffles: list[Any],
    seeded: list[bool],
    kwargs: dict[str, Any],
    test_fraction: float,
    ordered: bool,
    grouped: bool | None,
    seed: int,
    steps_per_epoch: int | None,
    limit: int | float | None,
) -> Objective:
    _, keras = import_tensorflow()
    name, functions = code.name, _functions(code.name, code.module, kwargs, grouped)
    set_seed(seed)

    @functools.wraps(functions["load_data"])
    def load_data() -> Any:
        return read_batches(f"{name}: load_data()", functions["load_data"](), keras.config.floatx())

    raw = code.call("load_data", load_data)
    train: Data | Stream
    test: Data | None = None
    groups, given = _groups(code, functions.get("groups")) if grouped else None, None
    weighted: tuple[bool, bool | None] = (False, None)
    if is_dataset(raw) or (isinstance(raw, tuple | list) and any(is_dataset(part) for part in raw)):
        _check_opens(code, raw)
        train = make_stream(f"{name}: load_data()", raw, shuffles, steps_per_epoch=steps_per_epoch)
        weighted = train.weighted
        if limit is not None:
            raise ObjectiveError(
                f"{name}: limit and fraction are for samples in memory; load_data() returned tf.data datasets. "
                "Call .take(...) on them, or set steps_per_epoch."
            )
    elif steps_per_epoch is not None:
        raise ObjectiveError(
            f"{name}: steps_per_epoch is for tf.data datasets; load_data() returned arrays, whose epoch is one pass. "
            "Remove the key."
        )
    else:
        if grouped is None and "groups" in functions:
            groups = _groups_if_fit(code, functions["groups"], raw)
        train, test, groups, given, weighted = _split_data(name, raw, keras, test_fraction, seed, ordered, groups)
        if limit is not None:
            train, groups, given = _limited(name, train, groups, given, limit, seed, ordered)

    names = layer_names()

    def build_model() -> Any:
        before = layer_names()
        layer_names(names)
        try:
            model = code.call("build_model", functions["build_model"])
        except ObjectiveError as error:
            if not re.search(r"used \d+ times|should be unique", str(error)):
                raise
            layer_names(before)  # it keeps a layer between its models
            model = code.call("build_model", functions["build_model"])
        after = layer_names()
        layer_names({name: max(before.get(name, 0), after.get(name, 0)) for name in before | after})
        _check_model(name, model, keras)
        return model

    builder = code.kept_with_module(lambda: Builder(build_model))
    model = builder()
    known = train.first if isinstance(train, Stream) else train
    if known is not None:
        _check_targets(name, model, known)
        _check_tokens(name, keras, model, known)
    labels = class_labels(train.y) if isinstance(train, Data) and _classifies(model) else None
    return Objective(
        name,
        code.path,
        builder,
        train,
        test,
        labels,
        groups,
        given,
        _model_digest(model, code.module),
        _only_loss(keras, model, train),
        _own_optimizer(keras, model),
        _own_configuration(keras, model),
        tuple(code.notes),
        fixed_batch(model),
        any(getattr(layer, "stateful", False) and hasattr(layer, "cell") for layer in model._flatten_layers()),
        any(seeded) and isinstance(train, Data),
        weighted,
    )


def _functions(
    name: str, module: ModuleType, kwargs: dict[str, Any], grouped: bool | None
) -> dict[str, Callable[[], Any]]:
    """Return an objective's functions with the arguments filled in that a study file gives."""
    functions: dict[str, Callable[[], Any]] = {}
    for wanted, returns in (
        ("build_model", "a compiled Keras model"),
        ("load_data", "(x_train, y_train), (x_test, y_test)"),
    ):
        function = getattr(module, wanted, None)
        if not callable(function):
            defined = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
            near = did_you_mean(wanted, defined) if defined else ""
            raise ObjectiveError(f"{name}: must define {wanted}() that returns {returns}{near or '.'}")
        functions[wanted] = function
    if grouped is not False and callable(getattr(module, "groups", None)):
        functions["groups"] = module.groups
    unknown = set(kwargs)
    known: set[str] = set()
    for wanted, function in functions.items() if kwargs else ():
        parameters = inspect.signature(function).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        own = {key: value for key, value in kwargs.items() if any_name or key in parameters}
        known |= parameters.keys()
        unknown -= own.keys()
        functions[wanted] = functools.partial(function, **own)
    if unknown:
        first = sorted(unknown)[0]
        hint = did_you_mean(first, known) if known else ". Remove it, or add the parameter."
        raise ObjectiveError(
            f"{name}: objective.kwargs.{first}: no function of the objective has a parameter of that name{hint}"
        )
    return functions


def _own_optimizer(keras: Any, model: Any) -> str | None:
    """Return the optimizer that a model was compiled with, in words; None for defaults that need no words."""
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return None
    try:
        config, usual = optimizer.get_config(), type(optimizer)().get_config()
        rate = config.pop("learning_rate", None)
        same = rate == usual["learning_rate"] and all(config[key] == usual[key] for key in config if key != "name")
        if same and type(optimizer) in (keras.optimizers.RMSprop, keras.optimizers.Adam):
            return None  # what compile() takes by itself, and the study's own baseline
        said = f"at {rate:g}" if isinstance(rate, int | float) else f"with {rate['class_name']}" if rate else ""
        changed = [
            f"{key} {value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else key
            for key, value in config.items()
            if key not in ("name", "loss_scale_factor") and value != usual.get(key) and value is not None
        ]
    except Exception:  # an optimizer of the user's own class need not say what it is
        return type(optimizer).__name__
    listed = f", {', '.join(changed)}" if changed else ""
    return f"{type(optimizer).__name__} {said}{listed}".replace("  ", " ").strip()


def _own_configuration(keras: Any, model: Any) -> tuple[str, float] | None:
    """Return the name and rate of the optimizer that a model was compiled with, where a search has the same one."""
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return None
    try:
        config = optimizer.get_config()
        rate = config["learning_rate"]
        if not isinstance(rate, int | float) or not 0 < rate < np.inf or _own_optimizer(keras, model) is None:
            return None
        for name, spec in OPTIMIZERS.items():
            other = build_optimizer(spec, rate)
            if type(other) is type(optimizer) and {**other.get_config(), "name": config["name"]} == config:
                return name, float(f"{rate:.6g}")
    except Exception:  # an optimizer of the user's own class need not say what it is
        return None
    return None


def _check_opens(code: UserCode, raw: Any) -> None:
    """Refuse datasets that will not find their files: they open them while they train, in the working directory."""
    if code.elsewhere is None:
        return
    try:
        for part in raw if isinstance(raw, tuple | list) else [raw]:
            with contextlib.suppress(StopIteration):
                next(iter(part))
    except Exception as error:
        raise ObjectiveError(
            f"{code.name}: load_data(): its datasets read files by paths relative to {code.elsewhere} while they train "
            f"({describe_fault(error, code.path)}). Run lrtune in that folder, or begin the paths with "
            "Path(__file__).parent."
        ) from error


def _groups(code: UserCode, function: Callable[[], Any] | None) -> NDArray[np.int64] | None:
    """Return a group index per sample, by the objective's `groups()`."""
    if function is None:
        return None
    values = np.asarray(code.call("groups", function))
    if values.ndim != 1:
        raise ObjectiveError(f"{code.name}: groups() must return one group per sample, got shape {values.shape}.")
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _groups_if_fit(code: UserCode, function: Callable[[], Any], raw: Any) -> NDArray[np.int64] | None:
    """Return the groups where `groups()` is what it is here, and not another function of a program's own."""
    parts = raw if isinstance(raw, tuple | list) else ()
    if len(parts) not in (2, 3) or (len(parts) == 3 and all(_is_part(part) for part in parts)):
        return None  # no data, or with a validation set of its own
    try:
        found = _groups(code, function)
        training = parts[0] if all(_is_part(part) for part in parts) and not _is_inputs_and_targets(raw) else parts
        samples = make_data("groups()", training[0]).samples
    except ObjectiveError:
        return None
    return found if found is not None and len(found) == samples and len(np.unique(found)) > 1 else None


def _limited(
    name: str,
    train: Data,
    groups: NDArray[np.int64] | None,
    given: int | None,
    limit: int | float,
    seed: int,
    ordered: bool,
) -> tuple[Data, NDArray[np.int64] | None, int | None]:
    """Return fewer training samples, drawn at random; in the order of time, the last ones."""
    available = train.samples if given is None else given
    count = round(limit * available) if limit < 1 else int(limit)
    if count >= available:
        return train, groups, given
    if count < 1:
        raise ObjectiveError(f"{name}: fraction {limit:g} of {available} samples leaves none. Raise it.")
    if ordered:
        kept = np.arange(available - count, available)
    else:
        kept = np.sort(np.random.default_rng(seed).permutation(available)[:count])
    index = kept if given is None else np.concatenate([kept, np.arange(given, train.samples)])
    return train.take(index), groups[index] if groups is not None else None, None if given is None else count


def _split_data(
    name: str, raw: Any, keras: Any, test_fraction: float, seed: int, ordered: bool, groups: NDArray[np.int64] | None
) -> tuple[Data, Data | None, NDArray[np.int64] | None, int | None, tuple[bool, bool | None]]:
    """Tell the forms that `load_data` may return apart.

    Returns:
        Training samples, test samples, the training samples' groups, where the user's own validation
        samples begin among them, and whether training and these validation samples have weights.
    """
    where, float_type = f"{name}: load_data()", keras.config.floatx()
    forms = (
        "(x_train, y_train), (x_test, y_test), with (x_validation, y_validation) between the two or without, or "
        "(x, y), or x alone for a model that makes its own targets, as (x_train,), (x_test,) or (x,), or tf.data "
        "datasets (train, validation)"
    )
    raw = _with_parts(raw)
    if not isinstance(raw, tuple | list) or not 1 <= len(raw) <= 3:
        got = f"{len(raw)} values" if isinstance(raw, tuple | list) else type(raw).__name__
        raise ObjectiveError(f"{where} must return {forms}, got {got}.")
    if len(raw) > 1 and all(_is_part(part) for part in raw) and not _is_inputs_and_targets(raw):
        names = ("train", "test") if len(raw) == 2 else ("train", "validation", "test")
        first, *held, last = (
            _make(f"{where}: {part}", values, float_type) for part, values in zip(names, raw, strict=True)
        )
        _check_groups(name, groups, first.samples)
        if not held:
            return first, last, groups, None, (first.sample_weight is not None, None)
        _check_same_form(where, first, held[0])
        weighted = first.sample_weight is not None, held[0].sample_weight is not None
        return joined(first, held[0]), last, None, first.samples, weighted
    everything = _make(where, raw, float_type)
    _check_groups(name, groups, everything.samples)
    count = round(test_fraction * everything.samples)
    if count == 0 or count == everything.samples:
        raise ObjectiveError(
            f"{where}: test_fraction {test_fraction:g} of {everything.samples} samples leaves an empty part. Add data."
        )
    if ordered:
        order = np.arange(everything.samples)[::-1]
    elif groups is not None:
        # Whole groups go to the test set, until it is large enough.
        place = np.random.default_rng(seed).permutation(groups.max() + 1)[groups]
        order = np.argsort(place, kind="stable")
        count = int((place <= place[order[count - 1]]).sum())
    else:
        order = np.random.default_rng(seed).permutation(everything.samples)
    kept = np.sort(order[count:])
    if not len(kept):
        raise ObjectiveError(f"{where}: the test set takes whole groups, and no group is left to train on. Add groups.")
    test = everything.take(np.sort(order[:count]))
    weights = everything.sample_weight is not None, None
    return everything.take(kept), test, None if groups is None else groups[kept], None, weights


def _check_groups(name: str, groups: NDArray[np.int64] | None, samples: int) -> None:
    if groups is not None and len(groups) != samples:
        raise ObjectiveError(
            f"{name}: groups() must return one group for each of the {samples} training samples of load_data(), got "
            f"{len(groups)}."
        )


def _check_same_form(where: str, train: Data, validation: Data) -> None:
    """Refuse validation samples of another form than the training samples."""
    one, other = ([(path, a.shape[1:]) for path, a in leaves(part.parts()[:2])] for part in (train, validation))
    if one != other:
        raise ObjectiveError(
            f"{where}: validation samples must have the form of the training samples, got {validation.describe()} "
            f"beside {train.describe()}."
        )


def _make(where: str, parts: Any, float_type: str) -> Data:
    """Make data of (x, y) or (x, y, sample_weight)."""
    x, y, sample_weight = (*parts, None, None)[:3]
    return make_data(where, x, y, sample_weight, float_type)


def _with_parts(raw: Any) -> Any:
    """Return what `load_data` returned, with x alone written as (x,), wherever it stands.

    Two or three bare arrays (frames, dicts) are (x, y) and (x, y, sample_weight), as for `model.fit`; unless their
    lengths differ while their samples have the same form: these are x alone, for training, validation and test.
    """
    if not isinstance(raw, tuple | list):
        return (raw,)
    if not 2 <= len(raw) <= 3 or any(isinstance(part, tuple | list) for part in raw):
        return raw
    try:
        parts = [[leaf for _, leaf in leaves(part)] for part in raw]
        lengths = [{len(leaf) if hasattr(leaf, "__len__") else leaf.shape[0] for leaf in part} for part in parts]
        forms = {tuple(tuple(np.shape(leaf)[1:]) for leaf in part) for part in parts}
    except (TypeError, ValueError, AttributeError):
        return raw
    alone = len(forms) == 1 and all(len(found) == 1 for found in lengths) and len({*map(min, lengths)}) > 1
    return tuple((part,) for part in raw) if alone else raw


def _is_part(value: Any) -> bool:
    """Return whether a value looks like (x,), (x, y) or (x, y, sample_weight)."""
    return isinstance(value, tuple | list) and 1 <= len(value) <= 3


def _is_inputs_and_targets(raw: Any) -> bool:
    """Return whether ((a, b), (c, d)) holds inputs and targets rather than training and test samples.

    Training and test parts have the same shapes per sample and, nearly always, different lengths.
    """
    try:
        first, second = ([leaf for _, leaf in leaves(tuple(part))] for part in raw)
        lengths = {len(leaf) for leaf in (*first, *second)}
        same_form = len(first) == len(second) and all(
            np.shape(a)[1:] == np.shape(b)[1:] for a, b in zip(first, second, strict=True)
        )
    except (TypeError, ValueError):
        return False
    return len(lengths) == 1 and not same_form


def _check_model(name: str, model: Any, keras: Any) -> None:
    where = f"{name}: build_model()"
    if not isinstance(model, keras.Model):
        raise ObjectiveError(f"{where} must return a keras.Model, got {type(model).__name__}.")
    if not model.compiled:
        raise ObjectiveError(
            f"{where} must return a compiled model. Call model.compile(loss=..., metrics=[...]) before returning it; "
            "its optimizer is replaced by the search."
        )


def _losses(model: Any) -> list[str]:
    return loss_names(getattr(model, "loss", None))


def loss_names(loss: Any) -> list[str]:
    """Return the names of losses as a model is compiled with them, in lower case without underscores."""
    found = list(loss.values()) if isinstance(loss, dict) else list(loss) if isinstance(loss, tuple | list) else [loss]
    names = [item if isinstance(item, str) else getattr(item, "name", getattr(item, "__name__", "")) for item in found]
    return [str(item or "").replace("_", "").lower() for item in names]


def _classifies(model: Any) -> bool:
    return any("crossentropy" in loss or "hinge" in loss or "focal" in loss for loss in _losses(model))


def _only_loss(keras: Any, model: Any, train: Data | Stream) -> str | None:
    """Return the name of the only loss, where it is the plain mean that Keras's own steps report."""
    losses = _losses(model)
    if len(losses) != 1:
        return None
    try:
        own = any(
            getattr(type(model), f) is not getattr(keras.Model, f) for f in ("train_step", "compute_loss", "test_step")
        )
        config = {**{"reduction": "sum_over_batch_size"}, **getattr(model.loss, "get_config", dict)()}
        changed = (
            config.get("label_smoothing")
            or config.get("ignore_class")
            or config["reduction"] not in ("sum_over_batch_size", "mean")
        )
        weighted = (model.get_compile_config() or {}).get("loss_weights")
        masked = any(
            getattr(layer, "mask_zero", False) or "Masking" in type(layer).__name__ for layer in model._flatten_layers()
        )
        return None if own or changed or weighted or masked or model.losses else losses[0]
    except Exception:  # whatever a class of the user's own raises
        return None


def _check_targets(name: str, model: Any, data: Data) -> None:
    """Refuse labels that the model has no output for, which Keras turns into NaN or nonsense."""
    losses, where = _losses(model), f"{name}: load_data(): y"
    keras = import_tensorflow()[1]
    if data.y is None and losses[0] and not any(overrides(keras, model, f) for f in ("train_step", "compute_loss")):
        raise ObjectiveError(
            f"{name}: load_data() must return targets for the loss '{losses[0]}', got x alone. An autoencoder's target "
            "is its input: return (x, x)."
        )
    if len(losses) != 1 or not isinstance(data.y, np.ndarray):
        return
    try:
        outputs = model.output_shape
    except (AttributeError, ValueError):
        return
    width = outputs[-1] if isinstance(outputs, tuple) and outputs and isinstance(outputs[-1], int) else None
    if data.y.dtype.kind in "US" and losses[0]:
        seen = ", ".join(repr(str(value)) for value in np.unique(data.y)[:3])
        raise ObjectiveError(
            f"{where} must hold numbers for the loss '{losses[0]}', got text such as {seen}. Encode the labels: "
            "classes, y = numpy.unique(y, return_inverse=True)."
        )
    if losses[0] == "sparsecategoricalcrossentropy":
        if data.y.dtype.kind not in "iubf":
            raise ObjectiveError(
                f"{where} must hold class numbers from 0, got {data.y.dtype} values. Encode the labels."
            )
        classes = [n for n in data.y.shape[1:] if n > 1]
        if classes and classes == [width] and np.isin(data.y[:1000], (0, 1)).all():
            raise ObjectiveError(
                f"{where} must hold class numbers from 0 to {width - 1 if width else 0} for the loss "
                f"'sparse_categorical_crossentropy', got one-hot rows of {width}. Use the loss "
                "'categorical_crossentropy', or y.argmax(axis=-1)."
            )
        low, high = data.y.min(), data.y.max()
        if low < 0 or (width is not None and high >= width):
            highest = "outputs - 1" if width is None else width - 1
            raise ObjectiveError(
                f"{where} must hold labels from 0 to {highest}, the model's outputs, "
                f"got {low:g} to {high:g}. Number the classes from 0, or widen the last layer."
            )
    elif losses[0] == "categoricalcrossentropy" and width is not None:
        if data.y.ndim < 2 or data.y.shape[-1] != width:
            shape = "×".join(map(str, data.y.shape[1:])) or "single numbers"
            raise ObjectiveError(
                f"{where} must hold one-hot rows as wide as the model's {width} outputs, got {shape}. "
                "Use keras.utils.to_categorical, or the loss 'sparse_categorical_crossentropy'."
            )
    elif losses[0] == "binarycrossentropy" and data.y.dtype.kind in "iubf" and (data.y.min() < 0 or data.y.max() > 1):
        raise ObjectiveError(
            f"{where} must lie in [0, 1] for the loss 'binary_crossentropy', got {data.y.min():g} to {data.y.max():g}."
        )


def _check_tokens(name: str, keras: Any, model: Any, data: Data) -> None:
    """Refuse token numbers that an embedding has no row for, which a GPU or XLA reads as another token."""
    inputs = {id(tensor): leaf for tensor, (_, leaf) in zip(_input_tensors(model), leaves(data.x), strict=False)}
    for layer in model._flatten_layers() if inputs else ():
        for node in getattr(layer, "_inbound_nodes", ()) if isinstance(layer, keras.layers.Embedding) else ():
            tokens = next((inputs[id(tensor)] for tensor in node.input_tensors if id(tensor) in inputs), None)
            values = tokens.values if isinstance(tokens, Ragged) else tokens
            if values is None or values.dtype.kind not in "iuf" or not values.size:
                continue
            low, high = values.min(), values.max()
            if low < 0 or high >= layer.input_dim:
                raise ObjectiveError(
                    f"{name}: load_data(): x must hold token numbers from 0 to {layer.input_dim - 1} for the layer "
                    f"'{layer.name}', got {low:g} to {high:g}. Give it input_dim={int(high) + 1}, or limit the "
                    "vocabulary."
                )


def _input_tensors(model: Any) -> list[Any]:
    """Return the tensors of a model's inputs, in the order of the leaves of x; none where that is not known."""
    try:
        structure = (getattr(model, "_functional", None) or model)._inputs_struct
    except AttributeError:
        return []
    return [tensor for _, tensor in leaves(structure)]


def _model_digest(model: Any, module: ModuleType) -> str:
    """Return a hash of what the model is: its architecture, loss and metrics as Keras describes them.

    Keras names a class or function of the user's own, but not what is in it; then the code of the
    modules that define them counts too, without its comments.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a lambda loss is described, not saved
            compiled, architecture = model.get_compile_config() or {}, json.loads(model.to_json())
        described = [architecture, *(compiled.get(key) for key in ("loss", "metrics", "loss_weights"))]
    except Exception:  # a model of the user's own class needs no get_config
        described = [{"module": type(model).__module__}]
    modules = set(_modules_named(described)) | {type(model).__module__}
    foreign = sorted(name for name in modules if name.split(".")[0] != "keras")
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(described, sort_keys=True, default=repr))
    # Keras numbers layers as they are made in the process ("dense_3"), and an objective's module is
    # named after the place of its file; neither is a difference.
    text = re.sub(r'_\d+(?=")', "", re.sub(rf"{PREFIX}(folder_\w+\.|\w+)", "", text))
    if foreign:
        sources = {module.__name__, *foreign} & sys.modules.keys()
        text += "".join(_code_of(sys.modules[name]) for name in sorted(sources) if name != "builtins")
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _modules_named(described: Any) -> Iterator[str]:
    """Yield the value of every "module" in nested descriptions."""
    if isinstance(described, dict):
        if isinstance(described.get("module"), str):
            yield described["module"]
        for value in described.values():
            yield from _modules_named(value)
    elif isinstance(described, list | tuple):
        for value in described:
            yield from _modules_named(value)
    elif callable(described):
        yield str(getattr(described, "__module__", "builtins"))


def _code_of(module: ModuleType) -> str:
    """Return a module's code without comments and layout; nothing where its source is not to be had."""
    try:
        return ast.dump(ast.parse(Path(str(getattr(module, "__file__", ""))).read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):
        return ""


def check_sizes(where: str, fixed_batch: int | None, parts: Mapping[str, int], batch_sizes: Sequence[int]) -> None:
    """Refuse parts of the data that a model with a batch size of its own cannot take.

    Args:
        where: the objective.
        fixed_batch: samples of the only batches that the model takes, or None.
        parts: samples by what they are for.
        batch_sizes: samples per step that are asked for.

    Raises:
        ObjectiveError: with the numbers and the remedy.
    """
    if fixed_batch is None:
        return
    others = [size for size in batch_sizes if size != fixed_batch]
    if others:
        raise ObjectiveError(
            f"{where}: batch_size must be {fixed_batch}, since the model's Input has a fixed batch_shape, got "
            f"{others[0]}. Set batch_size = {fixed_batch}, or give the Input a shape without the batch."
        )
    for part, samples in parts.items():
        rest = samples % fixed_batch
        if rest:
            raise ObjectiveError(
                f"{where}: the model takes batches of {fixed_batch} samples alone, so {part} must be a multiple of "
                f"that, got {samples} samples, which leave a last batch of {rest}. Return (x_train, y_train), "
                "(x_validation, y_validation), (x_test, y_test) of such sizes from load_data(), or give the Input a "
                "shape without the batch."
            )
