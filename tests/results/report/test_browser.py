"""The page in Chromium: it renders, hovering tells who a point is, nothing of others runs, no request leaves.

make browser      # installs the `browser` extra; Chromium is the system's (apt-get install chromium)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from img2parquet.results.report import report

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")]


@pytest.fixture(scope="module")
def page_file(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(str(output), tmp_path_factory.mktemp("page") / "r.html")[0]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'img2parquet[browser]'")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen:
    """A page that is open, what its console said and what it asked for."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url[:60]))
        self.page.goto(file.as_uri())
        self.page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        self.page.wait_for_function("[...document.images].every(image => image.complete)")


@pytest.fixture
def seen(chromium: Any, page_file: Path) -> Iterator[Seen]:
    opened = Seen(chromium, page_file, viewport={"width": 1200, "height": 800})
    yield opened
    opened.context.close()


def test_it_renders_without_a_word_in_the_console(seen: Seen) -> None:
    assert seen.said == []
    images = seen.page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(images) > 40 and all(width > 1 for width in images)
    assert seen.page.locator("canvas").count() == 1
    colours = seen.page.evaluate(
        "() => {const c = document.querySelector('canvas');"
        "return new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size}"
    )
    assert colours > 5  # points of several groups


def test_no_request_leaves(seen: Seen) -> None:
    assert [url for url in seen.asked if not url.startswith(("file://", "data:"))] == []
    assert sum(url.startswith("file://") for url in seen.asked) == 1
    refused = seen.page.evaluate(  # the policy holds for what would try
        "() => fetch('http://127.0.0.1:9/').then(() => 'let through', error => 'refused')"
    )
    assert refused == "refused" and any("Content Security Policy" in line for line in seen.said)


def test_nothing_of_others_runs(seen: Seen) -> None:
    assert seen.page.evaluate("window.hit") is None
    seen.page.evaluate(  # and it would not, had it got in as markup
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\"><svg onload=\"hit=1\">')"
    )
    seen.page.wait_for_timeout(100)
    assert seen.page.evaluate("window.hit") is None


def test_hovering_shows_the_image_and_its_key_as_text(seen: Seen) -> None:
    tip = seen.page.locator(".tip")
    assert not tip.is_visible()
    places = seen.page.evaluate(
        "() => {const d = JSON.parse(document.getElementById('data').textContent).maps[0];"
        "return d.layouts.PCA.map((xy, i) => [...xy, d.keys[i]])}"
    )
    canvas = seen.page.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    keys = {key for _, _, key in places}
    for x, y, _ in places[:6]:
        seen.page.mouse.move(box["x"] + 14 + x * (box["width"] - 28), box["y"] + 14 + (1 - y) * (box["height"] - 28))
        assert tip.is_visible() and tip.locator("img").count() == 1
        assert tip.locator("p").last.inner_text() in keys
    seen.page.mouse.move(1, 1)
    assert not tip.is_visible()


def test_a_group_can_be_seen_alone_and_points_walked_by_keyboard(seen: Seen) -> None:
    button = seen.page.locator("[data-group]").first
    before = seen.page.locator("canvas").screenshot()
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert seen.page.locator("canvas").screenshot() != before
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    seen.page.locator("canvas").focus()
    seen.page.keyboard.press("ArrowRight")
    assert seen.page.locator(".tip").is_visible()
    seen.page.keyboard.press("Escape")
    assert not seen.page.locator(".tip").is_visible()


def test_every_image_has_a_text_and_every_control_a_name(seen: Seen) -> None:
    assert seen.page.evaluate("[...document.images].filter(image => !image.hasAttribute('alt')).length") == 0
    unnamed = "[...document.querySelectorAll('button, input, svg[role=img], canvas')].filter(" \
              "e => !(e.textContent.trim() || e.getAttribute('aria-label'))).length"  # fmt: skip
    assert seen.page.evaluate(unnamed) == 0


@pytest.mark.parametrize("width", [360, 390, 820])
def test_a_phone_scrolls_only_down(chromium: Any, page_file: Path, width: int) -> None:
    seen = Seen(chromium, page_file, viewport={"width": width, "height": 800}, has_touch=True)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    seen.context.close()


def test_texts_stand_out_in_light_and_in_dark(chromium: Any, page_file: Path) -> None:
    """Contrast of the page's colours, as WCAG counts it: 4.5 for text."""
    grounds = set()
    for scheme in ("light", "dark"):
        seen = Seen(chromium, page_file, color_scheme=scheme)
        style = "getComputedStyle(document.documentElement).getPropertyValue"
        ink = {name: seen.page.evaluate(f"{style}('--{name}')") for name in ("ink", "soft", "accent", "warn")}
        ground = {name: seen.page.evaluate(f"{style}('--{name}')") for name in ("page", "panel")}
        grounds.add(ground["page"])
        for name, colour in ink.items():
            for under, other in ground.items():
                assert contrast(colour, other) >= 4.5, (scheme, name, under)
        seen.context.close()
    assert len(grounds) == 2


def contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    code = colour.strip().lstrip("#")
    code = "".join(2 * letter for letter in code) if len(code) == 3 else code
    channels = (int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
