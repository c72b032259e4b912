"""Damage in a store: each kind of file, each kind of fault, a clear error and a name."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from damage import damage
from tiny_store import write_store

from foundation.cli.main import main
from foundation.data.store import arrays
from foundation.data.store.arrays import CASE, CENTRES, CT, FILES, LABELS, MANIFEST, Store
from foundation.data.store.checking import check_store
from foundation.data.store.prepare import prepare
from foundation.errors import UniversalCTError, UsageError, VolumeError
from foundation.files import file_sha256, read_sealed, sealed_json

KEY = "04/case_1"
KINDS = (CT, LABELS, CENTRES, CASE)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = write_store(tmp_path / "store", cases=2)
    manifest = path / MANIFEST
    manifest.write_text(sealed_json(json.loads(manifest.read_text())))
    return path


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """What `prepare` is given: a dataset of two scans and a store."""
    body = nib.Nifti1Image(np.zeros((12, 10, 8), np.int16), np.diag([4.0, 4.0, 4.0, 1.0]))
    for number, name in enumerate(("one", "two")):
        hu = np.random.default_rng(number).integers(-900, 900, body.shape).astype(np.int16)
        labels = np.zeros(body.shape, np.uint8)
        labels[3:7, 3:7, 3:6] = 1
        for kind, array in (("ct", hu), ("labels", labels)):
            path = tmp_path / "data" / f"{name}_{kind}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, body.affine), path)
    (tmp_path / "mine.yaml").write_text(
        'name: mine\nlayout: nifti\nimages: "{id}_ct.nii.gz"\nlabels: "{id}_labels.nii.gz"\n'
        "classes: {1: liver}\n"
    )
    return {
        "datasets": [(str(tmp_path / "mine.yaml"), tmp_path / "data")],
        "store": tmp_path / "prepared",
        "spacing_mm": 4.0,
        "workers": 1,
        "progress": False,
    }


def read_all(store: Path) -> list[object]:
    """Every value of every case, as training would read them."""
    found: list[object] = []
    opened = Store(store)
    for key in opened.keys():  # noqa: SIM118 - a store is no dictionary
        case = opened.case(key)
        found += [case.shape, case.affine, case.sets, case.annotated, case.weight, case.unknown]
        found += [case.read_ct(), case.read_labels(), *sorted(dict(case.centres))]
        found += [case.centres[name] for name in sorted(case.centres)]
    return found


def same(one: list[object], other: list[object]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in zip(one, other, strict=True)
    )


def test_an_intact_store_is_found_so(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_store(store, progress=False)
    assert (found.cases, found.damaged, found.without_sums) == (6, {}, ())
    assert main(["prepare", "--check", str(store), "-q"]) == 0
    assert capsys.readouterr().out == f"6 cases, 0 damaged: {store}\n"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "gone"])
def test_damage_is_named(
    store: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store / "cases" / KEY / name
    damage(path, how, random.Random(2))
    with pytest.raises(VolumeError, match=rf"{name}.*universal-ct prepare. again"):
        read_all(store)
    assert main(["prepare", "--check", str(store), "-q", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report["damaged"]) == [KEY] and name in report["damaged"][KEY]
    assert report["cases"] == 6 and report["without_sums"] == []


def test_a_file_is_summed_once_in_a_process(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[Path] = []

    def counted(path: Path) -> str:
        summed.append(path)
        return file_sha256(path)

    monkeypatch.setattr(arrays, "file_sha256", counted)
    case = Store(store).case(KEY)
    assert summed == [], "a case is summed when it is read, not before"
    for _ in range(3):
        Store(store).case(KEY).read((0, 0, 0), (4, 4, 4))
        dict(case.centres)
    assert [path.name for path in summed] == [CT, LABELS, CENTRES]
    damage(case.folder / CT, "flipped", random.Random(0))
    with pytest.raises(VolumeError, match=r"ct\.b2nd is damaged or was changed"):
        case.read((0, 0, 0), (4, 4, 4))


def test_prepare_does_damaged_cases_again(data: dict[str, Any]) -> None:
    assert prepare(**data).prepared == ("mine/one", "mine/two")
    path = data["store"] / "cases" / "mine" / "two" / CT
    before = path.read_bytes()
    damage(path, "flipped", random.Random(0))
    assert list(check_store(data["store"], progress=False).damaged) == ["mine/two"]
    assert prepare(**data).prepared == ("mine/two",)
    assert path.read_bytes() == before
    assert not check_store(data["store"], progress=False).damaged


def older(store: Path) -> None:
    """As before there were sums."""
    for path in store.rglob(CASE):
        about = read_sealed(path.read_text())
        del about[FILES]
        path.write_text(json.dumps(about))


def test_a_store_without_sums_is_read_and_said_to_have_none(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_all(store)
    older(store)
    assert same(read_all(store), before)
    assert main(["prepare", "--check", str(store), "-q"]) == 0
    assert "6 cases, 0 damaged, 6 from before there were sums" in capsys.readouterr().out
    (store / "cases" / KEY / CENTRES).write_bytes(b"PK\x03\x04")
    with pytest.raises(VolumeError, match=r"centres\.npz is missing or damaged"):
        Store(store).case(KEY).centres  # noqa: B018 - it is read here
    assert main(["prepare", "--check", str(store), "-q"]) == 1


def test_damage_inside_centres_without_sums_is_no_traceback(store: Path) -> None:
    older(store)
    path = store / "cases" / KEY / CENTRES
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # in the values of the first array; the zip's own sum differs
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"centres\.npz is missing or damaged"):
        dict(Store(store).case(KEY).centres)
    with pytest.raises(KeyError):
        Store(store).case("03/case_0").centres["arm"]


def test_a_damaged_manifest_is_named_and_can_be_made_again(data: dict[str, Any]) -> None:
    prepare(**data)
    path = data["store"] / MANIFEST
    content = path.read_text()
    assert content.count('"weight": 1.0') == 2
    path.write_text(content.replace('"weight": 1.0', '"weight": 2.0', 1))
    message = r"manifest\.json cannot be read.*Remove it and run"
    with pytest.raises(UsageError, match=message):
        Store(data["store"])
    with pytest.raises(UsageError, match=message):
        prepare(**data)
    path.unlink()
    assert prepare(**data).skipped == ("mine/one", "mine/two")
    assert len(Store(data["store"])) == 2


def test_a_case_in_the_place_of_another_is_found(store: Path) -> None:
    shutil.rmtree(store / "cases" / KEY)
    shutil.copytree(store / "cases" / "04" / "case_0", store / "cases" / KEY)
    assert (
        "is not the case that the manifest has" in check_store(store, progress=False).damaged[KEY]
    )


def test_what_check_takes(store: Path, tmp_path: Path) -> None:
    assert main(["prepare", "--check", str(store), "04=x"]) == 2
    assert main(["prepare", "--check", str(tmp_path)]) == 2
    assert main(["prepare", "04=x"]) == 2
    assert main(["prepare", "-o", str(tmp_path / "new")]) == 2


def test_sealed_json_is_what_was_sealed() -> None:
    content = {"b": (1, 2), "a": {"c": 0.1, 3: None}, "d": -float("inf")}
    text = sealed_json(content)
    assert read_sealed(text) == {"b": [1, 2], "a": {"c": 0.1, "3": None}, "d": -float("inf")}
    assert text == sealed_json(dict(reversed(content.items())))
    assert read_sealed('{"a": 1}') == {"a": 1}, "never sealed"
    for wrong in (text.replace("0.1", "0.2"), "[]", "3", "{", "[" * 100_000, "1" * 5000):
        with pytest.raises(ValueError):
            read_sealed(wrong)


@pytest.mark.slow
def test_two_hundred_damaged_stores(store: Path) -> None:
    """Each is refused, or says exactly what the intact one says."""
    expected = read_all(store)
    files = [store / "cases" / KEY / name for name in KINDS] + [store / MANIFEST]
    refused = 0
    for seed in range(200):
        rng = random.Random(seed)
        path = files[seed % len(files)]
        content = path.read_bytes()
        damage(path, rng.choice(["flipped", "flipped", "cut", "emptied"]), rng)
        try:
            assert same(read_all(store), expected), f"seed {seed}, {path.name}"
        except UniversalCTError:
            refused += 1
        path.write_bytes(content)
    assert refused > 190
