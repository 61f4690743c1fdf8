"""Read the sizes in a vision transformer's config.json, and refuse those that no patch fits into."""

from __future__ import annotations

from dataclasses import dataclass

from img2parquet.errors import CheckpointError

Pair = tuple[int, int]  # height and width


@dataclass(frozen=True)
class PatchSizes:
    """The sizes in a family's settings: of the trained image, of a patch, and of the input that this run asks for."""

    image_size: Pair = (224, 224)
    patch_size: Pair = (16, 16)
    input_size: Pair = (224, 224)  # the one field that config.json does not have

    @property
    def trained_grid(self) -> Pair:
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def input_grid(self) -> Pair:
        return self.input_size[0] // self.patch_size[0], self.input_size[1] // self.patch_size[1]


def pair(name: str, value: object) -> Pair:
    """Read a size: one number or (height, width). Raises CheckpointError when it is neither."""
    found = (value, value) if isinstance(value, int) else value
    if isinstance(found, list | tuple) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    raise CheckpointError(f"config.json: {name}: `{value}` is neither a positive number nor a pair of them")


def check_patches(s: PatchSizes) -> None:
    """Raise CheckpointError if an image has no room for a patch, or positions cannot be resized to the input's size."""
    for where, size in (("config.json: image_size", s.image_size), ("image_size", s.input_size)):
        if any(side < patch for side, patch in zip(size, s.patch_size, strict=True)):
            message = f"{where}: {_by(size)} is smaller than a patch, {_by(s.patch_size)}"
            raise CheckpointError(message, hint="use a multiple of the patch size")
    if s.image_size != s.input_size and s.trained_grid[0] != s.trained_grid[1]:
        hint = f"leave image_size out, or use {_by(s.image_size)}"
        raise CheckpointError(
            f"positions of a {_by(s.trained_grid)} grid cannot be resized, since it is not square", hint=hint
        )


def unread_note(s: PatchSizes) -> tuple[str, ...]:
    """Say which pixels of the input fill no whole patch, and so are not read, as in the reference."""
    (height, width), (rows, columns) = s.input_size, (n % p for n, p in zip(s.input_size, s.patch_size, strict=True))
    if not rows and not columns:
        return ()
    last = " and ".join(f"{count} {name}" for count, name in ((rows, "rows"), (columns, "columns")) if count)
    return (f"the last {last} of its {_by((height, width))} input fill no {_by(s.patch_size)} patch and are not read",)


def _by(size: Pair) -> str:
    return f"{size[0]}x{size[1]}"
