"""The store: crops equal slices of the whole, and only what is needed is read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from foundation.data.store.arrays import (
    BACKGROUND,
    CENTRES,
    CT,
    LABELS,
    MANIFEST,
    Store,
    StoredCase,
    write_array,
)
from foundation.data.store.harmonise import Harmonised
from foundation.data.store.manifest import ManifestWriter
from foundation.data.store.writing import MOST_CENTRES, write_case
from foundation.errors import UsageError, VolumeError

SHAPE = (70, 50, 90)
SETS = ((), ("liver",), ("liver", "liver_tumor"), ("spleen", "my own"), ())


def harmonised(shape: tuple[int, int, int] = SHAPE, scan: bool = True) -> Harmonised:
    rng = np.random.default_rng(5)
    labels = np.zeros(shape, np.uint8)
    labels[10:40, 10:30, 20:60] = 1
    labels[15:20, 15:20, 30:40] = 2
    labels[50:60, 30:40, 5:25] = 3
    labels[50:60, 10:20, 70:80] = 4
    ct = rng.integers(-1024, 3072, shape).astype(np.int16)
    ct[5:65, 5:45] = rng.integers(0, 90, (60, 40, shape[2]))
    affine = np.diag([1.5, 1.5, 1.5, 1])
    annotated = ("spleen", "liver", "liver_tumor", "my own")
    tissues = ("", "liver", "liver_tumor", "spleen", "body")
    return Harmonised(ct if scan else None, labels, affine, 1.5, SETS, tissues, (4,), annotated)


def put(store: Path, id_: str, case: Harmonised) -> None:
    writer = ManifestWriter(store, case.spacing_mm, {"my own": "A CT of my own"})
    folder = store / "cases" / "mine" / id_
    folder.mkdir(parents=True)
    about = {"dataset": "mine", "id": id_, "sources": [], "licence": "CC0-1.0", "weight": 2.0}
    writer.record(f"mine/{id_}", write_case(folder, case, {**about, "split": None}), "")
    writer.save()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store")
    put(path, "a", harmonised())
    put(path, "b", harmonised(scan=False))
    return Store(path)


def test_what_a_store_says(store: Store) -> None:
    case = store.case("mine/a")
    assert store.keys() == ["mine/a", "mine/b"]
    assert len(store) == 2
    assert (case.key, case.shape, case.spacing_mm, case.weight) == ("mine/a", SHAPE, 1.5, 2.0)
    assert case.sets == SETS
    assert case.tissues[2] == "liver_tumor"
    assert case.unknown == (4,)
    assert case.has_ct
    assert not store.case("mine/b").has_ct
    assert store.manifest["classes"][-1] == "my own"
    assert store.manifest["prompts"] == {"my own": "A CT of my own"}
    voxels = store.manifest["cases"]["mine/a"]["voxels"]
    assert voxels["liver"] == 30 * 20 * 40
    assert voxels["liver_tumor"] == 5 * 5 * 10


def test_the_whole_survives(store: Store) -> None:
    original, case = harmonised(), store.case("mine/a")
    np.testing.assert_array_equal(case.read_labels(), original.labels)
    np.testing.assert_array_equal(case.read_ct(), original.ct)
    np.testing.assert_allclose(case.affine, original.affine)
    assert store.case("mine/b").read_ct() is None


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((0, 0, 0), SHAPE),
        ((3, 7, 11), (40, 32, 33)),
        ((-10, 20, -5), (30, 96, 20)),
        ((60, 40, 80), (96, 96, 96)),
        ((-20, -20, -20), (120, 120, 140)),
        ((69, 49, 89), (1, 1, 1)),
    ],
)
def test_a_crop_equals_the_padded_slice(
    store: Store, start: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    original, far = harmonised(), 200
    hu, labels, inside = store.case("mine/a").read(start, size, pad=-777)
    box = tuple(slice(s + far, s + far + n) for s, n in zip(start, size, strict=True))
    assert original.ct is not None
    np.testing.assert_array_equal(hu, np.pad(original.ct, far, constant_values=-777)[box])
    np.testing.assert_array_equal(labels, np.pad(original.labels, far)[box])
    np.testing.assert_array_equal(inside, np.pad(np.ones(SHAPE, bool), far)[box])
    assert hu is not None
    assert hu.dtype == np.int16
    assert labels.dtype == np.uint8


@pytest.mark.parametrize("start", [(500, 0, 0), (0, -500, 0), (70, 0, 0), (0, 0, -8)])
def test_a_crop_beyond_the_grid_is_all_padding(store: Store, start: tuple[int, int, int]) -> None:
    hu, labels, inside = store.case("mine/a").read(start, (8, 8, 8))
    assert hu is not None
    assert (hu == -1024).all()
    assert not labels.any()
    assert not inside.any()


def test_a_label_map_without_a_scan_has_no_hu(store: Store) -> None:
    hu, labels, _ = store.case("mine/b").read((10, 10, 20), (4, 4, 4))
    assert hu is None
    assert (labels == 1).all()


def test_an_empty_crop_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        store.case("mine/a").read((0, 0, 0), (8, 0, 8))


def test_membership(store: Store) -> None:
    table = store.case("mine/a").membership(["liver", "liver_tumor", "aorta", "my own"])
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(table, np.array(expected, bool))
    assert store.case("mine/a").membership([]).shape == (5, 0)


def test_centres_lie_in_their_class(store: Store) -> None:
    case, original = store.case("mine/a"), harmonised()
    centres = case.centres
    assert set(centres) == {"spleen", "liver", "liver_tumor", "my own", BACKGROUND}
    for name in set(centres) - {BACKGROUND}:
        values = [v for v, names in enumerate(SETS) if name in names]
        found = centres[name]
        assert np.isin(original.labels[tuple(found.T)], values).all()
        assert len(np.unique(found, axis=0)) == len(found) <= MOST_CENTRES
    assert len(centres["liver_tumor"]) == 250
    assert (original.labels[tuple(centres[BACKGROUND].T)] == 0).all(), "neither class nor unknown"
    # A body without a scan is the box around its labels.
    found = store.case("mine/b").centres[BACKGROUND]
    assert (found >= [10, 10, 5]).all()
    assert (found < [60, 40, 80]).all()


def _sum_of_crop(case: StoredCase) -> int:
    return int(case.read((1, 2, 3), (30, 30, 30))[1].sum())


@pytest.mark.slow
def test_a_case_travels_to_a_worker(store: Store) -> None:
    case = store.case("mine/a")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_sum_of_crop, case).result() == _sum_of_crop(case)


def test_a_pickled_case_holds_no_voxels(store: Store) -> None:
    case = store.case("mine/a")
    case.read((0, 0, 0), (60, 40, 60))
    dict(case.centres)
    content = pickle.dumps(case)
    assert len(content) < 2000
    assert pickle.loads(content) == case


def test_a_crop_reads_a_part_of_the_file(tmp_path: Path) -> None:
    """Noise cannot be compressed, so bytes read count the blocks that were decompressed."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("this system does not count the bytes a process reads")
    noise = np.random.default_rng(0).integers(-1024, 3072, (192, 192, 192)).astype(np.int16)
    labels = np.zeros(noise.shape, np.uint8)
    put(tmp_path, "big", Harmonised(noise, labels, np.diag([1.0] * 4), 1.0, ((),), ("",), (), ()))
    case = Store(tmp_path).case("mine/big")

    def bytes_read() -> int:
        return int(counters.read_text().split("rchar:")[1].split()[0])

    case.read((0, 0, 0), (1, 1, 1))  # reads the file once for its sum
    before = bytes_read()
    hu, _, _ = case.read((70, 70, 70), (20, 20, 20))
    read = bytes_read() - before
    np.testing.assert_array_equal(hu, noise[70:90, 70:90, 70:90])
    size = (case.folder / CT).stat().st_size
    assert size > noise.size
    assert read < size / 50, f"read {read} of {size} bytes for 8 of 216 blocks' voxels"


