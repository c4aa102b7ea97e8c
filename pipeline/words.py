"""How lrtune says times and configurations, the same everywhere."""

from __future__ import annotations

FURTHER = ("warmup_fraction", "momentum", "weight_decay", "clipnorm", "batch_size")
"""Dimensions that only some studies search, by their names in study file and storage."""


def duration(seconds: float) -> str:
    """Return a time span for people.

    >>> duration(75), duration(8000)
    ('1m 15s', '2h 13m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def counted(number: int, what: str) -> str:
    """Return a number of things.

    >>> counted(1, "epoch"), counted(30, "epoch")
    ('1 epoch', '30 epochs')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def describe_configuration(
    optimizer: str,
    learning_rate: float,
    decay: str,
    final_fraction: float,
    *,
    warmup_fraction: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    batch_size: int | None = None,
) -> str:
    """Return a configuration in one line.

    >>> describe_configuration("adam", 0.001, "cosine", 0.01)
    'adam at 0.001, cosine decay to 0.01×'
    """
    shape = decay if decay in ("1cycle", "plateau") else f"{decay} decay"
    end = "constant" if decay == "constant" else f"{shape} to {final_fraction:.3g}×"
    further = {"momentum": momentum, "weight decay": weight_decay, "clipnorm": clipnorm, "batch size": batch_size}
    warm_up = f", warm-up over {100 * warmup_fraction:.3g}%" if warmup_fraction else ""
    settings = "".join(f", {name} {value:g}" for name, value in further.items() if value is not None)
    return f"{optimizer} at {learning_rate:.4g}, {end}{warm_up}{settings}"


def cut(text: str, longest: int) -> str:
    """Return a text, cut behind a sentence where it is too long, or at least between words.

    >>> cut("One thing. Another thing that is long.", 20)
    'One thing. ...'
    """
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = head.rfind(". ") + 1
    return f"{head[:end] if end > longest // 4 else head.rpartition(' ')[0]} ..."
