"""Every family runs where its weights are: nothing of a forward pass stays on the CPU, moves there, or waits for it.

On the `meta` device, which has shapes but no numbers: there torch refuses to read a value (as `.item()` would), and a
mode sees every operator's tensors. So a GPU is never waited for within a pass, and the pass can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from img2parquet.models import layers, load_model
from img2parquet.models.kernels import compiler
from img2parquet.models.model import Model

CHECKPOINTS = (
    "facebook/levit-128S",
    "facebook/vit-msn-small",
    "google/bit-50",
    "microsoft/beit-base-patch16-224-pt22k",
    "microsoft/beit-base-finetuned-ade-640-640",
    "facebook/dinov2-with-registers-small",
    "openai/clip-vit-base-patch32",
    "google/siglip-base-patch16-224",
)


class Elsewhere(TorchDispatchMode):
    """Records operators that took or returned a tensor outside the model's device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != self.device for tensor in tensors):
            self.seen.append(str(func))
        return result


def elsewhere(model: Model, device: str, **inputs: Tensor) -> list[str]:
    pixels = torch.zeros((2, *model.card.preprocess.size_HW, 3), dtype=torch.uint8, device=device)
    wants = frozenset(model.card.gives)
    model.forward_pixels(pixels, wants, **inputs)  # the first pass fills the caches
    with Elsewhere(device) as mode:
        features = model.forward_pixels(pixels, wants, **inputs)
    assert {name: tuple(feature.shape[1:]) for name, feature in features.items()} == dict(model.card.gives)
    return mode.seen


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_forward_pass_stays_on_its_device(name: str, dtype: str) -> None:
    model = load_model(name, weights="random(0)", device="meta", dtype=dtype)
    assert elsewhere(model, "meta") == []


def test_a_mask_is_no_exception() -> None:
    model = load_model("microsoft/beit-base-patch16-224-pt22k", weights="random(0)", device="meta", dtype="bfloat16")
    assert elsewhere(model, "meta", mask_BN=torch.ones(2, 196, dtype=torch.bool, device="meta")) == []


@pytest.mark.parametrize("name", [*CHECKPOINTS[:3], *CHECKPOINTS[6:], "microsoft/beit-base-patch16-224"])
def test_without_what_only_a_cpu_has_the_numbers_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the operators that a GPU uses with oneDNN's and our compiled ones."""
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wants = frozenset({"pooled"})
    fused = load_model(name, weights="random(0)", image_size=224).forward_pixels(pixels, wants)["pooled"]
    monkeypatch.setattr(layers, "onednn_works", lambda dtype: False)
    monkeypatch.setattr(compiler, "native_library", lambda source: None)
    plain = load_model(name, weights="random(0)", image_size=224).forward_pixels(pixels, wants)["pooled"]
    assert (plain - fused).abs().max() <= 1e-5 * fused.abs().max()
    assert not torch.equal(plain, fused), "both took the same way"


def test_what_is_elsewhere_is_seen() -> None:
    with Elsewhere("meta") as mode:
        _ = torch.zeros(3, device="meta") + torch.tensor(1.0)
    assert "aten.add.Tensor" in mode.seen
