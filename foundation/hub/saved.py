"""A saved model is a folder: configuration, weights, prompt embeddings, card and SHA-256 sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foundation.adapting.low_rank import has_adapters
from foundation.config import ModelConfig
from foundation.errors import UsageError, WeightsError, listed
from foundation.files import file_sha256, replacing_folder
from foundation.hub.cards import Card, generate_card
from foundation.hub.convert import check_state, shapes_of
from foundation.model import UniversalModel

CONFIG, WEIGHTS, PROMPTS = "config.json", "model.safetensors", "prompt_embedding.safetensors"
CARD, SUMS = "README.md", "SHA256SUMS"
# The card is not among them: it is prose, which people edit on the Hub's pages after publishing.
SUMMED = (CONFIG, WEIGHTS, PROMPTS)
REQUIRED = (*SUMMED, SUMS)
_PROMPT_KEY = "prompt_embedding"
_LFS_POINTER = b"version https://git-lfs"


def save_pretrained(
    model: UniversalModel,
    folder: str | Path,
    *,
    card: Card | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `model` as a folder that `from_pretrained` loads; nothing is left if writing fails.

    card: README.md; generated from the configuration if not given.
    dtype: of the stored weights (torch.float16 halves the file); the model's own if not given.

    Raises:
        UsageError: `folder` is a file, or holds files that are not part of a saved model; or the
            model has adapters.
    """
    folder = Path(folder)
    if has_adapters(model):
        raise UsageError(
            "The model has adapters, which are saved apart: save_adapter. For one folder with all "
            "in it, save what merge_adapter returns."
        )
    with written_at_once(folder, SUMMED) as temporary:
        (temporary / CONFIG).write_text(model.config.to_json(), encoding="utf-8")
        state = {name: stored(tensor, dtype) for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        # Always float32: a few hundred kB, and new classes are compared with these rows.
        prompts = stored(model.prompt_embedding, torch.float32)
        metadata = {"format": "pt", **_origin(model.config)}
        save_file({_PROMPT_KEY: prompts}, temporary / PROMPTS, metadata=metadata)
        sums = write_sums(temporary, SUMMED)
        if card is None:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            card = generate_card(model.config, parameters, sums)
        (temporary / CARD).write_text(card.render(), encoding="utf-8")
    return folder


def load_folder(folder: Path) -> UniversalModel:
    """Rebuild the model that `save_pretrained` wrote, on the CPU, in evaluation mode.

    Parameters come in float32 whatever they are stored in.

    Raises:
        WeightsError: a file is missing or does not have its SHA-256; the keys and shapes of the
            weights are not exactly those of the model that the configuration describes; or the
            prompt embeddings are of other prompts, or of another text encoder.
    """
    verify_sums(folder)
    config_text = (folder / CONFIG).read_text(encoding="utf-8")
    config = ModelConfig.from_json(config_text, str(folder / CONFIG))
    prompt_embedding = _read_prompts(folder / PROMPTS, config)
    return build_model(config, read_tensors(folder / WEIGHTS), prompt_embedding, str(folder))


def build_model(
    config: ModelConfig, state: Mapping[str, Tensor], prompt_embedding: Tensor, source: str
) -> UniversalModel:
    """The model of `config` with exactly the weights `state`, in evaluation mode.

    source: names the weights in errors.

    Raises:
        WeightsError: keys are missing or unexpected, or shapes differ; it lists them.
    """
    try:
        model = UniversalModel(config, prompt_embedding)
    except UsageError as error:
        raise WeightsError(f"The configuration of {source} builds no model: {error}") from error
    check_state(shapes_of(model), state, source)
    model.load_state_dict(state)
    return model.eval()


def write_sums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Write the SHA-256 of a folder's files beside them, and return them.

    names: of the files; the first is one that anybody may read, and so may the others then.
    """
    for name in names[1:]:  # safetensors writes for the owner alone
        shutil.copymode(folder / names[0], folder / name)
    sums = {name: file_sha256(folder / name) for name in names}
    lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return sums


def verify_sums(folder: Path, names: Sequence[str] = SUMMED) -> None:
    """Check that a saved folder is complete and that its files have their SHA-256.

    Raises:
        WeightsError: a file is missing, not summed, or differs; names it with both digests.
    """
    missing = [name for name in (*names, SUMS) if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} is not a complete saved {_what(names)}: it lacks {', '.join(missing)}. "
            "Save or download it again; universal-ct never leaves half a folder."
        )
    sums = _read_sums(folder / SUMS)
    for name in names:
        if name not in sums:
            raise WeightsError(
                f"{folder / SUMS} has no sum for {name}. Save the {_what(names)} again."
            )
        actual = file_sha256(folder / name)
        if actual != sums[name]:
            raise WeightsError(
                f"{folder / name} is damaged or was changed: {SUMS} says SHA-256 {sums[name]}, "
                f"the file has {actual}.{_pointer_hint(folder / name)} Get the folder again."
            )


def _read_sums(path: Path) -> dict[str, str]:
    """Lines as `sha256sum` writes them: the digest, two spaces (or ` *`), the file's name."""
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not name[1:]:
            raise WeightsError(f"{path} has a line that is not `SHA-256  file`: {line!r}.")
        sums[name[1:]] = digest.lower()
    return sums


def _what(names: Sequence[str]) -> str:
    return "model" if WEIGHTS in names else "adapter"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        WeightsError: it is not one.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}.") from error


