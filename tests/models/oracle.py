"""Use transformers as the oracle: models with seeded, non-trivial weights, saved to disk and read back by ours.

Shapes: B batch, C channels, H W image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.models import Backbone
from img2parquet.models.checkpoint import read_json, weight_files
from img2parquet.models.hub import CONFIG
from img2parquet.models.model import Opened, family_of

TOLERANCE = 1e-5  # of the output's largest value
EXAMPLES = int(os.environ.get("IMG2PARQUET_EXAMPLES", "200"))


def randomised(model: Any, seed: int = 0) -> Any:
    """Give every parameter and statistic a value whose omission shows; eval mode, float32."""
    generator = torch.Generator().manual_seed(seed)
    model.eval().float().requires_grad_(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.copy_(_value(name, tensor, generator))
    return model


def saved(model: Any, folder: Path, seed: int | None = 0) -> Path:
    """Randomize and `save_pretrained`, under the names used on the hub. Do not run the model before this."""
    if seed is not None:
        randomised(model, seed)
    model.save_pretrained(folder)
    return folder


def saved_as_state_dict(model: Any, folder: Path, seed: int | None = 0) -> Path:
    """Randomize and save under the names that transformers 5 uses in memory, the second dialect."""
    if seed is not None:
        randomised(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def opened(folder: Path, size_HW: tuple[int, int] | None = None) -> Opened:
    """Open a checkpoint's folder as the loader does, but for an input of exactly `size_HW` (default: its config's)."""
    config = read_json(folder / CONFIG)
    family = family_of(config, str(folder))
    if size_HW is None:
        side = config.get("image_size", 64)
        size_HW = (side[0], side[1]) if isinstance(side, list) else (side, side)
    settings = PreprocessSettings("exact", *size_HW, "bilinear", None, None)
    return Opened(folder.name, str(folder), family, config, settings, weight_files(folder), folder=folder)


def ours(
    folder: Path, *, fast: bool = True, dtype: torch.dtype = torch.float32, size_HW: tuple[int, int] | None = None
) -> Backbone:
    """Load a checkpoint's folder as our backbone, in its fast or plain form; it takes normalized float pixels."""
    return opened(folder, size_HW).filled(dtype, torch.device("cpu"), fast)


def pixels(batch: int = 2, size_HW: tuple[int, int] = (64, 64), channels: int = 3, seed: int = 1) -> Tensor:
    """Return normalized random pixels, x_BCHW."""
    return torch.randn(batch, channels, *size_HW, generator=torch.Generator().manual_seed(seed))


