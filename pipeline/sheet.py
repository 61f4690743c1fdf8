"""The rows that a search found to one HTML file: opens from disk, asks no network, whatever the keys hold is text."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from pipeline.embeddings import Found
from pipeline.errors import printable

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c1f24; --soft: #667; --paper: #fafafa; --card: #fff; --line: #dde; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8eaee; --soft: #9aa3b2; --paper: #14161a; --card: #1d2026; --line: #2c313a; }} }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1.5rem; font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }}
h1 {{ font-size: 1.3rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }} p {{ color: var(--soft); margin: 0 0 1rem; }}
.query img {{ max-height: 12rem; border-radius: 8px; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }}
figure img, .none {{ display: block; width: 100%; aspect-ratio: 1; object-fit: cover; }}
.none {{ display: grid; place-items: center; color: var(--soft); font-size: .8rem; background: var(--line); }}
figcaption {{ padding: .5rem .65rem; font-size: .8rem; overflow-wrap: anywhere; }}
figcaption b {{ display: block; font-variant-numeric: tabular-nums; }} figcaption span {{ color: var(--soft); }}
</style></head><body>
<h1>{title}</h1>
<p>{subtitle}</p>
{query}
<main>
{figures}
</main></body></html>
"""
FIGURE = """<figure>{picture}
<figcaption><b>{rank}. {score:.4f}</b>{key}<br><span>{shard}</span></figcaption></figure>"""


def sheet(
    title: str,
    subtitle: str,
    hits: Sequence[Found],
    pictures: Mapping[tuple[str, str], bytes],
    query: bytes | None = None,
) -> str:
    """hits, best first; pictures: JPEGs by (shard, key), and of the query. A row without one says so."""
    figures = [
        FIGURE.format(
            picture=_picture(pictures.get((hit.shard, hit.key)), hit.key),
            rank=rank,
            score=hit.score,
            key=_text(hit.key),
            shard=_text(hit.shard.rpartition("/")[2] or hit.shard),
        )
        for rank, hit in enumerate(hits, 1)
    ]
    missing = sum((hit.shard, hit.key) not in pictures for hit in hits)
    note = f"; {missing} without a thumbnail: their source could not be read" if missing else ""
    return PAGE.format(
        title=_text(title),
        subtitle=_text(subtitle + note),
        query=f'<p class="query">{_picture(query, "the query")}</p>' if query else "",
        figures="\n".join(figures),
    )


def _picture(jpeg: bytes | None, name: str) -> str:
    if jpeg is None:
        return '<div class="none">no thumbnail</div>'
    return f'<img alt="{_text(name)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _text(text: str) -> str:
    """Of others: no markup, no control character, no change of direction."""
    return html.escape(printable(text).replace("\n", "\\n"))
