"""Names to models: embedded weights, published weights, the Hugging Face Hub, folders and files.

All network traffic goes through huggingface_hub's own client, so HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean here what they mean everywhere else.
"""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants

from foundation import __version__
from foundation.config import NetworkConfig
from foundation.errors import HubError, UsageError, WeightsError
from foundation.files import file_sha256
from foundation.hub.cards import Card, HubFile, card_names, did_you_mean, list_models, read_card
from foundation.hub.convert import (
    Converted,
    convert_state_dict,
    published_config,
    read_checkpoint,
)
from foundation.hub.download import LIBRARY, Access, download, download_folder, explained
from foundation.hub.saved import (
    CARD,
    CONFIG,
    SUMS,
    load_folder,
    save_pretrained,
    summed_files,
)
from foundation.inference.predict import choose_device
from foundation.model import Model, UniversalModel, build_model, check_state, shapes_of
from foundation.networks.backbones import build_backbone
from foundation.networks.encoder import Encoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foundation.imaging.result import Segmentation
    from foundation.inference.options import InferenceOptions

__all__ = [
    "from_pretrained",
    "list_models",
    "model_card",
    "push_to_hub",
    "save_pretrained",
    "segment",
]

logger = logging.getLogger(__name__)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CHECKPOINTS = (".pth", ".pt", ".safetensors")


@overload
def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = ...,
    cache_dir: str | Path | None = ...,
    local_files_only: bool = ...,
    token: str | bool | None = ...,
    device: str | torch.device | None = ...,
    dtype: torch.dtype | None = ...,
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
    dtype: torch.dtype | None = ...,
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
    dtype: torch.dtype | None = None,
    features_only: bool = False,
) -> Model | Encoder:
    """Load a model, in evaluation mode, strictly: every hash, key and shape must agree.

    name_or_path, in this order: a name of `list_models()` (embedded, or published weights that
    are downloaded and converted on this machine); a folder that `save_pretrained` wrote; a
    checkpoint file of a published format; `org/name` or `org/name@revision` on the Hub.
    revision: branch, tag or commit. cache_dir: instead of huggingface_hub's own cache.
    local_files_only: use the cache and never the network. token: instead of HF_TOKEN.
    device ("auto", "cpu", "cuda:1", "mps"), dtype: of the parameters; CPU, float32 if not given.
    features_only: the encoder alone, which returns the feature pyramid, for transfer.

    Raises:
        HubError: there is no such model or revision, it is gated or private, or the Hub cannot be
            reached and the cache does not have it.
        WeightsError: the weights are incomplete, damaged, or do not fit their configuration.
        UsageError: the request contradicts itself, or there is no such device.
    """
    target = None if device is None else choose_device(device)
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"dtype is {dtype}; weights are floating-point, such as torch.float16.")
    name, revision = _split_revision(str(name_or_path), revision)
    access = Access(revision, cache_dir, local_files_only, token)
    loaded = _load(name, access, features_only)
    if features_only and isinstance(loaded, Model):
        loaded = loaded.encoder
    return loaded.to(device=target, dtype=dtype)


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model with universal-ct",
    card: Card | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Save `model` and upload it in one commit; returns the commit's address.

    private: of a repository that does not exist yet. revision: a branch, made if it is not there.
    card, dtype: as in `save_pretrained`.

    Raises:
        UsageError: the weights' licence forbids passing them on changed and `private` is not True.
        HubError: the Hub cannot be reached, or refuses.
    """
    refuse_changed(model.config, private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary) / "model", card=card, dtype=dtype)
        access = Access(revision, token=token)
        return upload(folder, repo_id, access, model.config, private, commit_message)


def refuse_changed(config: NetworkConfig, private: bool | None) -> None:
    """Refuse to publish what was made of weights whose licence forbids it.

    Raises:
        UsageError: the licence of `config` allows no derivatives, and `private` is not True.
    """
    if _no_derivatives(config) and not private:
        raise UsageError(
            f"{config.name!r} is under {config.licence}, which forbids publishing changed copies. "
            "For your own use, push it with private=True to a repository that is private."
        )


def upload(
    folder: Path,
    repo_id: str,
    access: Access,
    config: NetworkConfig,
    private: bool | None,
    commit_message: str,
) -> str:
    """Put the files of `folder` into a repository in one commit; returns the commit's address.

    access: the token, and the branch, which is made if it is not there. config: of the model that
    the files are, or were made for.

    Raises:
        UsageError: the licence forbids it, see `refuse_changed`.
        HubError: the Hub cannot be reached, or refuses.
    """
    refuse_changed(config, private)
    api = HfApi(token=access.token, library_name=LIBRARY, library_version=__version__)
    files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if _no_derivatives(config):
            # It may have been there before, and be public: `private` does not change that.
            refuse_changed(config, api.model_info(repo_id).private)
        if access.revision is not None:
            api.create_branch(repo_id, branch=access.revision, exist_ok=True)
        # One commit, not upload_folder: a reader never sees new weights under old sums.
        commit = api.create_commit(
            repo_id, files, commit_message=commit_message, revision=access.revision
        )
    except UsageError:
        raise
    except Exception as error:
        raise explained(error, repo_id, files[0].path_in_repo, access) from error
    return str(commit.commit_url)


def model_card(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Card:
    """The card of any model that `from_pretrained` loads, without loading its weights.

    Raises:
        HubError: there is no such model, or it has no card.
        WeightsError: its card has no readable front matter.
    """
    name, revision = _split_revision(str(name_or_path), revision)
    if name in card_names():
        return read_card(name)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise HubError(f"{folder} is a checkpoint; it has no card. Load it and save it for one.")
    if folder.is_dir():
        path = folder / CARD
        if not path.is_file():
            raise HubError(f"{folder} has no {CARD}. Save the model again to get one.")
    else:
        access = Access(revision, cache_dir, local_files_only, token)
        path = download(_repo_id(name), CARD, access)
    return Card.parse(name, path.read_text(encoding="utf-8"), str(path))


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
    """
    if not isinstance(model, Model):
        sums = Path(model).expanduser() / SUMS
        # A folder that was saved anew is another model under the same name.
        model = _remembered(str(model), sums.stat().st_mtime_ns if sums.is_file() else 0)
    return model.segment(ct, classes=classes, **options)


