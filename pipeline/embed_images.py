"""Images at hand -> the vectors that a job would have written for them, (N, D) float32. For notebooks and scripts.

The same decoding, cropping, weights and output as a job's; nothing is stored. Shapes: N images, B of a batch, D values.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.batch_size import cpu_batch_size
from pipeline.decode import decode
from pipeline.device import open_device
from pipeline.errors import InputError, NotFound, PartFailed
from pipeline.forward import Forward
from pipeline.outputs import BatchRows
from pipeline.outputs.embedding import Embedding
from pipeline.preprocess import Preprocessor
from pipeline.schema import Bad, Pixels
from pipeline.shrink import shrink_for
from pipeline.storage import Store
from pipeline.vectors import decode_vectors

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.models.model import Model

UInt8s = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
ImageLike: TypeAlias = "Image.Image | UInt8s | str | os.PathLike[str] | bytes | bytearray | memoryview"
GPU_BATCH = 64
DECODERS = 8  # threads at most


def embed(
    images: Iterable[ImageLike],
    model: str | Model,
    *,
    pool: Literal["model", "cls", "mean"] = "model",
    normalize: Literal["none", "l2"] = "none",
    preprocess: Literal["exact", "fast"] = "exact",
    dtype: str | None = None,
    device: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
) -> Floats:
    """Images -> (N, D) float32, in their order: row n is what a job with the same settings writes for images[n].

    images: paths or URIs, an image file's bytes, PIL images, or uint8 (height, width, 3) arrays, also mixed; any
        iterable, so that a generator need not be held in memory. Bytes and files are decoded as a job decodes them;
        PIL images and arrays are taken as the pixels they hold (PIL's are turned upright and put on white).
    model: what a job file says under `model`, or what `load_model` gave, which spares loading it again.
    pool, normalize: as of the output `embedding`. preprocess, dtype, device, image_size, weights: as in a job file.
    batch_size: images of a forward pass; default: one that suits the device.

    To the last bits a job's numbers also depend on its batch size and threads per worker (`torch.set_num_threads(1)`).
    Raises InputError for an image that cannot be used, naming its place; ModelError, OutputUnavailable."""
    loaded = _loaded(model, dtype=dtype, device=device, image_size=image_size, weights=weights)
    output = Embedding(kind="embedding", name="embedding", pool=pool, normalize=normalize, dtype="float32")
    loaded.refuse_unknown(output.wants(loaded.card))
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size: {batch_size} images are no batch; say 1 or more")
    on_cpu = loaded.device.type == "cpu"
    size = batch_size or (cpu_batch_size([loaded.card.preprocess.size_HW]) if on_cpu else GPU_BATCH)
    cropper, embedder = _Cropper(loaded, preprocess), _Embedder(loaded, output, size)
    threads = min(DECODERS, size, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "img2parquet-decode") as threads_pool:
        vectors = [embedder(list(threads_pool.map(cropper, batch))) for batch in _batches(images, size)]
    field = output.fields(loaded.card)[0]
    return np.concatenate([np.empty((0, field.type.list_size), np.float32), *vectors])


def _loaded(
    model: str | Model,
    *,
    dtype: str | None,
    device: str | None,
    image_size: int | tuple[int, int] | None,
    weights: str | None,
) -> Model:
    import torch

    from pipeline.models import load_model
    from pipeline.probe import resolve_dtype

    if not isinstance(model, str):
        given = {"dtype": dtype, "device": device, "image_size": image_size, "weights": weights}
        said = [name for name, value in given.items() if value is not None]
        if said:
            raise InputError(f"{', '.join(said)}: this model is loaded already", hint="say so to load_model")
        return model
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(dtype or "auto", torch.device(device).type)
    return load_model(model, dtype=dtype, device=device, image_size=image_size, weights=weights)


def _batches(images: Iterable[ImageLike], size: int) -> Iterator[list[tuple[int, ImageLike]]]:
    """With each image's place among all."""
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike) or not isinstance(images, Iterable):
        raise InputError(f"images: one {type(images).__name__} where a list is expected", hint="write [image]")
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise InputError(f"images: an array of shape {images.shape} is no list of images", hint="write [image]")
    numbered = enumerate(images)
    while batch := list(itertools.islice(numbered, size)):
        yield batch


@dataclass(frozen=True)
class _Crop:
    """One image as the model sees it, and how large it was."""

    name: str
    size_HW: tuple[int, int]
    pixels_HWC: UInt8s


class _Cropper:
    """(place, image) -> its crop; or InputError with the place. Threads may share it."""

    def __init__(self, model: Model, preprocess: str) -> None:
        if preprocess not in ("exact", "fast"):
            raise InputError(f"preprocess: `{preprocess}` is neither `exact` nor `fast`")
        geometry = model.card.preprocess.geometry
        self.cropper, self.store = Preprocessor(geometry), Store({})
        self.shrink = partial(shrink_for, (geometry,)) if preprocess == "fast" else None

    def __call__(self, numbered: tuple[int, ImageLike]) -> _Crop:
        place, image = numbered
        name = f"images[{place}]"
        if isinstance(image, str | os.PathLike):
            name = f"{name} ({os.fspath(image)})"
        pixels = self._pixels(place, name, image)
        crop = pixels if isinstance(pixels, Bad) else self.cropper(pixels)
        if isinstance(pixels, Bad) or isinstance(crop, Bad):
            bad = pixels if isinstance(pixels, Bad) else crop
            assert isinstance(bad, Bad)
            raise InputError(f"{name}: {bad.reason}: {bad.message}")
        return _Crop(name, (pixels.height, pixels.width), crop)

    def _pixels(self, place: int, name: str, image: ImageLike) -> Pixels | Bad:
        from pipeline.models.model import rgb_of

        if isinstance(image, str | os.PathLike):
            try:
                return decode(self.store.read(os.fspath(image)), shrink=self.shrink)
            except NotFound:
                raise InputError(f"{name}: there is no such file") from None
        if isinstance(image, bytes | bytearray | memoryview):
            return decode(bytes(image), shrink=self.shrink)
        if not isinstance(image, np.ndarray) and not hasattr(image, "getexif"):
            raise InputError(f"{name}: a {type(image).__name__} is no image", hint="a path, bytes, PIL or uint8 array")
        return Pixels(rgb_of(place, image))


class _Embedder:
    """A batch of crops -> (B, D)."""

    def __init__(self, model: Model, output: Embedding, batch_size: int) -> None:
        self.model, self.field = model, output.fields(model.card)[0]
        self.device = open_device(str(model.device))
        self.forward = Forward(model, (output,), batch_size, self.device)

    def __call__(self, crops: list[_Crop]) -> Floats:
        about = BatchRows([crop.name for crop in crops], [crop.size_HW for crop in crops], {})
        pixels_BHWC = np.stack([crop.pixels_HWC for crop in crops])
        try:
            with self.device.lane() as lane:
                columns = self.forward.columns(lane, pixels_BHWC, about)
            while columns is None:  # memory ran out: again, in halves
                with self.device.alone() as lane:
                    columns = self.forward.columns(lane, pixels_BHWC, about)
        except PartFailed as error:  # a vector that is not finite
            raise InputError(str(error)) from None
        return decode_vectors(columns[0], self.field).astype(np.float32, copy=False)
