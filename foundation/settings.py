"""Strict reading of settings: plain values of YAML or JSON become dataclasses, or are refused.

    values = read_file(path)                      # what the file holds: mappings, lists, scalars
    config = read(RunConfig, values, str(path))   # a dataclass, each value of its field's type

Fields are declared as usual. Two things that type hints alone cannot say are annotations:

    Size = Annotated[tuple[int, int, int], Cube()]        # one number stands for all three
    Source = Annotated[ScansConfig | PhantomsConfig, ByKind()]   # chosen by the key `kind`
"""

from __future__ import annotations

import datetime
import difflib
import json
import os
import types
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from foundation.errors import UniversalCTError, UsageError

# pydantic and yaml are imported where they are used: listing models or printing help needs neither.

MOST_VALUES = 200_000  # of a YAML document
MOST_DEPTH = 50  # levels in it
_T = TypeVar("_T")


class Cube:
    """Annotates `tuple[int, int, int]`: a single number stands for all three."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Tell pydantic how to read such a field."""
        from pydantic_core import core_schema

        def triple(value: Any) -> Any:
            if isinstance(value, list):
                return tuple(value)
            return (value,) * 3 if type(value) is int else value

        return core_schema.no_info_before_validator_function(triple, handler(source))


class ByKind:
    """Annotates a union of dataclasses, one of which the key `kind` chooses.

    Each of them has a field `kind`, a Literal whose default is its own value.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Tell pydantic how to read such a field."""
        from pydantic import Field

        return handler.generate_schema(Annotated[source, Field(discriminator="kind")])


def read(
    kind: type[_T],
    values: object,
    where: str,
    *,
    version: int | None = None,
    error: type[UniversalCTError] = UsageError,
) -> _T:
    """Make a dataclass from plain values, strictly.

    No key may be unknown or missing, and every value must have its field's type: no text is taken
    for a number, no truth value for an integer, and numbers are finite. An integer is a float, and
    a list is a tuple. Dataclasses may hold others. Keys of mappings become text.

    Args:
        kind: The dataclass to make. Its `__post_init__` may raise UsageError.
        values: A mapping from the fields' names to their values, as `read_file` returns it.
        where: What error messages begin with, such as the file's path.
        version: The `format_version` that `values` must have; it is no field of the dataclass.
        error: The class of the exception.

    Returns:
        The dataclass.

    Raises:
        UsageError: A value is not allowed, or another format version was given. The message names
            the key, what was given and what is allowed. Raised as `error` where that is given.
    """
    from pydantic import ValidationError

    if version is not None:
        values = _without_version(values, version, where, error)
    try:
        text = json.dumps([values], default=_plain)
    except (TypeError, ValueError, RecursionError) as wrong:
        raise error(f"{where}: holds something that is no plain value: {wrong}.") from wrong
    try:
        return cast(_T, _adapter(cast(Any, kind)).validate_json(text)[0])
    except ValidationError as wrong:
        found = wrong.errors(include_url=False)
        # A key that is misspelt is missing too, and a union has an error of each of its members:
        # the misspelling helps most, then what a dataclass says, then what lies deepest.
        first = min(found, key=lambda each: (_RANK.get(each["type"], 2), -len(each["loc"])))
        raise error(f"{where}: {_explained(kind, first)}") from wrong


