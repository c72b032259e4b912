"""Table 14: which text encoder should embed the names of the classes?

    python benchmarks/table14_embeddings.py --smoke
    python benchmarks/table14_embeddings.py --mini
    python benchmarks/table14_embeddings.py 01=BTCV 04=LiTS 05=KiTS … -o OUT     # real data

Protocol
- Data. Real: the paper's datasets, as many as are given. Generated: ten partly labelled ones.
- Split. Real: fold 0 of five is held out and measured, with the last weights. Generated: 24
  scans of other bodies, with all classes labelled.
- Arms: one-hot vectors, MiniLM, CLIP ViT-B/32, BioBERT, BioLinkBERT; each embeds the same
  sentence, the paper's V3. MiniLM is ours and not the paper's.
- An encoder whose weights cannot be had here is named and left out; in the real size that is an
  error without --skip-missing. Only MiniLM comes with the package; the others are fetched from the
  Hugging Face Hub. HF_HUB_OFFLINE=1 spares the attempts where there is no network.
- How the embeddings enter is the same in all arms. Real: as they are, as in the paper. Generated:
  centred and scaled to mean square 1, one-hot vectors too. Otherwise the class signal of one arm
  would be several times as strong at the start, and the result would show this instead.
- Network, data, steps and seeds are the same in all arms.
- Metric: Dice of each class where a scan shows it, on the scan's own grid; the mean over scans,
  then over classes.
- Statistic: differences from one-hot on the same scans, with a bootstrap over seeds and scans.
- Paper: it found CLIP to be the best (grade 2). Its numbers are unknown (U), and so is which output
  of the BERT encoders it took; here it is that of the first token.

Hardware. Real: each arm is one pretraining with the paper's settings; the paper had 8 × RTX A5000;
pretraining_cost.py projects the hours. Mini: two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterable

from encoders import ENCODERS, ONE_HOT, add_arguments, at_hand
from lab import Lab, run_script
from plots import bars, by_seed
from runs import Run
from sizes import plans

from foundation import CLASSES
from foundation.evaluation import Figure


def measure(run: Run) -> Iterable[Figure]:
    """Train with one kind of embedding and measure."""
    return run.pretrain_and_score({"model.text": ENCODERS[str(run.arm["text"])]})


def main() -> None:
    """Run all arms, compare them, draw the picture."""
    every = {"text": list(ENCODERS)}
    sizes = plans(smoke={"text": [ONE_HOT, "MiniLM"]}, mini=every, real=every)
    lab = Lab.parse(__doc__, sizes, add_arguments)
    names = at_hand(lab, lab.plan.options["text"])
    for arm in lab.arms({"text": names}):
        lab.measure(arm, measure)
    if ONE_HOT in names:
        for name in names:
            if name != ONE_HOT:
                question = f"Do text embeddings help ({name} against one-hot)?"
                lab.verdict(question, {"text": name}, {"text": ONE_HOT})
    rows = {"mean": "mean", **{each.name: each.display for each in CLASSES}}
    groups = {
        title: {name: by_seed(lab.records(), f"dice/{row}", {"text": name}) for name in names}
        for row, title in rows.items()
    }
    groups = {title: group for title, group in groups.items() if any(group.values())}
    lab.finish([bars(lab.output / "dice.png", groups, "Dice", "Text encoders")])


if __name__ == "__main__":
    run_script(main)
