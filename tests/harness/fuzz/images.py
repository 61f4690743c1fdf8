"""One seed: a mutated image through decode and preprocess, exact and fast; pixels or a known reason, nothing else."""

from __future__ import annotations

import random
from functools import partial
from typing import get_args

import numpy as np
import torch

from img2parquet.images.decode import DecodePolicy, decode
from img2parquet.images.jpeg_scaling import shrink_for
from img2parquet.images.preprocess import Preprocessor, PreprocessSettings
from img2parquet.schema import Pixels, Reason, Rejection
from tests.harness.fuzz.children import Suite
from tests.harness.fuzz.corpus import images
from tests.harness.fuzz.mutate import mutated

SIDE = 32
MAX_PIXELS = 10_000_000
# RGB, and what Pillow holds beside it (four bytes a pixel, and a frame composed of two); text chunks may take 64 MiB
MOST_MB = MAX_PIXELS * (3 + 4 + 8) / 1e6 + 64
LIMIT_S = 30.0
REASONS = set(get_args(Reason)) - {
    "no_key",
    "duplicate_key",
    "not_found",
    "refused",
    "unreachable",
    "shard_damaged",
    "worker_died",
    "timed_out",
}
WARNINGS = {"16bit_scaled", "animated", "salvaged"}
RESIZES = (
    PreprocessSettings("shortest_edge", SIDE, SIDE, "bicubic", SIDE, SIDE),
    PreprocessSettings("exact", SIDE, SIDE + 3, "bilinear", None, None),
    PreprocessSettings("shortest_edge", SIDE + 5, SIDE + 5, "lanczos", SIDE, SIDE),
    PreprocessSettings("none", SIDE, SIDE, "bilinear", SIDE, SIDE),
)


def image(seed: int) -> bytes:
    """The mutated image of a seed."""
    rng = random.Random(f"image {seed}")
    return mutated(rng.choice(images()), rng, images())


def check(seed: int, data: bytes) -> str:
    """`pixels`, or the reason of the reject. Raises AssertionError for anything else."""
    rng = random.Random(f"policy {seed}")
    policy = DecodePolicy(
        exif=rng.choice(("apply", "ignore")), alpha=rng.choice(("white", "drop")), max_pixels=MAX_PIXELS,
        salvage=rng.random() < 0.2,
    )  # fmt: skip
    torch.set_num_threads(1)
    resize = RESIZES[seed % len(RESIZES)]
    exact = decode(data, policy)
    became = check_outcome(exact, resize)
    fast = decode(data, policy, partial(shrink_for, [resize]))
    assert isinstance(exact, Rejection) == isinstance(fast, Rejection), f"exact {_told(exact)}, fast {_told(fast)}"
    if isinstance(exact, Rejection) and isinstance(fast, Rejection):
        assert exact.reason == fast.reason
        return became
    assert isinstance(exact, Pixels) and isinstance(fast, Pixels)
    assert (exact.height, exact.width) == (fast.height, fast.width)
    assert (check_outcome(fast, resize) == "pixels") == (became == "pixels")
    return became if fast.shrunk == 1 else f"{became}, shrunk"


def check_outcome(decoded: Pixels | Rejection, resize: PreprocessSettings) -> str:
    """What the preprocessing makes of it."""
    if isinstance(decoded, Rejection):
        assert decoded.reason in REASONS and decoded.message
        return decoded.reason
    assert decoded.rgb_HWC.dtype == np.uint8 and decoded.rgb_HWC.ndim == 3 and decoded.rgb_HWC.shape[2] == 3
    assert 0 < decoded.height * decoded.width <= MAX_PIXELS
    assert set(decoded.warnings) <= WARNINGS
    if decoded.shrunk == 1:
        assert decoded.rgb_HWC.shape[:2] == (decoded.height, decoded.width)
    crop = Preprocessor(resize)(decoded)
    if isinstance(crop, Rejection):
        assert crop.reason == "aspect_ratio" and crop.message
        return crop.reason
    assert crop.dtype == np.uint8 and crop.shape == (*resize.size_HW, 3)
    return "pixels"


SUITE = Suite(image, check, LIMIT_S, MOST_MB)


def _told(decoded: Pixels | Rejection) -> str:
    return str(decoded) if isinstance(decoded, Rejection) else f"pixels {decoded.height} x {decoded.width}"
