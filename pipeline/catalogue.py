"""Every checkpoint that is known by name: its sizes, what a job can ask of it, and what its authors claim."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.models import Family, Published, published, read_card

# the kinds of output that a feature makes possible, in the order they are listed
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
    "  transformers:<org/name, folder or URI>  CLIP, SigLIP, DINOv3, ConvNeXt, Swin, SegFormer, Mask2Former, the ViTs",
    "  timm:<name, org/name or folder>         every classifier of timm that gives one tensor of features",
)
HEADER = f"{'published as':46} {'params M':>8} {'GMACs':>8} {'input':>5}  {'outputs':64} accuracy"


def lines() -> Iterator[str]:
    """The catalogue as text: families, each with its checkpoints and what `embedding` means for it."""
    yield HEADER
    last = ""
    for family, known in published():
        if last != family.MODEL_TYPE:
            last = family.MODEL_TYPE
            yield f"{last} (native): `embedding` is {family.EMBEDDING[0].lower()}{family.EMBEDDING[1:]}"
        yield _line(family, known)
    yield from REFERENCES


def _line(family: Family, known: Published) -> str:
    sizes = f"{known.parameters / 1e6:8.2f} {known.gmacs:8.2f} {known.image_size:5}"
    return f"  {known.repo:44} {sizes}  {', '.join(kinds(known)):64} {known.accuracy}".rstrip()


def kinds(known: Published) -> list[str]:
    """The kinds of output that a published checkpoint can give. Built without weights, so it costs milliseconds."""
    gives = {name.split(":")[0] for name in read_card(known.repo, weights="random(0)").gives}
    return [kind for feature, kinds in KINDS.items() if feature in gives for kind in kinds]
