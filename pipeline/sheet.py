"""The rows that a search found to one HTML file: opens from disk, asks no network, whatever the keys hold is text.

Their thumbnails are fetched from the source shards; a row whose image is not to be had stands there without one.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

from pipeline.embeddings import Found, Vectors, part_index
from pipeline.errors import Img2ParquetError, printable
from pipeline.source_images import Place, find, open_source
from pipeline.storage import Store
from pipeline.thumbnails import thumb

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


def sheet(
    title: str,
    subtitle: str,
    hits: Sequence[Found],
    pictures: Mapping[Place, bytes],
    query: bytes | None = None,
) -> str:
    """hits, best first; pictures: WebPs by (shard, key), and of the query. A row without one says so."""
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


def pictures_of(vectors: Vectors, rows: Iterable[Found]) -> dict[Place, bytes]:
    """Thumbnails of rows of an output, of those that could be had; none where its record, or its input, is gone."""
    wanted: dict[int, set[Place]] = {}
    for row in rows:
        wanted.setdefault(part_index(row.part), set()).add((row.shard, row.key))
    try:
        source = open_source(vectors.output.run_record() or {}, vectors.output.store.options)
    except Img2ParquetError:
        return {}
    parts = {part.index: part for part in vectors.plan.parts}
    # what could not be read is counted on the sheet
    found = find(source, parts, wanted, note=lambda text: None)
    return {place: made.data for place, image in found if (made := thumb(image, LONGER_PX))}


def picture_of_file(store: Store, uri: str) -> bytes | None:
    """A thumbnail of one image file, or None."""
    made = thumb(store.read(uri), LONGER_PX)
    return made.data if made else None


def _picture(webp: bytes | None, name: str) -> str:
    if webp is None:
        return '<div class="none">no thumbnail</div>'
    return f'<img alt="{_text(name)}" src="data:image/webp;base64,{base64.b64encode(webp).decode()}">'


def _text(text: str) -> str:
    """Of others: no markup, no control character, no change of direction."""
    return html.escape(printable(text).replace("\n", "\\n"))
