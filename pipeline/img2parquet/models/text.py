"""Turn prompts into vectors of the space shared with images: a checkpoint's tokenizer, then its text tower.

* The tokenizer is the checkpoint's own `tokenizer.json`, read by the `tokenizers` library.
* A prompt that is empty, or longer than the model reads, is refused: a cut prompt would give a vector of other words.
* Every prompt is padded to the full length that the model was trained on.

Shapes: B prompts of a batch, n prompts, T tokens of a prompt, E width of the shared space.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from img2parquet.errors import CheckpointError, InputError, MissingDependency
from img2parquet.models.checkpoint import read_json
from img2parquet.models.hub import TOKENIZER, TOKENIZER_CONFIG
from img2parquet.models.two_towers import TextSettings

BATCH = 64
SHOWN = 60  # characters of a prompt in a message


class Text:
    """A loaded text tower with its tokenizer. Call it with prompts.

    logit_scale and logit_bias: the trained factor (its exponential) and offset that turn the cosine of an image and a
    prompt into the reference's `logits_per_image`; the offset is 0 for CLIP. problem: how these are read, as
    config.json's `problem_type`: against each other, or one by one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tower: Callable[[Tensor], Tensor],
        device: torch.device,
        scale: float,
        bias: float,
        problem: str,
    ) -> None:
        self.tokenizer, self.tower, self._device = tokenizer, tower, device
        self.logit_scale, self.logit_bias, self.problem = scale, bias, problem

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """texts -> (n, E), float32, on the host: the reference's `get_text_features`, not normalised.

        Raises InputError, naming the prompt, for one that is empty or too long."""
        ids_nT = self.tokenizer(texts)
        with torch.inference_mode():
            batches = (ids_nT[start : start + BATCH].to(self._device) for start in range(0, len(ids_nT), BATCH))
            return torch.cat([self.tower(ids_BT).float().cpu() for ids_BT in batches])


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer in a checkpoint's folder (None: random weights, which have no folder), for one text tower."""

    folder: Path | None
    source: str
    settings: TextSettings

    @property
    def sha256(self) -> str:
        """Digest of the tokenizer's file and of the settings beside it."""
        said = json.dumps(dict(self._config), sort_keys=True)
        return hashlib.sha256((self._library.to_str() + said).encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """texts -> token ids (n, T), padded to the model's full length. Raises InputError, CheckpointError."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("texts: prompts are a list of strings", hint='write `["a red car"]`')
        if not texts:
            raise InputError("texts: no prompt was given")
        for index, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"texts[{index}]: the prompt is empty")
        cleaned = [self.settings.clean(text, self._config) for text in texts]
        bare, whole = (self._library.encode_batch(cleaned, add_special_tokens=add) for add in (False, True))
        rows = [self._row(index, text, bare[index].ids, whole[index].ids) for index, text in enumerate(texts)]
        return torch.tensor(rows, dtype=torch.long)

    def _row(self, index: int, text: str, bare: list[int], ids: list[int]) -> list[int]:
        shown = f"texts[{index}]: `{text if len(text) <= SHOWN else text[:SHOWN] + '...'}`"
        if not bare:
            raise InputError(f"{shown}: the tokenizer leaves nothing of this prompt", hint="use words")
        special = self._special & set(bare)
        if special:
            raise InputError(f"{shown}: holds `{self._library.id_to_token(min(special))}`, which marks a prompt's ends")
        s, ids = self.settings, list(ids)
        if not s.pads_with_eos and ids[-1] != self._eos:
            ids.append(self._eos)
        if len(ids) > s.max_position_embeddings:
            message = f"{shown}: {len(ids)} tokens, its ends included; the model reads {s.max_position_embeddings}"
            raise InputError(message, hint="shorten it, or split it into several prompts")
        if max(ids) >= s.vocab_size or (s.pads_with_eos and s.eos_token_id not in (2, ids[-1])):
            raise self._of_another_vocabulary(f"token {max(ids)} of prompt `{text[:SHOWN]}`, which ends in {ids[-1]}")
        return ids + [ids[-1] if s.pads_with_eos else self._pad] * (s.max_position_embeddings - len(ids))

    @cached_property
    def _library(self) -> Any:
        """The library's tokenizer, which neither cuts nor pads."""
        if self.folder is None:
            raise CheckpointError(
                f"{self.source}: random weights have no tokenizer", hint="use a folder with its files"
            )
        path = self.folder / TOKENIZER
        if not path.is_file():
            hint = f"copy it from where the checkpoint is published, or let transformers write it: {SAVE}"
            raise CheckpointError(f"{self.folder}: no {TOKENIZER}, which turns prompts into tokens", hint=hint)
        library = _tokenizers()
        try:
            tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for whatever it cannot read
            message = f"{path}: not a tokenizer's file: {(str(error).splitlines() or ['no reason given'])[0]}"
            raise CheckpointError(message, hint="download it again") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if size > self.settings.vocab_size:
            raise self._of_another_vocabulary(f"{size} tokens")
        return tokenizer

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        path = None if self.folder is None else self.folder / TOKENIZER_CONFIG
        return read_json(path) if path is not None and path.is_file() else {}

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._library.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _eos(self) -> int:
        return self._number("eos_token", self.settings.eos_token_id)

    @cached_property
    def _pad(self) -> int:
        return self._number("pad_token", self.settings.pad_token_id)

    def _number(self, name: str, otherwise: int) -> int:
        """Return the number of a token that tokenizer_config.json names; config.json's if it names none."""
        token = self._config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        number = otherwise if token is None else self._library.token_to_id(token)
        if type(number) is not int or not 0 <= number < self.settings.vocab_size:
            raise self._of_another_vocabulary(f"{name} `{token}`, which is number {number}")
        return number

    def _of_another_vocabulary(self, what: str) -> CheckpointError:
        message = f"{self.source}: {TOKENIZER} is of another model: it has {what}; the text tower knows"
        hint = "take the tokenizer and the weights from the same place"
        s = self.settings
        return CheckpointError(f"{message} {s.vocab_size} tokens, and prompts that end in {s.eos_token_id}", hint=hint)


SAVE = "`AutoTokenizer.from_pretrained(<its name>).save_pretrained(<this folder>)`"


def _tokenizers() -> Any:
    """Import the library, when the first prompt comes. Raises MissingDependency."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        hint = "pip install 'img2parquet[text]'"
        raise MissingDependency("prompts need the package tokenizers", hint=hint) from None
