"""Export labels and masks as Label Studio pre-annotations: tasks with predictions, and a labelling config for them.

Import `tasks-<n>.json` into a project whose labelling interface is `label_config.xml`. A row's labels become choices,
with the best one chosen, or each of the job's `threshold` (0.5) or more where the model has several labels per image;
values of a regression become numbers. A mask becomes one brush region per class, in Label Studio's own run lengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from img2parquet.results.exports import ExportOptions, needs
from img2parquet.results.exports.destination import Workspace
from img2parquet.results.exports.masks import class_map, class_names, regions, runs
from img2parquet.results.exports.rows import ExportRows
from img2parquet.results.label_scores import LabelScores

TASKS_PER_FILE = 10_000  # since Label Studio holds an import in memory
RUN_BITS = (3, 4, 8, 16)  # bits to write a run's length in; two bits say which


class LabelStudio:
    shape = "folder"
    takes = frozenset({"images"})
    last = "label_config.xml"

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def check(self, source: ExportRows) -> None:
        if source.mask is None and source.labels is None:
            raise needs(source, "label-studio", "labels or a mask", "add `{kind: labels}` to the job's outputs")

    def write(self, source: ExportRows, work: Workspace) -> None:
        labels, mask = source.labels, source.mask
        # as XML can hold them, since the labelling config must have the names of the predictions
        of_mask = [work.plain(name, "XML") for name in class_names(mask)] if mask is not None else []
        names: dict[str, None] = {}  # in order of their first appearance
        values: dict[int, str] = {}  # names of a regression's values, by class id
        scores = source.label_scores
        out, count = None, 0
        for count, row in enumerate(source.rows_with(labels, mask)):
            if count % TASKS_PER_FILE == 0:
                if out:
                    out.write("\n]\n")
                    out.close()
                out = work.text(f"tasks-{count // TASKS_PER_FILE:04d}.json")
            results = []
            if labels is not None:
                best = [{**label, "name": work.plain(label["name"], "XML")} for label in row[labels.name]]
                if scores.function == "none":
                    values.update((one["id"], one["name"]) for one in best)
                    results += numbers(best)
                else:
                    names.update(dict.fromkeys(one["name"] for one in best))
                    results += choices(best, scores)
            if mask is not None:
                results += brushes(row[mask.name], row["height"], row["width"], of_mask)
            comma = "[" if count % TASKS_PER_FILE == 0 else ","
            assert out is not None
            out.write(f"{comma}\n{json.dumps(self._task(row, results, source.model, work))}")
        if out is None:
            out = work.text("tasks-0000.json")
            out.write("[")
        out.write("\n]\n")
        out.close()
        with work.text("label_config.xml") as config:
            config.write(label_config(list(names), of_mask, scores.function == "sigmoid", values))

    def _task(self, row: dict[str, Any], results: list[dict[str, Any]], model: str, work: Workspace) -> dict[str, Any]:
        image = work.image(self.options.image_of(row["key"], row["shard"]))
        data = {"image": image, "key": row["key"], "shard": row["shard"]}
        scores = [result["score"] for result in results if "score" in result]
        score = {"score": scores[0]} if scores else {}
        return {"data": data, "predictions": [{"model_version": model, **score, "result": results}]}


def choices(best: list[dict[str, Any]], scores: LabelScores) -> list[dict[str, Any]]:
    """Return the predicted labels as choices; `meta` has all labels with their scores."""
    chosen = scores.predicted(best)
    if not chosen:
        return []
    said = [f"{one['name']} {one['score']:.4f}" for one in best]
    return [
        {
            "id": "label", "from_name": "label", "to_name": "image", "type": "choices", "meta": {"text": said},
            "value": {"choices": [one["name"] for one in chosen]}, "score": chosen[0]["score"],
        }
    ]  # fmt: skip


def numbers(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one number for each value of a regression."""
    return [
        {
            "id": f"value-{one['id']}", "from_name": f"value-{one['id']}", "to_name": "image", "type": "number",
            "value": {"number": one["score"]},
        }
        for one in values
    ]  # fmt: skip


def brushes(stored: Any, height: int, width: int, names: list[str]) -> list[dict[str, Any]]:
    """Return one brush region for each class in the mask."""
    return [
        {
            "id": f"mask-{k}", "from_name": "mask", "to_name": "image", "type": "brushlabels",
            "original_width": width, "original_height": height, "image_rotation": 0,
            "value": {"format": "rle", "rle": brush_rle(region_HW), "brushlabels": [names[k]]},
        }
        for k, region_HW, _ in regions(class_map(stored, height, width))
    ]  # fmt: skip


def brush_rle(region_HW: npt.NDArray[np.bool_]) -> list[int]:
    """Encode a region in Label Studio's run lengths: row by row, four equal channels of 0 or 255.

    The header has 32 bits for the number of values, 5 bits for their width - 1, and four times 4 bits for the widths
    of lengths - 1. Each run has a 1, two bits for which width, the length - 1 in that width, and the value."""
    flat_N = region_HW.reshape(-1)
    bits = [f"{4 * len(flat_N):032b}", f"{8 - 1:05b}", *(f"{width - 1:04b}" for width in RUN_BITS)]
    for place, count in enumerate(runs(flat_N).tolist()):
        value, left = "11111111" if place % 2 else "00000000", 4 * count
        while left:
            length = min(left, 1 << RUN_BITS[-1])
            which = next(i for i, width in enumerate(RUN_BITS) if length <= 1 << width)
            bits.append(f"1{which:02b}{length - 1:0{RUN_BITS[which]}b}{value}")
            left -= length
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def label_config(
    choices: list[str], brushes: list[str], several: bool = False, values: Mapping[int, str] = MappingProxyType({})
) -> str:
    """Write the labelling interface that fits the predictions. values: names of a regression's values, by class id."""

    def tags(kind: str, names: list[str]) -> str:
        return "".join(f"    <{kind} value={quoteattr(name)}/>\n" for name in names)

    lines = '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
    if choices:
        how = "multiple" if several else "single"
        lines += f'  <Choices name="label" toName="image" choice="{how}">\n{tags("Choice", choices)}  </Choices>\n'
    for id, name in sorted(values.items()):
        lines += f"  <Header value={quoteattr(name)}/>\n"
        lines += f'  <Number name="value-{id}" toName="image"/>\n'
    if brushes:
        lines += f'  <BrushLabels name="mask" toName="image">\n{tags("Label", brushes)}  </BrushLabels>\n'
    return lines + "</View>\n"
