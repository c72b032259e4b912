"""NIfTI files: damage is noticed to the last byte, and impossible headers are refused."""

import gzip
import os
import socket
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from foundation.data.reading import read_label_map
from foundation.errors import VolumeError
from foundation.imaging import memory
from foundation.imaging.volumes import VolumeWarning, read_ct

SHAPE = (24, 20, 16)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def a_body(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Noisy tissue in noisy air, int16."""
    rng = np.random.default_rng(0)
    hu = rng.normal(-1000, 12, shape)
    inside = tuple(slice(size // 5, -size // 5) for size in shape)
    hu[inside] = rng.normal(30, 40, hu[inside].shape)
    return hu.round().astype(np.int16)


def plain(array: np.ndarray | None = None, **fields: object) -> bytearray:
    """The bytes of a .nii, with fields of its header changed after that."""
    image = nib.Nifti1Image(a_body() if array is None else array, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    blob = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(blob[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    blob[:348] = header.binaryblock
    return blob


def zipped(content: bytes) -> bytearray:
    """What gzip writes at its lowest level: blocks that a flipped bit rarely makes unreadable."""
    return bytearray(gzip.compress(bytes(content), 0, mtime=0))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(bytes(content))
    return path


READERS = [read_ct, read_label_map]


@pytest.mark.parametrize("read", READERS)
def test_a_flipped_bit_anywhere_is_noticed(tmp_path, read) -> None:
    """Also in the last eight bytes, which are the checksum and the length."""
    whole = zipped(plain(np.abs(a_body())))
    rng = np.random.default_rng(1)
    places = [*rng.integers(400, len(whole) - 8, 20), *range(len(whole) - 8, len(whole))]
    for place in places:
        broken = whole.copy()
        broken[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(VolumeError, match=r"ct\.nii\.gz is damaged or cut short: .* Copy"):
            read(write(tmp_path / "ct.nii.gz", broken))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("missing", [1, 4, 8, 11])
def test_a_file_without_its_last_bytes_is_noticed(tmp_path, read, missing) -> None:
    whole = zipped(plain(np.abs(a_body())))
    with pytest.raises(VolumeError, match="cut short"):
        read(write(tmp_path / "ct.nii.gz", whole[:-missing]))


@pytest.mark.parametrize("read", READERS)
def test_what_follows_a_compressed_file_is_noticed(tmp_path, read) -> None:
    whole = zipped(plain(np.abs(a_body())))
    with pytest.raises(VolumeError, match="damaged"):
        read(write(tmp_path / "ct.nii.gz", whole + b"trailing rubbish"))


def test_an_image_of_nibabel_is_checked_too(tmp_path) -> None:
    whole = zipped(plain())
    whole[-6] ^= 4
    image = nib.load(write(tmp_path / "ct.nii.gz", whole))
    with pytest.raises(VolumeError, match="CRC"):
        read_ct(image)


@pytest.mark.filterwarnings("ignore:.*never negative")
@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize("read", READERS)
def test_more_voxels_than_the_header_says_are_doubted(tmp_path, name, read) -> None:
    """A smaller size in the header: organs would be missing, or sheared, without a word."""
    blob = plain(np.abs(a_body()), dim=[3, 24, 20, 12, 1, 1, 1, 1])
    path = write(tmp_path / name, zipped(blob) if name.endswith("gz") else blob)
    more = 24 * 20 * 4 * 2
    with pytest.warns(VolumeWarning, match=f"{more:,} bytes more than its header says"):
        read(path)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize("size", [32, 32767])
def test_fewer_voxels_than_the_header_says_take_no_memory(tmp_path, name, size) -> None:
    blob = plain(dim=[3, size, size, size, 1, 1, 1, 1])
    path = write(tmp_path / name, zipped(blob) if name.endswith("gz") else blob)
    tracemalloc.start()
    with pytest.raises(VolumeError, match="cut short"):
        read_ct(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_small_file_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch) -> None:
    """A megabyte of zeros for a gigabyte: here a thousandth of both."""
    zeros = np.zeros((100, 100, 100), np.uint8)
    blob = plain(zeros, scl_slope=1, scl_inter=-1024)
    path = write(tmp_path / "bomb.nii.gz", gzip.compress(bytes(blob)))
    assert path.stat().st_size < 5000
    monkeypatch.setattr(memory, "available_bytes", lambda: 2_000_000)
    with pytest.raises(VolumeError, match=r"100×100×100 voxels.*0\.003 GB.*0\.002 GB are free"):
        read_ct(path)
    with pytest.raises(VolumeError, match="are free"):
        read_label_map(path)


def test_memory_that_is_not_there_is_an_error_of_ours(tmp_path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    path = write(tmp_path / "ct.nii", plain())
    monkeypatch.setattr("foundation.imaging.nifti.np.empty", full)
    with pytest.raises(VolumeError, match="does not fit in memory"):
        read_ct(path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"vox_offset": np.nan}, "not a readable NIfTI file"),
        ({"vox_offset": np.inf}, "not a readable NIfTI file"),
        ({"vox_offset": -352}, "not a readable NIfTI file"),
        ({"vox_offset": 0}, "inside the header"),
        ({"vox_offset": 1e30}, "cut short"),
        ({"datatype": 9}, "not a readable NIfTI file"),
        ({"dim": [3, -24, 20, 16, 1, 1, 1, 1]}, "is empty"),
        ({"dim": [0, 24, 20, 16, 1, 1, 1, 1]}, "NIfTI|not a volume|is empty"),
        ({"magic": b"abc"}, "not a readable NIfTI file"),
        ({"scl_slope": 1, "scl_inter": np.inf}, "not a readable NIfTI file"),
        ({"sform_code": 0, "quatern_b": 2}, "not a readable NIfTI file"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "not finite"),
        ({"srow_x": [0, 0, 0, 0]}, "spacing"),
    ],
)
def test_headers_that_cannot_be(tmp_path, fields, reason) -> None:
    for name, content in (("ct.nii", plain(**fields)), ("ct.nii.gz", zipped(plain(**fields)))):
        with pytest.raises(VolumeError, match=reason):
            read_ct(write(tmp_path / name, content))


def test_random_bytes_in_a_header_end_in_an_error_of_ours_or_a_volume(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        blob = plain()
        for place in rng.integers(0, 348, rng.integers(1, 9)):
            blob[place] = rng.integers(256)
        path = write(tmp_path / "ct.nii", blob)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VolumeWarning)
            try:
                read_ct(path)
            except VolumeError as error:
                assert str(path) in str(error)


# --- files that are no files --------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="has no pipes in folders")
def test_pipes_sockets_and_devices_are_named_as_such(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "device.nii").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.nii"))
        for name in ("pipe.nii.gz", "device.nii", "socket.nii"):
            with pytest.raises(VolumeError, match="no regular file"):
                read_ct(tmp_path / name)


def test_a_circle_of_links_is_no_traceback(tmp_path) -> None:
    (tmp_path / "a.nii").symlink_to(tmp_path / "b.nii")
    (tmp_path / "b.nii").symlink_to(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="does not exist"):
        read_ct(tmp_path / "a.nii")


def test_a_file_that_may_not_be_read_says_so_and_not_more(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "ct.nii", plain())

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(VolumeError, match="permission denied") as caught:
        read_ct(path)
    assert "DICOM" not in str(caught.value)


def test_suffixes_may_be_written_as_one_likes(tmp_path) -> None:
    for name in ("a.Nii", "b.NII", "c.nii.GZ", "d.NiI.gZ"):
        content = zipped(plain()) if name.lower().endswith("gz") else plain()
        assert np.array_equal(read_ct(write(tmp_path / name, content)).array, a_body())


def test_nibabel_says_nothing_on_its_own(tmp_path, capfd) -> None:
    path = write(tmp_path / "ct.nii", plain(pixdim=[1, 0, 0, 0, 0, 0, 0, 0], qform_code=0))
    read_ct(path)
    assert capfd.readouterr().err == ""


def test_several_gzip_members_are_one_file(tmp_path) -> None:
    """As bgzip and pigz write them."""
    blob = bytes(plain())
    members = b"".join(gzip.compress(blob[at : at + 5000]) for at in range(0, len(blob), 5000))
    path = write(tmp_path / "ct.nii.gz", members)
    assert np.array_equal(read_ct(path).array, a_body())


def test_the_trailer_is_what_the_format_says() -> None:
    """The test above flips these eight bytes: RFC 1952, 2.3.1."""
    whole = zipped(plain())
    assert whole[-8:] == struct.pack("<II", zlib.crc32(plain()), len(plain()))
