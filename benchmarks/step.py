"""One training step of the embedded network, against the plain MONAI version of the same.

    python benchmarks/step.py [--head text|linear] [--patch 96] [--batch 2] [--record FILE]
        [KEY=VALUE ...]

Ours: the shipped configuration's step: text-driven head on a sample of the voxels, as training
runs it (KEY=VALUE changes it, e.g. precision=bfloat16). Plain: MONAI's DynUNet of the same widths
with the stride-2 stem, the same head on every voxel (or, with --head linear, nothing but one 1×1×1
convolution), the same loss and optimiser, float32, default memory format. Both on the same image,
in alternating rounds. Prints samples per second of both and their ratio. The target is 1.5.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from foundation import CLASSES, keep_freed_memory
from foundation.evaluation import Figure, add_record_option, append_record, new_record
from foundation.networks import TextDrivenHead
from foundation.pretraining import Pretraining, load_config
from foundation.training import accelerator_for, masked_loss

WIDTHS = (24, 48, 96, 192, 256)  # of LiteUNet
TEXT_DIM = 384  # of MiniLM


class PlainMonai(nn.Module):
    """DynUNet computed at half resolution behind a stride-2 stem, as LiteUNet is.

    Args:
        in_channels: Of the image.
        classes: Of the linear head.
        text: Prompt embeddings (K, D) of a text-driven head on every voxel; None: a linear head.
        full: Channels at full resolution.
    """

    def __init__(
        self, in_channels: int, classes: int, text: Tensor | None = None, full: int = 16
    ) -> None:
        super().__init__()
        levels = len(WIDTHS)
        self.net = DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=full,
            kernel_size=[3] * levels,
            strides=[2] * levels,  # the first is the stem
            upsample_kernel_size=[2] * (levels - 1),
            filters=list(WIDTHS),
            norm_name=("INSTANCE", {"affine": True}),
        )
        self.net.output_block = nn.Identity()  # the head takes its place
        self.detail = nn.Conv3d(in_channels, full, 3, padding=1)
        self.full_up = nn.ConvTranspose3d(WIDTHS[0], full, 2, stride=2)
        self.linear = nn.Conv3d(full, classes, 1) if text is None else None
        self.head = TextDrivenHead(WIDTHS[-1], full, TEXT_DIM, standardise_text=True)
        self.text = text

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (B, K, X, Y, Z) of an image (B, C, X, Y, Z)."""
        deep: list[Tensor] = []
        kept = self.net.bottleneck.register_forward_hook(lambda *given: deep.append(given[2]))
        full = self.full_up(self.net(image)) + self.detail(image)
        kept.remove()
        if self.linear is not None:
            return self.linear(full)
        return self.head(full, self.head.generate(deep[0], self.text))


def plain_step(network: PlainMonai, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Make the training step of the plain version; the targets of `batch` hold every voxel."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = network(batch["image"]).flatten(2)
        terms = masked_loss(logits, batch["target"], batch["annotated"], batch["weight"])
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def random_batch(size: int, batch: int, channels: int, voxels: int) -> dict[str, Tensor]:
    """Make a batch of noise in which every class has some voxels.

    Args:
        size: Voxels along each axis.
        batch: Samples.
        channels: Of the image.
        voxels: How many voxels of each sample have targets.
    """
    generator = torch.Generator().manual_seed(0)
    count = size**3
    label = torch.randint(4 * len(CLASSES), (batch, count), generator=generator)
    chosen = torch.stack(
        [torch.randperm(count, generator=generator)[:voxels] for _ in range(batch)]
    )
    if voxels >= count:
        chosen = torch.arange(count).expand(batch, -1)
    label = label.gather(1, chosen)
    target = torch.stack([label == channel for channel in range(len(CLASSES))], 1)
    return {
        "image": torch.rand(batch, channels, size, size, size, generator=generator),
        "voxels": chosen,
        "target": target,
        "annotated": torch.ones(batch, len(CLASSES), dtype=torch.bool),
        "weight": torch.ones(batch, chosen.shape[1]),
        "source": torch.zeros(batch, dtype=torch.long),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--head", choices=("text", "linear"), default="text", help="of plain MONAI")
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of each round")
    parser.add_argument("--rounds", type=int, default=10)
    add_record_option(parser)
    given = parser.parse_intermixed_args()
    began = time.perf_counter()

    # No source is drawn from, as the batch is made here; nor is there a store to hold cases out of.
    nothing = ["sources=[{kind: phantoms}]", "stages=[{steps: 1000}]", "validation.hold_out=[]"]
    config = load_config("universal-ct", [*nothing, *given.overrides])
    channels = len(config.model.hu_windows)
    sampled = config.loss.sample_voxels or given.patch**3
    ours = random_batch(given.patch, given.batch, channels, sampled)
    every = random_batch(given.patch, given.batch, channels, given.patch**3)
    with tempfile.TemporaryDirectory() as folder:
        run = Pretraining(config, accelerator_for(config.precision, "cpu"), Path(folder))
        trainer = run.trainer(progress=False)
    text = torch.randn(len(CLASSES), TEXT_DIM) if given.head == "text" else None
    plain = PlainMonai(channels, len(CLASSES), text)
    steps = {
        "universal-ct": lambda: trainer.train_step([ours]),
        "plain MONAI": plain_step(plain, every),
    }
    keep_freed_memory()  # as `pretrain` does on a CPU; both versions profit
    for step in steps.values():
        step()  # allocates memory and chooses kernels
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _, (name, step) in itertools.product(range(given.rounds), steps.items()):
        start = time.perf_counter()
        for _ in range(given.steps):
            step()
        rates[name].append(given.steps * given.batch / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    parameters = {
        "universal-ct": sum(p.numel() for p in run.network.parameters()),
        "plain MONAI": sum(p.numel() for p in plain.parameters()),
    }
    report = {
        "patch_size": given.patch,
        "batch_size": given.batch,
        "plain_head": given.head,
        "overrides": given.overrides,
        "parameters": parameters,
        "samples_per_second": {name: round(value, 4) for name, value in medians.items()},
        "ratio": round(medians["universal-ct"] / medians["plain MONAI"], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))
    if given.record:
        figures = [
            Figure("ours", medians["universal-ct"], "samples/s", n=given.rounds),
            Figure("monai", medians["plain MONAI"], "samples/s", n=given.rounds),
            Figure("ratio", medians["universal-ct"] / medians["plain MONAI"]),
        ]
        arm = {"precision": config.precision, "patch": f"{given.patch}³ voxels", "head": given.head}
        seconds = time.perf_counter() - began
        append_record(
            given.record, new_record("step", "real", arm=arm, figures=figures, seconds=seconds)
        )


if __name__ == "__main__":
    main()
