"""Thousands of broken NIfTI files: an error of ours, a doubt, or the right volume; nothing else."""

import gzip
import os
import resource
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from foundation.errors import VolumeError
from foundation.imaging.volumes import VolumeWarning, read_ct
from foundation.synthesis import generate, render_ct

HEADER = 348
# What a header may tell wrongly without a doubt: its fields have no checksum, and small
# differences between sform and qform are rounding. An uncompressed file's slope has no second
# witness but the histogram.
MOVED_MM, SLOPE, INTERCEPT_HU = 8.0, 0.15, 120.0


class Original:
    """A rendered phantom, 12 mm, as .nii with equal sform and qform."""

    def __init__(self) -> None:
        body = generate(3, 12.0)
        hu = render_ct(body.label_map, body.names, 12.0, np.random.default_rng(3))
        self.hu = np.rint(hu).astype(np.int16)
        self.affine = np.diag([-12.0, -12.0, 12.0, 1.0])
        self.affine[:3, 3] = [200, 170, -100]
        image = nib.Nifti1Image(self.hu, self.affine)
        image.set_sform(self.affine, 1)
        image.set_qform(self.affine, 1)
        image.header.set_slope_inter(1, 0)
        self.plain = image.to_bytes()
        self.zipped = gzip.compress(self.plain, 6, mtime=0)

    def outcome(self, path: Path, exactly: bool) -> str:
        """What reading gives: "error", "doubt", "right", or "WRONG" without a word."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VolumeWarning)
            try:
                volume = read_ct(path)
            except VolumeError as error:
                assert str(path) in str(error)
                return "error"
        if volume.warnings:
            return "doubt"
        if volume.shape != self.hu.shape:
            return "WRONG"
        corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
        corners[:, :3] *= np.array(self.hu.shape) - 1
        moved_mm = np.linalg.norm(corners @ (volume.affine - self.affine).T, axis=1).max()
        if exactly:
            return "right" if moved_mm == 0 and np.array_equal(volume.array, self.hu) else "WRONG"
        if not np.array_equal(volume.stored, self.hu) or moved_mm > MOVED_MM:
            return "WRONG"
        scaled = abs(volume.slope - 1) > SLOPE or abs(volume.intercept) > INTERCEPT_HU
        return "WRONG" if scaled else "right"


@pytest.fixture(scope="module")
def original() -> Original:
    return Original()


def changed(content: bytes, rng: np.random.Generator, end: int) -> bytes:
    """One to three bytes before `end` with a flipped bit, or with any value."""
    broken = bytearray(content)
    for place in rng.integers(0, end, rng.integers(1, 4)):
        bit = 1 << int(rng.integers(8))
        broken[place] = rng.integers(256) if rng.random() < 0.5 else broken[place] ^ bit
    return bytes(broken)


def fuzz(original: Original, folder: Path, seed: int, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    rng = np.random.default_rng(seed)
    plain, zipped = original.plain, original.zipped
    for _ in range(count):
        kind = rng.choice(["header", "zipped header", "zipped", "cut", "zipped cut", "longer"])
        content = {
            "header": lambda: changed(plain, rng, HEADER),
            "zipped header": lambda: gzip.compress(changed(plain, rng, HEADER), 1),
            "zipped": lambda: changed(zipped, rng, len(zipped)),
            "cut": lambda: plain[: rng.integers(len(plain))],
            "zipped cut": lambda: zipped[: rng.integers(len(zipped))],
            "longer": lambda: plain + rng.bytes(int(rng.integers(1, 5000))),
        }[kind]()
        path = folder / ("ct.nii.gz" if kind.startswith("zipped") else "ct.nii")
        path.write_bytes(content)
        outcome = original.outcome(path, exactly=kind in ("zipped", "zipped cut", "cut"))
        if outcome == "WRONG":
            path.rename(folder / f"wrong-{sum(found.values())}-{path.name}")
        found[f"{kind}: {outcome}"] += 1
        path.unlink(missing_ok=True)
    assert not list(folder.iterdir()), "wrong without a word"
    return found


def test_a_sample_of_broken_files(original: Original, tmp_path: Path) -> None:
    found = fuzz(original, tmp_path, 0, 300)
    for kind in ("header: doubt", "header: error", "header: right", "zipped: error", "cut: error"):
        assert found[kind], f"nothing is {kind}: the sample shows too little"
    assert not found["cut: right"] and not found["zipped cut: right"]
    assert not found["longer: right"]


# UNIVERSAL_CT_FUZZ=10 makes three thousand files of them; continuous integration makes six hundred.
SEEDS = range(1, 1 + int(os.environ.get("UNIVERSAL_CT_FUZZ", "2")))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_thousands_of_broken_files(original: Original, tmp_path: Path, seed: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(original, tmp_path, seed, 300)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB on Linux
