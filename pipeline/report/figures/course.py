"""The course of the search: values in their order, who worked when, where the time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.figures.style import FAINT, OUTCOMES, PALETTE, legend_above, log_y, said, style
from pipeline.report.records import StudyRecord, TrialRecord
from pipeline.words import duration

if TYPE_CHECKING:
    import plotly.graph_objects as go

TIMELINE_TRIALS = 1500
"""More trials than this are no longer told apart on a timeline; the last ones are drawn."""


@dataclass(frozen=True)
class HistoryInfo:
    """The values of the trials in their order.

    Attributes:
        outcomes: per outcome its trials' numbers, values and descriptions.
        numbers, best: the best value of a trial that ran through, after each trial; its own improvements only.
        title: the finding.
    """

    outcomes: dict[str, tuple[list[int], list[float], list[str]]]
    numbers: Sequence[int]
    best: Sequence[float]
    title: str


def history_info(record: StudyRecord) -> HistoryInfo:
    """Return the values of all trials that have one, and the best so far."""
    outcomes: dict[str, tuple[list[int], list[float], list[str]]] = {}
    numbers: list[int] = []
    best: list[float] = []
    for trial in record.trials:
        value = record.shown_value(trial)
        if value is None or trial.outcome not in ("complete", "pruned"):
            continue
        entry = outcomes.setdefault(trial.outcome, ([], [], []))
        entry[0].append(trial.number)
        entry[1].append(value)
        entry[2].append(said(trial))
        if trial.outcome == "complete" and (not best or record.monitor.cost(value) < record.monitor.cost(best[-1])):
            numbers.append(trial.number)
            best.append(value)
    if not best:
        return HistoryInfo(outcomes, [], [], "No trial ran through")
    title = f"The best value, {best[-1]:.4g}, came with trial {numbers[-1]} of {len(record.trials)}"
    return HistoryInfo(outcomes, numbers, best, title)


def draw_history(info: HistoryInfo, monitor: str, trials: int) -> go.Figure:
    """Draw values over trial numbers, and the best so far as a staircase."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for outcome, (numbers, values, texts) in info.outcomes.items():
        look = OUTCOMES[outcome]
        figure.add_scatter(
            x=numbers, y=values, text=texts, mode="markers", name=look.name,
            marker={"size": 7, "color": look.ink, "symbol": look.symbol},
            hovertemplate=f"%{{text}}<br>{monitor} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[*info.numbers, trials - 1], y=[*info.best, *info.best[-1:]], mode="lines", name="best so far",
        line={"shape": "hv", "width": 2, "color": PALETTE[1]}, hoverinfo="skip",
    )  # fmt: skip
    style(figure, "trial", monitor, height=340)
    values = [v for _, ys, _ in info.outcomes.values() for v in ys]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        log_y(figure, min(values), max(values))
    legend_above(figure)
    return figure


@dataclass(frozen=True)
class TimelineInfo:
    """When each trial ran.

    Attributes:
        spans: per outcome (number, start, end, description) of its trials, in seconds since the first began.
        title: the finding.
    """

    spans: dict[str, list[tuple[int, float, float, str]]]
    title: str


def timeline_info(record: StudyRecord) -> TimelineInfo:
    """Return start and end of every finished trial; the last ones where there are many."""
    timed = [t for t in record.trials if t.started is not None and t.seconds is not None]
    first = min((t.started for t in timed if t.started is not None), default=datetime(1970, 1, 1))
    spans: dict[str, list[tuple[int, float, float, str]]] = {}
    for trial in timed[-TIMELINE_TRIALS:]:
        assert trial.started is not None and trial.seconds is not None
        start = (trial.started - first).total_seconds()
        spans.setdefault(trial.outcome, []).append((trial.number, start, start + trial.seconds, said(trial)))
    every = [(start, end) for rows in spans.values() for _, start, end, _ in rows]
    if not every:
        return TimelineInfo(spans, "No trial has ended yet")
    side_by_side = most_at_once(every)
    busy = busy_seconds(every)
    title = f"{len(timed)} trials took {duration(busy)}" + (
        f", up to {side_by_side} side by side" if side_by_side > 1 else ", one after another"
    )
    return TimelineInfo(spans, title)


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """Return the largest number of spans that overlap.

    >>> most_at_once([(0.0, 2.0), (1.0, 3.0), (3.0, 4.0)])
    2
    """
    marks = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return int(np.max(np.cumsum([step for _, step in marks]), initial=0))


