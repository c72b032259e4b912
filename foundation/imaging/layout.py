"""Where the files of a segmentation lie, and how they appear there: all of them, or none."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from foundation.errors import UsageError
from foundation.files import nifti_stem
from foundation.imaging.sidecar import Sidecar, find_sidecar

_OTHER_FILES = (".gz", ".nrrd", ".mha", ".mhd", ".dcm", ".npy", ".npz", ".png", ".json")
_HIDDEN = ".universal-ct-"


@dataclass(frozen=True)
class ResultFiles:
    """The places of one result's files, in a folder or beside a file that the user named.

    Attributes:
        base: The folder, or the label map's file that the user named.
        label_map: NIfTI.
        sidecar: JSON, see `foundation.imaging.sidecar`.
        masks: A folder with one NIfTI file for each class that has one.
        volumes: CSV.
        preview: PNG.
        hidden: NPZ, see `foundation.imaging.hidden`.
    """

    base: Path
    label_map: Path
    sidecar: Path
    masks: Path
    volumes: Path
    preview: Path
    hidden: Path

    @classmethod
    def of(cls, base: Path) -> ResultFiles:
        """Return the places for a folder, or for a file name.nii.gz.

        Raises:
            UsageError: `base` is a file, or surely meant as one, but not NIfTI.
        """
        stem = nifti_stem(base)
        if stem is not None:
            ends = [".segmentation.json", "_segmentations", ".volumes.csv", ".preview.png"]
            ends += [".hidden.npz"]
            return cls(base, base, *(base.with_name(f"{stem}{end}") for end in ends))
        # A folder's name may hold dots: only what is surely meant as a file is refused.
        meant_as_file = base.suffix.lower() in _OTHER_FILES and not base.is_dir()
        if base.is_file() or meant_as_file:
            raise UsageError(f"Cannot save to {base}: name a folder, or a file .nii or .nii.gz.")
        return cls.inside(base)

    @classmethod
    def inside(cls, folder: Path) -> ResultFiles:
        """Return the places in a folder, whatever its name."""
        names = ["segmentation.nii.gz", "segmentation.json", "segmentations"]
        names += ["volumes.csv", "preview.png", "hidden.npz"]
        return cls(folder, *(folder / name for name in names))

    @property
    def root(self) -> Path:
        """The folder that all of them lie in."""
        return self.sidecar.parent

    @property
    def claim(self) -> Path:
        """The file that a process locks while it makes this result."""
        return self._around / f"{self._prefix}.claim"

    @property
    def _around(self) -> Path:
        """The folder in which the folder, or the file that the user named, lies."""
        return self.base.parent

    @property
    def _prefix(self) -> str:
        """How hidden names of this result begin; it does not tell the name of the case."""
        name = self.base.name.encode("utf-8", "surrogateescape")
        return f"{_HIDDEN}{hashlib.sha256(name).hexdigest()[:12]}"

    def whole(self) -> Sidecar | None:
        """Return the sidecar of the result that is there; None unless it is ours and complete."""
        found = find_sidecar(self.sidecar)
        return found if found is not None and found.complete else None

    @property
    def done(self) -> bool:
        """Whether a whole result of ours is there."""
        return self.whole() is not None

    def clear_hidden(self) -> None:
        """Remove what a killed process had begun to write. Only who has the claim may do that."""
        for folder in {self.root, self._around}:
            if folder.is_dir():
                for path in folder.glob(f"{self._prefix}-*"):
                    shutil.rmtree(path, ignore_errors=True)

    def earlier(self) -> list[Path]:
        """Return the files of the result of ours that is there, the sidecar last."""
        found = find_sidecar(self.sidecar)
        if found is None:
            return []
        inside = self.root.resolve()
        files = [self.root / name for name in found.files]
        return [*(p for p in files if p.resolve().is_relative_to(inside)), self.sidecar]

    def refuse_foreign(self) -> None:
        """Refuse to write where somebody's own masks or tables lie, for example a dataset's.

        Raises:
            UsageError: A file in the place of one of ours is named by no result of ours.
        """
        places = [self.label_map, self.sidecar, self.volumes, self.preview, self.hidden]
        try:
            places += sorted(self.masks.iterdir())
        except OSError:  # not there, or a file
            places.append(self.masks)
        # In this order, since another process may be replacing a result: its sidecar names a file
        # before it is there, until it is gone.
        there = [place for place in places if place.exists()]
        earlier = self.earlier()
        for place in there:
            if place not in earlier and place.exists():
                raise UsageError(
                    f"{place} was there before and is not universal-ct's. Give another output, or "
                    "move it."
                )

    @contextmanager
    def replacing(self) -> Iterator[Writing]:
        """Write a result in a hidden folder; its files come here when the block ends well.

        Until then nothing of an earlier result changes, so that a full disk or an error costs
        nothing. Then the files are renamed, which takes a moment and no room. Meanwhile the sidecar
        names the files of both results and says that it is not complete: a result that a kill has
        left half replaced is known as ours, and is done again.

        The block must write the sidecar, and last.

        Raises:
            UsageError: Files are there that no result of ours names.
        """
        self.refuse_foreign()
        beside = self.root if self.root.is_dir() else self.root.parent
        beside.mkdir(parents=True, exist_ok=True)
        prefix = f"{self._prefix}-"
        with TemporaryDirectory(prefix=prefix, dir=beside, ignore_cleanup_errors=True) as staging:
            yield Writing(self.root, Path(staging))
            self._publish(Path(staging))

    def _publish(self, staging: Path) -> None:
        written = staging / self.sidecar.name
        sidecar = Sidecar.read(written)
        new = [self.root / name for name in sidecar.files]
        gone = [path for path in self.earlier() if path not in (*new, self.sidecar)]
        names = [path.relative_to(self.root).as_posix() for path in (*new, *gone)]
        changing = replace(sidecar, files=tuple(names), complete=False)
        changing.write(staging / "changing.json")  # the last that needs room on the disk
        self.root.mkdir(parents=True, exist_ok=True)
        os.replace(staging / "changing.json", self.sidecar)
        for path in new:
            path.parent.mkdir(exist_ok=True)
            os.replace(staging / path.relative_to(self.root), path)
        for path in gone:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or not empty
            self.masks.rmdir()
        os.replace(written, self.sidecar)


@dataclass(frozen=True)
class Writing:
    """The files of a result that is being written.

    Attributes:
        root: The folder in which they will lie.
        staging: The hidden folder in which they are written.
        files: Those that are written, under `root`.
    """

    root: Path
    staging: Path
    files: list[Path] = field(default_factory=list)

    @contextmanager
    def file(self, target: Path) -> Iterator[Path]:
        """Give the place to write a file at; it is noted when the block ends well.

        Raises:
            OSError: It cannot be written; the error names `target`.
        """
        hidden = self.staging / target.relative_to(self.root)
        hidden.parent.mkdir(exist_ok=True)
        try:
            yield hidden
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error
        self.files.append(target)

    def names(self) -> tuple[str, ...]:
        """Return the files that are written, relative to `root`."""
        return tuple(path.relative_to(self.root).as_posix() for path in self.files)
