"""Many CTs: where they are found, where their results go, and what one failure costs."""

import errno
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import tiny_model

from foundation.errors import UsageError
from foundation.imaging.sidecar import Sidecar
from foundation.inference.cases import find_cases
from foundation.inference.folder import segment_cases, segment_folder
from foundation.inference.outcomes import Outcome
from foundation.model import UniversalModel


def write_ct(path: Path) -> Path:
    """A block of tissue in air, 6 mm."""
    hu = np.full((24, 22, 20), -1000, np.int16)
    hu[5:19, 5:17, 3:17] = 40
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu, np.diag([6.0, 6, 6, 1])), path)
    return path


@pytest.fixture(scope="module")
def model() -> UniversalModel:
    tiny = tiny_model()
    coarse = replace(tiny.config.preprocessing, spacing_mm=(12.0, 12.0, 12.0))
    tiny.config = replace(tiny.config, preprocessing=coarse)
    return tiny


def test_a_folder_of_cts_from_python(model: UniversalModel, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_ct(tmp_path / "data" / f"{name}.nii.gz")
    (tmp_path / "data" / "b.nii.gz").write_bytes(b"no CT")
    told: list[Outcome] = []
    options = {"classes": ["liver"], "layout": "per_class", "preview": True, "progress": False}
    found = segment_folder(
        model, tmp_path / "data", tmp_path / "out", report=told.append, **options
    )
    assert found == told
    assert [(each.case, each.status) for each in found] == [
        *(("a", "done"), ("b", "failed"), ("c", "done"))
    ]
    assert list(found[0].volumes_ml) == ["liver"]
    assert {Path(file).name for file in found[0].files} == {
        *("liver.nii.gz", "preview.png", "volumes.csv", "segmentation.json")
    }
    assert found[1].error and "not a readable NIfTI file" in found[1].error
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("a", "c", "universal-ct.jsonl", "universal-ct.log")
    }
    assert Sidecar.read(Path(found[0].files[-1])).model == "tiny"


def test_results_that_are_there_are_refused_skipped_or_overwritten(
    model: UniversalModel, tmp_path: Path
) -> None:
    ct = write_ct(tmp_path / "a.nii.gz")
    segment_folder(model, ct, tmp_path / "out", progress=False)
    with pytest.raises(UsageError, match="already holds a segmentation"):
        segment_folder(model, ct, tmp_path / "out", progress=False)
    for existing, status in (("skip", "skipped"), ("overwrite", "done")):
        (found,) = segment_folder(
            model, [ct], tmp_path / "out", existing=existing, progress=False  # type: ignore[arg-type]
        )  # fmt: skip
        assert found.status == status


def test_a_wrong_request_stops_before_the_next_ct(model: UniversalModel, tmp_path: Path) -> None:
    cts = [write_ct(tmp_path / f"{name}.nii.gz") for name in "ab"]
    with pytest.raises(UsageError, match="aorta"):
        segment_folder(model, cts, tmp_path / "out", classes="aorta", progress=False)
    with pytest.raises(UsageError, match="overlap"):
        segment_folder(model, cts, tmp_path / "out", overlap=2.0, progress=False)


def test_a_full_disk_ends_it_and_another_error_does_not(
    model: UniversalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = find_cases([write_ct(tmp_path / f"{name}.nii.gz") for name in "abc"], tmp_path / "out")
    for number, tried in ((errno.ENOSPC, 1), (errno.EACCES, 3)):
        calls: list[object] = []

        def broken(*_: object, number: int = number, calls: list[object] = calls) -> None:
            calls.append(1)
            raise OSError(number, "it cannot be written")

        monkeypatch.setattr("foundation.imaging.result.write_label_map", broken)
        found = list(segment_cases(model, cases, progress=False))
        assert [each.status for each in found] == ["failed"] * 3
        assert len(calls) == tried
        assert found[0].error and "segmentation.nii.gz" in found[0].error, "which file"


def test_no_network_is_needed_where_no_ct_exists(tmp_path: Path) -> None:
    cases = find_cases([tmp_path / "gone.nii.gz"], tmp_path / "out")
    (found,) = segment_cases(None, cases)
    assert found.error == f"{tmp_path / 'gone.nii.gz'} does not exist. Check the path."


@pytest.mark.parametrize("name", ["...nii.gz", "..nii.gz", ".nii.gz", "....nii.gz", "..nii"])
def test_a_result_lies_inside_of_the_output(name: str, tmp_path: Path) -> None:
    ct = write_ct(tmp_path / "data" / "x.nii.gz").rename(tmp_path / "data" / name)
    with pytest.raises(UsageError, match="gives no name to the folder"):
        find_cases([ct], tmp_path / "data" / "out")
    (case,) = find_cases([ct], tmp_path / "seg.nii.gz")  # a file that is named has its own place
    assert case.output == tmp_path / "seg.nii.gz"


def test_case_names_and_places(tmp_path: Path) -> None:
    for name in ("x/ct.nii.gz", "flat/a_0000.nii.gz", "flat/b.nii", "flat/.hidden.nii.gz"):
        write_ct(tmp_path / name)
    (tmp_path / "flat" / "notes.txt").write_text("")
    cases = find_cases([tmp_path / "x", tmp_path / "flat"], tmp_path / "out")
    assert [case.name for case in cases] == ["x", "a", "b"]
    assert cases[0].output == tmp_path / "out" / "x"
    again = find_cases([tmp_path / "flat" / "b.nii", tmp_path / "flat"], tmp_path / "out")
    assert [case.name for case in again] == ["b", "a"]  # no CT twice
    write_ct(tmp_path / "other" / "b.nii.gz")
    with pytest.raises(UsageError, match="would all be written to"):
        find_cases([tmp_path / "flat", tmp_path / "other"], tmp_path / "out")
    write_ct(tmp_path / "other" / "B.nii.gz")
    with pytest.raises(UsageError, match="would all be written to"):
        find_cases([tmp_path / "flat" / "b.nii", tmp_path / "other" / "B.nii.gz"], tmp_path)
    dotted = find_cases([tmp_path / "scan.dcm.nii.gz", tmp_path / "c.nii.nii.gz"], tmp_path / "out")
    assert [case.files.sidecar.parent.name for case in dotted] == ["scan.dcm", "c"]
    with pytest.raises(UsageError, match="is one file"):
        find_cases([tmp_path / "flat"], tmp_path / "out.nii.gz")


def test_a_result_is_no_ct(model: UniversalModel, tmp_path: Path) -> None:
    ct = write_ct(tmp_path / "data" / "a.nii.gz")
    segment_folder(model, ct, tmp_path / "data" / "a.seg.nii.gz", layout="both", progress=False)
    assert [case.ct for case in find_cases([tmp_path / "data"], tmp_path / "out")] == [ct]
    segment_folder(model, ct, tmp_path / "out", layout="both", progress=False)
    with pytest.raises(UsageError, match="holds no CT"):
        find_cases([tmp_path / "out" / "a"], tmp_path / "again")


def test_a_link_to_itself_is_a_ct_that_does_not_exist(
    model: UniversalModel, tmp_path: Path
) -> None:
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "a.nii.gz")
    (found,) = segment_folder(model, tmp_path / "a.nii.gz", tmp_path / "out", progress=False)
    assert found.error and "does not exist" in found.error