def busy_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Return the seconds in which at least one span ran.

    >>> busy_seconds([(0.0, 2.0), (1.0, 3.0), (10.0, 11.0)])
    4.0
    """
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def draw_timeline(info: TimelineInfo) -> go.Figure:
    """Draw a bar from start to end for each trial; pauses longer than the work around them stay visible."""
    import plotly.graph_objects as go

    figure = go.Figure()
    last = max((end for rows in info.spans.values() for _, _, end, _ in rows), default=1.0)
    unit, scale = ("hours", 3600.0) if last > 7200 else ("minutes", 60.0) if last > 300 else ("seconds", 1.0)
    for outcome, rows in info.spans.items():
        x: list[float | None] = []
        y: list[int | None] = []
        for number, start, end, _ in rows:
            x += [start / scale, end / scale, None]
            y += [number, number, None]
        ink, name = OUTCOMES[outcome].ink, OUTCOMES[outcome].name
        figure.add_scatter(
            x=x, y=y, mode="lines", name=name, legendgroup=name, hoverinfo="skip",
            line={"width": 4 if len(rows) < 150 else 2, "color": ink},
        )  # fmt: skip
        figure.add_scatter(
            x=[(start + end) / 2 / scale for _, start, end, _ in rows], y=[row[0] for row in rows],
            text=[f"{text}<br>{duration(end - start)}" for _, start, end, text in rows], mode="markers",
            marker={"opacity": 0, "color": ink}, legendgroup=name, showlegend=False,
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    style(figure, f"{unit} since the first trial began", "trial", height=320)
    legend_above(figure)
    return figure


@dataclass(frozen=True)
class TimeInfo:
    """Where the time of the trials went: seconds by outcome and optimizer."""

    seconds: dict[str, dict[str, float]]
    title: str


def time_info(record: StudyRecord) -> TimeInfo:
    """Return the seconds of finished trials by outcome and optimizer."""
    seconds: dict[str, dict[str, float]] = {}
    for trial in record.trials:
        if trial.seconds is None or trial.configuration is None:
            continue
        row = seconds.setdefault(trial.outcome, {})
        row[trial.configuration.optimizer] = row.get(trial.configuration.optimizer, 0.0) + trial.seconds
    total = sum(sum(row.values()) for row in seconds.values())
    if not total:
        return TimeInfo(seconds, "No trial has ended yet")
    shares = sorted(((sum(row.values()) / total, OUTCOMES[outcome].name) for outcome, row in seconds.items()))[::-1]
    parts = [f"{100 * share:.0f}% of the time went to trials that {name}" for share, name in shares[:1]]
    parts += [f"{100 * share:.0f}% to those that {name}" for share, name in shares[1:]]
    return TimeInfo(seconds, ", ".join(parts))


def draw_time(info: TimeInfo) -> go.Figure:
    """Draw the seconds of each optimizer's trials, stacked by outcome."""
    import plotly.graph_objects as go

    figure = go.Figure()
    totals: Counter[str] = Counter()
    for row in info.seconds.values():
        totals.update(row)
    optimizers = [name for name, _ in totals.most_common()][::-1]
    for outcome, row in info.seconds.items():
        figure.add_bar(
            y=optimizers, x=[row.get(name, 0.0) for name in optimizers], orientation="h", name=OUTCOMES[outcome].name,
            marker={"color": OUTCOMES[outcome].ink, "pattern": {"shape": OUTCOMES[outcome].pattern, "fgcolor": FAINT}},
            hovertemplate=f"%{{y}}, {OUTCOMES[outcome].name}: %{{x:.3g}} s<extra></extra>",
        )  # fmt: skip
    style(figure, "seconds", None, height=120 + 34 * max(len(optimizers), 2))
    figure.update_layout(barmode="stack")
    legend_above(figure)
    return figure


@dataclass(frozen=True)
class Divergence:
    """The diverged trials of one optimizer.

    Attributes:
        optimizer: its name.
        count, ran: trials that diverged, of all that ran.
        lowest: lowest learning rate that diverged.
        reason: the commonest reason.
        where: the commonest place, in words.
    """

    optimizer: str
    count: int
    ran: int
    lowest: float
    reason: str
    where: str


def divergences(record: StudyRecord) -> list[Divergence]:
    """Return where and why trials diverged, by optimizer, the most frequent first."""
    ran: Counter[str] = Counter()
    groups: dict[str, list[TrialRecord]] = {}
    for trial in record.trials:
        if trial.configuration is None or trial.outcome not in ("complete", "pruned", "diverged"):
            continue
        ran[trial.configuration.optimizer] += 1
        if trial.diverged_at:
            groups.setdefault(trial.configuration.optimizer, []).append(trial)
    found = []
    for optimizer, trials in groups.items():
        places = [t.diverged_at for t in trials if t.diverged_at]
        reasons = Counter(str(at["reason"]) for at in places)
        early = sum(at["fold"] == 1 and at["epoch"] == 1 for at in places)
        where = f"{early} of {len(places)} in the first epoch"
        rates = [t.configuration.learning_rate for t in trials if t.configuration]
        found.append(
            Divergence(optimizer, len(trials), ran[optimizer], min(rates), reasons.most_common(1)[0][0], where)
        )
    return sorted(found, key=lambda one: -one.count)


def failures(record: StudyRecord) -> list[tuple[str, int]]:
    """Return the messages of failed trials with their counts, the commonest first."""
    return Counter(t.error or "no message was kept" for t in record.trials if t.state == "failed").most_common()
