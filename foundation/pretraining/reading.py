"""Read a run's configuration strictly: YAML and overrides in, dataclasses out, and back."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from foundation.errors import UsageError
from foundation.pretraining.config import RunConfig
from foundation.training.sources import SOURCES, PhantomsConfig, SourceConfig

CONFIGS = Path(__file__).parent / "configs"
# A run may be made longer or shorter; the rest of these have no influence on its weights. Other
# data under the same path are found out by their fingerprint.
_MAY_CHANGE = (
    *("workers", "save_every", "logging", "store", "schedule.decay"),
    *("validation.every", "validation.overlap", "validation.most", "weights_dtype"),
)
_Spec = TypeVar("_Spec")


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file, a shipped name or a mapping, after `key=value` overrides.

    Paths in a file are relative to the file; those in overrides to the working directory.

    Raises:
        UsageError: no such file or name, not YAML, an unknown key, or a value that is not allowed.
    """
    raw: Any
    if isinstance(config, Mapping):
        raw, source, base = dict(config), "The configuration", Path.cwd()
    else:
        path = _find(config)
        raw, source, base = _read(path), str(path), path.resolve().parent
    _resolve_paths(raw, base)
    for override in overrides:
        _override(raw, override)
    _resolve_paths(raw, Path.cwd())
    built: RunConfig = build(RunConfig, raw, source)
    return built


def _find(config: str | Path) -> Path:
    path = Path(config).expanduser()
    if path.is_file():
        return path
    if str(config) in shipped():
        return CONFIGS / f"{config}.yaml"
    hint = _did_you_mean(str(config), shipped())
    raise UsageError(
        f"There is no configuration {str(config)!r}.{hint} Give a YAML file, or one of "
        f"{', '.join(shipped())}."
    )


def _read(path: Path) -> dict[str, Any]:
    """A file's values, over those of the file or shipped configuration that it `extends`."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
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
    return _merged(_read(below), raw)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys of both; where both have keys and values they are merged, otherwise `above` counts."""
    merged = dict(below)
    for key, value in above.items():
        inside = merged.get(key)
        both = isinstance(inside, dict) and isinstance(value, dict)
        merged[key] = _merged(inside, value) if both else value  # type: ignore[arg-type]
    return merged


def _did_you_mean(name: str, allowed: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, allowed, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


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
    value = yaml.safe_load(text)
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


def build(kind: type[_Spec], values: Mapping[str, Any], where: str) -> _Spec:
    """A dataclass from plain values: no unknown or missing key, every value of its field's type.

    Raises:
        UsageError: otherwise; names the key, and the nearest that exists.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: expected keys and values, not {values!r}.")
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            hint = _did_you_mean(str(key), list(known))
            raise UsageError(f"{where}: unknown key {key!r}.{hint} Allowed: {', '.join(known)}.")
    hints = get_type_hints(kind)
    for name, each in known.items():
        if name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise UsageError(f"{where}: the key {name!r} is missing.")
    given = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**given)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint == SourceConfig:
        return _source(value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (wanted,) = [kind for kind in arguments if kind is not type(None)]
        return _convert(wanted, value, where)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where} is {value!r}; choose from {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        return _tuple(arguments, value, where)
    if is_dataclass(hint):
        # A class may be given by its name alone.
        named = isinstance(value, str) and "name" in {f.name for f in fields(hint)}
        return build(hint, {"name": value} if named else value, where)  # type: ignore[arg-type]
    if origin is not None:
        if not isinstance(value, Mapping | None):
            raise UsageError(f"{where} is {value!r}; expected keys and values.")
        return dict(value or {})
    return _scalar(hint, value, where)


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    repeated = arguments[-1] is Ellipsis
    if arguments == (int, int, int) and isinstance(value, int) and not isinstance(value, bool):
        value = [value] * 3  # a cube
    if not isinstance(value, list | tuple) or not (repeated or len(value) == len(arguments)):
        count = "a list" if repeated else f"{len(arguments)} values"
        raise UsageError(f"{where} is {value!r}; expected {count}.")
    kinds = [arguments[0]] * len(value) if repeated else arguments
    parts = zip(kinds, value, strict=True)
    return tuple(_convert(kind, part, f"{where}[{i}]") for i, (kind, part) in enumerate(parts))


def _scalar(kind: type, value: Any, where: str) -> Any:
    # YAML reads 4e-4 as a string, and an id such as 04 as a number.
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    hint = " Put it in quotes." if kind is str and isinstance(value, int | float) else ""
    raise UsageError(f"{where} is {value!r}; expected {kind.__name__}.{hint}")


def _source(value: Any, where: str) -> SourceConfig:
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in SOURCES:
        hint = _did_you_mean(str(kind), list(SOURCES))
        raise UsageError(f"{where}: kind is {kind!r}.{hint} Choose from {', '.join(SOURCES)}.")
    return build(SOURCES[kind], value, where)


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as lists, dictionaries and scalars, which YAML can hold."""

    def simple(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: simple(part) for key, part in value.items()}
        return [simple(part) for part in value] if isinstance(value, list | tuple) else value

    values: dict[str, Any] = simple(asdict(config))
    return values


def dump(config: RunConfig) -> str:
    """YAML that `load_config` reads back to the same configuration."""
    text = yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=100)
    return str(text)


def differences(mine: RunConfig, theirs: RunConfig) -> list[str]:
    """Dotted keys in which two configurations differ and may not on a resume, sorted."""
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
    """The configuration with another store, where one is given."""
    if store is None:
        return config
    return replace(config, store=str(Path(store).expanduser().resolve()))


def smoke(config: RunConfig, divisor: int) -> RunConfig:
    """Two steps of the same run on one phantom: small patches, no download, no validation.

    divisor: of the backbone; a patch has twice as many voxels along each axis.
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
