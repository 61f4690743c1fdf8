"""Give an image tower the logits of prompts, so that it is a classifier like any other.

Shapes: B batch, C channels, H W image, K classes, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from img2parquet.models.family import Backbone
from img2parquet.models.prompts import ClassWeights


class ZeroShot:
    """A backbone whose logits are those of prompts. weights: called when logits are first wanted."""

    def __init__(self, backbone: Backbone, classes: int, weights: Callable[[], ClassWeights]) -> None:
        self.backbone, self.classes, self._make = backbone, classes, weights
        self._lock, self._weights = Lock(), dict[torch.device, tuple[Tensor, Tensor]]()

    def gives(self) -> dict[str, tuple[int, ...]]:
        return {**self.backbone.gives(), "logits": (self.classes,)}

    def __call__(self, x_BCHW: Tensor, wants: frozenset[str], **inputs: Tensor) -> dict[str, Tensor]:
        """Compute logits in float32 from `pooled`, (B, E) -> (B, K)."""
        if "logits" not in wants:
            return self.backbone(x_BCHW, wants, **inputs)
        features = self.backbone(x_BCHW, wants - {"logits"} | {"pooled"}, **inputs)
        weight_KE, bias_K = self._on(x_BCHW.device)
        unit_BE = F.normalize(features["pooled"].float(), dim=1)
        return {name: features[name] for name in wants - {"logits"}} | {"logits": F.linear(unit_BE, weight_KE, bias_K)}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        with self._lock:
            if device not in self._weights:
                weight_KE, bias_K = self._make()
                self._weights[device] = torch.from_numpy(weight_KE).to(device), torch.from_numpy(bias_K).to(device)
            return self._weights[device]
