"""Real services on loopback for tests: `robustbox.serve`'s application under uvicorn in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from robustbox.accounts import Accounts
from robustbox.protocol import BlackBox
from robustbox.service import Limits, Service


@contextlib.contextmanager
def running(application: Any, **settings: Any) -> Iterator[str]:
    """An ASGI application at an address of its own, while the block lasts."""
    taken = socket.socket(proto=socket.IPPROTO_TCP)  # by which asyncio knows that it may send small answers at once
    taken.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(application, log_level="error", access_log=False, timeout_keep_alive=60, **settings)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    scheme = "https" if "ssl_certfile" in settings else "http"
    try:
        yield f"{scheme}://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def served(
    box: BlackBox, accounts: Accounts | None = None, limits: Limits | None = None, fuse: int = 64
) -> Iterator[tuple[str, Service]]:
    """A black box as a service: its address, and the service itself to look into."""
    service = Service(box, accounts or Accounts(), limits, fuse)
    with running(service.application()) as address:
        yield address, service
