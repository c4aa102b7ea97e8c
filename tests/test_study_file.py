"""The study file: defaults, overrides, and one line per mistake with path, rule, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli import parse_overrides
from pipeline.errors import StudyFileError
from pipeline.study_file import StudyConfig, read_study, seconds

FULL = """
objective  = "objectives/digits.py"
monitor    = "val_accuracy"
mode       = "max"
epochs     = 12
batch_size = 64
trials     = 5
timeout    = "1h 30m"
seed       = 3
[range_test]
low = 1e-5
high = 1.0
steps = 40
[search]
optimizers = ["adam"]
decays = ["cosine"]
final_fraction = { low = 0.01, high = 0.5 }
learning_rate = { values = [0.1, 0.01, 0.001] }
[validation]
scheme = "hold-out"
fraction = 0.25
[pruning]
pruner = "none"
[sampler]
name = "random"
[confirm]
finalists = 1
repeats = 3
[storage]
url = "sqlite:///other.db"
"""


def read(folder: Path, text: str, **overrides: object):
    """Read a study file with this text."""
    path = folder / "x.toml"
    path.write_text(text)
    return read_study(path, overrides)


def test_only_the_objective_is_required(tmp_path):
    """Every other key has its documented default."""
    study = read(tmp_path, 'objective = "a.py"')
    assert (study.name, study.config.trials, study.config.validation.folds) == ("x", 60, 5)
    assert study.output == tmp_path / "x"
    assert study.storage_url == f"sqlite:///{tmp_path.resolve()}/studies.db"


def test_every_key_is_read(tmp_path):
    """A file that sets every key arrives as written."""
    config = read(tmp_path, FULL).config
    assert config.timeout == 5400
    assert config.search.learning_rate.values == (0.1, 0.01, 0.001)
    assert config.validation.fold_count == 1
    assert config.storage.url == "sqlite:///other.db"


def test_a_whole_number_is_accepted_where_a_number_is_wanted(tmp_path):
    """`high = 10` is 10.0."""
    assert read(tmp_path, 'objective="a.py"\n[range_test]\nhigh = 10').config.range_test.high == 10.0


MISTAKES = [
    ("epochs = 3", "x.toml: objective: is required"),
    ('objective="a.py"\n[search]\noptimizers=["sgd","adm"]',
     "x.toml: search.optimizers[1]: 'adm' is not an optimizer; did you mean 'adam'?"),
    ('objective="a.py"\n[search]\ndecays=["cosin"]', "'cosin' is not a decay scheme; did you mean 'cosine'?"),
    ('objective="a.py"\n[search]\noptimizers=[]', "search.optimizers: must name at least one, got []"),
    ('objective="a.py"\n[search]\noptimizers=["sgd","sgd"]', "must name each only once, got 'sgd' 2 times"),
    ('objective="a.py"\n[search]\nlearning_rate={low=0.1,high=0.01}',
     "search.learning_rate: low must be below high, got low=0.1, high=0.01. Swap them?"),
    ('objective="a.py"\n[search]\nlearning_rate={low=0.1}', "search.learning_rate: takes { low = ..., high = ... }"),
    ('objective="a.py"\n[search]\nlearning_rate={values=[]}', "values must hold at least one number, got []"),
    ('objective="a.py"\n[search]\nlearning_rate=0.1', "search.learning_rate: must be a table, got 0.1"),
    ('objective="a.py"\nepoch=3', "x.toml: epoch: is not a key of a study file; did you mean 'epochs'?"),
    ('objective="a.py"\n[validation]\nfold=3', "validation.fold: is not a key of a study file; did you mean 'folds'?"),
    ('objective="a.py"\nepochs=0', "epochs: must be at least 1, got 0"),
    ('objective="a.py"\nepochs=2.5', "epochs: must be a whole number, got 2.5"),
    ('objective="a.py"\nepochs="many"', "epochs: must be a whole number, got 'many'"),
    ('objective="a.py"\nepochs=true', "epochs: must be a whole number, got true"),
    ('objective=3', "objective: must be a path in quotes, or a table with path and kwargs, got 3"),
    ('objective="a.py"\nmode="lowest"', "mode: must be one of 'auto', 'min' or 'max', got 'lowest'"),
    ('objective="a.py"\ntimeout="soon"', 'timeout: must be a duration such as "2h"'),
    ('objective="a.py"\n[validation]\nscheme="kfold"', "'kfold' is not a validation scheme; did you mean 'k-fold'?"),
    ('objective="a.py"\n[validation]\nfraction=1.0', "validation.fraction: must be below 1.0, got 1.0"),
    ('objective="a.py"\n[range_test]\nlow=1.0\nhigh=0.1', "range_test: low must be below high, got low=1, high=0.1"),
    ('objective="a.py"\n[range_test]\nsteps=60\nepochs=2', "range_test: steps and epochs both say how long"),
    ('objective="a.py"\n[range_test]\nlow=inf', "range_test.low: must be"),
    ('objective="a.py"\nsearch=3', "search: must be a table, got 3"),
    ('objective="a.py"\n[pruning]\npruner="median2"', "'median2' is not a pruner; did you mean 'median'?"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_reported_with_path_rule_value_and_remedy(tmp_path, text, message):
    """Each mistake is one line that names the key."""
    with pytest.raises(StudyFileError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_every_mistake_is_reported_at_once(tmp_path):
    """Three mistakes are three lines, each with the file's name."""
    with pytest.raises(StudyFileError) as error:
        read(tmp_path, 'epochs = 0\nbatch_sise = 3\n[search]\noptimizers = ["adm"]')
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all("x.toml: " in line for line in lines)


