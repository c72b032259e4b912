"""Published checkpoints in, our state dicts out: one key table a backbone, and pure functions.

An unknown key is an error, and so is one that is missing or has another shape; dropping a key
needs its own row in a table. Nothing here downloads: the weights stay under their own licence and
are converted on the user's own machine.
"""

from __future__ import annotations

import functools
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.errors import UsageError, WeightsError, listed
from foundation.model import check_state, shapes_of, without_memory
from foundation.networks.backbones import build_backbone
from foundation.networks.head import TextDrivenHead
from foundation.taxonomy import CLASSES

# Where a training checkpoint keeps its weights.
WRAPPERS = [
    "net",
    "state_dict",
    "model",
    "model_state_dict",
    "network_weights",
    "ema",
    "state_dict_ema",
]
_PREFIXES = re.compile(r"^((module|model|_orig_mod)\.)+")  # of wrappers, Lightning, torch.compile
_MOST_UNPACKED = 4  # times the size of an archive; PyTorch does not compress
TEXT_DIM = 512  # of the published prompt embeddings, CLIP ViT-B/32


@dataclass(frozen=True)
class Converted:
    """A published checkpoint as ours.

    Attributes:
        backbone: Name of the backbone.
        state: For `UniversalModel.load_state_dict`, strictly. Without a head, only the keys that
            start with `backbone.` are there, and the weights serve as an encoder.
        prompt_embedding: (K, D) float32; None where the checkpoint has no head.
    """

    backbone: str
    state: dict[str, Tensor]
    prompt_embedding: Tensor | None


@dataclass(frozen=True)
class Row:
    """How keys of a checkpoint are renamed or dropped.

    Attributes:
        pattern: Regular expression of whole keys, without the prefixes of wrappers.
        target: Our name, with the groups of the pattern; None drops the keys.
        reason: Why they are dropped.
    """

    pattern: str
    target: str | None
    reason: str = ""


_TASK_HEAD = "an output layer for fixed classes; the text-driven head takes its place"

HEAD_ROWS = (
    Row(r"precls_conv\.([02])\.(weight|bias)", r"head.feature_projection.\1.\2"),
    Row(r"GAP\.([03])\.(weight|bias)", r"head.global_feature.\1.\2"),
    Row(r"text_to_vision\.(weight|bias)", r"head.text_projection.\1"),
    Row(r"controller\.(weight|bias)", r"head.controller.\1"),
    Row(r"organ_embedding", "prompt_embedding"),
)


def _unet_rows() -> tuple[Row, ...]:
    statistics = "the published normalisation uses the input's own statistics, always"
    rows = [
        Row(r".+\.bn1\.(running_mean|running_var|num_batches_tracked)", None, statistics),
        Row(r"out_tr\..+", None, _TASK_HEAD),
    ]
    for level, width in enumerate((64, 128, 256, 512)):
        for theirs, ours in (
            (f"down_tr{width}", f"down.{level}"),
            (f"up_tr{width}", f"merge.{level}"),
        ):
            rows += [
                Row(
                    rf"{theirs}\.ops\.([01])\.{layer}\.(weight|bias)",
                    rf"backbone.{ours}.\1.{place}.\2",
                )
                for place, layer in enumerate(("conv1", "bn1"))
            ]
        rows.append(Row(rf"up_tr{width}\.up_conv\.(weight|bias)", rf"backbone.up.{level}.\1"))
    return tuple(rows)


BACKBONE_ROWS: dict[str, tuple[Row, ...]] = {
    "unet": _unet_rows(),
    "swin_unetr": (
        Row(r"out\..+", None, _TASK_HEAD),
        Row(r"((swinViT|encoder\d+|decoder\d)\..+)", r"backbone.net.\1"),
    ),
    "segresnet": (
        Row(r"conv_final\..+", None, _TASK_HEAD),
        Row(r"((convInit|down_layers|up_layers|up_samples)\..+)", r"backbone.net.\1"),
    ),
    "unetpp": (
        Row(r"final_conv_0_\d\..+", None, _TASK_HEAD),
        Row(r"((conv_\d_0|upcat_\d_\d)\..+)", r"backbone.net.\1"),
    ),
}

# One kind of key that only this backbone has.
SIGNATURES = {
    "unet": "down_tr64.",
    "swin_unetr": "swinViT.",
    "segresnet": "convInit.",
    "unetpp": "upcat_0_1.",
}


