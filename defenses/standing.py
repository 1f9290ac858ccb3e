"""What a stateful gate holds against its accounts, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Standing:
    """What a gate holds against an account: queries received, hits, the first of them (from 1; 0: none), and the ban."""

    rows: int = 0
    hits: int = 0
    first_hit: int = 0
    banned: bool = False


class Books:
    """The standings of a gate's accounts.

    Attributes:
        judged: queries that were judged, those of banned accounts and of the evaluator left out.
        seconds: spent on them, the model's time not included.
    """

    def __init__(self) -> None:
        self._accounts: dict[int, Standing] = {}
        self.judged, self.seconds = 0, 0.0

    def standing(self, account: int) -> Standing:
        """What is held against an account; a fresh one if it was never heard of."""
        return self._accounts.setdefault(account, Standing())

    def statistics(self, bytes_per_query: float) -> dict[str, object]:
        """Plain JSON values.

        `rows` received, `hits`, `banned_rows` refused after a ban, accounts seen, with a hit, and banned; `first_hit`: which
        of an account's own queries was its first hit, counting from 1, for those that have one; `bytes_per_query` of a
        stored fingerprint, and `milliseconds_per_query` of the gate alone.
        """
        standings = self._accounts
        rows = sum(standing.rows for standing in standings.values())
        return {
            "rows": rows,
            "hits": sum(standing.hits for standing in standings.values()),
            "banned_rows": rows - self.judged,
            "accounts": len(standings),
            "accounts_hit": sum(standing.hits > 0 for standing in standings.values()),
            "accounts_banned": sum(standing.banned for standing in standings.values()),
            "first_hit": {str(account): s.first_hit for account, s in standings.items() if s.hits},
            "bytes_per_query": bytes_per_query,
            "milliseconds_per_query": 1e3 * self.seconds / self.judged if self.judged else 0.0,
        }
