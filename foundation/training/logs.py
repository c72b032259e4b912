"""The log of a run: rows of CSV, one line of progress, TensorBoard if wanted."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from foundation.errors import MissingExtraError
from foundation.files import replacing

_SECONDS_A_LINE = 60.0  # between lines in a file, where no bar is drawn


class Tally:
    """Sums since the last row: of the loss's terms, and of the whole loss by source.

    They are kept on the training device, so that a step waits for nothing.

    Args:
        terms: Names of the loss's terms.
        sources: Names of the sources.
        device: Where the training computes.
    """

    def __init__(self, terms: Sequence[str], sources: Sequence[str], device: torch.device) -> None:
        self.terms, self.sources = list(terms), list(sources)
        # Rows: sums and counts; columns: terms, norm, then sources.
        width = len(self.terms) + 1 + len(self.sources)
        self.sums = torch.zeros(2, width, dtype=torch.float32, device=device)

    def add_losses(self, terms: Mapping[str, Tensor], source: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            terms: Weighted terms of the loss, (B,) each.
            source: Index of each scan's source, (B,); None where losses are not told by source.
        """
        losses = torch.stack([terms[name].detach().float() for name in self.terms])
        self.sums[0, : len(losses)] += losses.sum(1)
        self.sums[1, : len(losses)] += losses.shape[1]
        if source is None:
            return
        columns = source.to(self.sums.device) + len(self.terms) + 1
        self.sums[0].index_add_(0, columns, losses.sum(0))
        self.sums[1].index_add_(0, columns, torch.ones_like(losses[0]))

    def add_norm(self, norm: Tensor) -> None:
        """Take in the norm of one step's gradient."""
        self.sums[0, len(self.terms)] += norm.detach().float()
        self.sums[1, len(self.terms)] += 1

    def row(self, sums: Tensor) -> dict[str, float | None]:
        """Return means of the `sums` of all processes; None for sources that were never drawn."""
        names = [*self.terms, "norm", *(f"loss/{name}" for name in self.sources)]
        totals, counts = sums.tolist()
        means = {
            name: total / count if count else None
            for name, total, count in zip(names, totals, counts, strict=True)
        }
        loss = sum(means[name] or 0.0 for name in self.terms)
        return {"loss": loss, **means}

    def clear(self) -> None:
        """Start the next row."""
        self.sums.zero_()


class Table:
    """A CSV file with a row for some of the steps, which a resumed run continues.

    Args:
        path: Of the file.
        columns: Its columns, after that of the step.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, ["step", *columns]

    def continue_from(self, step: int) -> None:
        """Drop the rows after `step`: that part of the run is done again."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            # A row that a kill cut off is after the last checkpoint too.
            rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
        kept = [row for row in rows if int(row["step"]) <= step and None not in row.values()]
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(kept)

    def append(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a row; what is None stays empty."""
        is_new = not self.path.is_file()
        text = {name: "" if value is None else f"{value:.6g}" for name, value in values.items()}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if is_new:
                writer.writeheader()
            writer.writerow({"step": step, **text})


def bar(
    items: Iterable[Any] | None = None, *, shown: bool = True, **options: Any
) -> Any:  # tqdm's types differ between terminal and notebook
    """Return tqdm's progress bar for a terminal or a notebook; nothing is drawn into a file.

    Args:
        items: What is counted, if anything.
        shown: Whether a bar is wanted at all.
        options: Of tqdm.
    """
    return tqdm(items, disable=not (shown and draws_bars()), **options)


def draws_bars() -> bool:
    """Return whether there is a terminal or a notebook to draw bars in."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Progress:
    """How far a run is: a bar, or a line now and then where standard error is no terminal.

    Args:
        title: Of the bar.
        first: Steps that are done already.
        steps: All steps.
        shown: Whether anything is shown.
    """

    def __init__(self, title: str, first: int, steps: int, shown: bool) -> None:
        self.bar = bar(shown=shown, initial=first, total=steps, desc=title, unit="step")
        self.title, self.steps, self.done = title, steps, first
        self.writes_lines = shown and not draws_bars()
        self.next_line = time.monotonic() + _SECONDS_A_LINE

    def step(self) -> None:
        """One more step is done."""
        self.bar.update()
        self.done += 1

    def show(self, row: Mapping[str, float | None]) -> None:
        """Show the losses of a row of the log."""
        losses = {k.removeprefix("loss/"): v for k, v in row.items() if k.startswith("loss")}
        self.note(" ".join(f"{name} {value:.3f}" for name, value in losses.items() if value))

    def note(self, text: str) -> None:
        """Show a few words beside the bar."""
        self.bar.set_postfix_str(text)
        if self.writes_lines and (self.done == self.steps or time.monotonic() >= self.next_line):
            print(f"{self.title}: step {self.done} of {self.steps}, {text}", file=sys.stderr)
            self.next_line = time.monotonic() + _SECONDS_A_LINE

    def close(self) -> None:
        """Leave the line as it is."""
        self.bar.close()


class Board:
    """TensorBoard events; does nothing where they are not wanted.

    Args:
        folder: Of the events; None for none.
        first: The step at which a resumed run goes on.

    Raises:
        MissingExtraError: They are wanted and tensorboard is not installed.
    """

    def __init__(self, folder: Path | None, first: int = 0) -> None:
        self.writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "logging.tensorboard is true, but tensorboard is not installed: "
                "pip install 'universal-ct[train]', or set it to false."
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def write(self, step: int, values: Mapping[str, float | None], prefix: str = "train") -> None:
        """Write one row as scalars."""
        if self.writer is not None:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.close()
