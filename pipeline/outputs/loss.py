"""What the model says and a column of truths -> the reference's loss of each row alone.

Shapes: B batch, K classes, N patches, M masked patches, V vocabulary, h w the head's map, H W the truth's.

- A loss is what the reference returns for a batch of that one image; the job's summary reports the mean over rows.
- The one column here that may be null: where a row's truth is null, or where nothing in it counts (every pixel or code
  is one to ignore), for which the reference gives NaN. A truth that cannot be understood fails its part.
- Segmentation: the main head's part. The reference adds 0.4 times the loss of an auxiliary head, which is not run here;
  with `use_auxiliary_head: false` its loss is this one.
- LeViT: the reference has labels only for one head, `head: cls`; the default is the same loss of both heads' mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import pyarrow as pa
from pydantic import Field

from pipeline.errors import OutputUnavailable
from pipeline.models import Card
from pipeline.outputs import BatchRows, ColumnName, not_finite, passthrough_column, require
from pipeline.outputs.maps import require_whole_image, upsampled
from pipeline.outputs.masking import MaskSettings
from pipeline.outputs.truth import Place, class_id, class_map, codes, numbers

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["classification", "segmentation", "visual_tokens"]
Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
PROBLEMS: tuple[Problem, ...] = ("regression", "single_label_classification", "multi_label_classification")
# what only one rule reads, so that a setting which would change nothing is refused
SETTINGS_OF = {
    "head": "classification",
    "reduce_labels": "segmentation",
    "mask_ratio": "visual_tokens",
    "seed": "visual_tokens",
    "mask_column": "visual_tokens",
}


class Loss(MaskSettings):
    """Features and `truth` -> one float32 a row, null without a truth. What a truth is, by the checkpoint's head:

    classification   a class id or name; K numbers from 0 to 1 for several labels; a number, or K, for regression.
                     Which of these, config.json's `problem_type` says, or else the truths themselves
    segmentation     a PNG of class ids, of any size, for the whole image
    visual_tokens    a list of codes, for every patch or for the masked ones, row by row"""

    kind: Literal["loss"] = "loss"
    name: ColumnName = Field(default="loss", description="The column.")
    truth: str = Field(min_length=1, description="The passthrough column with what is true of each image.")
    of: Literal["auto", "classification", "segmentation", "visual_tokens"] = Field(
        default="auto", description="Which head's loss; `auto`: of the one that the checkpoint has."
    )
    head: Literal["default", "cls", "distillation"] = Field(
        default="default", description="`default`: the checkpoint's answer (LeViT: the mean of both heads)."
    )
    reduce_labels: bool | None = Field(
        default=None,
        description="Class 0 of the truth is background: ignored, the others count from 0. Default: as the "
        "checkpoint's processor says.",
    )

    def column_names(self) -> tuple[str, ...]:
        return (self.name,)

    def columns_read(self) -> tuple[str, ...]:
        return (self.truth, *super().columns_read())

    def rule(self, card: Card) -> Rule:
        if self.of != "auto":
            return self.of
        heads: dict[str, Rule] = {"segmentation": "segmentation", "visual_tokens": "visual_tokens"}
        there = [heads[feature] for feature in heads if feature in card.gives and "logits" not in card.gives]
        return there[0] if there else "classification"

    def feature(self, card: Card) -> str:
        if self.rule(card) != "classification":
            return self.rule(card)
        return "logits" if self.head == "default" else f"logits:{self.head}"

    def wants(self, card: Card) -> frozenset[str]:
        require(card, self.feature(card), wanted_by="output `loss`")
        self._refuse_settings_of_others(card)
        if self.rule(card) == "visual_tokens":
            self.require_visual_tokens(card, "output `loss`")
        elif self.rule(card) == "segmentation":
            require_whole_image(card, "output `loss`", "take a checkpoint")
        else:
            _check_problem(card)
        return frozenset([self.feature(card)])

    def fields(self, card: Card) -> list[pa.Field]:
        return [pa.field(self.name, pa.float32(), nullable=True)]

    def bytes_per_row(self, card: Card) -> int:
        return 8

    def inputs(self, card: Card, rows: BatchRows) -> dict[str, Tensor]:
        return self.mask_inputs(card, rows) if self.rule(card) == "visual_tokens" else {}

    def columns(self, card: Card, features: Mapping[str, Tensor], rows: BatchRows) -> list[pa.Array]:
        by_rule = {
            "classification": self._of_classes,
            "segmentation": self._of_maps,
            "visual_tokens": self._of_patches,
        }
        scores = features[self.feature(card)].detach().float()
        truths = passthrough_column(self.truth, rows)
        found = dict(by_rule[self.rule(card)](card, scores, rows, truths))
        losses = _to_host(found)
        bad = [rows.keys[i] for i, loss in losses.items() if not abs(loss) < float("inf")]
        if bad:
            raise not_finite(self.name, bad, "float32")
        return [pa.array([losses.get(i) for i in range(len(truths))], pa.float32())]

    def _of_classes(
        self, card: Card, logits_BK: Tensor, rows: BatchRows, truths: Sequence[Any]
    ) -> Iterator[tuple[int, Tensor]]:
        """Each row that has a loss, with it."""
        there = [i for i, truth in enumerate(truths) if truth is not None]
        if not there:
            return
        K = logits_BK.shape[1]
        problem = problem_of(card, K, truths[there[0]])
        targets: dict[int, Any] = {}
        for i in there:
            place = Place(self.truth, rows.keys[i])
            if problem == "single_label_classification":
                targets[i] = class_id(truths[i], card.labels, K, place)
            else:
                targets[i] = numbers(truths[i], K, problem == "multi_label_classification", place)
        counted = [i for i in there if targets[i] is not None]
        if counted:
            losses_B = losses_of_classes(logits_BK[counted], [targets[i] for i in counted], problem)
            yield from zip(counted, losses_B, strict=True)

    def _of_maps(
        self, card: Card, scores_BKhw: Tensor, rows: BatchRows, truths: Sequence[Any]
    ) -> Iterator[tuple[int, Tensor]]:
        import torch

        ignored = int(card.config.get("semantic_loss_ignore_index", 255))
        reduces = card.reduces_labels if self.reduce_labels is None else self.reduce_labels
        for i, truth in enumerate(truths):
            if truth is None:
                continue
            place = Place(self.truth, rows.keys[i])
            ids_HW = class_map(truth, scores_BKhw.shape[1], ignored, reduces, place)
            if (ids_HW != ignored).any():
                self._refuse_not_finite(scores_BKhw[i], place)
                yield i, loss_of_map(scores_BKhw[i], torch.from_numpy(ids_HW).to(scores_BKhw.device), ignored)

    def _of_patches(
        self, card: Card, scores_BNV: Tensor, rows: BatchRows, truths: Sequence[Any]
    ) -> Iterator[tuple[int, Tensor]]:
        import torch
        import torch.nn.functional as F

        for i, (truth, mask_N) in enumerate(zip(truths, self.mask_BN(card, rows), strict=True)):
            if truth is None:
                continue
            place = Place(self.truth, rows.keys[i])
            codes_M = codes(truth, mask_N, scores_BNV.shape[2], place)
            if (codes_M >= 0).any():
                self._refuse_not_finite(scores_BNV[i], place)
                scores_MV = scores_BNV[i][torch.from_numpy(mask_N).to(scores_BNV.device)]
                yield i, F.cross_entropy(scores_MV, torch.from_numpy(codes_M).to(scores_BNV.device))

    def _refuse_not_finite(self, scores: Tensor, place: Place) -> None:
        if not bool(scores.isfinite().all()):
            raise not_finite(self.name, [place.key], "float32")

    def _refuse_settings_of_others(self, card: Card) -> None:
        rule = self.rule(card)
        for name in sorted(self.model_fields_set & SETTINGS_OF.keys()):
            if SETTINGS_OF[name] != rule:
                message = (
                    f"output `loss`: `{name}` is of a {SETTINGS_OF[name]} loss; model `{card.name}` has a {rule} loss"
                )
                raise OutputUnavailable(message, hint=f"leave `{name}` out")


def problem_of(card: Card, num_labels: int, truth: Any) -> Problem:
    """config.json's `problem_type`; where it has none, the reference's choice by the classes and the truth's type."""
    said = card.config.get("problem_type")
    if said is not None:
        return cast(Problem, said)
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if isinstance(truth, Sequence) and not isinstance(truth, str) else PROBLEMS[1]


