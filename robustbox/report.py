"""A run's report.html: what was found, when, and what it looks like; one file that opens from disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustbox.folder import read_run

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

REPORT = "report.html"
_SHOWN, _LINES, _POINTS = 12, 40, 64
"""Images shown, lines of the timeline, and numbers of queries at which a curve is taken."""


def write_report(folder: Path | None, originals: Tensor | None) -> None:
    """Write the report of a run into its folder, from its results and adversarials.

    Args:
        folder: the run's folder; None writes nothing.
        originals: the attacked images [N,C,H,W]; without them no image is shown.
    """
    if folder is None:
        return
    from robustbox import pages  # here: templates cost what only runs with a folder need

    document, adversarials = read_run(folder)
    images = document["images"]
    attacked = [image for image in images if image["clean_correct"]]
    pages.write_page(
        folder / REPORT,
        "run.html",
        run=document,
        title=title_of(document),
        attacked=attacked,
        curves=[success_picture(document), distance_picture(document)],
        timeline=_timeline(attacked),
        left_out=max(len([image for image in attacked if image["refusals"]]) - _LINES, 0),
        grid=_grid(images, adversarials, originals),
        shown=_SHOWN,
    )


def title_of(document: Mapping[str, Any]) -> str:
    """What ran on what, in a line."""
    return f"{document['attack']['name']} on {defended(document)}"


def defended(document: Mapping[str, Any]) -> str:
    """The model behind its defenses, in words."""
    return " behind ".join([document["model"]["name"], *(recipe["name"] for recipe in reversed(document["defense"]))])


def distances_at(images: Sequence[Mapping[str, Any]], queries: Sequence[float]) -> list[list[float]]:
    """The least adversarial distance of each image within so many queries, a row for each number; inf until there is one, and
    for a success that the evaluator did not confirm."""
    traces = [[] if _unconfirmed(image) else image["trace"] for image in images]
    return [
        [min((far for query, far in trace if query <= limit), default=math.inf) for trace in traces]
        for limit in queries
    ]


def _unconfirmed(image: Mapping[str, Any]) -> bool:
    return bool(image["success_any"] and not image["success"])


def milestones(budget: int) -> list[int]:
    """Numbers of queries, from 1 to the budget, evenly spaced on a logarithmic axis."""
    return sorted({round(budget ** (k / (_POINTS - 1))) for k in range(_POINTS)})


def success_picture(document: Mapping[str, Any]) -> Markup:
    """The share of the attacked images that were broken within so many queries."""
    from robustbox.plots import Series, curves
    from robustbox.survival import followed, success_curve

    attacked = [image for image in document["images"] if image["clean_correct"]]
    until = followed([i["stop_reason"] for i in attacked], [i["queries"] for i in attacked], document["budget"])
    curve = success_curve([0 if _unconfirmed(image) else image["first_success"] for image in attacked], until)
    ends = [*curve.queries.tolist(), float(document["budget"])]
    value, low, high = ([100 * x for x in [*row.tolist(), row[-1]]] for row in (curve.value, curve.low, curve.high))
    return curves(
        [Series("broken", ends, value, low, high)],
        title="Share of images broken within so many queries",
        x="queries",
        y="images broken, %",
        y_range=(0, 100),
    )


def distance_picture(document: Mapping[str, Any]) -> Markup:
    """The median distance after so many queries."""
    from robustbox.plots import Series, curves
    from robustbox.survival import median_curve

    attacked = [image for image in document["images"] if image["clean_correct"]]
    points = milestones(document["budget"])
    curve = median_curve(distances_at(attacked, points), points)
    series = Series("median", points, curve.value.tolist(), curve.low.tolist(), curve.high.tolist())
    return curves(
        [series],
        title="Median distance after so many queries",
        x="queries",
        y=f"median {document['norm']} distance",
        log_x=True,
    )


def _timeline(attacked: Sequence[Mapping[str, Any]]) -> Markup | None:
    from robustbox.pictures import Story, timeline

    refused = [image for image in attacked if image["refusals"]][:_LINES]
    stories = [
        Story(f"image {image['index']}", image["queries"], image["refusals"], image["first_success"])
        for image in refused
    ]
    return timeline(stories, title="Which queries the gate refused") if stories else None


def _grid(images: Sequence[Mapping[str, Any]], adversarials: Tensor, originals: Tensor | None) -> Markup | None:
    from robustbox.pictures import image_grid

    if originals is None or originals.shape[1] not in (1, 3):
        return None
    found = [image for image in images if image["distance"] is not None][:_SHOWN]
    if not found:
        return None
    index = [image["index"] for image in found]
    captions = [f"image {image['index']}, class {image['label']}, distance {image['distance']:.3g}" for image in found]
    return image_grid(originals.cpu()[index], adversarials.cpu()[index], captions)
