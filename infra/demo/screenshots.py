"""Make the README's pictures of the report, `report-light.png` and `report-dark.png`, from the outputs of `make demo`.

make browser && .venv/bin/python infra/demo/screenshots.py      # from the repository's root; needs Chromium
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright  # the `browser` extra

import img2parquet

HERE, RESULTS, MASKS = Path(__file__).parent, "out/demo/results", "out/demo/masks"
WIDTH, HEIGHT = 1200, 960


def main(photos: str = RESULTS, textures: str = MASKS) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, output, target, name in (
            ("light", photos, "canvas", "report-light.png"),
            ("dark", textures, ".masks", "report-dark.png"),
        ):
            (page_file,) = img2parquet.report(output, to=Path(folder) / f"{scheme}.html")
            page = browser.new_page(color_scheme=scheme, viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(page_file.as_uri())
            page.wait_for_timeout(500)
            if target == "canvas":
                hover(page)
            save(page.screenshot(), HERE / name)
        browser.close()


def hover(page: Page) -> None:
    """Hover over a cluster, as a visitor would."""
    box = page.locator("canvas").bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.39 * box["width"], box["y"] + 0.12 * box["height"])
    page.wait_for_timeout(200)


def save(png: bytes, path: Path) -> None:
    """Save with 256 colours, in a fifth of the bytes."""
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, kmeans=8, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
