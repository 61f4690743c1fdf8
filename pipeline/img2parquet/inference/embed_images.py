"""Embed images at hand, for notebooks and scripts: images -> the vectors that a job would write, (N, D) float32.

Decoding, cropping, weights and output are those of a job; nothing is stored. Shapes: N images, B of a batch, D values.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from img2parquet.errors import InputError, NotFound
from img2parquet.images.decode import decode
from img2parquet.images.jpeg_scaling import shrink_for
from img2parquet.images.preprocess import Preprocessor
from img2parquet.inference.batch_size import cpu_batch_size
from img2parquet.inference.device import open_device
from img2parquet.inference.forward import ModelExecutor
from img2parquet.outputs import BatchRows, Output
from img2parquet.outputs.embedding import Embedding
from img2parquet.outputs.vectors import decode_vectors
from img2parquet.schema import Pixels, Rejection
from img2parquet.storage import Store

if TYPE_CHECKING:
    from PIL import Image

    from img2parquet.models import Mode
    from img2parquet.models.model import Model

UInt8s = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
ImageLike: TypeAlias = "Image.Image | UInt8s | str | os.PathLike[str] | bytes | bytearray | memoryview"
GPU_BATCH = 64
MAX_DECODERS = 8  # threads


def embed(
    images: Iterable[ImageLike],
    model: str | Model,
    *,
    pool: Literal["model", "cls", "mean"] = "model",
    normalize: Literal["none", "l2"] = "none",
    preprocess: Mode = "exact",
    dtype: str | None = None,
    device: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
) -> Floats:
    """Embed images into an array (N, D) float32: row n is what a job with the same settings writes for images[n].

    images: paths or URIs, the bytes of image files, PIL images, or uint8 (height, width, 3) arrays, also mixed. Any
        iterable will do, so a generator need not be held in memory. Bytes and files are decoded as in a job; PIL images
        and arrays are used as they are (PIL images are turned upright and composited on white).
    model: the `model` of a job file, or the result of `load_model`, which saves loading it again.
    pool, normalize: settings of the output `embedding`. preprocess, dtype, device, image_size, weights: as in a job
        file.
    batch_size: images per forward pass; by default a size that suits the device.

    The last bits of a job's numbers also depend on its batch size and threads per worker (`torch.set_num_threads(1)`).
    Raises InputError for an image that cannot be used, with its index; ModelError when the model cannot be loaded;
    OutputUnavailable when it has no such pooling."""
    loaded = loaded_model(
        model, dtype=dtype, device=device, image_size=image_size, weights=weights, preprocess=preprocess
    )
    output = Embedding(kind="embedding", name="embedding", pool=pool, normalize=normalize, dtype="float32")
    loaded.refuse_unknown(output.wants(loaded.card))
    field = output.fields(loaded.card)[0]
    columns = first_columns(images, loaded, output, preprocess, batch_size)
    vectors = [decode_vectors(column, field).astype(np.float32, copy=False) for column in columns]
    return np.concatenate([np.empty((0, field.type.list_size), np.float32), *vectors])


def first_columns(
    images: Iterable[ImageLike],
    model: Model,
    output: Output,
    preprocess: Mode,
    batch_size: int | None,
    passthrough: Mapping[str, Sequence[Any]] = {},
) -> Iterator[pa.Array]:
    """Compute an output's first column for images at hand, batch by batch.

    passthrough: the columns that the output reads, with a value for each image. Raises InputError for an image that
    cannot be used, or whose values are not finite."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size: {batch_size} is not a batch size; use 1 or more")
    on_cpu = model.device.type == "cpu"
    size = batch_size or (cpu_batch_size([model.card.preprocess.size_HW]) if on_cpu else GPU_BATCH)
    cropper, executor = _Cropper(model, preprocess), _Executor(model, output, size)
    threads = min(MAX_DECODERS, size, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "img2parquet-decode") as threads_pool:
        for batch in _batches(images, size):
            here = {name: _values_of(name, values, batch) for name, values in passthrough.items()}
            yield executor(list(threads_pool.map(cropper, batch)), here)


def _values_of(name: str, values: Sequence[Any], batch: Sequence[tuple[int, ImageLike]]) -> list[Any]:
    """Return a batch's values of a column. Raises InputError when the column is too short."""
    if batch[-1][0] >= len(values):
        raise InputError(f"{name}: {len(values)} for more images than that", hint="give one for every image")
    return [values[index] for index, _ in batch]


