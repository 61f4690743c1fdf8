"""Render the page's content as one HTML file.

Jinja escapes every text, values reach the script as JSON, and the page's content security policy lets nothing run or
load that is not in the file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from img2parquet.errors import printable
from img2parquet.results.report import charts
from img2parquet.results.report.accuracy import ModelAccuracy
from img2parquet.results.report.masks import colour
from img2parquet.results.report.sections import ModelSection, PageContent
from img2parquet.storage import name_of, names_in

HERE = Path(__file__).parent / "page"
MARK = "<!-- img2parquet report -->"
LONGEST = 200  # characters shown of a key or label
OTHERS = "#8a8f98"
NOT_SHARES = {"mean_absolute_error", "root_mean_squared_error", "r2"}
SHOWN = 3  # labels of a row in the map


def render(shown: PageContent) -> str:
    """Render a page that makes no network requests and runs no foreign text as code."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        shown=visible, size=size, percent=percent, share=share, seconds=seconds, num=lambda n: f"{n:,}"
    )
    environment.globals.update(
        charts=charts, colour=colour, swatch=charts.swatch, headline=headline, score_in_words=score_in_words
    )
    style, script = (Markup((HERE / name).read_text()) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        mark=Markup(MARK),
        policy=policy(style, script),
        style=style,
        script=script,
        data=embedded(
            {"pictures": shown.pictures.uris(), "maps": [_map(shown, section) for section in shown.sections]}
        ),
        shown=shown,
        summary=shown.summary,
        pictures=shown.pictures,
        sections=shown.sections,
        speed=shown.speed,
        title=name_of(shown.summary.output.uri),
        about=about,
        identity_json=lambda section: json.dumps(section.identity, indent=1, ensure_ascii=False, sort_keys=True),
    )


def policy(style: str, script: str) -> str:
    """Build the content security policy: this style and script only, by digest, and images of the page itself only."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    style_src, script_src = (f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; img-src data:; style-src {style_src}; script-src {script_src}; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(value: Any) -> Markup:
    """Encode as JSON that cannot end its script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def visible(text: Any, longest: int = LONGEST) -> str:
    """Make foreign text safe to show: one line, no invisible characters, no secrets of URLs."""
    line = printable(names_in(str(text))).replace("\n", "\\n")
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _map(shown: PageContent, section: ModelSection) -> dict[str, Any] | None:
    """Return what the script draws: positions, colours and the caption of each point."""
    if section.embedding_map is None:
        return None
    groups = section.group_names
    at = {name: i for i, name in enumerate(groups)}
    keys = section.sample.texts("key") or [f"row {i}" for i in range(section.sample.table.num_rows)]
    return {
        "layouts": {name: _rounded(xy) for name, xy in section.embedding_map.maps.items()},
        "group": [at.get(group, -1) for group in section.groups] or [-1] * len(keys),
        "colours": [colour(i) for i in range(len(groups))] or [colour(0)],
        "others": OTHERS if groups else colour(0),
        "keys": [visible(key, 80) for key in keys],
        "says": [_caption(section, i) for i in range(len(keys))],
        "picture": [shown.pictures.number(place) for place in section.places] or [None] * len(keys),
    }


def _rounded(xy: Any) -> list[list[float]]:
    return [[round(float(x), 4), round(float(y), 4)] for x, y in xy]


def _caption(section: ModelSection, row: int) -> str:
    labels = section.predicted(row)[:SHOWN] or section.predictions[row][:1]
    if labels:
        words = section.label_scores.in_words
        return ", ".join(f"{visible(label['name'], 60)}  {words(label['score'])}" for label in labels)
    return visible(section.groups[row], 60) if section.groups else ""


def about(identity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what decides a model's numbers, one line each."""
    if not identity:
        return []
    prepare = dict(identity.get("preprocess") or {})
    lines = [
        ("family", identity.get("family")),
        ("made from", dict(identity.get("source") or {}).get("model")),
        ("labels", str(identity.get("labels_sha256", ""))[:16]),
        ("weights", str(identity.get("weights", ""))[:16]),
        ("image size", dict(identity.get("config") or {}).get("image_size")),
        ("classes", len(dict(identity.get("config") or {}).get("id2label") or {}) or None),
        ("scores", identity.get("scores")),
        ("dtype", identity.get("dtype")),
        ("outputs", ", ".join(_output(o) for o in identity.get("outputs", []) if isinstance(o, dict))),
        ("resize", _joined(prepare, "resize", "resize_height", "resize_width", "resample")),
        ("crop", _joined(prepare, "crop_height", "crop_width")),
        ("mode", _joined(prepare, "mode", "backend")),
        ("mean, std", _numbers(prepare.get("mean")) + " / " + _numbers(prepare.get("std"))),
    ]
    return [(name, str(value)) for name, value in lines if value not in (None, "", " / ")]


def _output(output: Mapping[str, Any]) -> str:
    more = {k: v for k, v in output.items() if k in ("top_k", "normalize", "encoding", "head") and v not in (None, "")}
    said = ", ".join(f"{name} {value}" for name, value in more.items() if value != "default")
    return f"{output.get('kind')}{f' ({said})' if said else ''}"


def _joined(values: Mapping[str, Any], *names: str) -> str:
    return " ".join(str(values[name]) for name in names if values.get(name) is not None)


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.3g}" for value in values) if isinstance(values, list) else ""


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def share(value: float | None) -> str:
    """Format a share; `none` when there was nothing to divide by."""
    return "none" if value is None else percent(value)


def headline(judged: ModelAccuracy) -> tuple[str, str]:
    """Return the main score of an evaluation as text, and its name."""
    found = judged.found
    name, words = {
        "mask": ("mean_iou", "mean IoU"),
        "multi_label": ("f1", "F1 over labels"),
        "regression": ("mean_absolute_error", "mean absolute error"),
        "labels": ("top1", "top-1"),
        "visual_tokens": ("top1", "masked codes, top-1"),
    }[found.task]
    return score_in_words(getattr(found, name) or 0.0, name), words


def score_in_words(value: float, name: str) -> str:
    """Format a score by its name: a share in percent, an error of a regression as it is."""
    return f"{value:.4g}" if name in NOT_SHARES else percent(value)


def seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
