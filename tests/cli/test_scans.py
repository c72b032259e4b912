"""Scans that are damaged, contradict themselves or are no HU, as a command's user meets them."""

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from foundation.cli.main import main

AFFINE = np.diag([-6.0, -6.0, 6.0, 1.0])
SHAPE = (30, 26, 28)
Segment = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def segment(model_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Segment:
    """Exit code, results and standard error of `segment CT -o OUT -q --json`."""

    def command(ct: Path) -> tuple[int, list[dict[str, Any]], str]:
        out = tmp_path / "out"
        args = ["segment", str(ct), "-o", str(out), "-m", model_folder, "--device", "cpu"]
        code = main([*args, "-q", "--json"])
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, json.loads(said.out)["results"], said.err

    return command


def body() -> np.ndarray:
    """Noisy tissue with a spine in noisy air, HU."""
    rng = np.random.default_rng(0)
    hu = rng.normal(-1000, 10, SHAPE)
    hu[5:25, 5:21, 3:25] = rng.normal(-20, 70, (20, 16, 22))
    hu[13:17, 7:10] = 400
    return hu.round().astype(np.int16)


def blob(array: np.ndarray, qform: np.ndarray = AFFINE, **fields: object) -> bytearray:
    image = nib.Nifti1Image(array, AFFINE)
    image.set_qform(qform, 1)
    image.set_sform(AFFINE, 1)
    content = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]))
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    return content


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 0) if path.suffix == ".gz" else bytes(content))
    return path


def flipped(path: Path, place: int = -6) -> Path:
    """The file with one bit of its checksum, or of another place, turned round."""
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)
    return path


# --- refused: nothing is written ----------------------------------------------------------------


@pytest.mark.parametrize("place", [-6, -3, 20_000])
def test_a_flipped_bit_is_never_segmented(segment: Segment, tmp_path: Path, place: int) -> None:
    ct = flipped(write(tmp_path / "scan.nii.gz", blob(body())), place)
    code, (found,), said = segment(ct)
    assert (code, found["status"]) == (1, "failed")
    assert "is damaged or cut short" in found["error"] and "Copy or download it again" in said
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_a_scan_larger_than_memory_is_refused_with_the_numbers(
    segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct = write(tmp_path / "scan.nii.gz", blob(body()))
    monkeypatch.setattr("foundation.imaging.memory.available_bytes", lambda: 50_000)
    code, (found,), _ = segment(ct)
    assert code == 1
    assert "30×26×28 voxels) needs about 8.74e-05 GB of memory; 5e-05 GB are" in found["error"]


def test_an_absurd_size_is_no_lack_of_memory(segment: Segment, tmp_path: Path) -> None:
    size = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    code, (found,), _ = segment(write(tmp_path / "scan.nii.gz", blob(body(), dim=size)))
    assert code == 1 and "32767×32767×32767 voxels" in found["error"]
    assert "MemoryError" not in found["error"]


@pytest.mark.skipif(os.name == "nt", reason="has no pipes in folders")
def test_a_pipe_is_named_as_such(segment: Segment, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scan.nii.gz")
    code, (found,), _ = segment(tmp_path / "scan.nii.gz")
    assert code == 1 and "no regular file but a pipe" in found["error"]


def test_one_voxel_that_is_no_number_is_found(segment: Segment, tmp_path: Path) -> None:
    hu = body().astype(np.float32)
    hu[3, 4, 5] = np.nan
    code, (found,), _ = segment(write(tmp_path / "scan.nii.gz", blob(hu)))
    assert code == 1 and "1 of 21,840 voxels, the first at (3, 4, 5)" in found["error"]


# --- doubted: segmented, and the doubt is in every file ------------------------------------------


def mirrored() -> np.ndarray:
    return np.diag([6.0, -6.0, 6.0, 1.0])


DOUBTS = {
    "intercept of -1024 that was applied twice": lambda: blob(body() - np.int16(1024)),
    "HU times ten": lambda: blob(body() * np.int16(10)),
    "an inverted sign": lambda: blob(-body()),
    "slope 0.5 and intercept 0": lambda: blob(body(), scl_slope=0.5, scl_inter=0),
    "orientation LPS, not RPS": lambda: blob(body(), qform=mirrored()),
    "spacing 6 × 6 × 6 mm, not 6 × 6 × 3 mm": lambda: blob(
        body(), qform=AFFINE @ np.diag([1, 1, 0.5, 1])
    ),
    "bytes more than its header says": lambda: blob(body(), dim=[3, 30, 26, 20, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii"])
@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_doubt_is_in_all_that_remains(
    segment: Segment, tmp_path: Path, doubt: str, name: str
) -> None:
    code, (found,), said = segment(write(tmp_path / name, DOUBTS[doubt]()))
    assert (code, found["status"]) == (0, "done")
    (warning,) = found["warnings"]
    assert doubt in warning and f"warning: {warning}" in said
    folder = tmp_path / "out" / "scan"
    assert json.loads((folder / "segmentation.json").read_text())["warnings"] == [warning]
    with (folder / "volumes.csv").open(encoding="utf-8") as file:
        assert {row["warnings"] for row in csv.DictReader(file)} == {warning}


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan.Nii"])
def test_a_plain_ct_is_segmented_without_a_word(
    segment: Segment, tmp_path: Path, name: str
) -> None:
    code, (found,), said = segment(write(tmp_path / name, blob(body())))
    assert (code, found["status"], found["warnings"], said) == (0, "done", [], "")


# --- labels -------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """One labelled scan of a dataset of the user's own, whose label map is damaged."""
    labels = (body() > -300).astype(np.uint8)
    write(tmp_path / "data" / "images" / "a.nii.gz", blob(body()))
    flipped(write(tmp_path / "data" / "labels" / "a.nii.gz", blob(labels)))
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nlayout: nifti\nimages: 'images/{id}.nii.gz'\nlabels: 'labels/{id}.nii.gz'\n"
        "classes: {1: liver}\n"
    )
    return tmp_path


def test_damaged_labels_are_found_by_the_check(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["datasets", "check", str(dataset / "mine.yaml"), str(dataset / "data")]
    assert main(args) == 1
    said = capsys.readouterr()
    assert "a.nii.gz is damaged or cut short: CRC" in said.out + said.err


def test_damaged_labels_are_not_prepared(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = f"{dataset / 'mine.yaml'}={dataset / 'data'}"
    args = ["prepare", pair, "-o", str(dataset / "store"), "--spacing", "12", "--workers", "1"]
    assert main(args) == 1
    said = capsys.readouterr()
    assert "is damaged or cut short: CRC" in said.out + said.err


def test_damaged_masks_are_not_evaluated(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write(dataset / "truth" / "a.nii.gz", blob((body() > -300).astype(np.uint8)))
    (truth.parent / "labels.json").write_text('{"1": "liver"}')
    damaged = dataset / "masks" / "a" / "liver.nii.gz"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes((dataset / "data" / "labels" / "a.nii.gz").read_bytes())
    assert main(["evaluate", str(dataset / "masks"), str(truth.parent), "--no-surface"]) == 1
    said = capsys.readouterr()
    assert "is damaged or cut short: CRC" in said.out + said.err
