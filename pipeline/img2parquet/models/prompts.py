"""Describe classes by prompts, and make of them the classifier of a model that knows words.

* A class has any number of prompts. Each prompt's vector is scaled to length 1, their mean is the class's vector, and
  that is scaled to length 1 again (Radford et al. 2021, section 3.1.4).
* Logits are the reference's `logits_per_image`: the cosines of an image and the classes, times the model's trained
  factor, plus SigLIP's trained offset.
* Templates are sentences with `{}` where a class's name goes. `imagenet` are the 80 that CLIP's authors published for
  ImageNet, `plain` is the single one that they recommend in general.

Shapes: B images, K classes, N prompts of all of them, n of one, E width of the shared space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load, save

from img2parquet.errors import InputError, NotFound, nearest
from img2parquet.storage import Store

if TYPE_CHECKING:
    from img2parquet.models.text import Text

PLAIN = "plain"
_WITH_ARTICLE = (
    "a bad photo of", "a sculpture of", "a low resolution photo of", "a rendering of", "graffiti of",
    "a cropped photo of", "a tattoo of", "a bright photo of", "a dark photo of", "a drawing of", "a close-up photo of",
    "a black and white photo of", "a painting of", "a pixelated photo of", "a jpeg corrupted photo of",
    "a blurry photo of", "a good photo of", "a doodle of", "a sketch of", "a rendition of", "art of", "itap of",
    "a photo of",
)  # fmt: skip
_LOOKS = ("hard to see", "clean", "dirty", "cool", "large", "nice", "weird", "small")
_MADE_OF = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
TEMPLATES: dict[str, tuple[str, ...]] = {
    PLAIN: ("a photo of a {}.",),
    "imagenet": (
        *(f"{start} {article} {{}}." for start in _WITH_ARTICLE for article in ("a", "the")),
        *(f"a photo of {article} {look} {{}}." for look in _LOOKS for article in ("a", "the")),
        *(f"{article} {kind} {{}}." for kind in _MADE_OF for article in ("a", "the")),
        *(f"{article} {{}} in a video game." for article in ("a", "the")),
        "a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}.",
    ),
}  # fmt: skip
FORMS = "one class a line, or JSON or YAML: a list of classes, or {class: [prompts]}"


class ClassWeights(NamedTuple):
    """A linear classifier of unit vectors: logits are `weight_KE @ unit_E + bias_K`."""

    weight_KE: npt.NDArray[np.float32]
    bias_K: npt.NDArray[np.float32]


@dataclass(frozen=True)
class ClassPrompts:
    """Classes by id, each with the prompts that stand for it."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]

    @cached_property
    def sha256(self) -> str:
        """Digest of everything that decides the classes' vectors, but the model."""
        return hashlib.sha256(json.dumps([self.names, self.prompts]).encode()).hexdigest()

    def check_choice(self, problem: str) -> None:
        """Raise InputError for a single class of a model that scores classes against each other.

        problem: the model's `Text.problem`."""
        if len(self.names) == 1 and problem == "single_label_classification":
            message = (
                f"`{self.names[0]}` is the only class, and classes are scored against each other: it always gets 1"
            )
            raise InputError(message, hint="add a class such as `other: [a photo, a picture]`")

    @property
    def all(self) -> list[str]:
        """The prompts of all classes, one after another."""
        return [prompt for of_class in self.prompts for prompt in of_class]

    def weights(self, text: Text) -> ClassWeights:
        """Compute the classifier with a model's text tower. Raises InputError for a prompt that it cannot read."""
        import torch
        import torch.nn.functional as F

        unit_NE = F.normalize(text(self.all), dim=1)
        each = torch.split(unit_NE, [len(of_class) for of_class in self.prompts])
        classes_KE = F.normalize(torch.stack([unit_nE.mean(dim=0) for unit_nE in each]), dim=1)
        bias_K = np.full(len(self.names), text.logit_bias, np.float32)
        return ClassWeights((classes_KE * text.logit_scale).numpy(), bias_K)


