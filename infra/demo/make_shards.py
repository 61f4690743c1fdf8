"""Make webdataset tars of JPEG crops from held-out regions of the photos, some with deliberate faults.

* The same versions of Pillow, NumPy and the photos give the same bytes.
* A folder whose manifest matches is left as it is, so that a job on it can be resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from photos import PHOTOS, Box, held_out_box
from PIL import Image

RECIPE = 1  # increase when the bytes change
TARS = "photos-*.tar"
MANIFEST = "manifest.json"  # written last: a folder that contains it is complete
MIN_CONTRAST = 8.0  # standard deviation of grey values: a crop of black sky cannot be labelled


@dataclass(frozen=True, slots=True)
class Recipe:
    crops: int = 2048
    shards: int = 8
    seed: int = 2024
    min_side: int = 96
    max_side: int = 200


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold one key of a shard: an image file with its sidecars."""

    key: str
    image: bytes
    label: str
    class_id: int
    box: Box
    seed: int

    def members(self) -> Iterator[tuple[str, bytes]]:
        facts = {"label": self.label, "box": list(self.box), "seed": self.seed}
        yield f"{self.key}.jpg", self.image
        yield f"{self.key}.cls", str(self.class_id).encode()
        yield f"{self.key}.json", json.dumps(facts).encode()


