"""Export masks as COCO instances (JSON): one annotation for each image and class in it, with area and box.

* Class k is category k + 1, since many readers of COCO take 0 for "nothing". Classes are regions, not counted objects.
* `rle` writes compressed run lengths of the whole region, which pycocotools also reads for `iscrowd: 0`. `polygons`
  writes corners of pixels (polygons.py); other tools may fill a polygon differently by a pixel at its border.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from img2parquet.outputs.segmentation import coco_string
from img2parquet.results.exports import ExportOptions, needs
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.masks import Box, Region, class_map, class_names, regions, runs
from img2parquet.results.exports.polygons import polygons
from img2parquet.results.exports.rows import ExportRows


class Coco:
    shape = "file"
    takes = frozenset({"images", "masks"})
    last = ""

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def check(self, source: ExportRows) -> None:
        if source.mask is None:
            raise needs(source, "coco", "a mask", "run the job with `outputs: [{kind: segmentation}]`")

    def write(self, source: ExportRows, work: Workspace) -> None:
        mask = source.mask
        assert mask is not None
        annotation_id = 0
        with work.text() as out, work.scratch() as annotations:
            out.write(f'{{"info": {json.dumps({"description": f"img2parquet: {source.model}"})},\n')
            out.write(f'"licenses": [],\n"categories": {json.dumps(categories(class_names(mask)))},\n"images": [')
            for image_id, row in enumerate(source.rows_with(mask), 1):
                ids_HW = class_map(row[mask.name], row["height"], row["width"])
                out.write(("," if image_id > 1 else "") + "\n" + json.dumps(self._image(image_id, row, work)))
                for k, region_HW, box in regions(ids_HW):
                    annotation_id += 1
                    one = self._annotation(annotation_id, image_id, k, region_HW, box)
                    annotations.write(("," if annotation_id > 1 else "") + "\n" + json.dumps(one))
            out.write('\n],\n"annotations": [')
            annotations.seek(0)
            while some := annotations.read(1 << 20):
                out.write(some)
            out.write("\n]}\n")

    def _image(self, image_id: int, row: dict[str, Any], work: Workspace) -> dict[str, Any]:
        """Return COCO's entry for an image; `key` and `shard` identify its row in the output."""
        name = work.image(self.options.image_of(row["key"], row["shard"]))
        return {
            "id": image_id, "file_name": name, "width": row["width"], "height": row["height"],
            "key": row["key"], "shard": row["shard"],
        }  # fmt: skip

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


def categories(names: list[str]) -> list[dict[str, Any]]:
    return [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(names)]
