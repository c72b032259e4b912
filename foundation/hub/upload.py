"""Models and adapters to the Hugging Face Hub, each in one commit."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from torch import nn

from foundation import __version__
from foundation.config import NetworkConfig
from foundation.errors import UsageError
from foundation.hub.adapter_files import save_adapter
from foundation.hub.download import LIBRARY, Access, explained
from foundation.hub.saved import save_pretrained, unwrapped
from foundation.model import Model, UniversalModel

logger = logging.getLogger(__name__)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model with universal-ct",
    **saving: Any,
) -> str:
    """Save a model and upload it in one commit; returns the commit's address.

    Args:
        model: As in `save_pretrained`.
        repo_id: `org/name`; the repository is made if it is not there.
        token: Instead of HF_TOKEN.
        private: Of a repository that does not exist yet.
        revision: A branch, made if it is not there.
        commit_message: Of the commit.
        saving: The options of `save_pretrained`: card, results, base, notes, dtype, records.

    Raises:
        UsageError: As `save_pretrained`; or the weights' licence forbids passing them on changed
            and `private` is not True.
        HubError: The Hub cannot be reached, or refuses.
    """
    config = unwrapped(model, Model).config
    refuse_changed(config, private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary) / "model", **saving)
        access = Access(revision, token=token)
        return upload(folder, repo_id, access, config, private, commit_message)


def push_adapter(
    model: nn.Module,
    repo_id: str,
    name: str | None = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload an adapter with universal-ct",
    **saving: Any,
) -> str:
    """Save an adapter and upload it in one commit; returns the commit's address.

    Args:
        model: It has the adapter.
        repo_id: As in `push_to_hub`.
        name: Of the adapter; the active one if not given.
        token: As in `push_to_hub`.
        private: As in `push_to_hub`.
        revision: As in `push_to_hub`.
        commit_message: Of the commit.
        saving: The options of `save_adapter`: card, results, notes, dtype.

    Raises:
        UsageError: As `save_adapter`; or the licence of the base forbids passing it on changed and
            `private` is not True.
        HubError: The Hub cannot be reached, or refuses.
    """
    plain = unwrapped(model, UniversalModel)
    refuse_changed(plain.config, private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        save_adapter(plain, folder, name, shared=True, **saving)
        if plain.origin is None or not plain.origin.source:
            logger.warning(
                "The base of this adapter, %s, is only on this machine: whoever loads the adapter "
                "needs that model too. Push it, load it from there, and save the adapter again.",
                plain.config.name if plain.origin is None else plain.origin.name,
            )
        access = Access(revision, token=token)
        return upload(folder, repo_id, access, plain.config, private, commit_message)


def refuse_changed(config: NetworkConfig, private: bool | None) -> None:
    """Refuse to publish what was made of weights whose licence forbids it.

    Args:
        config: Of the model that the files are, or were made for.
        private: Whether the repository is private.

    Raises:
        UsageError: The licence of `config` allows no derivatives, and `private` is not True.
    """
    if "-nd" in config.licence.lower() and not private:
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

    Args:
        folder: Of the files.
        repo_id: `org/name`; the repository is made if it is not there.
        access: The token, and the branch, which is made if it is not there.
        config: Of the model that the files are, or were made for.
        private: Of a repository that does not exist yet.
        commit_message: Of the commit.

    Raises:
        UsageError: The licence forbids it, see `refuse_changed`.
        HubError: The Hub cannot be reached, or refuses.
    """
    api = HfApi(token=access.token, library_name=LIBRARY, library_version=__version__)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private:
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
