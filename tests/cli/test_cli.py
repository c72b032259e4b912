"""The command line: exit codes, files, JSON, and what it does not import."""

import csv
import errno
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import adapted, tiny_model

from foundation import __version__
from foundation.cli.main import main
from foundation.hub import example as demo
from foundation.hub.adapter_files import save_adapter
from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel
from foundation.taxonomy import NAMES


def write_ct(path: Path, seed: int = 0) -> Path:
    """A block of noisy tissue in air, 6 mm."""
    rng = np.random.default_rng(seed)
    hu = np.full((30, 26, 28), -1000, np.int16)
    hu[5:25, 5:21, 3:25] = rng.normal(40, 30, (20, 16, 22)).round()
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu, np.diag([6.0, 6, 6, 1])), path)
    return path


# --- without torch ------------------------------------------------------------------------------

PROBE = """
import sys
from foundation import __version__
from foundation.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "monai", "matplotlib", "numpy", "scipy", "huggingface_hub"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, *args], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "args",
    [("--help",), ("--version",), ("segment", "--help"), ("models",), ("models", "--json"),
     ("info", "universal-ct"), ("classes",), ("classes", "--json")],
)  # fmt: skip
def test_light_verbs_answer_without_heavy_imports(args: tuple[str, ...]) -> None:
    start = time.monotonic()
    result = run(*args)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()
    # An import of torch alone takes seconds; the bound leaves room for a busy machine.
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("module", ["foundation", "foundation.cli"])
def test_the_package_is_the_command_line(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"universal-ct {__version__}\n")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_closed_pipe_is_no_error() -> None:
    command = f'"{sys.executable}" -m foundation.cli classes | head -n 1'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("index")
    assert result.stderr == ""


def test_a_terminal_without_the_letters_is_no_error() -> None:
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "foundation", "info", "universal-ct-unet"]
    result = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "96?" in result.stdout  # of 96³


def test_info_describes_published_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "universal-ct-unet"]) == 0
    said = capsys.readouterr().out
    for fact in ("cc-by-nc-nd-4.0", ", ".join(NAMES), "1.5 mm isotropic", "CC BY-NC-ND 4.0"):
        assert fact in said


def test_a_path_like_an_option_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-x.nii.gz").touch()
    assert main(["segment", "-x.nii.gz", "-o", "out"]) == 2
    assert "Write it as ./-x.nii.gz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "required: VERB"),
        (("segmnt",), "invalid choice: 'segmnt'"),
        (("segment", "ct.nii.gz"), "required: -o/--output"),
        (("segment", "-o", "out"), "required: CT"),
        (("segment", "a.nii", "-o", "b", "--overwrite", "--skip-existing"), "not allowed with"),
        (("segment", "a.nii", "-o", "b", "--format", "dicom"), "invalid choice: 'dicom'"),
        (("segment", "ct.nii.gz", "-o", "out", "-c", "livver"), "Did you mean 'liver'?"),
    ],
)
def test_wrong_usage_exits_with_2(args: tuple[str, ...], said: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "foundation.cli", *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_classes_as_json_are_the_32_in_channel_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classes", "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in classes] == list(NAMES)
    assert [each["index"] for each in classes] == list(range(32))
    assert {"display", "parent", "snomed", "aliases", "kind", "laterality"} <= set(classes[0])


def test_models_and_info_as_json(
    model_folder: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["models", "--json"]) == 0
    assert "universal-ct" in [each["name"] for each in json.loads(capsys.readouterr().out)]
    assert main(["info", model_folder, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["config"]["classes"][0]["name"] == "liver"
    assert info["card"]["universal_ct"]["backbone"] == "lite_unet"
    assert main(["info", model_folder]) == 0
    said = capsys.readouterr().out
    for fact in ("liver, spleen, liver_tumor", "apache-2.0", "-175 to 250 HU", "12 × 12 × 12 mm"):
        assert fact in said
    checkpoint = Path(model_folder) / "model.safetensors"
    assert main(["info", str(checkpoint)]) == 1
    assert "is a checkpoint; it has no card" in capsys.readouterr().err


def test_info_describes_adapters_and_folders_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    adapter = save_adapter(adapted(), tmp_path / "run" / "adapter")
    for given in (adapter, adapter.parent):
        assert main(["info", str(given)]) == 0
        said = capsys.readouterr().out
        assert "model:        spine" in said and "names:        L1, L2" in said
        assert "adapter of:   tiny" in said and "# spine" in said
    assert main(["info", str(adapter.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["base"] == "tiny"
    save_pretrained(tiny_model(), tmp_path / "other" / "model")
    assert main(["info", str(tmp_path / "other")]) == 0
    assert "liver, spleen, liver_tumor" in capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 2
    assert "is no saved model, adapter or run: it has no README.md" in capsys.readouterr().err


def test_an_unknown_model_is_one_line_and_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ct = write_ct(tmp_path / "ct.nii.gz")
    assert main(["segment", str(ct), "-o", str(tmp_path / "out"), "-m", "universal-cat"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: No model is called 'universal-cat'. Did you mean")
    assert said.err.count("\n") == 1 and said.out == ""


# --- segment ------------------------------------------------------------------------------------

Segment = Callable[..., int]
RUN_FILES = {"universal-ct.jsonl", "universal-ct.log"}


@pytest.fixture
def segment(model_folder: str) -> Segment:
    def command(*args: str | Path, device: str = "cpu") -> int:
        return main(["segment", *map(str, args), "-m", model_folder, "--device", device])

    return command


def test_one_ct_leaves_masks_names_volumes_and_picture(segment: Segment, tmp_path: Path) -> None:
    ct = write_ct(tmp_path / "anna.nii.gz")
    assert segment(ct, "-o", tmp_path / "out", "--preview", "-q") == 0
    folder = tmp_path / "out" / "anna"
    mask = nib.load(folder / "segmentation.nii.gz")
    assert mask.shape == (30, 26, 28)
    assert (mask.affine == np.diag([6.0, 6, 6, 1])).all()
    assert (folder / "preview.png").read_bytes().startswith(b"\x89PNG")
    labels = json.loads((folder / "segmentation.json").read_text())
    assert [each["name"] for each in labels["labels"].values()] == [
        "liver",
        "spleen",
        "liver_tumor",
    ]
    with (folder / "volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["liver", "spleen", "liver_tumor"]
    for row, label in zip(rows, labels["labels"].values(), strict=True):
        assert float(row["volume_ml"]) == pytest.approx(label["volume_ml"], abs=1e-3)


def test_quiet_says_nothing_and_json_is_all_of_stdout(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ct = write_ct(tmp_path / "ct.nii.gz")
    assert segment(ct, "-o", tmp_path / "out.nii.gz", "-q", "--json", "-c", "Liver") == 0
    said = capsys.readouterr()
    assert said.err == ""
    (result,) = json.loads(said.out)["results"]
    assert result["status"] == "done" and list(result["volumes_ml"]) == ["liver"]
    assert result["case"] == tmp_path.name  # of ID/ct.nii.gz
    assert all(Path(file).is_file() for file in result["files"])
    assert {Path(file).name for file in result["files"]} >= {"out.nii.gz", "out.volumes.csv"}


def test_a_dataset_folder_with_one_broken_ct(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("s1", "s3"):
        write_ct(tmp_path / "data" / name / "ct.nii.gz")
    broken = tmp_path / "data" / "s2" / "ct.nii.gz"
    broken.parent.mkdir()
    broken.write_bytes((tmp_path / "data" / "s1" / "ct.nii.gz").read_bytes()[:300])
    missing = tmp_path / "gone.nii.gz"
    assert segment(tmp_path / "data", missing, "-o", tmp_path / "out", "--json") == 3
    said = capsys.readouterr()
    status = {each["case"]: each["status"] for each in json.loads(said.out)["results"]}
    assert status == {"s1": "done", "s2": "failed", "s3": "done", "gone": "failed"}
    assert "s2: error:" in said.err and "Traceback" not in said.err
    assert (tmp_path / "out" / "s3" / "segmentation.nii.gz").is_file()
    assert not (tmp_path / "out" / "s2").exists()


def test_earlier_results_are_kept_skipped_or_replaced(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ct, out = write_ct(tmp_path / "a.nii"), tmp_path / "out"
    assert segment(ct, "-o", out, "--per-class", "-q") == 0
    masks = sorted(path.name for path in (out / "a" / "segmentations").iterdir())
    assert masks == ["liver.nii.gz", "liver_tumor.nii.gz", "spleen.nii.gz"]
    before = (out / "a" / "segmentation.json").stat().st_mtime_ns
    assert segment(ct, "-o", out, "-q") == 2
    assert "--overwrite or --skip-existing" in capsys.readouterr().err
    assert segment(ct, "-o", out, "--skip-existing", "--per-class", "-q") == 0
    assert segment(ct, "-o", out, "--skip-existing", "-q") == 1, "another layout is another result"
    assert "made with layout 'per_class' instead of 'multilabel'" in capsys.readouterr().err
    assert (out / "a" / "segmentation.json").stat().st_mtime_ns == before
    assert segment(ct, "-o", out, "--overwrite", "--per-class", "-c", "spleen", "-q") == 0
    # A mask of the earlier run would contradict the new sidecar.
    masks = sorted(path.name for path in (out / "a" / "segmentations").iterdir())
    assert masks == ["spleen.nii.gz"]


def test_masks_of_others_are_never_touched(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset as the output folder: its own masks lie where ours would."""
    ct = write_ct(tmp_path / "data" / "s1" / "ct.nii.gz")
    truth = ct.parent / "segmentations" / "liver.nii.gz"
    truth.parent.mkdir()
    truth.write_bytes(b"drawn by hand")
    for option in ("--overwrite", "--skip-existing", "--preview"):
        assert segment(ct, "-o", tmp_path / "data", "--per-class", option) == 2
        assert "is not universal-ct's" in capsys.readouterr().err
    assert run_demo("universal-ct", ct.parent) == 2
    assert truth.read_bytes() == b"drawn by hand"
    assert {path.name for path in ct.parent.iterdir()} == {"ct.nii.gz", "segmentations"}


