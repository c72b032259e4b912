"""The files of a saved model or adapter: their names, their SHA-256 and how they are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from foundation.errors import UsageError, WeightsError, listed
from foundation.files import file_sha256, read_text, replacing_folder
from foundation.hub.convert import is_lfs_pointer

CONFIG, WEIGHTS, PROMPTS = "config.json", "model.safetensors", "prompt_embedding.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's own names
UNIVERSAL_CT, ADDED_CLASSES = "universal_ct.json", "added_classes.safetensors"
CARD, SUMS = "README.md", "SHA256SUMS"
RECORDS, EVAL_RESULTS = "records.jsonl", ".eval_results"  # what was measured with the weights
CALIBRATION = "trust.json"  # see foundation.imaging.expected_dice; weights may have none
# The card is not among them: it is prose, which people edit on the Hub's pages after publishing.
SUMMED = (CONFIG, WEIGHTS, PROMPTS)
ADAPTER_FILES = (UNIVERSAL_CT, PEFT_CONFIG, PEFT_WEIGHTS, ADDED_CLASSES)
REQUIRED, ADAPTER_REQUIRED = (*SUMMED, SUMS), (*ADAPTER_FILES, SUMS)
PLAIN = (CONFIG, WEIGHTS)  # of a model without text
MODEL, ADAPTER = "model", "adapter"  # folders inside that of a run


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


def summed_files(folder: Path) -> tuple[str, ...]:
    """Return the files that a saved model has sums of: without text it has no prompts.

    Args:
        folder: Of the model. One without sums counts as that of a text-driven model.
    """
    sums = read_sums(folder / SUMS) if (folder / SUMS).is_file() else dict.fromkeys(SUMMED)
    needed = SUMMED if PROMPTS in sums else PLAIN
    return (*needed, CALIBRATION) if CALIBRATION in sums else needed


def write_sums(
    folder: Path, names: Sequence[str], known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write the SHA-256 of a folder's files beside them.

    Args:
        folder: Of the files.
        names: Of the files. Whoever may read the first may read all of them afterwards.
        known: Digests of some of them, which are then not read again.

    Returns:
        Name of each file → hexadecimal digest.
    """
    for name in names[1:]:  # safetensors writes for the owner alone
        shutil.copymode(folder / names[0], folder / name)
    known = known or {}
    sums = {name: known.get(name) or file_sha256(folder / name) for name in names}
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
    ours = {*names, SUMS, CARD, RECORDS, EVAL_RESULTS, CALIBRATION}
    foreign = sorted(found - ours if SUMS in found else found)
    if foreign:
        raise UsageError(
            f"{folder} holds other files ({listed(foreign)}). Saving replaces the whole "
            "folder, so give a new or an empty one."
        )
    with replacing_folder(folder) as temporary:
        yield temporary
