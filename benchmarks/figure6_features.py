"""Figure 6: do text embeddings order the decoder's features by class? t-SNE, and two scores.

    python benchmarks/figure6_features.py --smoke
    python benchmarks/figure6_features.py --mini
    python benchmarks/figure6_features.py 01=BTCV 04=LiTS 05=KiTS … -o OUT        # real data
    … --store STORE --trained OUT14     # take the trainings of table14_embeddings.py instead

Protocol
- Arms: one-hot vectors against text, which is CLIP in the real size, as in the paper, MiniLM in the
  others, or --text. Trainings, data and scans to measure on are those of table14_embeddings.py.
- Features of the decoder; of which layer the paper's are is not known (U). "full": those of full
  resolution as the head reads them, after its normalisation. "projected": the 8 channels into which
  the head projects them, to which the generated layers of every class are applied. The text is
  used after both layers. It can change their features only through training.
- Voxels: in each scan, for each class that it shows, a patch around a random voxel, and up to 12
  voxels of the class in it; the same in all arms and seeds. A voxel of several classes counts for
  the one that is smallest in the scan, e.g. the tumour and not its organ.
- Scores, in the features' own space, each channel standardised. kNN: the share of voxels whose
  class is that of most of their 10 nearest neighbours in other scans. Silhouette: how much nearer
  a voxel is to its own class than to the next one, -1 to 1. Both are means over voxels, then scans,
  then classes, with a bootstrap over scans; arms are compared over seeds and scans.
- The picture is t-SNE of "full" with the first seed (perplexity 30). Its distances are no measure.
- No verdict where the better arm's Dice stays below 0.5 (in the generated sizes, of large organs).
- Paper: it shows a picture; no number of it is known (U).

Hardware. As table14_embeddings.py; with --trained, a GPU for minutes. Mini: two CPU cores; the
trainings are shared with table14_embeddings.py.
"""

from __future__ import annotations

import zlib
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import ENCODERS, ONE_HOT, add_arguments, at_hand
from lab import Lab, run_script
from numpy.typing import NDArray
from plots import by_seed, scatter
from runs import LARGE, Arm, Run
from sizes import plans
from torch import Tensor

from foundation import (
    CLASSES,
    UniversalModel,
    UsageError,
    choose_device,
    from_pretrained,
    get_dataset,
    import_extra,
    replacing,
)
from foundation.data import Store, StoredCase
from foundation.evaluation import Figure, bootstrap, path_sha256

SPACES = ("full", "projected")
NEIGHBOURS = 10
NEEDS = "The scores and pictures of features need"


@dataclass(frozen=True)
class Voxels:
    """Features of voxels whose class is known.

    Attributes:
        features: Of each of `SPACES`, (N, C).
        classes: Name of each voxel's class, (N,).
        scans: Key of each voxel's scan, (N,).
    """

    features: Mapping[str, NDArray[np.float32]]
    classes: NDArray[np.str_]
    scans: NDArray[np.str_]

    def write(self, path: Path) -> None:
        """Write as .npz."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, classes=self.classes, scans=self.scans, **self.features)

    @classmethod
    def read(cls, path: Path) -> Voxels:
        """Read what `write` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            features = {space: stored[space] for space in SPACES}
            return cls(features, stored["classes"], stored["scans"])


def add_options(parser: ArgumentParser) -> None:
    """Add the encoder that is compared, and trainings that exist."""
    add_arguments(parser)
    others = [name for name in ENCODERS if name != ONE_HOT]
    parser.add_argument("--text", choices=others, help="encoder that is compared with one-hot")
    text = "OUT of table14_embeddings.py, whose trainings are taken; trained here if not given"
    parser.add_argument("--trained", type=Path, metavar="DIR", help=text)


# --- models and scans -----------------------------------------------------------------------------


