"""Describe classes by prompts, and turn them into one vector a class in the space shared with images.

* A class has any number of prompts. Each prompt's vector is scaled to length 1, their mean is the class's vector, and
  that is scaled to length 1 again (Radford et al. 2021, section 3.1.4).
* Templates are sentences with `{}` where a class's name goes. `imagenet` are the 80 that CLIP's authors published for
  ImageNet, `plain` is the single one that they recommend in general.

Shapes: K classes, N prompts of all of them, n of one, E width of the shared space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from img2parquet.errors import InputError, NotFound, nearest
from img2parquet.storage import Store

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True)
class ClassPrompts:
    """Classes by id, each with the prompts that stand for it."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]

    @cached_property
    def sha256(self) -> str:
        """Digest of everything that decides the classes' vectors, but the model."""
        return hashlib.sha256(json.dumps([self.names, self.prompts]).encode()).hexdigest()

    def vectors(self, text: Text) -> Tensor:
        """Compute the classes' vectors of length 1, (K, E) float32, on the host.

        Raises InputError for a prompt that the model cannot read, naming it."""
        import torch
        import torch.nn.functional as F

        unit_NE = F.normalize(text([prompt for of_class in self.prompts for prompt in of_class]), dim=1)
        each = torch.split(unit_NE, [len(of_class) for of_class in self.prompts])
        return F.normalize(torch.stack([vectors_nE.mean(dim=0) for vectors_nE in each]), dim=1)


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
        by_name = {str(name): _listed(f"class `{name}`", prompts) for name, prompts in given.items()}
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
        found = yaml.load(text, Loader=yaml.BaseLoader)  # of texts alone, so that `no` is a class; reads JSON too
    except yaml.YAMLError as error:
        raise InputError(f"{uri}: {' '.join(str(error).split())}", hint=f"write {FORMS}") from None
    if not isinstance(found, list | dict):
        raise InputError(f"{uri}: holds {type(found).__name__}", hint=f"write {FORMS}")
    return found


def _listed(what: str, given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{what}: `{given}` is not a list of texts", hint=f"write {FORMS}")
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
