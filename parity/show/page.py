"""A dump as one HTML file that needs no network, and its pictures as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined
from markupsafe import Markup

from parity.errors import UsageError
from parity.report.canvas import as_svg, drawing
from parity.report.files import whole
from parity.report.text import number, quoted, visible
from parity.show.figures import figures
from parity.show.looked import MOST_VIEWS, Looked, by_layer
from parity.show.terminal import LEGEND, sentences

_TEMPLATES = Path(__file__).with_name("templates")


def write(looked: Looked, folder: Path) -> Path:
    """Write index.html and the pictures into a folder; returns the page. Raises UsageError where that cannot be."""
    pictures: dict[str, str] = {}
    with drawing():
        for name, draw in figures(looked).items():
            pictures[name] = as_svg(draw())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pictures.items():
            _write(folder / f"{name}.svg", text)
        _write(folder / "index.html", render(looked, pictures))
    except OSError as error:
        found = f"{error.filename or folder}: cannot be written ({error.strerror})"
        raise UsageError(f"{found}. Give another --out.") from error
    return folder / "index.html"


def _write(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def render(looked: Looked, pictures: Mapping[str, str]) -> str:
    """The page, with the pictures in it."""
    templates = Templates(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(visible=visible, quoted=quoted, number=lambda v: number(v, ".4g"))
    return templates.get_template("show.html.j2").render(
        looked=looked,
        layers=by_layer(looked.sites),
        views=[
            {"site": view.statistics, "lines": sentences(view.statistics), "pictures": _of(f"site-{place}", pictures)}
            for place, view in enumerate(looked.views)
        ],
        depth=Markup(pictures.get("depth", "")),
        legend=LEGEND,
        most=MOST_VIEWS,
        nan=math.isnan,
    )


def _of(name: str, pictures: Mapping[str, str]) -> Iterable[Markup]:
    return [Markup(pictures[key]) for key in (name, f"{name}-heads") if key in pictures]
