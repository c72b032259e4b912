"""The datasets of the paper: each one's description says what the paper does."""

from pathlib import Path

import yaml

from foundation.data import paper_datasets
from foundation.data.hooks import EIGHT_ORGANS, HOOKS
from foundation.taxonomy import NAMES, PAIRED, by_name

DATASETS = paper_datasets()
# Dataset → the paper's numbers it annotates.
ANNOTATED = {
    "01": "1,2,3,4,5,6,7,8,9,10,11,12,13,14",
    "02": "1,3,4,5,6,7,11,14",
    "03": "6",
    "04": "6,27",
    "05": "2,3,26,32",
    "06": "1,2,3,4,6,7,11,16,17",
    "07": "1,2,3,4,5,6,7,11,12,13,14,18,19,20,21,23,24",
    "08": "1,2,3,6,11",
    "09": "1,2,3,4,5,6,7,8,9,11,12,13,14,21,22",
    "10_03": "6,27",
    "10_06": "30",
    "10_07": "11,28",
    "10_08": "15,29",
    "10_09": "1",
    "10_10": "31",
    "12": "2,3,6,16,17,21",
    "13": "1,2,3,4,5,6,7,8,9,11,12,13,25",
    "15_v2": "1,2,3,4,5,6,7,8,9,10,11,12,13,14,16,17,18,19,21,22,32",
}


def numbers(names) -> str:
    """Classes as the paper numbers them."""
    return ",".join(str(by_name(name).number) for name in names)


def test_datasets_annotate_what_the_paper_says():
    annotated = {key: numbers(dataset.annotated) for key, dataset in DATASETS.items()}
    annotated.pop("15")
    assert annotated == ANNOTATED
    assert numbers(EIGHT_ORGANS) == "1,3,4,5,6,7,11,14"  # of BTCV's cases 60 and above
    assert all(dataset.id == key for key, dataset in DATASETS.items())


def test_every_dataset_label_maps_to_classes():
    for dataset in DATASETS.values():
        mapped = {name for names in dataset.label_map.values() for name in names}
        assert mapped <= set(NAMES), dataset.name
        assert set(dataset.annotated) <= mapped, dataset.name
        for names in dataset.label_map.values():
            assert len(names) == 1 or names in PAIRED.values()


def test_source_label_orders():
    def label(key, value):
        return DATASETS[key].label_map[value]

    assert label("09", 10) == ("pancreas",)
    assert label("09", 15) == ("prostate",)
    assert label("07", 3) == ("kidney_left",)
    assert label("07", 15) == ("femur_head_left",)
    assert label("13", 12) == ("celiac_trunk",)
    assert label("12", 3) == ("lung_right", "lung_left")
    assert set(DATASETS["02"].label_map) == {1, 3, 4, 5, 6, 7, 11, 14}


def test_merged_pairs_are_marked_for_splitting():
    merged = {
        key: tuple(label for label, names in d.label_map.items() if names in PAIRED.values())
        for key, d in DATASETS.items()
    }
    found = {key: labels for key, labels in merged.items() if labels}
    assert found == {"05": (1,), "07": (12,), "08": (2,), "12": (3, 4), "13": (2,)}


def test_every_hook_is_named_by_a_description():
    folder = Path(__file__).parents[2] / "foundation/data/paper"
    named = {yaml.safe_load(path.read_text()).get("rule") for path in folder.glob("*.yaml")}
    assert named - {None} == set(HOOKS)
