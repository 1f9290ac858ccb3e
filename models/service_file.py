"""What a service is, where its rows and answers go, and what it costs: the YAML file behind `--model remote:FILE.yaml`.

docs/remote.md explains every key with examples.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import yaml

from robustbox.errors import InputError, unknown_name

Encoding = Literal["float", "uint8", "npy", "png", "jpeg"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """How rows are sent.

    Args:
        body: json (a template), raw (the file or array itself) or multipart (a form with files).
        encoding: float (nested lists in [0, 1]), uint8 (nested lists, 0 to 255), npy, png or jpeg; files in JSON are base64.
        layout: the order of the axes of lists and arrays: chw or hwc.
        quality: of a JPEG, 1 to 100. JPEG loses: what the service sees is not quite the row.
        template: the JSON body; `$images` stands for the list of all rows, `$image` for one, and a list whose only element
            holds `$image` is repeated for each row.
        form_field: the name of the form field that holds an image.
        form: its other fields.
        batch: the most rows of a request.
    """

    body: Literal["json", "raw", "multipart"] = "json"
    encoding: Encoding | None = None
    layout: Literal["chw", "hwc"] = "chw"
    quality: int = 95
    template: Any = None
    form_field: str = "image"
    form: dict[str, str] = field(default_factory=dict)
    batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Response:
    """Where the answer stands, as paths (`robustbox.models.paths`).

    Args:
        rows: the list with one entry for each row; labels and scores are then looked for in each entry. Without it they are
            looked for in the whole document: one answer where a request holds one row, else a list of them.
        labels: the label, a number or a name out of `classes`.
        scores: the scores: a list in the order of classes, an object by names, or a list that goes with `names`; one number is
            the score of class 1 of two.
        names: the names (or numbers) that go with `scores` where these are sorted or few; classes that are not there have 0.
        classes: the names of the classes in order.
        kind: what the scores are; by default their first answer shows it (of one number a row not safely).
        rejected, banned: HTTP statuses by which the service refuses a row, or no longer serves the account.
    """

    rows: str | None = None
    labels: str | None = None
    scores: str | None = None
    names: str | None = None
    classes: list[str] | None = None
    kind: Literal["probability", "logit"] | None = None
    rejected: list[int] = field(default_factory=list)
    banned: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """What happens when a request fails.

    Args:
        attempts: how often a request is sent at most.
        wait: seconds before the first repeat, doubled each time, and as many again at random.
        wait_most: seconds that are waited at most; a service that asks for more (`Retry-After`) ends the run.
        uncharged: HTTP statuses that the service charges nothing for; by default all of 4xx, and 503.
    """

    attempts: int = 5
    wait: float = 0.5
    wait_most: float = 60.0
    uncharged: list[int] = field(default_factory=lambda: [*range(400, 500), 503])


@dataclass(frozen=True, kw_only=True)
class ServiceFile:
    """A service. Without `response` it speaks the language of `robustbox.serve`.

    Args:
        url: its address; of a robustbox service without /v1/...
        token_env: the environment variable that holds the token; it is sent as `token_header: token_prefix TOKEN`.
        account_tokens_env: the variable that holds the tokens of the attacker's accounts, separated by spaces or commas: the
            first account that an attack opens gets the first, and so on. The evaluator's rows go under `token_env`.
        headers: other headers; they are not recorded.
        headers_env: other headers whose values stand in environment variables.
        request, response, retry: see there.
        input_shape: (C, H, W), where the service does not tell.
        classes: the number of classes, where the service does not tell.
        stochastic, stateful: as of a black box. A stateful service is asked one request after the other.
        concurrency: requests in flight at once.
        rate: requests a second at most; default: no limit.
        timeout: seconds for an answer.
        idempotency_header: a header in which each request has a key that its repeats share, if the service charges those once.
        ca_file: a file of certificates that are trusted; verify: false trusts everybody.
        price_per_1000: what 1000 rows cost; currency: in what.
        max_cost: no request is sent that could bring the cost above this.
        ledger: a file that keeps the cost over many runs; `max_cost` then holds for all of them together.
    """

    url: str
    token_env: str | None = None
    token_header: str = "Authorization"
    token_prefix: str = "Bearer "
    account_tokens_env: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    headers_env: dict[str, str] = field(default_factory=dict)
    request: Request = field(default_factory=Request)
    response: Response | None = None
    retry: Retry = field(default_factory=Retry)
    input_shape: list[int] | None = None
    classes: int | None = None
    stochastic: bool = False
    stateful: bool = False
    concurrency: int = 1
    rate: float | None = None
    timeout: float = 60.0
    idempotency_header: str | None = None
    ca_file: str | None = None
    verify: bool = True
    price_per_1000: float | None = None
    currency: str = "USD"
    max_cost: float | None = None
    ledger: str | None = None


def read_service(path: str) -> ServiceFile:
    """The service that a YAML file describes; paths in it start at its folder.

    Raises:
        InputError: the file cannot be read, or a key or value makes no sense.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    service: ServiceFile = _built(ServiceFile, content, path)
    check_service(service, path)
    return service


