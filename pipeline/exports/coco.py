"""Masks to COCO's JSON of instances: one annotation for each image and class that is there, with area and box.

* Class k is category k + 1: 0 is "nothing" to many readers of COCO. Classes are regions, not things that are counted.
* `rle`: compressed run lengths of the whole region, which pycocotools reads for `iscrowd: 0` too. `polygons`: corners
  of pixels, see polygons.py; what others make of a polygon may differ by a pixel on its border.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pipeline.exports import Options, needs
from pipeline.exports.masks import Box, Region, class_map, class_names, regions, runs
from pipeline.exports.place import Workspace
from pipeline.exports.polygons import polygons
from pipeline.exports.source import Source
from pipeline.outputs.segmentation import coco_string


class Coco:
    shape = "file"
    takes = frozenset({"images", "masks"})
    last = ""

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, source: Source) -> None:
        if source.mask is None:
            raise needs(source, "coco", "a mask", "run the job with `outputs: [{kind: segmentation}]`")

    def write(self, source: Source, work: Workspace) -> None:
        mask = source.mask
        assert mask is not None
        annotation_id = 0
        with work.text() as out, work.scratch() as annotations:
            out.write(f'{{"info": {json.dumps({"description": f"img2parquet: {source.model}"})},\n')
            out.write(f'"licenses": [],\n"categories": {json.dumps(categories(class_names(mask)))},\n"images": [')
            for image_id, row in enumerate(source.rows_with(mask), 1):
                ids_HW = class_map(row[mask.name], row["height"], row["width"])
                out.write(("," if image_id > 1 else "") + "\n" + json.dumps(image(image_id, row, self.options)))
                for k, region_HW, box in regions(ids_HW):
                    annotation_id += 1
                    one = self._annotation(annotation_id, image_id, k, region_HW, box)
                    annotations.write(("," if annotation_id > 1 else "") + "\n" + json.dumps(one))
            out.write('\n],\n"annotations": [')
            annotations.seek(0)
            while some := annotations.read(1 << 20):
                out.write(some)
            out.write("\n]}\n")

    def _annotation(self, number: int, image_id: int, k: int, region_HW: Region, box: Box) -> dict[str, Any]:
        segmentation: Any
        if self.options.masks == "polygons":
            segmentation = polygons(region_HW)
        else:
            counts = runs(np.ascontiguousarray(region_HW.T).reshape(-1))
            segmentation = {"size": list(region_HW.shape), "counts": coco_string(counts)}
        return {
            "id": number, "image_id": image_id, "category_id": k + 1, "segmentation": segmentation,
            "area": int(region_HW.sum()), "bbox": box.xywh, "iscrowd": 0,
        }  # fmt: skip


def image(image_id: int, row: dict[str, Any], options: Options) -> dict[str, Any]:
    """COCO's entry of an image; `key` and `shard` say which row of the output it is."""
    name = options.image_of(row["key"], row["shard"])
    return {
        "id": image_id, "file_name": name, "width": row["width"], "height": row["height"],
        "key": row["key"], "shard": row["shard"],
    }  # fmt: skip


def categories(names: list[str]) -> list[dict[str, Any]]:
    return [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(names)]
