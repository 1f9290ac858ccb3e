"""Attempts that brought no answer: whether they cost something, whether to try again, and what the service says."""

from __future__ import annotations

import email.utils
import re
import ssl
from datetime import UTC, datetime

import httpx2

UNSENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)
"""Errors by which nothing reached the service."""
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may pass."""


class Failed(Exception):  # noqa: N818
    """An attempt that brought no answer.

    Args:
        what: a line.
        charged: whether the service may have charged it all the same.
        again: whether to try again.
        wait: seconds that the service asks to wait, or None.
    """

    def __init__(self, what: str, charged: bool, again: bool, wait: float | None = None) -> None:
        super().__init__(what)
        self.charged, self.again, self.wait = charged, again, wait


class Garbled(ValueError):  # noqa: N818
    """An answer that makes no sense."""


def untrusted(error: BaseException | None) -> bool:
    """Whether a connection failed because the service's certificate is not trusted: that does not pass."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def told(response: httpx2.Response) -> str:
    """What a service says with a refusal, in one line."""
    try:
        found = response.json()
        found = found["error"] if isinstance(found, dict) and "error" in found else found
        text = str(found.get("message", found)) if isinstance(found, dict) else str(found)
    except (ValueError, RecursionError):
        text = response.text
    if response.is_redirect:
        text = f"it is elsewhere: {response.headers.get('location', '').partition('?')[0]}"
    return " ".join(text.split())[:200]


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds that a service asks to wait, as a number or a date."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
