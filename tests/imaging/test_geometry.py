"""A header that tells of two grids is doubted; one that tells of one grid in two ways is not."""

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from foundation.imaging.volumes import VolumeWarning, read_ct

SHAPE = (24, 20, 16)


def turned(degrees: float = 0.0, axis: int = 2, spacing=(0.8, 0.9, 2.5)) -> np.ndarray:
    """An LPS grid, turned about an axis of the body."""
    angle = np.deg2rad(degrees)
    turn = np.eye(3)
    first, second = [each for each in range(3) if each != axis]
    turn[first, first] = turn[second, second] = np.cos(angle)
    turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1, -1, 1]) @ np.diag(spacing)
    affine[:3, 3] = [90, -20, 400]
    return affine


def write(
    path: Path, sform: np.ndarray, qform: np.ndarray | None, codes=(1, 1), pixdim=None
) -> Path:
    rng = np.random.default_rng(0)
    hu = rng.normal(-1000, 12, SHAPE)
    hu[4:20, 4:16] = rng.normal(30, 40, (16, 12, 16))
    image = nib.Nifti1Image(hu.round().astype(np.int16), sform)
    if qform is not None:
        image.set_qform(qform, codes[1])
    image.set_sform(sform, codes[0])
    if pixdim is not None:
        image.header["pixdim"][1:4] = pixdim
    nib.save(image, path)
    return path


def doubts(path: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        volume = read_ct(path)
    assert [str(each.message) for each in caught] == list(volume.warnings)
    return list(volume.warnings)


@pytest.mark.parametrize("degrees", [0, 12, 90])
@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (0, 1), (1, 0)])
def test_one_grid_in_two_ways_is_no_doubt(tmp_path, degrees, codes) -> None:
    assert doubts(write(tmp_path / "ct.nii", turned(degrees), turned(degrees), codes)) == []


def test_rounding_and_small_shifts_are_no_doubt(tmp_path) -> None:
    qform = turned(0.5, spacing=(0.802, 0.898, 2.51))
    qform[:3, 3] += 1
    assert doubts(write(tmp_path / "ct.nii", turned(), qform)) == []


def mirrored() -> np.ndarray:
    affine = turned()
    affine[0] *= -1
    return affine


def moved() -> np.ndarray:
    affine = turned()
    affine[2, 3] += 40
    return affine


def sheared() -> np.ndarray:
    affine = turned()
    affine[1, 2] += 0.4
    return affine


@pytest.mark.parametrize(
    ("sform", "told"),
    [
        (turned(spacing=(0.8, 0.9, 5.0)), "spacing 0.8 × 0.9 × 5 mm, not 0.8 × 0.9 × 2.5 mm"),
        (turned(spacing=(0.82, 0.9, 2.5)), "spacing 0.82 × 0.9 × 2.5 mm, not 0.8 × 0.9 × 2.5 mm"),
        (mirrored(), "orientation RPS, not LPS"),
        (turned(90), "orientation PRS, not LPS"),
        (turned(3), "axes that point up to 3° elsewhere"),
        (sheared(), "axes that point up to 9° elsewhere"),
        (moved(), "centre 80.8 -28.5 458.8 mm, not 80.8 -28.5 418.8 mm"),
    ],
)
def test_sform_and_qform_that_contradict_each_other(tmp_path, sform, told) -> None:
    path = write(tmp_path / "ct.nii.gz", sform, turned())
    with pytest.warns(VolumeWarning, match="tells of two grids"):
        volume = read_ct(path)
    (doubt,) = volume.warnings
    assert told in doubt and str(path) in doubt and "The sform is used" in doubt
    assert np.allclose(volume.affine, sform, atol=1e-4)


def test_a_qform_that_is_no_rotation(tmp_path) -> None:
    path = write(tmp_path / "ct.nii", turned(), turned())
    blob = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(blob[:348]), check=False)
    header["quatern_b"] = 3
    blob[:348] = header.binaryblock
    path.write_bytes(blob)
    assert "no rotation" in doubts(path)[0]


def test_spacing_that_contradicts_pixdim(tmp_path) -> None:
    path = write(tmp_path / "ct.nii", turned(), None, pixdim=(0.8, 0.9, 5))
    (doubt,) = doubts(path)
    assert "0.8 × 0.9 × 2.5 mm (sform) and 0.8 × 0.9 × 5 (pixdim)" in doubt
    assert doubts(write(tmp_path / "ct.nii", turned(), None, pixdim=(0, 0, 0))) == []  # not given


def test_the_warnings_of_a_header_and_of_the_intensities_are_both_given(tmp_path) -> None:
    path = write(tmp_path / "ct.nii", mirrored(), turned())
    image = nib.load(path)
    shifted = nib.Nifti1Image(np.asarray(image.dataobj) - 1024, None, image.header)
    nib.save(shifted, path)
    with pytest.warns(VolumeWarning):
        first, second = read_ct(path).warnings
    assert "two grids" in first and "intercept" in second
