"""`preprocess: fast`: how many times smaller a JPEG is decoded -> 1, 2 or 4, for the resizes that follow.

* 1/2 and 1/4, which libjpeg-turbo has vector code for. The N/8 between are slower than the next larger (1603 x 1207:
  whole 10.2 ms, 5/8 11.9, 1/2 8.7, 3/8 9.3). 1/8 sees one value of each block, moves colours by a quarter of a level,
  and gains little over 1/4: most of what is left is reading the entropy code, and that is never skipped.
* Never below `SPARE` times what a resize makes, so that its own filter decides what is seen.
* One decode serves every model of a job, so the most demanding of their resizes decides; `describe` names them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from pipeline.preprocess import PreprocessSettings, resized_size

SPARE = 2
FACTORS = (4, 2)


def shrink_for(resizes: Collection[PreprocessSettings], source_HW: tuple[int, int]) -> int:
    """The largest of `FACTORS` that every resize of an upright source of that size can spare, or 1."""
    return next((by for by in FACTORS if all(_spares(resize, source_HW, by) for resize in resizes)), 1)


def _spares(resize: PreprocessSettings, source_HW: tuple[int, int], by: int) -> bool:
    if resize.resample == "nearest":  # takes single pixels, which a smaller image no longer has
        return False
    size_HW = resized_size(source_HW, resize)
    return all(source >= SPARE * size * by for source, size in zip(source_HW, size_HW, strict=True))


def describe(resizes: Iterable[PreprocessSettings]) -> dict[str, Any]:
    """What the run's identity records, as JSON values: another model in the job may change this one's pixels."""
    targets = {(each.resize, each.resize_height, each.resize_width, each.resample) for each in resizes}
    return {"jpeg": [f"1/{by}" for by in FACTORS], "spare": SPARE, "decoded_for": sorted(map(list, targets))}
