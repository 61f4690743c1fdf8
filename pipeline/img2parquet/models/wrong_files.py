"""Name files that do not fit a model: pointers, web pages, adapters, training checkpoints, wrapped names.

Every reader of weights asks here, so that the same mistake has the same answer for each format and place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from img2parquet.errors import CheckpointError
from img2parquet.storage.stand_ins import stand_in

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "a LoRA/PEFT adapter without its base model"
MERGE = "load it with peft, `merge_and_unload()` it into its base model, `save_pretrained` that, and use its folder"
OTHER_WEIGHTS = {  # the end of a file's name that no reader looks for -> what to do with it
    ".safetensors": "`{}` has another name: if it holds this model's weights, rename it to `model.safetensors`",
    ".bin": "`{}` has another name: if it holds this model's weights, rename it to `pytorch_model.bin`",
    ".msgpack": "`{}` has another name: if it holds this model's weights, rename it to `flax_model.msgpack`",
    ".pth": "`{}` is a torch file: save its table of tensors alone, as `pytorch_model.bin`",
    ".pt": "`{}` is a torch file: save its table of tensors alone, as `pytorch_model.bin`",
    ".ckpt": "`{}` is a training checkpoint: save its table of tensors alone, as `pytorch_model.bin`",
    ".npz": "`{}` has NumPy arrays under their authors' names: convert them with transformers' script for this model",
    ".h5": "`{}` is Keras's: load it with `from_pretrained(..., from_tf=True)` of transformers 4, and save it again",
    ".onnx": "`{}` is an exported graph: use the checkpoint that it was exported from",
    ".gguf": "`{}` is quantised: use the float checkpoint that it was made from",
}
WRAPPERS = {  # a prefix of all names in a file -> who adds it
    "_orig_mod.": "torch.compile",
    "module.": "torch's DataParallel",
    "_fsdp_wrapped_module.": "torch's FSDP",
    "base_model.model.": "PEFT",
    "model.": "a wrapper such as Lightning",
    "net.": "a wrapper",
    "network.": "a wrapper",
    "backbone.": "a wrapper",
    "student.": "a distillation's training loop",
    "teacher.": "a distillation's training loop",
    "state_dict.": "a training loop",
    "params.": "a Flax training state",
}


def refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError for a file that only stands in for the real one, such as a git-lfs pointer."""
    with path.open("rb") as file:
        known = stand_in(file.read(64))
    if known:
        what, hint = known
        raise CheckpointError(f"{path}: {what}", hint=hint)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a folder with these files holds an adapter."""
    return any(name == ADAPTER_CONFIG or name.startswith("adapter_model.") for name in names)


def other_weights(names: Collection[str]) -> list[str]:
    """List the files that look like weights, those that are the easiest to use first."""
    return [name for end in OTHER_WEIGHTS for name in sorted(names) if name.endswith(end)]


def no_weights(where: object, names: Collection[str], wanted: Iterable[str]) -> CheckpointError:
    """Describe a folder in which no reader finds weights, by the names of its files."""
    if is_adapter(names):
        return CheckpointError(f"{where}: no weights: it holds {ADAPTER}", hint=MERGE)
    seen = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
    hint = "save it with `save_pretrained(..., safe_serialization=True)`"
    for name in other_weights(names)[:1]:
        hint = OTHER_WEIGHTS["." + name.rpartition(".")[-1]].format(name)
    return CheckpointError(f"{where}: no weights: neither {' nor '.join(wanted)}, found {seen}", hint=hint)


def cause_of(names: Collection[str], fits: Callable[[str], bool]) -> str:
    """Say why the names of tensors do not fit, if it shows in them; else an empty text.

    fits: whether the model has a tensor of this name."""
    if any("lora_" in name or ".base_layer." in name for name in names):
        return f"they hold the layers of a LoRA/PEFT adapter: {MERGE}"
    prefix, authors, rest = "", list[str](), list(names)
    while found := next((one for one in WRAPPERS if sum(n.startswith(one) for n in rest) * 2 > len(rest)), None):
        prefix, rest = prefix + found, [name.removeprefix(found) for name in rest if name.startswith(found)]
        authors.append(WRAPPERS[found])
    if not prefix or sum(map(fits, rest)) <= sum(map(fits, names)):
        return ""
    return (
        f"the names begin with `{prefix}`, which {' and '.join(authors)} added: remove it and save the file again, "
        f'`{{name.removeprefix("{prefix}"): tensor for name, tensor in tensors.items()}}`'
    )


def nested_tables(content: Any) -> list[str]:
    """List the keys of a training checkpoint under which there are tables of tensors or arrays."""
    if not isinstance(content, Mapping):
        return []
    return [str(key) for key, value in content.items() if isinstance(value, Mapping) and value]


def training_checkpoint(path: Path, keys: Collection[str]) -> CheckpointError:
    """Describe a file in which the weights are one entry among others."""
    shown = ", ".join(f"`{key}`" for key in list(keys)[:4])
    usual = [key for key in keys if key in ("state_dict", "model_state_dict", "model", "params")]
    first = [*usual, *keys][0]
    hint = f'save the weights alone: `torch.save(torch.load(path)["{first}"], "pytorch_model.bin")`'
    message = f"{path}: not a table of tensors: a training checkpoint, with tables under {shown}"
    return CheckpointError(message, hint=hint)
