"""robustbox: attacks on, and defenses of, models that can only be queried.

    import robustbox as rb
    result = rb.run_attack("cifar10-resnet20", *rb.load_data("foolbox:cifar10")[:2], attack="cgba", budget=1000)

`robustbox.protocol` has the five nouns on which everything stands.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# attacks/, defenses/ and models/ stand beside this folder in a checkout and inside it after an install: extending the
# path makes `robustbox.attacks` mean the same in both.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "attacks" / "__init__.py").is_file():
    __path__.append(str(_root))

from robustbox.api import list_attacks, load_data, load_model, run_attack  # noqa: E402  (the path comes first)
from robustbox.errors import InputError, ModelError  # noqa: E402
from robustbox.protocol import Answer, Attack, BlackBox, BudgetExhausted, Defense, Query, Task  # noqa: E402
from robustbox.results import AttackResult  # noqa: E402

if _TYPE_CHECKING:
    from robustbox.auditing.run import run_audit

__all__ = [
    "Answer",
    "Attack",
    "AttackResult",
    "BlackBox",
    "BudgetExhausted",
    "Defense",
    "InputError",
    "ModelError",
    "Query",
    "Task",
    "list_attacks",
    "load_data",
    "load_model",
    "run_attack",
    "run_audit",
]


def __getattr__(name: str) -> object:
    """What costs more than it is worth at every start is imported where it is first used."""
    if name == "run_audit":
        from robustbox.auditing.run import run_audit

        return run_audit
    raise AttributeError(f"module 'robustbox' has no attribute '{name}'")
