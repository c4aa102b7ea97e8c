"""The errors that people see, and the exit codes they end in.  Nothing here imports the rest of the package."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_KNOWN_ERROR = 1
EXIT_USAGE = 2
EXIT_UNEXPECTED = 3
EXIT_INTERRUPTED = 130


class KnownError(Exception):
    """A mistake or a fault that one clear message explains: where, the rule, the value, the remedy."""


class SettingError(KnownError, ValueError):
    """An argument of a public function breaks its rule."""


class ObjectiveError(KnownError):
    """The objective's file, model or data cannot be used."""


class StudyFileError(KnownError):
    """The study file breaks one or more rules; every one of them is in the message."""


class StorageError(KnownError):
    """The storage cannot be opened, read or written."""


class NoAnswerError(KnownError):
    """The study ran, but no trial came through."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, else a list of all.

    Args:
        name: what was written.
        known: the names that would have been accepted.

    >>> did_you_mean("adm", ["sgd", "adam"])
    "; did you mean 'adam'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(names)}"


def require_package(package: str, where: str, *, extra: str | None = None) -> None:
    """Refuse what needs a package that is not installed, before work begins.

    Args:
        package: its name for pip and for import.
        where: the key of the study file that needs it.
        extra: lrtune's extra that brings it, if any.

    Raises:
        KnownError: naming the package.
    """
    if importlib.util.find_spec(package) is None:
        brings = f" (extra '{extra}')" if extra else ""
        raise KnownError(f"{where} needs the package {package}, which is not installed: pip install {package}{brings}.")


def reason_of(error: BaseException) -> str:
    """Return the innermost error's first line: what a database itself said."""
    while error.__cause__ is not None:
        error = error.__cause__
    original = getattr(error, "orig", None) or error
    return (str(original).strip().splitlines() or [type(original).__name__])[0].rstrip(".")


def first_line(error: BaseException) -> str:
    """Return what an error says first; where Keras only says in which call, the next line too."""
    lines = [line.strip() for line in plain_text(str(error)).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Exception encountered"):
        return f"{lines[0].rstrip('.')}: {lines[1]}"
    return lines[0] if lines else type(error).__name__


def plain_text(text: str) -> str:
    """Return a text without the escapes by which terminals show colours and bold letters."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
