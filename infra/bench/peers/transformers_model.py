"""Load a checkpoint's model and image processor the way transformers documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoImageProcessor, AutoModel


class Embedder:
    """Compute pooled vectors of RGB images, (B, D) float32."""

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        # not from_pretrained(dtype=...), which sets torch's default for a while: Daft may load two in threads at once
        self.model = AutoModel.from_pretrained(folder).to(getattr(torch, dtype)).eval()

    def __call__(self, images: Sequence[Any]) -> npt.NDArray[np.float32]:
        return self.embed(self.processor(list(images), return_tensors="pt")["pixel_values"])

    @torch.inference_mode()
    def embed(self, pixels_BCHW: torch.Tensor) -> npt.NDArray[np.float32]:
        pooled: torch.Tensor = self.model(pixels_BCHW.to(self.model.dtype)).pooler_output
        vectors: npt.NDArray[np.float32] = pooled.flatten(1).float().numpy()
        return vectors
