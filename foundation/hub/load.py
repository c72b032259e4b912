"""Names to models: embedded weights, published weights, the Hugging Face Hub, folders and files.

Every name but that of a checkpoint file leads to a folder (`_find`), and every folder is read by
one function (`_read`): a saved model, or an adapter, which is put on its base.

All network traffic goes through huggingface_hub's own client, so HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean here what they mean everywhere else.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from foundation import __version__
from foundation.config import Origin
from foundation.errors import HubError, UsageError, WeightsError, printable
from foundation.files import file_sha256
from foundation.hub.adapter_files import put_on, read_config
from foundation.hub.cards import Card, HubFile, card_names, read_card
from foundation.hub.convert import (
    Converted,
    convert_state_dict,
    published_config,
    read_checkpoint,
)
from foundation.hub.download import (
    CHECKPOINTS,
    Access,
    download,
    download_folder,
    repo_id,
    split_revision,
)
from foundation.hub.folder import (
    ADAPTER_REQUIRED,
    CARD,
    CONFIG,
    RECORDS,
    SUMS,
    WEIGHTS,
    is_adapter,
    read_sums,
    saved_folder,
    summed_files,
    verify_sums,
)
from foundation.hub.saved import load_folder, save_pretrained, unwrapped
from foundation.inference.predict import choose_device
from foundation.model import (
    Model,
    UniversalModel,
    build_model,
    check_finite,
    check_state,
    check_types,
    shapes_of,
)
from foundation.networks.backbones import build_backbone
from foundation.networks.encoder import Encoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foundation.imaging.result import Segmentation
    from foundation.inference.options import InferenceOptions

logger = logging.getLogger(__name__)
_DTYPES = ("float16", "bfloat16", "float32", "float64")


@overload
def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = ...,
    cache_dir: str | Path | None = ...,
    local_files_only: bool = ...,
    token: str | bool | None = ...,
    device: str | torch.device | None = ...,
    dtype: torch.dtype | str | None = ...,
    features_only: Literal[False] = ...,
) -> UniversalModel: ...


@overload
def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = ...,
    cache_dir: str | Path | None = ...,
    local_files_only: bool = ...,
    token: str | bool | None = ...,
    device: str | torch.device | None = ...,
    dtype: torch.dtype | str | None = ...,
    features_only: Literal[True],
) -> Encoder: ...


def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    features_only: bool = False,
) -> Model | Encoder:
    """Load a model, in evaluation mode, strictly: every hash, key and shape must agree.

    Args:
        name_or_path: In this order: a name of `list_models()` (embedded, or published weights that
            are downloaded and converted on this machine); a folder of a saved model, of an adapter,
            which is put on the base that it names, or of a run that holds one of them; a checkpoint
            file of a published format; `org/name` or `org/name@revision` of a saved model or an
            adapter on the Hub.
        revision: Branch, tag or commit.
        cache_dir: Instead of huggingface_hub's own cache.
        local_files_only: Use the cache and never the network.
        token: Instead of HF_TOKEN.
        device: "auto", "cpu", "cuda:1", "mps"; the CPU if not given.
        dtype: Of the parameters: torch.float16 or "float16"; float32 if not given.
        features_only: Return the encoder alone, which gives the feature pyramid, for transfer.

    Raises:
        HubError: There is no such model or revision, it is gated or private, or the Hub cannot be
            reached and the cache does not have it; or an adapter's base cannot be found.
        WeightsError: The weights are incomplete, damaged, or do not fit their configuration.
        UsageError: The request contradicts itself, there is no such device, or an adapter was made
            for other weights than its base now has.
        MissingExtraError: It is an adapter, and peft is not installed.
    """
    target = None if device is None else choose_device(device)
    kind = _floating_point(dtype)
    access = Access(revision, cache_dir, local_files_only, token)
    loaded = _load(str(name_or_path), access, features_only)
    if features_only and isinstance(loaded, Model):
        loaded = loaded.encoder
    return loaded.to(device=target, dtype=kind)


def load_adapter(
    model: nn.Module,
    name_or_path: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> str:
    """Give `model` a saved adapter and activate it; returns the adapter's name.

    The model stays as it was where this fails.

    Args:
        model: The base of the adapter; it is changed in place.
        name_or_path: A folder of an adapter, or of a run that holds one, or `org/name` or
            `org/name@revision` on the Hub.
        name: To know the adapter by; its own if not given.
        revision: As in `from_pretrained`.
        cache_dir: As in `from_pretrained`.
        local_files_only: As in `from_pretrained`.
        token: As in `from_pretrained`.

    Raises:
        UsageError: It was made for other weights, or the model has an adapter of this name or one
            of its classes; or it is a whole model.
        WeightsError: The folder is incomplete or damaged, or not an adapter of its configuration.
        HubError: There is no such folder or repository.
        MissingExtraError: peft is not installed.
    """
    given, revision = split_revision(str(name_or_path), revision)
    path = Path(given).expanduser()
    if path.is_dir():
        folder = saved_folder(path)
    else:
        access = Access(revision, cache_dir, local_files_only, token)
        folder = download_folder(repo_id(given), ADAPTER_REQUIRED, access)
    return put_on(unwrapped(model, UniversalModel), folder, read_config(folder), name)


def model_card(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Card:
    """Read the card of anything that `from_pretrained` loads, without loading its weights.

    Args:
        name_or_path: As in `from_pretrained`.
        revision: As in `from_pretrained`.
        cache_dir: As in `from_pretrained`.
        local_files_only: As in `from_pretrained`.
        token: As in `from_pretrained`.

    Raises:
        HubError: There is no such model, or it has no card.
        WeightsError: Its card has no readable front matter.
    """
    name, revision = split_revision(str(name_or_path), revision)
    if name in card_names():
        return read_card(name)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise HubError(f"{folder} is a checkpoint; it has no card. Load it and save it for one.")
    if folder.is_dir():
        path = saved_folder(folder) / CARD
        if not path.is_file():
            raise HubError(f"{folder} has no {CARD}. Save the model again to get one.")
    else:
        path = download(repo_id(name), CARD, Access(revision, cache_dir, local_files_only, token))
    return Card.read(name, path)


def model_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a saved model or adapter on this machine; download it where it is not.

    Args:
        name_or_path: As in `from_pretrained`, but no checkpoint file.

    Raises:
        HubError: There is no such model.
    """
    name, revision = split_revision(str(name_or_path), None)
    return _find(name, Access(revision))[0]


