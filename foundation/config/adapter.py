"""What an adapter's folder says about it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from foundation.config.classes import BranchSpec, ClassSpec, TextSpec
from foundation.config.limits import MOST_ALPHA, MOST_BRANCHES, MOST_RANK, doubled, parsed
from foundation.errors import UsageError, WeightsError, listed
from foundation.settings import read

ADAPTER_VERSION = 1


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's folder says about it, in two files.

    adapter_config.json is peft's own and holds rank, alpha and the names of the changed layers;
    universal_ct.json holds the rest.

    Attributes:
        name: Of the adapter.
        base: Name of the model that it was made for.
        base_source: What `from_pretrained` loads the base by; empty if it was only in a folder.
        base_folder: That folder, relative to the adapter's; never in an adapter that was pushed.
        base_sha256: See `adapting.adapters.base_sha256`.
        rank: See `adapting.adapters.add_adapter`.
        alpha: See `adapting.adapters.add_adapter`.
        target_modules: Regular expression of the names of the base's layers that it changes.
        classes: That it brings.
        branches: Of these classes.
        text: The encoder that made the embeddings of their prompts.
    """

    name: str
    base: str
    base_source: str
    base_folder: str
    base_sha256: str
    rank: int
    alpha: float
    target_modules: str
    classes: tuple[ClassSpec, ...]
    branches: tuple[BranchSpec, ...]
    text: TextSpec

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise UsageError(f"r (the rank) is {self.rank}; it must be 1 to {MOST_RANK}.")
        if not abs(self.alpha) <= MOST_ALPHA:
            raise UsageError(f"lora_alpha is {self.alpha}; it must lie within ±{MOST_ALPHA:g}.")
        if len(self.branches) > MOST_BRANCHES:
            raise UsageError(
                f"There are {len(self.branches)} branches; an adapter has at most {MOST_BRANCHES}."
            )
        names = [spec.name for spec in self.classes]
        if twice := doubled(names):
            raise UsageError(f"Two classes are called {listed(twice)}; each needs its own name.")
        added = [name for branch in self.branches if not branch.replaces for name in branch.classes]
        if added != names:
            raise UsageError(f"The branches' classes {added} are not the adapter's, {names}.")

    def to_json(self) -> str:
        """Return the text of universal_ct.json."""
        content = asdict(self)
        for name in ("rank", "alpha", "target_modules"):  # peft's file holds these
            del content[name]
        return json.dumps({"format_version": ADAPTER_VERSION, **content}, indent=2) + "\n"

    def to_peft(self) -> str:
        """Return the text of adapter_config.json."""
        source, _, revision = self.base_source.partition("@")
        content = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": source or self.base,
            "revision": revision or None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": self.target_modules,
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, ours: str, pefts: str, source: str) -> AdapterConfig:
        """Read the texts of an adapter's two files strictly.

        Args:
            ours: Of universal_ct.json.
            pefts: Of adapter_config.json.
            source: Their folder, for errors.

        Raises:
            WeightsError: They are not what this version writes, or do not belong together.
        """
        raw, layers = parsed(ours, source), parsed(pefts, source)
        where = f"{source} does not describe an adapter"
        if isinstance(raw, dict) and isinstance(layers, dict):
            known = {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}
            raw |= {name: layers[theirs] for name, theirs in known.items() if theirs in layers}
        config = read(cls, raw, where, version=ADAPTER_VERSION, error=WeightsError)
        if json.loads(config.to_peft()) != layers:
            raise WeightsError(
                f"{where}: universal_ct.json and adapter_config.json do not belong together."
            )
        return config
