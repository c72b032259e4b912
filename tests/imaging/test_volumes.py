"""Reading CTs and writing masks: grids survive, wrong input is refused with a reason."""

import gzip
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from foundation.errors import VolumeError
from foundation.imaging.frame import Frame, interval_weights
from foundation.imaging.volumes import Volume, VolumeWarning, read_ct
from foundation.imaging.writing import write_label_map, write_mask

SHAPE = (7, 6, 5)
AFFINE = np.diag([-0.8, 1.5, 3.0, 1.0]) + np.eye(4, k=3) * 12.5


def hu(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Air around tissue, every voxel another number."""
    return np.linspace(-1000, 900, int(np.prod(shape))).reshape(shape).astype(np.float32)


def saved(folder: Path, array: np.ndarray, affine: np.ndarray = AFFINE, name: str = "ct.nii.gz"):
    path = folder / name
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def oblique(degrees: float = 20) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, -1.1, 2.5])  # LPS
    affine[:3, 3] = [10, -20, 30]
    return affine


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_reads_hu_whatever_the_number_type(tmp_path, name):
    for dtype in (np.int16, np.int32, np.uint8, np.float32, np.float64):
        given = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
        given.flat[0] = -1000 if dtype != np.uint8 else 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VolumeWarning)  # uint8 looks windowed
            volume = read_ct(saved(tmp_path, given, name=name))
        assert volume.array.dtype == np.float32
        assert np.array_equal(volume.array, given.astype(np.float32))


def test_applies_slope_and_intercept(tmp_path):
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), AFFINE)
    image.header.set_slope_inter(2.0, -1024.0)
    stored = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    path = tmp_path / "ct.nii"
    nib.save(image, path)
    with open(path, "r+b") as file:  # numbers as a scanner stores them, before scaling
        file.seek(352)
        file.write(stored.tobytes(order="F"))
    assert np.array_equal(read_ct(path).array, stored * 2.0 - 1024)


def write_scaled(path: Path, stored: np.ndarray, slope: float, intercept: float) -> Path:
    """Stored numbers as they are, with the scaling that turns them into HU in the header."""
    image = nib.Nifti1Image(stored, AFFINE, dtype=stored.dtype)
    blob = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(blob[:348]))
    header["scl_slope"], header["scl_inter"] = slope, intercept
    blob[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(blob), 1) if path.suffix == ".gz" else bytes(blob))
    return path


STORED = [
    ("int16", 1, 0), ("uint16", 1, -1024), ("int8", 8, 0), ("uint8", 8, -1024), ("int32", 1, 0),
    ("int16", 0.5, 3.25), ("float32", 1, 0), ("float32", 2, -1), ("float64", 1, 0),
    ("float64", 0.1, 7), ("int64", 1, 0), (">i2", 1, 0), (">u2", 1, -1024), (">f4", 1, 0),
    (">f8", 2, 1),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::foundation.imaging.volumes.VolumeWarning")
@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize(("dtype", "slope", "intercept"), STORED)
def test_numbers_stay_as_they_are_stored_and_become_hu_where_needed(
    tmp_path, name, dtype, slope, intercept
):
    hu = np.random.default_rng(0).uniform(-1000, 1000, SHAPE)
    stored = np.asarray((hu - intercept) / slope)
    if np.dtype(dtype).kind != "f":
        info = np.iinfo(dtype)
        stored = stored.round().clip(info.min, info.max)
    stored = stored.astype(dtype)
    volume = read_ct(write_scaled(tmp_path / name, stored, slope, intercept))
    values = stored.astype(np.float64) * float(np.float32(slope)) + intercept  # as in a header
    expected = values.astype(np.float32)
    wide = np.dtype(dtype).itemsize > 4
    assert volume.stored.dtype == (np.float32 if wide else np.dtype(dtype).newbyteorder("="))
    assert volume.stored.flags.f_contiguous
    assert volume.array.dtype == np.float32 and np.array_equal(volume.array, expected)
    part = (slice(1, 4), 2, slice(None, None, 2))
    assert np.array_equal(volume.hu(part), expected[part])
    frame = Frame.of(volume, (1.1, 1.2, 3.3))
    by_hand = frame.to_network(np.asfortranarray(expected))
    assert np.array_equal(frame.to_network(volume), by_hand)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "bytes_a_voxel"),
    [("uint16", 1, -1024, 2), ("int16", 1, 0, 2), ("float64", 1, 0, 4)],
)
def test_reading_takes_no_second_copy(tmp_path, name, dtype, slope, intercept, bytes_a_voxel):
    shape = (96, 96, 200)
    hu = np.full(shape, -1000.0)
    hu[20:76, 20:76] = np.random.default_rng(0).normal(40, 60, (56, 56, 200)).round()
    path = write_scaled(tmp_path / name, (hu - intercept).astype(dtype), slope, intercept)
    read_ct(path)  # what is imported once
    tracemalloc.start()
    volume = read_ct(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert volume.stored.nbytes == bytes_a_voxel * hu.size
    # Beside the voxels, a sample of them; before, 4 and 10 bytes a voxel.
    assert peak < volume.stored.nbytes + 1.5 * hu.size + 8e6


def test_an_array_and_its_numbers_are_not_copied():
    given = hu().astype(np.int16)
    assert np.shares_memory(read_ct((given, AFFINE)).stored, given)


def test_path_image_and_pair_give_the_same_volume(tmp_path):
    path = saved(tmp_path, hu())
    for source in (str(path), path, nib.load(path), (hu(), AFFINE)):
        volume = read_ct(source)
        assert np.array_equal(volume.array, hu())
        assert np.allclose(volume.affine, AFFINE)
    assert read_ct(volume) is volume
    assert volume.spacing_mm == pytest.approx((0.8, 1.5, 3.0))
    assert volume.voxel_ml == pytest.approx(0.0036)


@pytest.mark.filterwarnings("ignore:.*left and right may be swapped")
@pytest.mark.parametrize("sform,qform", [(1, 1), (2, 0), (0, 1), (4, 3), (0, 0)])
def test_mask_has_exactly_the_grid_of_the_ct(tmp_path, sform, qform):
    image = nib.Nifti1Image(hu().astype(np.int16), oblique())
    image.set_sform(oblique(), sform)
    image.set_qform(oblique(), qform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 400
    nib.save(image, tmp_path / "ct.nii.gz")
    original = nib.load(tmp_path / "ct.nii.gz")
    ct = read_ct(tmp_path / "ct.nii.gz")
    given = ct.array > 0
    mask = nib.load(write_mask(tmp_path / "new" / "mask.nii.gz", given, ct))
    assert np.array_equal(np.asarray(mask.dataobj), given.astype(np.uint8))
    assert np.array_equal(mask.affine, original.affine)
    assert mask.shape == original.shape
    assert mask.get_data_dtype() == np.uint8
    for key in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_x", "quatern_b"):
        assert np.array_equal(mask.header[key], original.header[key]), key
    assert mask.header["cal_max"] == 0  # the CT's display range would hide the mask
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mask.nii.gz"]


def test_one_frame_of_a_4d_file_counts_as_a_volume(tmp_path):
    path = saved(tmp_path, hu()[..., None])
    ct = read_ct(path)
    assert ct.array.shape == SHAPE
    written = nib.load(write_mask(tmp_path / "m.nii.gz", ct.array > 0, ct))
    assert written.shape == (*SHAPE, 1)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_a_mask_on_disk_is_zeros_and_ones_in_the_order_of_the_file(tmp_path, order, name):
    ct = read_ct(saved(tmp_path, hu().astype(np.int16)))
    mask = np.array(ct.array > 100, order=order)
    content = write_mask(tmp_path / name, mask, ct).read_bytes()
    content = gzip.decompress(content) if name.endswith("gz") else content
    assert content[352:] == mask.astype(np.uint8).tobytes(order="F")
    labels = np.array(mask * 7, np.uint8, order=order)
    content = write_label_map(tmp_path / "l.nii", labels, ct).read_bytes()
    assert content[352:] == labels.tobytes(order="F")
    assert write_mask(tmp_path / "n.nii", mask * 5, ct).read_bytes()[352:] == (
        mask.astype(np.uint8).tobytes(order="F")
    )


def test_writing_takes_no_copy_of_the_mask(tmp_path):
    shape = (128, 128, 128)
    ct = read_ct((np.linspace(-1000, 900, 128**3).reshape(shape).astype(np.float32), AFFINE))
    mask = np.zeros(shape, bool, order="F")
    mask[:, 30:60] = True
    write_mask(tmp_path / "m.nii", mask, ct)  # what is imported once
    tracemalloc.start()
    write_mask(tmp_path / "m.nii", mask, ct)
    write_label_map(tmp_path / "m.nii", mask.view(np.uint8), ct)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * mask.nbytes


def test_label_values_above_255_get_16_bits(tmp_path):
    ct = read_ct((hu(), AFFINE))
    labels = np.zeros(SHAPE, np.int64)
    labels[0, 0, 0] = 300
    written = nib.load(write_label_map(tmp_path / "l.nii.gz", labels, ct))
    assert written.get_data_dtype() == np.uint16
    assert np.asarray(written.dataobj)[0, 0, 0] == 300


def test_refuses_to_write_what_does_not_fit(tmp_path):
    ct = read_ct((hu(), AFFINE))
    with pytest.raises(VolumeError, match="shape"):
        write_mask(tmp_path / "m.nii.gz", np.ones((2, 2, 2), bool), ct)
    with pytest.raises(VolumeError, match="whole numbers"):
        write_label_map(tmp_path / "m.nii.gz", hu(), ct)
    with pytest.raises(VolumeError, match="0 … 65535"):
        write_label_map(tmp_path / "m.nii.gz", np.full(SHAPE, -1), ct)
    with pytest.raises(VolumeError, match=r"\.nii"):
        write_mask(tmp_path / "m.png", np.ones(SHAPE, bool), ct)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    ct = read_ct((hu(), AFFINE))
    path = write_mask(tmp_path / "m.nii.gz", ct.array > 0, ct)
    before = path.read_bytes()

    def fail(image, name):
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_mask(path, ct.array > 500, ct)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- wrong input -------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(VolumeError, match="does not exist"):
        read_ct(tmp_path / "nothing.nii.gz")


def test_dicom_folder_and_other_formats_say_what_is_supported(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(b"DICM")
    for path in (tmp_path, tmp_path / "scan.dcm"):
        with pytest.raises(VolumeError, match=r"Supported: NIfTI.*dcm2niix"):
            read_ct(path)
    with pytest.raises(VolumeError, match="Supported"):
        read_ct(hu())  # an array without its affine


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize("content", [b"", b"not an image at all" * 40])
def test_not_nifti_inside(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match=r"NIfTI|empty file|damaged"):
        read_ct(tmp_path / name)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.95])
def test_truncated_gzip(tmp_path, keep):
    noise = np.random.default_rng(0).normal(0, 300, (32, 32, 32)).astype(np.float32)
    path = saved(tmp_path, noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(VolumeError, match="cut short"):
        read_ct(path)


def test_truncated_without_compression(tmp_path):
    path = saved(tmp_path, hu(), name="ct.nii")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(VolumeError, match="cut short"):
        read_ct(path)


@pytest.mark.parametrize(
    "shape,reason",
    [
        ((7, 6), "not a volume"),
        ((7, 6, 1), "single slice"),
        ((7, 6, 5, 3), "more than one frame"),
        ((7, 6, 5, 1, 3), "more than one frame"),
    ],
)
def test_not_one_volume(tmp_path, shape, reason):
    with pytest.raises(VolumeError, match=reason):
        read_ct(saved(tmp_path, hu(shape)))


def test_empty_volume():
    with pytest.raises(VolumeError, match="is empty"):
        read_ct((np.zeros((0, 4, 4), np.float32), np.eye(4)))
    with pytest.raises(VolumeError, match="every voxel is 0"):
        read_ct((np.zeros((4, 4, 4), np.float32), np.eye(4)))


def test_colour_image_is_refused():
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(VolumeError, match="colour"):
        read_ct(nib.Nifti1Image(rgb, AFFINE))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, bad):
    array = hu()
    array[3, 3, 3] = bad
    array[5, 1, 4] = bad
    where = r"NaN or infinite values: 2 of 210 voxels, the first at \(3, 3, 3\)"
    with pytest.raises(VolumeError, match=where):
        read_ct(saved(tmp_path, array))


def test_zero_spacing_without_sform(tmp_path):
    path = saved(tmp_path, hu(), name="ct.nii")
    raw = bytearray(path.read_bytes())
    raw[80:84] = np.float32(0).tobytes()  # pixdim[1]
    raw[252:256] = bytes(4)  # qform and sform codes
    path.write_bytes(raw)
    with pytest.raises(VolumeError, match=r"spacing \[0\.0, 1\.5, 3\.0\]"):
        read_ct(path)
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(VolumeError, match="must be positive"):
        read_ct(tmp_path / "ct.nii.gz")


def test_impossible_grids():
    with pytest.raises(VolumeError, match="spacing"):
        read_ct((hu(), np.diag([0, 1, 1, 1])))
    with pytest.raises(VolumeError, match="metres or microns"):
        read_ct((hu(), np.diag([0.0008, 0.0008, 0.0015, 1])))
    singular = np.eye(4)
    singular[:3, 1] = singular[:3, 0]
    with pytest.raises(VolumeError, match="singular"):
        read_ct((hu(), singular))
    with pytest.raises(VolumeError, match="not finite"):
        read_ct((hu(), np.diag([1, np.nan, 1, 1])))
    with pytest.raises(VolumeError, match=r"\(4, 4\)"):
        read_ct((hu(), np.eye(3)))
    far = np.eye(4)
    far[1, 3] = 3e21
    with pytest.raises(VolumeError, match="more than 100 m from the origin"):
        read_ct((hu(), far))


@pytest.mark.parametrize(
    "array,reason",
    [
        (np.linspace(0, 1, 210), r"scaled to \[0, 1\]"),
        (np.linspace(0, 255, 210), "8 bits"),
        (np.linspace(-400, 500, 210).clip(-175, 250), "already windowed, not full HU"),
        (np.linspace(0, 1800, 210), "never negative"),
        (np.linspace(-100, 400, 210), "without any air"),
    ],
)
def test_doubtful_intensities_warn_with_the_reason(array, reason):
    with pytest.warns(VolumeWarning, match=reason):
        read_ct((array.reshape(SHAPE), AFFINE))


def test_a_ct_is_read_without_a_warning(tmp_path):
    path = saved(tmp_path, hu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_ct(path)
        read_ct((hu().clip(-1000, 250), AFFINE))  # bright end clipped, air intact: still HU


def test_unknown_orientation_warns(tmp_path):
    image = nib.Nifti1Image(hu(), None)
    nib.save(image, tmp_path / "ct.nii")
    with pytest.warns(VolumeWarning, match="left and right"):
        read_ct(tmp_path / "ct.nii")


# --- the network's frame -----------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "SRA", "AIL", "PSR", "RAS"])
def test_frame_of_every_orientation_shows_the_same_patient(codes):
    reference = nib.Nifti1Image(hu((8, 10, 12)), np.diag([2, 2.5, 3, 1.0]))
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(reference.affine), nib.orientations.axcodes2ornt(codes)
    )
    seen = []
    for image in (reference, reference.as_reoriented(turn)):
        volume = read_ct(image)
        frame = Frame.of(volume, (4, 4, 4))
        network = frame.to_network(volume.array)
        back = np.zeros(volume.shape, np.float32)
        array, box = frame.to_file(network[1:3, 2:4, 3:6], (1, 2, 3))
        back[box] = array
        seen.append((network, frame.to_ras(back)))
    assert np.allclose(seen[0][0], seen[1][0], atol=1e-2)
    assert np.allclose(seen[0][1], seen[1][1], atol=1e-2)
    assert seen[0][1].any()


def test_there_and_back_keeps_positions():
    volume = read_ct((hu((12, 14, 16)), np.diag([1.0, 1.3, 0.7, 1])))
    frame = Frame.of(volume, (1.9, 1.7, 2.2))
    for axis in range(3):  # a ramp survives both ways, except for the flat end of its last voxel
        shape = [1, 1, 1]
        shape[axis] = -1
        ramp = np.broadcast_to(np.arange(volume.shape[axis]).reshape(shape), volume.shape)
        array, box = frame.to_file(frame.to_network(ramp), (0, 0, 0))
        assert box == tuple(slice(0, size) for size in volume.shape)
        middle = tuple(slice(4, -4) for _ in range(3))
        assert np.allclose(array[middle], ramp[middle], atol=0.1)  # of a voxel


def test_network_grid_covers_the_scan_and_keeps_its_spacing():
    volume = read_ct((hu((11, 13, 17)), oblique()))
    frame = Frame.of(volume, (1.5, 1.5, 4.0))
    for n, mm, size, have in zip(
        frame.shape, frame.spacing_mm, frame.ras_shape, frame.ras_spacing_mm, strict=True
    ):
        assert size * have - 1e-2 <= n * mm < size * have + mm


def test_interval_weights_interpolate_or_average():
    identity = interval_weights(6, 2.0, 6, 2.0)
    assert np.allclose(identity, np.eye(6), atol=1e-3)
    halves = interval_weights(8, 1.0, 4, 2.0)  # each target voxel is two source voxels
    assert np.allclose(halves @ np.arange(8), [0.5, 2.5, 4.5, 6.5], atol=1e-2)
    finer = interval_weights(4, 2.0, 8, 1.0)
    ramp = finer @ (np.arange(4) * 2.0 + 1)  # value = position in mm
    assert np.allclose(ramp[1:-1], np.arange(1.5, 7), atol=1e-3)  # linear inside
    assert ramp[0] == pytest.approx(1) and ramp[-1] == pytest.approx(7)  # edge voxel goes on
    for weights in (identity, halves, finer, interval_weights(7, 0.7, 2, 4.0)):
        assert np.allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_a_real_ct_reads(open_data):
    volume = read_ct(open_data / "totalsegmentator_example" / "ct.nii.gz")
    assert volume.shape == (122, 101, 112)
    assert isinstance(volume, Volume)
