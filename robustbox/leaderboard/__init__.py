"""The leaderboard: defended models in rows that anybody can read from disk, review in git, and verify by one command.

    run folders, audits, certificates --sources--> what was measured --entries--> entries/NAME.json --site--> index.html

`python -m robustbox.leaderboard RUNS... --out DIR` makes the pages, `--verify ENTRY` holds an entry against its runs.
"""
