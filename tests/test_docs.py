"""The documentation holds: generated pages are fresh, links lead somewhere, examples run."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.reference import DESCRIPTIONS, pages, schema
from pipeline.study_file import StudyConfig, key_names, read_study
from tests.conftest import ROOT, TINY_OBJECTIVE

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("name", sorted(pages()))
def test_generated_pages_are_fresh(name):
    """`make docs` would change nothing."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages()[name]


def test_every_key_is_described():
    """Neither a key without words nor words without a key."""
    inline = "search.final_fraction."
    assert set(DESCRIPTIONS) == {name for name in key_names() if not name.startswith(inline)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every relative link and picture exists; every link elsewhere is https."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            assert target.startswith("https://"), target
        elif not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_every_page_is_reached_from_the_readme():
    """Following links from the README finds every page."""
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                queue.append((page.parent / target).resolve())
    assert reached >= set(PAGES)


def test_the_python_examples_run(tmp_path, monkeypatch):
    """Every block of the page on Python, one after the other."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    assert scope["fitted"].path.exists()
    assert scope["finder"].losses


BLOCKS = re.findall(r"```python\n(# (\w+)\.py\n.*?)```", (ROOT / "docs" / "own-steps.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize(("program", "name"), BLOCKS, ids=[name for _, name in BLOCKS])
def test_the_programs_with_steps_of_their_own_are_sound(tmp_path, lrtune_here, program, name):
    """Every program of the page passes `check` without a doubt but that it has no validation values."""
    (tmp_path / f"{name}.py").write_text(program)
    keys = 'monitor = "distance"\nmode = "min"\n' if name == "gan" else ""
    (tmp_path / f"{name}.toml").write_text(f'objective = "{name}.py"\n{keys}')
    ended = lrtune_here("check", tmp_path / f"{name}.toml", "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["notes"] == []
    assert found["monitor"] == ("distance" if name == "gan" else "val_loss")
    assert len(found["doubts"]) == (name == "gan"), found["doubts"]


def test_the_example_study_file_is_read(tmp_path):
    """What is printed as a study file is one, also with the commented keys put in; its values are the defaults."""
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "digits.py").write_text(TINY_OBJECTIVE)
    text = (ROOT / "docs" / "study-file-example.md").read_text(encoding="utf-8")
    found = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    path = tmp_path / "example.toml"
    path.write_text(found.group(1))
    given = read_study(path).config
    path.write_text('objective = "objectives/digits.py"\n')
    assert given.model_dump() == read_study(path).config.model_dump()
    for key in key_names():
        assert re.search(rf"\b{key.rpartition('.')[2]}\b", found.group(1)), key


def test_the_schema_agrees_with_the_reader():
    """What the schema's enumerations and bounds allow is what the reader takes."""
    found = schema()
    assert set(found["properties"]) == set(StudyConfig.model_fields)
    assert found["required"] == ["objective"]
    assert found["additionalProperties"] is False
    optimizers = found["$defs"]["SearchSection"]["properties"]["optimizers"]["items"]["enum"]
    assert "schedule-free-adamw" in optimizers


def test_quoted_messages_of_the_questions_exist():
    """Errors that the page of questions quotes are said somewhere in the code."""
    code = " ".join(
        re.sub(r'"\s*f?"', "", re.sub(r"\s+", " ", path.read_text())) for path in (ROOT / "pipeline").rglob("*.py")
    )
    for words in (
        "was begun under another definition",
        "must agree with model.fit",
        "must use the optimizer that the model is compiled with",
        "every optimizer diverges from the first step",
        "is not measured by the model",
        "found no valley",
        "five trials in a row failed",
        "Another program holds it",
    ):
        assert words in code, words
        assert words in (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), words
