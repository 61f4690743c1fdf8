"""Choose how many times smaller a JPEG is decoded with `preprocess: fast`: 1, 2 or 4 (shrink-on-load).

- Only 1/2 and 1/4 are used, for which libjpeg-turbo has vector code. The N/8 between them are slower than the next
  larger one (1603 x 1207: whole 10.2 ms, 5/8 11.9, 1/2 8.7, 3/8 9.3). 1/8 sees one value of each block, moves colours
  by a quarter of a level, and gains little over 1/4: most of the remaining time goes into reading the entropy code,
  which cannot be skipped.
- At least `SPARE` times the resize's target size is kept, so that the resize's own filter decides what the model sees.
- One decode serves every model of a job, so the most demanding of their resizes decides; `describe` lists all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from img2parquet.images.preprocess import PreprocessSettings, resized_size

SPARE = 2
FACTORS = (4, 2)


def shrink_for(resizes: Collection[PreprocessSettings], source_HW: tuple[int, int]) -> int:
    """Return the largest of `FACTORS` that leaves enough pixels for every resize of an upright source, or 1."""
    return next((factor for factor in FACTORS if all(_allows(resize, source_HW, factor) for resize in resizes)), 1)


def _allows(resize: PreprocessSettings, source_HW: tuple[int, int], factor: int) -> bool:
    if resize.resample == "nearest":  # takes single pixels, which a smaller image no longer has
        return False
    size_HW = resized_size(source_HW, resize)
    return all(source >= SPARE * size * factor for source, size in zip(source_HW, size_HW, strict=True))


def describe(resizes: Iterable[PreprocessSettings]) -> dict[str, Any]:
    """Return what the run's identity records, as JSON values: another model of the job may change this one's pixels."""
    targets = {
        (each.resize, each.resize_height, each.resize_width, each.resample)
        + (() if each.longest_edge is None else (each.longest_edge,))
        for each in resizes
    }
    return {"jpeg": [f"1/{factor}" for factor in FACTORS], "spare": SPARE, "decoded_for": sorted(map(list, targets))}
