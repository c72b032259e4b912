"""A saved model is a folder: configuration, weights, prompt embeddings, card and SHA-256 sums.

What folders of adapters share with it is here too: their names, their sums, how they are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foundation.adapting.adapters import base_sha256
from foundation.adapting.low_rank import has_adapters
from foundation.config import ModelConfig, Origin, read_config
from foundation.errors import UsageError, WeightsError, listed
from foundation.files import file_sha256, read_text, replacing_folder
from foundation.hub.cards import Base, Card, Results, card_names, generate_card, read_card
from foundation.hub.convert import is_lfs_pointer
from foundation.model import (
    Model,
    UniversalModel,
    build_model,
    check_finite,
    check_types,
    weights_of,
)

CONFIG, WEIGHTS, PROMPTS = "config.json", "model.safetensors", "prompt_embedding.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's own names
UNIVERSAL_CT, ADDED_CLASSES = "universal_ct.json", "added_classes.safetensors"
CARD, SUMS = "README.md", "SHA256SUMS"
RECORDS, EVAL_RESULTS = "records.jsonl", ".eval_results"  # what was measured with the weights
# The card is not among them: it is prose, which people edit on the Hub's pages after publishing.
SUMMED = (CONFIG, WEIGHTS, PROMPTS)
ADAPTER_FILES = (UNIVERSAL_CT, PEFT_CONFIG, PEFT_WEIGHTS, ADDED_CLASSES)
REQUIRED, ADAPTER_REQUIRED = (*SUMMED, SUMS), (*ADAPTER_FILES, SUMS)
PLAIN = (CONFIG, WEIGHTS)  # of a model without text
MODEL, ADAPTER = "model", "adapter"  # folders inside that of a run
_PROMPT_KEY = "prompt_embedding"
_Kind = TypeVar("_Kind", bound=Model)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    card: Card | None = None,
    results: Results | None = None,
    base: Base | None = None,
    notes: str = "",
    dtype: torch.dtype | None = None,
    records: str | Path | None = None,
) -> Path:
    """Write `model` as a folder that `from_pretrained` loads; nothing is left if writing fails.

    Weights that were loaded and not changed keep the card that they came with. Any others get one
    that names the model they were loaded from as their base.

    Args:
        model: A model of ours, also inside `torch.compile` or a wrapper for several devices.
        folder: New, empty, or that of an earlier saved model, which is replaced.
        card: README.md, in place of all that follows.
        results: What was measured with the model, for its card.
        base: What the model was trained from, for its card; see `base_of`. By default what it was
            loaded from.
        notes: Further sections for the card, Markdown.
        dtype: Of the stored weights (torch.float16 halves the file); the model's own if not given.
        records: A file of what was measured with these weights, which `universal-ct reproduce`
            reads; it is copied. Weights that were not changed keep those that they came with.

    Raises:
        UsageError: `folder` is a file, or holds files that are not part of a saved model; the
            model has adapters, or is no model of ours.
    """
    model, folder = unwrapped(model, Model), Path(folder)
    if has_adapters(model):
        raise UsageError(
            "The model has adapters, which are saved apart: save_adapter. For one folder with all "
            "in it, save what merge_adapter returns."
        )
    loaded = None if card or base else _as_loaded(model)
    measured: list[Path] = []
    if loaded is not None and not (results or notes) and _unchanged(model, loaded):
        card, measured = _card_of(model), _measured(model)
    if records is not None:
        measured = [Path(records)]
    if card is None and base is None and loaded is not None:
        base = base_of(loaded, model.origin)
    names = SUMMED if isinstance(model, UniversalModel) else PLAIN
    with written_at_once(folder, names) as temporary:
        (temporary / CONFIG).write_text(model.config.to_json(), encoding="utf-8")
        state = {name: stored(tensor, dtype) for name, tensor in _clean(weights_of(model)).items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        if isinstance(model, UniversalModel):
            # Always float32: a few hundred kB, and new classes are compared with these rows.
            prompts = stored(model.prompt_embedding, torch.float32)
            metadata = {"format": "pt", **_origin(model.config)}
            save_file({_PROMPT_KEY: prompts}, temporary / PROMPTS, metadata=metadata)
            _sort_metadata(temporary / PROMPTS)
        sums = write_sums(temporary, names)
        if card is None:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            card = generate_card(
                model.config, parameters, sums, base=base, results=results, notes=notes
            )
        (temporary / CARD).write_text(card.render(), encoding="utf-8")
        for path in measured:
            if path.is_dir():
                shutil.copytree(path, temporary / path.name)
            else:
                shutil.copy(path, temporary / RECORDS)
    return folder


def unwrapped(model: nn.Module, kind: type[_Kind]) -> _Kind:
    """Return the model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Args:
        model: As it is used.
        kind: `Model`, or `UniversalModel` where a text-driven one is needed.

    Raises:
        UsageError: There is no such model inside.
    """
    plain: object = model
    while not isinstance(plain, kind):
        parts = vars(plain).get("_modules", {})
        inner = parts.get("_orig_mod", parts.get("module"))
        if inner is None:
            raise UsageError(
                f"This is a {type(model).__name__}, not a {kind.__name__}. Give the whole model, "
                "as from_pretrained returns it; save an encoder or another part by torch.save."
            )
        plain = inner
    return plain


def base_of(model: Model, origin: Origin | None = None) -> Base:
    """Describe a model as the base of what is trained from it: for a card, before the training.

    Args:
        model: As it was loaded.
        origin: Where from; what the model itself says if not given.
    """
    origin = origin or model.origin or Origin(model.config.name)
    return Base(origin.name, origin.source, base_sha256(model))


def _as_loaded(model: Model) -> Model | None:
    """What the model was loaded from, read again; None if that is not there."""
    if model.origin is None or not Path(model.origin.path).is_dir():
        return None
    try:
        return load_folder(Path(model.origin.path))
    except WeightsError:
        return None


def _unchanged(model: Model, loaded: Model) -> bool:
    now, then = _clean(model.state_dict()), loaded.state_dict()
    return model.config == loaded.config and all(
        torch.equal(now[name], value.to(now[name])) for name, value in then.items()
    )


def _card_of(model: Model) -> Card | None:
    """The card that the model came with."""
    assert model.origin is not None
    if model.origin.source in card_names():
        return read_card(model.origin.source)
    path = Path(model.origin.path) / CARD
    return Card.read(model.config.name, path) if path.is_file() else None


def _measured(model: Model) -> list[Path]:
    """What the folder of unchanged weights says that was measured with them."""
    assert model.origin is not None
    paths = [Path(model.origin.path) / name for name in (RECORDS, EVAL_RESULTS)]
    return [path for path in paths if path.exists()]


def _clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by the names that it has where no part is compiled."""
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def load_folder(folder: Path) -> Model:
    """Rebuild the model that `save_pretrained` wrote, on the CPU, in evaluation mode.

    Parameters come in float32 whatever they are stored in.

    Args:
        folder: Of the model.

    Raises:
        WeightsError: A file is missing or does not have its SHA-256; the keys, shapes and types of
            the weights are not exactly those of the model that the configuration describes, or a
            value is not finite; or the prompt embeddings are of other prompts, or of another text
            encoder.
    """
    names = summed_files(folder)
    verify_sums(folder, names)
    config_text = read_text(folder / CONFIG, error=WeightsError)
    config = read_config(config_text, str(folder / CONFIG))
    prompt_embedding = None
    if isinstance(config, ModelConfig):
        if PROMPTS not in names:
            verify_sums(folder)  # which says what is missing
        prompt_embedding = _read_prompts(folder / PROMPTS, config)
    weights = folder / WEIGHTS
    return build_model(
        config,
        read_header(weights),
        prompt_embedding,
        str(folder),
        read=lambda: read_tensors(weights),
    )


