"""The pages in a real browser: they draw, ask for nothing, serve keyboard and screen reader, and fit any width."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.export import write_results
from pipeline.report.page import render
from pipeline.report.records import load_record, recommend
from tests.conftest import ROOT
from tests.made_study import make_study

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
AXE = ROOT / "tests" / "node_modules" / "axe-core" / "axe.min.js"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

FIGURES = "[...document.querySelectorAll('.figure')]"
UNDRAWN = (
    f"{FIGURES}.filter(f => !f.querySelector('.scatterlayer path, .barlayer path'))"
    ".map(f => f.getAttribute('aria-label'))"
)
TEXTS = "[...document.querySelectorAll('.plot')].flatMap(plot => plot.data).flatMap(trace => trace.text || [])"
ROWS = "[...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden)"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of a study with hostile names; returns the page."""
    folder = tmp_path_factory.mktemp("pages")
    study = make_study(folder, "a<b>&'\"é", metric="<i>acc</i>", trials=60)
    record = load_record(study)
    write_results(record, study.output, render(record))
    return study.output / "report.html"


class Opened:
    """A page in a window of its own, with everything it said and asked for."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1440, scheme: str = "light") -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write"],
        )
        self.page = context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.plot:not(.js-plotly-plot)').length === 0")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_report_draws_fits_and_passes_axe(browser, report, width, scheme):
    """No message, no request outside the file, every plot drawn, nothing beyond the window, axe content."""
    with Opened(browser, report, width=width, scheme=scheme) as opened:
        page = opened.page
        page.wait_for_timeout(500)
        assert opened.said == []
        assert [url for url in opened.asked if not url.startswith(("data:", report.as_uri()))] == []
        empty = page.evaluate(UNDRAWN)
        assert empty == []
        assert page.evaluate("document.querySelectorAll('.plot').length") >= 12
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = f"{FIGURES}.filter(f => f.querySelector('svg').getBoundingClientRect().width > f.clientWidth + 1).length"
        assert page.evaluate(wide) == 0
        assert violations(page) == []


def violations(page: Any) -> list[str]:
    """Return what axe finds wrong."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed; run npm install in tests/")
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run(document)")["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found]


def test_names_from_the_user_are_text(browser, report):
    """Markup in the study's name or a metric's stays text."""
    with Opened(browser, report) as opened:
        assert opened.page.locator("h1").inner_text() == "a<b>&'\"é"
        assert opened.page.locator("#how ~ p i, h3 i, li i").count() == 0


def test_the_copy_button_copies_the_code(browser, report):
    """What lands on the clipboard is best.py's code and runs as it is."""
    with Opened(browser, report) as opened:
        opened.page.click("#copy")
        opened.page.wait_for_function("document.getElementById('copy').textContent === 'Copied'")
        copied = opened.page.evaluate("navigator.clipboard.readText()")
        assert copied.strip() in (report.parent / "best.py").read_text()
        assert copied.startswith("import keras")


def column(page: Any, number: int) -> list[str]:
    """Return the visible cells of a column of the table of trials."""
    return page.evaluate(f"{ROWS}.map(row => row.cells[{number}].textContent)")


def test_the_table_sorts_and_filters(browser, report):
    """Numbers sort as numbers both ways, empty cells last; words and outcome narrow the rows."""
    with Opened(browser, report) as opened:
        page = opened.page
        everything = column(page, 0)
        page.click("#table th:nth-child(4) button")
        rates = [float(text) for text in column(page, 3)]
        assert rates == sorted(rates)
        page.click("#table th:nth-child(4) button")
        assert [float(text) for text in column(page, 3)] == sorted(rates, reverse=True)
        assert page.get_attribute("#table th:nth-child(4)", "aria-sort") == "descending"
        page.click("#table th:nth-child(7) button")
        values = column(page, 6)
        first_empty = values.index("–")
        assert set(values[first_empty:]) == {"–"}
        page.fill("#filter", "adam cosine")
        assert set(column(page, 2)) == {"adam"}
        assert set(column(page, 4)) == {"cosine"}
        page.select_option("#outcome", "pruned")
        assert set(column(page, 1)) <= {"pruned"}
        assert page.inner_text("#count") == f"{len(column(page, 0))} of {len(everything)} trials"
        page.fill("#filter", "")
        page.select_option("#outcome", "")
        assert sorted(column(page, 0)) == sorted(everything)


