"""What is shown -> one HTML file. Jinja escapes every text, values go to the script as JSON, and a policy in the page
lets nothing run or load but what is in it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.errors import printable
from pipeline.report import charts
from pipeline.report.accuracy import Judged
from pipeline.report.masks import colour
from pipeline.report.sections import Section, Shown
from pipeline.storage import name_of, names_in

HERE = Path(__file__).parent / "page"
MARK = "<!-- img2parquet report -->"
LONGEST = 200  # letters of a key or label that are shown
OTHERS = "#8a8f98"


def render(shown: Shown) -> str:
    """A page that asks no network and runs no text of others."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        shown=visible, size=size, percent=percent, share=share, seconds=seconds, num=lambda n: f"{n:,}"
    )
    environment.globals.update(charts=charts, colour=colour, swatch=charts.swatch, headline=headline)
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
        account=shown.account,
        pictures=shown.pictures,
        sections=shown.sections,
        speed=shown.speed,
        title=name_of(shown.account.output.uri),
        about=about,
        identity_json=lambda section: json.dumps(section.identity, indent=1, ensure_ascii=False, sort_keys=True),
    )


def policy(style: str, script: str) -> str:
    """Only this style and this script, by their digests; images only from the page itself."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    style_src, script_src = (f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; img-src data:; style-src {style_src}; script-src {script_src}; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(value: Any) -> Markup:
    """JSON that cannot end its script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def visible(text: Any, longest: int = LONGEST) -> str:
    """Words of others: one line, nothing that cannot be seen, nothing that opens a URL."""
    line = printable(names_in(str(text))).replace("\n", "\\n")
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _map(shown: Shown, section: Section) -> dict[str, Any] | None:
    """What the script draws: places, colours, and what is said of each point."""
    if section.likeness is None:
        return None
    groups = section.group_names
    at = {name: i for i, name in enumerate(groups)}
    keys = section.sample.texts("key") or [f"row {i}" for i in range(section.sample.table.num_rows)]
    return {
        "layouts": {name: _rounded(xy) for name, xy in section.likeness.maps.items()},
        "group": [at.get(group, -1) for group in section.groups] or [-1] * len(keys),
        "colours": [colour(i) for i in range(len(groups))] or [colour(0)],
        "others": OTHERS if groups else colour(0),
        "keys": [visible(key, 80) for key in keys],
        "says": [_says(section, i) for i in range(len(keys))],
        "picture": [shown.pictures.number(place) for place in section.places] or [None] * len(keys),
    }


def _rounded(xy: Any) -> list[list[float]]:
    return [[round(float(x), 4), round(float(y), 4)] for x, y in xy]


def _says(section: Section, row: int) -> str:
    labels = section.predictions[row]
    if labels:
        return f"{visible(labels[0]['name'], 60)}  {100 * labels[0]['score']:.0f} %"
    return visible(section.groups[row], 60) if section.groups else ""


def about(identity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A model's card: what decides its numbers, one line each."""
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
        ("dtype", identity.get("dtype")),
        ("outputs", ", ".join(_output(o) for o in identity.get("outputs", []) if isinstance(o, dict))),
        ("resize", _joined(prepare, "resize", "resize_height", "resize_width", "resample")),
        ("crop", _joined(prepare, "crop_height", "crop_width")),
        ("mode", prepare.get("mode")),
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
    """Where there was nothing to divide by, there is no share."""
    return "none" if value is None else percent(value)


def headline(judged: Judged) -> tuple[float, str]:
    """The one number that stands for a judgement, and what it is."""
    found = judged.found
    if found.task == "mask":
        return found.mean_iou or 0.0, "mean IoU"
    return found.top1 or 0.0, "top-1" if found.task == "labels" else "masked codes, top-1"


def seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