def summed_files(folder: Path) -> tuple[str, ...]:
    """Return the files that a saved folder has beside its sums: a model without text has fewer."""
    sums = folder / SUMS
    return PLAIN if sums.is_file() and PROMPTS not in read_sums(sums) else SUMMED


def saved_folder(folder: Path) -> Path:
    """Find the saved model or adapter that a folder is, or holds if it is the folder of a run.

    Args:
        folder: Of a model, of an adapter or of a run; it need not exist.

    Returns:
        The folder of the model or adapter; `folder` itself where there is none.

    Raises:
        UsageError: It holds both.
    """
    if (folder / CONFIG).exists() or is_adapter(folder):
        return folder
    inside = [folder / name for name in (MODEL, ADAPTER) if (folder / name / SUMS).is_file()]
    if len(inside) > 1:
        raise UsageError(f"{folder} holds a model and an adapter. Give one: {inside[0]}.")
    return inside[0] if inside else folder


def is_adapter(folder: Path) -> bool:
    """Return whether a folder is that of an adapter, complete or not."""
    return any((folder / file).exists() for file in (PEFT_CONFIG, UNIVERSAL_CT))


def write_sums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Write the SHA-256 of a folder's files beside them.

    Args:
        folder: Of the files.
        names: Of the files. Whoever may read the first may read all of them afterwards.

    Returns:
        Name of each file → hexadecimal digest.
    """
    for name in names[1:]:  # safetensors writes for the owner alone
        shutil.copymode(folder / names[0], folder / name)
    sums = {name: file_sha256(folder / name) for name in names}
    lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return sums


def verify_sums(folder: Path, names: Sequence[str] = SUMMED) -> None:
    """Check that a saved folder is complete and that its files have their SHA-256.

    Args:
        folder: Of a model or an adapter.
        names: Of the files that it must have.

    Raises:
        WeightsError: A file is missing, has no sum, or differs: then both digests are given.
        UsageError: It is an adapter in the place of a model, or a model in that of an adapter.
    """
    missing = [name for name in (*names, SUMS) if not (folder / name).is_file()]
    if missing:
        _refuse_other_kind(folder, names)
        raise WeightsError(
            f"{folder} is not a complete saved {_what(names)}: it lacks {', '.join(missing)}. "
            "Save or download it again."
        )
    sums = read_sums(folder / SUMS)
    for name in names:
        if name not in sums:
            raise WeightsError(
                f"{folder / SUMS} has no sum for {name}. Save the {_what(names)} again."
            )
        actual = file_sha256(folder / name)
        if actual != sums[name]:
            hint = " It is a Git LFS pointer: run `git lfs pull`."
            raise WeightsError(
                f"{folder / name} is damaged or was changed: {SUMS} says SHA-256 {sums[name]}, "
                f"the file has {actual}.{hint if is_lfs_pointer(folder / name) else ''} "
                "Get the folder again."
            )


def _refuse_other_kind(folder: Path, names: Sequence[str]) -> None:
    """Say so where an adapter is given for a model, or a model for an adapter.

    Raises:
        UsageError: it is.
    """
    if WEIGHTS in names and is_adapter(folder):
        raise UsageError(
            f"{folder} is an adapter, not a whole model: from_pretrained loads it with its base, "
            "load_adapter puts it on a model that you have."
        )
    if WEIGHTS not in names and (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is a whole model, not an adapter: from_pretrained loads it.")
    if WEIGHTS not in names and not (folder / UNIVERSAL_CT).exists() and is_adapter(folder):
        raise WeightsError(
            f"{folder} has no {UNIVERSAL_CT}: peft saved this adapter, or it is incomplete. Save "
            "it by save_adapter, which names the weights that it fits, or download it again."
        )


def read_sums(path: Path) -> dict[str, str]:
    """Read lines as `sha256sum` writes them: the digest, two spaces (or ` *`), the file's name.

    Args:
        path: The file of the sums.

    Returns:
        Name of each file → hexadecimal digest.

    Raises:
        WeightsError: A line is another one.
    """
    sums = {}
    for line in read_text(path, error=WeightsError).splitlines():
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not name[1:]:
            raise WeightsError(f"{path} has a line that is not `SHA-256  file`: {line!r}.")
        sums[name[1:]] = digest.lower()
    return sums


def _what(names: Sequence[str]) -> str:
    return "model" if WEIGHTS in names else "adapter"


_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}  # of the format; those that no network of ours has are left out


# What was read of an open file counts as memory until it is closed.
_READ_BYTES = 32_000_000


def read_header(path: Path) -> dict[str, Tensor]:
    """Read names, shapes and types of the tensors of a safetensors file, and none of its values.

    Args:
        path: The file.

    Returns:
        Name → a tensor on the meta device.

    Raises:
        WeightsError: It is not one, or has a tensor of a type that is not known here.
    """
    header = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in _DTYPES:
                raise WeightsError(
                    f"{path} stores {name} as {kind}; allowed are {', '.join(_DTYPES)}."
                )
            shape = part.get_shape()
            header[name] = torch.empty(shape, dtype=_DTYPES[kind], device="meta")
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file onto the CPU, one after the other.

    Args:
        path: The file.

    Returns:
        Name → tensor, which does not look into the file: that may be replaced. Floating-point
        numbers are float32.

    Raises:
        WeightsError: It is not one.
    """
    tensors: dict[str, Tensor] = {}
    names = list(reversed(read_header(path)))  # the last is read first
    while names:
        read = 0
        with _opened(path) as file:
            while names and read < _READ_BYTES:
                tensor = file.get_tensor(name := names.pop())
                kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                tensors[name] = tensor.to(kind, copy=True)
                read += tensor.nbytes
                del tensor
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}.") from error


