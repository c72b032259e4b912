"""The store: harmonised cases on disk, of which any crop is read without reading the rest.

    STORE/manifest.json
    STORE/cases/<dataset>/<id>/ct.b2nd  labels.b2nd  centres.npz  case.json

Arrays are Blosc2's n-dimensional ones (b2nd): one file an array and no threads, locks or handles
kept between reads, so that any number of workers, forked or spawned, can read any number of cases.

`case.json` has the SHA-256 of the other files and a sum of its own. A file is checked when a
process first reads of it, and again if it has changed since. Cases that were prepared before there
were sums are read without that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.errors import MissingExtraError, UsageError, VolumeError, import_extra, listed
from foundation.files import file_sha256, read_sealed
from foundation.taxonomy import NAMES

FORMAT_VERSION = 1
PADDING_HU = -1024
MANIFEST = "manifest.json"
CASES = "cases"
CT, LABELS, CENTRES, CASE = "ct.b2nd", "labels.b2nd", "centres.npz", "case.json"
FILES = "files"  # the key of the other files' SHA-256 in case.json
BACKGROUND = "background"  # in the centres: in the body, of no class
# A random crop of 96³ touches about 62 blocks of 32³, 2.3 times the voxels it needs. Smaller
# blocks compress worse and cost more calls; one of 32³ HU (64 KiB) fits the nearest caches.
CHUNK, BLOCK = 64, 32

Triple = tuple[int, int, int]


def _blosc2() -> Any:
    return import_extra("blosc2", "train", "Stores of prepared cases need")


class Store:
    """A folder of prepared cases.

    Raises:
        UsageError: The folder holds no store, or one of a newer format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)

    def keys(self) -> list[str]:
        """Return the keys of all finished cases.

        Returns:
            "<dataset>/<id>", sorted.
        """
        return sorted(self.manifest["cases"])

    def __len__(self) -> int:
        return len(self.manifest["cases"])

    def own_classes(self, datasets: Collection[str] = ()) -> dict[str, str]:
        """Return the classes that some case annotates and that are not among the 32.

        Args:
            datasets: Ids; all of the store's if empty.

        Returns:
            Name → prompt, "" where the dataset's description gives none; by name.
        """
        cases = self.manifest["cases"].values()
        chosen = [case for case in cases if not datasets or case["dataset"] in datasets]
        names = {name for case in chosen for name in case["annotated"]} - set(NAMES)
        prompts = self.manifest.get("prompts", {})
        return {name: prompts.get(name, "") for name in sorted(names)}

    def case(self, key: str) -> StoredCase:
        """Return one case; its description is read, not its voxels.

        Args:
            key: "<dataset>/<id>".

        Returns:
            The case.

        Raises:
            UsageError: No such case.
            VolumeError: Its description is missing or damaged.
        """
        entry = self.manifest["cases"].get(key)
        if entry is None:
            raise UsageError(
                f"{self.path} has no case {key!r}; it has {listed(self.keys(), 4) or 'none'}."
            )
        return StoredCase.open(self.path / entry["folder"])