def test_blocks_follow_small_grids(tmp_path: Path) -> None:
    for shape in ((1, 1, 1), (5, 200, 3), (64, 65, 33)):
        path = tmp_path / "labels.b2nd"
        array = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
        write_array(path, array)
        import blosc2

        np.testing.assert_array_equal(blosc2.open(str(path), mode="r")[:], array)


def test_the_same_case_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "xy":
        put(tmp_path / name, "a", harmonised())
    for file in (CT, LABELS, CENTRES, "case.json"):
        x, y = ((tmp_path / name / "cases/mine/a" / file).read_bytes() for name in "xy")
        assert x == y, file


# --- what can be wrong ----------------------------------------------------------------------------


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="universal-ct prepare"):
        Store(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Store(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 99, "cases": {}}))
    with pytest.raises(UsageError, match="format 99"):
        Store(tmp_path)


def test_a_case_that_is_not_there(store: Store) -> None:
    with pytest.raises(UsageError, match="no case 'mine/z'"):
        store.case("mine/z")


@pytest.mark.parametrize("content", [b"", b"junk" * 200, None])
def test_damaged_voxels_are_named(tmp_path: Path, content: bytes | None) -> None:
    put(tmp_path, "a", harmonised())
    path = tmp_path / "cases/mine/a" / CT
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"ct\.b2nd is"):
        Store(tmp_path).case("mine/a").read((0, 0, 0), (8, 8, 8))


def test_a_cut_file_is_an_error_and_no_air(tmp_path: Path) -> None:
    put(tmp_path, "a", harmonised())
    path = tmp_path / "cases/mine/a" / CT
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VolumeError, match=r"ct\.b2nd"):
        Store(tmp_path).case("mine/a").read((0, 0, 0), SHAPE)


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a", harmonised())
    path = tmp_path / "cases/mine/a/case.json"
    path.write_text("{}")
    with pytest.raises(VolumeError, match="lacks"):
        Store(tmp_path).case("mine/a")
    path.unlink()
    with pytest.raises(VolumeError, match="missing or damaged"):
        Store(tmp_path).case("mine/a")


def test_reading_a_store_needs_no_torch() -> None:
    script = "import sys, foundation.data.store.arrays; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