def _origin(config: ModelConfig) -> dict[str, str]:
    """What prompt embeddings were made of: the encoder, and the sentence behind each row."""
    prompts = [spec.prompt for spec in config.classes]
    return {"text": json.dumps(asdict(config.text)), "prompts": json.dumps(prompts)}


def _sort_metadata(path: Path) -> None:
    """Give a safetensors file its metadata in alphabetical order.

    Its writer takes a random one. Then a model that is saved again would have another SHA-256, and
    its records would no longer name it.
    """
    content = path.read_bytes()
    start = 8  # the length of the header, which is JSON, comes first
    end = start + int.from_bytes(content[:start], "little")
    header = json.loads(content[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= end - start  # the same signs in another order; the rest is spaces
    path.write_bytes(content[:start] + text.ljust(end - start) + content[end:])


def _read_prompts(path: Path, config: ModelConfig) -> Tensor:
    """The prompt embeddings (K, D), which say themselves what they are the embeddings of."""
    header = read_header(path)
    expected = (len(config.classes), config.text.dim)
    if set(header) != {_PROMPT_KEY} or tuple(header[_PROMPT_KEY].shape) != expected:
        found = {name: tuple(tensor.shape) for name, tensor in header.items()}
        raise WeightsError(
            f"{path} holds {found!r:.300}; the configuration asks for one tensor {_PROMPT_KEY!r} "
            f"of shape {expected}."
        )
    with _opened(path) as file:
        metadata = file.metadata() or {}
    for name, wanted in _origin(config).items():
        if metadata.get(name) != wanted:
            raise WeightsError(
                f"{path} holds embeddings whose {name} is {metadata.get(name)}, but {CONFIG} says "
                f"{wanted}: embeddings of two encoders, or of other prompts, must not be mixed. "
                "Save the model again."
            )
    check_types({_PROMPT_KEY: torch.empty(0)}, header, str(path))
    tensors = read_tensors(path)
    check_finite(tensors, str(path))
    return tensors[_PROMPT_KEY]


def stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Make a copy of a tensor to be written.

    Args:
        tensor: Any tensor.
        dtype: Of the copy, where the tensor is of floating-point numbers; its own if not given.

    Returns:
        A contiguous copy on the CPU.
    """
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # A copy of its own: safetensors refuses tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def written_at_once(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Make a temporary folder beside `folder`, which takes its name only when all is written.

    Args:
        folder: What is written; an older folder of such files is replaced.
        names: Of the files that it will have, beside sums and card.

    Yields:
        The temporary folder.

    Raises:
        UsageError: `folder` is a file, or holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"{folder} is a file. A saved {_what(names)} is a folder: give another name."
        )
    found = {path.name for path in folder.glob("*")}
    # A README.md or config.json alone may be anybody's; the sums are ours.
    ours = {*names, SUMS, CARD, RECORDS, EVAL_RESULTS}
    foreign = sorted(found - ours if SUMS in found else found)
    if foreign:
        raise UsageError(
            f"{folder} holds other files ({listed(foreign)}). Saving replaces the whole "
            "folder, so give a new or an empty one."
        )
    with replacing_folder(folder) as temporary:
        yield temporary
