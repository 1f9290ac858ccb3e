"""Pages and their pictures: what is drawn stands where the numbers say, text is escaped, nothing is asked of a network."""

from __future__ import annotations

import io
import math
import re
from base64 import b64decode
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from robustbox.pages import code, number, percent, render
from robustbox.pictures import Story, heat_map, image_grid, share, timeline
from robustbox.plots import LEFT, RIGHT, WIDTH, Scale, Series, curves

INF = math.inf


def test_scales_place_values_and_choose_round_ticks() -> None:
    assert Scale(0, 10).place(2.5) == 0.25
    assert Scale(1, 100, log=True).place(10) == pytest.approx(0.5)
    assert Scale(0, 10).place(INF) == 1  # a band to infinity ends at the top
    assert Scale(0, 1000).ticks() == [0, 200, 400, 600, 800, 1000]
    assert Scale(0.9, 110, log=True).ticks() == [1, 2, 5, 10, 20, 50, 100]
    for low, high in [(0, 1), (0, 0.0371), (3, 4), (0, 123456)]:
        assert 3 <= len(Scale(low, high).ticks()) <= 9


def test_curves_go_in_steps_from_where_they_are_finite() -> None:
    drawn = curves([Series("one", [0, 5, 10], [INF, 4, 2])], title="t", x="queries", y="l2", y_range=(0, 4))
    path = next(p for p in ElementTree.fromstring(drawn).iter("path") if p.get("class") == "curve c0")
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    assert path.get("d") == f"M{middle:.1f} 10.0H{WIDTH - RIGHT:.1f}V124.0"  # 4 is the top, 2 half-way to the floor


def test_a_band_without_an_upper_end_reaches_the_top() -> None:
    drawn = curves([Series("s", [0, 10], [1, 1], [0.5, 0.5], [INF, INF])], title="t", x="x", y="y", y_range=(0, 2))
    band = next(p for p in ElementTree.fromstring(drawn).iter("path") if p.get("class") == "band c0")
    assert re.findall(r"(?:H|V|M[\d.]+ )([\d.]+)", band.get("d") or "")[0] == "10.0"


def test_curves_without_a_finite_value_say_so() -> None:
    assert "nothing to draw" in curves([Series("s", [1], [INF])], title="t", x="x", y="y")


def test_a_share_shows_its_interval() -> None:
    drawn = ElementTree.fromstring(share({"hits": 3, "of": 4, "share": 0.75, "low": 0.3, "high": 0.95}))
    interval = next(rect for rect in drawn.iter("rect") if rect.get("class") == "interval")
    assert (float(interval.get("x", 0)), float(interval.get("width", 0))) == (30, 65)
    assert "75.0 %" in "".join(drawn.itertext())
    assert "–" in share({"hits": 0, "of": 0, "share": None, "low": 0, "high": 1})


def test_a_heat_map_holds_every_cell_and_escapes_what_it_shows() -> None:
    drawn = heat_map(["<row>"], ["a", "b"], [[{"value": 0.9, "text": "90 %", "href": "x.html"}, None]])
    table = ElementTree.fromstring(drawn)
    assert [cell.get("class") for cell in table.iter("td")] == ["deep", "none"]
    assert [cell.text for cell in table.iter("th")] == [None, "a", "b", "<row>"]


def test_a_timeline_draws_what_was_refused() -> None:
    drawn = timeline([Story("image 0", 100, [(11, 20), (91, 100)], success=50), Story("image 1", 50, [])], title="t")
    bars = [rect for rect in ElementTree.fromstring(drawn).iter("rect") if rect.get("class") == "refused"]
    wide = WIDTH - LEFT - RIGHT
    assert [float(bar.get("x", 0)) for bar in bars] == pytest.approx([LEFT + 0.1 * wide, LEFT + 0.9 * wide], abs=0.1)
    assert [float(bar.get("width", 0)) for bar in bars] == pytest.approx([0.1 * wide] * 2, abs=0.1)
    assert "image 0: 100 queries, 20 refused" in drawn


@pytest.mark.parametrize("channels", [1, 3])
def test_images_stand_in_the_page_pixel_by_pixel(channels: int) -> None:
    original = torch.rand(1, channels, 5, 7).mul(255).round().div(255)
    adversarial = original.clone()
    adversarial[0, :, 2, 3] = (original[0, :, 2, 3] + 0.25) % 1
    drawn = image_grid(original, adversarial, ["<first>"])
    assert "&lt;first&gt;" in drawn
    files = [Image.open(io.BytesIO(b64decode(code))) for code in re.findall(r"base64,([^\"]+)", drawn)]
    assert [file.size for file in files] == [(7, 5)] * 3
    first, difference = (torch.from_numpy(np.array(file)).reshape(5, 7, channels) for file in (files[0], files[2]))
    torch.testing.assert_close(first, original[0].permute(1, 2, 0).mul(255).round().byte())
    changed = difference.float().sub(127.5).abs().amax(dim=2)
    assert changed[2, 3] >= 127  # magnified until it fills the range
    assert changed.sum() - changed[2, 3] <= 34  # and grey everywhere else


def test_every_page_forbids_requests_and_escapes() -> None:
    page = render("base.html")
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)


def test_backticks_mean_code_and_text_is_escaped() -> None:
    assert code("set `eot` > 1, `a<b`; a ` alone") == ("set <code>eot</code> &gt; 1, <code>a&lt;b</code>; a ` alone")


def test_numbers_are_short_and_exact_enough() -> None:
    assert [number(value) for value in (None, math.nan, INF, 1234567, 0.031372549)] == [
        "–",
        "–",
        "∞",
        "1,234,567",
        "0.03137",
    ]
    assert [percent(value) for value in (None, 0.125, 1.0)] == ["–", "12.5 %", "100.0 %"]
