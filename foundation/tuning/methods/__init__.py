"""The ways of adapting a model: one class and one file each, with all of its settings.

To add one, write a file with a class like these and name it in `METHODS`; the command line and
`finetune` then have it. Nothing here imports torch before a method is used.

All but `head` begin as `head` does: where the network followed heads that were not trained yet, it
forgot before they had learnt. Reference: Kumar et al., ICLR 2022 (arXiv 2202.10054).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from foundation.errors import UsageError
from foundation.tuning.methods.base import Method, NetworkMethod, Protection
from foundation.tuning.methods.continual import Continual
from foundation.tuning.methods.full import Full
from foundation.tuning.methods.head import Head
from foundation.tuning.methods.lora import Lora

__all__ = [
    "METHODS",
    "Continual",
    "Full",
    "Head",
    "Lora",
    "Method",
    "NetworkMethod",
    "Protection",
    "get_method",
]

METHODS: dict[str, type[Method]] = {each.name: each for each in (Head, Lora, Full, Continual)}


def get_method(name: str, **settings: Any) -> Method:
    """Return the method of this name, with some of its settings changed; None changes nothing.

    Args:
        name: A key of `METHODS`.
        settings: Fields of the method's class.

    Raises:
        UsageError: No such method or setting, or a value that is not allowed.
    """
    if name not in METHODS:
        raise UsageError(f"Unknown method {name!r}. Choose one of {', '.join(METHODS)}.")
    given = {key: value for key, value in settings.items() if value is not None}
    allowed = [each.name for each in fields(METHODS[name])]
    if unknown := sorted(set(given) - set(allowed)):
        raise UsageError(
            f"Unknown setting {unknown[0]!r} of method {name}. Allowed: "
            f"{', '.join(sorted(allowed))}."
        )
    return METHODS[name](**given)
