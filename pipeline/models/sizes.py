"""Sizes in a config.json of a plain vision transformer: read, and refused where patches do not fill them."""

from __future__ import annotations

from typing import Protocol

from pipeline.errors import CheckpointError

Pair = tuple[int, int]  # height and width


class Sized(Protocol):
    """Settings of a family: the image that positions were trained for, the input that is asked for."""

    @property
    def image_size(self) -> Pair: ...
    @property
    def input_size(self) -> Pair: ...
    @property
    def patch_size(self) -> Pair: ...
    @property
    def trained_grid(self) -> Pair: ...


def pair(name: str, value: object) -> Pair:
    """One number or (height, width). Raises CheckpointError."""
    found = (value, value) if isinstance(value, int) else value
    if isinstance(found, list | tuple) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    raise CheckpointError(f"config.json: {name}: `{value}` is neither a positive number nor a pair of them")


def check_patches(s: Sized) -> None:
    """Raises CheckpointError where patches do not fill an image, or positions cannot be resized to the input's."""
    for where, size in (("config.json: image_size", s.image_size), ("image_size", s.input_size)):
        if any(side % patch for side, patch in zip(size, s.patch_size, strict=True)):
            height, width = (max(1, round(n / patch)) * patch for n, patch in zip(size, s.patch_size, strict=True))
            message = f"{where}: {_by(size)} is not divisible by the patch size, {_by(s.patch_size)}"
            raise CheckpointError(message, hint=f"the nearest that is: {_by((height, width))}")
    if s.image_size != s.input_size and s.trained_grid[0] != s.trained_grid[1]:
        hint = f"leave image_size out, or give {_by(s.image_size)}"
        raise CheckpointError(f"positions of a {_by(s.trained_grid)} grid, not square, cannot be resized", hint=hint)


def _by(size: Pair) -> str:
    return f"{size[0]}x{size[1]}"
