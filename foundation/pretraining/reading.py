"""Read a run's configuration strictly: YAML and overrides in, dataclasses out, and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import UsageError
from foundation.pretraining.config import RunConfig
from foundation.settings import did_you_mean, read, read_file, read_yaml
from foundation.training.sources import PhantomsConfig

CONFIGS = Path(__file__).parent / "configs"
# A run may be made longer or shorter; the rest of these have no influence on its weights. Other
# data under the same path are found out by their fingerprint.
_MAY_CHANGE = (
    "workers",
    "save_every",
    "logging",
    "store",
    "schedule.decay",
    "validation.every",
    "validation.overlap",
    "validation.most",
    "weights_dtype",
)


def shipped() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration, after changes of single values.

    Args:
        config: A YAML file, the name of a shipped configuration, or a mapping. Paths in a file are
            relative to the file. A class may be given by its name alone.
        overrides: Changes as "key=value", where the key is dotted and the value is YAML. Paths are
            relative to the working directory.

    Returns:
        The configuration.

    Raises:
        UsageError: There is no such file or name, it is not YAML, a key is unknown, or a value is
            not allowed.
    """
    raw: Any
    if isinstance(config, Mapping):
        raw, source, base = copy.deepcopy(dict(config)), "The configuration", Path.cwd()
    else:
        path = _find(config)
        raw, source, base = _extended(path), str(path), path.resolve().parent
    _resolve_paths(raw, base)
    for override in overrides:
        _override(raw, override)
    _resolve_paths(raw, Path.cwd())
    _write_out(raw.get("model"))
    return read(RunConfig, raw, source)


def _write_out(model: Any) -> None:
    """Replace short forms in place: a class by its name alone, and no options of the backbone."""
    if isinstance(model, dict):
        if isinstance(classes := model.get("classes"), list | tuple):
            model["classes"] = [{"name": c} if isinstance(c, str) else c for c in classes]
        if model.get("backbone_options", {}) is None:
            model["backbone_options"] = {}


def _find(config: str | Path) -> Path:
    path = Path(config).expanduser()
    if path.is_file():
        return path
    if str(config) in shipped():
        return CONFIGS / f"{config}.yaml"
    hint = did_you_mean(str(config), shipped())
    raise UsageError(
        f"There is no configuration {str(config)!r}.{hint} Give a YAML file, or one of "
        f"{', '.join(shipped())}."
    )


def _extended(path: Path) -> dict[str, Any]:
    """A file's values, over those of the file or shipped configuration that it `extends`."""
    raw = read_file(path)
    if not isinstance(raw, dict):
        raise UsageError(f"{path} is not a configuration: expected keys such as `stages:`.")
    _resolve_paths(raw, path.resolve().parent)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    beside = path.parent / str(base)
    below = _find(beside if beside.is_file() else str(base))
    if below.resolve() == path.resolve():
        raise UsageError(f"{path} extends itself.")
    return _merged(_extended(below), raw)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys of both; where both have keys and values they are merged, otherwise `above` counts."""
    merged = dict(below)
    for key, value in above.items():
        inside = merged.get(key)
        both = isinstance(inside, dict) and isinstance(value, dict)
        merged[key] = _merged(inside, value) if both else value  # type: ignore[arg-type]
    return merged


def _resolve_paths(raw: dict[str, Any], base: Path) -> None:
    """Make the paths in `raw` absolute, in place; what is absolute stays, so bases do not mix."""
    for holder, key in ((raw, "store"), (raw.get("validation"), "folds")):
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = str((base / Path(holder[key]).expanduser()).resolve())
    start = raw.get("initialise_from")
    # A name on the hub looks like a path too: it is one where it exists.
    if isinstance(start, str) and (base / start).is_dir():
        raw["initialise_from"] = str((base / start).resolve())


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in place; the value is YAML, a list is indexed by number."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UsageError(f"{override!r} is not key=value, e.g. optimizer.learning_rate=1e-3.")
    *parents, last = path.split(".")
    holder: Any = raw
    for key in parents:
        if isinstance(holder, dict):
            holder = holder.setdefault(key, {})
        else:
            holder = _item(holder, key, path)
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{override!r}: the value is not YAML: {error}") from error
    if isinstance(holder, list):
        _item(holder, last, path)
        holder[int(last)] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise UsageError(f"{path!r} is not in the configuration: {parents[-1]!r} has no parts.")


def _item(holder: Any, key: str, path: str) -> Any:
    if not isinstance(holder, list) or not key.isdigit() or int(key) >= len(holder):
        raise UsageError(f"{path!r} is not in the configuration: there is no item {key!r}.")
    return holder[int(key)]


def plain(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as lists, dictionaries and scalars, which YAML can hold."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def dump(config: RunConfig) -> str:
    """Return YAML that `load_config` reads back to the same configuration."""
    text = yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=100)
    return str(text)


def differences(mine: RunConfig, theirs: RunConfig) -> list[str]:
    """Return the dotted keys in which a resumed run differs and may not, sorted.

    Args:
        mine: The configuration of the run now.
        theirs: That of its earlier part.
    """
    first, second = _flat(plain(mine)), _flat(plain(theirs))
    free = tuple(f"{name}." for name in _MAY_CHANGE)
    differing = [k for k in first.keys() | second.keys() if first.get(k) != second.get(k)]
    return sorted(
        key
        for key in differing
        if not f"{key}.".startswith(free)
        and not (key.startswith("stages.") and key.endswith(".steps"))
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    parts: Any = {}
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    if not parts:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, part in parts:
        found.update(_flat(part, f"{prefix}.{key}" if prefix else str(key)))
    return found


def with_store(config: RunConfig, store: str | Path | None) -> RunConfig:
    """Return a configuration with another store, where one is given."""
    if store is None:
        return config
    return replace(config, store=str(Path(store).expanduser().resolve()))


def smoke(config: RunConfig, divisor: int) -> RunConfig:
    """Return two steps of the same run on one phantom, with no download and no validation.

    Args:
        config: Of the run.
        divisor: Of the backbone; a patch has twice as many voxels along each axis.
    """
    stage = replace(
        config.stages[-1],
        steps=2,
        patch_size=(2 * divisor,) * 3,
        batch_size=1,
        accumulation=1,
        all_cases=False,
    )
    return replace(
        config,
        stages=(stage,),
        sources=(PhantomsConfig(count=1),),
        model=replace(config.model, text="one-hot"),
        validation=replace(config.validation, every=0, fold=None, folds=None, hold_out=()),
        schedule=replace(config.schedule, warm_up=0),
        logging=replace(config.logging, every=1),
        precision="float32",
        compile=False,
        workers=0,
        store=None,
        initialise_from=None,
    )
