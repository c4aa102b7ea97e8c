"""The range test's own files: tables and a page with the plots, for `lrtune range-test`."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.report.figures.range_tests import (
    MARKS_SAID,
    RangeTestInfo,
    compared_finding,
    draw_range_test,
    draw_range_tests,
)

if TYPE_CHECKING:
    from pipeline.search.range_test import RangeTest


def range_test_files(name: str, tests: Mapping[str, RangeTest]) -> dict[str, str]:
    """Return range_test.csv, bounds.csv and range_test.html by file name."""
    import pandas as pd
    from plotly.offline import get_plotlyjs

    steps = pd.concat(
        pd.DataFrame(
            {
                "optimizer": test.optimizer,
                "step": range(1, len(test.rates) + 1),
                "learning_rate": test.rates,
                "loss": test.losses,
                "smoothed": test.smoothed,
            }
        )
        for test in tests.values()
    )
    bounds = pd.DataFrame(
        [{k: getattr(test, k) for k in ("optimizer", "low", "suggested", "high", "status")} for test in tests.values()]
    )
    figures: list[str] = []
    infos: list[RangeTestInfo] = []
    config = {"displayModeBar": False}
    for test in tests.values():
        info = range_test_info_of(test)
        infos.append(info)
        figure = draw_range_test(info).to_html(full_html=False, include_plotlyjs=False, config=config)
        figures.append(f"<h2>{html.escape(info.title)}</h2><p>{html.escape(test.note)}</p>{figure}")
    together = draw_range_tests(infos).to_html(full_html=False, include_plotlyjs=False, config=config)
    figures.insert(0, f"<h2>{html.escape(compared_finding(infos))}</h2><p>{html.escape(MARKS_SAID)}</p>{together}")
    title = html.escape(f"Learning rate range test of {name}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:900px;margin:auto;padding:1rem}"
        "h2{font-size:1rem;margin:1.5rem 0 0}p{margin:0;color:#57606a}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>{''.join(figures)}</body></html>"
    )
    return {
        "range_test.csv": steps.to_csv(index=False),
        "bounds.csv": bounds.to_csv(index=False),
        "range_test.html": page,
    }


def range_test_info_of(test: RangeTest) -> RangeTestInfo:
    """Return a range test that was just run, ready to draw."""
    return RangeTestInfo(
        test.optimizer,
        test.rates.tolist(),
        _plain(test.losses),
        _plain(test.smoothed),
        test.low,
        test.suggested,
        test.high,
        test.status,
    )


def _plain(values: object) -> list[float | None]:
    import numpy as np

    return [float(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=float)]
