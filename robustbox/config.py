"""What `python -m robustbox.attack` can be told: one dataclass gives the options, the config file and their help.

`--attack.NAME` and `--defense.NAME` are the hyper-parameters of the chosen attack and defense, checked against their
own signatures; in a config file they stand under `attack_options` and `defense_options`.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from robustbox import registry
from robustbox.defense_file import takes_options
from robustbox.errors import InputError, unknown_name
from robustbox.protocol import Norm

PROGRAM = "python -m robustbox.attack"
Factory = Callable[..., Any]
_OPTIONS = {"attack": "attack_options", "defense": "defense_options"}


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """What to run on what.

    Args:
        model: a zoo name (see --list), timm:NAME, torchvision:NAME or file:PATH.
        data: digits, foolbox:NAME, npz:PATH, folder:PATH or torchvision:NAME; default: the model's own sample images.
        images: attack the first so many images of the data set (misclassified ones are counted apart, not replaced);
            default: 20, or all where there are fewer.
        attack: a name (see --list), or foolbox:CLASS. Its own options are --attack.NAME: `--attack NAME --help` shows
            them.
        norm: the distance to keep small: l0 (changed pixels), l2 or linf; default: l2, or the attack's first norm where it
            knows no l2.
        epsilon: radius of the allowed ball, in the units of images in [0, 1]; default: minimise the distance.
        targets: the class to reach: one class for all images, next (label + 1), random (by the seed, never the label),
            or a list with one class an image; default: untargeted.
        budget: queries (rows) that each image may cost.
        total_budget: queries that all images together may cost; default: no such limit.
        defense: a name (see --list), a file that robustbox.defend wrote, or a list, outermost first. Options of the only
            name beside files are --defense.NAME.
        knowledge: what the attacker sees of an answer: label, top-K (as top-5), score or logit; default: the least that
            the attack needs.
        levels: round queries to so many grey levels before the model sees them: 256 for an API that takes 8-bit images.
        seed: every random number comes from it.
        device: auto, cpu, cuda, cuda:1 and so on.
        keep_going: with epsilon, go on after the first success inside the ball and minimise.
        max_rows: rows fused into one forward pass; auto learns the fastest number while running.
        eot: ask each row so many times, at so many queries, and show the attack the consensus: against black boxes that
            answer at random.
        accounts: accounts that the attacker may use up on one image where a gate bans them; null: any number.
        starts: rows to begin from, found elsewhere: another run's folder, whose adversarials are taken by the images that they
            belong to, or a .safetensors file with the tensor adversarials, a row for each image attacked (NaN: none). Each is
            asked first, at one query.
        out: the run's folder; default: a new one under runs/. A run that was stopped goes on there when the same command is
            given again.
    """

    model: str = "cifar10-resnet20"
    data: str | None = None
    images: int | None = None
    attack: str = "cgba"
    attack_options: dict[str, Any] = field(default_factory=dict)
    norm: Norm | None = None
    epsilon: float | None = None
    targets: int | Literal["next", "random"] | list[int] | None = None
    budget: int = 1000
    total_budget: int | None = None
    defense: str | list[str] | None = None
    defense_options: dict[str, Any] = field(default_factory=dict)
    knowledge: str | None = None
    levels: int | None = None
    seed: int = 0
    device: str = "auto"
    keep_going: bool = False
    max_rows: int | Literal["auto"] = "auto"
    eot: int = 1
    accounts: int | None = 1
    starts: str | None = None
    out: str | None = None

    def what_to_run(self) -> dict[str, Any]:
        """What a run's config.yaml holds: all but the folder, so that running it again asks for a new one."""
        empty = {key for key in _OPTIONS.values() if not getattr(self, key)}
        return {name: value for name, value in asdict(self).items() if name not in empty | {"out"}}