def check_service(service: ServiceFile, path: str) -> None:
    """Refuse what makes no sense together."""

    def require(fine: bool, complaint: str) -> None:
        if not fine:
            raise InputError(f"{path}: {complaint}")

    try:
        parts = urlsplit(service.url)
    except ValueError:
        parts = urlsplit("")
    require(parts.scheme in ("http", "https") and bool(parts.hostname), "url must be an http:// or https:// address")
    require(parts.username is None and parts.password is None, "no name or password belongs into url: use token_env")
    require(not parts.fragment, "url must have no fragment")
    retry, request = service.retry, service.request
    for name, value in (("concurrency", service.concurrency), ("retry.attempts", retry.attempts)):
        require(value >= 1, f"{name} must be at least 1, not {value}")
    require(request.batch is None or request.batch >= 1, "request.batch must be at least 1")
    require(1 <= request.quality <= 100, "request.quality must be from 1 to 100")
    for name, number in (("timeout", service.timeout), ("rate", service.rate), ("max_cost", service.max_cost)):
        require(number is None or number > 0, f"{name} must be above 0")
    require(min(retry.wait, retry.wait_most, service.price_per_1000 or 0) >= 0, "no wait and no price is below 0")
    require(service.max_cost is None or service.price_per_1000 is not None, "max_cost needs price_per_1000")
    require(service.ledger is None or service.price_per_1000 is not None, "ledger needs price_per_1000")
    shape = service.input_shape
    require(shape is None or (len(shape) == 3 and min(shape) > 0), "input_shape must be [C, H, W]")
    require(
        service.account_tokens_env is None or service.token_env is not None, "account_tokens_env needs token_env too"
    )


def _built(kind: Any, found: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping, every key and type checked."""
    if not isinstance(found, dict):
        raise InputError(f"{where} must be a mapping of keys to values")
    hints = get_type_hints(kind)
    for key in found:
        if key not in hints:
            raise unknown_name(f"key of {where}", str(key), hints)
    given = {key: _value(hints[key], value, f"{where}: {key}") for key, value in found.items()}
    for each in fields(kind):
        if each.name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{where} lacks {each.name}")
    return kind(**given)


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of the type that is due; a whole number serves as a float."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if is_dataclass(option) and isinstance(value, dict):
            return _built(option, value, where)
        if option is float and type(value) in (int, float):
            return float(value)
        if _fits(option, value):
            return value
    due = " or ".join(_named(option) for option in options if option is not types.NoneType)
    raise InputError(
        f"{where} must be {due}, not {type(value).__name__}" + ("" if isinstance(value, dict) else f" {value!r}")
    )


def _fits(hint: Any, value: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(_fits(parts[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(parts[1], item) and isinstance(key, str) for key, item in value.items()
        )
    return type(value) is hint


def _named(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    return "a mapping" if is_dataclass(hint) else str(getattr(hint, "__name__", hint))
