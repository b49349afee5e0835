"""The HTML page: one self-contained file, from the template beside it."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from bitnet_train.reporting.charts import Chart, svg

# What a page may show; each is left out when it is empty.
SECTIONS = ("ranking", "ranked_by", "exports", "tasks", "samples", "samples_step", "audit", "sessions", "config")


@cache
def _template() -> Template:
    folder = Path(__file__).parent / "templates"
    # Everything that comes from a run is escaped; the charts are ours.
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html")


def render(
    title: str, subtitle: str, source: str, figures: list[tuple[str, str]], charts: list[Chart], **sections: Any
) -> str:
    """The page. ``sections`` are those of :data:`SECTIONS`; others raise TypeError."""
    unknown = set(sections) - set(SECTIONS)
    if unknown:
        raise TypeError(f"a page has no section {min(unknown)}")
    drawn = [Markup(svg(chart)) for chart in charts]
    content = {**dict.fromkeys(SECTIONS), **sections}
    return _template().render(title=title, subtitle=subtitle, source=source, figures=figures, charts=drawn, **content)


def number(value: float | None, digits: int = 4) -> str:
    """A figure of a page, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def megabytes(count: int) -> str:
    """Bytes in MB of 10^6."""
    return f"{count / 1e6:,.2f} MB"