def model_records(name_or_path: str | Path) -> Path | None:
    """Return the file of what was measured with a model; None where it came without one.

    Args:
        name_or_path: As in `model_folder`.

    Raises:
        HubError: There is no such model, or the Hub cannot be reached.
    """
    name, revision = split_revision(str(name_or_path), None)
    if name in card_names():
        path = read_card(name).folder / RECORDS
    elif Path(name).expanduser().is_dir():
        path = saved_folder(Path(name).expanduser()) / RECORDS
    else:
        try:
            return download(repo_id(name), RECORDS, Access(revision))
        except HubError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            return None
    return path if path.is_file() else None


def segment(
    ct: Any,
    model: str | Path | Model = "universal-ct",
    *,
    classes: str | Sequence[str] | None = None,
    **options: Unpack[InferenceOptions],
) -> Segmentation:
    """Segment one CT; a model given by name is loaded once and remembered.

    Args:
        ct: Path of a NIfTI file, nibabel image, or (array in HU, affine).
        model: A model, or what `from_pretrained` takes.
        classes: Names or aliases; all if not given.
        **options: As of `Model.segment`.

    Returns:
        The masks, on the CT's grid.

    Raises:
        VolumeError: As `Model.segment`.
        UsageError: As `Model.segment`.
        HubError: As `from_pretrained`, for a model given by name.
        WeightsError: As `from_pretrained`.
    """
    if not isinstance(model, Model):
        sums = saved_folder(Path(model).expanduser()) / SUMS
        # A folder that was saved anew is another model under the same name.
        model = _remembered(str(model), sums.stat().st_mtime_ns if sums.is_file() else 0)
    return model.segment(ct, classes=classes, **options)


@functools.lru_cache(maxsize=2)
def _remembered(name: str, saved_ns: int) -> Model:
    return from_pretrained(name)


def _floating_point(dtype: torch.dtype | str | None) -> torch.dtype | None:
    kind = getattr(torch, dtype) if dtype in _DTYPES and isinstance(dtype, str) else dtype
    if kind is None or (isinstance(kind, torch.dtype) and kind.is_floating_point):
        return kind
    raise UsageError(f"dtype is {dtype!r}; weights are floating-point: {', '.join(_DTYPES)}.")


def _load(given: str, access: Access, features_only: bool = False) -> Model | Encoder:
    """A model on the CPU; the encoder where the weights have no head and features are enough."""
    name, revision = split_revision(given, access.revision)
    access = replace(access, revision=revision)
    path = Path(name).expanduser()
    if path.is_file() and name not in card_names():
        return _from_checkpoint(path, features_only)
    folder, source = _find(name, access)
    return _read(folder, source, access)


def _find(name: str, access: Access) -> tuple[Path, str]:
    """The folder of a saved model or adapter, and what others can load it by ("" if nothing)."""
    path = Path(name).expanduser()
    if name in card_names():
        return _known(read_card(name), access), name
    if path.is_dir():
        return saved_folder(path), ""
    repository = repo_id(name)
    source = f"{repository}@{access.revision}" if access.revision else repository
    try:
        folder = download_folder(repository, (CONFIG, SUMS), access)
        pinned = replace(access, revision=folder.name)
        return download_folder(repository, summed_files(folder), pinned), source
    except HubError as error:
        if not isinstance(error.__cause__, EntryNotFoundError | FileNotFoundError):
            raise
        try:
            return download_folder(repository, ADAPTER_REQUIRED, access), source
        except HubError:
            raise error from error.__cause__  # most are models: say what is missing for one