def losses_of_classes(logits_BK: Tensor, targets: Sequence[Any], problem: Problem) -> Tensor:
    """Each row's own loss, (B,)."""
    import torch
    import torch.nn.functional as F

    if problem == "single_label_classification":
        return F.cross_entropy(logits_BK, torch.tensor(targets, device=logits_BK.device), reduction="none")
    targets_BK = torch.tensor(targets, dtype=torch.float32, device=logits_BK.device)
    if problem == "regression":
        return F.mse_loss(logits_BK, targets_BK, reduction="none").mean(1)
    return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none").mean(1)


def loss_of_map(scores_Khw: Tensor, ids_HW: Tensor, ignored: int) -> Tensor:
    """Mean cross entropy over the pixels that are not `ignored`, the scores upsampled to the truth's size.

    The softmax's denominator is summed up a few classes at a time, so that K maps of that size never are in memory."""
    import torch

    most_HW = torch.full(ids_HW.shape, float("-inf"), device=scores_Khw.device)
    total_HW, own_HW = torch.zeros_like(most_HW), torch.zeros_like(most_HW)
    for first, some_kHW in upsampled(scores_Khw, (len(ids_HW), ids_HW.shape[1])):
        last_HW, most_HW = most_HW, torch.maximum(most_HW, some_kHW.amax(0))
        total_HW = total_HW * (last_HW - most_HW).exp() + (some_kHW - most_HW).exp_().sum(0)
        places_HW = ids_HW - first
        inside_HW = (places_HW >= 0) & (places_HW < len(some_kHW))
        picked_HW = some_kHW.gather(0, places_HW.clamp(0, len(some_kHW) - 1)[None])[0]
        own_HW = torch.where(inside_HW, picked_HW, own_HW)
    return (most_HW + total_HW.log() - own_HW)[ids_HW != ignored].double().mean().float()


def _check_problem(card: Card) -> None:
    problem = card.config.get("problem_type")
    if problem is not None and problem not in PROBLEMS:
        message = f"output `loss`: config.json of model `{card.name}` has the unknown `problem_type: {problem}`"
        raise OutputUnavailable(message, known=PROBLEMS)


def _to_host(losses: Mapping[int, Tensor]) -> dict[int, float]:
    """Moved at once: one wait for the device, not one a row."""
    import torch

    values = torch.stack(list(losses.values())).tolist() if losses else []
    return dict(zip(losses, values, strict=True))
