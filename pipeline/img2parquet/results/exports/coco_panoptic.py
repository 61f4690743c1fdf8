"""Export masks in COCO's panoptic format: `panoptic.json`, and one PNG of segment ids per image in `panoptic/`.

It holds *stuff* only: a class map says what each pixel is, not which of several objects it belongs to. So each class of
an image is one segment, every category has `isthing: 0`, and panoptic quality measures regions, never counted objects.
A segment's id is that of its category, class + 1; 0 is a pixel without a class (void).
"""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from img2parquet.results.exports import ExportOptions, needs
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.masks import Ids, class_map, class_names, regions
from img2parquet.results.exports.rows import ExportRows


class CocoPanoptic:
    shape = "folder"
    takes = frozenset({"images"})
    last = "panoptic.json"

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def check(self, source: ExportRows) -> None:
        if source.mask is None:
            raise needs(source, "coco-panoptic", "a mask", "run the job with `outputs: [{kind: segmentation}]`")

    def write(self, source: ExportRows, work: Workspace) -> None:
        mask = source.mask
        assert mask is not None
        stuff = [
            {"id": k + 1, "name": name, "supercategory": "", "isthing": 0} for k, name in enumerate(class_names(mask))
        ]
        with work.text("panoptic.json") as out, work.scratch() as annotations:
            out.write(f'{{"info": {json.dumps({"description": f"img2parquet: {source.model}, stuff only"})},\n')
            out.write(f'"licenses": [],\n"categories": {json.dumps(stuff)},\n"images": [')
            for image_id, row in enumerate(source.rows_with(mask), 1):
                ids_HW = class_map(row[mask.name], row["height"], row["width"])
                file_name = f"{image_id:012d}.png"  # never the key, which can be any text
                with work.file(f"panoptic/{file_name}") as sink:
                    Image.fromarray(segment_colours(ids_HW)).save(sink, "PNG")
                comma = "," if image_id > 1 else ""
                name = work.image(self.options.image_of(row["key"], row["shard"]))
                entry = {"id": image_id, "file_name": name, "width": row["width"], "height": row["height"]}
                out.write(f"{comma}\n{json.dumps({**entry, 'key': row['key'], 'shard': row['shard']})}")
                segments = [
                    {"id": k + 1, "category_id": k + 1, "area": int(r.sum()), "bbox": box.xywh, "iscrowd": 0}
                    for k, r, box in regions(ids_HW)
                ]
                said = {"image_id": image_id, "file_name": file_name, "segments_info": segments}
                annotations.write(f"{comma}\n{json.dumps(said)}")
            out.write('\n],\n"annotations": [')
            annotations.seek(0)
            while some := annotations.read(1 << 20):
                out.write(some)
            out.write("\n]}\n")


def segment_colours(ids_HW: Ids) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Encode (H, W) class ids as (H, W, 3) colours: a segment's id is R + 256 G + 65536 B."""
    segments_HW = (ids_HW + 1).astype(np.int64)
    return np.stack([segments_HW >> shift & 255 for shift in (0, 8, 16)], axis=2).astype(np.uint8)
