"""Pages that open from disk: one file each, no network, light and dark, for phones and for paper.

Every page extends `templates/base.html`, which holds the whole look and forbids every request (Content-Security-Policy).
Pictures are SVG that `robustbox.pictures` draws into the page: they take their colours from the theme, need no script,
print, and weigh kilobytes, where the script of a plotting library would add 4.5 MB to every report.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from robustbox import pictures
from robustbox.environment import version


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robustbox"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "code": code}
    environment.globals |= {"version": version(), "share": pictures.share, "heat_map": pictures.heat_map}
    return environment


def render(template: str, /, **values: Any) -> str:
    """The page that a template (`templates/NAME`) makes of some values.

    Text is escaped. Beside its values a template knows the filters `number`, `percent` and `code`, and of
    `robustbox.pictures` `share` and `heat_map`.
    """
    return _environment().get_template(template).render(values)


def write_page(path: Path, template: str, /, **values: Any) -> None:
    """Write a page, and the folder that it stands in."""
    content = render(template, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, grouped by thousands; a dash for what is not there, ∞ for infinity."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def code(text: str) -> Markup:
    """Text in which what stands in `backticks` is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent; a dash for what is not there."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"
