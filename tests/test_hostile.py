"""Hostile input: whatever stands in a study file, it is read, or refused in one message of its own kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import StudyFileError
from pipeline.study_file import given_keys, key_names, read_study
from pipeline.study_template import as_toml
from pipeline.training.decays import DECAYS
from pipeline.training.optimizers import OPTIMIZERS

SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["adam", "cosine", "k-fold", "tpe", "auto", "2h", "median"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["low", "high", "values"]), inner),
    max_leaves=4,
)


@SETTINGS
@given(st.dictionaries(st.sampled_from([*key_names(), "x", "search.x", "objective.kwargs.a"]), ANYTHING, max_size=6))
def test_any_values_are_read_or_refused(tmp_path, flat):
    """No other exception than the study file's own, and its message names the file on every line."""
    path = tmp_path / "s.toml"
    path.write_text('objective = "a.py"\n')
    try:
        read_study(path, flat)
    except StudyFileError as error:
        assert str(error)
        assert all(line.startswith((str(path), "--")) for line in str(error).splitlines())


@SETTINGS
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    """A file of noise is no traceback."""
    path = tmp_path / "noise.toml"
    path.write_bytes(data)
    with pytest.raises(StudyFileError):
        read_study(path)


@SETTINGS
@given(st.data())
def test_a_damaged_study_file_is_read_or_refused(tmp_path, data):
    """Cut anywhere, with a byte changed anywhere."""
    whole = (Path(__file__).parent.parent / "studies" / "digits.toml").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    path = tmp_path / "digits.toml"
    path.write_bytes(bytes([*whole[:at], byte, *whole[at + 1 :]])[:cut])
    try:
        read_study(path)
    except StudyFileError as error:
        assert str(path) in str(error)


@SETTINGS
@given(
    st.fixed_dictionaries(
        {"objective": st.fixed_dictionaries({"path": st.text(min_size=1, max_size=20)})},
        optional={
            "monitor": st.text(min_size=1, max_size=20),
            "epochs": st.integers(1, 10**6),
            "timeout": st.floats(0.1, 1e6),
            "seed": st.integers(0, 2**32 - 1),
            "search": st.fixed_dictionaries(
                {},
                optional={
                    "optimizers": st.lists(st.sampled_from(list(OPTIMIZERS)), min_size=1, unique=True),
                    "decays": st.lists(st.sampled_from(list(DECAYS)), min_size=1, unique=True),
                    "learning_rate": st.fixed_dictionaries(
                        {"values": st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=4, unique=True)}
                    ),
                },
            ),
        },
    )
)
def test_what_is_kept_of_a_study_file_reads_as_the_same(tmp_path, table):
    """The keys that travel with a study, written as TOML, give the same configuration: any text, any number."""
    path = tmp_path / "s.toml"
    path.write_text(as_toml(table), encoding="utf-8")
    config = read_study(path).config
    path.write_text(as_toml(given_keys(config)), encoding="utf-8")
    assert read_study(path).config == config
    assert config.objective.path == table["objective"]["path"]