def read_file(path: str | os.PathLike[str], *, error: type[UniversalCTError] = UsageError) -> Any:
    """Read the plain values of a file: JSON if its name ends in .json, otherwise YAML.

    Args:
        path: The file.
        error: The class of the exception.

    Returns:
        Mappings, lists, text, numbers, truth values and None.

    Raises:
        UsageError: The file cannot be read, or is not of its format. Raised as `error` where that
            is given.
    """
    import yaml

    path = Path(path)
    is_json = path.suffix.lower() == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if is_json else read_yaml(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as wrong:
        form = "JSON" if is_json else "YAML"
        raise error(f"{path} cannot be read as {form}: {wrong}") from wrong


def read_yaml(text: str) -> Any:
    """Parse YAML text, in which 4e-4 is a number and no key stands twice.

    Args:
        text: One YAML document.

    Returns:
        Mappings, lists, text, numbers, truth values and None.

    Raises:
        yaml.YAMLError: The text is not YAML, a mapping has a key twice, or see `check_yaml`.
    """
    import yaml

    check_yaml(text)
    return yaml.load(text, Loader=_yaml_loader())


def check_yaml(text: str) -> None:
    """Refuse YAML that would take memory without end, before anything is made of it.

    An alias (`*name`) stands for all that its anchor holds, so that nine lines of nine aliases each
    stand for more values than a machine can write down; and a reader of deep brackets may crash.

    Args:
        text: One YAML document.

    Raises:
        yaml.YAMLError: The text is not YAML; or it holds more than `MOST_VALUES` values, each alias
            counted as what it stands for, or an alias within its own anchor, or more than
            `MOST_DEPTH` levels.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML has it
    anchored: dict[str, int] = {}  # how many values each anchor stands for
    opened: list[tuple[str | None, int]] = []  # anchor, and the count before it
    count = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.events.CollectionStartEvent):
            opened.append((event.anchor, count))
        elif isinstance(event, yaml.events.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                anchored[anchor] = count - before
        elif isinstance(event, yaml.events.AliasEvent):
            if event.anchor in {anchor for anchor, _ in opened}:
                raise _too_much(f"the alias *{event.anchor} stands within its own anchor", event)
            count += anchored.get(event.anchor, 1)
        elif isinstance(event, yaml.events.ScalarEvent):
            count += 1
            if event.anchor is not None:
                anchored[event.anchor] = 1
        if len(opened) > MOST_DEPTH:
            raise _too_much(f"more than {MOST_DEPTH} levels", event)
        if count > MOST_VALUES:
            raise _too_much(f"more than {MOST_VALUES} values, with what aliases stand for", event)


def _too_much(what: str, event: Any) -> Any:
    import yaml

    return yaml.constructor.ConstructorError(None, None, what, event.start_mark)


def did_you_mean(name: str, choices: Collection[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """Suggest what a wrong name may have meant: " Did you mean 'liver'?", or nothing.

    Args:
        name: The name that was given.
        choices: The names that are allowed.
        most: How many are suggested at most.
        cutoff: How similar a suggestion must be, from 0 to 1.

    Returns:
        Text that follows the sentence about the wrong name, with a space before it; empty where
        nothing is near.
    """
    return suggestion(difflib.get_close_matches(name, choices, n=most, cutoff=cutoff))


def suggestion(names: Collection[str]) -> str:
    """Word a suggestion as `did_you_mean` does, for names that were chosen otherwise.

    Args:
        names: The names to suggest.

    Returns:
        " Did you mean 'a' or 'b'?", or nothing for no names.
    """
    return f" Did you mean {' or '.join(map(repr, names))}?" if names else ""


@cache
def _adapter(kind: Any) -> Any:
    """What pydantic makes of a dataclass; it stands in a tuple, so that all within is as strict."""
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return TypeAdapter(tuple[kind], config=strict)


@lru_cache(maxsize=1)
def _yaml_loader() -> Any:
    import re

    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if (key.tag, key.value) in seen:
                        text = f"the key {key.value!r} stands twice"
                        raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
                    seen.add((key.tag, key.value))
            return dict(super().construct_mapping(node, deep))

    # YAML 1.1, PyYAML's version, takes 4e-4 for text: it wants a dot and a sign. YAML 1.2 does not.
    number = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _without_version(
    values: object, version: int, where: str, error: type[UniversalCTError]
) -> dict[Any, Any]:
    if not isinstance(values, Mapping):
        raise error(f"{where}: expected keys and values, not {values!r:.80}.")
    rest = dict(values)
    found = rest.pop("format_version", None)
    if type(found) is not int or found != version:
        raise error(
            f"{where}: format_version is {found!r}; this version of universal-ct reads format "
            f"version {version}. Update universal-ct, or make the file again."
        )
    return rest


def _plain(value: object) -> Any:
    """Stand-ins for what JSON has no form of: a path, or a date that YAML saw in a text."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike | datetime.date):
        return str(value)
    raise TypeError(f"{value!r:.80}")


# --- what pydantic found, in a sentence -----------------------------------------------------------

_UNKNOWN = "unexpected_keyword_argument"
_RANK = {_UNKNOWN: 0, "value_error": 1}
_KEY = "[key]"  # the last step to a key of a mapping, where that is what is wrong


def _explained(kind: Any, wrong: Any) -> str:
    """One error of pydantic's: where, what was given, what is allowed."""
    given: Any = list(wrong["input"]) if isinstance(wrong["input"], tuple) else wrong["input"]
    steps = list(wrong["loc"][1:])  # the first is the tuple around it all
    by_name = wrong["type"] in (_UNKNOWN, "missing")
    key = steps.pop() if by_name and steps else None
    hint, path = _follow(kind, steps)
    inside = f"{path}: " if path else ""
    if wrong["type"] == _UNKNOWN:
        parts = [option for option in _options(hint) if is_dataclass(option)]
        names = [each.name for part in parts for each in fields(part)]
        return (
            f"{inside}unknown key {key!r}.{did_you_mean(str(key), names)} "
            f"Allowed: {', '.join(names)}."
        )
    if isinstance(key, str):
        return f"{inside}the key {key!r} is missing."
    if wrong["type"] == "value_error":
        return f"{inside}{wrong['ctx']['error']}"
    if wrong["type"].startswith("union_tag"):
        kinds = [each.kind for each in get_args(hint)]
        tag = given.get("kind")
        return (
            f"{inside}kind is {tag!r}.{did_you_mean(str(tag), kinds)} "
            f"Choose from {', '.join(kinds)}."
        )
    allowed = _wanted(hint, given)
    if not path:
        return f"{allowed}, not {given!r:.80}."
    return f"{path} is {given!r:.80}; {allowed}."


def _follow(hint: Any, steps: list[Any]) -> tuple[Any, str]:
    """The type hint at a place, and how the place is written: `stages[0].patch_size`."""
    path = ""
    for step in steps:
        options = [each for each in _options(hint) if each is not types.NoneType]
        if len(options) > 1:  # the step names one of them
            parts = [each for each in options if is_dataclass(each)]
            tags = [(getattr(part, "kind", None), _name(part)) for part in parts]
            chosen = [part for part, tag in zip(parts, tags, strict=True) if step in tag]
            hint = chosen[0] if chosen else hint
            continue
        (hint,) = options
        if step == _KEY:
            return hint, path
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
        if is_dataclass(hint):
            hint = get_type_hints(hint)[str(step)]
        elif get_origin(hint) is tuple and get_args(hint)[-1] is not Ellipsis:
            hint = get_args(hint)[int(step)]
        else:  # of a list its items, of a mapping its keys or values
            wanted = isinstance(step, str) and _KEY not in steps
            hint = get_args(hint)[1 if wanted else 0]
    return hint, path


def _wanted(hint: Any, given: object) -> str:
    """What a type hint allows, in words."""
    options = _options(hint)
    if len(options) > 1:
        each = [_wanted(option, given).removeprefix("expected ") for option in options]
        allowed = " or ".join(dict.fromkeys(each))
        return allowed if allowed.startswith("choose") else f"expected {allowed}"
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is types.NoneType:
        return "expected null"
    if origin is Literal:
        return f"choose from {', '.join(map(str, arguments))}"
    if origin is tuple:
        several = arguments[-1] is Ellipsis
        return "expected a list" if several else f"expected {len(arguments)} values"
    if is_dataclass(hint) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return "expected keys and values"
    finite = "a finite " if isinstance(given, float) and hint is float else ""
    quotes = hint is str and isinstance(given, int | float)
    return f"expected {finite}{_name(hint)}" + (". Put it in quotes" if quotes else "")


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of any other hint, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint))