def convert_state_dict(checkpoint: Mapping[str, Any], features_only: bool = False) -> Converted:
    """Rename the weights of a published checkpoint, whichever layout it has, to ours.

    Accepts weights bare or under one of `WRAPPERS`; with or without the prefixes `module.`,
    `model.`, `_orig_mod.` and `backbone.`, once or several times. Floating-point tensors become
    float32.

    Args:
        checkpoint: What `read_checkpoint` returned.
        features_only: Leave head and prompt embeddings out, whether or not they are there.

    Raises:
        WeightsError: The backbone is not known; a key is unknown, missing or there twice; or a
            tensor has another shape.
    """
    bare = _strip_prefixes(_unwrap(checkpoint))
    backbone = _detect(bare)
    converted: dict[str, Tensor] = {}
    unknown = []
    for (key, in_backbone), tensor in bare.items():
        if not in_backbone and key == "organ_embedding.weight" and not features_only:
            raise WeightsError(
                "This checkpoint was trained with random class embeddings "
                "(organ_embedding.weight, encoding 'rand_embedding'), which no text can reach. "
                "Give a checkpoint trained with 'word_embedding', or load its features only."
            )
        is_head = not in_backbone and key.split(".")[0] in _HEAD_NAMES
        if is_head and features_only:
            continue
        name = _rename(key, HEAD_ROWS if is_head else BACKBONE_ROWS[backbone])
        if name is None:
            unknown.append(key)
        elif name:
            converted[name] = tensor
    if unknown:
        raise WeightsError(
            f"The checkpoint looks like {backbone!r} but has keys that are not in its conversion "
            f"table: {listed(unknown)}."
        )
    embedding = converted.pop("prompt_embedding", None)
    has_head = embedding is not None or any(name.startswith("head.") for name in converted)
    if has_head and (embedding is None or embedding.ndim != 2):
        shape = "is missing" if embedding is None else f"has shape {tuple(embedding.shape)}"
        raise WeightsError(f"organ_embedding (classes, text dimension) {shape} in the checkpoint.")
    controller = converted.get("head.controller.weight")
    if controller is not None:  # published as a 1×1×1 convolution, here a linear layer
        converted["head.controller.weight"] = controller.flatten(1)
    text_dim = embedding.shape[1] if embedding is not None else TEXT_DIM
    check_state(_expected_shapes(backbone, has_head, text_dim), converted, "the checkpoint")
    if embedding is not None:  # a model's state dict has its prompts
        converted["prompt_embedding"] = embedding
    single = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in converted.items()
    }
    return Converted(backbone, single, single.get("prompt_embedding"))


_HEAD_NAMES = frozenset({"precls_conv", "GAP", "text_to_vision", "controller", "organ_embedding"})


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    wrong = [
        f"{key!s:.80}"
        for key, value in checkpoint.items()
        if not isinstance(key, str) or not _is_plain(value)
    ]
    if wrong or not checkpoint:
        what = f"entries that are no plain tensors: {listed(wrong)}" if wrong else "no entries"
        raise WeightsError(
            f"The checkpoint has {what}. Expected a state dict, bare or under "
            f"{', '.join(map(repr, WRAPPERS))}."
        )
    return dict(checkpoint)


