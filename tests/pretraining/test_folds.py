"""Five-fold splits: even, the same for the same seed, and refused where they hold nothing."""

import json
import warnings
from pathlib import Path

import pytest

from foundation.errors import UsageError
from foundation.pretraining.folds import FOLDS, Folds, held_out_cases, make_folds, read_folds


def manifest(count: int, dataset: str = "03") -> dict[str, dict[str, object]]:
    return {f"{dataset}/case_{number}": {} for number in range(count)}


def sizes(folds: Folds, dataset: str) -> list[int]:
    return [sum(key.startswith(f"{dataset}/") for key in folds.cases(n)) for n in range(FOLDS)]


def test_every_case_is_in_one_fold() -> None:
    folds = make_folds(manifest(500), seed=1)
    parts = [folds.cases(fold) for fold in range(FOLDS)]
    assert set().union(*parts) == set(manifest(500))
    assert sum(map(len, parts)) == 500


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 4, 6, 23, 500])
def test_folds_of_each_dataset_differ_by_one_case_at_most(count: int, seed: int) -> None:
    folds = make_folds({**manifest(count), **manifest(7, "b"), **manifest(5, "c")}, seed)
    for dataset, cases in (("03", count), ("b", 7), ("c", 5)):
        found = sizes(folds, dataset)
        assert sum(found) == cases and max(found) - min(found) <= 1
        assert min(found) >= cases // FOLDS


def test_the_odd_cases_of_datasets_are_not_all_in_one_fold() -> None:
    cases = {f"{dataset}/only": {} for dataset in range(40)}
    assert max(len(make_folds(cases).cases(fold)) for fold in range(FOLDS)) < 20


def test_a_dataset_is_split_by_the_seed_and_its_own_cases_alone() -> None:
    alone, beside = (
        make_folds(manifest(40), 1),
        make_folds({**manifest(9, "04"), **manifest(40)}, 1),
    )
    assert all(beside.fold_of[key] == fold for key, fold in alone.fold_of.items())
    turned = dict(reversed(manifest(40).items()))
    assert make_folds(turned, 1) == alone
    assert make_folds(manifest(40), 2).fold_of != alone.fold_of


def test_scans_shared_by_two_datasets_are_in_one_fold() -> None:
    lits = {f"04/volume-{n}": {} for n in range(60)}
    msd = {f"10_03/liver_{n:03d}": {} for n in range(60)}
    fold_of = make_folds({**lits, **msd}).fold_of
    assert all(fold_of[f"04/volume-{n}"] == fold_of[f"10_03/liver_{n:03d}"] for n in range(60))
    assert len(set(fold_of.values())) == 5


def test_datasets_that_share_some_scans_are_even_all_the_same() -> None:
    lits = {f"04/volume-{n}": {} for n in range(31)}
    msd = {f"10_03/liver_{n:03d}": {} for n in range(20, 43)}
    folds = make_folds({**lits, **msd})
    for dataset in ("04", "10_03"):
        assert max(sizes(folds, dataset)) - min(sizes(folds, dataset)) <= 1


def test_test_cases_are_in_no_fold(tmp_path: Path) -> None:
    cases = manifest(20)
    cases["03/case_3"] = {"split": "test"}
    folds = make_folds(cases)
    assert "03/case_3" not in folds.fold_of and folds.test == {"03/case_3"}
    folds.write(tmp_path / "folds.json")
    again = read_folds(tmp_path / "folds.json")
    assert again == Folds(0, folds.fold_of, folds.test)
    assert json.loads((tmp_path / "folds.json").read_text())["datasets"]["03"]
    validated, held_out = held_out_cases(list(cases), folds, 0, ())
    assert validated == folds.cases(0) and held_out == validated | {"03/case_3"}
    assert held_out_cases(list(cases), folds, None, ()) == (frozenset(), {"03/case_3"})


def test_datasets_and_cases_can_be_held_out() -> None:
    keys = [*manifest(3), *manifest(2, "04")]
    validated, held_out = held_out_cases(keys, None, None, ("04", "03/case_1"))
    assert validated == held_out == {"04/case_0", "04/case_1", "03/case_1"}
    with pytest.raises(UsageError, match="Cannot hold out 09"):
        held_out_cases(keys, None, None, ("09",))


def test_a_file_that_holds_no_folds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folds.json").write_text('{"format_version": 9}')
    with pytest.raises(UsageError, match="cannot be read as a file of folds"):
        read_folds(tmp_path / "folds.json")


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1, "datasets": [], "test": []},
        {"seed": 1, "datasets": {"03": [[1]]}, "test": []},
        {"seed": 1, "datasets": {}},
        {"seed": 1, "datasets": {}, "test": [], "more": 1},
    ],
)
def test_a_damaged_file_of_folds_is_refused(values: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "folds.json").write_text(json.dumps({"format_version": 1, **values}))
    with pytest.raises(UsageError, match="cannot be read as a file of folds"):
        read_folds(tmp_path / "folds.json")


def test_a_fold_without_cases_is_refused() -> None:
    folds = make_folds(manifest(2))
    empty = next(fold for fold in range(FOLDS) if not folds.cases(fold))
    filled = sorted(set(folds.fold_of.values()))
    with pytest.raises(
        UsageError, match=f"Fold {empty} holds none of the store's 2 cases"
    ) as raised:
        held_out_cases([*manifest(2)], folds, empty, ())
    assert f"Folds with cases: {filled[0]}, {filled[1]}." in str(raised.value)
    with pytest.raises(UsageError, match="Fold 1 holds none"):
        held_out_cases([*manifest(3, "other")], make_folds(manifest(20)), 1, ("other",))


def test_a_fold_of_few_cases_is_warned_of() -> None:
    cases = {**manifest(10), **manifest(2, "small")}
    folds = make_folds(cases)
    lacking = next(n for n in range(FOLDS) if not sizes(folds, "small")[n])
    with pytest.warns(UserWarning, match=r"holds 2 of the store's 12 cases, none of small"):
        held_out_cases([*cases], folds, lacking, ())
    many = manifest(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held_out_cases([*many], make_folds(many), 3, ())
