"""The smallest universal model, with classes and adapters added, for tests around the network."""

import torch

from foundation.adapting.adapters import add_adapter
from foundation.adapting.classes import add_classes
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


def grown(kind: str, *names: str) -> UniversalModel:
    """The tiny model with added classes."""
    model = tiny_model()
    grow(model, kind, *names)
    return model


def grow(model: UniversalModel, kind: str, *names: str) -> None:
    seed = sum(map(ord, "".join(names)))
    rows = torch.randn(len(names), 8, generator=torch.Generator().manual_seed(seed))
    specs = [ClassSpec(name, f"A CT of a {name}") for name in names]
    add_classes(model, specs, kind=kind, embeddings=rows)  # type: ignore[arg-type]


def train(model: UniversalModel, seed: int = 0) -> None:
    """As if what asks for gradients had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def adapted(kind: str = "head", seed: int = 0) -> UniversalModel:
    """A model with the trained adapter "spine", which brings two classes."""
    model = grown(kind, "L1", "L2")
    add_adapter(model, "spine", seed=seed)
    train(model, seed)
    return model


def with_adapter(base: UniversalModel, name: str = "spine") -> UniversalModel:
    """A model with a trained adapter, which brings a class."""
    grow(base, "head", "L1")
    add_adapter(base, name)
    train(base)
    return base
