"""What all pages share: templates that escape everything, and figures that share the texts of their hovers."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2
    import plotly.graph_objects as go


class Figures:
    """The figures of one page; a text that many of them show on hovering stands in the page once."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}
        self._count = 0

    def show(self, figure: go.Figure, label: str) -> str:
        """Return a figure as a fragment of HTML.

        Args:
            figure: what to show.
            label: its finding, for those who cannot see it.
        """
        self._count += 1
        content = _rounded(figure.to_dict())
        for trace in content["data"]:
            if isinstance(trace.get("text"), list) and trace.get("type") != "bar":
                trace["text"] = [self._texts.setdefault(text, len(self._texts)) for text in trace["text"]]
                trace["meta"] = {"shared": True}
        name = f"figure-{self._count}"
        return (
            f'<div class="figure" role="figure" aria-label="{html.escape(label, quote=True)}"><div id="{name}" '
            f'class="plot" style="height:{figure.layout.height or 360:g}px"></div>'
            f'<script>draw("{name}", {_json(content)})</script></div>'
        )

    def texts(self) -> str:
        """Return the shared texts as a JavaScript array."""
        return _json(list(self._texts))


def environment() -> jinja2.Environment:
    """Return the templates' environment: everything that is put into a page is escaped."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = number
    return found


def page(template: str, figures: Figures, **values: Any) -> str:
    """Return a page that needs nothing but itself: plotly stands in it.

    Args:
        template: name of the template.
        figures: those that its fragments came from.
        values: what the template names.
    """
    from plotly.offline import get_plotlyjs

    made = environment().get_template(template)
    return made.render(plotlyjs=get_plotlyjs(), texts=figures.texts(), **values)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for people; a dash for none.

    >>> number(0.123456), number(None)
    ('0.1235', '–')
    """
    return "–" if value is None else f"{value:.{digits}g}"


def _json(value: Any) -> str:
    """Return JSON that may stand inside a script: no `<` that could end it; what is not finite is null."""
    from plotly.io.json import to_json_plotly

    text = str(to_json_plotly(value))
    return (
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def _rounded(value: Any) -> Any:
    """Return a figure with its numbers at the digits that a screen can show: half the size of a large one."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value
