"""`universal-ct info`: the card and the configuration of a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.cli.shared import add_json, add_verb, print_json
from foundation.errors import UsageError, WeightsError, printable
from foundation.files import read_text

if TYPE_CHECKING:
    from foundation.config import AdapterConfig, NetworkConfig
    from foundation.hub.cards import Card


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "info", "the card and the configuration of a model")
    verb.add_argument(
        "model",
        metavar="MODEL",
        help="a name, a folder of a model, an adapter or a run, or org/name",
    )
    add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Print the card and the configuration."""
    from foundation.config import AdapterConfig, ModelConfig
    from foundation.taxonomy import NAMES

    card, config = _described(args.model)
    if args.json:
        content: dict[str, Any] = {"name": card.name, "card": dict(card.metadata)}
        if config is not None:
            content["config"] = json.loads(config.to_json())
        print_json({**content, "text": card.text})
        return 0
    about = card.weights
    names = [spec.name for spec in config.classes] if config else []
    if config is None and card.source:
        names = list(NAMES)  # published weights get their configuration when they are converted
    where = f"{card.source.repo}: {card.source.file}" if card.source else None
    facts: list[tuple[str, Any]] = [
        ("model", card.name),
        ("summary", about.get("summary")),
        ("backbone", about.get("backbone")),
        ("parameters", about.get("parameters")),
        ("licence", card.licence),
        ("classes", about.get("classes")),
        ("names", ", ".join(names) or None),
        ("source", where),
    ]
    if isinstance(config, AdapterConfig):
        facts += [
            ("adapter of", config.base),
            ("its SHA-256", config.base_sha256),
            ("rank", config.rank),
            ("text encoder", config.text.encoder),
        ]
    elif config is not None:
        pre = config.preprocessing
        facts += [
            ("text encoder", config.text.encoder if isinstance(config, ModelConfig) else None),
            ("spacing", " × ".join(f"{mm:g}" for mm in pre.spacing_mm) + " mm"),
            ("windows", ", ".join(f"{low:g} to {high:g} HU" for low, high in pre.hu_windows)),
            ("patch", " × ".join(map(str, pre.patch_size)) + " voxels"),
            ("overlap", f"{pre.overlap:g}"),
            ("threshold", f"{pre.threshold:g}"),
        ]
    lines = [f"{name + ':':<14}{value}" for name, value in facts if value is not None]
    print(printable("\n".join(lines)))
    print(printable(f"\n{card.text.rstrip()}"))
    return 0


def _described(name: str) -> tuple[Card, NetworkConfig | AdapterConfig | None]:
    """The card of a model or an adapter, and its configuration where that is on this machine."""
    from foundation.config import read_config
    from foundation.hub.cards import Card, card_names, read_card

    given = Path(name).expanduser()
    if name in card_names():
        card = read_card(name)
        folder = card.folder
    elif given.is_dir():
        from foundation.hub import adapter_files
        from foundation.hub.folder import CARD, is_adapter, saved_folder

        folder = saved_folder(given)
        path = folder / CARD
        if not path.is_file():
            raise UsageError(f"{given} is no saved model, adapter or run: it has no {CARD}.")
        if is_adapter(folder):
            adapter = adapter_files.read_config(folder)
            return Card.read(adapter.name, path), adapter
        card = Card.read(given.name, path)
    else:
        from foundation.hub.load import model_card

        return model_card(name), None
    path = folder / "config.json"
    if not path.is_file():
        return card, None
    return card, read_config(read_text(path, error=WeightsError), str(path))
