"""Tables 2 to 5 run end to end on tiny trees in the real layouts, by their real commands."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from benchmark_scripts import script
from conftest import REPOSITORY
from dataset_trees import DATASETS, TREES, make_affine, make_ct, write_nifti
from real_layouts import records, run_real
from tiny import tiny_model

from foundation import UsageError, get_dataset, save_pretrained
from foundation.evaluation import (
    Figure,
    Finding,
    append_record,
    new_record,
    read_table,
    render_table,
)

SCRIPTS = ("lab", "world", "plots", "table2_msd", "table4_detection")
MSD = ("10_03", "10_06", "10_07", "10_08", "10_09", "10_10")


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> dict[str, ModuleType]:
    """The scripts, as they see each other when they are run."""
    return {name: script(name) for name in SCRIPTS}


# --- real commands --------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_3_on_btcv(tmp_path: Path) -> None:
    TREES["01"](tmp_path / "BTCV")
    run_real("table3_btcv.py", tmp_path / "out", f"01={tmp_path / 'BTCV'}")
    (record,) = records(tmp_path / "out")
    assert record.size == "real" and "store/manifest.json" in record.data
    assert record.figure("dice/mean").n == 2, "each scan is measured once"
    assert record.figure("dice/mean of 13").value is not None
    trained = {p.name for p in (tmp_path / "out" / "runs").glob("*/fold*")}
    assert len(trained) == 2, "a model for each fold that holds a scan"
    folds = json.loads((tmp_path / "out" / "folds.json").read_text())
    for name in trained:
        run = next((tmp_path / "out" / "runs").glob(f"*/{name}"))
        assert json.loads((run / "folds.json").read_text())["datasets"] == folds["datasets"]


def decathlon(folder: Path) -> list[str]:
    """Build the six tasks side by side, as they are unpacked; returns the arguments for them."""
    (folder / "MSD").mkdir()
    for task in MSD:
        TREES[task](folder / task)
        for unpacked in (folder / task).glob(f"Task{task[3:]}_*"):
            unpacked.rename(folder / "MSD" / unpacked.name)
    return [f"{task}={folder / 'MSD'}" for task in MSD]


@pytest.mark.slow
def test_one_or_six_on_the_decathlon(tmp_path: Path) -> None:
    run_real("one_or_six.py", tmp_path / "out", *decathlon(tmp_path))
    found = {str(record.arm["networks"]): record for record in records(tmp_path / "out")}
    assert len(found) == 3
    for record in found.values():
        assert record.figure("dice/spleen").n == 1, "fold 0 holds one scan of two tasks"
    trained = {p.name for p in (tmp_path / "out" / "runs").glob("six_as_many_steps_each-*/*")}
    assert trained == {"10_06", "10_09"}, "a network for each task that can be measured"


@pytest.mark.slow
def test_table_2_on_the_decathlon(tmp_path: Path) -> None:
    given = decathlon(tmp_path)
    run_real("table2_msd.py", tmp_path / "out", *given)
    (record,) = records(tmp_path / "out")
    for task in MSD:
        for name in get_dataset(task).annotated:
            assert record.figure(f"dice/{name}").n == 2, name


@pytest.mark.slow
def test_table_4_on_lits_and_msd_lung(tmp_path: Path) -> None:
    TREES["04"](tmp_path / "LiTS")
    TREES["10_06"](tmp_path / "MSD")
    given = [f"04={tmp_path / 'LiTS'}", f"10_06={tmp_path / 'MSD'}"]
    run_real("table4_detection.py", tmp_path / "out", *given)
    (record,) = records(tmp_path / "out")
    assert record.figure("sensitivity/lung_tumor").n == 1, "fold 0 holds one scan, lung_2"
    assert record.figure("specificity/lung_tumor").value is None, "nobody is without a tumour"


@pytest.mark.slow
def test_table_5_on_ircadb_and_totalsegmentator(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    TREES["06"](tmp_path / "IRCADb")
    TREES["15"](tmp_path / "TS")
    seen = tmp_path / "TS" / "s0011"
    seen.rename(seen.with_name("s0327"))
    meta = tmp_path / "TS" / "meta.csv"
    meta.write_text(meta.read_text().replace("s0011", "s0327"))
    model = str(REPOSITORY / "foundation" / "weights" / "universal-ct")
    tests = [f"06={tmp_path / 'IRCADb'}", f"15={tmp_path / 'TS'}"]
    run_real("table5_generalisation.py", tmp_path / "out", "-m", "universal-ct", "--test", *tests)
    found = {str(record.arm["test"]): record for record in records(tmp_path / "out")}
    assert found["06"].figure("scans").value == 2 and not found["06"].note
    assert found["15"].figure("scans").value == 1
    assert "s0327 (open-data/totalsegmentator_s0327)" in found["15"].note
    assert found["15"].weights and Path(model).is_dir()
    again = run_real("table5_generalisation.py", tmp_path / "no", "-m", "universal-ct", expect=2)
    assert "--test 06=DIR" in again or "--mini" in again


@pytest.mark.slow
def test_table_5_trains_first_where_no_model_is_given(tmp_path: Path) -> None:
    TREES["01"](tmp_path / "BTCV")
    TREES["10_06"](tmp_path / "MSD")
    TREES["07"](tmp_path / "WORD")
    data = [f"01={tmp_path / 'BTCV'}", f"10_06={tmp_path / 'MSD'}"]
    data += ["--test", f"07={tmp_path / 'WORD'}"]
    run_real("table5_generalisation.py", tmp_path / "out", *data)
    (record,) = records(tmp_path / "out")
    assert record.arm["test"] == "07" and record.figure("dice/liver").n == 2


# --- the submission -------------------------------------------------------------------------------


def test_a_submission_has_the_tasks_names_values_and_grids(
    benchmarks: dict[str, ModuleType], tmp_path: Path
) -> None:
    TREES["10_03"](tmp_path)
    task = tmp_path / "Task03_Liver"
    affine = make_affine(7, "LAS")
    write_nifti(task / "imagesTs" / "liver_141.nii.gz", make_ct(7), affine)
    index = json.loads((task / "dataset.json").read_text())
    index |= {"test": ["./imagesTs/liver_141.nii.gz"], "labels": {"0": "b", "1": "l", "2": "c"}}
    (task / "dataset.json").write_text(json.dumps(index))
    model = tiny_model()
    table2 = benchmarks["table2_msd"]
    options = {"postprocess": False, "progress": False}
    (path,) = table2.submit(model, DATASETS["10_03"], tmp_path, tmp_path / "sent", **options)
    assert path == tmp_path / "sent" / "Task03_Liver" / "liver_141.nii.gz"
    sent = nib.load(path)
    labels = np.asanyarray(sent.dataobj)
    assert sent.get_data_dtype() == np.uint8
    np.testing.assert_allclose(sent.affine, affine, atol=1e-5)
    found = model.segment(task / "imagesTs" / "liver_141.nii.gz", **options)
    tumour = found.mask("liver_tumor")
    np.testing.assert_array_equal(labels == 2, tumour)
    np.testing.assert_array_equal(labels == 1, found.mask("liver") & ~tumour)
    assert set(np.unique(labels)) >= {1} or tumour.any(), "the test would show nothing"
    before = path.stat().st_mtime_ns
    list(table2.submit(model, DATASETS["10_03"], tmp_path, tmp_path / "sent", **options))
    assert path.stat().st_mtime_ns == before, "what is there is left alone"


def test_a_task_with_other_labels_or_without_test_images_is_refused(
    benchmarks: dict[str, ModuleType], tmp_path: Path
) -> None:
    read_task = benchmarks["table2_msd"].read_task
    TREES["10_03"](tmp_path)
    path = tmp_path / "Task03_Liver" / "dataset.json"
    index = json.loads(path.read_text())
    with pytest.raises(UsageError, match="lists no test images"):
        read_task(DATASETS["10_03"], tmp_path)
    path.write_text(json.dumps({**index, "test": ["./imagesTs/liver_1.nii.gz"]}))
    with pytest.raises(UsageError, match=r"1 test images of .* are not there"):
        read_task(DATASETS["10_03"], tmp_path)
    path.write_text(json.dumps({**index, "labels": {"0": "b", "1": "cancer"}}))
    with pytest.raises(UsageError, match=r"has the labels \[1\]; MSD liver has 1, 2"):
        read_task(DATASETS["10_03"], tmp_path)


@pytest.mark.slow
def test_the_submission_is_written_by_the_command(tmp_path: Path) -> None:
    TREES["10_03"](tmp_path / "MSD")
    task = tmp_path / "MSD" / "Task03_Liver"
    write_nifti(task / "imagesTs" / "liver_141.nii.gz", make_ct(7), make_affine(7))
    index = json.loads((task / "dataset.json").read_text())
    (task / "dataset.json").write_text(
        json.dumps({**index, "test": ["./imagesTs/liver_141.nii.gz"]})
    )
    save_pretrained(tiny_model(), tmp_path / "model")
    given = [f"10_03={tmp_path / 'MSD'}", "--submit", str(tmp_path / "sent")]
    run_real("table2_msd.py", tmp_path / "out", *given, "-m", str(tmp_path / "model"))
    assert (tmp_path / "sent" / "Task03_Liver" / "liver_141.nii.gz").is_file()
    error = run_real("table2_msd.py", tmp_path / "out", *given, expect=1)
    assert "--submit needs -m MODEL" in error


# --- detection ------------------------------------------------------------------------------------


def finding(case: str, name: str, present: bool, found: bool, score: float = 0.0) -> Finding:
    return Finding(case, name, present, score, found, int(present), int(present and found), 0)


def test_a_mean_over_classes_weighs_classes_alike(benchmarks: dict[str, ModuleType]) -> None:
    rows = [finding(f"a{i}", "liver_tumor", True, i < 3) for i in range(4)]  # 3 of 4
    rows += [finding(f"b{i}", "lung_tumor", True, False) for i in range(2)]  # 0 of 2
    rows += [finding(f"c{i}", "lung_tumor", False, i == 0) for i in range(5)]  # 4 of 5 are quiet
    means = {f.name: f for f in benchmarks["table4_detection"].means_over_classes(rows)}
    assert means["sensitivity"].value == pytest.approx((3 / 4 + 0) / 2)
    assert means["specificity"].value == pytest.approx(4 / 5)
    assert (means["sensitivity"].n, means["specificity"].n) == (6, 5)


def test_equal_values_have_no_bootstrap_interval(benchmarks: dict[str, ModuleType]) -> None:
    rows = [finding(f"a{i}", "liver_tumor", True, True, 0.9) for i in range(6)]
    table4 = benchmarks["table4_detection"]
    (sensitivity, specificity) = table4.means_over_classes(rows)
    assert (sensitivity.value, sensitivity.low) == (1.0, None)
    assert specificity.value is None
    by_class = {f.name: f for f in table4.figures_of_class("liver_tumor", rows)}
    share = by_class["sensitivity/liver_tumor"]
    assert share.value == 1.0 and share.low is not None and 0.5 < share.low < 1, "by Wilson"
    assert by_class["lesion sensitivity/liver_tumor"].low is None


# --- bodies of another origin ---------------------------------------------------------------------


@pytest.fixture
def label_maps(tmp_path: Path) -> Path:
    """A folder of open-data with one label map: a liver before a spleen."""
    labels = np.zeros((60, 50, 40), np.uint8)
    labels[8:28, 10:40, 8:32] = 1
    labels[34:52, 12:30, 10:30] = 2
    folder = tmp_path / "open" / "totalsegmentator_s0327"
    write_nifti(folder / "labels.nii.gz", labels, np.diag([4.0, 4.0, 4.0, 1.0]))
    (folder / "labels.json").write_text(json.dumps({"1": "liver", "2": "spleen"}))
    return tmp_path / "open"


def test_label_maps_are_rendered_anew(
    benchmarks: dict[str, ModuleType], label_maps: Path, tmp_path: Path
) -> None:
    render = benchmarks["world"].render_external
    yaml, root = render(tmp_path / "one", label_maps, 12.0, count=2)
    dataset = get_dataset(yaml)
    cases = dataset.find(root)
    assert [case.id for case in cases] == ["totalsegmentator_s0327_00", "totalsegmentator_s0327_01"]
    scans = [dataset.read(case) for case in cases]
    for case, scan in zip(cases, scans, strict=True):
        assert scan.ct is not None and scan.ct.shape == (32, 32, 32)
        assert {"liver", "spleen"} <= set(case.annotated) and "255" in case.unknown
        liver = np.isin(scan.labels, [v for v, n in enumerate(scan.names) if n == ("1",)])
        if liver.any():
            assert -50 < scan.ct[liver].mean() < 250, "soft tissue where the labels say liver"
    assert not np.array_equal(scans[0].labels, scans[1].labels), "no view twice"
    again = render(tmp_path / "two", label_maps, 12.0, count=2)
    images = [sorted(Path(each).glob("*/*.nii.gz")) for each in (root, again[1])]
    for a, b in zip(*images, strict=True):
        np.testing.assert_array_equal(nib.load(a).dataobj, nib.load(b).dataobj)
    assert render(tmp_path / "one", label_maps, 12.0, count=2) == (yaml, root), "used again"
    with pytest.raises(UsageError, match="holds other scans"):
        render(tmp_path / "one", label_maps, 12.0, count=2, seed=2)


# --- beside the paper's numbers -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows"), [("table2_msd", 4), ("table2_msd_nsd", 1)])
def test_only_rows_of_the_paper_that_say_something_are_shown(
    name: str, rows: int, tmp_path: Path
) -> None:
    both = [
        f"{m}/{n}" for m in ("dice", "nsd") for task in MSD for n in get_dataset(task).annotated
    ]
    record = new_record(
        "table2_msd",
        "mini",
        arm={"method": "Universal"},
        seed=1,
        figures=[Figure(figure, 0.5) for figure in both],
        seconds=1.0,
    )
    append_record(tmp_path / "benchmarks" / "records" / "table2_msd.jsonl", record)
    shutil.copy(REPOSITORY / "benchmarks" / "paper.yaml", tmp_path / "benchmarks")
    table = read_table(REPOSITORY / "benchmarks" / "tables" / f"{name}.yaml")
    text = render_table(table, tmp_path)
    assert text.count("paper (E") == rows and text.count("measured here (mini)") == 1
    assert text.count("50.00") == 9, "nine classes in percent"
