"""`python -m robustbox.attack`: attack a model that can only be queried, show what came of it, write the run's folder.

Exit codes: 0 the run ended, whatever it found; 2 bad input or a model that failed (one line on stderr says which); 130
the run was interrupted. What was found until then stands in the folder in every case.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from robustbox import registry, setting
from robustbox.api import load_data, run_attack, worst_case
from robustbox.boxes import as_black_box
from robustbox.config import PROGRAM, AttackConfig, Command, parse
from robustbox.errors import InputError, ModelError, StorageError
from robustbox.folder import check_free, open_run
from robustbox.loop import Progress
from robustbox.results import AttackResult

_SHOWN = 50
"""Images shown one by one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        if command.listing:
            show_names(Console())
        else:
            run(command)
    except (InputError, ModelError, StorageError) as error:
        _complain(error, str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        _complain(interrupt, "interrupted")
        return 130
    return 0


def _complain(error: BaseException, message: str) -> None:
    line = "; ".join([message, *getattr(error, "__notes__", [])])
    print(f"{PROGRAM}: {' '.join(line.split())}", file=sys.stderr)


def run(command: Command) -> None:
    """Attack as the command says; the folder is written however the run ends."""
    config, console = command.config, Console(quiet=command.quiet)
    box = as_black_box(config.model, config.device)
    name = config.data or setting.own_data(config.model)
    everything, classes = load_data(name, box)[:2]
    n = setting.count(config.images, len(everything))
    images, labels = everything[:n], classes[:n]
    arguments = setting.arguments(config, box, everything, classes, n)
    if command.dry_run:
        if config.out is not None:
            check_free(Path(config.out), command.fresh)
        return show_worst_case(worst_case(box, images, labels, **arguments), Console(), _traffic(box.describe()))
    out = config.out or _new_folder(config)
    settled = replace(config, data=name, images=n)
    with (
        open_run(out, settled.what_to_run(), command.fresh) as folder,
        Bar(sys.stderr, disable=command.quiet or None) as bar,
    ):
        try:
            result = run_attack(box, images, labels, **arguments, out=folder, progress=bar)
        except (ModelError, KeyboardInterrupt) as stop:
            if folder.written:
                stop.add_note(
                    f"what was found until then is in {out}; the same command with --out {out} goes on from there"
                )
            raise
    show(result, console)
    console.print(f"written to {out}", highlight=False)


class Bar(AbstractContextManager["Bar"]):
    """A progress bar on a stream: rows asked of the worst case, rows a second, images that succeeded so far.

    Args:
        stream: where to draw.
        disable: True never draws, None draws on terminals only.
    """

    def __init__(self, stream: TextIO, disable: bool | None) -> None:
        self._bar = tqdm(file=stream, disable=disable, unit=" rows", dynamic_ncols=True, smoothing=0.1)

    def __call__(self, state: Progress) -> None:
        """Show where the run stands."""
        self._bar.total = state.total
        self._bar.set_postfix_str(f"{state.succeeded} of {state.live + state.done} succeeded", refresh=False)
        self._bar.update(state.rows - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def show(result: AttackResult, console: Console) -> None:
    """The result as two tables: image by image, and summed up."""
    norm = result.meta["norm"]
    table = _table("images", "image", "label", "outcome", norm, "first at", "queries", "ended by")
    for i, identity in enumerate(result.meta["images"][:_SHOWN]):
        found, asked = bool(result.first_success[i]), bool(result.clean_correct[i])
        lucky = found or bool(result.success_any[i])
        goal = f"{identity['label']}" if identity["target"] is None else f"{identity['label']} to {identity['target']}"
        table.add_row(
            str(i),
            goal,
            "success" if result.success[i] else "not confirmed" if lucky else "failed" if asked else "-",
            f"{result.distance[i]:.4g}" if found else "-",
            str(result.first_success[i]) if found else "-",
            str(result.queries[i]) if asked else "-",
            result.errors[i] or result.stop_reasons[i],
        )
    console.print(table)
    if len(result) > _SHOWN:
        console.print(f"and {len(result) - _SHOWN} more in results.json")
    console.print(_summed_up(result, norm))


def _summed_up(result: AttackResult, norm: str) -> Table:
    summary, meta = result.summary(), result.meta
    model = " behind ".join([meta["model"]["name"], *(defense["name"] for defense in reversed(meta["defense"]))])
    table = _table(f"{meta['attack']['name']} on {model}", "", "")
    table.show_header = False
    shares = {
        "classified correctly": "clean_accuracy",
        "success": "success",
        "accuracy under attack": "robust_accuracy",
    }
    if meta["stochastic"] or meta["defense"]:
        shares |= {
            "success on any query": "success_any",
            "success on fresh draws": "success_fresh",
            "success undefended": "success_undefended",
        }
    if meta["stochastic"]:
        shares |= {"success with the noise off": "success_clean", "success both ways": "success_strict"}
    for title, key in shares.items():
        share = summary[key]
        if share["share"] is not None:
            interval = f"95 % interval {share['low']:.1%} to {share['high']:.1%}"
            table.add_row(title, f"{share['hits']} of {share['of']} = {share['share']:.1%} ({interval})")
    if meta["stochastic"] and summary["success"]["of"]:
        risks = ", ".join(f"{n}: {risk:.1%}" for n, risk in summary["replay_risk"].items())
        table.add_row("replay risk after replays", risks)
    if result.rejected.any():
        share = result.rejected.sum() / result.queries.sum()
        burnt = f", accounts burnt: {result.accounts_burnt.sum()}" if result.accounts_burnt.any() else ""
        table.add_row("rows rejected", f"{result.rejected.sum()} of {result.queries.sum()} = {share:.1%}{burnt}")
    if summary["hits"] and not result.rejected.all():
        seen = sum(bool(hits) for hits in result.hits)
        table.add_row("rows that a gate noticed", f"{summary['hits']}, on {seen} of {len(result)} images")
    if meta["starts"]:
        table.add_row(
            "begun from given rows", f"{meta['starts']} of {len(result)}; what finding them cost is in no ledger"
        )
    medians = "  ".join(f"{q}: {far:.4g}" for q, far in summary["median_distance"].items())
    table.add_row(f"median {norm} after queries", medians)
    table.add_row("median queries to success", f"{summary['median_queries_to_success']:.6g}")
    table.add_row("rows by ledger", ", ".join(f"{phase} {rows}" for phase, rows in summary["ledger"].items()))
    if traffic := _traffic(meta["model"]):
        requests = f"{traffic['requests']}, {traffic['repeats']} of them repeats"
        doubt = traffic["rows_doubtful"]
        table.add_row("requests", requests + (f"; {doubt} rows may have been charged as well" if doubt else ""))
        if "price_per_1000" in traffic:
            least, most = (f"{traffic[key]:.6g}" for key in ("cost_at_least", "cost_at_most"))
            table.add_row("cost", f"{least if least == most else f'{least} to {most}'} {traffic['currency']}")
    if meta["journal"]["sessions"] > 1:
        times, twice = meta["journal"]["sessions"] - 1, meta["journal"]["in_flight"]
        table.add_row("went on", f"{times} times; {twice} rows were in flight when it was stopped, and asked again")
    if meta["rows_per_second"]:
        seconds = sum(meta["seconds"].values())
        table.add_row("speed", f"{meta['rows_per_second']:.0f} rows/s of attack, {seconds:.1f} s in all")
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, box=SIMPLE_HEAD, title_justify="left")


def show_worst_case(rows: dict[str, int], console: Console, traffic: Mapping[str, Any]) -> None:
    """What a run would ask at most, and what a paid service would charge for it if each row were charged once."""
    table = _table("worst case", "ledger", "rows")
    for phase, count in [*rows.items(), ("in all", sum(rows.values()))]:
        table.add_row(phase, str(count))
    if "price_per_1000" in traffic:
        cost = sum(rows.values()) * traffic["price_per_1000"] / 1000
        table.add_row("cost", f"{cost:.6g} {traffic['currency']}")
    console.print(table)
    console.print("no query was asked")


def _traffic(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model behind a network says of its traffic and cost; nothing where it is here."""
    traffic: Mapping[str, Any] = model.get("traffic") or {}
    return traffic


def show_names(console: Console) -> None:
    """Everything that can be named, each with one line."""
    for kind in get_args(registry.Kind):
        table = _table(kind, "name", "what it is")
        for name, line in registry.describe(kind).items():
            table.add_row(name, line)
        console.print(table)


def _new_folder(config: AttackConfig) -> str:
    what = re.sub(r"[^\w.-]+", "-", f"{config.model}-{config.attack}")
    return f"runs/{datetime.now():%Y%m%d-%H%M%S}-{what}"


if __name__ == "__main__":
    sys.exit(main())
