"""A card's figures, run again: hashes first, and one changed voxel is seen."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import REPOSITORY
from tiny import tiny_model

from foundation import from_pretrained
from foundation.cli.main import main
from foundation.errors import UsageError, VolumeError
from foundation.evaluation import (
    Figure,
    Record,
    append_record,
    measure_ct,
    new_record,
    path_sha256,
    read_records,
    reproduce,
    weights_sha256,
)
from foundation.hub.folder import RECORDS
from foundation.model import UniversalModel

NAMES = ("case/ct.nii.gz", "case/labels.nii.gz", "case/labels.json")


def sensitive_model(seed: int = 0) -> UniversalModel:
    """The tiny model with a threshold that its random probabilities pass in places."""
    model = tiny_model(seed=seed)
    preprocessing = replace(model.config.preprocessing, threshold=0.16)
    config = replace(model.config, preprocessing=preprocessing)
    other = UniversalModel(config, model.prompt_embedding)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A CT of noise with a liver in it, and its labels."""
    folder = tmp_path / "data" / "case"
    folder.mkdir(parents=True)
    hu = np.random.default_rng(0).integers(-1000, 400, (20, 20, 20)).astype(np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    labels[0, 0, 0] = 2
    for name, array in (("ct", hu), ("labels", labels)):
        nib.save(nib.Nifti1Image(array, np.diag([2, 2, 2, 1])), folder / f"{name}.nii.gz")
    (folder / "labels.json").write_text(json.dumps({"1": "liver", "2": "spleen"}))
    return tmp_path / "data"


@pytest.fixture
def measured(data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model with the record of its agreement; the record can be changed."""

    def save(**changes: object) -> Path:
        folder = tmp_path / "model"
        sensitive_model().save_pretrained(folder)
        model = from_pretrained(folder)
        record = new_record(
            "agreement",
            "real",
            arm={"dataset": "case", "model": "tiny", "ct": NAMES[0], "labels": NAMES[1]},
            figures=measure_ct(model, data / NAMES[0], data / NAMES[1]),
            seconds=1,
            data={name: path_sha256(data / name) for name in NAMES},
            weights=weights_sha256(model),
        )
        changed: Record = replace(record, **changes)  # type: ignore[arg-type]
        append_record(folder / RECORDS, changed)
        return folder

    return save


def test_labels_are_read_on_the_grid_of_the_ct(measured: Callable[..., Path], data: Path) -> None:
    folder = measured()
    image = nib.load(data / NAMES[1])
    affine = np.diag([-2.0, 2, 2, 1])  # the same labels in the same places, the other way round
    affine[0, 3] = 2 * 19
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[::-1], affine), data / NAMES[1])
    (result,) = reproduce(folder, data, ignore_hashes=True)
    assert result.status == "reproduced" and result.moved == ()
    shifted = nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([3, 3, 3, 1]))
    nib.save(shifted, data / NAMES[1])
    with pytest.raises(VolumeError, match="another grid"):
        list(reproduce(folder, data, ignore_hashes=True))


def change_a_voxel(data: Path) -> None:
    path = data / NAMES[1]
    image = nib.load(path)
    array = np.asanyarray(image.dataobj).copy()
    array[5, 5, 5] = 0  # one voxel of the liver
    nib.save(nib.Nifti1Image(array, image.affine), path)


def test_what_is_as_it_was_is_reproduced_bit_for_bit(
    measured: Callable[..., Path], data: Path
) -> None:
    (result,) = reproduce(measured(), data)
    assert result.status == "reproduced" and result.moved == () and result.compared == 8
    dice = result.record.figure("dice/liver").value
    assert dice is not None and 0 < dice < 1, "or nothing would be compared"


def test_a_changed_file_is_named_and_nothing_is_run(
    measured: Callable[..., Path], data: Path
) -> None:
    folder = measured()
    change_a_voxel(data)
    (result,) = reproduce(folder, data)
    assert result.status == "files differ" and not result.compared
    (reason,) = result.reasons
    assert NAMES[1] in reason and path_sha256(data / NAMES[1]) in reason


def test_one_voxel_of_a_reference_moves_the_figures_that_depend_on_it(
    measured: Callable[..., Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = measured()
    change_a_voxel(data)
    (result,) = reproduce(folder, data, ignore_hashes=True)
    assert result.status == "moved"
    moved = {each.name: each for each in result.moved}
    reference = moved["reference/liver"]
    assert not reference.within and reference.was and reference.now
    assert reference.was - reference.now == pytest.approx(0.008)  # 2 × 2 × 2 mm
    assert moved["dice/liver"].was != moved["dice/liver"].now
    assert "reference/spleen" not in moved and "dice/spleen" not in moved
    arguments = ["reproduce", str(folder), "--data", str(data)]
    assert main(arguments) == 1
    assert f"{NAMES[1]} was changed" in capsys.readouterr().out
    assert main([*arguments, "--ignore-hashes"]) == 1
    assert "reference/liver moved: 8 → 7.992, -0.008" in capsys.readouterr().out


def test_a_figure_that_the_record_has_otherwise_is_listed_with_how_much(
    measured: Callable[..., Path], data: Path
) -> None:
    folder = measured()
    (true,) = read_records(folder / RECORDS)
    (folder / RECORDS).unlink()
    dice = true.figure("dice/mean").value or 0.0
    near, far = Figure("dice/mean", dice + 5e-5), Figure("dice/mean", dice + 0.01)
    for figure in (near, far, Figure("dice/gone", 0.5)):
        others = tuple(each for each in true.figures if each.name != figure.name)
        append_record(folder / RECORDS, replace(true, figures=(*others, figure)))
    within, beyond, gone = reproduce(folder, data)
    assert within.status == "reproduced" and within.moved[0].within
    assert beyond.status == "moved" and not beyond.moved[0].within
    assert gone.status == "moved" and gone.moved[0].now is None
    assert [r.status for r in reproduce(folder, data, tolerance=0.1)][:2] == ["reproduced"] * 2


def test_a_missing_file_stops_a_record_always(measured: Callable[..., Path], data: Path) -> None:
    folder = measured()
    (data / NAMES[0]).unlink()
    for ignore_hashes in (False, True):
        (result,) = reproduce(folder, data, ignore_hashes=ignore_hashes)
        assert result.status == "files differ"
        assert "ct.nii.gz is missing" in result.reasons[0] and "--data" in result.reasons[0]


def test_other_weights_than_those_measured_do_not_pass(
    measured: Callable[..., Path], data: Path
) -> None:
    folder = measured()
    records = (folder / RECORDS).read_text()
    sensitive_model(seed=1).save_pretrained(folder)
    (folder / RECORDS).write_text(records)
    (result,) = reproduce(folder, data)
    assert result.status == "files differ" and "model.safetensors was changed" in result.reasons[0]
    (result,) = reproduce(folder, data, ignore_hashes=True)
    assert result.status == "moved"


def test_weights_that_nobody_can_load_are_never_passed(
    measured: Callable[..., Path], data: Path
) -> None:
    folder = measured(weights={}, arm={"dataset": "case", "model": "runs/held_out"})
    for ignore_hashes in (False, True):
        (result,) = reproduce(folder, data, ignore_hashes=ignore_hashes)
        assert result.status == "not reproducible"
        assert "runs/held_out are not published" in result.reasons[0]


def test_a_kind_that_cannot_run_here_gives_its_command(
    measured: Callable[..., Path], data: Path
) -> None:
    (result,) = reproduce(measured(benchmark="table2_msd", command="python x.py"), data)
    assert result.status == "not run" and "python x.py" in result.reasons[0]


def test_the_embedded_card_names_what_cannot_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("universal-ct", REPOSITORY / "model_cards" / "universal-ct.md"):
        assert main(["reproduce", str(name), "--data", str(tmp_path)]) == 1
        printed = capsys.readouterr().out
        assert "totalsegmentator_example (2026-11-26): not reproducible" in printed
        assert "runs/universal-ct-longer/held_out are not published" in printed
    text = (REPOSITORY / "model_cards" / "universal-ct.md").read_text(encoding="utf-8")
    assert "Nobody can load those weights" in text


def test_a_model_without_records(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="nothing to run again"):
        next(reproduce(tmp_path / "model"))


def test_records_stay_with_weights_that_are_saved_again(
    measured: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = from_pretrained(measured())
    copy = tmp_path / "copy"
    for _ in range(2):  # a folder with records can be replaced
        model.save_pretrained(copy)
    (result,) = reproduce(copy, data)
    assert result.status == "reproduced"
    with_torch = next(iter(model.parameters()))
    with_torch.data += 1
    model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / RECORDS).exists()
    model.save_pretrained(tmp_path / "given", records=copy / RECORDS)
    assert (tmp_path / "given" / RECORDS).is_file()