def test_hovering_tells_the_whole_configuration(browser, report):
    """A point of the landscape says which trial it is, with everything it trained with."""
    record = load_record(make_study(report.parent.parent, "hover", trials=30))
    write_results(record, report.parent.parent / "hover", render(record))
    best = recommend(record)
    assert best is not None
    with Opened(browser, report.parent.parent / "hover" / "report.html") as opened:
        texts = opened.page.evaluate(TEXTS)
        assert any(f"trial {best.trial.number}: {best.configuration.describe()}" in str(text) for text in texts)
        points = opened.page.locator("#mattered ~ .card .scatterlayer .points path").first
        points.scroll_into_view_if_needed()
        opened.page.wait_for_timeout(300)
        box = points.bounding_box()
        opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        opened.page.wait_for_function(
            "[...document.querySelectorAll('.hoverlayer text')].some(text => text.textContent.startsWith('trial '))"
        )


def test_it_can_be_used_by_keyboard(browser, report):
    """The first stop skips to the content, buttons and headings of the table are reached, Enter sorts."""
    with Opened(browser, report) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.focus("#table th:nth-child(1) button")
        page.keyboard.press("Enter")
        assert page.get_attribute("#table th:nth-child(1)", "aria-sort") == "ascending"


@pytest.mark.slow
def test_a_report_of_a_thousand_trials_stays_small(tmp_path):
    """Under 6 MB for 1,000 trials of 5 folds, all of them in the table."""
    text = render(load_record(make_study(tmp_path, trials=1000, folds=5, epochs=10)))
    assert len(text.encode()) < 6_000_000
    assert text.count("<tr") > 1000


def test_the_page_prints(browser, report, tmp_path):
    """Printed, it loses its controls and keeps every section."""
    with Opened(browser, report) as opened:
        opened.page.emulate_media(media="print")
        assert not opened.page.is_visible("#copy")
        assert not opened.page.is_visible("#filter")
        assert opened.page.is_visible("#answer")
        path = tmp_path / "report.pdf"
        opened.page.pdf(path=str(path))
        assert path.stat().st_size > 50_000


def test_every_machine_that_builds_has_the_browser():
    """Where the project's own build runs, nothing here is skipped."""
    if os.environ.get("CI"):
        assert CHROMIUM is not None
        assert AXE.exists()


def test_the_dashboard_shows_the_recommendation(browser, tmp_path):
    """In the browser: readable parameters, curves as intermediate values, the note, and the report behind its link."""
    import threading
    from wsgiref.simple_server import WSGIRequestHandler, make_server

    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    from pipeline.report.dashboard import artifact_folder, publish
    from pipeline.storage import open_storage

    study = make_study(tmp_path, trials=25)
    record = load_record(study)
    write_results(record, study.output, render(record))
    publish(study, record, study.output / "report.html")
    answer = recommend(record)
    assert answer is not None

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    store = FileSystemArtifactStore(artifact_folder(study))
    app = optuna_dashboard.wsgi(open_storage(study.storage_url, create=False), artifact_store=store)
    with make_server("127.0.0.1", 0, app, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        try:
            base = f"http://127.0.0.1:{server.server_port}/dashboard/studies/1"
            page.goto(f"{base}/note")
            page.wait_for_selector(f"text=Train with {answer.configuration.describe()}")
            page.goto(base)
            page.wait_for_selector("text=lr_position")
            with page.expect_response("**/artifacts/1/*") as fetched:
                page.goto(
                    f"http://127.0.0.1:{server.server_port}/artifacts/1/{next(artifact_folder(study).iterdir()).name}"
                )
            assert fetched.value.status == 200
            assert page.locator("#answer").inner_text().startswith("Train with")
        finally:
            page.close()
            server.shutdown()
            thread.join()
