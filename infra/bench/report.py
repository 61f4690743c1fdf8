"""Write one suite's result as a Markdown page, with a picture of what was reached and its floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Bar:
    """A ratio and its floor."""

    label: str
    ratio: float
    floor: float

    @property
    def reached(self) -> bool:
        return self.ratio >= self.floor


@dataclass(frozen=True)
class Report:
    name: str
    title: str
    about: Sequence[str]  # how and on what it was measured, one line each
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[Bar]
    agrees: bool  # whether all outputs agree with the reference
    notes: Sequence[str] = ()

    def write(self, folder: Path) -> list[Path]:
        """Write the page and the picture; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        page, picture = folder / f"{self.name}.md", folder / f"{self.name}.png"
        page.write_text(self.markdown())
        draw(self.title, self.bars).save(picture, optimize=True)
        return [page, picture]

    def markdown(self) -> str:
        parts = [f"# {self.title}", "\n".join(f"- {line}" for line in self.about), self._table(), self._verdict()]
        return "\n\n".join([*parts, *self.notes, f"![]({self.name}.png)"]) + "\n"

    def _table(self) -> str:
        cells = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)

    def _verdict(self) -> str:
        missed = [f"{bar.label}: {bar.ratio:.2f} of {bar.floor:g}" for bar in self.bars if not bar.reached]
        agree = "" if self.agrees else " **Outputs do not agree: see the differences above.**"
        floors = f"Below the floor: {'; '.join(missed)}." if missed else "Every floor is reached."
        return (floors if self.bars else "No floor was asked.") + agree


ROW, LEFT, RIGHT, TOP = 26, 250, 70, 58
INK, GREY, GOOD, BAD = "#222222", "#777777", "#3a7d5c", "#c05a3c"


def draw(title: str, bars: Sequence[Bar], width: int = 860) -> Image.Image:
    """Draw a bar for each ratio, with its floor as a line across it."""
    image = Image.new("RGB", (width, TOP + ROW * len(bars) + 12), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    pen.text((12, 10), title, fill=INK, font=ImageFont.load_default(size=17))
    pen.text((12, 34), "times as fast; the line is the floor", fill=GREY, font=font)
    scale = (width - LEFT - RIGHT) / max((max(bar.ratio, bar.floor) for bar in bars), default=1.0)
    for row, bar in enumerate(bars):
        top = TOP + ROW * row
        pen.text((LEFT - 10, top + 3), bar.label, fill=INK, font=font, anchor="ra")
        end, floor = LEFT + bar.ratio * scale, LEFT + bar.floor * scale
        pen.rectangle((LEFT, top, end, top + ROW - 8), fill=GOOD if bar.reached else BAD)
        pen.line((floor, top - 3, floor, top + ROW - 5), fill=INK, width=2)
        pen.text((max(end, floor) + 8, top + 3), f"{bar.ratio:.2f}", fill=INK, font=font)
    return image
