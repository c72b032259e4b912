"""Intervals and differences of two arms, held against closed forms."""

import numpy as np
import pytest
from scipy import stats

from foundation.errors import UsageError
from foundation.evaluation.changes import paired_difference
from foundation.evaluation.intervals import bootstrap, bootstrap_ratio, paired_bootstrap, wilson
from foundation.evaluation.scores import Score, Scores

NAN = float("nan")


def test_wilson_is_that_of_scipy() -> None:
    for hits, trials in ((0, 7), (3, 7), (7, 7), (45, 50)):
        known = stats.binomtest(hits, trials).proportion_ci(0.95, "wilson")
        assert wilson(hits, trials) == pytest.approx((known.low, known.high), abs=1e-12)
    assert wilson(0, 0) is None


def test_a_difference_of_pairs_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    scans = rng.normal(0.7, 0.2, 80)  # scans differ far more than the arms do
    a, b = scans + rng.normal(0.02, 0.02, 80), scans
    found = paired_bootstrap(a, b)
    error = (a - b).std(ddof=1) / np.sqrt(80)
    assert found.mean == pytest.approx((a - b).mean()) and found.pairs == 80
    assert found.first == pytest.approx(a.mean()) and found.second == pytest.approx(b.mean())
    assert found.interval is not None and found.clear
    half = (found.interval[1] - found.interval[0]) / 2
    assert half == pytest.approx(1.96 * error, rel=0.1)
    # What 80 % of such runs find: two-sided 5 %, by t.
    needed = stats.t.ppf(0.975, 79) + stats.t.ppf(0.8, 79)
    assert found.smallest == pytest.approx(needed * error, rel=0.1)
    back = paired_bootstrap(b, a)
    assert back.mean is not None and back.mean == pytest.approx(-found.mean)
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_the_smallest_difference_is_found_in_four_of_five_runs() -> None:
    rng = np.random.default_rng(1)
    sigma, n = 0.05, 12
    smallest = (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * sigma / np.sqrt(n)
    runs = rng.normal(smallest, sigma, (4000, n))
    share = float((stats.ttest_1samp(runs, 0, axis=1).pvalue < 0.05).mean())
    assert share == pytest.approx(0.8, abs=0.04)
    for run in runs[:10]:  # each tells it by its own scatter
        told, known = (
            paired_bootstrap(run, np.zeros(n)).smallest,
            run.std(ddof=1) / sigma * smallest,
        )
        assert told == pytest.approx(known, rel=0.06)


def test_what_one_arm_lacks_is_left_out_of_both() -> None:
    found = paired_bootstrap([0.9, NAN, 0.7, 0.8], [0.8, 0.1, 0.6, NAN])
    assert (found.pairs, found.interval, found.smallest) == (2, None, None)
    assert (found.mean, found.first, found.second) == pytest.approx((0.1, 0.8, 0.7))
    assert not found.clear
    none = paired_bootstrap([NAN, NAN], [0.1, 0.2])
    assert (none.mean, none.pairs) == (None, 0)


def test_seeds_are_drawn_too() -> None:
    rng = np.random.default_rng(2)
    scans = rng.normal(0, 0.01, (1, 30, 1))
    trainings = np.array([-0.1, 0.0, 0.1, 0.2])[:, None, None]
    a, b = 0.5 + trainings + scans, np.full((4, 30, 1), 0.5)
    found, one = paired_bootstrap(a, b), paired_bootstrap(a.mean(axis=0), b.mean(axis=0))
    assert (found.seeds, one.seeds) == (4, 1)
    assert found.mean == pytest.approx(one.mean)
    assert one.clear and not found.clear, "another training may have given the other sign"
    assert found.smallest is not None and one.smallest is not None
    assert found.smallest > 10 * one.smallest


def test_three_seeds_that_differ_by_chance_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(5)
    clear = 0
    for _ in range(60):
        seeds, scans, rest = (rng.normal(0, 0.05, n) for n in ((3, 1, 1), (1, 24, 1), (3, 24, 1)))
        clear += paired_bootstrap(seeds + scans + rest, np.zeros((3, 24, 1))).clear
    assert clear <= 7, "5 % are meant; quantiles of the draws alone gave some 30 %"


def test_three_seeds_that_differ_clearly_are_told_apart() -> None:
    rng = np.random.default_rng(6)
    a = 0.1 + rng.normal(0, 0.01, (3, 1, 1)) + rng.normal(0, 0.05, (3, 24, 1))
    found = paired_bootstrap(a, np.zeros((3, 24, 1)))
    assert found.clear


def test_arms_of_other_scans_are_refused() -> None:
    with pytest.raises(UsageError, match="the same scans of both"):
        paired_bootstrap([0.1, 0.2, 0.3], [0.1, 0.2])
    with pytest.raises(UsageError, match="4 axes"):
        paired_bootstrap(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)))


def test_scores_are_paired_by_scan_and_class() -> None:
    def scores(shift: float, keys: str) -> Scores:
        rows = [
            Score(key, name, 0.1 * "abcde".index(key) + shift, hd95_mm=1 + shift)
            for key in keys
            for name in ("liver", "spleen")
        ]
        return Scores(tuple(rows), 2.0, 1.0)

    found = paired_difference(scores(0.05, "dcba"), scores(0.0, "abce"), ["liver", "spleen"])
    assert found.pairs == 3 and found.mean == pytest.approx(0.05)
    assert found.interval == pytest.approx((0.05, 0.05)), "all pairs differ by the same"
    far = paired_difference(scores(0.05, "abc"), scores(0.0, "abc"), ["liver"], "hd95_mm")
    assert far.mean == pytest.approx(0.05)


def test_a_share_of_lesions_is_drawn_by_patient() -> None:
    # One patient has most of the lesions: the share scatters as if there were few.
    wide = bootstrap_ratio([0, 1, 1, 40], [1, 1, 1, 80])
    narrow = bootstrap_ratio([10, 11, 11, 10], [20, 21, 21, 20])
    assert wide is not None and narrow is not None
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert bootstrap_ratio([1, 1], [1, 2]) is None
    assert bootstrap_ratio([1, 0, 1], [1, 1, 1]) == bootstrap([1, 0, 1])
