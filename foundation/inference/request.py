"""What a result is made with: two results are the same if this is, and the CT."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foundation import __version__
from foundation.files import file_sha256
from foundation.imaging.result import check_layout
from foundation.inference.predict import inference_options, resolve_classes

if TYPE_CHECKING:
    from foundation.imaging.result import Layout
    from foundation.imaging.sidecar import Sidecar
    from foundation.networks.protocol import Network

# The same weights on another device give the same result but for rounding.
_FREE = {"device"}


@dataclass(frozen=True)
class Request:
    """What a CT is segmented with; everything that a result depends on, but the CT.

    Attributes:
        model: Name of the model.
        model_sha256: Of its weights, see `weights_sha256`.
        classes: What is asked for.
        options: As in the sidecar, without the device.
        universal_ct: Version of the package.
    """

    model: str
    model_sha256: str
    classes: tuple[str, ...]
    options: Mapping[str, Any]
    universal_ct: str = __version__

    @classmethod
    def of(
        cls,
        network: Network,
        *,
        classes: str | Sequence[str] | None = None,
        overlap: float | None = None,
        postprocess: bool = True,
        layout: Layout = "multilabel",
        preview: bool = False,
    ) -> Request:
        """Return the request that these arguments of `segment_volume` and `save` stand for.

        Raises:
            UsageError: A class or an option is unknown.
        """
        check_layout(layout)
        config = network.config
        written = {"layout": layout, "preview": preview}
        return cls(
            model=config.name,
            model_sha256=weights_sha256(network),
            classes=tuple(resolve_classes(classes, config.class_names)),
            options={
                "threshold": config.preprocessing.threshold,
                **written,
                **inference_options(config, overlap, postprocess),
            },
        )

    def difference(self, made: Sidecar, ct: Path) -> str | None:
        """Tell in what a result differs from what this request would make of a CT.

        The CT is compared by its content, and last: its size and its date cannot show that it was
        replaced.

        Args:
            made: The sidecar of the result.
            ct: The CT.

        Returns:
            The end of a sentence, "with other weights"; None where the result is the same.

        Raises:
            OSError: The CT cannot be read.
        """
        classes = {label.name for label in made.labels.values()}
        if made.model_sha256 != self.model_sha256:
            same_name = made.model == self.model
            return "with other weights" if same_name else f"with the model {made.model}"
        if classes != set(self.classes):
            return f"with other classes ({len(classes)}, not the {len(self.classes)} asked for)"
        options = {name: value for name, value in made.options.items() if name not in _FREE}
        for name in [*self.options, *(name for name in options if name not in self.options)]:
            had, asked = options.get(name), self.options.get(name)
            if name == "settings_sha256" and had != asked:
                return "with other settings of the model (config.json)"
            if had != asked:
                return f"with {name} {had!r} instead of {asked!r}"
        if made.universal_ct != self.universal_ct:
            return f"by version {made.universal_ct} instead of {self.universal_ct}"
        if made.ct_sha256 is None:
            return "without a note of the CT's content"
        return None if made.ct_sha256 == file_sha256(ct) else "from a CT with another content"


def weights_sha256(network: Network) -> str:
    """Return the SHA-256 of a network's weights.

    Args:
        network: Any network.

    Returns:
        That of the file that they came from, where the network knows it; otherwise of the names,
        types and values of the tensors in its state.
    """
    known: str | None = getattr(network, "weights_sha256", None)
    if known:
        return known
    state = network.state_dict() if isinstance(network, torch.nn.Module) else {}
    tensors = state or {str(place): each for place, each in enumerate(network.parameters())}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, torch.Tensor):  # what a module keeps besides, as text or numbers
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        if values.numel():
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