def run(backbone: Backbone, x_BCHW: Tensor, *wants: str, **inputs: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        return backbone(x_BCHW, frozenset(wants), **inputs)


def reference(model: Any, x_BCHW: Tensor, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(x_BCHW, **inputs)


def distance(mine: Tensor, theirs: Tensor) -> float:
    """Return the largest difference relative to the output's scale."""
    assert tuple(mine.shape) == tuple(theirs.shape), f"{tuple(mine.shape)} is not {tuple(theirs.shape)}"
    scale = theirs.abs().max().clamp_min(1e-6)
    return float((mine.double() - theirs.double()).abs().max() / scale)


def same_bits(call: Callable[..., Tensor], batch: Sequence[Tensor], threads: Sequence[int] = (1, 2, 7)) -> bool:
    """Whether a call gives the same bits on any number of threads, and for an image alone as within the batch."""
    before, results = torch.get_num_threads(), []
    try:
        for number in threads:
            torch.set_num_threads(number)
            results.append(call(*batch))
    finally:
        torch.set_num_threads(before)
    alone = (call(*(tensor[i : i + 1] for tensor in batch)) for i in range(len(batch[0])))
    return all(torch.equal(result, results[0]) for result in (*results, torch.cat(list(alone))))


def agree(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Assert that every feature of `theirs` is in `mine`, in the same shape, within the tolerance, and not constant."""
    for name, tensor in theirs.items():
        far = distance(mine[name], tensor)
        assert far <= tolerance, f"{name}: {far:.2e} > {tolerance:.0e}"
        assert tensor.numel() < 4 or tensor.std() > 1e-4, f"{name} is constant: this comparison could not fail"


Expected = Callable[[Any, Tensor], dict[str, Tensor]]  # the reference and x_BCHW -> its outputs by our names
ROUNDINGS = 6  # random draws of float32's rounding
ROUNDING_FACTOR = 12  # times the largest draw: see `agree_to_rounding`


def agree_to_rounding(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], expected: Expected, model: Any, x_BCHW: Tensor
) -> None:
    """Do as `agree`, but compare an output that is further from the reference with float64 instead.

    A network of random weights may multiply float32's rounding (a group with hardly any variance, a softmax between
    two near scores, logits that cancel), and then two right answers differ by more than the tolerance, by luck of the
    order in which a processor's kernels sum. How much, the float64 reference tells: `rounding` puts one rounding error
    into each number that float32 would hold. Ours may be ROUNDING_FACTOR times as far from float64 as that. In 160
    draws of LeViT and BiT the largest was 5.2 for ours and 6.1 for the reference, the medians 1.2 to 1.5 for both."""
    far = {name for name, tensor in theirs.items() if distance(mine[name], tensor) > TOLERANCE}
    if far:
        exact, floor = rounding(expected, model, x_BCHW)
    for name in far:
        off = distance(mine[name].double(), exact[name])
        allowed = max(TOLERANCE, ROUNDING_FACTOR * floor[name])
        assert off <= allowed, f"{name}: {off:.1e} from float64, where rounding explains {floor[name]:.1e}"
    agree({n: mine[n] for n in theirs.keys() - far}, {n: theirs[n] for n in theirs.keys() - far})


def rounding(expected: Expected, model: Any, x_BCHW: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the reference's outputs in float64, and how far each may move when every weight, the input and the output
    of every layer are rounded once to float32."""
    exact = expected(model.double(), x_BCHW.double())
    floor = dict.fromkeys(exact, 0.0)
    for seed in range(ROUNDINGS):
        generator = torch.Generator().manual_seed(seed)
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: _rounded(tensor, generator) for name, tensor in kept.items()})
        rounds = partial(_round_output, generator=generator)
        layers = [one for one in model.modules() if isinstance(one, torch.nn.GroupNorm) or not list(one.children())]
        hooks = [layer.register_forward_hook(rounds) for layer in layers]
        moved = expected(model, _rounded(x_BCHW.double(), generator))
        for hook in hooks:
            hook.remove()
        model.load_state_dict(kept)
        floor = {name: max(floor[name], distance(moved[name], exact[name])) for name in exact}
    model.float()
    return exact, floor


def _round_output(layer: Any, inputs: tuple[Tensor, ...], out: Any, generator: torch.Generator) -> Any:
    """A forward hook that rounds outputs. In a group norm (whose activation is inside in the reference) the mean is
    rounded too, before it is subtracted from numbers that may be nearly equal."""
    if isinstance(layer, torch.nn.GroupNorm):
        x_BGE = inputs[0].reshape(len(inputs[0]), layer.num_groups, -1)
        over_std = (x_BGE.var(-1, keepdim=True, correction=0) + layer.eps).rsqrt()
        mean = x_BGE.mean(-1, keepdim=True)
        moved = ((_rounded(mean, generator) - mean) * over_std).expand_as(x_BGE).reshape(out.shape)
        out = out + moved * layer.weight.view(-1, *[1] * (out.dim() - 2))
    return _rounded(out, generator)


def _rounded(tensor: Any, generator: torch.Generator) -> Any:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    return tensor * (1 + 2**-24 * (2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 1))


def _value(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    leaf = name.rpartition(".")[-1]
    if leaf == "running_var":
        return 0.5 + torch.rand(tensor.shape, generator=generator)
    if "lambda" in leaf:
        return 0.3 + torch.rand(tensor.shape, generator=generator)
    if leaf == "weight" and tensor.dim() == 1:
        return 1 + 0.2 * noise
    if tensor.dim() < 2:
        return 0.2 * noise
    if leaf == "weight":
        return noise * torch.Size(tensor.shape[1:]).numel() ** -0.5
    return 0.5 * noise
