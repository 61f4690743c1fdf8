"""Labels and masks to CVAT's XML 1.1 for images: the best label as a tag, each class of a mask as a mask shape.

A mask's run lengths are those of its box, rows first, the first run of pixels outside, perhaps of none.
"""

from __future__ import annotations

import hashlib
from xml.sax.saxutils import escape, quoteattr

from pipeline.exports import Options, needs
from pipeline.exports.masks import class_map, class_names, regions, runs
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source


class Cvat:
    shape = "file"
    takes = frozenset({"images", "name"})
    last = ""

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, source: Source) -> None:
        if source.mask is None and source.labels is None:
            raise needs(source, "cvat", "labels or a mask", "add `{kind: labels}` to the job's outputs")

    def write(self, source: Source, work: Workspace) -> None:
        labels, mask = source.labels, source.mask

        def plain(text: str) -> str:
            return work.plain(text, "XML")

        def quoted(text: str) -> str:
            return quoteattr(plain(text))

        tags: dict[str, None] = {}
        rows = 0
        with work.text() as out, work.scratch() as images:
            for rows, row in enumerate(source.rows_with(labels, mask), 1):
                name = quoted(self.options.image_of(row["key"], row["shard"]))
                images.write(f'  <image id="{rows - 1}" name={name} width="{row["width"]}" height="{row["height"]}">\n')
                if labels is not None and row[labels.name]:
                    best = row[labels.name][0]["name"]
                    tags[best] = None
                    images.write(f'    <tag label={quoted(best)} source="auto"></tag>\n')
                if mask is not None:
                    ids_HW = class_map(row[mask.name], row["height"], row["width"])
                    for k, region_HW, box in regions(ids_HW):
                        left, top, width, height = box.xywh
                        counts = runs(region_HW[box.top : box.bottom, box.left : box.right].reshape(-1))
                        rle = ", ".join(map(str, counts.tolist()))
                        images.write(
                            f'    <mask label={quoted(class_names(mask)[k])} source="auto" occluded="0" rle="{rle}" '
                            f'left="{left}" top="{top}" width="{width}" height="{height}" z_order="0"></mask>\n'
                        )
                images.write("  </image>\n")
            out.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n')
            task = f"<name>{escape(plain(self.options.name or source.model))}</name><size>{rows}</size>"
            out.write(f"  <meta><task>{task}<mode>annotation</mode>\n    <labels>\n")
            kinds = [(name, "tag") for name in tags]
            kinds += [(name, "mask") for name in (class_names(mask) if mask is not None else [])]
            for name, kind in kinds:
                colour = "#" + hashlib.sha256(name.encode()).hexdigest()[:6]
                text = f"<name>{escape(plain(name))}</name><color>{colour}</color><type>{kind}</type>"
                out.write(f"      <label>{text}<attributes></attributes></label>\n")
            out.write("    </labels>\n  </task></meta>\n")
            images.seek(0)
            while some := images.read(1 << 20):
                out.write(some)
            out.write("</annotations>\n")
