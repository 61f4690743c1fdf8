"""Compare one published checkpoint with transformers at full depth and its own size.

    python -m tests.harness.parity.parity_of_one REPO SCRATCH     # writes SCRATCH/found.json

- The weights are seeded and saved by transformers twice: by `save_pretrained` (names as on the hub), and under the
  names that transformers has in memory.
- Compared is everything that the reference class gives, and what its base model gives on the way. What is left out is
  said in `notes`.
- Where both are more than rounding away from float64, the rule of the test files holds: see `excused`.

Shapes: B batch, C channels, H W image, N patches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.initialization import no_init_weights

from img2parquet.models import Family, Published, levit, published, vit
from img2parquet.models.checkpoint import read_json
from tests.models import oracle, towers

GIB = 2**30
ATTENTIONS_BYTES = 2 * GIB  # held at once by the reference; beyond this only the first and the last layer are compared
SMALL_GMACS = 20  # up to here two images are compared, beyond it one
HEADS = ("pooled", "logits", "visual_tokens", "segmentation")  # their drift in bfloat16 is reported
OURS_ONLY = frozenset({"input_size", "has_identity_head"})  # fields that a run adds to the config
TWO_TOWERS = ("clip", "siglip")
WITH_ATTENTIONS = ("beit", "vit_msn", "vit", "dinov2", "dinov2_with_registers")
Features = dict[str, Tensor]


@dataclass
class Found:
    """The result of one comparison. Parity holds if `wrong` is empty."""

    repo: str
    architecture: str
    side: int
    batch: int
    parameters: int
    compared: list[str]
    config_fields: int
    second_dialect: int  # number of names that differ from those on the hub
    plain: float = 0.0
    fast: float = 0.0
    second: float = 0.0
    bfloat16: dict[str, float] = field(default_factory=dict)  # cosine of ours, fast, with the float32 reference
    bfloat16_reference: dict[str, float] = field(default_factory=dict)  # of the reference's own
    excuses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all threads


def main(repo: str, scratch: Path) -> None:
    started_s = time.monotonic()
    family, entry = next(pair for pair in published() if pair[1].repo == repo)
    found = compare(family, entry, scratch)
    found.seconds, found.cpu_seconds = time.monotonic() - started_s, time.process_time()
    (scratch / "found.json").write_text(json.dumps(asdict(found)))


def compare(family: Family, entry: Published, scratch: Path) -> Found:
    """Run every comparison for one checkpoint; leaves its folders in `scratch` for the caller to delete."""
    model, notes = seeded(family, entry)
    hub = oracle.saved(model, scratch / "hub", seed=None)
    memory = oracle.saved_as_state_dict(model, scratch / "memory", seed=None)
    batch = 2 if entry.gmacs <= SMALL_GMACS else 1
    channels = getattr(model.config, "vision_config", model.config).num_channels
    x_BCHW = oracle.pixels(batch, (entry.image_size, entry.image_size), channels)
    config_fields, wrong = compare_config(family, entry, model, hub)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != entry.parameters:
        wrong.append(f"{parameters} parameters, the catalogue says {entry.parameters}")
    passes = [Pass(model, x_BCHW, mask_BN) for mask_BN in masks(model, x_BCHW)]
    found = Found(
        entry.repo,
        entry.architecture,
        entry.image_size,
        batch,
        parameters,
        compared=in_short(name for one in passes for name in one.theirs_by_label()),
        config_fields=config_fields,
        second_dialect=len(names_in(memory) - names_in(hub)),
        notes=notes + [note for one in passes for note in one.notes],
        wrong=wrong,
    )
    found.plain = worst(passes, hub, found, fast=False)
    found.fast = worst(passes, hub, found, fast=True)
    found.second = max(worst(passes, memory, found, fast=fast) for fast in (False, True))
    drift(passes[0], hub, found)
    if model.config.model_type in TWO_TOWERS:
        compare_texts(model, hub, memory, found)
    return found


def compare_texts(model: Any, hub: Path, memory: Path, found: Found) -> None:
    """Compare the vectors of prompts, both forms and dialects; they count as the feature `text`."""
    ids_BT = towers.prompts(model.config.text_config)
    with torch.no_grad():
        theirs = model.get_text_features(ids_BT).pooler_output
    found.compared.append("text")
    for form, folder, fast in (("plain", hub, False), ("fast", hub, True), ("second", memory, True)):
        side = (found.side, found.side)
        text = oracle.opened(folder, side).text(torch.float32, torch.device("cpu"), fast)
        with torch.inference_mode():
            far = oracle.distance(text.tower(ids_BT), theirs)
        setattr(found, form, max(far, getattr(found, form)))
        if not far <= oracle.TOLERANCE:
            found.wrong.append(f"{form}: text: {far:.1e}")


class Pass:
    """One input, with or without a mask, and the reference's outputs for it."""

    def __init__(self, model: Any, x_BCHW: Tensor, mask_BN: Tensor | None) -> None:
        self.model, self.x_BCHW, self.mask_BN = model, x_BCHW, mask_BN
        self.inputs = {} if mask_BN is None else {"mask_BN": mask_BN}
        self.theirs = features_of(model, x_BCHW, mask_BN)
        self.notes = self._drop_most_attentions()
        self._exact: Features = {}

    @property
    def size_HW(self) -> tuple[int, int]:
        return (self.x_BCHW.shape[2], self.x_BCHW.shape[3])

    def theirs_by_label(self) -> list[str]:
        return [name + (" (masked)" if self.inputs else "") for name in self.theirs]

    def run(self, backbone: Any, wants: Iterable[str]) -> Features:
        return oracle.run(backbone, self.x_BCHW, *wants, **self.inputs)

    def exact(self, names: Set[str]) -> Features:
        """The reference in float64, computed on first use."""
        if not names <= self._exact.keys():
            found = features_of(self.model.double(), self.x_BCHW.double(), self.mask_BN)
            self.model.float()
            self._exact |= {name: found[name] for name in names}
        return self._exact

    def _drop_most_attentions(self) -> list[str]:
        names = [name for name in self.theirs if name.startswith("attentions:")]
        size_bytes = sum(self.theirs[name].nbytes for name in names)
        if size_bytes <= ATTENTIONS_BYTES:
            return []
        for name in names[1:-1]:
            del self.theirs[name]
        return [f"attention weights ({size_bytes / GIB:.1f} GiB) of the first and the last layer only"]


