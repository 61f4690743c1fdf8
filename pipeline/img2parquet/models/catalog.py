"""List the checkpoints that are known by name: sizes, possible outputs, and the accuracy their authors claim."""

from __future__ import annotations

from collections.abc import Iterator

from img2parquet.models import Family, ModelSpec, Published, published, read_card

# the kinds of output that each feature makes possible, in the order of the listing
KINDS = {
    "pooled": ("embedding",),
    "logits": ("logits", "labels"),
    "segmentation": ("segmentation",),
    "visual_tokens": ("visual_tokens",),
    "tokens": ("tokens",),
    "feature_maps": ("feature_maps",),
    "attentions": ("attentions",),
}
REFERENCES = (
    "reference: computed by the library itself, not by ours; its extra is `pip install 'img2parquet[<library>]'`",
    "  transformers:<org/name, folder or URI>  DINOv3, ConvNeXt, Swin, SegFormer, Mask2Former, the ViTs",
    "  timm:<name, org/name or folder>         every classifier of timm that gives one tensor of features",
)
HEADER = f"{'published as':46} {'params M':>8} {'GMACs':>8} {'input':>5}  {'outputs':64} accuracy"


def lines() -> Iterator[str]:
    """Yield the catalog as lines of text: families, each with its checkpoints and the meaning of its `embedding`."""
    yield HEADER
    last = ""
    for family, known in published():
        if last != family.MODEL_TYPE:
            last = family.MODEL_TYPE
            prompts = "; `text_features` turns prompts into vectors of that space" if hasattr(family, "TEXT") else ""
            yield f"{last} (native): `embedding` is {family.EMBEDDING[0].lower()}{family.EMBEDDING[1:]}{prompts}"
        yield _line(family, known)
    yield from REFERENCES


def _line(family: Family, known: Published) -> str:
    sizes = f"{known.parameters / 1e6:8.2f} {known.gmacs:8.2f} {known.image_size:5}"
    return f"  {known.repo:44} {sizes}  {', '.join(kinds(known)):64} {known.accuracy}".rstrip()


def kinds(known: Published) -> list[str]:
    """List the kinds of output that a published checkpoint can give. Takes milliseconds: no weights are loaded."""
    gives = {name.split(":")[0] for name in read_card(ModelSpec(known.repo, weights="random(0)")).gives}
    return [kind for feature, kinds in KINDS.items() if feature in gives for kind in kinds]