@functools.lru_cache(maxsize=2)
def _remembered(name: str, saved_ns: int) -> Model:
    return from_pretrained(name)


def _no_derivatives(config: NetworkConfig) -> bool:
    return "-nd" in config.licence.lower()


def locate(name_or_path: str | Path, files: Sequence[str], access: Access) -> Path:
    """A folder on this disk, or one with `files` of `org/name` or `org/name@revision` on the Hub.

    Raises:
        HubError: there is no such folder or repository, or it cannot be reached.
    """
    name, revision = _split_revision(str(name_or_path), access.revision)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    return download_folder(_repo_id(name), files, replace(access, revision=revision))


def _split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """`org/name@revision` in two; a path may hold an @ of its own and is left as it is."""
    base, at, named = name.rpartition("@")
    if not at or Path(name).expanduser().exists() or not (base in card_names() or "/" in base):
        return name, revision
    if not named or revision not in (None, named):
        raise UsageError(f"{name!r} and revision={revision!r} do not agree. Give one revision.")
    return base, named


def _load(name: str, access: Access, features_only: bool) -> Model | Encoder:
    """A model on the CPU; the encoder where the weights have no head and features are enough."""
    path = Path(name).expanduser()
    if name in card_names():
        model = _known(read_card(name), access)
    elif path.is_dir():
        model = load_folder(path)
    elif path.is_file():
        return _from_checkpoint(path, features_only)
    else:
        folder = download_folder(_repo_id(name), (CONFIG, SUMS), access)
        pinned = replace(access, revision=folder.name)
        model = load_folder(download_folder(name, summed_files(folder), pinned))
    if model.config.licence_notice:
        logger.warning("%s: %s", model.config.name, model.config.licence_notice)
    return model


def _known(card: Card, access: Access) -> Model:
    source = card.source
    if source is not None:
        return _published(card, source, access)
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
    return load_folder(card.folder)


def _published(card: Card, source: HubFile, access: Access) -> Model:
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
            return load_folder(folder)
        except WeightsError as error:
            logger.warning("Converting %s again, its cached copy is bad: %s", card.name, error)
    model = _with_head(checkpoint, convert_state_dict(read_checkpoint(checkpoint)))
    model.config = replace(model.config, name=card.name, licence=card.licence)
    try:
        save_pretrained(model, folder, card=card)
    except OSError as error:  # a cache that is shared and read-only
        logger.warning("Cannot keep the converted %s for the next time: %s", card.name, error)
    return model


def _from_checkpoint(path: Path, features_only: bool) -> UniversalModel | Encoder:
    """A local file of a published format, by whoever trained it."""
    if path.suffix not in _CHECKPOINTS:
        raise WeightsError(
            f"{path} is neither a saved folder nor a checkpoint ({', '.join(_CHECKPOINTS)})."
        )
    converted = convert_state_dict(read_checkpoint(path), features_only)
    if not features_only:
        model = _with_head(path, converted)
        logger.warning("%s: %s", path.name, model.config.licence_notice)
        return model
    config = published_config(converted.backbone)
    backbone = build_backbone(converted.backbone, 1, **config.backbone_options)
    state = {key.removeprefix("backbone."): value for key, value in converted.state.items()}
    check_state(shapes_of(backbone), state, str(path))
    backbone.load_state_dict(state)
    logger.warning("%s: its licence is not in the file; ask where it was published.", path.name)
    return Encoder(backbone, config).eval()


def _with_head(path: Path, converted: Converted) -> UniversalModel:
    embedding = converted.prompt_embedding
    if embedding is None:
        raise WeightsError(
            f"{path} holds a {converted.backbone} without a text-driven head, so it segments "
            "nothing by itself. Load its encoder: from_pretrained(..., features_only=True)."
        )
    config = published_config(converted.backbone, len(embedding))
    return build_model(config, converted.state, embedding, str(path))


def _repo_id(name: str) -> str:
    """`name` if it can be a repository on the Hub.

    Raises:
        HubError: it is neither a known name, nor a path that exists, nor `org/name`.
    """
    if _REPO_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(_CHECKPOINTS):
        return name
    if name.startswith((".", "~", "/")) or "/" in name or name.endswith(_CHECKPOINTS):
        raise HubError(
            f"There is no file or folder {name!r}. Give a saved folder, a checkpoint, a name of "
            "`universal-ct models`, or org/name on the Hub."
        )
    raise HubError(f"No model is called {name!r}.{did_you_mean(name, card_names())}")
