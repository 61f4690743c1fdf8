"""Make mosaics of textures with their ground truth: the texture that every pixel was cut from.

A mosaic is a Voronoi diagram of a few seeds, each cell filled from one texture's train or held-out region.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL
from make_shards import encode, photos_hash, tar
from photos import PHOTOS, Box, Photo, held_out_box, train_boxes
from PIL import Image

TEXTURES = ("brick", "grass", "gravel", "coins", "galaxies", "tissue", "cat", "flower")
SIZE = 128
RECIPE = 1  # increase when the bytes change
MANIFEST = "manifest.json"  # written last: a folder that contains it is complete

Region = Literal["train", "held_out"]
Pixels = npt.NDArray[np.uint8]


class Mosaics:
    """Draw mosaics: `mosaics(draw, size)` returns RGB pixels (size, size, 3) and class ids (size, size)."""

    def __init__(self, region: Region) -> None:
        photos = [next(photo for photo in PHOTOS if photo.name == name) for name in TEXTURES]
        self.images = [photo.pixels() for photo in photos]
        self.boxes = [boxes(photo, image, region) for photo, image in zip(photos, self.images, strict=True)]

    def __call__(self, draw: np.random.Generator, size: int = SIZE) -> tuple[Pixels, Pixels]:
        cells_HW = voronoi(draw, size, cells=int(draw.integers(2, 6)))
        textures = draw.permutation(len(TEXTURES))[: cells_HW.max() + 1].astype(np.uint8)
        truth_HW = textures[cells_HW]
        mosaic_HWC = np.zeros((size, size, 3), np.uint8)
        for texture in textures.tolist():
            inside_HW = truth_HW == texture
            mosaic_HWC[inside_HW] = self.patch(texture, draw, size)[inside_HW]
        return mosaic_HWC, truth_HW

    def patch(self, texture: int, draw: np.random.Generator, size: int) -> Pixels:
        """Cut a square of the texture, `size` pixels wide, mirrored at random."""
        roomy = [box for box in self.boxes[texture] if min(box.width, box.height) >= size]
        box = roomy[int(draw.integers(len(roomy)))]
        left = box.left + int(draw.integers(0, box.width - size + 1))
        top = box.top + int(draw.integers(0, box.height - size + 1))
        square_HWC = self.images[texture][top : top + size, left : left + size]
        if draw.random() < 0.5:
            square_HWC = square_HWC[:, ::-1]
        return square_HWC


def boxes(photo: Photo, image_HWC: Pixels, region: Region) -> tuple[Box, ...]:
    height, width, _ = image_HWC.shape
    return train_boxes(photo, width, height) if region == "train" else (held_out_box(photo, width, height),)


def voronoi(draw: np.random.Generator, size: int, cells: int) -> npt.NDArray[np.int64]:
    """Find which of `cells` random points each pixel is nearest to; every cell has pixels."""
    points = draw.choice(size * size, cells, replace=False)
    rows_1N, columns_1N = points // size, points % size
    y_HW1, x_HW1 = np.mgrid[:size, :size][..., None]
    nearest_HW: npt.NDArray[np.int64] = ((y_HW1 - rows_1N) ** 2 + (x_HW1 - columns_1N) ** 2).argmin(axis=2)
    return nearest_HW


def make_mosaics(folder: Path, count: int = 256, seed: int = 2024) -> dict[str, Any]:
    """Write held-out mosaics to `mosaics-00.tar` and `truth/<key>.png` unless complete. Returns the manifest."""
    made_from: dict[str, Any] = {"recipe": RECIPE, "count": count, "seed": seed, "size": SIZE, "textures": TEXTURES}
    made_from |= {"pillow": PIL.__version__, "numpy": np.__version__, "photos": photos_hash()}
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    kept = complete_manifest(folder, digest)
    if kept is not None:
        return kept | {"made": False}
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    mosaics, members = Mosaics("held_out"), []
    for index in range(count):
        mosaic_HWC, truth_HW = mosaics(np.random.default_rng([seed, index]), SIZE)
        members.append((f"mosaic-{index:04d}.jpg", encode(Image.fromarray(mosaic_HWC), quality=92)))
        (folder / "truth" / f"mosaic-{index:04d}.png").write_bytes(png(truth_HW))
    (folder / "mosaics-00.tar").write_bytes(tar(members))
    manifest = {"made_from": made_from, "recipe_hash": digest, "mosaics": count, "files": hashes(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest | {"made": True}


def complete_manifest(folder: Path, recipe_hash: str) -> dict[str, Any] | None:
    """Return the manifest of a folder that contains exactly what this recipe makes, else None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    same = manifest.get("recipe_hash") == recipe_hash and manifest.get("files") == hashes(folder)
    return manifest if same else None


def hashes(folder: Path) -> dict[str, str]:
    files = [*folder.glob("mosaics-*.tar"), *(folder / "truth").glob("mosaic-*.png")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def png(truth_HW: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(truth_HW).save(file, "PNG")
    return file.getvalue()


class Confusion:
    """Count pixels by ground truth and prediction; compute the mean IoU of the classes seen."""

    def __init__(self) -> None:
        self.counts_KK = np.zeros((len(TEXTURES), len(TEXTURES)), np.int64)

    def add(self, truth_HW: Pixels, answer_HW: Pixels) -> None:
        pairs = truth_HW.astype(np.int64) * len(TEXTURES) + answer_HW
        self.counts_KK += np.bincount(pairs.ravel(), minlength=self.counts_KK.size).reshape(self.counts_KK.shape)

    def mean_iou(self) -> float:
        both_K = np.diag(self.counts_KK)
        either_K = self.counts_KK.sum(axis=0) + self.counts_KK.sum(axis=1) - both_K
        return float((both_K[either_K > 0] / either_K[either_K > 0]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="make the demo's held-out mosaics")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    manifest = make_mosaics(given.folder)
    print(f"{manifest['mosaics']} mosaics {'made' if manifest['made'] else 'kept'} in {given.folder}")


if __name__ == "__main__":
    main()