def make_shards(folder: Path, recipe: Recipe = Recipe()) -> dict[str, Any]:
    """Fill `folder` unless it is complete. Returns its manifest; `made` says whether it was filled now."""
    kept = complete_manifest(folder, recipe)
    if kept is not None:
        return kept | {"made": False}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / MANIFEST, *folder.glob(TARS)]:  # only our own files: the folder may contain others
        stale.unlink(missing_ok=True)
    samples = list(all_samples(recipe))
    per_shard = -(-len(samples) // recipe.shards)
    files, broken = {}, Counter[str]()
    for shard in range(recipe.shards):
        name = f"photos-{shard:02d}.tar"
        data, faults = one_tar(samples[shard * per_shard : (shard + 1) * per_shard], shard, recipe)
        (folder / name).write_bytes(data)
        files[name] = hashlib.sha256(data).hexdigest()
        broken.update(faults)
    manifest = {"made_from": made_from(recipe), "crops": len(samples), "broken": dict(broken), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest | {"made": True}


def complete_manifest(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the manifest of a folder that contains exactly what this recipe makes, else None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(TARS)}
    except (OSError, ValueError):
        return None
    same = manifest.get("made_from") == made_from(recipe) and manifest.get("files") == found
    return manifest if same else None


def made_from(recipe: Recipe) -> dict[str, Any]:
    """Collect everything that the shards' bytes depend on."""
    versions = {"pillow": PIL.__version__, "numpy": np.__version__}
    return {"recipe": RECIPE, **asdict(recipe), **versions, "photos": photos_hash()}


def photos_hash() -> str:
    """Hash the photos' files and how each is divided."""
    return hashlib.sha256("".join(f"{photo} {photo.sha256()}" for photo in PHOTOS).encode()).hexdigest()


def all_samples(recipe: Recipe) -> Iterator[Sample]:
    """Yield crops of every photo in turn, in a seeded order."""
    images = [photo.pixels() for photo in PHOTOS]
    for index in np.random.default_rng(recipe.seed).permutation(recipe.crops).tolist():
        class_id = index % len(PHOTOS)
        yield cut(images[class_id], class_id, f"{PHOTOS[class_id].name}-{index:05d}", recipe, [recipe.seed, index])


def cut(image_HWC: npt.NDArray[np.uint8], class_id: int, key: str, recipe: Recipe, seed: list[int]) -> Sample:
    """Cut one crop from a photo's held-out region, with seeded position, size and JPEG quality."""
    draw = np.random.default_rng(seed)
    region = held_out_box(PHOTOS[class_id], image_HWC.shape[1], image_HWC.shape[0])
    for _ in range(100):
        box = random_box(region, recipe, draw)
        crop_HWC = image_HWC[box.top : box.bottom, box.left : box.right]
        if crop_HWC.mean(axis=2).std() >= MIN_CONTRAST:
            break
    data = encode(Image.fromarray(crop_HWC), quality=int(draw.integers(60, 96)))
    return Sample(key, data, PHOTOS[class_id].name, class_id, box, seed[-1])


def random_box(region: Box, recipe: Recipe, draw: np.random.Generator) -> Box:
    width = int(draw.integers(recipe.min_side, min(recipe.max_side, region.width) + 1))
    height = int(draw.integers(recipe.min_side, min(recipe.max_side, region.height) + 1))
    left = region.left + int(draw.integers(0, region.width - width + 1))
    top = region.top + int(draw.integers(0, region.height - height + 1))
    return Box(left, top, left + width, top + height)


def encode(image: Image.Image, quality: int = 90, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


# -- faults and unusual encodings -----------------------------------------------------------------------------------


def truncated(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) * 3 // 5]


def text(jpeg: bytes) -> bytes:
    return b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def empty(jpeg: bytes) -> bytes:
    return b""


def corrupted(jpeg: bytes) -> bytes:
    """Remove the tables that the scan is decoded with."""
    tables = jpeg.index(b"\xff\xc4")
    return jpeg[: tables + 4] + b"\xff" * 24 + jpeg[tables + 28 :]


def bomb(jpeg: bytes) -> bytes:
    """Make a PNG whose header promises 60,000 x 60,000 pixels and whose body is a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def exif_rotated(jpeg: bytes) -> bytes:
    """Store an image on its side, with the tag that says so: it is still valid."""
    image = Image.open(io.BytesIO(jpeg)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, exif=exif)


def grey(jpeg: bytes) -> bytes:
    return encode(Image.open(io.BytesIO(jpeg)).convert("L"))


def cmyk(jpeg: bytes) -> bytes:
    return encode(Image.open(io.BytesIO(jpeg)).convert("CMYK"))


REJECTED: tuple[Callable[[bytes], bytes], ...] = (truncated, text, empty, corrupted, bomb)
UNUSUAL: tuple[Callable[[bytes], bytes], ...] = (exif_rotated, grey, cmyk)


# -- tars ----------------------------------------------------------------------------------------------------------


def one_tar(samples: list[Sample], shard: int, recipe: Recipe) -> tuple[bytes, list[str]]:
    """Make a shard's bytes and count its faults. Faulty images are additional rows: every crop is intact."""
    changed = [spoiled(sample, how) for sample, how in zip(samples, REJECTED + UNUSUAL, strict=False)]
    faults = [how.__name__ for _, how in zip(samples, REJECTED, strict=False)]
    rows = [*samples, *changed]
    if shard == 0:
        rows.append(samples[0])
        faults.append("key twice")
    data = tar(member for sample in rows for member in sample.members())
    if shard == recipe.shards - 1:
        data = with_damaged_header(data, f"{samples[len(samples) // 2].key}.jpg")
        faults.append("damaged tar header")
    return data, faults


def spoiled(sample: Sample, how: Callable[[bytes], bytes]) -> Sample:
    return replace(sample, key=f"{sample.key}-{how.__name__}", image=how(sample.image))


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def with_damaged_header(data: bytes, name: str) -> bytes:
    """Overwrite size and checksum in a member's header; its name and body stay."""
    start = data.index(name.encode()) + 100
    return data[:start] + b"\xa5" * 60 + data[start + 60 :]


def main() -> None:
    parser = argparse.ArgumentParser(description="make the demo's shards")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crops", type=int, default=Recipe().crops)
    given = parser.parse_args()
    manifest = make_shards(given.folder, Recipe(crops=given.crops))
    print(f"{len(manifest['files'])} shards {'made' if manifest['made'] else 'kept'} in {given.folder}")
    print(f"{manifest['crops']} crops, and broken on purpose: {manifest['broken']}")


if __name__ == "__main__":
    main()
