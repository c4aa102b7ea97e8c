"""The range test's own files: tables and a page with the plots, for `lrtune range-test`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.report.export import range_test_tables
from pipeline.report.figures.range_tests import (
    MARKS_SAID,
    RangeTestInfo,
    compared_finding,
    draw_range_test,
    draw_range_tests,
)
from pipeline.report.html import Figures, page

if TYPE_CHECKING:
    from pipeline.search.range_test import RangeTest


def range_test_files(name: str, tests: Mapping[str, RangeTest]) -> dict[str, str]:
    """Return range_test.csv, bounds.csv and range_test.html by file name."""
    infos, figures = [range_test_info_of(test) for test in tests.values()], Figures()
    finding = compared_finding(infos)
    made = page(
        "range_test.html",
        figures,
        name=name,
        finding=finding,
        marks=MARKS_SAID,
        together=figures.show(draw_range_tests(infos), finding),
        single=[(info, figures.show(draw_range_test(info), info.title)) for info in infos],
    )
    return {
        **range_test_tables({name: test.as_record() for name, test in tests.items()}),
        "range_test.html": made,
    }


def range_test_info_of(test: RangeTest) -> RangeTestInfo:
    """Return a range test that was just run, ready to draw."""
    stored = test.as_record()
    return RangeTestInfo(
        test.optimizer,
        stored["rates"],
        stored["losses"],
        stored["smoothed"],
        test.low,
        test.suggested,
        test.high,
        test.status,
    )