def weights_file(model: str) -> str:
    """Return the name of the file in an output that holds a model's classifier."""
    return f"_prompts-{model}.safetensors"


def encode_weights(weights: ClassWeights, prompts: str) -> bytes:
    """Encode a classifier as safetensors. prompts: the digest in its model's card."""
    arrays = {name: np.ascontiguousarray(array) for name, array in weights._asdict().items()}
    return bytes(save(arrays, metadata={"prompts": prompts, "sha256": _digest(arrays)}))


def decode_weights(data: bytes, prompts: str) -> ClassWeights:
    """Decode what `encode_weights` made. Raises ValueError when it is damaged, or of other prompts."""
    try:
        length = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + length])["__metadata__"]
        weights = ClassWeights(**load(data))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not readable: {error}") from None
    if said.get("sha256") != _digest(weights._asdict()):
        raise ValueError("its bytes were changed")
    if said.get("prompts") != prompts:
        raise ValueError("it is of other prompts")
    return weights


def _digest(arrays: Mapping[str, npt.NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def class_prompts(
    classes: str | Sequence[str] | Mapping[str, str | Sequence[str]], templates: str | Sequence[str] = PLAIN
) -> ClassPrompts:
    """Read classes and write their prompts.

    classes: names, which `templates` turn into prompts; or, by name, one or several prompts of its own, of which those
    with `{}` are templates too; or the path or URI of a file with either.
    templates: `plain`, `imagenet`, or sentences with `{}`.

    Raises InputError when the file cannot be read, for fewer than one class, for names that are empty or occur twice,
    and for templates without `{}`."""
    given = _read(classes) if isinstance(classes, str) else classes
    sentences = _sentences(templates)
    if isinstance(given, Mapping):
        other = next((name for name in given if not isinstance(name, str)), None)
        if other is not None:
            raise InputError(
                f"class `{other}` is not text", hint="put it in quotes: YAML takes `no` and `1` for others"
            )
        by_name = {name: _listed(f"class `{name}`", prompts) for name, prompts in given.items()}
    else:
        names = _listed("classes", given)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"class `{twice[0]}` occurs twice", hint="give the classes different names")
        by_name = dict.fromkeys(names, sentences)
    if not by_name:
        raise InputError("no class was given", hint=FORMS)
    empty = next((name for name in by_name if not name.strip()), None)
    if empty is not None:
        raise InputError(f"the class `{empty}` has an empty name")
    filled = tuple(tuple(sentence.replace("{}", name) for sentence in own) for name, own in by_name.items())
    return ClassPrompts(tuple(by_name), filled)


def _read(uri: str) -> Any:
    try:
        text = Store().read(uri).decode("utf-8-sig")
    except NotFound:
        raise InputError(f"{uri}: no such file of prompts", hint=f"a file with {FORMS}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: not UTF-8: {error.reason} at byte {error.start}") from None
    if PurePosixPath(uri).suffix.lower() not in (".json", ".yaml", ".yml"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found = yaml.safe_load(text)  # reads JSON too
    except yaml.YAMLError as error:
        raise InputError(f"{uri}: {' '.join(str(error).split())}", hint=f"write {FORMS}") from None
    if not isinstance(found, list | dict):
        raise InputError(f"{uri}: holds {type(found).__name__}", hint=f"write {FORMS}")
    return found


def _listed(what: str, given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"{what}: `{given}` is not a list of texts", hint=f"write {FORMS}; in YAML, put `no` in quotes"
        )
    return texts


def _sentences(templates: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str) and templates in TEMPLATES:
        return TEMPLATES[templates]
    if isinstance(templates, str) and "{}" not in templates:
        hint = nearest(templates, TEMPLATES) or "or write a sentence with `{}` where the class goes"
        raise InputError(f"templates: unknown `{templates}`", known=sorted(TEMPLATES), hint=hint)
    sentences = _listed("templates", templates)
    without = next((sentence for sentence in sentences if "{}" not in sentence), None)
    if without is not None:
        raise InputError(f"templates: `{without}` has no `{{}}` where the class goes")
    return sentences