@dataclass(frozen=True)
class Command:
    """A parsed command line: what to run, and what the caller wants to see of it."""

    config: AttackConfig
    listing: bool
    dry_run: bool
    quiet: bool
    fresh: bool


def parse(argv: Sequence[str]) -> Command:
    """Read a command line; `--help` and `--print_config` print and exit.

    Raises:
        InputError: an unknown option or name (with the nearest ones), a value of the wrong type, a bad config file.
    """
    words = _freed([canonical(word) for word in argv])
    factories = {kind: _factory(kind, name) for kind, name in _peek(words).items() if name is not None}
    parser = _parser(factories)
    words = spelled_out(words, _switches(factories))
    try:
        given: dict[str, Any] = parser.parse_args(words).as_dict()
    except argparse.ArgumentError as error:
        raise explained(error, parser) from None
    config = AttackConfig(**{f.name: given[f.name] for f in fields(AttackConfig) if f.name in given})
    flags = {"listing": "list", "dry_run": "dry_run", "quiet": "quiet", "fresh": "fresh"}
    return Command(config, **{name: word in given for name, word in flags.items()})


class _Parser(ArgumentParser):
    """Shows the options of attack and defense as they are typed, `--attack.NAME`."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"--(attack|defense)_options\.", r"--\1.", super().format_help(*args, **kwargs))


def _parser(factories: dict[str, Factory]) -> ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--model NAME] [--attack NAME] [--OPTION VALUE ...]",
        description="Attack a model that can only be queried, within an exact budget of queries.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of options, as a run's config.yaml")
    for flag, meaning in {
        "--list": "show the attacks, defenses, models and data that exist, and exit",
        "--dry_run": "check everything, show the worst-case number of queries by ledger, ask none",
        "--quiet": "no progress bar and no table",
        "--fresh": "start over in a folder that holds a run, and forget that run",
    }.items():
        parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=meaning)
    parser.add_class_arguments(AttackConfig, None, skip=set(_OPTIONS.values()))
    for kind, factory in factories.items():
        title = f"options of {kind} {getattr(factory, 'name', factory.__name__)}"
        add_options(parser, factory, f"{_OPTIONS[kind]}.", title)
    return parser


def add_options(parser: ArgumentParser, factory: Factory, prefix: str, title: str) -> None:
    """The factory's parameters as options `--PREFIXname`.

    Their types are resolved here: jsonargparse cannot where a dataclass and its base stand in two modules that postpone
    annotations.
    """
    group = parser.add_argument_group(title)
    hints, meanings = _hints(factory), _meanings(factory)
    for name, parameter in inspect.signature(factory).parameters.items():
        default = None if parameter.default is parameter.empty else parameter.default
        group.add_argument(f"--{prefix}{name}", type=hints[name], default=default, help=meanings.get(name))


def _hints(factory: Factory) -> dict[str, Any]:
    """The types of a factory's parameters; a dataclass's fields are read where each was stated, in its base or itself."""
    if is_dataclass(factory):
        return get_type_hints(factory)
    return get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)


def _meanings(factory: Factory) -> dict[str, str]:
    """What each parameter means, from the docstrings of the class and its bases."""
    family = reversed(inspect.getmro(factory)) if inspect.isclass(factory) else [factory]
    documented = (docstring_parser.parse(member.__doc__ or "").params for member in family)
    return {each.arg_name: " ".join((each.description or "").split()) for params in documented for each in params}


def canonical(word: str) -> str:
    """A word as the parsers spell it: an option with underscores for hyphens, and `attack_options.x` for `attack.x`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = re.sub(r"^(attack|defense)\.", lambda kind: f"{_OPTIONS[kind[1]]}.", name.replace("-", "_"))
    return f"--{name}{equals}{value}"


def _switches(factories: dict[str, Factory]) -> set[str]:
    switches = {f"--{f.name}" for f in fields(AttackConfig) if f.type == "bool"}
    for kind, factory in factories.items():
        switches |= {f"--{_OPTIONS[kind]}.{name}" for name, hint in _hints(factory).items() if hint is bool}
    return switches


