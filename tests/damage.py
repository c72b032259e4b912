"""Files that are damaged as disks and copies damage them."""

import random
from pathlib import Path


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Flip a bit of a file, cut it, empty it or remove it: "flipped", "cut", "emptied", "gone"."""
    if how == "gone":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "emptied":
        content.clear()
    path.write_bytes(content)
