"""Measure on a job's own images how far apart the pixels of the two kinds of `preprocess` are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from img2parquet.batch import Work
from img2parquet.images.decode import decode
from img2parquet.images.preprocess import Preprocessor, PreprocessSettings
from img2parquet.read import read_part
from img2parquet.schema import Part, Pixels, Rejection, Row

IMAGES = 16
ARITHMETIC = {
    "torchvision": "those of its processor's torchvision backend (`preprocess: exact`)",
    "pil": "those of its processor's PIL backend (`preprocess: pil`)",
    "timm": "timm's (`preprocess: pil`)",
}


def describe_drift(work: Work, parts: Sequence[Part]) -> Iterator[str]:
    """Say for each model whose pixels it gets, and by how many of the 255 levels the other kind's differ.

    parts: what to read the first images from. The scaled decoding of `preprocess: fast` is left out."""
    images = list(islice(_images(work, parts), IMAGES))
    for name, card in work.cards.items():
        own = card.preprocess
        other = replace(own, pixels="pil" if own.pixels == "torchvision" else "torchvision")
        differences = list(_differences(images, own, other))
        if differences:
            mean, most = np.mean([np.mean(levels) for levels in differences]), max(map(np.max, differences))
            yield (
                f"pixels of `{name}` are {ARITHMETIC[own.pixels]}; {ARITHMETIC[other.pixels]} differ by {mean:.3f} of "
                f"255 on average and by {most} at most, over {len(differences)} images"
            )


def _images(work: Work, parts: Sequence[Part]) -> Iterator[Pixels]:
    policy, with_alpha = work.job.decode.policy(), any(card.preprocess.channels == 4 for card in work.cards.values())
    for part in parts:
        for row in islice(read_part(work.job.input, part), IMAGES):
            pixels = decode(row.image, policy, None, with_alpha) if isinstance(row, Row) else None
            if isinstance(pixels, Pixels):
                yield pixels


def _differences(
    images: Sequence[Pixels], own: PreprocessSettings, other: PreprocessSettings
) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.int16]]]:
    for pixels in images:
        ours, theirs = Preprocessor(own)(pixels), Preprocessor(other)(pixels)
        if not isinstance(ours, Rejection) and not isinstance(theirs, Rejection):
            yield np.abs(ours.astype(np.int16) - theirs)