# --- the reference's side ---


def seeded(family: Family, entry: Published) -> tuple[Any, list[str]]:
    """Build the reference's class with the published config and seeded weights; list the fields that it refuses."""
    config = config_of(family, entry)
    refused = entry.config.keys() - config.keys() - {"model_type"}
    notes = [f"the reference refuses the published `{name}`; left out" for name in refused]
    architecture = getattr(transformers, entry.architecture)
    with no_init_weights():
        model = architecture(architecture.config_class(**config, attn_implementation="eager"))
    return oracle.randomised(model), notes


def config_of(family: Family, entry: Published) -> dict[str, Any]:
    """Return the published config without its model type, which the class has, and without LeViT's drop path rate
    (training only), which the reference requires to be an int."""
    rate = entry.config.get("drop_path_rate") if family.MODEL_TYPE == levit.MODEL_TYPE else None
    left_out = {"model_type", *(["drop_path_rate"] if rate else [])}
    return {name: value for name, value in entry.config.items() if name not in left_out}


def masks(model: Any, x_BCHW: Tensor) -> list[Tensor | None]:
    """Yield no mask, and a mask if the checkpoint has a mask token."""
    if not getattr(model.config, "use_mask_token", False):
        return [None]
    num_patches = (x_BCHW.shape[-1] // model.config.patch_size) ** 2
    return [None, torch.rand(len(x_BCHW), num_patches, generator=torch.Generator().manual_seed(3)) < 0.4]


def features_of(model: Any, x_BCHW: Tensor, mask_BN: Tensor | None) -> Features:
    """Map the reference's outputs to our names: those of its base model, then those of its own class."""
    kind = model.config.model_type
    if kind in TWO_TOWERS:
        return towers.expected(model, x_BCHW)
    asked: dict[str, Any] = {} if mask_BN is None else {"bool_masked_pos": mask_BN}
    asked |= {"output_attentions": True} if kind in WITH_ATTENTIONS else {}
    base: dict[str, Any] = {}
    hook = model.base_model.register_forward_hook(lambda *seen: base.update(seen[-1]))
    made = oracle.reference(model, x_BCHW, output_hidden_states=True, **asked)
    hook.remove()
    last = base["last_hidden_state"]
    features = {} if base.get("pooler_output") is None else {"pooled": base["pooler_output"].flatten(1)}
    if kind == "bit":
        features |= zip_names("feature_maps:", model.config.stage_names, made.hidden_states)
        features["feature_maps:last"] = last
    else:
        features |= zip_names("tokens:", range(99), made.hidden_states) | {"tokens": last}
    if kind in WITH_ATTENTIONS:
        before_patches = 1 + getattr(model.config, "num_register_tokens", 0)
        features |= zip_names("attentions:", range(99), made.attentions)
        features |= {"pooled:cls": last[:, 0], "pooled:mean": last[:, before_patches:].mean(1)}
    if kind in WITH_ATTENTIONS and kind != "beit":
        features.setdefault("pooled", last[:, 0])  # without a pooler, users take the class token
    return features | heads_of(type(model).__name__, made)


def heads_of(architecture: str, made: Any) -> Features:
    if "logits" not in made:
        return {}
    heads = {"BeitForMaskedImageModeling": "visual_tokens", "BeitForSemanticSegmentation": "segmentation"}
    features = {heads.get(architecture, "logits"): made.logits}
    if "cls_logits" in made:
        features |= {"logits:cls": made.cls_logits, "logits:distillation": made.distillation_logits}
    return features


def zip_names(prefix: str, names: Iterable[object], tensors: Iterable[Tensor]) -> Features:
    return {f"{prefix}{name}": tensor for name, tensor in zip(names, tensors, strict=False)}


# --- ours ---


def worst(passes: list[Pass], folder: Path, found: Found, *, fast: bool) -> float:
    """Return the largest difference of any feature; differences beyond the tolerance go to `excuses` or `wrong`."""
    backbone = oracle.ours(folder, fast=fast, size_HW=passes[0].size_HW)
    form = "fast" if fast else "plain"
    return max(_worst_of(one, wants, backbone, form, found) for one in passes for wants in wanted(one.theirs, fast))


def wanted(names: Iterable[str], fast: bool) -> list[list[str]]:
    """Return the sets of features to request at once. The fast forms take another path with attention weights."""
    attentions = [name for name in names if name.startswith("attentions:")]
    others = [name for name in names if name not in attentions]
    return [others, attentions] if fast and attentions else [others + attentions]


def _worst_of(one: Pass, wants: list[str], backbone: Any, form: str, found: Found) -> float:
    missing = [name for name in wants if name not in backbone.gives()]
    found.wrong += [f"{form}: ours does not give {name}" for name in missing]
    wants = [name for name in wants if name not in missing]
    mine = one.run(backbone, wants)
    distances = {name: oracle.distance(mine[name], one.theirs[name]) for name in wants}
    for name in wants:
        if one.theirs[name].std() <= 1e-4:
            found.wrong.append(f"{name} is constant: this comparison could not fail")
    far = {name: mine[name] for name, distance in distances.items() if not distance <= oracle.TOLERANCE}
    if far:
        excused(far, one, form, found)
    return max(distances.values())


def excused(far: Mapping[str, Tensor], one: Pass, form: str, found: Found) -> None:
    """Random weights in a deep network may amplify float32's own rounding. Where the reference is itself far from
    float64, ours may be at most twice as far as the reference is; anything else is wrong."""
    exact = one.exact(far.keys())
    for name, mine in far.items():
        ours_off, theirs_off = (oracle.distance(side.double(), exact[name]) for side in (mine, one.theirs[name]))
        distance = oracle.distance(mine, one.theirs[name])
        said = f"{form}: {name}: {distance:.1e}; from float64 ours {ours_off:.1e}, the reference {theirs_off:.1e}"
        holds = theirs_off > oracle.TOLERANCE / 4 and ours_off <= 2 * theirs_off
        said_in = found.excuses if holds else found.wrong
        if said not in said_in:  # both dialects give the same
            said_in.append(said)


def drift(one: Pass, folder: Path, found: Found) -> None:
    """Return cosines with the float32 reference: our fast form in bfloat16, then the reference's own bfloat16."""
    names = [name for name in HEADS if name in one.theirs]
    backbone = oracle.ours(folder, dtype=torch.bfloat16, size_HW=one.size_HW)
    mine = oracle.run(backbone, one.x_BCHW.bfloat16(), *names)
    found.bfloat16 = {name: cosine(mine[name], one.theirs[name]) for name in names}
    # load again: LeViT keeps tables in the dtype of its first run
    model = type(one.model).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    theirs = features_of(model, one.x_BCHW.bfloat16(), None)
    found.bfloat16_reference = {name: cosine(theirs[name], one.theirs[name]) for name in names}


def cosine(drifted: Tensor, exact: Tensor) -> float:
    return float(torch.cosine_similarity(drifted.double().flatten(1), exact.double().flatten(1)).min())


# --- config and files ---


def compare_config(family: Family, entry: Published, model: Any, folder: Path) -> tuple[int, list[str]]:
    """Compare our settings with the reference's config, as read from the saved file, which has every field, and from
    the catalog, which leaves the rest to our defaults. Returns the number of fields, and those that differ."""
    theirs = type(model.config).from_pretrained(folder)
    size_HW = (entry.image_size, entry.image_size)
    said = {"model_type": theirs.model_type, "architectures": [entry.architecture]}
    catalogue = {**config_of(family, entry), **said}
    configs = {"config.json": read_json(folder / "config.json"), "catalogue": catalogue}
    wrong: list[str] = []
    for where, config in configs.items():
        mine = settings_of(family, config, size_HW, theirs)
        pairs = [(name, ours, field_of(theirs, name, ours)) for name, ours in mine.items()]
        wrong += [
            f"{where}: {name}: ours {ours}, the reference {other}" for name, ours, other in pairs if ours != other
        ]
    return len(mine), wrong


def settings_of(family: Family, config: Mapping[str, Any], size_HW: tuple[int, int], theirs: Any) -> dict[str, Any]:
    """Return our settings by name; for the file of three model types, those that the reference's config of one has."""
    read = family.read_settings(config, size_HW)
    if hasattr(theirs, "vision_config"):
        return towers.settings_by_section(family, config, read)
    names = [one.name for one in fields(read) if one.name not in OURS_ONLY]
    if not isinstance(read, vit.Settings):
        return {name: getattr(read, name) for name in names}
    mine = {name: getattr(read, name) for name in names if hasattr(theirs, name)}
    return mine | ({} if read.is_dinov2 else {"pooler_output_size": read.pooled_size})  # None: as wide as the tokens


def field_of(config: Any, name: str, mine: object) -> object:
    """Convert a field of the reference's config to the form in our settings."""
    if name == "architecture":
        return config.architectures[0]
    section, _, field_name = name.rpartition(".")
    value = getattr(getattr(config, section) if section else config, field_name)
    if name == "down_ops":  # the reference appends an empty entry each time it builds a model
        return tuple(levit.Shrink(*op[1:]) for op in value if op != [""])
    if name == "out_indices":
        return tuple(index % len(config.stage_names) for index in value)
    if isinstance(mine, tuple) and isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, list) else value


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(cast(list[str], file.keys()))


def in_short(names: Iterable[str]) -> list[str]:
    """Shorten `tokens:0`, `tokens:1`, ... to `tokens:0-12`; gaps are shown."""
    short: dict[str, list[str]] = {}
    for name in names:
        stem, colon, number = name.removesuffix(" (masked)").rpartition(":")
        masked = " (masked)" if name.endswith(" (masked)") else ""
        key = f"{stem}:{{}}{masked}" if colon and number.isdigit() else name
        short.setdefault(key, []).append(number)
    return [key.format(_runs(numbers)) if "{}" in key else key for key, numbers in short.items()]


def _runs(numbers: list[str]) -> str:
    whole = len(numbers) == int(numbers[-1]) - int(numbers[0]) + 1
    return f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(numbers)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
