"""How lrtune says times and configurations, the same everywhere."""

from __future__ import annotations


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


def describe_configuration(optimizer: str, learning_rate: float, decay: str, final_fraction: float) -> str:
    """Return a configuration in one line.

    >>> describe_configuration("adam", 0.001, "cosine", 0.01)
    'adam at 0.001, cosine decay to 0.01×'
    """
    end = "constant" if decay == "constant" else f"{decay} decay to {final_fraction:.3g}×"
    return f"{optimizer} at {learning_rate:.4g}, {end}"