def _read(folder: Path, source: str, access: Access) -> Model:
    """The model of a folder that `_find` returned; an adapter comes on its base."""
    if is_adapter(folder):
        return _with_base(folder, access)
    model = load_folder(folder)
    sha256 = read_sums(folder / SUMS)[WEIGHTS]
    model.set_origin(Origin(model.config.name, source, str(folder.absolute()), sha256))
    if model.config.licence_notice:
        logger.warning("%s: %s", model.config.name, printable(model.config.licence_notice))
    return model


def _with_base(folder: Path, access: Access) -> Model:
    """The base that an adapter names, with the adapter on.

    Raises:
        HubError: the base cannot be found.
    """
    config = read_config(folder)
    beside = folder / config.base_folder
    what_to_do = (
        "If you have it elsewhere: model = from_pretrained(BASE); "
        f"model.load_adapter({str(folder)!r})."
    )
    if not config.base_source and not (config.base_folder and beside.exists()):
        raise HubError(
            f"The adapter {config.name!r} was made for {config.base!r} (weights "
            f"{config.base_sha256[:12]}…), a model that was in a folder and is not there. "
            f"{what_to_do}"
        )
    try:
        base = _load(config.base_source or str(beside), replace(access, revision=None))
    except HubError as error:
        raise HubError(
            f"The base {config.base!r} of the adapter {config.name!r} cannot be loaded: {error} "
            f"{what_to_do}"
        ) from error
    assert isinstance(base, Model)
    put_on(unwrapped(base, UniversalModel), folder, config)
    return base


def _known(card: Card, access: Access) -> Path:
    """The folder of weights that have a card in the package."""
    source = card.source
    if source is not None:
        return _converted(card, source, access)
    if access.revision is not None:
        raise UsageError(
            f"{card.name!r} is embedded in the package and has no revisions; install another "
            "version of universal-ct instead."
        )
    if not card.folder.is_dir():
        raise WeightsError(
            f"This installation has no weights for {card.name!r}: {card.folder} is missing. "
            "Install universal-ct again from its wheel."
        )
    return card.folder


def _converted(card: Card, source: HubFile, access: Access) -> Path:
    """Published weights, converted on this machine once for each source file and our version."""
    checkpoint = download(source.repo, source.file, access)
    # Where huggingface_hub wants what other packages derive from its files.
    assets = (
        Path(access.cache_dir, "assets") if access.cache_dir else Path(constants.HF_ASSETS_CACHE)
    )
    key = f"{file_sha256(checkpoint)[:16]}-{__version__}"  # short: Windows limits whole paths
    folder = assets / "universal-ct" / "converted" / card.name / key
    if folder.is_dir():
        try:
            verify_sums(folder)
            return folder
        except WeightsError as error:
            logger.warning("Converting %s again, its cached copy is bad: %s", card.name, error)
    model = _with_head(checkpoint, convert_state_dict(read_checkpoint(checkpoint)))
    model.config = replace(model.config, name=card.name, licence=card.licence)
    try:
        return save_pretrained(model, folder, card=card)
    except OSError as error:  # a cache that is shared and read-only
        logger.warning("Cannot keep the converted %s for the next time: %s", card.name, error)
        return save_pretrained(model, Path(_scratch().name) / card.name, card=card)


@functools.lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="universal-ct-")


def _from_checkpoint(path: Path, features_only: bool) -> Model | Encoder:
    """A local file of a published format, by whoever trained it."""
    if path.suffix not in CHECKPOINTS:
        raise WeightsError(
            f"{path} is neither a saved folder nor a checkpoint ({', '.join(CHECKPOINTS)})."
        )
    converted = convert_state_dict(read_checkpoint(path), features_only)
    if not features_only:
        model = _with_head(path, converted)
        model.set_origin(Origin(model.config.name, path=str(path.absolute())))
        logger.warning("%s: %s", path.name, model.config.licence_notice)
        return model
    config = published_config(converted.backbone)
    backbone = build_backbone(converted.backbone, 1, **config.backbone_options)
    state = {key.removeprefix("backbone."): value for key, value in converted.state.items()}
    check_state(shapes_of(backbone), state, str(path))
    check_types(backbone.state_dict(), state, str(path))
    check_finite(state, str(path))
    backbone.load_state_dict(state)
    logger.warning("%s: its licence is not in the file; ask where it was published.", path.name)
    return Encoder(backbone, config).eval()


def _with_head(path: Path, converted: Converted) -> Model:
    embedding = converted.prompt_embedding
    if embedding is None:
        raise WeightsError(
            f"{path} holds a {converted.backbone} without a text-driven head, so it segments "
            "nothing by itself. Load its encoder: from_pretrained(..., features_only=True)."
        )
    config = published_config(converted.backbone, len(embedding))
    return build_model(config, converted.state, embedding, str(path))
