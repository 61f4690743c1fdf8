"""Render the rows that a search found as one HTML page that opens from disk and makes no network requests.

Thumbnails are fetched from the source shards, and rows whose image cannot be read are shown without one. Whatever keys
hold is shown as text.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from img2parquet.errors import Img2ParquetError, printable
from img2parquet.images.thumbnails import thumb
from img2parquet.results.embeddings import Hit, Vectors, open_vectors, part_index
from img2parquet.results.search.search import SearchResult
from img2parquet.results.source_images import Place, find, open_source
from img2parquet.storage import Store

LONGER_PX = 224  # of a thumbnail

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


def page_of(
    uri: str,
    result: SearchResult,
    image: str | None = None,
    *,
    key: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """Render the result of `search`, called with this image, key or texts, as one HTML page with thumbnails."""
    vectors = open_vectors(uri, result.model, result.column, storage_options=storage_options)
    subtitle = f"model {result.model}, {len(result.hits)} nearest of {result.compared:,} rows by cosine ({result.how})"
    query = _picture_of_file(vectors.output.store, image) if image else None
    return render(
        f"Rows like {result.query or image or key}", subtitle, result.hits, pictures_of(vectors, result.hits), query
    )


def render(
    title: str,
    subtitle: str,
    hits: Sequence[Hit],
    pictures: Mapping[Place, bytes],
    query: bytes | None = None,
) -> str:
    """Render hits, best first, with WebP pictures by (shard, key) and one of the query."""
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
    note = f"; {missing} without a thumbnail, since their source could not be read" if missing else ""
    return PAGE.format(
        title=_text(title),
        subtitle=_text(subtitle + note),
        query=f'<p class="query">{_picture(query, "the query")}</p>' if query else "",
        figures="\n".join(figures),
    )


def pictures_of(vectors: Vectors, rows: Iterable[Hit]) -> dict[Place, bytes]:
    """Make thumbnails of rows, as far as their images can be read; none when the run's record or input is missing."""
    wanted: dict[int, set[Place]] = {}
    for row in rows:
        wanted.setdefault(part_index(row.part), set()).add((row.shard, row.key))
    try:
        source = open_source(vectors.output.run_record() or {}, vectors.output.store.options)
    except Img2ParquetError:
        return {}
    parts = {part.index: part for part in vectors.plan.parts}
    # the page counts rows without a thumbnail
    found = find(source, parts, wanted, note=lambda text: None)
    return {place: made.data for place, image in found if (made := thumb(image, LONGER_PX))}


def _picture_of_file(store: Store, uri: str) -> bytes | None:
    """Make a thumbnail of one image file, or return None."""
    made = thumb(store.read(uri), LONGER_PX)
    return made.data if made else None


def _picture(webp: bytes | None, name: str) -> str:
    if webp is None:
        return '<div class="none">no thumbnail</div>'
    return f'<img alt="{_text(name)}" src="data:image/webp;base64,{base64.b64encode(webp).decode()}">'


def _text(text: str) -> str:
    """Escape foreign text: no markup, no control characters, no change of writing direction."""
    return html.escape(printable(text).replace("\n", "\\n"))
