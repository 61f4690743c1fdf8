"""Write a report's pictures as PNG files beside the page: a sheet for each gallery, the map and the masks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw

from img2parquet.results.report.masks import colour
from img2parquet.results.report.sections import ModelSection, PageContent

TILE_PX, GAP_PX, MAP_PX, ACROSS = 128, 6, 1200, 8
PAPER, EMPTY = "#ffffff", "#ecece6"


def write_sheets(shown: PageContent, page: Path) -> list[Path]:
    """Write `<page>-<model>-random.png`, `-unsure.png`, `-wrong.png`, `-map.png` and `-masks.png`, if any."""
    written = []
    for section in shown.sections:
        for name, image in _sheets(shown, section):
            model = re.sub(r"[^\w.-]+", "_", section.sample.model)[:60]
            path = page.with_name(f"{page.stem}-{model}-{name}.png")
            image.save(path, "PNG", optimize=True)
            written.append(path)
    return written


def _sheets(shown: PageContent, section: ModelSection) -> Iterable[tuple[str, Image.Image]]:
    names = {"Random rows": "random", "Least confident": "unsure", "Confidently wrong": "wrong"}
    for gallery in section.galleries:
        if gallery.title in names:
            yield names.pop(gallery.title), sheet([_tile(shown, section, row) for row in gallery.rows])
    if section.embedding_map:
        yield "map", draw_map(section)
    if section.mask_rows:
        yield "masks", sheet([_blended(shown, section, row) for row in section.mask_rows])


def sheet(tiles: Sequence[Image.Image | None]) -> Image.Image:
    """Arrange square tiles in rows of ACROSS."""
    across = min(ACROSS, max(1, len(tiles)))
    down, step = -(-len(tiles) // across), TILE_PX + GAP_PX
    paper = Image.new("RGB", (across * step + GAP_PX, down * step + GAP_PX), PAPER)
    for i, tile in enumerate(tiles):
        square = Image.new("RGB", (TILE_PX, TILE_PX), EMPTY) if tile is None else _square(tile)
        paper.paste(square, (GAP_PX + i % across * step, GAP_PX + i // across * step))
    return paper


def draw_map(section: ModelSection) -> Image.Image:
    """Draw the first layout in the page's colours, at twice the size and then reduced for smooth edges."""
    assert section.embedding_map is not None
    side, margin, radius = 2 * MAP_PX, 40, 9
    paper = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(paper, "RGBA")
    at = {name: i for i, name in enumerate(section.group_names)}
    xy_N2 = next(iter(section.embedding_map.maps.values()))
    for i, (x, y) in enumerate(xy_N2.tolist()):
        group = at.get(section.groups[i]) if section.groups else 0
        ink = (*ImageColor.getrgb("#8a8f98" if group is None else colour(group))[:3], 200)
        left, top = margin + x * (side - 2 * margin), margin + (1 - y) * (side - 2 * margin)
        pen.ellipse((left - radius, top - radius, left + radius, top + radius), fill=ink)
    return paper.resize((MAP_PX, MAP_PX), Image.Resampling.LANCZOS)


def _tile(shown: PageContent, section: ModelSection, row: int) -> Image.Image | None:
    number = shown.pictures.number(section.places[row]) if section.places else None
    return None if number is None else _picture(shown, number).convert("RGB")


def _blended(shown: PageContent, section: ModelSection, row: int) -> Image.Image | None:
    photo = _tile(shown, section, row)
    if row not in section.overlays:
        return photo
    mask = _picture(shown, section.overlays[row]).convert("RGB")
    return mask if photo is None else Image.blend(photo, mask.resize(photo.size, Image.Resampling.NEAREST), 0.55)


def _picture(shown: PageContent, number: int) -> Image.Image:
    return Image.open(io.BytesIO(shown.pictures.data[number]))


def _square(tile: Image.Image) -> Image.Image:
    side = min(tile.size)
    left, top = (tile.width - side) // 2, (tile.height - side) // 2
    return tile.crop((left, top, left + side, top + side)).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
