"""What the scripts of the paper's tables share: sizes, data, training, records, verdicts.

    lab = Lab.parse(__doc__, PLANS)
    for text in lab.arms({"text": ["one-hot", "minilm"]}):
        lab.measure(text, run_one)      # run_one(run: Run) -> Iterable[Figure], once for each seed
    lab.verdict("Text or one-hot?", {"text": "minilm"}, {"text": "one-hot"})
    lab.finish()

A script has three sizes, which take one code path. `--smoke`: seconds, on a tiny generated world.
`--mini`: minutes to hours on a CPU, on a generated world, with reduced networks and patches. The
real run takes the paths of the datasets: `04=/data/LiTS 05=/data/KiTS`.

OUT receives records.jsonl (a line for each arm and seed), cases.csv (every class in every scan),
scores/ and a folder for each training. Started again, it goes on where it stopped. `--publish` puts
records, cases and pictures beside the scripts, from where the tables are rendered.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from experiment_data import Data
from numpy.typing import ArrayLike
from runs import MAIN_PROCESS, Arm, Run, slug
from sizes import Plan
from verdicts import verdict_text

from foundation import (
    UniversalCTError,
    UsageError,
    from_pretrained,
    replacing,
)
from foundation.evaluation import (
    Figure,
    Record,
    Scores,
    append_record,
    git_commit,
    new_record,
    paired_bootstrap,
    read_records,
)

HERE = Path(__file__).resolve().parent
RECORDS, PICTURES = HERE / "records", HERE / "pictures"


class Lab:
    """One experiment in one size: its data, its records and what they say.

    Attributes:
        name: Of the script.
        size: "smoke", "mini" or "real".
        plan: What the size means.
        output: Folder of everything that is made.
        given: All command line arguments.
        data: What is trained on and measured.
    """

    def __init__(
        self,
        name: str,
        size: str,
        plan: Plan,
        given: argparse.Namespace,
        *,
        reads_data: bool = True,
        prepares: bool = True,
    ) -> None:
        self.name, self.size, self.plan, self.given = name, size, plan, given
        self.output: Path = given.output or Path("runs") / "benchmarks" / f"{name}-{size}"
        self.output.mkdir(parents=True, exist_ok=True)
        self.data = Data(size, self.output, given, reads=reads_data, prepares=prepares)
        self.seeds: tuple[int, ...] = tuple(given.seeds or plan.seeds)
        self.verdicts: list[Record] = []
        self.commit = git_commit()  # of what runs, whatever is checked out before it ends

    # --- the command line -------------------------------------------------------------------------

    @classmethod
    def parse(
        cls,
        doc: str,
        sizes: Mapping[str, Plan],
        add: Callable[[argparse.ArgumentParser], None] | None = None,
        argv: Sequence[str] | None = None,
        *,
        axes: Sequence[str] = (),
        reads_data: bool = True,
        prepares: bool = True,
    ) -> Lab:
        """Read the command line.

        Args:
            doc: The script's docstring, which --help shows.
            sizes: "smoke", "mini" and "real" → plan.
            add: Adds the script's own arguments.
            argv: In place of `sys.argv[1:]`.
            axes: The script's own arguments that only choose arms. A folder with records of other
                arms is gone on with; one with records of other arguments is refused.
            reads_data: Whether the experiment is about data at all. One that only measures what
                networks cost has a real size without any, and no hashes.
            prepares: Whether the data are prepared as one store, by whose manifest they are known;
                else each folder is hashed as it is.

        Returns:
            The lab.
        """
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        size = parser.add_mutually_exclusive_group()
        size.add_argument("--smoke", action="store_true", help="seconds, on generated data")
        size.add_argument("--mini", action="store_true", help="on a CPU, on generated data")
        arg = parser.add_argument
        arg("data", nargs="*", metavar="ID=DIR", help="datasets to train on, and their folders")
        arg("--test", nargs="+", default=[], metavar="ID=DIR", help="datasets to measure on only")
        arg("--store", type=Path, help="of `universal-ct prepare`; made in OUT if not given")
        arg("-o", "--output", type=Path, metavar="OUT", help="default: runs/benchmarks/NAME-SIZE")
        arg("--seeds", nargs="+", type=int, help="in place of the plan's")
        arg("--max-steps", type=int, help="no training takes more steps than these: to try it out")
        arg("--only", nargs="+", default=[], metavar="KEY=VALUE", help="run these arms alone")
        text = "a setting of the training, e.g. stages.0.batch_size=1; may be given again"
        arg("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help=text)
        arg("--publish", action="store_true", help="put records and pictures beside the scripts")
        arg("--gpu", action="store_true", help="mini on a GPU where there is one")
        if add is not None:
            add(parser)
        given = parser.parse_args(argv)
        name = "smoke" if given.smoke else "mini" if given.mini else "real"
        if reads_data and name == "real" and not (given.data or given.store or given.test):
            parser.error("give the datasets as ID=DIR, or --mini, or --smoke")
        script = Path(getattr(sys.modules["__main__"], "__file__", None) or "lab").stem
        title = getattr(given, "name", None) or script
        lab = cls(title, name, sizes[name], given, reads_data=reads_data, prepares=prepares)
        lab._keep_plan({*_FREE, *axes})
        return lab

    def _keep_plan(self, free: set[str]) -> None:
        """Refuse a folder with records of another plan, of other data or of other weights."""
        path = self.output / "plan.json"
        given = {key: value for key, value in vars(self.given).items() if key not in free}
        plan = {key: value for key, value in asdict(self.plan).items() if key != "seeds"}
        mine = {"benchmark": self.name, "size": self.size, **plan}
        mine |= {f"--{key.replace('_', '-')}": value for key, value in given.items()}
        mine = json.loads(json.dumps(mine, default=str))
        if path.is_file() and MAIN_PROCESS:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if differing := sorted(k for k in mine if mine[k] != theirs.get(k)):
                raise UsageError(
                    f"{self.output} holds a run that differs in {', '.join(differing)}; "
                    "give another folder by -o, or delete it."
                )
        elif MAIN_PROCESS:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")

    # --- what it uses ----------------------------------------------------------------------------

    @property
    def generated(self) -> bool:
        """Whether the data are generated."""
        return self.data.generated

    @cached_property
    def model(self) -> Any:
        """The model that `-m` names, where the script takes one; None where it trains its own."""
        name = getattr(self.given, "model", None)
        return None if name is None else from_pretrained(name)

    @property
    def weights(self) -> dict[str, str]:
        """Name → SHA-256 of the model that `-m` names, for the records."""
        if self.model is None or self.model.weights_sha256 is None:  # of a bare checkpoint
            return {}
        return {self.model.config.name: self.model.weights_sha256}

    # --- arms and their runs ----------------------------------------------------------------------

    def arms(self, axes: Mapping[str, Sequence[str | int | float]]) -> Iterator[Arm]:
        """Yield every combination of what is varied; those that `--only` names, where it is given.

        Args:
            axes: What is varied → its values.
        """
        wanted = dict(text.split("=", 1) for text in self.given.only)
        if unknown := sorted(wanted.keys() - axes.keys()):
            raise UsageError(f"--only names {', '.join(unknown)}; arms have {', '.join(axes)}.")
        for values in itertools.product(*axes.values()):
            arm = dict(zip(axes, values, strict=True))
            if all(str(arm[key]) == value for key, value in wanted.items()):
                yield arm

    def measure(
        self,
        arm: Arm,
        function: Callable[[Run], Iterable[Figure]],
        *,
        seeds: Sequence[int | None] | None = None,
        weights: Mapping[str, str] | None = None,
        note: str = "",
    ) -> None:
        """Run an arm with each seed and record what it gave; finished runs are left alone.

        Args:
            arm: What is varied → its value here.
            function: Trains, measures and returns the figures.
            seeds: In place of the lab's.
            weights: Name → SHA-256 of pretrained weights that it uses.
            note: For the record.
        """
        for seed in self.seeds if seeds is None else seeds:
            if self._is_done(arm, seed, weights or {}):
                continue
            if MAIN_PROCESS:
                print(f"{self.name}: {_text(arm)}, seed {seed}", file=sys.stderr)
            run = Run(self, arm, seed)
            started = time.monotonic()
            figures = tuple(function(run))
            if not MAIN_PROCESS:
                continue
            record = new_record(
                self.name,
                self.size,  # type: ignore[arg-type]
                arm=arm,
                seed=seed,
                figures=figures,
                seconds=time.monotonic() - started,
                data=self.data.hashes,
                weights=weights,
                note=" ".join([*([note] if note else []), *run.notes]),
            )
            append_record(self.output / "records.jsonl", replace(record, commit=self.commit))

    def _is_done(self, arm: Arm, seed: int | None, weights: Mapping[str, str]) -> bool:
        """Whether a run has its record.

        Raises:
            UsageError: It has one of other data or other weights.
        """
        record = self.record(arm, seed)
        if record is None:
            return False
        other = "data" if dict(record.data) != self.data.hashes else "weights"
        if other == "data" or dict(record.weights) != dict(weights):
            raise UsageError(
                f"{self.output} has a record of {_text(arm)}, seed {seed}, with other {other}: by "
                "their SHA-256 they were changed. Give another folder by -o, or delete it."
            )
        return True

    def records(self) -> list[Record]:
        """Return what has been recorded."""
        path = self.output / "records.jsonl"
        return read_records(path) if path.is_file() else []

    def record(self, arm: Arm, seed: int | None) -> Record | None:
        """Return the record of a finished run; None before."""
        same = (r for r in self.records() if dict(r.arm) == dict(arm) and r.seed == seed)
        return next(same, None)

    def scores(self, arm: Arm, seed: int | None, name: str = "test") -> Scores:
        """Read the scores that a run kept; "*" for all of them together."""
        path = self.scores_file(arm, seed, name)
        return Scores.joined(Scores.read(each) for each in sorted(path.parent.glob(path.name)))

    def scores_file(self, arm: Arm, seed: int | None, name: str) -> Path:
        """Return where a run keeps scores."""
        return self.output / "scores" / f"{slug(arm)}-{seed}-{name}.json"

    # --- what it all says -------------------------------------------------------------------------

    def verdict(
        self,
        question: str,
        first: Arm,
        second: Arm,
        *,
        classes: Sequence[str] | None = None,
        scores: str = "test",
    ) -> None:
        """Compare two arms over the same scans and seeds, and record the answer in words.

        There is no verdict where the better arm stays below Dice 0.5: the run was too small then.

        Args:
            question: What is asked.
            first: An arm.
            second: The arm it is compared with.
            classes: The mean is over these. If not given: in the generated sizes over the large
                organs, in the real one over all that were measured.
            scores: Name of the scores; "*" for all of them together.
        """
        for arm in (first, second):
            if any(self.record(arm, seed) is None for seed in self.seeds):
                print(f"{question} Not asked: {_text(arm)} was not run with every seed.")
                return
        both = [[self.scores(arm, seed, scores) for seed in self.seeds] for arm in (first, second)]
        known = list(dict.fromkeys(n for each in both for s in each for n in s.classes))
        if classes is None:
            classes = (self.data.world.large_organs if self.generated else None) or known
        names = [name for name in classes if name in known] or known
        cases = list(dict.fromkeys(case for each in both for s in each for case in s.cases))
        a, b = (np.stack([s.table(names, "dice", cases) for s in each]) for each in both)
        self.compare(question, first, second, a, b)

    def compare(
        self,
        question: str,
        first: Arm,
        second: Arm,
        a: ArrayLike,
        b: ArrayLike,
        *,
        what: str = "Dice",
        dice: float | None = None,
    ) -> None:
        """Compare two arms by values of the same scans and seeds, and record the answer in words.

        Args:
            question: What is asked.
            first: An arm.
            second: The arm it is compared with.
            a, b: Values of the first and of the second, as `paired_bootstrap` takes them.
            what: Was measured; more of it is better.
            dice: Of the better arm, where something else was measured.
        """
        found = paired_bootstrap(a, b)
        interval = found.interval or (None, None)
        figures = (
            Figure("difference", found.mean, low=interval[0], high=interval[1], n=found.pairs),
            Figure("smallest difference", found.smallest),
            Figure("first", found.first, n=found.pairs),
            Figure("second", found.second, n=found.pairs),
        )
        verdict = new_record(
            self.name,
            self.size,  # type: ignore[arg-type]
            arm={"verdict": question, "first": _text(first), "second": _text(second)},
            figures=figures,
            seconds=0.0,
            data=self.data.hashes,
            note=verdict_text(found, _text(first), _text(second), what, dice),
        )
        self.verdicts.append(verdict)
        print(f"{question} {verdict.note}")

    def finish(self, pictures: Iterable[Path] = ()) -> None:
        """Write cases.csv, say where everything is, and publish if asked.

        Args:
            pictures: Files in OUT that are published too.
        """
        if not MAIN_PROCESS:
            return
        cases = self._write_cases()
        print(f"{self.output / 'records.jsonl'}: {len(self.records())} records")
        if not self.given.publish:
            return
        if self.size == "smoke":
            raise UsageError(
                "A smoke run shows that a script works; its numbers are not published."
            )
        RECORDS.mkdir(exist_ok=True)
        PICTURES.mkdir(exist_ok=True)
        target = RECORDS / f"{self.name}.jsonl"
        kept = read_records(target) if target.is_file() else []
        with replacing(target) as temporary:
            for record in [r for r in kept if r.size != self.size] + self.records() + self.verdicts:
                append_record(temporary, record)
        if cases is not None:
            shutil.copyfile(cases, RECORDS / f"{self.name}-{self.size}-cases.csv")
        several = len(drawn := list(pictures)) > 1
        for picture in drawn:
            title = f"-{picture.stem}" if several else ""
            shutil.copyfile(picture, PICTURES / f"{self.name}-{self.size}{title}{picture.suffix}")

    def _write_cases(self) -> Path | None:
        rows: list[dict[str, Any]] = []
        for record in self.records():
            for path in sorted(
                (self.output / "scores").glob(f"{slug(record.arm)}-{record.seed}-*.json")
            ):
                name = path.stem.rpartition("-")[2]
                arm = {**record.arm, "seed": record.seed, "scores": name}
                rows += [{**arm, **asdict(row)} for row in Scores.read(path).rows]
        if not rows:
            return None
        path = self.output / "cases.csv"
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows({k: _rounded(v) for k, v in row.items()} for row in rows)
        return path


# --- helpers --------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, start: str | None = None) -> None:
    """Add `-m MODEL`.

    Args:
        parser: Of the script.
        start: Weights that the real size starts from if no others are named. Without them, MODEL is
            measured as it is, in place of a training.
    """
    text = "measure these weights (a name, folder or file) and train none"
    if start is not None:
        text = "weights that a real run starts from: a name, folder or file"
    parser.add_argument("-m", "--model", default=start, help=text)


# Arguments that do not change what a record says: where it goes, and which arms are run.
_FREE = ("output", "publish", "seeds", "only", "smoke", "mini", "gpu")


def _text(arm: Arm) -> str:
    return ", ".join(f"{key} {value}" for key, value in arm.items()) or "the only arm"


def _rounded(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a user's mistake ends in a sentence and exit code 2."""
    try:
        main()
    except UniversalCTError as error:
        raise SystemExit(f"error: {error}") from None
