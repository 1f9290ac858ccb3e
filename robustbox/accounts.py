"""The accounts of a service: who holds which token, and what of its budget is left."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbox.bodies import Refusal
from robustbox.errors import InputError


@dataclass(frozen=True, slots=True)
class Client:
    """Who holds a token.

    Args:
        account: the account whose rows it sends.
        name: how logs call it; never the token.
        budget: rows over all that it sends, or None.
        acts: whether it may send rows for other accounts: an evaluator's token.
    """

    account: int = 0
    name: str = "anyone"
    budget: int | None = None
    acts: bool = False


class Accounts:
    """Tokens and budgets.

    Args:
        clients: who holds a token, by the token's sha256; None: whoever asks is one client, who acts for all accounts.
        budget: rows that each account may send (accounts below 0, the evaluator's, have no such limit), or None.
    """

    def __init__(self, clients: dict[str, Client] | None = None, budget: int | None = None) -> None:
        self._clients, self._budget = clients, budget
        self._sent: Counter[int] = Counter()
        self._spent: Counter[str] = Counter()

    def client(self, authorization: str | None) -> Client:
        """Who asks.

        Raises:
            Refusal: no token, or one that nobody holds.
        """
        if self._clients is None:
            return Client(acts=True)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refusal(401, "no_token", "a token is required: Authorization: Bearer TOKEN")
        found = self._clients.get(_digest(token.strip()))
        if found is None:
            raise Refusal(401, "unknown_token", "nobody holds this token")
        return found

    def senders(self, client: Client, named: Sequence[int] | None, n: int) -> list[int]:
        """The accounts of n rows.

        Raises:
            Refusal: the client names an account that is not its own, and may not.
        """
        if named is None:
            return [client.account] * n
        if not client.acts and any(account != client.account for account in named):
            raise Refusal(403, "not_your_account", "this token sends rows for its own account only")
        return list(named)

    def charge(self, client: Client, senders: Sequence[int]) -> None:
        """Charge rows, all or none.

        Raises:
            Refusal: more than is left.
        """
        counts = Counter(senders)
        left = self.left(client)
        if left is not None and len(senders) > left:
            raise Refusal(402, "over_budget", f"{len(senders)} rows asked, {left} left of {client.budget}")
        if self._budget is not None:
            for account, count in counts.items():
                left = self._budget - self._sent[account]
                if account >= 0 and count > left:
                    raise Refusal(402, "over_budget", f"{count} rows asked, {left} left of {self._budget}")
            self._sent.update({account: count for account, count in counts.items() if account >= 0})
        self._spent[client.name] += len(senders)

    def refund(self, client: Client, senders: Sequence[int]) -> None:
        """Take back a charge: the model failed."""
        if self._budget is not None:
            self._sent.subtract(account for account in senders if account >= 0)
        self._spent[client.name] -= len(senders)

    def left(self, client: Client) -> int | None:
        """Rows left of what the client may send over all; None: any number."""
        return None if client.budget is None else client.budget - self._spent[client.name]

    def standing(self, client: Client) -> dict[str, object]:
        """What a client may know of itself."""
        own = None if self._budget is None else self._budget - self._sent[client.account]
        return {
            "account": client.account,
            "acts": client.acts,
            "sent": self._spent[client.name],
            "left": self.left(client),
            "left_of_account": own,
        }


def read_tokens(path: str) -> dict[str, Client]:
    """The clients of a file of tokens, by the token's sha256.

    A line is `TOKEN [name=NAME] [account=N] [budget=ROWS] [acts]`; what follows a # is a comment. Accounts are numbered from 1
    in the order of lines unless given.

    Raises:
        InputError: the file cannot be read, or a line makes no sense; it never shows a token.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file of tokens {path} cannot be read: {error}") from None
    clients: dict[str, Client] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        client = _client(words[1:], len(clients) + 1, f"{path}, line {number}")
        if _digest(words[0]) in clients:
            raise InputError(f"{path}, line {number}: this token stands there before")
        for other in clients.values():
            if other.account == client.account or other.name == client.name:
                raise InputError(f"{path}, line {number}: account {client.account} or its name stands there before")
        clients[_digest(words[0])] = client
    if not clients:
        raise InputError(
            f"the file of tokens {path} holds none: a line is TOKEN [name=NAME] [account=N] [budget=N] [acts]"
        )
    return clients


def _client(words: list[str], number: int, where: str) -> Client:
    given = {"name": f"client-{number}", "account": str(number)}
    for word in words:
        key, equals, value = word.partition("=")
        if word != "acts" and (key not in ("name", "account", "budget") or not equals):
            raise InputError(f"{where}: after the token come name=NAME, account=N, budget=N and acts")
        if key in ("account", "budget") and not re.fullmatch(r"\d{1,18}|[1-8]\d{18}", value):
            raise InputError(f"{where}: {key} must be a whole number of at least 0")
        given[key] = value
    budget = int(given["budget"]) if "budget" in given else None
    return Client(int(given["account"]), given["name"], budget, "acts" in given)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
