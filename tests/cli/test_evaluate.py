"""`universal-ct evaluate`: results of ours, TotalSegmentator's, nnU-Net's and anyone's masks."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from anatomies import ball

from foundation.cli.main import main
from foundation.evaluation import evaluate_masks
from foundation.evaluation.metrics import dice, hausdorff_mm, surface_dice
from foundation.imaging.hidden import HiddenVoxels, write_hidden
from foundation.imaging.sidecar import Label, Sidecar

SHAPE, MM = (24, 20, 16), (1.5, 2.0, 2.5)
AFFINE = np.diag([-MM[0], -MM[1], MM[2], 1.0])
LIVER, SPLEEN = ball(SHAPE, (8, 10, 8), 5.5), ball(SHAPE, (18, 10, 8), 3.5)
TUMOUR = ball(SHAPE, (8, 10, 8), 2.0)
MOVED = np.roll(LIVER, 1, 0)


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, xml: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.astype(np.uint8), affine)
    if xml:
        image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
    nib.save(image, path)
    return path


def label_map(*masks: np.ndarray) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for value, mask in enumerate(masks, 1):
        labels[mask] = value
    return labels


def masks(folder: Path, **found: np.ndarray) -> Path:
    for name, mask in found.items():
        write(folder / f"{name}.nii.gz", mask)
    return folder


def extension(names: Mapping[int, str]) -> str:
    labels = "".join(
        f'<Label Key="{v}" Red="1"><![CDATA[{n}]]></Label>\n' for v, n in names.items()
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension> <VolumeInformation Index="0">'
        f"<LabelTable>{labels}</LabelTable></VolumeInformation></CaretExtension>\n       "
    )


def nnunet(folder: Path, labels: Mapping[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def as_json(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict:
    assert main(["evaluate", *map(str, args), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["evaluate", *map(str, args)]) == 2
    return capsys.readouterr().err


EXPECTED = dice(MOVED, LIVER)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Label maps of two cases with labels.json: the second shows no spleen."""
    folder = tmp_path / "truth"
    write(folder / "a.nii.gz", label_map(LIVER, SPLEEN))
    write(folder / "b.nii.gz", label_map(LIVER))
    (folder / "labels.json").write_text('{"0": "background", "1": "liver", "2": "spleen"}')
    return folder


