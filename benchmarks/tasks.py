"""The six CT tasks of the Decathlon that the paper measures, and generated datasets like them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task: what its dataset labels, and a network for it alone would learn.

    Attributes:
        title: In words.
        dataset: Id of the real dataset.
        generated: Name of the world's dataset.
        classes: Organ and tumour.
    """

    title: str
    dataset: str
    generated: str
    classes: tuple[str, ...]


TASKS = (
    Task("liver", "10_03", "liver", ("liver", "liver_tumor")),
    Task("pancreas", "10_07", "pancreas", ("pancreas", "pancreas_tumor")),
    Task("hepatic vessel", "10_08", "vessels", ("hepatic_vessel", "hepatic_vessel_tumor")),
    Task("lung", "10_06", "lung", ("lung_tumor",)),
    Task("spleen", "10_09", "abdomen", ("spleen",)),
    Task("colon", "10_10", "colon", ("colon_tumor",)),
)
CLASSES = tuple(name for task in TASKS for name in task.classes)
