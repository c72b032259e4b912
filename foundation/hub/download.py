"""Names of repositories, their files into the Hub's cache, and its client's errors as ours.

The client is huggingface_hub's own, so HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and
HF_ENDPOINT mean here what they mean everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from foundation import __version__
from foundation.errors import HubError, UsageError
from foundation.hub.cards import card_names, known_models

LIBRARY = "universal-ct"  # what the Hub counts its requests under
CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")  # suffixes of files
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Access:
    """How the Hub may be used for one request.

    Attributes:
        revision: Branch, tag or commit; None, the repository's main branch.
        cache_dir: Instead of huggingface_hub's own cache.
        local_files_only: Use the cache and never the network.
        token: Instead of HF_TOKEN.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)


def download_folder(repo: str, files: Sequence[str], access: Access) -> Path:
    """Fetch files of a repository, all from one commit.

    Args:
        repo: `org/name`.
        files: Their names.
        access: How the Hub may be used.

    Returns:
        Their folder in huggingface_hub's cache.

    Raises:
        HubError: As `download`.
    """
    first = download(repo, files[0], access)
    # The first answer names the commit; asking for the rest by it keeps a push in between out,
    # and spares the Hub a question about each file that is already here.
    pinned = replace(access, revision=first.parent.name)
    for file in files[1:]:
        download(repo, file, pinned)
    return first.parent


def download(repo: str, file: str, access: Access) -> Path:
    """Fetch one file of a repository, from the cache if it is there unchanged.

    Args:
        repo: `org/name`.
        file: Its name.
        access: How the Hub may be used.

    Returns:
        Its path in huggingface_hub's cache.

    Raises:
        HubError: There is no such repository, revision or file; access is refused; or the Hub
            cannot be reached and the file is not in the cache.
    """
    try:
        path = hf_hub_download(
            repo,
            file,
            revision=access.revision,
            cache_dir=access.cache_dir,
            local_files_only=access.local_files_only,
            token=access.token,
            library_name=LIBRARY,
            library_version=__version__,
        )
    # All of them: the client's transport, and so its exceptions, changed twice between versions.
    except Exception as error:
        raise explained(error, repo, file, access) from error
    return Path(path)


def explained(error: Exception, repo: str, file: str, access: Access) -> HubError:
    """Reword an error of the Hub's client: what was asked, what is wrong and what to do.

    Args:
        error: The client's.
        repo: `org/name` that was asked for.
        file: The file that was asked for.
        access: How the Hub was used.

    Returns:
        The error to raise.
    """
    page = f"{constants.ENDPOINT}/{repo}"
    # Behind "not in the cache" stands the answer that sent the client there.
    responses = [getattr(cause, "response", None) for cause in (error, error.__cause__)]
    status = next((r.status_code for r in responses if r is not None), None)
    login = "pass token=…, set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, HFValidationError):
        return HubError(f"{repo!r} cannot be a repository on the Hub: {error}")
    if isinstance(error, GatedRepoError) or status == 403:
        return HubError(
            f"The Hub refuses access to {repo} ({status}): it is gated, or the token lacks the "
            f"right. Accept its terms at {page}, then {login}."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{repo} has no revision {access.revision!r}. Look at {page}/commits/main.")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        known = known_models(repo, card_names())
        return HubError(
            f"There is no folder {repo!r} here and no such public repository on the Hub ({status})."
            f" If it is private, {login}.{known}"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return HubError(_not_here(error, repo, file, access))
    if isinstance(error, EntryNotFoundError):
        return HubError(
            f"{repo} has no {file}: it is no model or adapter saved by universal-ct. See {page}."
        )
    return HubError(f"Exchanging {file} with {page} failed: {type(error).__name__}: {error}")


def _not_here(error: Exception, repo: str, file: str, access: Access) -> str:
    cache = access.cache_dir or constants.HF_HUB_CACHE
    if access.local_files_only or constants.HF_HUB_OFFLINE:
        switch = "local_files_only=True" if access.local_files_only else "HF_HUB_OFFLINE=1"
        return (
            f"{file} of {repo} is not in the cache ({cache}), and {switch} forbids downloading. "
            "Load the model once with a connection, or copy a saved folder here and give its path."
        )
    return (
        f"{file} of {repo} is not in the cache ({cache}), and {constants.ENDPOINT} cannot be "
        f"reached: {error.__cause__ or error}. Check the connection, HTTPS_PROXY and HF_ENDPOINT. "
        "The embedded 'universal-ct' needs no network."
    )


def split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """Split `org/name@revision`; a path may hold an @ of its own and is left as it is.

    Args:
        name: A name of a model, a path, or a repository with or without a revision.
        revision: One that was given beside the name.

    Returns:
        The name without the revision, and the revision.

    Raises:
        UsageError: Two revisions are given, or an empty one.
    """
    base, at, named = name.rpartition("@")
    if not at or Path(name).expanduser().exists() or not (base in card_names() or "/" in base):
        return name, revision
    if not named or revision not in (None, named):
        raise UsageError(f"{name!r} and revision={revision!r} do not agree. Give one revision.")
    return base, named


def repo_id(name: str) -> str:
    """Return `name` if it can be a repository on the Hub.

    Raises:
        HubError: It is neither a known name, nor a path that exists, nor `org/name`.
    """
    if _REPO_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(CHECKPOINTS):
        return name
    if name.startswith((".", "~", "/")) or "/" in name or name.endswith(CHECKPOINTS):
        raise HubError(
            f"There is no file or folder {name!r}. Give a saved folder, a checkpoint, a name of "
            "`universal-ct models`, or org/name on the Hub."
        )
    raise HubError(f"No model is called {name!r}.{known_models(name, card_names())}")
