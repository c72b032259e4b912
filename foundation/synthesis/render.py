"""Synthetic CTs from label maps: HU of every tissue by contrast phase, texture, partial volume.

The HU means are textbook values for adults at 100-140 kV, rounded; their spread is wide on
purpose, so that a network learns shape and neighbourhood and not one scanner's grey values.
Label maps instead of scans as training data: SynthSeg (Billot et al., 2023, arXiv 2107.09559).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from foundation.synthesis.fields import look_up, one_of, smooth_noise
from foundation.synthesis.scanner import AIR_HU, scan

Noise = tuple[Tensor, Tensor, Tensor]  # fine, medium and slow, (X, Y, Z) each

PHASES = ("native", "arterial", "portal_venous", "delayed")
PHASE_PROBABILITIES = (0.4, 0.15, 0.33, 0.12)


@dataclass(frozen=True)
class Tissue:
    """How a tissue looks on CT.

    Attributes:
        mean_hu: In each phase of `PHASES`.
        spread_hu: Standard deviation of that mean between people.
        texture_hu: Amplitude of the variation inside the tissue.
    """

    mean_hu: tuple[float, float, float, float]
    spread_hu: float = 10.0
    texture_hu: float = 6.0


_ARTERY = Tissue((40, 320, 150, 110), 15)
_VEIN = Tissue((38, 75, 130, 110), 15)
_BOWEL = Tissue((35, 55, 80, 60), 12)  # the wall; the content is drawn apart
TISSUES: dict[str, Tissue] = {
    "fat": Tissue((-105, -105, -103, -104), 8, 6),
    "skin": Tissue((10, 15, 20, 20), 20),
    "muscle": Tissue((52, 56, 63, 62), 9, 10),
    "soft": Tissue((38, 55, 75, 65), 20, 15),
    "bone": Tissue((220, 230, 235, 235), 70, 40),
    "lung": Tissue((-840, -830, -825, -830), 60, 35),
    "trachea": Tissue((-980, -980, -980, -980), 15, 2),
    "artery": _ARTERY,
    "vein": _VEIN,
    "portal": Tissue((38, 85, 160, 115), 18),
    "heart": Tissue((42, 220, 135, 105), 25, 18),
    "liver": Tissue((54, 66, 108, 88), 15),
    "spleen": Tissue((46, 115, 118, 92), 12, 8),
    "kidney": Tissue((32, 150, 180, 150), 18, 14),
    "pancreas": Tissue((37, 98, 92, 72), 13, 10),
    "adrenal": Tissue((20, 60, 65, 50), 15),
    "gallbladder": Tissue((9, 9, 10, 12), 10, 3),
    "bladder": Tissue((5, 5, 7, 20), 8, 3),
    "prostate": Tissue((40, 60, 75, 75), 12, 8),
    "uterus": Tissue((45, 75, 100, 100), 15, 10),
    "spinal_cord": Tissue((30, 32, 36, 36), 10),
    "brain": Tissue((34, 36, 38, 38), 5),
    "thyroid": Tissue((100, 160, 140, 120), 25),
    "cartilage": Tissue((90, 90, 95, 95), 30, 20),
    "bowel": _BOWEL,
    "liver_tumor": Tissue((38, 60, 65, 62), 22, 12),
    "kidney_tumor": Tissue((34, 95, 100, 85), 28, 18),
    "kidney_cyst": Tissue((6, 8, 9, 10), 8, 2),
    "pancreas_tumor": Tissue((32, 55, 62, 58), 16, 10),
    "lung_tumor": Tissue((30, 50, 55, 50), 20, 12),
    "colon_tumor": Tissue((40, 75, 90, 75), 15, 10),
    "fluid": Tissue((8, 9, 10, 11), 8, 2),
}
# First match wins; a name that matches nothing is soft tissue.
_KIND_BY_PREFIX: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fat",), "fat"),
    (("skin",), "skin"),
    (("muscle", "gluteus", "autochthon", "iliopsoas"), "muscle"),
    (
        (
            "vertebra", "ribs", "rib_", "hip_", "sacrum", "sternum", "femur", "humerus", "scapula",
            "clavicula", "skull", "bone",
        ),
        "bone",
    ),
    (("costal_cart",), "cartilage"),
    (("lung_tumor",), "lung_tumor"),
    (("lung",), "lung"),
    (("trachea",), "trachea"),
    (("thyroid_gland",), "thyroid"),
    (("heart", "atrial_app"), "heart"),
    (
        (
            "aorta", "iliac_artery", "celiac", "superior_mesenteric", "brachiocephalic_trunk",
            "subclavian", "common_carotid", "pulmonary_artery", "pulmonary_vein",
        ),
        "artery",
    ),
    (("inferior_vena", "iliac_vena", "superior_vena", "brachiocephalic_vein"), "vein"),
    (("hepatic_vessel_tumor", "liver_tumor"), "liver_tumor"),
    (("portal", "hepatic_ve"), "portal"),
    (("kidney_tumor",), "kidney_tumor"),
    (("kidney_cyst",), "kidney_cyst"),
    (("kidney",), "kidney"),
    (("pancreas_tumor",), "pancreas_tumor"),
    (("colon_tumor",), "colon_tumor"),
    (("adrenal",), "adrenal"),
    (("urinary_bladder",), "bladder"),
    (
        ("colon", "small_bowel", "duodenum", "rectum", "stomach", "esophagus", "vermiform"),
        "bowel",
    ),
)  # fmt: skip
# Share of a hollow organ's inside that gas takes on average, and how mottled its content is.
_HOLLOW = {
    "stomach": (0.2, 15.0),
    "duodenum": (0.05, 10.0),
    "small_bowel": (0.05, 12.0),
    "colon": (0.3, 60.0),
    "rectum": (0.25, 50.0),
    "esophagus": (0.1, 5.0),
}


def tissue_kind(name: str) -> str:
    """Return how a tissue is rendered.

    Args:
        name: Of the tissue, as `names` of `render_ct` has it.

    Returns:
        A key of `TISSUES`; "soft" for a name that is not known.
    """
    for prefixes, kind in _KIND_BY_PREFIX:
        if name.startswith(tuple(prefixes)):
            return kind
    return name if name in TISSUES else "soft"


def render_ct(
    label_map: NDArray[np.integer] | Tensor,
    names: Mapping[int, str],
    spacing_mm: float,
    rng: np.random.Generator,
    *,
    depth_mm: Tensor | None = None,
    fat_mm: float = 20.0,
    muscle_mm: float = 12.0,
    pool: int = 1,
) -> NDArray[np.float32]:
    """Render a label map as a CT.

    Args:
        label_map: Label values (X, Y, Z), RAS, isotropic.
        names: Every label value → tissue name (of `TISSUES`, our classes or TotalSegmentator's).
            Value 0 is air, unless `depth_mm` is given.
        spacing_mm: Of the label map.
        rng: The source of chance.
        depth_mm: Depth (X, Y, Z) below the skin, negative outside. Unlabelled voxels below the skin
            become, from outside in: skin, fat down to `fat_mm`, a muscle wall of `muscle_mm`, and
            then fat with strands and blobs of soft tissue; in places muscle covers what is
            labelled.
        fat_mm: How deep the fat reaches.
        muscle_mm: How thick the wall is.
        pool: How many voxels along each axis are averaged into one of the CT: partial volume.

    Returns:
        HU (X, Y, Z), float32.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    labels = torch.as_tensor(label_map).to(torch.int32)
    # Millimetres over which it varies: grains of tissue, lobules, parts of organs.
    fine, medium, slow = (
        smooth_noise(tuple(labels.shape), cell_mm / spacing_mm, generator, pool)
        for cell_mm in (6, 20, 60)
    )
    noise = fine, medium, slow
    kinds = {0: "air"} | {value: tissue_kind(name) for value, name in names.items() if value}
    if depth_mm is not None:
        first = max(kinds) + 1
        layers = ("skin", "fat", "muscle", "soft", "fluid")
        fill = dict(zip(layers, range(first, first + len(layers)), strict=True))
        kinds |= {value: kind for kind, value in fill.items()}
        cover = _draw_cover(labels, kinds, spacing_mm, noise, rng)
        labels = _fill_unlabelled(labels, fill, (depth_mm, fat_mm, muscle_mm), cover, noise, rng)

    phase = int(rng.choice(len(PHASES), p=PHASE_PROBABILITIES))
    mean, texture = _draw_means(kinds, names, phase, rng)
    # 0.6² + 0.8² = 1: the texture keeps its amplitude, whichever scale it has.
    ct = look_up(mean, labels) + look_up(texture, labels) * (0.6 * fine + 0.8 * medium)
    border = _border(labels)
    if pool == 1 and phase in (1, 2):  # before and after them cortex and medulla look alike
        _render_medulla(ct, labels, kinds, medium, phase, spacing_mm, rng)
    shell = _of_kind(labels, kinds, "bone") & border  # the dense outside of bones
    ct[shell] = ct[shell].clamp_min(0) + rng.uniform(150, 600)
    if rng.random() < 0.4:  # plaques in the walls of arteries
        plaque = border & (fine > rng.uniform(1.2, 2.6)) & _of_kind(labels, kinds, "artery")
        ct.masked_fill_(plaque, rng.uniform(250, 900))
    _render_hollow(ct, labels, border, names, noise, generator, rng)
    lung_vessels = _of_kind(labels, kinds, "lung") & (fine > rng.uniform(1.6, 2.6))
    ct.masked_fill_(lung_vessels, rng.uniform(-300, 60))
    if pool > 1:
        ct = functional.avg_pool3d(ct[None, None], pool)[0, 0]
    scanned: NDArray[np.float32] = scan(ct, spacing_mm * pool, rng, generator).numpy()
    return scanned


def _fill_unlabelled(
    labels: Tensor,
    fill: Mapping[str, int],
    layers_mm: tuple[Tensor, float, float],
    cover: Tensor,
    noise: Noise,
    rng: np.random.Generator,
) -> Tensor:
    """Labels with the unlabelled inside of the body filled, layer by layer; see `render_ct`.

    layers_mm: depth below the skin, and how thick fat and muscle are. cover: as `_draw_cover`.
    """
    empty = (labels.reshape(-1) == 0).nonzero()[:, 0]
    depth_mm, fat_mm, muscle_mm = layers_mm
    f, m, s, depth = (field.reshape(-1).index_select(0, empty) for field in (*noise, depth_mm))
    depth = depth + 3.0 * s  # no layer has the same thickness everywhere
    filled = torch.zeros(len(empty), dtype=labels.dtype)
    filled.masked_fill_(depth > 0, fill["skin"])
    filled.masked_fill_(depth > 2.5, fill["fat"])
    wall = (depth > fat_mm) & (depth < fat_mm + muscle_mm * (1 + 0.4 * m))
    filled.masked_fill_(wall, fill["muscle"])
    # Vessels, folds and unlabelled organs: sheets where slow noise crosses zero, and blobs.
    strands = (m.abs() < rng.uniform(0.02, 0.25)) & (f > 0)
    blobs = f + m > rng.uniform(1.6, 3.0)
    deep = depth > fat_mm + muscle_mm
    filled.masked_fill_(deep & (strands | blobs), fill["soft"])
    filled.masked_fill_(cover.reshape(-1)[empty] & (depth > 4), fill["muscle"])
    if rng.random() < 0.12:  # ascites
        filled.masked_fill_(deep & (s > rng.uniform(0.0, 1.5)), fill["fluid"])
    labels = labels.clone()
    labels.view(-1)[empty] = filled
    return labels


def _draw_cover(
    labels: Tensor,
    kinds: Mapping[int, str],
    spacing_mm: float,
    noise: Noise,
    rng: np.random.Generator,
) -> Tensor:
    """Where muscle lies against what is labelled, bool (X, Y, Z).

    Diaphragm, crura, intercostal and abdominal muscles have no labels and the grey values of the
    organs they touch. Where organs bordered on fat alone, a network took muscle for liver.
    """
    _, m, s = noise
    cover = torch.zeros_like(labels, dtype=torch.bool)
    for touched, most_mm in ((labels > 0, 8.0), (_of_kind(labels, kinds, "bone"), 16.0)):
        if rng.random() < 0.75:
            reach = max(1, round(rng.uniform(0, most_mm) / spacing_mm))
            cover |= _grown(touched, reach) & (0.7 * (s + m) > rng.normal(0, 1))
    return cover


def _grown(mask: Tensor, reach: int) -> Tensor:
    """Mask (X, Y, Z) and all within `reach` voxels of it along each axis: a cube's dilation."""
    for axis, size in enumerate(mask.shape):
        grown = mask.clone()
        for shift in range(1, min(reach, size - 1) + 1):
            grown.narrow(axis, 0, size - shift).logical_or_(mask.narrow(axis, shift, size - shift))
            grown.narrow(axis, shift, size - shift).logical_or_(mask.narrow(axis, 0, size - shift))
        mask = grown
    return mask


def _draw_means(
    kinds: Mapping[int, str], names: Mapping[int, str], phase: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mean HU and texture amplitude in HU of each label value, drawn for one person and scan."""
    mean = torch.full((max(kinds) + 1,), AIR_HU)
    texture = torch.zeros(max(kinds) + 1)
    blend = rng.uniform(0, 0.3)  # phases are moments of one process, not four boxes
    other = int(rng.integers(len(PHASES)))
    kind_shift = {kind: rng.normal() for kind in sorted(set(kinds.values()))}
    fatty_hu = rng.uniform(15, 60) if rng.random() < 0.2 else 0.0  # steatosis darkens the liver
    # Fat grows into the pancreas with age: between its lobules, so that it is darker and rougher.
    fatty_pancreas_hu = rng.uniform(15, 80) if rng.random() < 0.35 else 0.0
    wild = rng.random() < 0.1  # now and then grey values that no protocol gives
    for value, kind in kinds.items():
        if kind == "air":
            continue
        tissue = TISSUES[kind]
        base = (1 - blend) * tissue.mean_hu[phase] + blend * tissue.mean_hu[other]
        if wild and kind not in ("fat", "lung", "bone", "trachea", "skin"):
            base = rng.uniform(0, 180)
        # Labels of one kind share most of their shift: all bones, all arteries of one person.
        mean[value] = base + tissue.spread_hu * (kind_shift[kind] + 0.35 * rng.normal())
        texture[value] = tissue.texture_hu * rng.uniform(0.3, 1.7)
        if kind == "liver":
            mean[value] -= fatty_hu
        if kind == "pancreas":
            mean[value] -= fatty_pancreas_hu
            texture[value] += 0.3 * fatty_pancreas_hu
        if kind == "bladder" and phase == 3 and rng.random() < 0.5:
            mean[value] = rng.uniform(60, 500)  # excreted contrast
        if kind == "bone" and names.get(value, "").startswith("femur") and rng.random() < 0.05:
            mean[value] = 2800.0  # a hip implant
    return mean, texture


def contrast_shift(names: Mapping[int, str], rng: np.random.Generator) -> Tensor:
    """Draw HU to add to each label value, so that a scan looks like one of another contrast phase.

    The shift is a random share of the difference between two random phases, so that it adds
    contrast or takes some away.

    Args:
        names: Label value → tissue name.
        rng: The source of chance.

    Returns:
        HU (values,). Lung, bone and bowel stay: the scan shows more of them than a mean.
    """
    one, other = rng.integers(len(PHASES), size=2)
    share = rng.uniform(0, 1)
    shift = torch.zeros(max(names, default=0) + 1)
    for value, name in names.items():
        tissue = TISSUES.get(tissue_kind(name))
        if value and tissue is not None and tissue_kind(name) not in ("lung", "bone", "bowel"):
            shift[value] = share * (tissue.mean_hu[one] - tissue.mean_hu[other])
            shift[value] += rng.normal(0, 5)
    return shift


def _border(labels: Tensor) -> Tensor:
    """Voxels with a face neighbour of another label."""
    border = torch.zeros_like(labels, dtype=torch.bool)
    for axis in range(3):
        differs = labels.diff(dim=axis) != 0
        size = labels.shape[axis]
        border.narrow(axis, 0, size - 1).logical_or_(differs)
        border.narrow(axis, 1, size - 1).logical_or_(differs)
    return border


def _of_kind(labels: Tensor, kinds: Mapping[int, str], kind: str) -> Tensor:
    """Voxels of one kind of tissue, bool (X, Y, Z)."""
    return one_of(labels, [value for value, name in kinds.items() if name == kind])


def _fill_with_stool(
    filling: Tensor, noise: Noise, generator: torch.Generator, rng: np.random.Generator
) -> None:
    """Turn a part of a colon's content (N,) into stool, in place: fat, fibre and bubbles of gas."""
    f, m, s = noise
    grain = torch.randn(len(filling), generator=generator)
    stool = rng.uniform(-60, 60) + rng.uniform(20, 120) * (0.6 * f + 0.5 * grain)
    bubbles = 0.6 * f + 0.8 * grain > rng.uniform(0.4, 2.2)
    stool.masked_fill_(bubbles, rng.uniform(-900, -250))
    place = s + 0.5 * m > rng.normal(-0.5, 1.0)  # the rest holds what the bowel holds
    filling.copy_(torch.where(place, stool, filling))


def _render_medulla(
    ct: Tensor,
    labels: Tensor,
    kinds: Mapping[int, str],
    medium: Tensor,
    phase: int,
    spacing_mm: float,
    rng: np.random.Generator,
) -> None:
    """Darken the inside of the kidneys, in place: contrast reaches their cortex first."""
    kidney = _of_kind(labels, kinds, "kidney")
    places = kidney.nonzero()
    if not len(places) or rng.random() < 0.3:
        return
    low, high = places.amin(0), places.amax(0) + 1
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    # The cortex is what lies within a few millimetres of the surface, the medulla the rest.
    outside = (~kidney[box]).float()[None, None]
    reach = max(1, round(rng.uniform(4, 8) / spacing_mm))
    outside = functional.pad(outside, (reach,) * 6, value=1.0)
    near = functional.max_pool3d(outside, 2 * reach + 1, 1)[0, 0] > 0
    medulla = kidney[box] & ~near & (medium[box] > rng.uniform(-1.0, 0.5))
    ct[box][medulla] -= rng.uniform(40, 110) if phase == 1 else rng.uniform(0, 40)


def _render_hollow(
    ct: Tensor,
    labels: Tensor,
    border: Tensor,
    names: Mapping[int, str],
    noise: Noise,
    generator: torch.Generator,
    rng: np.random.Generator,
) -> None:
    """Fill what lies inside the wall of hollow organs, in place: fluid, stool, contrast, gas."""
    # Gas rises: towards the front of a patient lying on the back (+Y).
    height = torch.linspace(-1, 1, ct.shape[1])
    oral_contrast_hu = rng.uniform(100, 400) if rng.random() < 0.25 else None
    flat, edge = labels.reshape(-1), border.reshape(-1)
    values = ct.view(-1)
    thin = rng.uniform(0, 1) if rng.random() < 0.6 else 0.0  # a distended wall is below a voxel
    for value, name in names.items():
        if name not in _HOLLOW:
            continue
        lumen = (flat == value).nonzero()[:, 0]
        if not len(lumen):
            continue
        gas_share, mottle_hu = _HOLLOW[name]
        content_hu = rng.uniform(-5, 55)
        if oral_contrast_hu is not None and rng.random() < 0.7:
            content_hu = oral_contrast_hu
        f, m, s = (field.reshape(-1).index_select(0, lumen) for field in noise)
        filling = content_hu + mottle_hu * rng.uniform(0, 2) * f + rng.uniform(0, 20) * m
        if name in ("colon", "rectum") and rng.random() < 0.7:
            _fill_with_stool(filling, (f, m, s), generator, rng)
        level = m + 0.5 * s + rng.uniform(0, 2) * height[(lumen // ct.shape[2]) % ct.shape[1]]
        share = min(0.95, gas_share * rng.exponential(1.0))
        # A quantile of at most 20,000 voxels: torch.quantile refuses very many.
        threshold = torch.quantile(level[:: max(1, len(level) // 20000)], 1 - share)
        filling.masked_fill_(level > threshold, -960.0)
        wall = values[lumen]
        values[lumen] = torch.where(edge[lumen], wall.lerp(filling, thin), filling)