def existing(run: Run) -> Path | None:
    """Return the saved model of table 14's run of the same arm and seed; None without --trained.

    Raises:
        UsageError: There is none.
    """
    if run.lab.given.trained is None:
        return None
    if run.lab.generated:
        raise UsageError("Trainings of the generated sizes are shared anyway: leave --trained out.")
    folder = run.lab.given.trained / "runs" / run.folder.name / "training"
    if (folder / "model").is_dir():
        return Path(folder / "model")
    raise UsageError(
        f"{folder} holds no finished training of {run.arm['text']} with seed {run.seed}. Run "
        "table14_embeddings.py first, give its output folder, or leave --trained out."
    )


def test_cases(lab: Lab, spacing_mm: float) -> list[StoredCase]:
    """Return the scans to measure on, prepared; as many as the plan says, spread over all.

    Args:
        lab: The experiment.
        spacing_mm: Of the network.
    """
    tests = lab.data.tests(fold=lab.data.fold)
    if all(test.cases for test in tests):  # a fold of what is prepared anyway
        store = Store(lab.data.store())
        keys = [f"{get_dataset(t.dataset).id}/{case}" for t in tests for case in t.cases or ()]
    else:
        datasets = [(test.dataset, test.root) for test in tests]
        store = Store(lab.data.prepare(datasets, f"{lab.output.name}/test-store", spacing_mm))
        keys = store.keys()
    most = lab.plan.options["scans"]
    chosen = sorted({round(i) for i in np.linspace(0, len(keys) - 1, min(most, len(keys)))})
    return [store.case(sorted(keys)[i]) for i in chosen]


