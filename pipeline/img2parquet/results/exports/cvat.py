"""Export labels and masks as CVAT XML 1.1 for images: the best label as a tag, each class of a mask as a mask shape.

* Where the model has several labels per image, each of the job's `threshold` (0.5) or more is a tag. A value of a
  regression is the attribute `value` of its tag.
* A mask's run lengths cover its box row by row and start with the pixels outside it, which may be none.
* CVAT cuts class names off after 64 characters and refuses two that are equal, so longer ones are shortened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

from img2parquet.outputs.class_names import distinct_names
from img2parquet.results.exports import ExportOptions, needs
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.masks import class_map, class_names, regions, runs
from img2parquet.results.exports.rows import ExportRows

VALUE = (
    "<attribute><name>value</name><mutable>False</mutable><input_type>text</input_type>"
    "<default_value></default_value><values></values></attribute>"
)

NAME_LETTERS = 64  # of a class in CVAT's database
KEPT_LETTERS = 52  # of a longer name; ` (<id>)` may follow


class Cvat:
    shape = "file"
    takes = frozenset({"images", "name"})
    last = ""

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def check(self, source: ExportRows) -> None:
        if source.mask is None and source.labels is None:
            raise needs(source, "cvat", "labels or a mask", "add `{kind: labels}` to the job's outputs")

    def write(self, source: ExportRows, work: Workspace) -> None:
        labels, mask = source.labels, source.mask
        of_mask = class_names(mask) if mask is not None else []
        names = label_names([*source.label_names, *of_mask], work)
        tags: dict[str, None] = {}
        scores = source.label_scores
        are_values = scores.function == "none"
        rows = 0
        with work.text() as out, work.scratch() as images:
            for rows, row in enumerate(source.rows_with(labels, mask), 1):
                image = work.plain(work.image(self.options.image_of(row["key"], row["shard"])), "XML")
                size = f'width="{row["width"]}" height="{row["height"]}"'
                images.write(f'  <image id="{rows - 1}" name={quoteattr(image)} {size}>\n')
                for label in scores.predicted(row[labels.name]) if labels is not None else ():
                    tag = names.get(label["name"]) or _shortened(work.plain(label["name"], "XML"))
                    tags[tag] = None
                    value = f'<attribute name="value">{label["score"]:.9g}</attribute>' if are_values else ""
                    images.write(f'    <tag label={quoteattr(tag)} source="auto">{value}</tag>\n')
                if mask is not None:
                    ids_HW = class_map(row[mask.name], row["height"], row["width"])
                    for k, region_HW, box in regions(ids_HW):
                        left, top, width, height = box.xywh
                        counts = runs(region_HW[box.top : box.bottom, box.left : box.right].reshape(-1))
                        rle = ", ".join(map(str, counts.tolist()))
                        images.write(
                            f'    <mask label={quoteattr(names[of_mask[k]])} source="auto" occluded="0" rle="{rle}" '
                            f'left="{left}" top="{top}" width="{width}" height="{height}" z_order="0"></mask>\n'
                        )
                images.write("  </image>\n")
            out.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n')
            name = _element("name", work.plain(self.options.name or source.model, "XML"))
            task = f"{name}<size>{rows}</size><mode>annotation</mode>"
            out.write(f"  <meta><task>{task}\n    <labels>\n")
            kinds = dict.fromkeys(tags, "tag")
            for name in (names[name] for name in of_mask):  # CVAT refuses a task with two labels of one name
                kinds[name] = "any" if name in kinds else "mask"
            for name, kind in kinds.items():
                colour = "#" + hashlib.sha256(name.encode()).hexdigest()[:6]
                text = f"{_element('name', name)}<color>{colour}</color><type>{kind}</type>"
                attributes = VALUE if are_values and name in tags and kind != "mask" else ""
                out.write(f"      <label>{text}<attributes>{attributes}</attributes></label>\n")
            out.write("    </labels>\n  </task></meta>\n")
            images.seek(0)
            while some := images.read(1 << 20):
                out.write(some)
            out.write("</annotations>\n")


def label_names(names: Iterable[str], work: Workspace) -> dict[str, str]:
    """Map class names to distinct names that CVAT stores unchanged."""
    names = list(dict.fromkeys(names))
    plain = [work.plain(name, "XML") for name in names]
    if long := sum(len(name) > NAME_LETTERS for name in plain):
        work.note(f"class names longer than {NAME_LETTERS} characters, which CVAT cuts off: {long}; shortened")
    return dict(zip(names, distinct_names(list(map(_shortened, plain))), strict=True))


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else f"{name[:KEPT_LETTERS]}…"


def _element(tag: str, text: str) -> str:
    """Write an element. Carriage returns are escaped, since XML parsers turn bare ones into line feeds."""
    return f"<{tag}>{escape(text, {chr(13): '&#13;'})}</{tag}>"
