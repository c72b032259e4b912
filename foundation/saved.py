"""A saved model is a folder: configuration, weights, prompt embeddings, card and SHA-256 sums."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foundation.cards import Card, generate_card
from foundation.config import ModelConfig
from foundation.errors import UsageError, WeightsError
from foundation.model import UniversalModel

CONFIG, WEIGHTS, PROMPTS = "config.json", "model.safetensors", "prompt_embedding.safetensors"
CARD, SUMS = "README.md", "SHA256SUMS"
# The card is not among them: it is prose, which people edit on the Hub's pages after publishing.
SUMMED = (CONFIG, WEIGHTS, PROMPTS)
REQUIRED = (*SUMMED, SUMS)
_PROMPT_KEY = "prompt_embedding"
_LFS_POINTER = b"version https://git-lfs"
_LISTED = 8  # keys named in an error before it only counts the rest


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
        UsageError: `folder` is a file, or holds files that are not part of a saved model.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    with _written_at_once(folder) as temporary:
        (temporary / CONFIG).write_text(model.config.to_json(), encoding="utf-8")
        state = {name: _stored(tensor, dtype) for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        # Always float32: a few hundred kB, and new classes are compared with these rows.
        prompts = _stored(model.prompt_embedding, torch.float32)
        save_file({_PROMPT_KEY: prompts}, temporary / PROMPTS, metadata={"format": "pt"})
        sums = {name: file_sha256(temporary / name) for name in SUMMED}
        lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
        (temporary / SUMS).write_text("".join(lines), encoding="utf-8")
        if card is None:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            card = generate_card(model.config, parameters, sums)
        (temporary / CARD).write_text(card.render(), encoding="utf-8")
    return folder


def load_folder(folder: Path) -> UniversalModel:
    """Rebuild the model that `save_pretrained` wrote, on the CPU, in evaluation mode.

    Parameters come in float32 whatever they are stored in.

    Raises:
        WeightsError: a file is missing or does not have its SHA-256, or the keys and shapes of the
            weights are not exactly those of the model that the configuration describes.
    """
    verify_sums(folder)
    config_text = (folder / CONFIG).read_text(encoding="utf-8")
    config = ModelConfig.from_json(config_text, str(folder / CONFIG))
    prompts = _read_tensors(folder / PROMPTS)
    expected = (len(config.classes), config.text.dim)
    if set(prompts) != {_PROMPT_KEY} or tuple(prompts[_PROMPT_KEY].shape) != expected:
        found = {name: tuple(tensor.shape) for name, tensor in prompts.items()}
        raise WeightsError(
            f"{folder / PROMPTS} holds {found}; the configuration asks for one tensor "
            f"{_PROMPT_KEY!r} of shape {expected}."
        )
    model = build_model(config, _read_tensors(folder / WEIGHTS), prompts[_PROMPT_KEY], str(folder))
    return model


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
    check_state(model.state_dict(), state, source)
    model.load_state_dict(state)
    return model.eval()


def check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Compare keys and shapes of two state dicts.

    Raises:
        WeightsError: they differ; the message lists what is missing, unexpected or mis-shaped.
    """
    shapes = [
        f"{name} is {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of another shape": shapes,
    }
    parts = [f"{len(keys)} {kind}: {_shorten(keys)}" for kind, keys in problems.items() if keys]
    if parts:
        raise WeightsError(
            f"The weights of {source} do not fit the model its configuration describes; "
            f"{'; '.join(parts)}. Nothing was loaded."
        )


def verify_sums(folder: Path) -> None:
    """Check that a saved folder is complete and that its files have their SHA-256.

    Raises:
        WeightsError: a file is missing, not summed, or differs; names it with both digests.
    """
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} is not a complete saved model: it lacks {', '.join(missing)}. "
            "Save or download it again; universal-ct never leaves half a folder."
        )
    sums = _read_sums(folder / SUMS)
    for name in SUMMED:
        if name not in sums:
            raise WeightsError(f"{folder / SUMS} has no sum for {name}. Save the model again.")
        actual = file_sha256(folder / name)
        if actual != sums[name]:
            raise WeightsError(
                f"{folder / name} is damaged or was changed: {SUMS} says SHA-256 {sums[name]}, "
                f"the file has {actual}.{_pointer_hint(folder / name)} Get the folder again."
            )


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_sums(path: Path) -> dict[str, str]:
    """Lines as `sha256sum` writes them: the digest, two spaces (or ` *`), the file's name."""
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not name[1:]:
            raise WeightsError(f"{path} has a line that is not `SHA-256  file`: {line!r}.")
        sums[name[1:]] = digest.lower()
    return sums


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}.") from error


def _pointer_hint(path: Path) -> str:
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return " It is a Git LFS pointer: run `git lfs pull`." if is_pointer else ""


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # A copy of its own: safetensors refuses tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


def _shorten(keys: list[str]) -> str:
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. A saved model is a folder: give another name.")
    if folder.is_dir():
        foreign = sorted({path.name for path in folder.iterdir()} - {*REQUIRED, CARD})
        if foreign:
            raise UsageError(
                f"{folder} holds other files ({_shorten(foreign)}). Saving replaces the whole "
                "folder, so give a new or an empty one."
            )


@contextmanager
def _written_at_once(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name only when all is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new, old = outer / "new", outer / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.replace(old)
        try:
            new.replace(folder)
        except OSError:
            # Put the earlier model back rather than leave none.
            if old.exists() and not folder.exists():
                old.replace(folder)
            raise
    finally:
        shutil.rmtree(outer, ignore_errors=True)
