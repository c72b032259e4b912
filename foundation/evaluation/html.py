"""The look of reports: one HTML page without any link to the outside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:960px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.3rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;text-align:right;border-bottom:1px solid #e3e7eb;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:#57606a;font-weight:600;font-size:.86rem}
td small{color:#57606a}tr.mean td{font-weight:600;border-top:2px solid #8b949e}
tr.forgot td{background:#fdecea}.up{color:#1a7f37}.down{color:#c62828}
.cards{display:flex;gap:1rem;flex-wrap:wrap;margin:1.2rem 0}
.card{flex:1 1 280px;border:1px solid #d5dae0;border-left:6px solid #1f6feb;border-radius:6px;
padding:.7rem 1rem}.card.good{border-left-color:#1a7f37}.card.bad{border-left-color:#c62828;
background:#fdecea}.card b{display:block;font-size:1.35rem}.card span{color:#57606a}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem}dt{color:#57606a}
dd{margin:0;overflow-wrap:anywhere}figure{margin:.6rem 0 1.4rem}img,svg{max-width:100%;height:auto}
figcaption{color:#57606a;font-size:.9rem}.note{color:#57606a}
"""


def document(title: str, parts: Sequence[str]) -> str:
    """Make a whole page.

    Args:
        title: Plain text.
        parts: HTML, one below the other; empty ones are left out.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Make a part with a heading (plain text) of `content` (HTML)."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def number(value: float | None) -> str:
    """Write a value with three digits, or a dash where nothing was measured."""
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Write a change with its sign; without one if three digits show nothing of it."""
    if value is None:
        return "–"
    text = f"{value:+.3f}".replace("-", "−")
    return text if text.strip("+−0.") else "0.000"
