"""Synthetic CTs: phantoms, and label maps that are deformed and rendered anew each time.

`phantom` generates bodies, `anatomy` holds label maps, `deform` places and deforms them, `lesions`
grows tumours, `render` and `scanner` make a CT of them, and `view` does all of it in turn.
"""

from foundation.synthesis.anatomy import (
    FINE_MM,
    Anatomy,
    load_anatomies,
    phantom_anatomy,
    sets_of,
    stored_anatomy,
)
from foundation.synthesis.phantom import TISSUES, Phantom, generate
from foundation.synthesis.phantom_scans import (
    SMOKE_CLASS,
    SMOKE_LABELS,
    generated_scan,
    phantom_ct,
    write_scans,
)
from foundation.synthesis.render import render_ct
from foundation.synthesis.view import View, draw_view

__all__ = [
    "FINE_MM",
    "SMOKE_CLASS",
    "SMOKE_LABELS",
    "TISSUES",
    "Anatomy",
    "Phantom",
    "View",
    "draw_view",
    "generate",
    "generated_scan",
    "load_anatomies",
    "phantom_anatomy",
    "phantom_ct",
    "render_ct",
    "sets_of",
    "stored_anatomy",
    "write_scans",
]
