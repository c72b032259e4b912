"""What results say: figures with intervals, and comparisons of two arms in words."""

from __future__ import annotations

from collections.abc import Sequence

from foundation.evaluation import Difference, Figure, Scores

FEWEST_DICE = 0.5  # below it, the better arm has learnt too little to judge by


def figures_of(
    scores: Scores, classes: Sequence[str] | None = None, metric: str = "dice"
) -> list[Figure]:
    """Turn scores into figures: the mean over classes and each class, with intervals over scans.

    Args:
        scores: Of one run.
        classes: Those of the mean; all that were measured if not given.
        metric: "dice", "nsd", or another number of `Score`.
    """
    names = list(scores.classes if classes is None else classes)
    found = []
    for title, chosen in [("mean", names), *((name, [name]) for name in names)]:
        interval = scores.interval(chosen, metric) or (None, None)  # type: ignore[arg-type]
        value = scores.mean(chosen, metric)  # type: ignore[arg-type]
        scans = len(scores.by_case(chosen, metric))  # type: ignore[arg-type]
        unit = "mm" if metric.endswith("_mm") else ""
        found.append(Figure(f"{metric}/{title}", value, unit, *interval, n=scans))
    return found


def verdict_text(
    found: Difference, first: str, second: str, what: str = "Dice", dice: float | None = None
) -> str:
    """Word what a comparison of two arms says.

    Args:
        found: By the bootstrap.
        first, second: The arms in words.
        what: Was measured; more of it is better.
        dice: Of the better arm, where something else was measured.
    """
    if found.mean is None or found.first is None or found.second is None:
        return "No verdict: no scan was measured with both."
    measured = f"{first}: {what} {found.first:.3f}; {second}: {found.second:.3f}"
    if (max(found.first, found.second) if dice is None else dice) < FEWEST_DICE:
        low = f"both stay below Dice {FEWEST_DICE}, so the run was too small"
        return f"No verdict: {low} ({measured})."
    if found.interval is None:
        return f"No verdict: fewer than three scans ({measured})."
    low, high = found.interval
    over = f"{found.pairs} scans, {found.seeds} seed{'s' if found.seeds > 1 else ''}"
    size = f"difference {found.mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {over}"
    seen = ""
    if found.smallest is not None:
        seen = f"; smallest difference that it could have found: {found.smallest:.3f}"
    if found.clear:
        better, other = (first, second) if found.mean > 0 else (second, first)
        answer = f"{better} is better than {other}."
    else:
        answer = f"No difference was found between {first} and {second}."
    return f"{answer[:1].upper()}{answer[1:]} {measured} ({size}{seen})."
