# SPDX-License-Identifier: Apache-2.0
"""A page of HTML that needs nothing beside it: its pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:80em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{overflow-x:auto;background:#f6f6f6;padding:1em}"
)


def html_page(title: str, sections: Sequence[str]) -> str:
    """Return the page; `sections` are HTML, such as the functions below give."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{escape(title)}</h1>{''.join(sections)}"
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def html_text(title: str, text: str) -> str:
    """Return a heading and a text; one of several lines keeps its layout."""
    inside = f"<pre>{escape(text)}</pre>" if "\n" in text else f"<p>{escape(text)}</p>"
    return f"<h2>{escape(title)}</h2>{inside}"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row('th', head)}{''.join(row('td', cells) for cells in rows)}</table>"


def html_picture(title: str, image: bytes, kind: str, text: str = "") -> str:
    """Return a heading, a line of text and a picture (png or jpeg)."""
    alt, picture = escape(title), base64.b64encode(image).decode()
    line = f"<p>{escape(text)}</p>" if text else ""
    return f'<h2>{alt}</h2>{line}<img alt="{alt}" src="data:image/{kind};base64,{picture}">'
