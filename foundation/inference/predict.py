"""A CT in, its segmentation out: frame, windows, thresholds, clean-up."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from foundation import taxonomy
from foundation.config import NetworkConfig, check_overlap
from foundation.errors import UsageError
from foundation.imaging.assessment import assess
from foundation.imaging.body import body_box, midline_from_ct
from foundation.imaging.expected_dice import Calibration
from foundation.imaging.frame import Frame
from foundation.imaging.memory import require_memory
from foundation.imaging.preprocess import RAS, frame_of, ras_axes, reorient
from foundation.imaging.probabilities import QUANTA, ProbabilityMap, crop
from foundation.imaging.result import Segmentation
from foundation.imaging.volumes import Source, VolumeWarning, read_ct
from foundation.inference import postprocess as rules
from foundation.inference.postprocess import CONNECTED, Mask
from foundation.inference.sliding_window import collect, slide
from foundation.networks.protocol import Network

Maps = dict[str, ProbabilityMap]


def segment_volume(
    network: Network,
    ct: Source,
    *,
    classes: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    overlap: float | None = None,
    postprocess: bool = True,
    progress: bool = True,
) -> Segmentation:
    """Segment one CT.

    Follows the published inference: the weights' orientation, spacing and HU windows, the box
    around the body, Gaussian sliding window over logits, threshold, clean-up of the masks. Two
    deviations: probabilities, not masks, are brought back to the CT's grid (linearly) and
    thresholded there, since the nearest voxel of a coarse mask gives staircases; and coarser grids
    are averages, not samples, of the CT.

    Memory, beside the network's own: the CT as it is stored (2 bytes a voxel of int16, whatever its
    slope); 4 bytes a voxel of one slab, as thick as a window, a class; at most 2 bytes a voxel of
    the network's grid a class. For 512 × 512 × 600 voxels of 0.8 mm and 32 classes at 1.5 mm in
    windows of 96³ that is 0.3 + 0.9 + at most 1.5 GB, where 32 volumes of floats would take 20.
    Masks are made one at a time, when asked for, and kept as bits. The logits of a softmax are
    needed for all classes, whichever are asked for.

    Args:
        network: Any `Network`: a `UniversalModel`, or a module with a `config` and
            `forward(image, channels)`.
        ct: Path of a NIfTI file, nibabel image, (array in HU, affine), or `Volume`.
        classes: Names or aliases; only these are computed. All of the network's if not given.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; the network moves there. Not given: it stays
            where it is.
        overlap: Share of a window that its neighbour covers, from 0 to 0.9; the weights' own if not
            given.
        postprocess: Apply the rules of `foundation.inference.postprocess`.
        progress: Show a bar on standard error, where that is a terminal.

    Returns:
        The masks and probabilities on the grid of the CT.

    Raises:
        VolumeError: The CT cannot be read (see `read_ct`), or does not fit into memory at the
            network's spacing.
        UsageError: Unknown class, overlap not from 0 to 0.9, a device that is not there, or a
            network that gives other logits than its configuration tells.
        WeightsError: The network gives values that are not finite.
    """
    config = network.config
    names = resolve_classes(classes, config.class_names)
    options = inference_options(config, overlap, postprocess)
    target = _device_of(network) if device is None else choose_device(device)
    volume = read_ct(ct)
    frame = frame_of(volume, config.preprocessing)
    # A network's spacing is a stranger's choice: 0.1 mm makes ten gigabytes of a small CT.
    fine = " × ".join(f"{size:g}" for size in config.preprocessing.spacing_mm)
    require_memory(4 * math.prod(frame.shape), f"This CT at the network's {fine} mm")
    hu = frame.to_network(volume)

    # The rules look at neighbours (a tumour at its organ), so that the answer for a class does not
    # depend on which others were asked for. Computing a few classes more costs next to nothing.
    needed = rules.partners(names) if postprocess else ()
    computed = names + [name for name in needed if name in config.class_names]
    was_training = network.training
    network.to(target)
    network.train(False)
    try:
        maps = _probability_maps(network, hu, computed, target, options["overlap"], progress)
    finally:
        network.train(was_training)
    threshold = config.preprocessing.threshold
    if postprocess:
        maps.update(_cleaned(maps, computed, hu, frame, threshold))
    # Organs that were computed for the rules tell where the scan ends, too.
    trust, doubts = assess(maps, computed, hu, frame, threshold, _calibration_of(network))
    for doubt in doubts:
        warnings.warn(doubt, VolumeWarning, stacklevel=2)
    return Segmentation(
        volume=volume,
        frame=frame,
        maps={name: maps[name] for name in names if name in maps},
        classes=tuple(names),
        label_values={name: config.class_names.index(name) + 1 for name in names},
        parents={spec.name: spec.parent for spec in config.classes},
        threshold=threshold,
        model_name=config.name,
        model_sha256=getattr(network, "weights_sha256", None),
        options={**options, "device": str(target)},
        trust={name: trust[name] for name in names},
        doubts=tuple(doubts),
    )


def inference_options(
    config: NetworkConfig, overlap: float | None, postprocess: bool
) -> dict[str, Any]:
    """Return what a result depends on besides the CT, the weights, and the classes asked for.

    Args:
        config: Of the network.
        overlap: As of `segment_volume`.
        postprocess: As of `segment_volume`.

    Returns:
        The options as the sidecar has them. `settings_sha256` is of what the network's
        configuration says of preprocessing, activation, classes and their organs.

    Raises:
        UsageError: See `check_overlap`.
    """
    overlap = config.preprocessing.overlap if overlap is None else overlap
    check_overlap(overlap)
    classes = [(spec.name, spec.parent) for spec in config.classes]
    settings = [asdict(config.preprocessing), config.activation, config.divisor, classes]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return {"overlap": overlap, "postprocess": postprocess, "settings_sha256": digest}


def resolve_classes(classes: str | Sequence[str] | None, allowed: Sequence[str]) -> list[str]:
    """Find the wanted classes by name or alias.

    Args:
        classes: Names or aliases; a single one may stand alone; None, all.
        allowed: The classes of the model.

    Returns:
        Their names, in the order of the model.

    Raises:
        UsageError: A class that the model does not have, or none at all.
    """
    if classes is None:
        return list(allowed)
    given = [classes] if isinstance(classes, str) else classes
    wanted = {taxonomy.resolve(name, allowed) for name in given}
    if not wanted:
        raise UsageError("No class was asked for. Name at least one, or leave `classes` out.")
    return [name for name in allowed if name in wanted]


def choose_device(name: str | torch.device) -> torch.device:
    """Find a device by name.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", or "auto": the first of cuda, mps and cpu that is
            there.

    Returns:
        The device.

    Raises:
        UsageError: There is no such device, or it is not available here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        return torch.device("cuda" if gpus else available[-1])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"Unknown device {str(name)!r}. Choose auto, cpu, cuda, cuda:1 or mps.")
    wanted = f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
    if wanted not in available:
        has = ", ".join(available)
        raise UsageError(f"Device {str(device)!r} is not available; this machine has: {has}.")
    return device


