"""Text encoders by the names that the paper has for them, for the scripts that compare them.

names = at_hand(lab, lab.plan.options["text"])     # those whose weights can be had here
class_embeddings("MiniLM")                         # (32, 384): a row for each class
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import cache

import torch
from lab import Lab
from torch import Tensor

from foundation import (
    CLASSES,
    TEXT_ENCODERS,
    HubError,
    MissingExtraError,
    UsageError,
    embed_classes,
)

ONE_HOT = "one-hot"
# Name here → `model.text` of a training.
ENCODERS = {
    ONE_HOT: ONE_HOT,
    "MiniLM": "minilm",
    "CLIP": "clip",
    "BioBERT": "biobert",
    "BioLinkBERT": "biolinkbert",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add what to do where the weights of an encoder cannot be had."""
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave text encoders out whose weights cannot be had; smoke and mini always do",
    )


@cache
def class_embeddings(name: str) -> Tensor:
    """Embed the prompts of the 32 classes, by the paper's template V3.

    Args:
        name: Of `ENCODERS`.

    Returns:
        (32, D) float32, in the order of the taxonomy.

    Raises:
        HubError: The encoder's weights are neither on this machine nor can be fetched.
        MissingExtraError: The extra `text` is not installed.
    """
    if name == ONE_HOT:
        return torch.eye(len(CLASSES))
    return embed_classes([each.term for each in CLASSES], TEXT_ENCODERS[ENCODERS[name]])


def at_hand(lab: Lab, names: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Find the encoders whose weights can be had here, and say which cannot.

    Args:
        lab: The experiment.
        names: Of `ENCODERS`.
        others: Names of further arms, which need no encoder.

    Returns:
        Those that can be had.

    Raises:
        UsageError: One cannot be had in the real size, and --skip-missing is not given; or `--only`
            names another.
    """
    wanted = dict(text.split("=", 1) for text in lab.given.only if "=" in text).get("text")
    if wanted is not None and wanted not in [*names, *others]:
        raise UsageError(f"--only text={wanted}: there is no such arm; give {', '.join(names)}.")
    found = []
    for name in [each for each in names if wanted in (None, each)]:
        try:
            class_embeddings(name)
        except (HubError, MissingExtraError) as error:
            reason = str(error).splitlines()[0]
            advice = (
                "Run it once where the Hugging Face Hub can be reached, or copy its cache here"
                if isinstance(error, HubError)
                else "pip install 'universal-ct[text]'"
            )
            if lab.size == "real" and not lab.given.skip_missing:
                raise UsageError(f"{name}: {reason} {advice}; or give --skip-missing.") from None
            print(f"{name} is left out: {reason} {advice}.", file=sys.stderr)
        else:
            found.append(name)
    return found
