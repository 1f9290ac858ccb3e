"""Audits: a matrix of models, defenses, attacks, threat models and budgets, run cell by cell, and held against thresholds.

`python -m robustbox.audit` (robustbox/audit.py) is the command line, docs/audit.md the manual. In the order of events: `spec`
reads the file, `checks` looks at its values, `plan` makes cells of it, `preflight` looks at the black boxes first, `cells`
runs the cells, `summary` and `thresholds` say what came of them, `junit` and `page` write it down, and `run` ties all of it
together.
"""
