"""Whether universal-ct works on this machine: one check for each thing that can be wrong.

The last check segments a golden case, a generated phantom that is the same everywhere, with the
embedded weights. The volumes that it must give lie beside the weights.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from foundation import __version__
from foundation.errors import UniversalCTError
from foundation.files import replacing
from foundation.hardware import computes_bfloat16
from foundation.hub.cards import card_names, read_card
from foundation.hub.example import cache_folder, offline
from foundation.hub.folder import summed_files, verify_sums
from foundation.hub.load import from_pretrained

Status = Literal["ok", "doubt", "failed"]
GOLDEN = "golden.json"
GOLDEN_SEED = 7  # of the phantom
TOLERANCE = 0.02  # of a volume: processors round differently, and a network is not that far off
LEAST_FREE = 1 << 30  # bytes on a disk
LEAST_MEMORY = 4 << 30
FAULTY_TORCH = "2.9."  # three-dimensional convolutions take many times the memory
ANSWER_S = 5.0


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: Of the check.
        status: "failed": segmenting does not work, or not rightly. "doubt": it works, but slowly,
            or not in every way.
        text: What was found and, if it is not well, what to do.
    """

    name: str
    status: Status
    text: str


def examine() -> Iterator[Check]:
    """Run all checks one after the other; none of them raises."""
    for name, check in _CHECKS.items():
        try:
            status, text = check()
        except (UniversalCTError, OSError, RuntimeError) as error:
            status, text = "failed", str(error)
        yield Check(name, status, text)


# --- the checks -----------------------------------------------------------------------------------

_Found = tuple[Status, str]


def _versions() -> _Found:
    text = (
        f"universal-ct {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    if torch.__version__.startswith(FAULTY_TORCH):
        return "failed", (
            f"{text}: this torch needs many times the memory for 3-D convolutions. "
            "Install another: pip install -U torch torchvision"
        )
    return "ok", text


def _processor() -> _Found:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    text = f"{cores} cores, {threads} threads"
    text += ", bfloat16 in hardware" if computes_bfloat16("cpu") else ", no bfloat16 in hardware"
    if cores and threads > cores:
        return "doubt", f"{text}. More threads than cores slow it down: set OMP_NUM_THREADS={cores}"
    if cores and cores > 1 and threads == 1:
        return "doubt", f"{text}. One thread uses one core only: unset OMP_NUM_THREADS"
    return "ok", text


def _accelerator() -> _Found:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return "ok", ", ".join(names)
    if torch.backends.mps.is_available():
        return "ok", "Apple's GPU (mps)"
    return "ok", "no GPU: everything runs on the CPU"


def _memory() -> _Found:
    free = _available_bytes()
    if free is None:
        return "ok", "not known on this system"
    text = f"{free / 2**30:.1f} GiB available"
    if free < LEAST_MEMORY:
        return "doubt", f"{text}: large CTs may not fit. Close other programs."
    return "ok", text


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


def _disk() -> _Found:
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    found = {name: shutil.disk_usage(path).free for name, path in places.items()}
    text = ", ".join(f"{free / 2**30:.1f} GiB free ({name})" for name, free in found.items())
    if min(found.values()) < LEAST_FREE:
        return "doubt", f"{text}: too little for many results. Make room, or write elsewhere by -o."
    return "ok", text


def _caches() -> _Found:
    from huggingface_hub import constants

    closed = []
    for folder in (cache_folder(), Path(constants.HF_HUB_CACHE)):
        place = folder
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK):
            closed.append(str(folder))
    if closed:
        return "doubt", (
            f"{', '.join(closed)} cannot be written: every download is made anew or fails. "
            "Set XDG_CACHE_HOME and HF_HOME to folders of yours."
        )
    return "ok", f"{cache_folder()}, {constants.HF_HUB_CACHE}"


def _hub() -> _Found:
    from huggingface_hub import constants

    if offline():
        return "ok", "HF_HUB_OFFLINE is set: only what is in the cache is loaded"
    endpoint = constants.ENDPOINT
    try:
        with urllib.request.urlopen(endpoint, timeout=ANSWER_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return "doubt", (
            f"{endpoint} does not answer ({reason}). Embedded models work; others load only from "
            "the cache. Set HF_HUB_OFFLINE=1 to spare the attempts."
        )
    return "ok", f"{endpoint} answers"


def _weights() -> _Found:
    names = [name for name in card_names() if read_card(name).folder.is_dir()]
    if not names:
        return "failed", "the package holds no weights. Install it again."
    for name in names:
        folder = read_card(name).folder
        verify_sums(folder, summed_files(folder))
    return "ok", f"{', '.join(names)}: all files have their SHA-256"


def _golden() -> _Found:
    folder = read_card("universal-ct").folder
    path = folder / GOLDEN
    expected: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = golden_volumes_ml()
    wrong = [
        f"{name} {found.get(name, 0.0):.0f} ml in place of {ml:.0f} ml"
        for name, ml in expected["volumes_ml"].items()
        if abs(found.get(name, 0.0) - ml) > TOLERANCE * ml
    ]
    if wrong:
        return "failed", (
            f"The golden case has other volumes: {', '.join(wrong)}. Weights, torch or the "
            "processor compute something else. Install universal-ct and torch again."
        )
    return "ok", f"{len(expected['volumes_ml'])} organs of a phantom have their volumes"


def golden_volumes_ml() -> dict[str, float]:
    """Segment the golden case with the embedded weights; returns the volume of what was found."""
    from foundation.synthesis.phantom_scans import phantom_ct

    with tempfile.TemporaryDirectory() as folder:
        ct = phantom_ct(Path(folder) / "phantom.nii.gz", GOLDEN_SEED)
        result = from_pretrained("universal-ct").segment(ct, device="cpu", progress=False)
        return {name: ml for name, ml in result.volumes_ml.items() if ml > 0}


def write_golden(folder: Path, least_ml: float = 50.0) -> Path:
    """Write what the golden case must give, when weights are published.

    Args:
        folder: Of the embedded weights.
        least_ml: Organs that are smaller are left out.

    Returns:
        The file.
    """
    found = golden_volumes_ml()
    content = {
        "phantom_seed": GOLDEN_SEED,
        "volumes_ml": {name: round(ml, 1) for name, ml in found.items() if ml >= least_ml},
    }
    with replacing(folder / GOLDEN) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder / GOLDEN


_CHECKS: dict[str, Callable[[], _Found]] = {
    "versions": _versions,
    "processor": _processor,
    "accelerator": _accelerator,
    "memory": _memory,
    "disk": _disk,
    "caches": _caches,
    "Hub": _hub,
    "weights": _weights,
    "golden case": _golden,
}
