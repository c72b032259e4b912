"""Table 1: does the sentence that names a class matter? One-hot, V1, V3 and your own sentences.

    python benchmarks/table1_prompts.py --smoke
    python benchmarks/table1_prompts.py --mini
    python benchmarks/table1_prompts.py 01=BTCV 04=LiTS 05=KiTS … -o OUT     # real data
    … --template "an abdominal CT that shows a {}"

Protocol
- Data. Real: the paper's datasets, as many as are given. Generated: ten partly labelled ones.
- Split. Real: fold 0 of five is held out and measured, with the last weights. Generated: 24
  scans of other bodies, with all classes labelled.
- Arms: one-hot; V1 "A photo of a [CLS]."; V3 "A computerized tomography of a [CLS]"; each
  --template. The paper's V2 is not known and is left out.
- Text encoder. Real: CLIP ViT-B/32, as in the paper. Mini: MiniLM, which needs no download. So the
  mini size asks whether the sentence matters. It cannot say anything about CLIP.
- MiniLM's embeddings are centred by the mean of the prompt bank, whose sentences are V3's. Of V1
  they keep a larger common part, so that V1 has this small disadvantage beside its words.
- Network, data, steps and seeds are the same in all arms.
- Metric: Dice of each class where a scan shows it, on the scan's own grid; the mean over scans,
  then over classes.
- Statistic: differences on the same scans, with a bootstrap over seeds and scans.
- Paper: it found V3 to be the best (grade 2). Its numbers are unknown (U).

Hardware. Real: each arm is one pretraining with the paper's settings; pretraining_cost.py projects
its hours on your machine, and the paper had 8 × RTX A5000. Mini: two CPU cores.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from lab import Lab, run_script
from plots import bars, by_seed
from runs import Run
from sizes import plans

from foundation import CLASSES
from foundation.evaluation import Figure

ONE_HOT = "one-hot"
TEMPLATES: Mapping[str, str | None] = {
    "V1": "A photo of a {}.",
    "V3": None,
}  # None: the package's own, which is V3


def add_arguments(parser: ArgumentParser) -> None:
    """Add the user's own sentences."""
    parser.add_argument("--template", action="append", default=[], metavar="TEXT with {}")


def measure(run: Run, templates: Mapping[str, str | None]) -> Iterable[Figure]:
    """Train with one kind of prompt and measure."""
    changes: dict[str, Any] = {} if run.lab.generated else {"model.text": "clip"}
    template = templates.get(name := str(run.arm["prompt"]))
    if name == ONE_HOT:
        changes["model.text"] = "one-hot"
    elif template is not None:
        prompts = [{"name": c.name, "prompt": template.format(c.term)} for c in CLASSES]
        changes["model.classes"] = prompts
    return run.pretrain_and_score(changes)


def main() -> None:
    """Run all arms, compare them, draw the picture."""
    lab = Lab.parse(__doc__, plans(), add_arguments, axes=["template"])
    templates = {**TEMPLATES, **{text: text for text in lab.given.template}}
    for arm in lab.arms({"prompt": [ONE_HOT, *templates]}):
        lab.measure(arm, partial(measure, templates=templates))
    v1, v3, one_hot = ({"prompt": name} for name in ("V1", "V3", ONE_HOT))
    lab.verdict("Does the sentence matter (V3 against V1)?", v3, v1)
    lab.verdict("Do text embeddings help (V3 against one-hot)?", v3, one_hot)
    groups = {
        name: {"Dice": by_seed(lab.records(), "dice/mean", {"prompt": name})}
        for name in (ONE_HOT, *templates)
    }
    picture = bars(lab.output / "dice.png", groups, "mean Dice", "Prompts")
    lab.finish([picture])


if __name__ == "__main__":
    run_script(main)
