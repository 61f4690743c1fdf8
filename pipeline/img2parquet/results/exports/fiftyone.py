"""Export labels, masks and embeddings as a folder in FiftyOne's own layout (`fiftyone.types.FiftyOneDataset`).

`metadata.json` describes the fields, `samples.json` holds the samples, and masks are PNG files of class ids in
`fields/<column>/`. `filepath` is where FiftyOne looks for an image, as `--images` says. Where a model has several
labels per image, `labels` has those of the job's `threshold` (0.5) or more; a regression has fields `value_<id>`.
This is the layout without a version, which needs no identifiers of FiftyOne's database; every version reads it.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from img2parquet.outputs.segmentation import png
from img2parquet.outputs.vectors import decode_vectors
from img2parquet.results.exports import ExportOptions, needs
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.masks import class_map, class_names
from img2parquet.results.exports.rows import ExportRows
from img2parquet.results.label_scores import LabelScores

EMBEDDED = "fiftyone.core.fields.EmbeddedDocumentField"


class FiftyOne:
    shape = "folder"
    takes = frozenset({"images", "name"})
    last = "metadata.json"

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def check(self, source: ExportRows) -> None:
        if source.mask is None and source.labels is None and source.vector is None:
            raise needs(source, "fiftyone", "labels, a mask or an embedding")

    def write(self, source: ExportRows, work: Workspace) -> None:
        labels, mask, vector = source.labels, source.mask, source.vector
        wanted = ["key", "shard", "width", "height", *(f.name for f in (labels, mask, vector) if f is not None)]
        number, values, scores = 0, dict[int, str](), source.label_scores
        with work.text("samples.json") as out:
            out.write('{"samples": [')
            for batch in source.batches(names=list(dict.fromkeys(wanted))):
                vectors = decode_vectors(batch.column(vector.name), vector) if vector is not None else None
                here = batch.select([n for n in batch.schema.names if vector is None or n != vector.name])
                for place, row in enumerate(source.python_rows(here)):
                    number += 1
                    sample = self._sample(row, work)
                    if labels is not None:
                        best = row[labels.name]
                        if scores.function == "none":
                            sample |= regressions(best)
                            values.update((one["id"], one["name"]) for one in best)
                        else:
                            sample |= classifications(best, scores)
                    if mask is not None:
                        name = f"fields/mask/{number:012d}.png"  # never the key, which can be any text
                        ids_HW = class_map(row[mask.name], row["height"], row["width"])
                        with work.file(name) as sink:  # FiftyOne shows 0 as nothing
                            sink.write(png(ids_HW + 1, len(class_names(mask)) + 1))
                        sample["mask"] = {"_cls": "Segmentation", "tags": [], "mask_path": name}
                    if vectors is not None:
                        sample["embedding"] = {"$binary": {"base64": packed(vectors[place]), "subType": "00"}}
                    out.write(("," if number > 1 else "") + "\n" + json.dumps(sample))
            out.write("\n]}\n")
        with work.text("metadata.json") as out:
            json.dump(self._metadata(source, values), out, indent=1)

    def _sample(self, row: dict[str, Any], work: Workspace) -> dict[str, Any]:
        size = {"width": row["width"], "height": row["height"]}
        return {
            "filepath": work.image(self.options.image_of(row["key"], row["shard"])), "tags": [], "_media_type": "image",
            "metadata": {"_cls": "ImageMetadata", **size}, "key": row["key"], "shard": row["shard"],
        }  # fmt: skip

    def _metadata(self, source: ExportRows, values: Mapping[int, str]) -> dict[str, Any]:
        """Describe the fields. values: class names of a regression's values, by class id."""
        kinds = {"filepath": "StringField", "key": "StringField", "shard": "StringField"}
        fields = {name: f"fiftyone.core.fields.{kind}" for name, kind in kinds.items()}
        fields["tags"] = "fiftyone.core.fields.ListField(fiftyone.core.fields.StringField)"
        fields["metadata"] = f"{EMBEDDED}(fiftyone.core.metadata.ImageMetadata)"
        fields |= {field_of(id): f"{EMBEDDED}(fiftyone.core.labels.Regression)" for id in sorted(values)}
        if source.labels is not None and source.label_scores.function != "none":
            fields["label"] = f"{EMBEDDED}(fiftyone.core.labels.Classification)"
            fields["labels"] = f"{EMBEDDED}(fiftyone.core.labels.Classifications)"
        if source.mask is not None:
            fields["mask"] = f"{EMBEDDED}(fiftyone.core.labels.Segmentation)"
        if source.vector is not None:
            fields["embedding"] = "fiftyone.core.fields.VectorField"
        targets = {str(k + 1): name for k, name in enumerate(class_names(source.mask))} if source.mask else {}
        return {
            "name": self.options.name or source.model, "media_type": "image", "sample_fields": fields,
            "info": {
                "img2parquet": source.uri, "mask_targets": {"mask": targets},
                **({"values": {field_of(id): values[id] for id in sorted(values)}} if values else {}),
            },
        }  # fmt: skip


def classifications(best: list[dict[str, Any]], scores: LabelScores) -> dict[str, Any]:
    """Return FiftyOne's fields for labels: `label` is the best one, `labels` all of them, or those that are predicted
    where there are several."""
    best = best if scores.function == "softmax" else scores.predicted(best)
    found = [{"_cls": "Classification", "tags": [], "label": b["name"], "confidence": b["score"]} for b in best]
    return {"label": found[0] if found else None, "labels": {"_cls": "Classifications", "classifications": found}}


def regressions(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {field_of(one["id"]): {"_cls": "Regression", "tags": [], "value": one["score"]} for one in values}


def field_of(id: int) -> str:
    return f"value_{id}"


def packed(vector_D: Any) -> str:
    """Encode a vector as FiftyOne's database does: a zlib-compressed .npy file."""
    sink = io.BytesIO()
    np.save(sink, np.asarray(vector_D, np.float32), allow_pickle=False)
    return base64.b64encode(zlib.compress(sink.getvalue())).decode()