def spelled_out(words: list[str], switches: set[str]) -> list[str]:
    """Bare switches with their value: `--keep_going` means `--keep_going=true`."""
    pairs = zip(words, [*words[1:], "--"], strict=False)
    return [f"{word}=true" if word in switches and after.startswith("--") else word for word, after in pairs]


def _freed(words: list[str]) -> list[str]:
    """The words, with a config file as text without the options of an attack or defense in whose place another one is named."""
    typed = _named(words)
    path = typed.pop("config", None)
    content = _read(path)
    foreign = [
        _OPTIONS[kind] for kind, name in typed.items() if name != str(content.get(kind)) and _OPTIONS[kind] in content
    ]
    if not foreign:
        return words
    text = yaml.safe_dump({key: value for key, value in content.items() if key not in foreign})
    return [text if word == path else f"--config={text}" if word == f"--config={path}" else word for word in words]


def _named(words: list[str]) -> dict[str, Any]:
    """What was typed of those options that the grammar depends on."""
    peek = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    for name in ("attack", "defense", "config"):
        peek.add_argument(f"--{name}")
    try:
        return vars(peek.parse_known_args(words)[0])
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None


def _peek(words: list[str]) -> dict[str, str | None]:
    """The attack, and the defense that takes options: these are part of the grammar."""
    given = _named(words)
    chosen: dict[str, Any] = {"attack": AttackConfig.attack, "defense": None}
    chosen |= _read(given.pop("config", None)) | given
    attack = chosen["attack"]
    return {"attack": attack if isinstance(attack, str) else None, "defense": takes_options(chosen["defense"])}


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path if "\n" in path else Path(path).read_text(encoding="utf-8"))  # or text (`_freed`)
    except OSError as error:
        raise InputError(f"the config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the config file {path} is not YAML: {error}") from None
    nested = [content.get(key, {}) for key in _OPTIONS.values()] if isinstance(content, dict) else []
    if not isinstance(content, dict) or not all(isinstance(options, dict) for options in nested):
        raise InputError(f"the config file {path} must hold options by name, as --print_config shows them")
    return content


def _factory(kind: str, name: str) -> Factory:
    factory: Factory = registry.load("attacks" if kind == "attack" else "defenses", name)
    return factory


def explained(error: argparse.ArgumentError, parser: ArgumentParser) -> InputError:
    """The parser's complaint as one line that names options as they are typed."""
    message = " ".join(str(error).split())
    options = [option for action in parser._actions for option in action.option_strings]
    known = [_typed(option) for option in options if re.match(r"--.*\w$", option)]  # no -h, no --targets+
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        word = _typed(unknown[1].partition("=")[0])
        if not word.startswith("--"):
            return InputError(f"'{word}' belongs to no option: options are --NAME VALUE")
        return unknown_name("option", word, known)
    if unknown := re.match(r"Option '(\S+)' is not accepted", message):  # in a config file
        return unknown_name("option", _typed(f"--{unknown[1]}"), known)
    if key := re.match(r'Parser key "([\w.]+)": ', message):
        message = f"{_typed('--' + key[1])}: {message[key.end() :]}"
        if part := re.search(r"NestedArg\(key='([\w.]+)'", message):
            return unknown_name("option", f"{_typed('--' + key[1])}.{part[1]}", known)
    for pattern, plain in (
        (r"Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: ", r"Expected \1. Got value: "),
        (r"Expected (?:an? )?(.*)\. Got value: ", r"expected \1, got "),
        (r"<class '(\w+)'>", r"\1"),
        (r"typing\.Literal", "one of "),
        (r"NoneType", "null"),
    ):
        message = re.sub(pattern, plain, message)
    return InputError(message)


def _typed(option: str) -> str:
    return re.sub(r"^--(attack|defense)_options\b", r"--\1", option)
