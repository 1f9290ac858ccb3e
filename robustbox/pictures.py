"""Pictures for pages, as markup: shares with intervals, heat maps, timelines of refusals, and images.

Colours are the page's (`templates/base.html`), told apart by eyes that see few of them, and by dashes where there are none.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from torch import Tensor

from robustbox.plots import LEFT, RIGHT, WIDTH, Scale, svg


def share(value: Mapping[str, Any] | None) -> Markup:
    """A share (`hits`, `of`, `share`, `low`, `high`) as a bar with its interval, and in figures; a dash for none."""
    if value is None or value.get("share") is None:
        return Markup('<span class="soft">–</span>')
    low, high, at = 100 * value["low"], 100 * value["high"], 100 * value["share"]
    return Markup(
        '<span class="share"><span>{:.1f} % <span class="soft">({} of {})</span></span>'
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" y="3" width="100" height="2"/>'
        '<rect class="interval" x="{:.2f}" y="1" width="{:.2f}" height="6"/>'
        '<rect class="point" x="{:.2f}" width="2" height="8"/>'
        "</svg><small>{:.1f} to {:.1f} %</small></span>"
    ).format(at, value["hits"], value["of"], low, max(high - low, 0.5), min(max(at - 1, 0), 98), low, high)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Mapping[str, Any] | None]],
    corner: str = "",
    caption: str = "",
) -> Markup:
    """A matrix as a table whose cells are the darker the larger their value is.

    Args:
        rows, columns: their names.
        cells: for each row, for each column: None, or `value` in [0, 1] and `text`, and where wanted `note` and `href`.
        corner: what the rows are.
        caption: what the table shows.
    """
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in columns)
    body = Markup("").join(
        Markup("<tr><th>{}</th>{}</tr>").format(name, Markup("").join(map(_cell, its)))
        for name, its in zip(rows, cells, strict=True)
    )
    return Markup(
        '<div class="scroll"><table class="heat"><caption><span>{}</span></caption>'
        "<thead><tr><th>{}</th>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(caption, corner, head, body)


@dataclass(frozen=True)
class Story:
    """One image's queries to a gate: how many, which were refused (runs of first and last), which succeeded first (0: none)."""

    name: str
    queries: int
    refused: Sequence[tuple[int, int]]
    success: int = 0


def timeline(stories: Sequence[Story], *, title: str) -> Markup:
    """When a gate refused: a line an image from its first query to its last, with what was refused and the first success."""
    longest = max((story.queries for story in stories), default=0)
    if longest < 1:
        return Markup('<p class="soft">{}: nothing was asked.</p>').format(title)
    row, top, wide = 16.0, 4.0, WIDTH - LEFT - RIGHT
    xs = Scale(0, longest)
    parts = []
    for k, story in enumerate(stories):
        y = top + k * row
        lines = [Markup('<text x="{:.0f}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 6, y + 10, story.name)]
        lines.append(_bar("asked", 1, story.queries, xs, y + 3, 6))
        lines += [_bar("refused", first, last, xs, y + 1, 10) for first, last in story.refused]
        if story.success:
            at = LEFT + wide * xs.place(story.success)
            lines.append(Markup('<circle class="won" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(at, y + 6))
        count = sum(last - first + 1 for first, last in story.refused)
        told = f"{story.name}: {story.queries} queries, {count} refused"
        parts.append(Markup("<g><title>{}</title>{}</g>").format(told, Markup("").join(lines)))
    foot = top + len(stories) * row
    for tick in xs.ticks():
        at = LEFT + wide * xs.place(tick)
        parts.append(
            Markup('<text class="soft" x="{:.1f}" y="{:.1f}" text-anchor="middle">{:g}</text>').format(
                at, foot + 14, tick
            )
        )
    parts.append(
        Markup('<text class="soft" x="{:.1f}" y="{:.1f}" text-anchor="middle">query</text>').format(
            LEFT + wide / 2, foot + 30
        )
    )
    return svg(title, foot + 36, parts)


# The parts of pictures.


def image_grid(originals: Tensor, adversarials: Tensor, captions: Sequence[str]) -> Markup:
    """Each original beside its adversarial and their difference, magnified until it fills the range around grey.

    Args:
        originals, adversarials: [n,C,H,W] in [0, 1], C one or three.
        captions: what is said of each, before the magnification.
    """
    figures = []
    for original, adversarial, caption in zip(originals, adversarials, captions, strict=True):
        change = adversarial - original
        factor = 0.5 / max(float(change.abs().max()), 1e-6)
        shown = {"original": original, "adversarial": adversarial, "difference": 0.5 + factor * change}
        figures.append(
            Markup(
                '<figure><div class="three">{}</div><figcaption>{} · difference × {:.3g}</figcaption></figure>'
            ).format(
                Markup("").join(
                    Markup('<img src="{}" alt="{}" title="{}">').format(png(image), name, name)
                    for name, image in shown.items()
                ),
                caption,
                factor,
            )
        )
    return Markup('<div class="grid-images">{}</div>').format(Markup("").join(figures))


def png(image: Tensor) -> str:
    """An image [C,H,W] in [0, 1], C one or three, as the address of a PNG that stands in the page itself."""
    from PIL import Image

    levels = image.detach().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _bar(kind: str, first: int, last: int, xs: Scale, y: float, height: float) -> Markup:
    """Queries first to last of a timeline; never too thin to be seen."""
    wide = WIDTH - LEFT - RIGHT
    left, right = wide * xs.place(first - 1), wide * xs.place(last)
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.0f}"/>').format(
        kind, LEFT + left, y, max(right - left, 0.6), height
    )


def _cell(cell: Mapping[str, Any] | None) -> Markup:
    if cell is None:
        return Markup('<td class="none">–</td>')
    text = Markup('<a href="{}">{}</a>').format(cell["href"], cell["text"]) if cell.get("href") else cell["text"]
    note = Markup("<small>{}</small>").format(cell["note"]) if cell.get("note") else ""
    value = min(max(float(cell["value"]), 0.0), 1.0)
    kind = "deep" if value > 0.55 else "light"
    return Markup('<td class="{}" style="--v: {:.3f}">{}{}</td>').format(kind, value, text, note)