def _is_plain(value: object) -> bool:
    """Whether this is a tensor of which each element is stored."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[tuple[str, bool], Tensor]:
    """Key without the prefixes of wrappers and `backbone.`, and whether it was under that."""
    bare: dict[tuple[str, bool], Tensor] = {}
    for key, tensor in state.items():
        short = _PREFIXES.sub("", key)
        name = re.sub(r"^(backbone\.|_orig_mod\.)+", "", short)
        # Flat layouts have the backbone's keys without a prefix; only head names tell them apart.
        place = (name, name != short or name.split(".")[0] not in _HEAD_NAMES)
        if place in bare:
            raise WeightsError(f"Two keys of the checkpoint mean {name!r}; one of them is {key!r}.")
        bare[place] = tensor
    return bare


def _detect(bare: Mapping[tuple[str, bool], Tensor]) -> str:
    names = [name for name, _ in bare]
    for backbone, signature in SIGNATURES.items():
        if any(name.startswith(signature) for name in names):
            return backbone
    if any("dints_space." in name for name in names):
        raise WeightsError(
            "This is a DiNTS checkpoint; its architecture code is not in the weights, so it cannot "
            f"be converted. Backbones that can: {', '.join(SIGNATURES)}."
        )
    if any(name.startswith("head.feature_projection.") for name in names):
        raise WeightsError(
            "These are the bare weights of a universal-ct model, without its configuration and "
            "classes. Save the model by save_pretrained, or build it again: "
            "UniversalModel(config).load_state_dict(…)."
        )
    raise WeightsError(
        f"No known backbone in the checkpoint; its keys start with {listed(names)}. "
        f"Backbones that can be converted: {', '.join(SIGNATURES)}."
    )


def _rename(key: str, rows: tuple[Row, ...]) -> str | None:
    """Our name of a published key, "" if its row drops it, None if no row knows it."""
    for row in rows:
        match = re.fullmatch(row.pattern, key)
        if match:
            return "" if row.target is None else match.expand(row.target)
    return None


@functools.lru_cache(maxsize=8)
def _expected_shapes(backbone: str, has_head: bool, text_dim: int) -> dict[str, tuple[int, ...]]:
    image = without_memory(lambda: build_backbone(backbone, in_channels=1))
    parts: dict[str, nn.Module] = {"backbone": image}
    if has_head:
        sizes = (image.channels[-1], image.full_channels, text_dim)
        parts["head"] = without_memory(lambda: TextDrivenHead(*sizes))
    return {
        f"{part}.{key}": shape
        for part, module in parts.items()
        for key, shape in shapes_of(module).items()
    }


_UNIVERSAL_MODEL = (
    "cc-by-nc-nd-4.0",
    "These weights are published by the authors of the CLIP-Driven Universal Model (Liu et al., "
    "2023) under CC BY-NC-ND 4.0: not for commercial use, and neither they nor this converted "
    "copy may be shared in changed form. They were converted on this machine for its user. "
    "https://github.com/ljwztc/CLIP-Driven-Universal-Model",
)
_SUPREM = (
    "cc-by-nc-nd-4.0",
    "These weights are published by the authors of SuPreM (Li et al., 2024), whose repository is "
    "under CC BY-NC-ND 4.0; see their page for the terms of the weights themselves. "
    "https://github.com/MrGiovanni/SuPreM",
)


def published_config(backbone: str, num_classes: int = len(CLASSES)) -> ModelConfig:
    """Make the configuration of published weights: their classes, prompts and preprocessing.

    Args:
        backbone: `segresnet` is SuPreM's, which has no head: its classes are of no consequence.
        num_classes: Rows of the prompt embedding. Only the published number has known names;
            classes of any other checkpoint are called `class_1`, `class_2` and so on, and have no
            prompt.

    Raises:
        UsageError: No published weights have this backbone.
    """
    if backbone not in BACKBONE_ROWS:
        known = ", ".join(BACKBONE_ROWS)
        raise UsageError(f"No published weights have backbone {backbone!r}. Choose from: {known}.")
    text = TextSpec()
    if num_classes == len(CLASSES):
        classes = tuple(
            ClassSpec(known.name, text.template.format(known.prompt_name), known.parent)
            for known in CLASSES
        )
    else:
        classes = tuple(ClassSpec(f"class_{n}", "") for n in range(1, num_classes + 1))
    licence, notice = _SUPREM if backbone == "segresnet" else _UNIVERSAL_MODEL
    return ModelConfig(
        name=f"universal-ct-{backbone.replace('_', '-')}",
        backbone=backbone,
        classes=classes,
        # Said outright, so that the weights never meet the corrected patch merging.
        backbone_options={"legacy_merging": True} if backbone == "swin_unetr" else {},
        text=text,
        preprocessing=Preprocessing(),
        licence=licence,
        licence_notice=notice,
    )


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read a `.pth`, `.pt` or `.safetensors` file onto the CPU, without running any code in it.

    Args:
        path: The file.

    Returns:
        What it holds: weights, bare or beside what else a training keeps.

    Raises:
        WeightsError: There is no such file, or a web page or a Git LFS pointer in its place; it is
            damaged or cut short; its pickle needs code to run; or it holds no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"No checkpoint at {path}.")
    with path.open("rb") as file:
        is_web_page = file.read(256).lstrip().startswith(b"<")
    if is_web_page:
        raise WeightsError(
            f"{path} is a web page, not weights: the download needed a login or a confirmation. "
            "Open its address in a browser and save the file itself."
        )
    if is_lfs_pointer(path):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not weights. Run git lfs pull, or download."
        )
    _refuse_bomb(path)
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message tells users to switch the protection off; quote only its cause.
        cause = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
        reason = cause.group(1).split(". ")[0] if cause else "its pickle cannot be read"
        if "Unsupported global" in reason or "Unsupported class" in reason:
            raise WeightsError(
                f"{path} holds more than weights: reading it would run code from the file, so it "
                f"was refused ({reason}). Ask its publisher for plain tensors, or save it "
                "again as safetensors on a machine where you trust it."
            ) from error
        raise WeightsError(f"{path} is not a PyTorch checkpoint ({reason}).") from error
    except Exception as error:  # torch, zip and safetensors each have errors of their own for this
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{path} is damaged or cut short ({path.stat().st_size} bytes): "
            f"{first_line.split('. ')[0].rstrip('.')}. Download it again and compare its size or "
            "hash."
        ) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not a dictionary of weights.")
    return loaded


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that is small on disk and unpacks to more than memory holds.

    PyTorch writes its archives without compression: what they hold is as large as the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError):
        return  # another format or version of it, or damaged: its reader says so
    size = path.stat().st_size
    if unpacked > _MOST_UNPACKED * size:
        raise WeightsError(
            f"{path} has {size} bytes and would unpack to {unpacked}: PyTorch does not compress "
            "weights, so this is no checkpoint of its. Get it from its publisher again."
        )


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is what Git LFS leaves in the place of one that it did not fetch."""
    with path.open("rb") as file:
        return file.read(256).lstrip().startswith(b"version https://git-lfs")
