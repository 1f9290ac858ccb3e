"""The secrets that a service is to be shown: they come from environment variables and go nowhere else."""

from __future__ import annotations

import os
import re

from robustbox.errors import InputError, ModelError

from .service_file import ServiceFile


class Tokens:
    """The tokens and secret headers of a service.

    Args:
        service: names the environment variables.

    Raises:
        InputError: one of them is not set.
    """

    def __init__(self, service: ServiceFile) -> None:
        self.service = service
        self._token = None if service.token_env is None else _secret(service.token_env)
        listed = None if service.account_tokens_env is None else _secret(service.account_tokens_env, r"[\x20-\x7e\s]+")
        self._accounts = re.findall(r"[^\s,]+", listed or "")
        self._opened: dict[int, str] = {}
        self.headers = {name: _secret(variable) for name, variable in service.headers_env.items()}
        secrets = [text for text in (self._token, *self._accounts, *self.headers.values()) if text]
        self._hidden = sorted(secrets, key=len, reverse=True)  # one may begin as another

    def of(self, account: int) -> str | None:
        """The token under which an account sends its rows; the attacker's are given out in the order of first use.

        Raises:
            ModelError: there are no more.
        """
        if account < 0 or not self._accounts:
            return self._token
        if account not in self._opened:
            if len(self._opened) == len(self._accounts):
                raise ModelError(
                    f"the attack opens account {len(self._opened) + 1}, but {self.service.account_tokens_env} holds "
                    f"{len(self._accounts)} tokens: each image and each ban takes one"
                )
            self._opened[account] = self._accounts[len(self._opened)]
        return self._opened[account]

    def hide(self, text: str) -> str:
        """The text without any secret in it."""
        for secret in self._hidden:
            text = text.replace(secret, "***")
        return text


def _secret(variable: str, lawful: str = r"[\x20-\x7e]+") -> str:
    """The value of an environment variable, of lawful characters."""
    value = os.environ.get(variable, "").strip()
    if not value:
        raise InputError(f"the environment variable {variable} is not set: it must hold the service's token")
    if not re.fullmatch(lawful, value):
        raise InputError(f"the environment variable {variable} holds characters that no HTTP header can")
    return value
