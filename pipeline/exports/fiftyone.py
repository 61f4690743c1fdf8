"""Labels, masks and embeddings to a folder in FiftyOne's own layout (`fiftyone.types.FiftyOneDataset`).

`metadata.json` says what the fields are, `samples.json` has the samples, masks are PNG files of class ids in
`fields/<column>/`. `filepath` is where FiftyOne looks for an image: `--images` says where those are.
The layout is the one without a version, which needs no identifiers of FiftyOne's database; every version reads it.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from typing import Any

import numpy as np

from pipeline.exports import Options, needs
from pipeline.exports.masks import class_map, class_names
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source
from pipeline.outputs.segmentation import png
from pipeline.vectors import decode_vectors

EMBEDDED = "fiftyone.core.fields.EmbeddedDocumentField"


class FiftyOne:
    shape = "folder"
    takes = frozenset({"images", "name"})
    last = "metadata.json"

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, source: Source) -> None:
        if source.mask is None and source.labels is None and source.vector is None:
            raise needs(source, "fiftyone", "labels, a mask or an embedding")

    def write(self, source: Source, work: Workspace) -> None:
        labels, mask, vector = source.labels, source.mask, source.vector
        wanted = ["key", "shard", "width", "height", *(f.name for f in (labels, mask, vector) if f is not None)]
        number = 0
        with work.text("samples.json") as out:
            out.write('{"samples": [')
            for batch in source.batches(names=list(dict.fromkeys(wanted))):
                vectors = decode_vectors(batch.column(vector.name), vector) if vector is not None else None
                here = batch.select([n for n in batch.schema.names if vector is None or n != vector.name])
                for place, row in enumerate(here.to_pylist()):
                    number += 1
                    sample = self._sample(row)
                    if labels is not None:
                        sample |= classifications(row[labels.name])
                    if mask is not None:
                        name = f"fields/mask/{number:012d}.png"  # never the key: that is anything
                        ids_HW = class_map(row[mask.name], row["height"], row["width"])
                        with work.file(name) as sink:  # 0 is what FiftyOne shows as nothing
                            sink.write(png(ids_HW + 1, len(class_names(mask)) + 1))
                        sample["mask"] = {"_cls": "Segmentation", "tags": [], "mask_path": name}
                    if vectors is not None:
                        sample["embedding"] = {"$binary": {"base64": packed(vectors[place]), "subType": "00"}}
                    out.write(("," if number > 1 else "") + "\n" + json.dumps(sample))
            out.write("\n]}\n")
        with work.text("metadata.json") as out:
            json.dump(self._metadata(source), out, indent=1)

    def _sample(self, row: dict[str, Any]) -> dict[str, Any]:
        size = {"width": row["width"], "height": row["height"]}
        return {
            "filepath": self.options.image_of(row["key"], row["shard"]), "tags": [], "_media_type": "image",
            "metadata": {"_cls": "ImageMetadata", **size}, "key": row["key"], "shard": row["shard"],
        }  # fmt: skip

    def _metadata(self, source: Source) -> dict[str, Any]:
        kinds = {"filepath": "StringField", "key": "StringField", "shard": "StringField"}
        fields = {name: f"fiftyone.core.fields.{kind}" for name, kind in kinds.items()}
        fields["tags"] = "fiftyone.core.fields.ListField(fiftyone.core.fields.StringField)"
        fields["metadata"] = f"{EMBEDDED}(fiftyone.core.metadata.ImageMetadata)"
        if source.labels is not None:
            fields["label"] = f"{EMBEDDED}(fiftyone.core.labels.Classification)"
            fields["labels"] = f"{EMBEDDED}(fiftyone.core.labels.Classifications)"
        if source.mask is not None:
            fields["mask"] = f"{EMBEDDED}(fiftyone.core.labels.Segmentation)"
        if source.vector is not None:
            fields["embedding"] = "fiftyone.core.fields.VectorField"
        targets = {str(k + 1): name for k, name in enumerate(class_names(source.mask))} if source.mask else {}
        return {
            "name": self.options.name or source.model, "media_type": "image", "sample_fields": fields,
            "info": {"img2parquet": source.uri, "mask_targets": {"mask": targets}},
        }  # fmt: skip


def classifications(best: list[dict[str, Any]]) -> dict[str, Any]:
    """`label` is the best one, `labels` all of them."""
    found = [{"_cls": "Classification", "tags": [], "label": b["name"], "confidence": b["score"]} for b in best]
    return {"label": found[0] if found else None, "labels": {"_cls": "Classifications", "classifications": found}}


def packed(vector_D: Any) -> str:
    """A vector as FiftyOne's database has it: a zlib-compressed .npy."""
    sink = io.BytesIO()
    np.save(sink, np.asarray(vector_D, np.float32), allow_pickle=False)
    return base64.b64encode(zlib.compress(sink.getvalue())).decode()