def loaded_model(
    model: str | Model,
    *,
    dtype: str | None,
    device: str | None,
    image_size: int | tuple[int, int] | None,
    weights: str | None,
    preprocess: Mode,
) -> Model:
    """Load the model of a function that takes a name or a model, with the function's other arguments."""
    import torch

    from img2parquet.models import ModelSpec, load_model

    if not isinstance(model, str):
        given = {"dtype": dtype, "device": device, "image_size": image_size, "weights": weights}
        settings = [name for name, value in given.items() if value is not None]
        if settings:
            raise InputError(f"{', '.join(settings)}: this model is loaded already", hint="pass this to load_model")
        return model
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    spec = ModelSpec(model, image_size=image_size, weights=weights, preprocess=preprocess)
    return load_model(spec, dtype=dtype or "auto", device=device)


def _batches(images: Iterable[ImageLike], size: int) -> Iterator[list[tuple[int, ImageLike]]]:
    """Split images into batches, each image with its index among all."""
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike) or not isinstance(images, Iterable):
        message = f"images: expected a list of images, not a single {type(images).__name__}"
        raise InputError(message, hint="pass [image] for one image")
    if isinstance(images, np.ndarray) and images.ndim != 4:
        message = f"images: an array of shape {images.shape} is not a list of images"
        raise InputError(message, hint="pass [image] for one image")
    numbered = enumerate(images)
    while batch := list(itertools.islice(numbered, size)):
        yield batch


@dataclass(frozen=True)
class _Crop:
    """One image as the model sees it, and the size of its source."""

    name: str
    size_HW: tuple[int, int]
    pixels_HWC: UInt8s


class _Cropper:
    """Decode and crop one (index, image). Threads may share it. Raises InputError with the index."""

    def __init__(self, model: Model, preprocess: str) -> None:
        if preprocess not in ("exact", "fast", "pil"):
            raise InputError(f"preprocess: `{preprocess}` is neither `exact` nor `fast` nor `pil`")
        if preprocess == "pil" and model.card.preprocess.pixels == "torchvision":
            raise InputError("preprocess: this model is loaded already", hint='load_model(..., preprocess="pil")')
        geometry = model.card.preprocess.geometry
        self.cropper, self.store = Preprocessor(geometry), Store({})
        self.channels, shrink = geometry.channels, partial(shrink_for, (geometry,)) if preprocess == "fast" else None
        self.decode = partial(decode, shrink=shrink, with_alpha=geometry.channels == 4)

    def __call__(self, numbered: tuple[int, ImageLike]) -> _Crop:
        index, image = numbered
        name = f"images[{index}]"
        if isinstance(image, str | os.PathLike):
            name = f"{name} ({os.fspath(image)})"
        pixels = self._pixels(index, name, image)
        crop = pixels if isinstance(pixels, Rejection) else self.cropper(pixels)
        if isinstance(pixels, Rejection) or isinstance(crop, Rejection):
            rejection = pixels if isinstance(pixels, Rejection) else crop
            assert isinstance(rejection, Rejection)
            raise InputError(f"{name}: {rejection.reason}: {rejection.message}")
        return _Crop(name, (pixels.height, pixels.width), crop)

    def _pixels(self, index: int, name: str, image: ImageLike) -> Pixels | Rejection:
        from img2parquet.models.model import pixels_of_image

        if isinstance(image, str | os.PathLike):
            try:
                return self.decode(self.store.read(os.fspath(image)))
            except NotFound:
                raise InputError(f"{name}: no such file") from None
        if isinstance(image, bytes | bytearray | memoryview):
            return self.decode(bytes(image))
        if not isinstance(image, np.ndarray) and not hasattr(image, "getexif"):
            message = f"{name}: expected an image, not an object of type {type(image).__name__}"
            raise InputError(message, hint="pass a path, bytes, a PIL image or a uint8 array")
        return pixels_of_image(index, image, self.channels)


class _Executor:
    """Run the model and its output on a batch of crops -> the output's first column."""

    def __init__(self, model: Model, output: Output, batch_size: int) -> None:
        self.device = open_device(str(model.device))
        self.forward = ModelExecutor(model, (output,), batch_size, self.device)

    def __call__(self, crops: list[_Crop], passthrough: Mapping[str, Sequence[Any]]) -> pa.Array:
        about = BatchRows([crop.name for crop in crops], [crop.size_HW for crop in crops], passthrough)
        pixels_BHWC = np.stack([crop.pixels_HWC for crop in crops])
        with self.device.lane() as lane:
            columns = self.forward.columns(lane, pixels_BHWC, about)
        while columns is None:  # memory ran out: try again with half the size
            with self.device.alone() as lane:
                columns = self.forward.columns(lane, pixels_BHWC, about)
        for row, message in sorted(columns.not_finite.items()):
            raise InputError(f"{crops[row].name}: not_finite: {message}", hint='compute in float32: `dtype="float32"`')
        return columns.arrays[0]
