"""A result on disk: what its sidecar says, what it replaces, and what it never touches."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from foundation.errors import UsageError
from foundation.imaging import layout
from foundation.imaging.frame import Frame
from foundation.imaging.layout import ResultFiles
from foundation.imaging.legend import colours, display_name
from foundation.imaging.probabilities import ProbabilityMap
from foundation.imaging.result import Segmentation
from foundation.imaging.sidecar import Sidecar, find_sidecar
from foundation.imaging.volumes import Volume, VolumeWarning, read_ct
from foundation.taxonomy import CLASSES, NAMES

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])
CLASSES_OF_MODEL = ("liver", "portal_vein_and_splenic_vein", "portal vein")


def a_result(size: int = 4, ct: Volume | None = None) -> Segmentation:
    """A cube of liver; the other two classes are empty."""
    hu = np.full((12, 11, 10), -1000, np.float32)
    hu[2:10, 2:9, 2:8] = 40
    ct = ct or read_ct((hu, AFFINE))
    return Segmentation(
        volume=ct,
        frame=Frame.of(ct, ct.spacing_mm),
        maps={"liver": ProbabilityMap(np.full((size,) * 3, 255, np.uint8), (3, 3, 3))},
        classes=CLASSES_OF_MODEL,
        label_values={name: value for value, name in enumerate(CLASSES_OF_MODEL, 1)},
        parents=dict.fromkeys(CLASSES_OF_MODEL),
        model_name="tiny",
        model_sha256="0123",
        options={"overlap": 0.5},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- legend ---------------------------------------------------------------------------------------


def test_a_class_is_looked_up_by_its_exact_name() -> None:
    assert display_name("portal_vein_and_splenic_vein") == "Portal vein and splenic vein"
    assert display_name("portal vein") == "Portal vein"
    aliases = {"portal vein": "portal_vein_and_splenic_vein", "gall bladder": "gallbladder"}
    for alias, known in aliases.items():
        assert colours([alias])[alias] != colours([known])[known]


def test_no_two_classes_of_a_model_look_alike() -> None:
    own = [f"structure {number}" for number in range(300)]
    chosen = colours([*NAMES, *own])
    assert list(chosen) == [*NAMES, *own]
    assert len({chosen[name] for name in own} | {c.colour for c in CLASSES}) == 300 + len(
        {c.colour for c in CLASSES}
    )
    assert [chosen[c.name] for c in CLASSES] == [c.colour for c in CLASSES]
    assert colours([*NAMES, *own[:5]])["structure 3"] == chosen["structure 3"], "others may follow"


# --- sidecar --------------------------------------------------------------------------------------


def test_the_sidecar_has_what_was_done_and_found(tmp_path: Path) -> None:
    result = a_result()
    files = result.save(tmp_path / "out", seconds=1.5)
    assert [file.name for file in files] == [
        *("segmentation.nii.gz", "volumes.csv", "segmentation.json")
    ]
    text = json.loads(files[-1].read_text())
    assert (text["format"], text["format_version"]) == ("universal-ct segmentation", 1)
    found = Sidecar.read(files[-1])
    assert (found.model, found.model_sha256, found.seconds) == ("tiny", "0123", 1.5)
    assert found.options == {
        **{"threshold": 0.5, "layout": "multilabel", "preview": False, "overlap": 0.5}
    }
    assert found.files == ("segmentation.nii.gz", "volumes.csv")
    assert found.labels["1"].volume_ml == pytest.approx(64 * 0.064)
    old, new = found.labels["2"], found.labels["3"]
    assert (old.display, new.display) == ("Portal vein and splenic vein", "Portal vein")
    assert old.colour != new.colour
    assert found.peak_memory_mib is found.ct_sha256 is found.quality is None


def test_the_colour_of_a_class_does_not_depend_on_what_was_asked_for(tmp_path: Path) -> None:
    result = a_result()
    result.save(tmp_path / "all")
    replace(result, classes=("portal vein",), _packed={}).save(tmp_path / "one")
    every, one = (Sidecar.read(tmp_path / n / "segmentation.json") for n in ("all", "one"))
    assert every.labels["3"].colour == one.labels["3"].colour


@pytest.mark.parametrize(
    "change",
    [
        {"format": "something else"},
        {"format_version": 2},
        {"labels": {"1": "liver"}},
        {"model": 5},
        {"modle": "tiny"},
    ],
)
def test_a_sidecar_is_read_strictly(change: dict[str, object], tmp_path: Path) -> None:
    path = a_result().save(tmp_path / "out")[-1]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=r"segmentation\.json"):
        Sidecar.read(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"1": "liver"}', '{"format_version": 1}'])
def test_what_is_no_sidecar_of_ours_is_known(content: str, tmp_path: Path) -> None:
    path = tmp_path / "segmentation.json"
    assert find_sidecar(path) is None
    path.write_text(content)
    assert find_sidecar(path) is None


def test_doubts_about_the_ct_are_part_of_the_result(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(0, 1500, (12, 11, 10)).astype(np.float32)
    with pytest.warns(VolumeWarning, match="never negative"):
        ct = read_ct((hu, AFFINE))
    result = a_result(ct=ct)
    (doubt,) = result.warnings
    assert "an MR, or a CT stored without its intercept" in doubt
    files = result.save(tmp_path / "out")
    assert Sidecar.read(files[-1]).warnings == (doubt,)
    rows = (tmp_path / "out" / "volumes.csv").read_text().splitlines()
    assert rows[0].startswith("class,volume_ml,truncated,") and rows[0].endswith(",warnings")
    assert all(doubt in row for row in rows[1:])


def test_a_picture_that_cannot_be_drawn_costs_no_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such letter")

    monkeypatch.setattr("foundation.imaging.preview.save_preview", broken)
    with pytest.warns(VolumeWarning, match="preview could not be drawn"):
        files = a_result().save(tmp_path / "out", preview=True)
    assert "no such letter" in Sidecar.read(files[-1]).warnings[0]
    assert "preview.png" not in contents(tmp_path / "out")


# --- what is replaced, and what is not ------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("segmentation.nii.gz", "segmentation.json", "volumes.csv", "preview.png"),
        *("segmentations/liver.nii.gz", "segmentations", "hidden.npz"),
    ],
)
def test_files_of_others_are_never_replaced(name: str, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"drawn by hand")
    with pytest.raises(UsageError, match="is not universal-ct's"):
        a_result().save(tmp_path / "out", layout="both", preview=True)
    assert contents(tmp_path / "out") == {name: b"drawn by hand"}


def test_a_result_is_the_files_that_the_readme_names(tmp_path: Path) -> None:
    a_result().save(tmp_path / "out")
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (comment,) = re.findall(r'result\.save\("out"\)  # (.*)', text)
    named = [word for word in re.split(r"[ ,]+", comment) if re.search(r"\w\.\w", word)]
    assert sorted(contents(tmp_path / "out")) == sorted(named)


def test_a_file_of_others_beside_an_earlier_result_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    a_result().save(out)
    (out / "segmentations").mkdir()
    (out / "segmentations" / "liver.nii.gz").write_bytes(b"drawn by hand")
    before = contents(out)
    with pytest.raises(UsageError, match=r"liver\.nii\.gz was there before"):
        a_result(2).save(out, layout="per_class")
    assert contents(out) == before


def test_an_earlier_result_goes_whole_and_what_lies_beside_it_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    a_result().save(out, layout="both", preview=True)
    (out / "labels.json").write_text('{"1": "liver"}')
    (out / "ct.nii.gz").write_bytes(b"a CT")
    a_result(2).save(out)
    assert set(contents(out)) == {
        *("segmentation.nii.gz", "segmentation.json", "volumes.csv", "labels.json", "ct.nii.gz")
    }
    assert (out / "labels.json").read_text() == '{"1": "liver"}'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "seg.nii.gz"])
@pytest.mark.parametrize("stop", range(1, 7))
def test_a_kill_while_files_are_renamed_is_mended_by_the_next_run(
    stop: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    base = tmp_path / name
    a_result().save(base, layout="both", preview=True)
    before = contents(tmp_path)
    rename, count = os.replace, 0

    def killed(source: str | Path, target: str | Path) -> None:
        nonlocal count
        if not Path(source).name.startswith("."):  # not a file that is written in the hidden folder
            count += 1
            if count == stop:
                raise Killed
        rename(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(layout.os, "replace", killed)
        with pytest.raises(Killed):
            a_result(2).save(base, layout="per_class")
    places = ResultFiles.of(base)
    if stop == 1:
        assert contents(tmp_path) == before and places.done
    else:
        assert not places.done, "neither result is whole"
    places.refuse_foreign()  # it does not: what is left is ours
    files = a_result(2).save(base, layout="per_class")
    assert {path.resolve() for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    assert places.done


def test_a_sidecar_cannot_make_us_remove_what_lies_outside(tmp_path: Path) -> None:
    outside = tmp_path / "thesis.tex"
    outside.write_text("years of work")
    path = a_result().save(tmp_path / "out")[-1]
    content = json.loads(path.read_text())
    content["files"] += ["../thesis.tex", str(outside)]
    path.write_text(json.dumps(content))
    a_result(2).save(tmp_path / "out", layout="per_class")
    assert outside.read_text() == "years of work"


def test_names_that_are_no_letters_are_written(tmp_path: Path) -> None:
    ct = replace(a_result().volume, path=Path(os.fsdecode(b"ct\xff.nii.gz")))
    files = a_result(ct=ct).save(tmp_path / "out", preview=True)
    assert Sidecar.read(files[-1]).ct == "ct?.nii.gz"
    assert Sidecar.read(files[-1]).warnings == ()
