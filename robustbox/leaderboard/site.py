"""The leaderboard's pages, made of entries alone: index.html, and NAME.html for each entry."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustbox import registry
from robustbox.defense_file import is_file
from robustbox.errors import InputError
from robustbox.leaderboard.ranking import order, shared_budget, strongest

if TYPE_CHECKING:
    from markupsafe import Markup

ADAPTIVE = {"eot": "EOT", "oars": "OARS or a rehearsal"}
"""What the adaptive attacks are called that a stochastic and a stateful defense must be met with."""


def write_site(entries: Mapping[str, Mapping[str, Any]], out: Path, reports: Mapping[str, str]) -> None:
    """Write the pages of some entries.

    Args:
        entries: by name.
        out: the folder that the pages stand in.
        reports: addresses of runs' reports, as seen from the pages, by the hash of the run's results.
    """
    from robustbox import pages

    sections = [_section(threat, rows) for threat, rows in _by_threat(list(entries.values()))]
    titles = titles_of(entries)
    pages.write_page(out / "index.html", "leaderboard.html", sections=sections, count=len(entries), titles=titles)
    for name, entry in entries.items():
        threats = [_detail(entry, threat) for threat in entry["threats"]]
        pages.write_page(
            out / f"{name}.html",
            "entry.html",
            entry=entry,
            title=titles[name],
            threats=threats,
            certified=_certified_picture(entry),
            reports=reports,
            adaptive=ADAPTIVE,
        )


def titles_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What each entry is called: words, and behind those that others have too its defenses' files, or else its name."""
    words = {name: (_title(entry), _files(entry)) for name, entry in entries.items()}
    alike, told = Counter(title for title, _ in words.values()), Counter(words.values())
    return {
        name: title if alike[title] == 1 else f"{title} [{files if files and told[title, files] == 1 else name}]"
        for name, (title, files) in words.items()
    }


def _files(entry: Mapping[str, Any]) -> str:
    """The names of the files from which an entry's defenses were read; empty where none was, or its runs do not say."""
    runs = [attack["config"] for threat in entry["threats"] for attack in threat["attacks"]]
    named: Any = runs[0].get("defense") if runs else None
    return ", ".join(Path(each).stem for each in (named if isinstance(named, list) else [named]) if is_file(each))


def _title(entry: Mapping[str, Any]) -> str:
    """The defended model in words, with the options that are not a defense's own."""
    return " behind ".join([entry["model"]["name"], *(_recipe(recipe) for recipe in reversed(entry["defense"]))])


def words_of(threat: Mapping[str, Any]) -> str:
    """A threat model in words."""
    parts = [
        f"{threat['norm']} within {_radius(threat['epsilon'])}"
        if threat["epsilon"] is not None
        else f"{threat['norm']}"
    ]
    parts.append("targeted" if threat["targeted"] else "untargeted")
    parts.append("labels" if threat["knowledge"] == "label" else threat["knowledge"])
    return ", ".join(parts + ([f"{threat['levels']} grey levels"] if threat["levels"] else []))


def _radius(epsilon: float) -> str:
    """A radius in four digits, or so that no other one is written alike."""
    short, levels = f"{epsilon:.4g}", round(epsilon * 255)
    if float(short) == epsilon:
        return short
    return f"{levels}/255 ({short})" if levels / 255 == epsilon else f"{epsilon}"


def _recipe(recipe: Mapping[str, Any]) -> str:
    try:
        own = json.loads(json.dumps(registry.load("defenses", recipe["name"])().options(), default=str))
    except (InputError, TypeError, AttributeError):
        own = {}
    changed = ", ".join(f"{key} {value}" for key, value in recipe["options"].items() if own.get(key) != value)
    return f"{recipe['name']} ({changed})" if own and changed and len(changed) < 60 else str(recipe["name"])


