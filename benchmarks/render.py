"""Tables, cards and `.eval_results` from the records.

    python benchmarks/render.py [--check]

Fills the blocks between `<!-- records: NAME -->` and `<!-- end records -->` of README.md,
benchmarks/README.md, finetune/README.md and the model cards; `benchmarks/tables/NAME.yaml` says
what each shows. Writes the `model-index` of the cards and the `.eval_results/*.yaml` of the weights
too. Run it after each run that wrote a record. With --check nothing is written, and the exit code
is 1 where a file is not what the records give. It takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from foundation import UniversalCTError
from foundation.evaluation import write_rendered

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Render or check; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file differs")
    given = parser.parse_args()
    try:
        changed = write_rendered(ROOT, check=given.check)
    except UniversalCTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    what = "is not what the records give" if given.check else "rendered"
    for path in changed:
        print(f"{path.relative_to(ROOT)} {what}", file=sys.stderr)
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