def test_a_missing_or_broken_file_is_one_message(tmp_path):
    """No file, a folder, no TOML, no UTF-8."""
    (tmp_path / "digits.toml").write_text("")
    with pytest.raises(StudyFileError, match=r"does not exist; did you mean 'digits.toml'\?"):
        read_study(tmp_path / "digit.toml")
    with pytest.raises(StudyFileError, match="got a folder"):
        read_study(tmp_path)
    with pytest.raises(StudyFileError, match=r"is not valid TOML: .*line 1"):
        read(tmp_path, "objective = \ntrials = 3")
    (tmp_path / "y.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StudyFileError, match="cannot be read"):
        read_study(tmp_path / "y.toml")


def test_options_override_keys_of_the_file(tmp_path):
    """Dotted names reach into tables, also into those that the file does not have."""
    study = read(tmp_path, 'objective = "a.py"\ntrials = 3', **{"trials": 10, "validation.folds": 3})
    assert (study.config.trials, study.config.validation.folds) == (10, 3)


def test_command_line_options_are_read_as_toml():
    """Numbers, lists and tables are typed; bare words are text."""
    words = ["--trials", "10", "--search.learning-rate", "{ values = [0.1] }", "--monitor=val_accuracy"]
    assert parse_overrides(words) == {
        "trials": 10,
        "search.learning_rate": {"values": [0.1]},
        "monitor": "val_accuracy",
    }


def test_the_definition_holds_what_changes_a_value_and_nothing_else(tmp_path):
    """More trials, a timeout, other storage or confirmation leave a study the same; epochs do not."""
    base = read(tmp_path, 'objective = "a.py"').definition()
    same = read(
        tmp_path,
        'objective = "a.py"\ntrials = 99\ntimeout = 5\n[confirm]\nrepeats = 9\n[storage]\nurl = "sqlite:///q.db"',
    ).definition()
    assert same == base
    for change in ("epochs = 3", "seed = 1", "batch_size = 8", '[sampler]\nname = "random"', "[validation]\nfolds = 3"):
        assert read(tmp_path, f'objective = "a.py"\n{change}').definition() != base


@pytest.mark.parametrize(("text", "expected"), [("90", 90), (90, 90), ("2h", 7200), ("1d 1s", 86401), ("0.5m", 30)])
def test_durations(text, expected):
    """Units s, m, h and d, added up."""
    assert seconds(text) == expected


toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*StudyConfig.model_fields, "typo"]), toml_values, max_size=6))
def test_no_content_of_a_study_file_is_ever_a_traceback(tmp_path_factory, table):
    """Any value under any key is either accepted or refused with a message."""
    path = tmp_path_factory.mktemp("fuzz") / "x.toml"
    path.write_text("")
    try:
        read_study(path, table)
    except StudyFileError as error:
        assert str(error)
