"""`python -m robustbox.leaderboard`: static pages of defended models from runs, audits and certificates; or verify an entry.

Exit codes: 0 the pages are written, or the entry is as its runs say; 1 it is not; 2 bad input (one line on stderr).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustbox.errors import InputError, ModelError, OneLineParser
from robustbox.leaderboard.entries import build
from robustbox.leaderboard.merge import identity_of, merged
from robustbox.leaderboard.rebuild import cost
from robustbox.leaderboard.schema import check_entry
from robustbox.leaderboard.site import write_site
from robustbox.leaderboard.sources import Run, find, read_json
from robustbox.leaderboard.verify import verify
from robustbox.protocol import NORMS
from robustbox.report import REPORT

PROGRAM = "python -m robustbox.leaderboard"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        given = _parser().parse_args(argv)
        if given.verify is not None:
            return _verify(given.verify, [*given.runs, *([given.folder] if given.folder else [])])
        if not given.runs or given.out is None:
            raise InputError("give the folders of runs, and --out DIR; or --verify ENTRY")
        make(given.runs, given.out, _radii(given.epsilon), given.reports, given.cost)
    except (InputError, ModelError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROGRAM}: {error.filename} cannot be read or written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def make(runs: Sequence[Path], out: Path, radii: Mapping[str, Sequence[float]], reports: bool, costs: bool) -> None:
    """Write entries and pages into a folder; entries that stand there already and have no runs here stay, as they are called.

    Args:
        runs: folders of runs, audits, certificates and entries, or single files of these.
        out: the folder.
        radii: radii, by norm, at which minimising runs are scored.
        reports: copy the reports of the runs beside the pages.
        costs: measure what a query costs where that is not known yet.
    """
    sources = find(runs)
    before = find([out / "entries"]).entries if (out / "entries").is_dir() else []
    for entry in (known := [*before, *sources.entries]):
        check_entry(entry)
    due = list(build(sources, radii).values())
    entries = merged(before, sources.entries, due)
    if not entries:
        raise InputError(f"no complete run and no entry stands under {', '.join(map(str, runs))}")
    by_hash = {run.hashes()["results_sha256"]: run for run in sources.runs}
    earlier = {identity_of(entry): entry for entry in known}
    made = [entry for entry in entries.values() if identity_of(entry) in map(identity_of, due)]
    for entry in made:
        old = earlier.get(identity_of(entry), {})
        entry["about"] |= {key: value for key, value in old.get("about", {}).items() if key in entry["about"]}
        entry["cost"] = _cost(entry, old, by_hash, costs)
        check_entry(entry)
        if lost := len(_results(old) - _results(entry)):
            print(f"{entry['name']} is made again without {lost} of the runs that it named before", file=sys.stderr)
    (out / "entries").mkdir(parents=True, exist_ok=True)
    for name, entry in entries.items():
        (out / "entries" / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    write_site(entries, out, _copy_reports(made, by_hash, out) if reports else {})
    print(f"{len(entries)} defended models, {len(sources.runs)} runs: {out / 'index.html'}")


def _cost(
    entry: Mapping[str, Any], old: Mapping[str, Any], by_hash: Mapping[str, Run], measure: bool
) -> dict[str, Any] | None:
    """The cost that was measured before, where it was of the same; else a new measurement, where one is wanted."""
    same = all(old.get(key) == entry[key] for key in ("model", "defense"))
    if same and old.get("cost"):
        return dict(old["cost"])
    runs = (by_hash[a["run"]["results_sha256"]] for threat in entry["threats"] for a in threat["attacks"])
    return next((found for run in runs if (found := cost(run))), None) if measure else None


def _results(entry: Mapping[str, Any]) -> set[str]:
    """The hashes of the results that an entry stands on."""
    return {attack["run"]["results_sha256"] for threat in entry.get("threats", ()) for attack in threat["attacks"]}


def _copy_reports(made: Sequence[Mapping[str, Any]], by_hash: Mapping[str, Run], out: Path) -> dict[str, str]:
    """Copy runs' reports beside the pages; their addresses by the hash of the results."""
    found = {}
    for entry in made:
        for attack in (attack for threat in entry["threats"] for attack in threat["attacks"]):
            digest = attack["run"]["results_sha256"]
            source = by_hash[digest].path / REPORT
            if digest not in found and source.is_file():
                found[digest] = f"runs/{digest[:16]}.html"
                (out / "runs").mkdir(exist_ok=True)
                shutil.copyfile(source, out / found[digest])
    return found


def _verify(path: Path, folders: Sequence[Path]) -> int:
    """Verify an entry, looking for its runs where told, else beside it."""
    wrong = verify(path, folders or [path.resolve().parent.parent])
    for line in wrong:
        print(line)
    name = read_json(path)["name"]
    print(f"{name}: {f'{len(wrong)} things are not as the entry says' if wrong else 'everything is as the entry says'}")
    return 1 if wrong else 0


def _radii(given: Sequence[str]) -> dict[str, list[float]]:
    radii: dict[str, list[float]] = {}
    for word in given:
        norm, _, value = word.partition("=")
        try:
            radii.setdefault(norm, []).append(float(value))
        except ValueError:
            norm = ""
        if norm not in NORMS or not 0 < radii[norm][-1] < math.inf:
            raise InputError(f"--epsilon takes NORM=VALUE, as l2=1.0; not {word}")
    return radii


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="Static pages of defended models, from runs, audits and certificates; or verify one row of them.",
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUNS", help="folders of runs, audits, certificates, entries"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the folder of the pages; entries/ there is for review in git"
    )
    parser.add_argument(
        "--epsilon",
        action="append",
        default=[],
        metavar="NORM=VALUE",
        help="score runs that minimised the distance at this radius, too; may be given several times",
    )
    parser.add_argument("--no-reports", dest="reports", action="store_false", help="do not copy the runs' reports")
    parser.add_argument("--no-cost", dest="cost", action="store_false", help="do not measure what a query costs")
    parser.add_argument("--verify", type=Path, metavar="ENTRY", help="hold an entry against its runs and its model")
    parser.add_argument("--runs", dest="folder", type=Path, metavar="DIR", help="with --verify: where its runs are")
    return parser


if __name__ == "__main__":
    sys.exit(main())
