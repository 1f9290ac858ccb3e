"""JUnit XML for CI servers: a test case for each cell (errors, skips) and for each threshold wherever it applies (failures)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Document = dict[str, Any]


def write_junit(path: Path, document: Document) -> None:
    """Write `junit.xml` for an audit.json."""
    root = ElementTree.Element("testsuites", name=document["name"])
    cells = [_cell(cell) for cell in document["cells"]] + [_excluded(cell) for cell in document["excluded"]]
    _suite(root, "cells", cells)
    _suite(root, "thresholds", [_verdict(verdict) for verdict in document["verdicts"]])
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _suite(root: ElementTree.Element, name: str, cases: list[ElementTree.Element]) -> None:
    kinds = {"errors": "error", "failures": "failure", "skipped": "skipped"}
    counts: dict[str, str] = {
        plural: str(sum(case.find(tag) is not None for case in cases)) for plural, tag in kinds.items()
    }
    seconds = sum(float(case.get("time", 0)) for case in cases)
    suite = ElementTree.SubElement(root, "testsuite", counts, name=name, tests=str(len(cases)), time=f"{seconds:.3f}")
    suite.extend(cases)


def _cell(cell: Document) -> ElementTree.Element:
    case = _case(f"{cell['model']}.{cell['defense']}", cell["id"], cell["seconds"] or 0.0)
    if cell["status"] != "done":
        ElementTree.SubElement(case, "error", message=cell["error"] or "not run")
    return case


def _excluded(cell: Document) -> ElementTree.Element:
    case = _case(f"{cell['model']}.{cell['defense']}", cell["id"], 0.0)
    ElementTree.SubElement(case, "skipped", message=cell["reason"])
    return case


def _verdict(verdict: Document) -> ElementTree.Element:
    case = _case(verdict["threshold"], verdict["where"], 0.0)
    if not verdict["holds"]:
        ElementTree.SubElement(case, "failure", message=complaint(verdict))
    return case


def complaint(verdict: Document) -> str:
    """What a threshold that does not hold has to say."""
    bound = f"at least {verdict['min']:g}" if verdict["min"] is not None else f"at most {verdict['max']:g}"
    if not verdict["measured"]:
        return f"{verdict['metric']} was not measured, must be {bound}"
    if verdict["value"] is None:  # JSON has no infinity
        return f"{verdict['metric']} is infinite, must be {bound}"
    sure = " with confidence" if verdict["confident"] else ""
    ends = [f"{verdict[end]:.4g}" if verdict[end] is not None else "infinity" for end in ("low", "high")]
    interval = f"95 % interval {ends[0]} to {ends[1]}" if verdict["low"] is not None else "no interval"
    return f"{verdict['metric']} is {verdict['value']:.4g} ({interval}), must be {bound}{sure}"


def _case(group: str, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=group, name=name, time=f"{seconds:.3f}")
