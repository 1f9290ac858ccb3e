"""Models behind an address: `http://...` and `https://...` (a `robustbox.serve`), `remote:FILE.yaml` (anybody's service)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from robustbox.errors import InputError

from .remote import RemoteBox
from .service_file import ServiceFile, read_service

TOKEN, ACCOUNT_TOKENS = "ROBUSTBOX_TOKEN", "ROBUSTBOX_ACCOUNT_TOKENS"
"""The environment variables that hold tokens where no YAML file names others."""


def http(rest: str) -> RemoteBox:
    """A model that `python -m robustbox.serve` serves, by its address; a token stands in ROBUSTBOX_TOKEN."""
    return _at(f"http:{rest}")


def https(rest: str) -> RemoteBox:
    """As http, over TLS."""
    return _at(f"https:{rest}")


def remote(path: str) -> RemoteBox:
    """A model behind anybody's HTTP service, as a YAML file describes it (docs/remote.md)."""
    service = read_service(path)
    here = Path(path).parent
    service = replace(
        service,
        ca_file=service.ca_file and str(here / service.ca_file),
        ledger=service.ledger and str(here / service.ledger),
    )
    return RemoteBox(service, f"remote:{path}")


def _at(url: str) -> RemoteBox:
    parts = urlsplit(url)
    if not parts.hostname or parts.username or parts.query or parts.fragment:
        raise InputError(
            f"an address looks like {parts.scheme}://HOST:PORT/PATH, without names, passwords or ?...: a token stands in the "
            f"environment variable {TOKEN}, or in one that a YAML file names (remote:FILE.yaml)"
        )
    token, accounts = (name if os.environ.get(name) else None for name in (TOKEN, ACCOUNT_TOKENS))
    return RemoteBox(ServiceFile(url=url, token_env=token, account_tokens_env=token and accounts), url)