def _by_threat(entries: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(threat model, its rows), where a row is an entry and its part under the threat model."""
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for entry in entries:
        for threat in entry["threats"]:
            key = {name: threat[name] for name in ("norm", "epsilon", "targeted", "levels", "knowledge")}
            found.setdefault(words_of(key), (key, []))[1].append({"entry": entry, "threat": threat})
    return [found[words] for words in sorted(found)]


def _section(threat: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    budgets = sorted({q for row in rows for q in row["threat"]["budgets"]})
    shown = shared_budget([row["threat"] for row in rows])
    places: dict[str, dict[int, int | None]] = {row["entry"]["name"]: {} for row in rows}
    for q in budgets:
        for place, row in order(rows, q):
            places[row["entry"]["name"]][q] = place
    columns = sorted({_column(attack) for row in rows for attack in row["threat"]["attacks"]})
    return {
        "threat": threat,
        "words": words_of(threat),
        "budgets": budgets,
        "shown": shown,
        "columns": columns,
        "rows": [_row(row, columns, places[row["entry"]["name"]]) for _, row in order(rows, shown)],
    }


def _column(attack: Mapping[str, Any]) -> str:
    return str(attack["attack"]["name"]) + (f" × {attack['eot']}" if attack["eot"] > 1 else "")


def _row(row: Mapping[str, Any], columns: Sequence[str], places: Mapping[int, int | None]) -> dict[str, Any]:
    entry, threat = row["entry"], row["threat"]
    worst = strongest(threat)
    attacks: dict[str, dict[str, Any]] = {}
    for attack in threat["attacks"]:  # of several runs of one attack, the one that left fewest
        its = attacks.setdefault(_column(attack), {})
        for q, share in attack["robust_accuracy"].items():
            if q not in its or (share["share"] or 0) < (its[q]["share"] or 0):
                its[q] = share
    return {
        **row,
        "places": places,
        "missing": [ADAPTIVE[need] for need in threat["adaptive"]["missing"]],
        "strongest": _column(worst),
        "detected": worst["detected"],
        "accounts_burnt": worst["accounts_burnt"],
        "attacks": [attacks.get(column, {}) for column in columns],
        "certified": _certified_at(entry, threat),
    }


def _certified_at(entry: Mapping[str, Any], threat: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The certified accuracy at the radius of the threat model, where it is one of the certificate's norm."""
    certified = entry["certified"]
    if certified is None or certified["norm"] != threat["norm"] or threat["epsilon"] is None:
        return None
    return next((its["accuracy"] for its in certified["radii"] if its["radius"] == threat["epsilon"]), None)


def _detail(entry: Mapping[str, Any], threat: Mapping[str, Any]) -> dict[str, Any]:
    """A threat model on an entry's own page: a heat map of attacks by queries."""
    from robustbox.pictures import heat_map

    attacks = threat["attacks"]
    names = ["best known attack of each image", *(_column(attack) for attack in attacks)]
    series = [threat["robust_accuracy"], *(attack["robust_accuracy"] for attack in attacks)]
    cells = [[_heat(its.get(str(q))) for q in threat["budgets"]] for its in series]
    picture = heat_map(
        names,
        [f"{q:,} queries" for q in threat["budgets"]],
        cells,
        corner="attack",
        caption="Accuracy under attack, and its 95 % interval",
    )
    return {"words": words_of(threat), "threat": threat, "picture": picture, "columns": names[1:]}


def _heat(share: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if share is None or share["share"] is None:
        return None
    note = f"{100 * share['low']:.0f} to {100 * share['high']:.0f} %"
    return {"value": share["share"], "text": f"{100 * share['share']:.1f} %", "note": note}


def _certified_picture(entry: Mapping[str, Any]) -> Markup | None:
    from robustbox.plots import Series, curves

    if entry["certified"] is None:
        return None
    radii = entry["certified"]["radii"]
    rows = [[100 * its["accuracy"][key] for its in radii] for key in ("share", "low", "high")]
    return curves(
        [Series("certified", [its["radius"] for its in radii], *rows)],
        title="Certified accuracy by radius",
        x=f"certified {entry['certified']['norm']} radius",
        y="images, %",
        y_range=(0, 100),
    )
