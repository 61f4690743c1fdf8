"""Labels and masks to Label Studio's pre-annotations: tasks with predictions, and the labelling config they fit.

`tasks-<n>.json` is imported into a project whose labelling interface is `label_config.xml`. Choices are the labels of a
row, best first, the first one chosen; a mask is one brush region per class, in Label Studio's own run lengths.
"""

from __future__ import annotations

import json
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from pipeline.exports import Options, needs
from pipeline.exports.masks import class_map, class_names, regions, runs
from pipeline.exports.place import Workspace
from pipeline.exports.source import Source

TASKS_PER_FILE = 10_000  # Label Studio holds an import in memory
RUN_BITS = (3, 4, 8, 16)  # how long a run's length may be written; two bits say which


class LabelStudio:
    shape = "folder"
    takes = frozenset({"images"})
    last = "label_config.xml"

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, source: Source) -> None:
        if source.mask is None and source.labels is None:
            raise needs(source, "label-studio", "labels or a mask", "add `{kind: labels}` to the job's outputs")

    def write(self, source: Source, work: Workspace) -> None:
        labels, mask = source.labels, source.mask
        names: dict[str, None] = {}  # in order of their first appearance
        out, count = None, 0
        for count, row in enumerate(source.rows_with(labels, mask)):
            if count % TASKS_PER_FILE == 0:
                if out:
                    out.write("\n]\n")
                    out.close()
                out = work.text(f"tasks-{count // TASKS_PER_FILE:04d}.json")
            results = []
            if labels is not None:
                names.update(dict.fromkeys(best["name"] for best in row[labels.name]))
                results += choices(row[labels.name])
            if mask is not None:
                results += brushes(row[mask.name], row["height"], row["width"], class_names(mask))
            comma = "[" if count % TASKS_PER_FILE == 0 else ","
            assert out is not None
            out.write(f"{comma}\n{json.dumps(self._task(row, results, source.model))}")
        if out is None:
            out = work.text("tasks-0000.json")
            out.write("[")
        out.write("\n]\n")
        out.close()
        with work.text("label_config.xml") as config:
            config.write(label_config(list(names), class_names(mask) if mask is not None else [], work))

    def _task(self, row: dict[str, Any], results: list[dict[str, Any]], model: str) -> dict[str, Any]:
        data = {"image": self.options.image_of(row["key"], row["shard"]), "key": row["key"], "shard": row["shard"]}
        scores = [result["score"] for result in results if "score" in result]
        score = {"score": scores[0]} if scores else {}
        return {"data": data, "predictions": [{"model_version": model, **score, "result": results}]}


def choices(best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first label as the choice that is made; all of them, with scores, in `meta`."""
    if not best:
        return []
    said = [f"{one['name']} {one['score']:.4f}" for one in best]
    return [
        {
            "id": "label", "from_name": "label", "to_name": "image", "type": "choices", "meta": {"text": said},
            "value": {"choices": [best[0]["name"]]}, "score": best[0]["score"],
        }
    ]  # fmt: skip


def brushes(stored: Any, height: int, width: int, names: list[str]) -> list[dict[str, Any]]:
    """One brush region for each class that is there."""
    return [
        {
            "id": f"mask-{k}", "from_name": "mask", "to_name": "image", "type": "brushlabels",
            "original_width": width, "original_height": height, "image_rotation": 0,
            "value": {"format": "rle", "rle": brush_rle(region_HW), "brushlabels": [names[k]]},
        }
        for k, region_HW, _ in regions(class_map(stored, height, width))
    ]  # fmt: skip


def brush_rle(region_HW: npt.NDArray[np.bool_]) -> list[int]:
    """Label Studio's run lengths of a region, as bytes: rows first, four equal channels of 0 or 255.

    32 bits how many values, 5 bits their width - 1, four times 4 bits the widths of lengths - 1; then for each run
    a 1, two bits which width, the length - 1 in it, and the value."""
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


def label_config(choices: list[str], brushes: list[str], work: Workspace) -> str:
    """The labelling interface that the predictions fit."""

    def tags(kind: str, names: list[str]) -> str:
        return "".join(f"    <{kind} value={quoteattr(work.plain(name, 'XML'))}/>\n" for name in names)

    lines = '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
    if choices:
        lines += f'  <Choices name="label" toName="image" choice="single">\n{tags("Choice", choices)}  </Choices>\n'
    if brushes:
        lines += f'  <BrushLabels name="mask" toName="image">\n{tags("Label", brushes)}  </BrushLabels>\n'
    return lines + "</View>\n"
