"""Make tiny Flax BEiT checkpoints with the outputs of Flax itself, in the folders beside this file.

Run once, in an environment of its own, since transformers has dropped Flax:

    pip install "transformers==4.40.2" "flax==0.8.5" "jax==0.4.30" "jaxlib==0.4.30" "numpy<2" "scipy<1.14"
    python tests/harness/golden/make_flax_beit.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import (
    BeitConfig,
    FlaxBeitForImageClassification,
    FlaxBeitForMaskedImageModeling,
    FlaxBeitModel,
)

HERE = Path(__file__).parents[2] / "golden" / "flax_beit"
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
    "vocab_size": 11,
    "num_labels": 3,
    "layer_scale_init_value": 0.1,
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (
        FlaxBeitForImageClassification,
        {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    ),
    "masked": (FlaxBeitForMaskedImageModeling, {"use_mask_token": True, "use_shared_relative_position_bias": True}),
    "bfloat16": (FlaxBeitModel, {"use_relative_position_bias": True, "use_mean_pooling": False}),
}


def make(name: str) -> None:
    kind, changed = CASES[name]
    model = kind(BeitConfig(**TINY, **changed), seed=0)
    rng = np.random.default_rng(len(name))
    flat = {key: _value(key, value.shape, rng) for key, value in sorted(flatten_dict(model.params).items())}
    model.params = unflatten_dict({key: jnp.asarray(value) for key, value in flat.items()})
    if name == "bfloat16":
        model.params = model.to_bf16(model.params)
    folder = HERE / name
    model.save_pretrained(folder)
    pixels_BCHW = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
    mask_BN = rng.random((2, 16)) < 0.5
    masked = {"bool_masked_pos": mask_BN} if name == "masked" else {}
    given = model(pixels_BCHW, output_hidden_states=True, output_attentions=True, return_dict=True, **masked)
    expected = {f"tokens:{k}": state for k, state in enumerate(given.hidden_states)}
    expected |= {f"attentions:{k}": weights for k, weights in enumerate(given.attentions)}
    if name == "bfloat16":
        expected |= {"tokens": given.last_hidden_state, "pooled": given.pooler_output}
    else:
        expected |= {"visual_tokens" if name == "masked" else "logits": given.logits}
    arrays = {key: np.asarray(value, np.float32) for key, value in expected.items()}
    versions = f"transformers {transformers.__version__}, flax {flax.__version__}, jax {jax.__version__}"
    np.savez_compressed(folder / "expected.npz", pixels_BCHW=pixels_BCHW, mask_BN=mask_BN, made_by=versions, **arrays)
    print(name, {key: value.shape for key, value in arrays.items()}, versions)


def _value(key: tuple[str, ...], shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    noise = rng.standard_normal(shape).astype(np.float32)
    if key[-1] == "scale" or key[-1].startswith("lambda"):
        return 1 + 0.2 * noise
    if key[-1] == "kernel":
        return noise * np.float32(np.prod(shape[:-1]) ** -0.5)
    return 0.3 * noise


if __name__ == "__main__":
    for case in CASES:
        make(case)
