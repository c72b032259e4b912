"""Figure 1: are embeddings of one anatomical group closer than others? Cosines, raw and centred.

    python benchmarks/figure1_similarity.py --smoke
    python benchmarks/figure1_similarity.py --mini
    python benchmarks/figure1_similarity.py                          # every encoder, or an error
    … --embeddings CLIP-published=txt_encoding.pth                   # or a model's file or folder

Protocol
- No scan is read and nothing is trained. Mini: the encoders whose weights can be had here; real:
  all, or those that are left with --skip-missing.
- Embeddings: one-hot, MiniLM, CLIP ViT-B/32, BioBERT and BioLinkBERT of the paper's sentence V3,
  and those given: a tensor (32, D) in the paper's order, or weights that hold their prompts, such
  as the published ones. The published file was made of two misspelt names ("Arota", "Celiac
  Truck").
- Raw: the cosine of two classes. Centred: the mean of the 32 embeddings is subtracted first, as
  `standardise_text` does with the prompts that a network reads (its factor changes no cosine).
- Groups, by anatomy: see GROUPS; a lesion is in its organ's group.
- Measured: the mean cosine of pairs within a group and of pairs of two groups; the difference, with
  the interval that a bootstrap over classes gives; the mean cosine of left and right and of a
  lesion and its organ; the silhouette of the groups by cosine distance, and the share of 2000
  random groupings of the same sizes that reach it.
- Paper: it shows such a picture; no number of it is known (U).

Hardware. Any CPU, seconds; a minute where an encoder is loaded.
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from encoders import ENCODERS, ONE_HOT, add_arguments, at_hand, class_embeddings
from lab import Lab, run_script
from numpy.typing import NDArray
from plots import matrices
from runs import Run
from sizes import plans
from torch import Tensor

from foundation import CLASSES, UsageError, from_pretrained, import_extra, mean_and_scale
from foundation.evaluation import Figure

DRAWS = 2000
# Without the lesions, which are with their organs; the vessels of the liver are with the vessels.
GROUPS = {
    "upper abdominal organs": ("spleen", "liver", "gallbladder", "pancreas"),
    "kidneys and adrenals": (
        "kidney_right",
        "kidney_left",
        "adrenal_gland_right",
        "adrenal_gland_left",
    ),
    "digestive tract": ("esophagus", "stomach", "duodenum", "intestine", "colon", "rectum"),
    "vessels": (
        "aorta",
        "inferior_vena_cava",
        "portal_vein_and_splenic_vein",
        "hepatic_vessel",
        "celiac_trunk",
    ),
    "lungs": ("lung_right", "lung_left"),
    "pelvic organs": ("urinary_bladder", "prostate"),
    "femoral heads": ("femur_head_left", "femur_head_right"),
}


def add_options(parser: ArgumentParser) -> None:
    """Add the embeddings that are given."""
    add_arguments(parser)
    text = "embeddings of the 32 classes: a tensor, or weights with prompts; may be given again"
    parser.add_argument("--embeddings", action="append", default=[], metavar="NAME=PATH", help=text)


def groups() -> NDArray[np.int64]:
    """Return the number of each class's group, (32,)."""
    of = {name: number for number, names in enumerate(GROUPS.values()) for name in names}
    parents = {each.name: each.parents[0] for each in CLASSES if each.parents}
    return np.array([of[parents.get(each.name, each.name)] for each in CLASSES])


def read_embeddings(path: Path) -> Tensor:
    """Read embeddings of the 32 classes, in the order of the taxonomy.

    Args:
        path: A file that holds a tensor (32, D), in the paper's order; or weights with a prompt for
            each of the 32 classes.

    Returns:
        (32, D) float32.

    Raises:
        UsageError: It holds neither.
        HubError, WeightsError: As `from_pretrained`.
    """
    if path.suffix in (".pt", ".pth") and path.is_file():
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        if isinstance(loaded, Tensor):
            if loaded.ndim != 2 or len(loaded) != len(CLASSES):
                raise UsageError(
                    f"{path} holds a tensor of shape {tuple(loaded.shape)}; give (32, D), a row "
                    "for each class in the paper's order."
                )
            return loaded.float()
    model = from_pretrained(path)
    rows = dict(zip(model.classes, model.prompt_embedding, strict=True))
    if lacking := [each.name for each in CLASSES if each.name not in rows]:
        raise UsageError(f"{path} has no prompt of {', '.join(lacking)}; give all 32 classes.")
    return torch.stack([rows[each.name] for each in CLASSES]).detach()


def cosines(embeddings: Tensor, centred: bool) -> NDArray[np.float64]:
    """Return the cosine of each pair of classes.

    Args:
        embeddings: (K, D).
        centred: Whether their mean is subtracted first.

    Returns:
        (K, K); 0 with an embedding of no length.
    """
    rows = embeddings.double()
    if centred:
        mean, scale = mean_and_scale(rows)
        rows = (rows - mean) * scale
    rows = torch.nn.functional.normalize(rows, dim=1)
    return (rows @ rows.T).numpy()


