"""Numbers that are no HU are doubted, with the likely cause; a CT of a person never is."""

import re
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from foundation.imaging.volumes import VolumeWarning, read_ct
from foundation.synthesis import generate, render_ct

AFFINE = np.diag([6.0, 6.0, 6.0, 1.0])


def doubts(hu: np.ndarray) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VolumeWarning)
        return list(read_ct((hu, AFFINE)).warnings)


@pytest.fixture(scope="module")
def body() -> np.ndarray:
    """A rendered phantom, HU, int16."""
    phantom = generate(3, 6.0)
    hu = render_ct(phantom.label_map, phantom.names, 6.0, np.random.default_rng(3))
    return np.rint(hu).astype(np.int16)


def with_metal(hu: np.ndarray) -> np.ndarray:
    hu = hu.copy()
    x, y, z = (size // 2 for size in hu.shape)
    hu[x : x + 3, y : y + 3, z : z + 8] = 9000
    hu[x + 3 : x + 9, y : y + 3, z : z + 8] = -1900  # the streaks beside it
    return hu


def round_view(hu: np.ndarray, padding: int) -> np.ndarray:
    """The corners outside a round field of view are padded."""
    x, y, _ = np.indices(hu.shape)
    centre, radius = (np.array(hu.shape[:2]) - 1) / 2, min(hu.shape[:2]) / 2
    return np.where(np.hypot(x - centre[0], y - centre[1]) > radius, padding, hu)


def as_mr(hu: np.ndarray) -> np.ndarray:
    return np.where(hu > -300, np.abs(hu.astype(int) + 150) * 2, -1000)


FAULTS = {
    "an intercept of -1024 that was applied twice": lambda hu: hu.astype(int) - 1024,
    "HU times ten": lambda hu: hu.astype(int) * 10,
    "an inverted sign": lambda hu: -hu,
    "an MR that was padded with -1000": as_mr,
    "bone and contrast are cut off": lambda hu: hu.clip(None, 200),
    "an MR, or a CT stored without its intercept": lambda hu: hu.clip(-1024) + 1024,
    "noise, or voxels read with another type": lambda hu: (
        np.random.default_rng(0).permutation(hu.ravel()).reshape(hu.shape)
    ),
    "voxels lie above 3000 HU": lambda hu: hu.astype(np.float32) * 1e30,
    r"air lies near -(49|50)\d HU in place of -1000": lambda hu: hu * 0.5,
    r"air lies near -(199|200)\d HU in place of -1000": lambda hu: hu.astype(int) * 2,
    "no body was found": lambda hu: np.linspace(-1020, -890, hu.size).reshape(hu.shape),
    "nearly every voxel is 50": lambda hu: np.where(np.indices(hu.shape).sum(0) == 0, -1000, 50),
    "are padding, and none is air": lambda hu: np.where(hu < -300, -2000, hu),
}


@pytest.mark.parametrize("cause", FAULTS)
def test_the_cause_is_named(body: np.ndarray, cause: str) -> None:
    (doubt,) = doubts(FAULTS[cause](body))
    assert re.search(cause, doubt)
    assert "Give a CT in HU" in doubt


CTS = {
    "as it is": lambda hu: hu,
    "noisy": lambda hu: hu + np.random.default_rng(0).normal(0, 80, hu.shape),
    "a table of air at -1024": lambda hu: hu.clip(-1024),
    "cut off at 250": lambda hu: hu.clip(-1000, 250),
    "cut off at 3071": lambda hu: hu.clip(-1024, 3071),
    "a wide window": lambda hu: hu.clip(-1000, 400),
    "padded with -1024": lambda hu: round_view(hu, -1024),
    "padded with -2000": lambda hu: round_view(hu, -2000),
    "padded with -2048": lambda hu: round_view(hu, -2048),
    "padded with -3024": lambda hu: round_view(hu, -3024),
    "padded with -32768": lambda hu: round_view(hu, -32768),
    "nothing but the body": lambda hu: np.where(hu < -300, -1024, hu),
    "metal": with_metal,
    "a slab": lambda hu: hu[:, :, 20:25],
    "the lungs": lambda hu: hu[:, :, -12:],
    "in a wide field of view": lambda hu: np.pad(hu, 60, constant_values=-1000),
}


@pytest.mark.parametrize("what", CTS)
def test_a_ct_is_not_doubted(body: np.ndarray, what: str) -> None:
    assert doubts(CTS[what](body)) == []


@pytest.mark.parametrize("seed", range(4))
def test_renderings_and_parts_of_them_are_not_doubted(seed: int) -> None:
    """Of 120 such volumes none was; `benchmarks/false_alarms.py` counts more."""
    rng = np.random.default_rng(seed)
    spacing_mm = float(rng.uniform(6, 9))
    phantom = generate(seed, spacing_mm)
    hu = np.rint(render_ct(phantom.label_map, phantom.names, spacing_mm, rng)).astype(np.int16)
    depth = hu.shape[2]
    for part in (hu, hu[:, :, depth // 4 : -depth // 4], hu[4:-4, 4:-4]):
        assert doubts(part) == []


def test_a_crop_without_air_is_doubted_as_before(body: np.ndarray) -> None:
    x, y, z = (size // 2 for size in body.shape)
    inside = body[x - 4 : x + 4, y - 4 : y + 4, z - 4 : z + 4].clip(-150)
    (doubt,) = doubts(inside)
    assert "without any air: an MR, or a crop from inside the body" in doubt


def test_the_scaling_of_a_header_is_part_of_the_doubt(body: np.ndarray, tmp_path: Path) -> None:
    image = nib.Nifti1Image(body, AFFINE)
    nib.save(image, tmp_path / "ct.nii")
    blob = bytearray((tmp_path / "ct.nii").read_bytes())
    header = nib.Nifti1Header(bytes(blob[:348]))
    header["scl_slope"], header["scl_inter"] = 2, 7
    blob[:348] = header.binaryblock
    (tmp_path / "ct.nii").write_bytes(blob)
    with pytest.warns(VolumeWarning, match="Its header has slope 2 and intercept 7"):
        read_ct(tmp_path / "ct.nii")


def test_the_open_cts_are_not_doubted(open_data: Path) -> None:
    files = [*open_data.glob("*/ct.nii.gz"), *open_data.glob("totalsegmentator_crops/*.nii.gz")]
    assert len(files) >= 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            assert read_ct(file).warnings == ()
