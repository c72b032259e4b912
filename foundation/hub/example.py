"""The demo's CT: an open one of a patient where it can be had, or else a generated phantom."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import UniversalCTError
from foundation.files import replacing
from foundation.imaging.volumes import read_ct

MEGABYTE = 1 << 20
CT_NAME = "demo_ct"  # not `ct`, as a dataset's own may be called


class ExampleUnavailableError(UniversalCTError):
    """The open example CT is neither in the cache nor to be had; the text says why."""


@dataclass(frozen=True)
class Example:
    """A file at an address, known by its content.

    Attributes:
        url: Its address.
        sha256: Of its content.
        credit: Whose it is, for the user.
        limit_bytes: More is not downloaded.
        timeout_s: A slower download is given up.
    """

    url: str
    sha256: str
    credit: str
    limit_bytes: int = 32 * MEGABYTE
    timeout_s: float = 15.0


EXAMPLE = Example(
    url="https://raw.githubusercontent.com/wasserth/TotalSegmentator/"
    "0effae9d718aab0c118ce1f8982dcd16b9e32a50/tests/reference_files/example_ct.nii.gz",
    sha256="dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1",
    credit="TotalSegmentator's example CT, 3 mm (github.com/wasserth/TotalSegmentator, Apache-2.0)",
)


def cache_folder() -> Path:
    """Return where fetched files are kept: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "universal-ct"


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE, as huggingface_hub reads it, forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def prepare_ct(
    folder: Path, *, ct: str | None = None, phantom: bool = False, seed: int = 0
) -> tuple[Path, str]:
    """Put the demo's CT into a folder.

    Args:
        folder: Receives the file.
        ct: The user's own file, which is copied.
        phantom: Whether to take the generated phantom without asking the network.
        seed: Of the phantom.

    Returns:
        The file's path, and a sentence for the user that tells what it is.

    Raises:
        VolumeError: `ct` is not a NIfTI file that can be read.
    """
    if ct is not None:
        source = read_ct(ct).path or Path(ct)  # checked before anything is written
        suffix = ".nii" if source.name.lower().endswith(".nii") else ".nii.gz"
        target = folder / f"{CT_NAME}{suffix}"
        if not (target.exists() and target.samefile(source)):
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
        return target, f"Segmenting your CT {source}."
    target = folder / f"{CT_NAME}.nii.gz"
    reason = "as asked for"
    if not phantom:
        try:
            content = example_ct(EXAMPLE)
        except ExampleUnavailableError as error:
            reason = f"because the open example CT is not available: {error}"
        else:
            with replacing(target) as temporary:
                temporary.write_bytes(content)
            return target, f"Segmenting a real CT: {EXAMPLE.credit}."
    from foundation.synthesis.phantom_scans import phantom_ct  # here, for it loads torch

    phantom_ct(target, seed)
    return target, (
        f"Segmenting a generated phantom (seed {seed}), {reason}.\n"
        "A phantom is no patient: it shows that everything works, not how well. "
        "For a real CT: universal-ct demo --ct FILE"
    )


def example_ct(example: Example) -> bytes:
    """Return the content of the example CT's file, from the cache or the network.

    Args:
        example: Which file; its SHA-256 is checked.

    Returns:
        The file's bytes.

    Raises:
        ExampleUnavailableError: The network is forbidden, refuses, or is too slow; or the file is
            too large or has another content.
    """
    cached = cache_folder() / f"{example.sha256[:16]}-{example.url.rpartition('/')[2]}"
    try:
        content = cached.read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() == example.sha256:
        return content
    if offline():
        raise ExampleUnavailableError("HF_HUB_OFFLINE forbids the network")
    content = _fetch(example)
    digest = hashlib.sha256(content).hexdigest()
    if digest != example.sha256:
        raise ExampleUnavailableError(
            f"{example.url} has another content (SHA-256 {digest}) than expected"
        )
    try:
        with replacing(cached) as temporary:
            temporary.write_bytes(content)
    except OSError:
        pass  # a cache that cannot be written only costs the next download
    return content


def _fetch(example: Example) -> bytes:
    """Download into memory, within the time and the size that the example allows.

    In a thread of its own, because neither a name server nor a slow drip of bytes respects the
    timeout of a socket.
    """
    received: list[bytes] = []
    problems: list[str] = []

    def work() -> None:
        try:
            received.append(_read(example))
        except (OSError, http.client.HTTPException, ValueError) as error:
            problems.append(str(getattr(error, "reason", error)) or type(error).__name__)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(example.timeout_s)
    if received:
        return received[0]
    reason = problems[0] if problems else f"no answer within {example.timeout_s:g} s"
    raise ExampleUnavailableError(f"{example.url} cannot be had: {reason}")


def _read(example: Example) -> bytes:
    request = urllib.request.Request(example.url, headers={"User-Agent": "universal-ct"})
    with urllib.request.urlopen(request, timeout=example.timeout_s) as response:
        content: bytes = response.read(example.limit_bytes + 1)
    if len(content) > example.limit_bytes:
        raise ValueError(f"the file is larger than {example.limit_bytes / MEGABYTE:g} MiB")
    return content