def _probability_maps(
    network: Network,
    hu: NDArray[np.float32],
    names: Sequence[str],
    device: torch.device,
    overlap: float,
    progress: bool,
) -> Maps:
    box = body_box(hu)
    if box is None:
        return {}
    config = network.config
    orientation = config.preprocessing.orientation
    channels = [config.class_names.index(name) for name in names]
    # Here alone the axes are the network's own; the frame, the box and the maps lie in RAS.
    turned = np.ascontiguousarray(reorient(hu[box], RAS, orientation))
    slabs = slide(network, turned, channels, device=device, overlap=overlap, progress=progress)
    found = collect(slabs, len(names))
    return {
        name: _in_ras(each, turned.shape, orientation, [part.start for part in box])
        for name, each in zip(names, found, strict=True)
        if each is not None
    }


def _in_ras(
    found: ProbabilityMap, shape: Sequence[int], orientation: str, offset: Sequence[int]
) -> ProbabilityMap:
    """A map along the axes of `orientation`, in an array of `shape` there, in RAS from `offset`."""
    start = list(offset)
    for axis, ras in enumerate(ras_axes(orientation)):
        before, size = found.start[axis], found.values.shape[axis]
        forward = orientation[axis] in RAS
        start[ras] += before if forward else shape[axis] - before - size
    values = np.ascontiguousarray(reorient(found.values, orientation, RAS))
    return ProbabilityMap(values, (start[0], start[1], start[2]))


def _device_of(network: Network) -> torch.device:
    weights = next(network.parameters(), None)
    return torch.device("cpu") if weights is None else weights.device


def _calibration_of(network: Network) -> Calibration | None:
    """What the weights came with, as long as they are the same."""
    found: Calibration | None = getattr(network, "calibration", None)
    same = found and found.weights_sha256 == getattr(network, "weights_sha256", None)
    return found if same else None


def _cleaned(
    maps: Maps, names: Sequence[str], hu: NDArray[np.float32], frame: Frame, threshold: float
) -> Maps:
    """Maps in which what the rules removed is 0, and what changed sides has its probability."""

    def raw(name: str) -> Mask:
        mask = np.zeros(frame.shape, bool)
        if name in maps:
            mask[maps[name].box] = maps[name].values > threshold * QUANTA
        return mask

    cleaned: Maps = {}
    spacing_mm = frame.spacing_mm
    middle = midline_from_ct(hu, spacing_mm)
    for name, kept in rules.postprocess(names, raw, spacing_mm=spacing_mm, middle=middle):
        before = raw(name)
        moved = kept & ~before
        if moved.any():
            grid = maps[name].full(frame.shape) if name in maps else np.zeros(frame.shape, np.uint8)
            grid[before & ~kept] = 0
            other = maps[rules.OTHER_SIDE[name]].full(frame.shape)
            # With the faint rim around it, or the surface would move inwards in the interpolation.
            rim = ndimage.binary_dilation(moved, CONNECTED) & (other <= threshold * QUANTA)
            cleaned[name] = crop(np.where(moved | rim, np.maximum(grid, other), grid))
        elif name in maps:
            values = maps[name].values.copy()
            values[(before & ~kept)[maps[name].box]] = 0
            cleaned[name] = ProbabilityMap(values, maps[name].start)
    return cleaned