@dataclass(frozen=True)
class StoredCase:
    """One case of a store; picklable, and it holds no voxels.

    Attributes:
        folder: Its files.
        key: "<dataset>/<id>".
        shape, spacing_mm, affine: Of the grid, RAS, isotropic.
        sets, tissues, unknown: What label values stand for, see `Harmonised`.
        annotated: Classes labelled in this case.
        weight: How often to draw it, relative to others.
        has_ct: Whether it has a scan; it is a label map alone otherwise.
        sums: SHA-256 of its files, by their names; none in a case of an older version.
    """

    folder: Path
    key: str
    shape: Triple
    spacing_mm: float
    affine: tuple[tuple[float, ...], ...]
    sets: tuple[tuple[str, ...], ...]
    tissues: tuple[str, ...]
    unknown: tuple[int, ...]
    annotated: tuple[str, ...]
    weight: float
    has_ct: bool
    sums: tuple[tuple[str, str], ...] = ()

    @classmethod
    def open(cls, folder: Path) -> StoredCase:
        """Read the description in a case's folder.

        Args:
            folder: Of the case.

        Returns:
            The case.

        Raises:
            VolumeError: It is missing or damaged.
        """
        about = read_description(folder)
        try:
            return cls(
                folder=folder,
                key=f"{about['dataset']}/{about['id']}",
                shape=_triple(about["shape"]),
                spacing_mm=float(about["spacing_mm"]),
                affine=tuple(tuple(map(float, row)) for row in about["affine"]),
                sets=tuple(tuple(names) for names in about["sets"]),
                tissues=tuple(about["tissues"]),
                unknown=tuple(about["unknown"]),
                annotated=tuple(about["annotated"]),
                weight=float(about["weight"]),
                has_ct=bool(about["has_ct"]),
                sums=tuple(sorted((str(n), str(s)) for n, s in about.get(FILES, {}).items())),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise VolumeError(f"{folder / CASE} lacks or spoils {error}; {_AGAIN}") from error

    @property
    def centres(self) -> Mapping[str, NDArray[np.int32]]:
        """Class → voxels (N, 3) to centre crops on, at most 2000 and at random.

        Only classes that occur; `BACKGROUND` is in the body and of no class. Each is read when it
        is asked for and none is kept, since stores have many cases. The file is open for as long
        as the mapping is used.

        Raises:
            VolumeError: The store's file is missing or damaged.
        """
        return _Centres(self._verified(CENTRES))

    def read(
        self, start: Sequence[int], size: Sequence[int], *, pad: int = PADDING_HU
    ) -> tuple[NDArray[np.int16] | None, NDArray[Any], NDArray[np.bool_]]:
        """Read a crop, decompressing only the blocks that it touches; it may leave the grid.

        Args:
            start: First voxel along X, Y, Z; may be negative.
            size: Voxels along X, Y, Z.
            pad: HU outside of the grid.

        Returns:
            HU (int16, `pad` outside; None without a scan), label values (uint8 or uint16, 0
            outside), and whether the voxel lies on the grid (bool), each of shape `size`.

        Raises:
            VolumeError: The store's file is missing or damaged.
        """
        start, size = _triple(start), _triple(size)
        if min(size) < 1:
            raise UsageError(f"A crop of {size} voxels is empty; give at least 1 along each axis.")
        source = tuple(
            slice(min(max(0, first), full), max(0, min(first + length, full)))
            for first, length, full in zip(start, size, self.shape, strict=True)
        )
        target = tuple(
            slice(part.start - first, part.start - first + max(0, part.stop - part.start))
            for part, first in zip(source, start, strict=True)
        )
        inside = np.zeros(size, bool)
        on_grid = all(part.stop > part.start for part in source)
        if on_grid:
            inside[target] = True

        def crop(name: str, fill: int) -> NDArray[Any]:
            array = self._array(name)
            padded = np.full(size, fill, array.dtype)
            if on_grid:
                padded[target] = _decompressed(array, source, self.folder / name)
            return padded

        hu = crop(CT, pad) if self.has_ct else None
        return hu, crop(LABELS, 0), inside

    def read_labels(self) -> NDArray[Any]:
        """Read the labels of the whole case.

        Returns:
            Label values (X, Y, Z), uint8 or uint16.

        Raises:
            VolumeError: The store's file is missing or damaged.
        """
        return _decompressed(self._array(LABELS), (slice(None),) * 3, self.folder / LABELS)

    def read_ct(self) -> NDArray[np.int16] | None:
        """Read the scan of the whole case.

        Returns:
            HU (X, Y, Z), int16; None without a scan.

        Raises:
            VolumeError: The store's file is missing or damaged.
        """
        if not self.has_ct:
            return None
        return _decompressed(self._array(CT), (slice(None),) * 3, self.folder / CT)

    def membership(self, classes: Sequence[str]) -> NDArray[np.bool_]:
        """Return to which classes the voxels of each label value belong.

        Args:
            classes: The K classes that are asked about; any names.

        Returns:
            bool (values, K).
        """
        return np.array([[name in names for name in classes] for names in self.sets], bool).reshape(
            len(self.sets), len(classes)
        )

    def _array(self, name: str) -> Any:
        path = self._verified(name)
        try:
            # One thread: a pool of threads does not survive the fork of a data loader.
            array = _blosc2().open(str(path), mode="r", dparams=_blosc2().DParams(nthreads=1))
        except MissingExtraError:
            raise
        except Exception as error:  # a damaged file without a sum: Blosc2 raises many kinds
            raise VolumeError(f"{path} is missing or damaged ({error}); {_AGAIN}") from error
        types = ("int16",) if name == CT else ("uint8", "uint16")
        if getattr(array, "shape", None) != self.shape or str(array.dtype) not in types:
            raise VolumeError(
                f"{path} is not of shape {self.shape} and type {' or '.join(types)}; {_AGAIN}"
            )
        return array

    def _verified(self, name: str) -> Path:
        """The path of a file, whose sum is right; it is computed once in a process."""
        path, expected = self.folder / name, dict(self.sums).get(name)
        if expected is not None:
            check_file(path, expected)
        return path


class _Centres(Mapping[str, NDArray[np.int32]]):
    """The arrays of a file of centres, whatever is wrong with it in a sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays = self._read(lambda: np.load(path, allow_pickle=False))

    def __getitem__(self, name: str) -> NDArray[np.int32]:
        if name not in self.arrays:
            raise KeyError(name)
        array: NDArray[np.int32] = self._read(lambda: self.arrays[name])
        if array.dtype != np.int32 or array.ndim != 2 or array.shape[1] != 3:
            raise VolumeError(f"{self.path} holds no voxels of {name!r}; {_AGAIN}")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def _read(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # zipfile, zlib, struct and numpy have errors of their own
            raise VolumeError(f"{self.path} is missing or damaged ({error}); {_AGAIN}") from error


_right: dict[Path, tuple[str, int, int]] = {}  # what this process has found right


def check_file(path: Path, sha256: str, *, again: bool = False) -> None:
    """Check a stored file against its sum, once in a process for as long as it does not change.

    Args:
        path: Of the file.
        sha256: That it must have.
        again: Compute the sum even if this process has done so.

    Raises:
        VolumeError: It is missing, or has another sum.
    """
    try:
        found = path.stat()
        state = (sha256, found.st_size, found.st_mtime_ns)
        if not again and _right.get(path) == state:
            return
        actual = file_sha256(path)
    except OSError as error:
        raise VolumeError(f"{path} is missing or damaged ({error}); {_AGAIN}") from error
    if actual != sha256:
        raise VolumeError(
            f"{path} is damaged or was changed: {CASE} says SHA-256 {sha256}, the file has "
            f"{actual}; {_AGAIN}"
        )
    _right[path] = state


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array in compressed blocks; the same values give the same bytes.

    Args:
        path: Of the file, which is overwritten.
        array: (X, Y, Z).
    """
    chunks = tuple(min(CHUNK, size) for size in array.shape)
    blosc2 = _blosc2()
    blosc2.asarray(
        np.ascontiguousarray(array),
        urlpath=str(path),
        mode="w",
        chunks=chunks,
        blocks=tuple(min(BLOCK, size) for size in chunks),
        # One thread, so that the same data give the same bytes.
        cparams=blosc2.CParams(
            codec=blosc2.Codec.ZSTD, clevel=5, filters=[blosc2.Filter.SHUFFLE], nthreads=1
        ),
    )


def read_manifest(store: Path) -> dict[str, Any]:
    """Read the manifest of a store.

    Args:
        store: Its folder.

    Returns:
        The content of manifest.json.

    Raises:
        UsageError: There is none, it is damaged, or of another format.
    """
    path = store / MANIFEST
    try:
        manifest = read_sealed(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{store} is not a store: it has no {MANIFEST}. Make one with "
            "`universal-ct prepare DATASET=DIR -o STORE`."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}. Remove it and run `universal-ct prepare` again: "
            "finished cases are kept."
        ) from error
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise UsageError(
            f"{path} has format {found!r}; this version reads {FORMAT_VERSION}. Update "
            "universal-ct, or prepare the data again into another folder."
        )
    return manifest


def read_description(folder: Path) -> dict[str, Any]:
    """Read a case's `case.json`.

    Args:
        folder: Of the case.

    Returns:
        Its content.

    Raises:
        VolumeError: It is missing or damaged.
    """
    try:
        return read_sealed((folder / CASE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VolumeError(f"{folder / CASE} is missing or damaged ({error}); {_AGAIN}") from error


_AGAIN = "run `universal-ct prepare` again."


def _decompressed(array: Any, part: tuple[slice, ...], path: Path) -> NDArray[Any]:
    try:
        return np.asarray(array[part])
    except Exception as error:  # as in `_array`
        raise VolumeError(f"{path} is damaged ({error}); {_AGAIN}") from error


def _triple(values: Sequence[Any]) -> Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z
