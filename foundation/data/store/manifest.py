"""The store's manifest: which cases it has, from which files; and checking files against one."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from foundation import __version__
from foundation.data import Case
from foundation.data.store.arrays import CASES, FORMAT_VERSION, MANIFEST, read_manifest
from foundation.errors import UsageError
from foundation.files import file_sha256, read_sealed, replacing, sealed_json
from foundation.taxonomy import NAMES

SAVE_EVERY_S = 2.0  # rewriting it for each of thousands of quick cases would take longer than they
_COPIED = "dataset annotated voxels shape has_ct sources licence weight split notes"


class ManifestWriter:
    """Keeps `manifest.json` in step with the cases that are finished.

    The same sources and settings give the same manifest, but for `created`. It may lag behind the
    case folders by SAVE_EVERY_S when a run is killed; the next run finds those cases finished.

    Raises:
        UsageError: The store has a manifest with another spacing.
    """

    def __init__(self, store: Path, spacing_mm: float, prompts: Mapping[str, str]) -> None:
        self.store = store
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.content: dict[str, Any] = {"created": created, "cases": {}, "failed": {}}
        if (store / MANIFEST).exists():
            self.content = read_manifest(store)
            if self.content["spacing_mm"] != spacing_mm:
                raise UsageError(
                    f"{store} holds cases at {self.content['spacing_mm']} mm, not {spacing_mm} mm. "
                    "Give --spacing the same value, or another folder."
                )
        self.content |= {
            "format_version": FORMAT_VERSION,
            "universal_ct": __version__,
            "spacing_mm": spacing_mm,
        }
        self.content["prompts"] = {**self.content.get("prompts", {}), **prompts}
        self._saved = 0.0

    def begin(self, keys: Collection[str], datasets: Collection[str]) -> list[str]:
        """Start a run: forget cases that are gone, and what failed before.

        Args:
            keys: Of all cases that the datasets have now.
            datasets: Ids of the datasets of this run.

        Returns:
            Keys of the cases that are gone, sorted.
        """
        cases, failed = self.content["cases"], self.content["failed"]
        gone = sorted(k for k, c in cases.items() if c["dataset"] in datasets and k not in keys)
        for key in gone:
            del cases[key]
        for key in [key for key in failed if key.split("/")[0] in datasets]:
            del failed[key]
        self.save()
        return gone

    def record(self, key: str, description: Mapping[str, Any] | None, error: str) -> None:
        """Note a finished or a failed case.

        Args:
            key: Of the case.
            description: The content of its `case.json`; None where it failed.
            error: Why it failed.
        """
        self.content["cases"].pop(key, None)
        if description is None:
            self.content["failed"][key] = error
        else:
            entry = {name: description[name] for name in _COPIED.split()}
            self.content["cases"][key] = {**entry, "folder": f"{CASES}/{key}"}
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write it, whole or not at all."""
        cases = self.content["cases"].values()
        extra = {name for case in cases for name in case["annotated"]} - set(NAMES)
        self.content["classes"] = [*NAMES, *sorted(extra)]
        prompts = self.content["prompts"]
        self.content["prompts"] = {n: prompts[n] for n in sorted(prompts)}
        with replacing(self.store / MANIFEST) as temporary:
            temporary.write_text(sealed_json(self.content), encoding="utf-8")
        self._saved = time.monotonic()


def source_files(case: Case) -> list[Path]:
    """Return all files that a case is read from.

    A folder (a DICOM series) stands for what it holds.

    Args:
        case: As the dataset found it.

    Returns:
        Files, sorted.
    """
    given = [*([case.image] if case.image else []), *case.labels]
    files: set[Path] = set()
    for path in given:
        if path.is_dir():
            files.update(inner for inner in path.rglob("*") if inner.is_file())
        else:
            files.add(path)
    return sorted(files)


def file_hashes(files: Iterable[Path], root: Path) -> list[dict[str, Any]]:
    """Return what a manifest has of source files.

    Args:
        files: All below `root`.
        root: The folder of their dataset.

    Returns:
        Path relative to `root`, SHA-256 and bytes of each file, sorted by path.

    Raises:
        OSError: A file cannot be read.
        UsageError: A file lies outside of `root`.
    """
    found = [
        {
            "path": relative(path, root),
            "sha256": file_sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in files
    ]
    return sorted(found, key=lambda source: str(source["path"]))


def relative(path: Path, root: Path) -> str:
    """Return a source's path as manifests name it, which hold on another machine too.

    Args:
        path: Of the file.
        root: The folder of its dataset.

    Returns:
        The path below `root`, with slashes.

    Raises:
        UsageError: It lies outside of `root`.
    """
    try:
        return path.relative_to(root).as_posix()
    except ValueError as error:
        raise UsageError(
            f"{path.name} lies outside of the dataset's folder; move or link it there."
        ) from error


def differences(
    manifest: Mapping[str, Any], roots: Mapping[str, Path], found: Collection[str] | None = None
) -> list[str]:
    """Compare source files with a manifest: one line for each that is missing or differs.

    Args:
        manifest: Of a store, see `read_expected`.
        roots: The folder of each dataset by id; others are passed over.
        found: Keys of the cases there are, where a difference in that counts as well.

    Returns:
        "case: what differs", sorted by case.
    """
    wrong = []
    expected = {k: c for k, c in manifest["cases"].items() if c["dataset"] in roots}
    for key, case in sorted(expected.items()):
        for source in case["sources"]:
            path = roots[case["dataset"]] / source["path"]
            if not path.is_file():
                wrong.append(f"{key}: {source['path']} is missing")
            elif path.stat().st_size != source["bytes"]:
                wrong.append(f"{key}: {source['path']} has another size")
            elif file_sha256(path) != source["sha256"]:
                wrong.append(f"{key}: {source['path']} has another SHA-256")
    if found is not None:
        wrong += [f"{key}: not found" for key in sorted(expected.keys() - set(found))]
        failed = manifest["failed"].keys()  # they are there, and broken
        wrong += [
            f"{k}: not in the manifest" for k in sorted(set(found) - expected.keys() - failed)
        ]
    return wrong


def read_expected(path: Path, spacing_mm: float | None = None) -> dict[str, Any]:
    """Read a manifest to compare with.

    Args:
        path: A manifest, or the store that holds it.
        spacing_mm: That it must have been made with; any if not given.

    Returns:
        Its content.

    Raises:
        UsageError: It cannot be read, or was made with another spacing.
    """
    if path.is_dir():
        path = path / MANIFEST
    try:
        content = read_sealed(path.read_text(encoding="utf-8"))
        spacing, _, _ = content["spacing_mm"], content["cases"], content["failed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a readable manifest: {error!r}.") from error
    if spacing_mm is not None and spacing != spacing_mm:
        raise UsageError(
            f"{path} was made with --spacing {spacing}, not {spacing_mm}; give the same."
        )
    return content
