"""A report as one self-contained page: inline style, inline pictures, no script, no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;width:100%;font-size:.95rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.verdict{background:#eef5fa;border-left:4px solid #0072B2;padding:.6rem 1rem}
figure{display:inline-block;vertical-align:top;margin:0 1rem 1rem 0;max-width:100%}
img{max-width:100%;height:auto}
table.facts{width:auto;margin-bottom:1rem}
details{margin:1rem 0}
summary{cursor:pointer;font-weight:600}
figcaption{font-size:.85rem;color:#555}
"""


def page(title: str, verdict: str, body: str, settings: Mapping[str, Any]) -> str:
    """A page of some title; the verdict and the body are HTML, of the settings those that say something are listed."""
    listed = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in settings.items() if v is not None)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        f'<h1>{html.escape(title)}</h1>\n<p class="verdict">{verdict}</p>\n'
        f"{body}<details><summary>Settings</summary><ul>{listed}</ul></details>\n</body></html>\n"
    )


def facts(about: Mapping[str, Any] | None) -> str:
    """What a page is a report on, by name, as a table; nothing where nothing is said."""
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>\n"
        for name, value in (about or {}).items()
    )
    return f"<table class=facts><tbody>\n{lines}</tbody></table>\n" if lines else ""


def picture(name: str, figure: Figure) -> str:
    """A figure with its caption, as HTML that holds it."""
    buffer, text = io.BytesIO(), html.escape(name)
    figure.savefig(buffer, format="png", dpi=110)
    data, width = base64.b64encode(buffer.getvalue()).decode("ascii"), int(110 * figure.get_figwidth() * 0.8)
    image = f'<img alt="{text}" width="{width}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
