"""What a person sees while a command works: a line per stage and a bar, on standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pipeline.words import duration

NOTE_EVERY_SECONDS = 0.2
"""How often a note that takes time to make is made anew on a terminal."""

PLAIN_EVERY_SECONDS = 10.0
"""Where output is no terminal, a line of progress is printed at most this often."""


@dataclass
class Bar:
    """A running count of work, shown as a bar on a terminal and as occasional lines elsewhere."""

    name: str
    total: int
    done: int
    rich: Progress | None
    task: TaskID | None
    console: Console
    started: float
    started_at: int
    printed: float
    as_json: bool = False

    def update(self, done: int, note: str | Callable[[], str]) -> None:
        """Show the work done and a note; time left is estimated from this run's own pace.

        A note that takes time to make is given as a function, which is called when it is shown.
        """
        self.done = done
        now = time.monotonic()
        here = done - self.started_at
        left = (now - self.started) / here * (self.total - done) if here > 0 else None
        time_left = f"{duration(left)} left" if left is not None and done < self.total else ""
        if self.rich is not None and self.task is not None:
            if callable(note) and now - self.printed < NOTE_EVERY_SECONDS and done < self.total:
                self.rich.update(self.task, completed=done, left=time_left)
                return
            self.printed = now
            self.rich.update(self.task, completed=done, note=note() if callable(note) else note, left=time_left)
        elif now - self.printed >= PLAIN_EVERY_SECONDS or done == self.total:
            self.printed = now
            note = note() if callable(note) else note
            if self.as_json:
                _print_json(self.console, {"progress": self.name, "done": done, "total": self.total, "note": note})
                return
            parts = [f"{self.name} {done}/{self.total}", note, time_left]
            self.console.print(
                " · ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True
            )


class Reporter:
    """Prints the stages of a command.

    Args:
        quiet: print nothing.
        as_json: print one JSON object per line, for programs.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self.as_json = as_json
        self.started = time.monotonic()

    def stage(self, name: str, text: str) -> None:
        """Print one line: the stage's name and what came of it."""
        label = f"{name:<12}"
        if self.as_json:
            seconds = round(time.monotonic() - self.started, 1)
            _print_json(self.console, {"stage": name, "text": text, "seconds": seconds})
        elif self.console.is_terminal:
            self.console.print(f"[bold cyan]{label}[/]", end="")
            self.console.print(text, markup=False, soft_wrap=True)
        else:
            self.console.print(f"{label}{text}", markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show the progress of countable work.

        Args:
            name: what is counted, in one word.
            total: how much there is in all.
            done: how much of it was done before.
        """
        now = time.monotonic()
        if not self.console.is_terminal or self.console.quiet or self.as_json:
            yield Bar(name, total, done, None, None, self.console, now, done, now, self.as_json)
            return
        columns = (
            TextColumn(f"[bold cyan]{name:<12}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total, completed=done, note="", left="")
            yield Bar(name, total, done, progress, task, self.console, now, done, now)


def _print_json(console: Console, value: object) -> None:
    console.print(json.dumps(value), markup=False, highlight=False, soft_wrap=True)


SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int = 20) -> str:
    """Return a curve as a line of small bars; gaps where a value is missing.

    Args:
        values: the curve.
        width: most characters that it may take.

    >>> sparkline([3.0, 2.0, 1.0, 2.0, 8.0])
    '▃▂▁▂█'
    """
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    count = min(width, len(values))
    shown = []
    for place in range(count):
        part = values[place * len(values) // count : (place + 1) * len(values) // count]
        known = [v for v in part if v is not None and math.isfinite(v)]
        level = (sum(known) / len(known) - low) / (high - low or 1.0) if known else None
        shown.append(" " if level is None else SPARKS[min(int(level * len(SPARKS)), len(SPARKS) - 1)])
    return "".join(shown)
