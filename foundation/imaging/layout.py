"""Where the files of a segmentation lie: in a folder, or beside a file that the user named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foundation.errors import UsageError
from foundation.files import nifti_stem

_OTHER_FILES = (".gz", ".nrrd", ".mha", ".mhd", ".dcm", ".npy", ".npz", ".png", ".json")


@dataclass(frozen=True)
class ResultFiles:
    """The places of one result's files.

    base: the folder, or the label map's file that the user named. label_map: NIfTI. sidecar: names
    and volumes as JSON; it is written last, so where it is, the result is whole. masks: a folder
    with one NIfTI file for each class that has one.
    """

    base: Path
    label_map: Path
    sidecar: Path
    masks: Path

    @classmethod
    def of(cls, base: Path) -> ResultFiles:
        """The places for `base`: a folder, or a file name.nii.gz.

        Raises:
            UsageError: `base` is a file, or surely meant as one, but not NIfTI.
        """
        stem = nifti_stem(base)
        if stem is not None:
            sidecar = base.with_name(f"{stem}.labels.json")
            return cls(base, base, sidecar, base.with_name(f"{stem}_segmentations"))
        # A folder's name may hold dots: only what is surely meant as a file is refused.
        meant_as_file = base.suffix.lower() in _OTHER_FILES and not base.is_dir()
        if base.is_file() or meant_as_file:
            raise UsageError(f"Cannot save to {base}: name a folder, or a file .nii or .nii.gz.")
        return cls.inside(base)

    @classmethod
    def inside(cls, folder: Path) -> ResultFiles:
        """The places in a folder, whatever its name."""
        return cls(
            folder, folder / "segmentation.nii.gz", folder / "labels.json", folder / "segmentations"
        )

    @property
    def in_folder(self) -> bool:
        """Whether the result has a folder of its own."""
        return self.base != self.label_map

    def beside(self, name: str) -> Path:
        """The place of a further file: in the folder, or `<stem>.<name>` beside the file."""
        if self.in_folder:
            return self.base / name
        return self.base.with_name(f"{nifti_stem(self.base)}.{name}")