def test_masks_and_tables_of_others_are_no_result_of_ours(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CT with an expert's masks and a table of the same names as ours; no option is given."""
    folder = tmp_path / "data" / "p0"
    write_ct(folder / "ct.nii.gz")
    (folder / "segmentations").mkdir()
    for name in ("volumes.csv", "segmentation.nii.gz", "segmentations/liver.nii.gz"):
        (folder / name).write_bytes(b"the expert's")
    before = contents(folder)
    for options in ((), ("--overwrite",), ("--skip-existing",)):
        assert segment(tmp_path / "data", "-o", tmp_path / "data", *options) == 2
        assert "is not universal-ct's" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("option", [None, "--skip-existing", "--overwrite"])
def test_a_training_set_is_no_result_of_ours(
    option: str | None, segment: Segment, tmp_path: Path
) -> None:
    """labels.json is the training format's; it is neither a result nor replaced by one."""
    folder = tmp_path / "scans" / "s1"
    write_ct(folder / "ct.nii.gz")
    (folder / "labels.nii.gz").write_bytes(b"drawn by hand")
    (folder / "labels.json").write_text('{"1": "liver"}')
    before = contents(folder)
    options = [option] if option else []
    assert segment(tmp_path / "scans", "-o", tmp_path / "scans", "-q", *options) == 0
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"segmentation.nii.gz", "segmentation.json", "volumes.csv"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_full_disk_costs_no_earlier_result_and_ends_the_run(
    segment: Segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    cts = [write_ct(tmp_path / f"{name}.nii.gz") for name in "abc"]
    assert segment(*cts, "-o", out, "-q", "--preview", "--format", "both") == 0
    before = contents(out / "a") | contents(out / "b")
    written: list[object] = []

    def full_disk(path: Path, *_: object) -> None:
        written.append(path)
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("foundation.imaging.result.write_mask", full_disk)
        options = ("-o", out, "-q", "--overwrite", "--per-class", "--json")
        assert segment(*cts, *options) == 1
    now = contents(out / "a") | contents(out / "b")
    assert now == before, "nothing of an earlier result is lost, and nothing is left over"
    assert {path.name for path in out.iterdir()} == {"a", "b", "c", *RUN_FILES}
    assert len(written) == 1, "the other CTs are not computed in vain"
    said = capsys.readouterr()
    place = str(out / "a" / "segmentations" / "liver.nii.gz")
    assert "No space left on device" in said.err and place in said.err
    results = json.loads(said.out)["results"]
    assert [each["status"] for each in results] == ["failed"] * 3
    assert "not tried" in results[2]["error"]
    same = ("-q", "--skip-existing", "--preview", "--format", "both")
    assert segment(*cts, "-o", out, *same) == 0


def test_what_is_replaced_leaves_nothing_of_the_earlier_result(
    segment: Segment, tmp_path: Path
) -> None:
    ct, out = write_ct(tmp_path / "a.nii.gz"), tmp_path / "out"
    assert segment(ct, "-o", out, "-q", "--preview", "--format", "both") == 0
    assert segment(ct, "-o", out, "-q", "--overwrite", "--per-class", "-c", "spleen") == 0
    assert set(contents(out / "a")) == {
        "segmentation.json",
        "segmentations/spleen.nii.gz",
        "volumes.csv",
    }, "a mask or a picture of the earlier run would contradict the new sidecar"


def test_wrong_requests_stop_before_any_work(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ct, out = write_ct(tmp_path / "a.nii.gz"), tmp_path / "out"
    assert segment(ct, "-o", out, "-c", "spleeen") == 2
    assert "Did you mean 'spleen'?" in capsys.readouterr().err
    assert segment(ct, "-o", out, "-c", "aorta") == 2  # a class, but not of this model
    assert segment(ct, "-o", out, "--overlap", "1.5") == 2
    assert segment(ct, "-o", out, "--format", "both", device="tpu") == 2
    assert "auto, cpu, cuda" in capsys.readouterr().err
    assert segment(ct, "-o", ct, "--overwrite") == 2
    assert "is the CT itself" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert segment(tmp_path / "empty", "-o", out) == 2
    assert "holds no CT" in capsys.readouterr().err
    assert not out.exists()


def test_ctrl_c_is_130(
    segment: Segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foundation.inference.folder.segment_case", interrupted)
    assert segment(write_ct(tmp_path / "a.nii.gz"), "-o", tmp_path / "out") == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_doubt_is_told_of_each_ct_and_is_part_of_every_record(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mr1", "mr2"):
        path = write_ct(tmp_path / "data" / f"{name}.nii.gz")
        image = nib.load(path)
        nib.save(nib.Nifti1Image(image.get_fdata() + 1200, image.affine), path)
    out = tmp_path / "out"
    for options in ((), ("-q", "--overwrite")):  # a doubt is no progress
        assert segment(tmp_path / "data", "-o", out, "--json", *options) == 0
        said = capsys.readouterr()
        assert said.err.count("warning: ") == 2 and "VolumeWarning" not in said.err
        results = json.loads(said.out)["results"]
        for result in results:
            assert "an MR, or a CT stored without its intercept" in result["warnings"][0]
    for result in results:
        folder = out / result["case"]
        assert (
            json.loads((folder / "segmentation.json").read_text())["warnings"]
            == (result["warnings"])
        )
        with (folder / "volumes.csv").open() as file:
            assert all(row["warnings"] == result["warnings"][0] for row in csv.DictReader(file))
    lines = [json.loads(line) for line in (out / "universal-ct.jsonl").read_text().splitlines()]
    noted = [each["warnings"] for each in lines if each["event"] == "finished"]
    told = [[each["warnings"][0].replace(each["ct"], "<ct>")] for each in results]
    assert noted == told * 2
    assert (out / "universal-ct.log").read_text().count("without its intercept") == 4
    skipped = ("-q", "--skip-existing", "--json")
    assert segment(tmp_path / "data", "-o", out, *skipped) == 0
    again = json.loads(capsys.readouterr().out)["results"]
    assert [each["warnings"] for each in again] == [each["warnings"] for each in results]


@pytest.mark.parametrize(("good", "broken", "code"), [(2, 0, 0), (1, 1, 3), (0, 2, 1)])
def test_the_exit_code_tells_some_from_none(
    good: int, broken: int, code: int, segment: Segment, tmp_path: Path
) -> None:
    for number in range(good + broken):
        path = write_ct(tmp_path / "data" / f"{number}.nii.gz")
        if number >= good:
            path.write_bytes(b"no CT")
    assert segment(tmp_path / "data", "-o", tmp_path / "out", "-q") == code


def test_no_run_notes_a_name_unless_asked_for(segment: Segment, tmp_path: Path) -> None:
    """Names of patients stand in file names and folder names, and so in messages."""
    data = tmp_path / "Hans_Castorp"
    write_ct(data / "Castorp_Hans_1907.nii.gz").write_bytes(b"no CT")
    write_ct(data / "Ziemssen.nii.gz")
    out = tmp_path / "out"
    assert segment(data, "-o", out, "-q") == 3
    told = [(out / name).read_text() for name in sorted(RUN_FILES)]
    events = [json.loads(line) for line in told[0].splitlines()]
    (failed,) = [each for each in events if each.get("status") == "failed"]
    content = (data / "Castorp_Hans_1907.nii.gz").read_bytes()
    assert failed["ct_sha256"] == hashlib.sha256(content).hexdigest()
    assert failed["peak_memory_mib"] > 50 and failed["seconds"] >= 0
    assert all("not a readable NIfTI file" in text for text in told)
    for text in told:
        assert not [word for word in ("Castorp", "Hans", "Ziemssen", str(tmp_path)) if word in text]
    assert segment(data, "-o", out, "-q", "--skip-existing", "--names") == 3
    for name in RUN_FILES:
        assert "Castorp_Hans_1907" in (out / name).read_text()


def test_a_manifest_beside_a_file_is_written_where_asked_for(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ct, out = write_ct(tmp_path / "data" / "a.nii.gz"), tmp_path / "out"
    assert segment(ct, "-o", out / "a.nii.gz", "-q", "--per-class") == 0
    assert {path.name for path in out.iterdir()} == {
        *("a_segmentations", "a.segmentation.json", "a.volumes.csv")
    }
    mine = tmp_path / "notes.jsonl"
    assert segment(ct, "-o", out / "b.nii.gz", "-q", "--manifest", mine) == 0
    assert mine.is_file() and mine.with_suffix(".log").is_file()
    before = ct.read_bytes()
    assert segment(ct, "-o", out / "c.nii.gz", "-q", "--manifest", ct) == 2
    assert "is no manifest of universal-ct" in capsys.readouterr().err
    assert ct.read_bytes() == before and not (out / "c.nii.gz").exists()


def test_parts_are_all_cases_once(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcde":
        write_ct(tmp_path / "data" / f"{name}.nii.gz")
    made = []
    for part in ("1/2", "2/2"):
        options = ("--part", part, "-q", "--json")
        assert segment(tmp_path / "data", "-o", tmp_path / "out", *options) == 0
        made.append([each["case"] for each in json.loads(capsys.readouterr().out)["results"]])
    assert made == [["a", "c", "e"], ["b", "d"]]
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2"):
        assert segment(tmp_path / "data", "-o", tmp_path / "new", f"--part={wrong}") == 2
        assert "Give which of how many" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_stops_between_windows_and_says_what_is_done(
    name: str,
    code: int,
    segment: Segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for case in "abcd":
        write_ct(tmp_path / "data" / f"{case}.nii.gz")
    (tmp_path / "data" / "a.nii.gz").write_bytes(b"no CT")
    tall = np.full((30, 26, 120), -1000, np.int16)  # of several windows
    tall[5:25, 5:21] = 40
    nib.save(nib.Nifti1Image(tall, np.diag([6.0, 6, 6, 1])), tmp_path / "data" / "c.nii.gz")
    forward, windows = UniversalModel.forward, 0
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def signalled(self: UniversalModel, *args: object, **more: object) -> object:
        nonlocal windows
        windows += 1
        if windows == 2:  # the first of the second good CT
            signal.raise_signal(getattr(signal, name))
        return forward(self, *args, **more)  # type: ignore[arg-type]

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(UniversalModel, "forward", signalled)
        assert segment(tmp_path / "data", "-o", out, "--json", "-q") == code
    assert windows == 2, "not one window more"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr()
    assert "Interrupted. What was finished is kept" in said.err
    told = json.loads(said.out)
    assert [each["status"] for each in told["results"]] == ["failed", "done"]
    assert told["left"] == 2
    assert {path.name for path in out.iterdir()} == {"b", *RUN_FILES}, "nothing half-written"
    assert segment(tmp_path / "data", "-o", out, "--json", "-q", "--skip-existing") == 3
    results = json.loads(capsys.readouterr().out)["results"]
    assert [each["status"] for each in results] == ["failed", "skipped", "done", "done"]


def test_names_that_windows_forbids_become_others(segment: Segment, tmp_path: Path) -> None:
    for name in ("CON", "a:b", "dots..", "lpt1.x", "fine é", "what?"):
        write_ct(tmp_path / "data" / f"{name}.nii.gz")
    assert segment(tmp_path / "data", "-o", tmp_path / "out", "-q") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("_CON", "a_b", "dots__", "_lpt1.x", "fine é", "what_", *RUN_FILES)
    }


# --- demo ---------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    """Address of a local server with /right, /wrong, /large and /hang; and the right content."""
    content = write_ct(tmp_path / "served.nii.gz").read_bytes()
    stop = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            if self.path.startswith("/hang"):
                stop.wait(20)
                return
            self.wfile.write(content if self.path.startswith("/right") else bytes(2000))

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", content
    stop.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def example(
    server: tuple[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> demo.Example:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    address, content = server
    digest = hashlib.sha256(content).hexdigest()
    return demo.Example(f"{address}/right/ct.nii.gz", digest, "a test", 100_000, timeout_s=5)


def test_the_example_is_fetched_verified_and_cached(
    example: demo.Example, server: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.example_ct(example) == server[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # from now on only the cache can answer
    assert demo.example_ct(example) == server[1]
    (cached,) = demo.cache_folder().iterdir()
    cached.write_bytes(b"damaged")
    with pytest.raises(demo.ExampleUnavailableError, match="HF_HUB_OFFLINE"):
        demo.example_ct(example)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert demo.example_ct(example) == server[1]


@pytest.mark.parametrize(
    ("path", "limits", "said"),
    [
        ("/wrong/ct.nii.gz", {}, "another content"),
        ("/large/ct.nii.gz", {"limit_bytes": 1000}, "larger than"),
        ("/hang/ct.nii.gz", {"timeout_s": 0.5}, "cannot be had"),
    ],
)
def test_a_bad_answer_is_not_used(
    example: demo.Example,
    server: tuple[str, bytes],
    path: str,
    limits: dict[str, int | float],
    said: str,
) -> None:
    start = time.monotonic()
    with pytest.raises(demo.ExampleUnavailableError, match=said):
        demo.example_ct(replace(example, url=server[0] + path, **limits))  # type: ignore[arg-type]
    assert time.monotonic() - start < 5
    assert not demo.cache_folder().exists()


def test_a_refused_connection_is_explained(example: demo.Example) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as unused:
        port = unused.server_port
    with pytest.raises(demo.ExampleUnavailableError, match=r"cannot be had: .*refused"):
        demo.example_ct(replace(example, url=f"http://127.0.0.1:{port}/ct.nii.gz"))


def run_demo(model_folder: str, out: Path, *args: str) -> int:
    return main(["demo", "-m", model_folder, "--device", "cpu", "-o", str(out), *args])


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_demo_on_the_real_ct(
    model_folder: str,
    example: demo.Example,
    server: tuple[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "EXAMPLE", example)
    out = tmp_path / "out"
    assert run_demo(model_folder, out) == 0
    assert (out / "demo_ct.nii.gz").read_bytes() == server[1]
    names = {"demo_ct.nii.gz", "segmentation.nii.gz", "segmentation.json", "volumes.csv"}
    assert files_in(out) == {*names, "preview.png"}
    said = capsys.readouterr()
    assert "Segmenting a real CT: a test." in said.err
    assert said.out.startswith("class")
    assert "phantom" not in said.err


def test_demo_offline_is_an_honest_phantom(
    model_folder: str,
    example: demo.Example,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "EXAMPLE", example)
    monkeypatch.setattr("foundation.synthesis.phantom_scans.SPACING_MM", 10.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_demo(model_folder, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "generated phantom (seed 0)" in said and "HF_HUB_OFFLINE" in said
    assert "A phantom is no patient" in said
    hu = nib.load(tmp_path / "out" / "demo_ct.nii.gz").get_fdata()
    assert hu.min() < -900 and hu.max() > 200
    assert run_demo(model_folder, tmp_path / "other", "--phantom", "--seed", "1", "-q") == 0
    assert capsys.readouterr().err == ""
    assert "preview.png" in files_in(tmp_path / "other")


def test_demo_on_ones_own_ct(model_folder: str, tmp_path: Path) -> None:
    ct, out = write_ct(tmp_path / "mine.nii"), tmp_path / "out"
    own = write_ct(out / "ct.nii.gz", seed=1)
    before = own.read_bytes()
    assert run_demo(model_folder, out, "--ct", str(ct), "-q") == 0
    assert (out / "demo_ct.nii").read_bytes() == ct.read_bytes()
    assert own.read_bytes() == before, "a CT that lay there is not the demo's to replace"
    assert run_demo(model_folder, out, "--ct", str(tmp_path / "no.nii"), "-q") == 1
    assert run_demo(model_folder, ct, "--ct", str(ct), "-q") == 2
    assert run_demo(model_folder, tmp_path / "new.nii.gz", "--ct", str(ct), "-q") == 2
    assert not (tmp_path / "new.nii.gz").exists()
