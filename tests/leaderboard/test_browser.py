"""The pages in a real browser: sorting, filtering, links, themes and widths; no error, and no request to any network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from robustbox.leaderboard.__main__ import main
from tests.leaderboard.browser import browsers, opened
from tests.leaderboard.planted import BLACKLIGHT, NOISE, plant


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows under one threat model: 3 of 4, 2 of 4 and 4 of 4 stand, the last without EOT; one row under another."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("site")
    won, never = [(300, 0.5)], list[tuple[int, float]]()
    plant(runs / "a", [won, never, never, never], model={"name": "alpha", "weights_sha256": None})
    plant(runs / "b", [won, won, never, None], model={"name": "beta", "weights_sha256": None})
    plant(runs / "c", [never] * 4, defense=NOISE, stochastic=True)
    plant(runs / "d", [[(9, 0.5)]] * 2 + [never] * 2, "oars:surfree", BLACKLIGHT, stateful=True, refused=[9, 0, 0, 0])
    plant(runs / "e", [won, never], norm="linf", epsilon=0.03, attack="rays")
    assert main([str(runs), "--out", str(out), "--no-cost"]) == 0
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one."""
    yield from browsers()


def rows(page: Any, section: int = 0) -> list[str]:
    """The defended models of a table that are to be seen, from top to bottom."""
    names = page.locator("section").nth(section).locator("tbody tr:visible td.model a").all_inner_texts()
    return [name.replace("\n", " ") for name in names]


def head(page: Any, name: str) -> Any:
    return page.locator("section").first.get_by_role("button", name=name, exact=True)


def test_sorting_keeps_rows_without_an_adaptive_attack_from_the_top(browser: Any, site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        placed, marked = ["alpha", "planted behind blacklight", "beta"], "planted behind input-noise (sigma 0.05)"
        assert sorted(rows(page)[:3]) == sorted(placed)
        assert rows(page) == ["alpha", "planted behind blacklight", "beta", marked]
        head(page, "best known attack").click()
        assert rows(page) == ["alpha", "planted behind blacklight", "beta", marked]  # though it stands at 4 of 4
        assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
        head(page, "best known attack").click()
        assert rows(page) == ["beta", "planted behind blacklight", "alpha", marked]
        head(page, "defended model").click()
        assert rows(page) == ["alpha", "beta", "planted behind blacklight", marked]
        head(page, "clean accuracy").click()
        assert rows(page)[-1] == "beta"  # no accuracy under attack: the mark does not matter here


def test_what_is_missing_stands_last_either_way_and_ties_keep_their_order(browser: Any, site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        before = [name for name in rows(page) if "blacklight" not in name]
        for _ in range(2):
            head(page, "detected").click()
            assert rows(page) == ["planted behind blacklight", *before]


def test_filters(browser: Any, site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        page.get_by_label("only rows with a place").check()
        assert rows(page) == ["alpha", "planted behind blacklight", "beta"]
        page.get_by_label("model or defense").fill("behind PLANTED")
        assert rows(page) == ["planted behind blacklight"]
        page.get_by_label("threat model").select_option("linf within 0.03, untargeted, labels")
        assert page.locator("section:visible h2").all_inner_texts() == ["linf within 0.03, untargeted, labels"]


def test_another_number_of_queries_shows_other_figures_and_places(browser: Any, site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        first = page.locator("section").first
        first.locator("select.budget").select_option("250")
        assert rows(page)[0] == "alpha"
        assert "100.0 %" in first.locator("tbody tr").first.inner_text()
        assert first.locator("tbody tr").nth(2).locator("td").first.inner_text() == "3"
        assert rows(page)[2] == "planted behind blacklight"  # it fell at query 9, beta at 300
        assert "within 250 queries" in first.locator("caption").inner_text()


def test_links_lead_to_pages_that_stand_on_their_own(browser: Any, site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        page.get_by_role("link", name="planted behind blacklight").click()
        assert page.locator("h1").inner_text() == "planted behind blacklight"
        assert page.locator("table.heat td").count() == 6  # two lines at 100, 250 and 500 queries
        page.get_by_role("link", name="robustbox leaderboard").click()
        assert "index.html" in page.url
        for link in page.locator("a").all():
            target = (link.get_attribute("href") or "").replace("%2B", "+")
            assert (site / target).is_file()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_fit_a_phone_and_follow_the_theme(browser: Any, site: Path, theme: Literal["light", "dark"]) -> None:
    for name in ("index.html", "planted+blacklight.html"):
        with opened(browser, site / name, 360, theme) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            background = "getComputedStyle(document.body).backgroundColor"
            assert (page.evaluate(background) == "rgb(255, 255, 255)") == (theme == "light")
            page.locator("#theme").click()  # from the system's to light
            assert page.evaluate(background) == "rgb(255, 255, 255)"
            page.locator("#theme").click()
            assert page.evaluate(background) == "rgb(20, 24, 29)"