def _origin(config: ModelConfig) -> dict[str, str]:
    """What prompt embeddings were made of: the encoder, and the sentence behind each row."""
    prompts = [spec.prompt for spec in config.classes]
    return {"text": json.dumps(asdict(config.text)), "prompts": json.dumps(prompts)}


def _read_prompts(path: Path, config: ModelConfig) -> Tensor:
    """The prompt embeddings (K, D), which say themselves what they are the embeddings of."""
    tensors = read_tensors(path)
    expected = (len(config.classes), config.text.dim)
    if set(tensors) != {_PROMPT_KEY} or tuple(tensors[_PROMPT_KEY].shape) != expected:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise WeightsError(
            f"{path} holds {found}; the configuration asks for one tensor {_PROMPT_KEY!r} of shape "
            f"{expected}."
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    for name, wanted in _origin(config).items():
        if metadata.get(name) != wanted:
            raise WeightsError(
                f"{path} holds embeddings whose {name} is {metadata.get(name)}, but {CONFIG} says "
                f"{wanted}: embeddings of two encoders, or of other prompts, must not be mixed. "
                "Save the model again."
            )
    return tensors[_PROMPT_KEY].clone()  # not a view of the file, which may be replaced


def _pointer_hint(path: Path) -> str:
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return " It is a Git LFS pointer: run `git lfs pull`." if is_pointer else ""


def stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is written: on the CPU, on its own, floats in `dtype` if one is given."""
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # A copy of its own: safetensors refuses tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def written_at_once(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name only when all is written.

    names: of the files that it will have, beside sums and card; an older folder of such files is
    replaced.

    Raises:
        UsageError: `folder` is a file, or holds other files.
    """
    _check_replaceable(folder, names)
    with replacing_folder(folder) as temporary:
        yield temporary


def _check_replaceable(folder: Path, names: Sequence[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"{folder} is a file. A saved {_what(names)} is a folder: give another name."
        )
    if folder.is_dir():
        found = {path.name for path in folder.iterdir()}
        # A README.md or config.json alone may be anybody's; the sums are ours.
        foreign = sorted(found - {*names, SUMS, CARD} if SUMS in found else found)
        if foreign:
            raise UsageError(
                f"{folder} holds other files ({listed(foreign)}). Saving replaces the whole "
                "folder, so give a new or an empty one."
            )