def within_and_between(
    matrix: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[float, float]:
    """Return the mean cosine of pairs in one group and in two, without a class and itself.

    Args:
        matrix: Cosines (K, K).
        labels: Group of each class, (K,).
    """
    return _means(matrix, labels, np.arange(len(labels)))


def _means(
    matrix: NDArray[np.float64], labels: NDArray[np.int64], drawn: NDArray[np.int64]
) -> tuple[float, float]:
    """As `within_and_between`, over classes that may be drawn twice; NaN without a pair."""
    pairs = drawn[:, None] != drawn
    same = labels[drawn][:, None] == labels[drawn]
    values = matrix[np.ix_(drawn, drawn)]
    return tuple(  # type: ignore[return-value]
        float(values[chosen].mean()) if chosen.any() else float("nan")
        for chosen in (pairs & same, pairs & ~same)
    )


def describe(matrix: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, Figure]:
    """Measure how far the cosines follow the groups.

    Args:
        matrix: Cosines (K, K) of the classes.
        labels: Group of each class, (K,).

    Returns:
        Name → figure.
    """
    metrics = import_extra("sklearn.metrics", "benchmarks", "The silhouette of groups needs")
    rng = np.random.default_rng(0)
    within, between = within_and_between(matrix, labels)
    drawn = [
        np.subtract(*_means(matrix, labels, rng.integers(len(labels), size=len(labels))))
        for _ in range(DRAWS)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    # Rounding leaves cosines of 1 + 1e-16, and on the diagonal the distance must be 0.
    distance = np.clip(1 - matrix, 0, 2) * (1 - np.eye(len(matrix)))

    def silhouette(given: NDArray[np.int64]) -> float:
        return float(metrics.silhouette_score(distance, given, metric="precomputed"))

    measured = silhouette(labels)
    reached = sum(silhouette(rng.permutation(labels)) >= measured - 1e-9 for _ in range(DRAWS))
    names = [each.name for each in CLASSES]
    sides = [matrix[i, names.index(n.replace("_right", "_left"))] for i, n in enumerate(names)
             if n.endswith("_right")]  # fmt: skip
    lesions = [matrix[each.index, names.index(organ)] for each in CLASSES for organ in each.parents]
    found = (
        Figure("within", within),
        Figure("between", between),
        Figure("difference", within - between, low=float(low), high=float(high), n=len(labels)),
        Figure("left and right", float(np.mean(sides)), n=len(sides)),
        Figure("lesion and organ", float(np.mean(lesions)), n=len(lesions)),
        Figure("silhouette", measured, n=len(labels)),
        Figure("random groupings", (reached + 1) / (DRAWS + 1), n=DRAWS),
    )
    return {each.name: each for each in found}


def measure(run: Run, embeddings: Tensor) -> Iterable[Figure]:
    """Describe the cosines of one encoder's embeddings."""
    matrix = cosines(embeddings, centred=run.arm["cosine"] == "centred")
    return describe(matrix, groups()).values()


def main() -> None:
    """Measure all embeddings and draw their matrices."""
    every = {"text": list(ENCODERS)}
    sizes = plans(smoke={"text": [ONE_HOT, "MiniLM"]}, mini=every, real=every)
    lab = Lab.parse(__doc__, sizes, add_options, axes=["embeddings"], reads_data=False)
    given = {}
    for text in lab.given.embeddings:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in ENCODERS:
            raise UsageError(
                f"--embeddings {text} is not NAME=PATH with a name beside {', '.join(ENCODERS)}."
            )
        given[name] = read_embeddings(Path(path))
    names = at_hand(lab, lab.plan.options["text"], [*given])
    found = {name: class_embeddings(name) for name in names}
    found |= given
    shown = {}
    order = sorted(range(len(CLASSES)), key=lambda index: groups()[index])
    for arm in lab.arms({"text": list(found), "cosine": ["raw", "centred"]}):
        embeddings = found[str(arm["text"])]
        digest = hashlib.sha256(embeddings.contiguous().numpy().tobytes()).hexdigest()
        weights = {f"embeddings/{arm['text']}": digest}
        lab.measure(arm, partial(measure, embeddings=embeddings), seeds=[None], weights=weights)
        matrix = cosines(embeddings, centred=arm["cosine"] == "centred")
        shown[f"{arm['text']}, {arm['cosine']}"] = matrix[np.ix_(order, order)]
    labels = [CLASSES[index].display for index in order]
    lab.finish([matrices(lab.output / "cosines.png", shown, labels, (-1, 1), columns=2)])


if __name__ == "__main__":
    run_script(main)