def test_masks_of_totalsegmentator_against_label_maps(
    truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ts"
    masks(out / "a", liver=MOVED, spleen=SPLEEN, heart=SPLEEN)
    masks(out / "b" / "segmentations", liver=LIVER, spleen=SPLEEN)
    found = as_json(capsys, out, truth, "-o", tmp_path / "scores.csv")
    liver, spleen = found["classes"]["liver"], found["classes"]["spleen"]
    assert liver["dice"]["mean"] == pytest.approx((EXPECTED + 1) / 2)
    assert liver["scans"] == 2 and liver["dice"]["interval"] is None
    assert spleen["scans"] == 1 and spleen["dice"]["mean"] == 1.0
    assert (spleen["false_positive"], spleen["missed"]) == (1, 0)
    assert "heart" not in found["classes"], "the labels know nothing of it"
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [(row["case"], row["name"], row["status"]) for row in rows] == [
        ("a", "spleen", "present"),
        ("a", "liver", "present"),
        ("b", "spleen", "empty"),
        ("b", "liver", "present"),
    ]
    assert float(rows[1]["nsd"]) == pytest.approx(surface_dice(MOVED, LIVER, MM, 2.0))
    assert float(rows[1]["hd95_mm"]) == pytest.approx(hausdorff_mm(MOVED, LIVER, MM))
    assert float(rows[2]["predicted_ml"]) == pytest.approx(SPLEEN.sum() * 0.0075)
    assert rows[2]["dice"] == ""


def test_one_file_of_totalsegmentator_has_its_names_in_its_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xml = extension({1: "spleen", 5: "liver", 7: "vertebrae_L1"})
    labels = np.where(MOVED, 5, np.where(SPLEEN, 1, 0))
    ours = write(tmp_path / "ml.nii.gz", labels, xml=xml)
    theirs = masks(tmp_path / "s0000" / "segmentations", liver=LIVER, vertebrae_L1=TUMOUR)
    (theirs.parent / "ct.nii.gz").write_bytes(b"")  # a CT beside the masks is no mask
    found = as_json(capsys, ours, theirs.parent)
    assert found["classes"]["liver"]["dice"]["mean"] == pytest.approx(EXPECTED)
    assert found["classes"]["vertebrae_l1"]["missed"] == 1
    several = tmp_path / "many"
    write(several / "liver_1.nii.gz", labels, xml=xml)
    write(several / "liver_2.nii.gz", labels, xml=xml)
    same = as_json(capsys, several, several)
    assert same["mean"]["dice"]["mean"] == 1.0 and same["mean"]["scans"] == 2


def test_a_folder_of_nnunet_against_its_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"background": 0, "liver": 1, "liver tumour": 2, "ignore": 3}
    raw = nnunet(tmp_path / "raw", names)
    truth = label_map(LIVER, TUMOUR)
    truth[0, 0] = 3  # nobody knows what is there
    write(raw / "labelsTs" / "case_1.nii.gz", truth)
    write(raw / "labelsTs" / "case_2.nii.gz", truth)
    out = nnunet(tmp_path / "out", names)
    predicted = label_map(LIVER)
    predicted[0, 0] = 1
    write(out / "case_1.nii.gz", predicted)
    write(out / "case_3.nii.gz", predicted)
    assert main(["evaluate", str(out), str(raw / "labelsTs"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["without_prediction"], found["without_reference"]) == (["case_2"], ["case_3"])
    assert "1 references have no prediction: case_2" in captured.err
    assert found["classes"]["liver"]["dice"]["mean"] == 1.0, "with its tumour; unknown voxels out"
    tumour = found["classes"]["liver_tumor"]
    assert tumour["dice"]["mean"] == 0.0 and tumour["missed"] == 1
    assert tumour["hd95_mm"]["mean"] is None


def test_a_result_of_ours_is_read_by_its_sidecar(
    truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "a"
    write(out / "segmentation.nii.gz", label_map(LIVER, SPLEEN, TUMOUR))
    write(out / "segmentations" / "liver.nii.gz", MOVED)  # partly hidden in the label map
    labels = {
        "1": Label("liver", "Liver", (1, 2, 3), None, 1.0, False, 9, "segmentations/liver.nii.gz"),
        "2": Label("spleen", "Spleen", (1, 2, 4), None, 1.0, False, 0, None),
        "3": Label("liver_tumor", "Liver tumor", (1, 2, 5), "liver", 1.0, False, 0, None),
    }
    files = ("segmentation.nii.gz", "segmentations/liver.nii.gz")
    Sidecar("0.1.0", "ct.nii.gz", "m", files[0], labels, files).write(out / "segmentation.json")
    for path in (out, out.parent, out / "segmentation.nii.gz"):
        reference = truth if path == out.parent else truth / "a.nii.gz"
        found = as_json(capsys, path, reference)
        assert found["classes"]["liver"]["dice"]["mean"] == pytest.approx(
            dice(MOVED | TUMOUR, LIVER)
        )
        assert found["classes"]["spleen"]["dice"]["mean"] == 1.0


def test_voxels_that_a_label_map_hides_count(
    truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The label map has tumour on liver, and a class that is hidden wholly."""
    out = tmp_path / "out" / "a"
    write(out / "segmentation.nii.gz", label_map(LIVER & ~TUMOUR, SPLEEN, TUMOUR))
    labels = {
        "1": Label("liver", "Liver", (1, 2, 3), None, 1.0, False, 9, None),
        "2": Label("spleen", "Spleen", (1, 2, 4), None, 1.0, False, 0, None),
        "3": Label("liver_tumor", "Liver tumor", (1, 2, 5), "liver", 1.0, False, 0, None),
        "9": Label("aorta", "Aorta", (1, 2, 6), None, 1.0, False, 9, None),
    }
    hidden = {
        value: HiddenVoxels.of(mask, (0, 0, 0)) for value, mask in {1: TUMOUR, 9: LIVER}.items()
    }
    write_hidden(out / "hidden.npz", hidden)  # type: ignore[arg-type]
    files = ("segmentation.nii.gz", "hidden.npz")
    Sidecar("0.1.0", "ct.nii.gz", "m", files[0], labels, files, hidden=files[1]).write(
        out / "segmentation.json"
    )
    whole = masks(tmp_path / "gt", liver=LIVER, aorta=LIVER, spleen=SPLEEN)
    found = as_json(capsys, out, whole)["classes"]
    assert {name: each["dice"]["mean"] for name, each in found.items()} == {
        **{"liver": 1.0, "aorta": 1.0, "spleen": 1.0}
    }
    (out / "hidden.npz").write_bytes(b"damaged")
    assert main(["evaluate", str(out), str(whole)]) == 1
    assert "no hidden voxels that can be read" in capsys.readouterr().err


def test_pairs_and_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lobes = ("upper", "middle", "lower")
    thirds = np.array_split(np.flatnonzero(LIVER), 3)
    parts = {}
    for lobe, voxels in zip(lobes, thirds, strict=True):
        parts[f"lung_{lobe}_lobe_right"] = np.isin(np.arange(LIVER.size), voxels).reshape(SHAPE)
    theirs = masks(tmp_path / "gt", kidney=LIVER | SPLEEN, **parts)
    ours = masks(tmp_path / "a", kidney_left=LIVER, kidney_right=SPLEEN, lung_right=MOVED)
    found = as_json(capsys, ours, theirs)
    from_python = evaluate_masks(ours, theirs, classes=["Kidneys", "right lung"])
    assert {row.name: row.dice for row in from_python.rows} == {
        "kidney": 1.0,
        "lung_right": pytest.approx(EXPECTED),
    }
    assert {name: each["dice"]["mean"] for name, each in found["classes"].items()} == {
        "kidney": 1.0,
        "lung_right": pytest.approx(EXPECTED),
    }
    same = as_json(capsys, theirs, theirs)["classes"]
    assert len(same) == 5 and {each["dice"]["mean"] for each in same.values()} == {1.0}
    del parts["lung_middle_lobe_right"]
    some = as_json(capsys, ours, masks(tmp_path / "two", **parts))["classes"]
    assert "lung_right" not in some, "two lobes are no lung"
    assert {each["no_prediction"] for each in some.values()} == {1}
    back = as_json(capsys, theirs, ours)["classes"]
    assert back["kidney_left"]["no_prediction"] == 1, "a merged pair tells no side"


def test_classes_names_and_tolerances_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = write(tmp_path / "ours.nii.gz", label_map(MOVED, SPLEEN))
    theirs = write(tmp_path / "theirs.nii.gz", label_map(LIVER, SPLEEN))
    said = refused(capsys, ours, theirs)
    assert "Nothing names the values of" in said and "--names" in said
    for text in ("{1: Liver, 2: Milz}", "labels: {Liver: 1, Milz: 2}"):
        (tmp_path / "names.yaml").write_text(text)
        args = (ours, theirs, "--names", tmp_path / "names.yaml")
        assert [*as_json(capsys, *args)["classes"]] == ["liver", "milz"]
    assert [*as_json(capsys, *args, "-c", "MILZ")["classes"]] == ["milz"]
    (tmp_path / "mm.yaml").write_text("{Liver: 0.0, default: 5}")
    table = as_json(capsys, *args, "--tolerance", tmp_path / "mm.yaml")
    assert table["tolerance_mm"] == {"liver": 0.0, "default": 5.0}
    strict = table["classes"]["liver"]["nsd"]["mean"]
    assert strict == pytest.approx(surface_dice(MOVED, LIVER, MM, 0.0)) and strict < 1
    assert as_json(capsys, *args, "--tolerance", "5")["classes"]["liver"]["nsd"]["mean"] == 1.0
    off = as_json(capsys, *args, "--no-surface")["classes"]["liver"]
    assert off["nsd"]["mean"] is None and off["dice"]["mean"] == pytest.approx(EXPECTED)
    assert "No reference labels the class 'aorta'" in refused(capsys, *args, "-c", "aorta")
    assert "neither millimetres nor a YAML" in refused(capsys, *args, "--tolerance", "two")
    assert "-1" in refused(capsys, *args, "--tolerance=-1")


def test_another_grid_is_an_error_and_a_turned_file_is_not(
    truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    turned = AFFINE @ np.array([[-1, 0, 0, SHAPE[0] - 1], *np.eye(4)[1:]])
    write(out / "a" / "liver.nii.gz", MOVED[::-1], turned)
    shifted = AFFINE.copy()
    shifted[:3, 3] += 1.0
    write(out / "b" / "liver.nii.gz", LIVER, shifted)
    assert main(["evaluate", str(out), str(truth), "--json"]) == 1
    captured = capsys.readouterr()
    assert "b: error:" in captured.err and "Nothing is resampled" in captured.err
    found = json.loads(captured.out)
    assert found["classes"]["liver"]["dice"]["mean"] == pytest.approx(EXPECTED)
    assert [*found["failed"]] == ["b"]
    write(tmp_path / "small" / "liver.nii.gz", LIVER[:-1])
    assert main(["evaluate", str(tmp_path / "small"), str(truth / "a.nii.gz")]) == 1
    assert "shape 23×20×16, not 24×20×16" in capsys.readouterr().err


def test_the_table_has_intervals_from_three_scans_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, shift in enumerate((0, 1, 2)):
        masks(tmp_path / "ours" / f"c{number}", liver=np.roll(LIVER, shift, 0))
        masks(tmp_path / "theirs" / f"c{number}", liver=LIVER, spleen=SPLEEN)
    assert main(["evaluate", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split()[:4] == ["class", "scans", "Dice", "NSD"]
    liver, mean = (line.split() for line in lines[1:3])
    assert "No prediction of 1 classes that are labelled: spleen." in lines
    assert liver[:2] == ["liver", "3"] and liver[3].startswith("[")
    assert mean[:2] == ["all,", "mean"]
    assert "[3/3] c2: 2 classes" in captured.err


def test_what_cannot_be_compared_is_refused(
    truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(capsys, tmp_path / "nothing", truth)
    (tmp_path / "empty").mkdir()
    assert "holds no masks" in refused(capsys, tmp_path / "empty", truth)
    other = tmp_path / "other"
    masks(other / "x", liver=LIVER)
    masks(other / "y", liver=LIVER)
    assert "No case is in both" in refused(capsys, other, truth)
    scores = tmp_path / "scores.csv"
    scores.write_text("mine")
    assert "is there already" in refused(capsys, truth, truth, "-o", scores)
    assert scores.read_text() == "mine"
    assert main(["evaluate", str(truth), str(truth), "-o", str(scores), "--overwrite", "-q"]) == 0
    assert scores.read_text().startswith("case,name,dice")
    assert "name it .json or .csv" in refused(capsys, truth, truth, "-o", tmp_path / "x.txt")
    write(truth / "a.nii.gz", label_map(LIVER, SPLEEN, TUMOUR))
    assert main(["evaluate", str(truth), str(truth)]) == 1
    assert "has label 3, which nothing names" in capsys.readouterr().err