def class_map(case: StoredCase, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class of each voxel of a scan, as an index into `names`; -1 for none.

    A voxel of several classes is given to the one that is smallest in the scan.

    Args:
        case: A prepared scan.
        names: The classes.
    """
    labels = case.read_labels()
    member = case.membership(names)
    counts = np.bincount(labels.ravel(), minlength=len(member))
    size = np.where(member, counts @ member, np.iinfo(np.int64).max)
    smallest = np.where(member.any(axis=1), size.argmin(axis=1), -1)
    return smallest[labels]


def patches(
    wanted: NDArray[np.int64], size: Sequence[int], count: int, seed: int
) -> Iterator[tuple[int, list[int], NDArray[np.int64]]]:
    """Draw a patch for each class, and voxels of the class in it.

    Args:
        wanted: Class of each voxel (X, Y, Z), -1 for none.
        size: Of a patch; a scan that is smaller along an axis is padded at its end.
        count: Voxels of a class, at most.
        seed: Of the draws.

    Yields:
        The class, the first voxel of the patch, and flat indices of voxels in it, sorted.
    """
    rng = np.random.default_rng(seed)
    for kind in np.unique(wanted[wanted >= 0]):
        places = np.argwhere(wanted == kind)
        centre = places[rng.integers(len(places))]
        room = np.maximum(np.array(wanted.shape) - size, 0)
        start = np.clip(centre - np.array(size) // 2, 0, room)
        inside = places[((places >= start) & (places < start + size)).all(axis=1)] - start
        drawn = rng.choice(len(inside), min(count, len(inside)), replace=False)
        flat = np.ravel_multi_index(tuple(inside[np.sort(drawn)].T), tuple(size))
        yield int(kind), start.tolist(), np.asarray(flat)


@torch.inference_mode()
def collect(
    model: UniversalModel, cases: Sequence[StoredCase], count: int, device: torch.device
) -> Voxels:
    """Compute the features of voxels of known classes.

    Args:
        model: In evaluation mode.
        cases: Prepared scans, at the model's spacing.
        count: Voxels of a class in a scan, at most.
        device: To compute on.

    Raises:
        UsageError: A scan lies on another grid than the model reads.
    """
    model.to(device).eval()
    size = model.config.preprocessing.patch_size
    found: dict[str, list[Tensor]] = {space: [] for space in SPACES}
    classes: list[str] = []
    scans: list[str] = []
    for case in cases:
        wanted = class_map(case, model.classes)
        image = model.encoder.preprocess((case.read_ct(), np.array(case.affine)))
        if image.shape[1:] != wanted.shape:
            raise UsageError(
                f"{case.key} is prepared at {case.spacing_mm} mm; the model reads "
                f"{model.config.preprocessing.spacing_mm} mm. Give a store of that spacing."
            )
        seed = zlib.crc32(case.key.encode())
        for kind, start, voxels in patches(wanted, size, count, seed):
            stop = [first + length for first, length in zip(start, size, strict=True)]
            patch = image[(slice(None), *map(slice, start, stop))]
            lacking = [length - had for length, had in zip(size, patch.shape[1:], strict=True)]
            patch = torch.nn.functional.pad(patch, [p for n in lacking[::-1] for p in (0, n)])
            flat = torch.from_numpy(voxels)[None].to(device)
            _, full = model.logits_at(patch[None].to(device), flat)
            projected = model.head.feature_projection[2](full[..., None, None]).flatten(2)
            for space, features in zip(SPACES, (full, projected), strict=True):
                found[space].append(features[0].T.float().cpu())
            classes += [model.classes[kind]] * len(voxels)
            scans += [case.key] * len(voxels)
    features = {space: torch.cat(parts).numpy() for space, parts in found.items()}
    return Voxels(features, np.array(classes), np.array(scans))


# --- scores ---------------------------------------------------------------------------------------


def standardised(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Give each channel mean 0 and variance 1; a constant channel becomes 0."""
    centred = features - features.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    return np.asarray(centred / np.where(deviation > 0, deviation, 1))


def neighbours_agree(
    features: NDArray[np.float64], classes: NDArray[np.str_], scans: NDArray[np.str_]
) -> NDArray[np.float64]:
    """Whether the nearest neighbours in other scans have a voxel's class, 0 or 1, (N,).

    Args:
        features: (N, C).
        classes, scans: Of each voxel, (N,).
    """
    library = import_extra("sklearn.neighbors", "benchmarks", NEEDS)
    right = np.zeros(len(classes))
    for scan in np.unique(scans):
        here = scans == scan
        count = min(NEIGHBOURS, int((~here).sum()))
        judge = library.KNeighborsClassifier(count).fit(features[~here], classes[~here])
        right[here] = judge.predict(features[here]) == classes[here]
    return right


def by_scan(
    values: NDArray[np.float64], voxels: Voxels, names: Sequence[str]
) -> NDArray[np.float64]:
    """Return means of a value over the voxels of each scan and class, NaN where there is none.

    Args:
        values: Of each voxel, (N,).
        voxels: What they are.
        names: The K classes.

    Returns:
        (scans, K), by sorted keys of the scans.
    """
    table = np.full((len(np.unique(voxels.scans)), len(names)), np.nan)
    for row, scan in enumerate(np.unique(voxels.scans)):
        for column, name in enumerate(names):
            chosen = (voxels.scans == scan) & (voxels.classes == name)
            if chosen.any():
                table[row, column] = values[chosen].mean()
    return table


def scored(voxels: Voxels) -> dict[str, NDArray[np.float64]]:
    """Return kNN and silhouette in each space: name → (scans, classes).

    Only classes that two scans show are scored, since neighbours are sought in other scans.

    Raises:
        UsageError: There are fewer than two.
    """
    metrics = import_extra("sklearn.metrics", "benchmarks", NEEDS)
    shown = {
        str(name): len(np.unique(voxels.scans[voxels.classes == name]))
        for name in np.unique(voxels.classes)
    }
    names = [each.name for each in CLASSES if shown.get(each.name, 0) > 1]
    if len(names) < 2:
        raise UsageError(
            f"Two scans show {', '.join(names) or 'no class'}: give scans of two classes at least."
        )
    kept = np.isin(voxels.classes, names)
    voxels = Voxels(
        {space: rows[kept] for space, rows in voxels.features.items()},
        voxels.classes[kept],
        voxels.scans[kept],
    )
    found = {}
    for space in SPACES:
        features = standardised(voxels.features[space])
        values = {
            "kNN": neighbours_agree(features, voxels.classes, voxels.scans),
            "silhouette": metrics.silhouette_samples(features, voxels.classes),
        }
        for score, each in values.items():
            found[f"{score}/{space}"] = by_scan(each, voxels, names)
    return found


def measure(run: Run) -> Iterable[Figure]:
    """Train, or take what is trained; measure Dice and the features."""
    lab = run.lab
    path = existing(run)
    if path is None:
        model = run.pretrain({"model.text": ENCODERS[str(run.arm["text"])]}, fold=lab.data.fold)
    else:
        model = from_pretrained(path)
    scores = run.score(model, lab.data.tests(fold=lab.data.fold))
    yield from (f for f in run.figures(scores) if f.name in ("dice/mean", LARGE))
    cases = test_cases(lab, model.config.preprocessing.spacing_mm[0])
    device = choose_device("cpu" if run.cpu else "auto")
    voxels = collect(model, cases, lab.plan.options["voxels"], device)
    run.folder.mkdir(parents=True, exist_ok=True)
    voxels.write(run.folder / "features.npz")
    tables = scored(voxels)
    for name, table in tables.items():
        value = float(np.nanmean(np.nanmean(table, axis=0)))
        low, high = bootstrap(table) or (None, None)
        yield Figure(name, value, low=low, high=high, n=len(table))
    yield Figure("kNN/chance", 1 / tables["kNN/full"].shape[1])


def compare(lab: Lab, text: str) -> None:
    """Compare text with one-hot by both scores in both spaces."""
    arms: list[Arm] = [{"text": text}, {"text": ONE_HOT}]
    figure = LARGE if lab.generated else "dice/mean"
    dice = max(float(np.mean(by_seed(lab.records(), figure, arm) or [0.0])) for arm in arms)
    tables = [[scored(voxels_of(lab, arm, seed)) for seed in lab.seeds] for arm in arms]
    for name in tables[0][0]:
        a, b = (np.stack([each[name] for each in seeds]) for seeds in tables)
        score, space = name.split("/")
        question = f"{text} or one-hot: are classes clearer in the {space} features ({score})?"
        lab.compare(question, *arms, a, b, what=score, dice=dice)


def voxels_of(lab: Lab, arm: Arm, seed: int) -> Voxels:
    """Read the features that a run kept."""
    return Voxels.read(Run(lab, arm, seed).folder / "features.npz")


def draw(lab: Lab, names: Sequence[str]) -> Path:
    """Draw t-SNE of the full features with the first seed."""
    manifold = import_extra("sklearn.manifold", "benchmarks", NEEDS)
    panels: dict[str, Any] = {}
    for name in names:
        arm = {"text": name}
        voxels = voxels_of(lab, arm, lab.seeds[0])
        features = standardised(voxels.features["full"])
        perplexity = min(30.0, (len(features) - 1) / 3)
        places = manifold.TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(
            features
        )
        record = lab.record(arm, lab.seeds[0])
        said = (
            ", ".join(f"{s} {record.figure(f'{s}/full').value:.2f}" for s in ("kNN", "silhouette"))
            if record
            else ""
        )
        panels[f"{name}: {said}"] = (places, voxels.classes)
    colours = {each.name: "#" + bytes(each.colour).hex() for each in CLASSES}
    return scatter(lab.output / "tsne.png", panels, colours, "Decoder features, t-SNE")


def main() -> None:
    """Run both arms, compare them, draw the picture."""
    mini = {"text": "MiniLM", "scans": 12, "voxels": 12}
    real = {"text": "CLIP", "scans": 20, "voxels": 12}
    lab = Lab.parse(__doc__, plans(smoke={**mini, "voxels": 3}, mini=mini, real=real), add_options)
    names = at_hand(lab, [ONE_HOT, lab.given.text or lab.plan.options["text"]])
    for arm in lab.arms({"text": names}):
        for seed in lab.seeds:
            path = existing(Run(lab, arm, seed))
            weights = {} if path is None else {f"{arm['text']}-{seed}": path_sha256(path)}
            lab.measure(arm, measure, seeds=[seed], weights=weights)
    for name in names:
        if name != ONE_HOT and ONE_HOT in names:
            compare(lab, name)
    lab.finish([draw(lab, names)])


if __name__ == "__main__":
    run_script(main)
