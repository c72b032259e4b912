"""The smallest universal model, for tests of everything around the network."""

import torch

from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.model import UniversalModel


def tiny_model(seed: int = 0, name: str = "tiny", licence: str = "apache-2.0") -> UniversalModel:
    """Three classes, 8-dimensional prompts, random weights that depend on `seed` alone."""
    config = ModelConfig(
        name=name,
        backbone="lite_unet",
        backbone_options={"widths": [16, 16, 16], "full": 16},
        classes=(
            ClassSpec("liver", "A CT of a liver"),
            ClassSpec("spleen", "A CT of a spleen"),
            ClassSpec("liver_tumor", "A CT of a liver tumor", "liver"),
        ),
        text=TextSpec(encoder="hf:tests/none", template="A CT of a {}", pooling="mean", dim=8),
        preprocessing=Preprocessing(patch_size=(16, 16, 16)),
        licence=licence,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UniversalModel(config, torch.randn(3, 8)).eval()


def logits(model: UniversalModel) -> torch.Tensor:
    """(1, 3, 16, 16, 16) for one fixed input."""
    image = torch.linspace(0, 1, 16**3).view(1, 1, 16, 16, 16)
    with torch.no_grad():
        result: torch.Tensor = model(image)
    return result
