"""`python -m robustbox.serve`: a model, defended or not, as an HTTP service; the mirror of `--model http://...`.

    python -m robustbox.serve --model cifar10-resnet20 --defense blacklight --tokens tokens.txt --port 8000
    python -m robustbox.attack --model http://127.0.0.1:8000 --data foolbox:cifar10

SIGTERM and Ctrl-C end it once the requests in flight are answered. Exit codes: 0 it was told to end; 2 bad input (one line on
stderr). docs/serve.md describes the protocol.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from robustbox import inputs, registry
from robustbox.accounts import Accounts, read_tokens
from robustbox.boxes import as_black_box
from robustbox.config import add_options, canonical, explained, spelled_out
from robustbox.defense_file import takes_options
from robustbox.errors import InputError
from robustbox.state import State
from robustbox.worker import log

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from robustbox.service import Service

PROGRAM = "python -m robustbox.serve"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What to serve to whom.

    Args:
        model: a zoo name, timm:NAME, torchvision:NAME or file:PATH.
        defense: a name, a file that robustbox.defend wrote, or a list, outermost first. Options of a single name are
            --defense.NAME.
        seed: the defense's secrets and noise come from it.
        device: auto, cpu, cuda, cuda:1 and so on.
        tokens: a file of tokens, a line each: TOKEN, then any of name=NAME account=N budget=ROWS acts; default: whoever can
            reach the service may ask, on behalf of any account.
        budget: rows that each account may send; default: any number.
        host: the address to listen at; one that other machines reach needs tokens.
        port: the port to listen at; 0 takes a free one.
        request_rows: rows that a request may hold.
        request_megabytes: size that a request's body may have.
        fuse: rows of requests that wait for the model which are sent to it in one pass.
        grace: seconds that requests in flight are given when the service ends.
        state: a file in which stateful defenses keep their histories and bans, so that a restart forgets none; default: they
            end with the process.
    """

    model: str = "cifar10-resnet20"
    defense: str | list[str] | None = None
    defense_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    tokens: str | None = None
    budget: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    request_rows: int = 1024
    request_megabytes: float = 64.0
    fuse: int = 64
    grace: int = 60
    state: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        config = parse(list(sys.argv[1:] if argv is None else argv))
        service = build(config)
        run(service, config)
    except InputError as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse(words: list[str]) -> ServeConfig:
    """The configuration that a command line asks for; `--help` prints and exits.

    Raises:
        InputError: an unknown option or name, or a value of the wrong type.
    """
    words = [canonical(word) for word in words]
    parser = ArgumentParser(
        prog=PROGRAM, description=(__doc__ or "").partition("\n")[0], exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(ServeConfig, None, skip={"defense_options"})
    switches: set[str] = set()
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--defense")
    try:
        if name := takes_options(peek.parse_known_args(words)[0].defense):
            factory = registry.load("defenses", name)
            add_options(parser, factory, "defense_options.", f"options of defense {name}")
            switches = {f"--defense_options.{f.name}" for f in fields(factory) if f.type in ("bool", bool)}
        given: dict[str, Any] = parser.parse_args(spelled_out(words, switches)).as_dict()
    except argparse.ArgumentError as error:
        raise explained(error, parser) from None
    return ServeConfig(**{f.name: given[f.name] for f in fields(ServeConfig) if f.name in given})


def build(config: ServeConfig) -> Service:
    """The service that a configuration describes.

    Raises:
        InputError: what is wrong with it.
    """
    try:
        from robustbox.service import Limits, Service
    except ImportError as error:
        raise InputError(
            f"the service needs starlette and uvicorn ({error}): pip install 'robustbox[serve]'"
        ) from error
    for count in ("request_rows", "fuse", "grace"):
        inputs.check_count(getattr(config, count), f"--{count.replace('_', '-')}")
    if config.budget is not None:
        inputs.check_count(config.budget, "--budget")
    if not 0 < config.request_megabytes <= 4096:
        raise InputError(f"--request-megabytes must be above 0 and at most 4096, not {config.request_megabytes}")
    if not 0 <= config.port <= 65535:
        raise InputError(f"--port must be from 0 to 65535, not {config.port}")
    if config.tokens is None and not _loopback(config.host):
        raise InputError(f"--host {config.host} can be reached from other machines: give --tokens FILE")
    clients = None if config.tokens is None else read_tokens(config.tokens)
    box = as_black_box(config.model, config.device)
    defenses = inputs.resolve_defenses(config.defense, config.defense_options)
    for recipe in reversed(defenses):
        box = recipe.wrap(box, config.seed)
    limits = Limits(rows=config.request_rows, megabytes=config.request_megabytes)
    service = Service(box, Accounts(clients, config.budget), limits, config.fuse)
    if config.state is not None:
        if box.noticed(0) is None:
            raise InputError("--state keeps what defenses remember of accounts, and none here does: leave it out")
        names = [[recipe.name, recipe.options()] for recipe in defenses]
        identity = {"defenses": names, "seed": config.seed, "input shape": box.input_shape, "classes": box.classes}
        state = service.held.enter_context(contextlib.closing(State(config.state, identity)))
        box.persist(state)
        if not state.shelves:
            service.held.close()
            raise InputError(f"--state: what {box.name} remembers of accounts cannot be kept in a file: leave it out")
    return service


def run(service: Service, config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; what is in flight then is answered.

    Raises:
        InputError: the address cannot be listened at.
    """
    import uvicorn

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    taken = _listening(config.host, config.port)
    settings = uvicorn.Config(
        _reporting(service.application()),
        http="h11",
        log_level="critical",  # whoever sends bad bytes shall not fill the log
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.grace,
        timeout_keep_alive=75,
    )
    for quiet in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended: that is no failure
        signal.signal(quiet, lambda *_: None)
    host, port = taken.getsockname()[:2]
    print(f"{service.box.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if config.state is None and service.box.noticed(0) is not None:
        log.warning(
            "histories and bans end with this process, and a restart lets everybody in again: --state FILE keeps them"
        )
    with contextlib.closing(taken):
        uvicorn.Server(settings).run(sockets=[taken])


def _reporting(application: ASGIApp) -> ASGIApp:
    """The application; what it fails on is one line in the log, and nothing where the client broke HTTP."""
    import h11

    async def reporting(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await application(scope, receive, send)
        except h11.LocalProtocolError:
            pass
        except Exception as error:
            log.error("%s: %s", type(error).__name__, str(error).partition("\n")[0])

    return reporting


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address, not yet listening."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error}") from error
    return found


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
