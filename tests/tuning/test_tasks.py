"""TotalSegmentator's tasks against its real label lists, splits by its table, nested subsets."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from tuning_trees import SPACING_MM, write_folders

from foundation.data.naming import NewClass
from foundation.errors import UsageError
from foundation.text import class_prompt, load_bank
from foundation.tuning.data import Split, TuningData, read_data
from foundation.tuning.task_scans import read_task
from foundation.tuning.tasks import (
    CHANGED_IN_V2,
    TASKS,
    fewshot_subsets,
    get_task,
    read_meta,
    write_subsets,
)

COUNTS = {"organs": 17, "vertebrae": 24, "cardiac": 18, "muscles": 21, "ribs": 24}


def test_tasks_have_the_published_sizes_and_share_no_class() -> None:
    assert {name: len(task.labels) for name, task in TASKS.items()} == COUNTS
    everything = [label for task in TASKS.values() for label in task.labels]
    assert len(everything) == len(set(everything)) == 104  # all of version 1
    assert TASKS["vertebrae"].labels[0] == "vertebrae_L5"
    assert TASKS["vertebrae"].labels[-1] == "vertebrae_C1"


def test_version_2_has_other_names() -> None:
    assert {name: len(task.in_version(2)) for name, task in TASKS.items()} == {
        **COUNTS,
        "cardiac": 12,
    }
    assert "heart" in TASKS["cardiac"].in_version(2)
    with pytest.raises(UsageError, match="versions 1 and 2, not 3"):
        TASKS["ribs"].in_version(3)  # type: ignore[arg-type]


def test_names_are_those_of_the_real_files(open_data: Path) -> None:
    first, second = (
        set(json.loads((open_data / folder / "labels.json").read_text()).values())
        for folder in ("totalsegmentator_example", "totalsegmentator_s0327")
    )
    everything = {label for task in TASKS.values() for label in task.labels}
    assert everything == first
    assert {label for task in TASKS.values() for label in task.in_version(2)} <= second
    assert {label for label in first if label not in second} == set(CHANGED_IN_V2)


def test_every_class_has_a_prompt_of_its_own_without_an_encoder() -> None:
    bank = load_bank()
    for version in (1, 2):
        names = [each.name for task in TASKS.values() for each in task.classes(version)]  # type: ignore[arg-type]
        assert len({bank.find(name) for name in names} - {None}) == len(names)
    assert class_prompt("vertebrae_L1") == "A computerized tomography of a vertebra L1"


def test_an_unknown_task() -> None:
    assert get_task("ribs") is TASKS["ribs"]
    with pytest.raises(UsageError, match="Choose one of organs, vertebrae, cardiac"):
        get_task("bones")


def test_listing_tasks_imports_no_torch() -> None:
    script = (
        "import sys, foundation.tuning.tasks\n"
        "print(sorted({'torch', 'monai', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# --- splits and subsets ---------------------------------------------------------------------------


def test_splits_come_from_the_table(tmp_path: Path) -> None:
    text = "image_id;age;split\ns3;50;train\ns1;60;train\ns2;40;val\ns4;70;test\n"
    (tmp_path / "meta.csv").write_text(text, encoding="utf-8")
    assert read_meta(tmp_path) == {"train": ["s1", "s3"], "val": ["s2"], "test": ["s4"]}
    (tmp_path / "meta.csv").write_text("image_id,split\ns1,other\n", encoding="utf-8")
    with pytest.raises(UsageError, match="s1 has the split 'other'"):
        read_meta(tmp_path)
    (tmp_path / "meta.csv").write_text("id\n", encoding="utf-8")
    with pytest.raises(UsageError, match="names no case"):
        read_meta(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_meta(tmp_path / "nowhere")


def test_subsets_are_nested_seeded_and_of_their_size(tmp_path: Path) -> None:
    ids = [f"s{n:04d}" for n in range(70)]
    subsets = fewshot_subsets(ids, seed=3)
    assert list(subsets) == [1, 5, 10, 20, 64]
    sizes = list(subsets)
    for small, large in pairwise(sizes):
        assert subsets[large][:small] == subsets[small]
    assert fewshot_subsets(ids[::-1], seed=3) == subsets  # whatever the order
    assert fewshot_subsets(ids, seed=4) != subsets
    more = fewshot_subsets([*ids, "s9999"], seed=3)
    assert set(more[64]) - set(subsets[64]) <= {"s9999"}
    path = write_subsets(tmp_path / "subsets.json", subsets, 3)
    content = json.loads(path.read_text())
    assert content["seed"] == 3
    assert {int(size): ids for size, ids in content["subsets"].items()} == subsets


def test_wrong_subsets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There are 3 scans, fewer than any of the sizes 5"):
        fewshot_subsets("abc", [5])
    with pytest.raises(UsageError, match="sizes from 1 on"):
        fewshot_subsets("abc", [0, 1])


def test_a_subset_chooses_what_is_trained_on(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 5, masks=True)
    splits = ["train", "train", "train", "val", "test"]
    rows = [f"case_{n},{split}" for n, split in enumerate(splits)]
    (root / "meta.csv").write_text("\n".join(["image_id,split", *rows]))
    subset = fewshot_subsets(read_meta(root)["train"], [1, 2])[2]
    data = read_data(
        root, classes=[NewClass("vertebrae_L1")], work=tmp_path / "work", spacing_mm=SPACING_MM,
        split=Split(train_ids=frozenset(subset)), workers=1, progress=False,
    )  # fmt: skip
    assert {case.key for case in data.train} == {f"masks/{id_}" for id_ in subset}
    assert [case.key for case in data.test] == ["masks/case_4"]


def test_scans_of_a_task_can_be_left_out_of_every_split(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "scans", 5, masks=True)
    names = ["train", "train", "train", "val", "test"]
    rows = [f"case_{number},{split}" for number, split in enumerate(names)]
    (root / "meta.csv").write_text("\n".join(["image_id,split", *rows]))

    def read(work: str, **options: object) -> TuningData:
        return read_task(
            root,
            ["liver", "hip_left"],
            work=tmp_path / work,
            spacing_mm=SPACING_MM,
            progress=False,
            **options,  # type: ignore[arg-type]
        )

    every = read("every")
    assert [len(each) for each in (every.train, every.validation, every.test)] == [3, 1, 1]
    fewer = read("fewer", without=["case_0"], shots=1)
    assert len(fewer.train) == 1 and fewer.train[0].key != "masks/case_0"
    subsets = json.loads((tmp_path / "fewer" / "subsets.json").read_text())["subsets"]
    assert "case_0" not in subsets["1"]
    with pytest.raises(UsageError, match="no scan for test"):
        read("none", without=["case_4"])
    with pytest.raises(UsageError, match=r"shots is 3; .* has 2 training scans"):
        read("many", without=["case_0"], shots=3)
