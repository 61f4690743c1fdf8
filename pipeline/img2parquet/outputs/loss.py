"""Compute the reference's loss of each row from the model's scores and a ground-truth column.

Shapes: B batch, K classes, N patches, M masked patches, V vocabulary, h w the head's map, H W the ground-truth map.

- A row's loss is what the reference returns for a batch of that one image. The job's summary has the mean over rows.
- This is the only output column that may be null: when a row's ground truth is null, or when all of it is ignored (each
  pixel or code), for which the reference gives NaN. Ground truth that cannot be understood fails its part.
- Segmentation: the loss of the main head and, where a BEiT has an auxiliary head, `auxiliary_loss_weight` (0.4) times
  the loss of that one, as in the reference.
- LeViT: the reference accepts labels only for one head, `head: cls`; the default is the same loss of both heads' mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import pyarrow as pa
from pydantic import Field

from img2parquet.errors import OutputUnavailable
from img2parquet.models import Card
from img2parquet.outputs import BatchRows, ColumnName, not_finite_error, passthrough_column, require_feature
from img2parquet.outputs.ground_truth import Cell, class_id, class_map, class_shares, codes, numbers, parsed
from img2parquet.outputs.masking import MaskSettings
from img2parquet.outputs.resize_maps import require_whole_image, upsample_in_chunks
from img2parquet.outputs.score_function import PROBLEMS, Problem, check_problem

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["classification", "segmentation", "visual_tokens"]
AUXILIARY, AUXILIARY_LOSS_WEIGHT = "segmentation:auxiliary", 0.4  # the reference's default
# settings that only one kind of loss reads: for another kind they would change nothing, so they are refused
SETTINGS_OF = {
    "head": "classification",
    "reduce_labels": "segmentation",
    "mask_ratio": "visual_tokens",
    "seed": "visual_tokens",
    "mask_column": "visual_tokens",
}


class Loss(MaskSettings):
    """Write one float32 per row, null for a row without ground truth. The ground truth depends on the model's head:

    classification   a class id or name; for several labels a list of names, or K numbers from 0 to 1; one number, or K,
                     for regression.
                     config.json's `problem_type` decides which; without it, the first value does
    segmentation     a PNG of class ids, of any size, for the whole image
    visual_tokens    a list of codes, for all patches or for the masked ones, row by row"""

    kind: Literal["loss"] = "loss"
    name: ColumnName = Field(default="loss", description="Column name.")
    truth: str = Field(min_length=1, description="The passthrough column with the ground truth of each image.")
    of: Literal["auto", "classification", "segmentation", "visual_tokens"] = Field(
        default="auto", description="The head whose loss is computed; `auto`: the head that the checkpoint has."
    )
    head: Literal["default", "cls", "distillation"] = Field(
        default="default",
        description="`default`: the checkpoint's own prediction (LeViT: the mean of both heads); else the named head.",
    )
    reduce_labels: bool | None = Field(
        default=None,
        description="Class 0 of the ground truth is background: it is ignored, and the other classes count from 0. "
        "Default: the setting of the checkpoint's processor.",
    )

    def column_names(self) -> tuple[str, ...]:
        return (self.name,)

    def columns_read(self) -> tuple[str, ...]:
        return (self.truth, *super().columns_read())

    def rule(self, card: Card) -> Rule:
        """Return the kind of loss that is computed for a model."""
        if self.of != "auto":
            return self.of
        heads: dict[str, Rule] = {"segmentation": "segmentation", "visual_tokens": "visual_tokens"}
        there = [heads[feature] for feature in heads if feature in card.gives and "logits" not in card.gives]
        return there[0] if there else "classification"

    def feature(self, card: Card) -> str:
        """Return the feature that the loss is computed from."""
        if self.rule(card) != "classification":
            return self.rule(card)
        return "logits" if self.head == "default" else f"logits:{self.head}"

    def wants(self, card: Card) -> frozenset[str]:
        require_feature(card, self.feature(card), wanted_by="output `loss`")
        self._refuse_settings_of_others(card)
        if self.rule(card) == "visual_tokens":
            self.require_visual_tokens(card, "output `loss`")
        elif self.rule(card) == "segmentation":
            _refuse_other_losses(card)
            require_whole_image(card, "output `loss`", "take a checkpoint")
        else:
            check_problem(card, "output `loss`")
        return frozenset([self.feature(card), *([] if self.auxiliary_weight(card) is None else [AUXILIARY])])

    def auxiliary_weight(self, card: Card) -> float | None:
        """Return the weight of the auxiliary head's loss in the sum; None where there is no such head."""
        if self.rule(card) != "segmentation" or AUXILIARY not in card.gives:
            return None
        weight = card.config.get("auxiliary_loss_weight")
        return AUXILIARY_LOSS_WEIGHT if weight is None else float(weight)

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
        weight = self.auxiliary_weight(card)
        if weight is not None:
            auxiliary = dict(self._of_maps(card, features[AUXILIARY].detach().float(), rows, truths))
            found = {i: loss + weight * auxiliary[i] for i, loss in found.items()}
        losses = _to_host(found)
        bad = [i for i, loss in losses.items() if not abs(loss) < float("inf")]
        if bad:
            raise not_finite_error(self.name, bad, "float32")
        return [pa.array([losses.get(i) for i in range(len(truths))], pa.float32())]

    def _of_classes(
        self, card: Card, logits_BK: Tensor, rows: BatchRows, truths: Sequence[Any]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and loss of each row that has a loss."""
        there = [i for i, truth in enumerate(truths) if truth is not None]
        if not there:
            return
        K = logits_BK.shape[1]
        problem = problem_of(card, K, truths[there[0]])
        targets: dict[int, Any] = {}
        for i in there:
            cell = Cell(self.truth, rows.keys[i])
            if problem == "single_label_classification":
                targets[i] = class_id(truths[i], card.labels, K, cell)
            elif problem == "multi_label_classification":
                targets[i] = class_shares(truths[i], card.labels, K, cell)
            else:
                targets[i] = numbers(truths[i], K, False, cell)
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
            cell = Cell(self.truth, rows.keys[i])
            ids_HW = class_map(truth, scores_BKhw.shape[1], ignored, reduces, cell)
            if (ids_HW != ignored).any():
                self._refuse_not_finite(scores_BKhw[i], i)
                yield i, loss_of_map(scores_BKhw[i], torch.from_numpy(ids_HW).to(scores_BKhw.device), ignored)

    def _of_patches(
        self, card: Card, scores_BNV: Tensor, rows: BatchRows, truths: Sequence[Any]
    ) -> Iterator[tuple[int, Tensor]]:
        import torch
        import torch.nn.functional as F

        for i, (truth, mask_N) in enumerate(zip(truths, self.mask_BN(card, rows), strict=True)):
            if truth is None:
                continue
            cell = Cell(self.truth, rows.keys[i])
            codes_M = codes(truth, mask_N, scores_BNV.shape[2], cell)
            if (codes_M >= 0).any():
                self._refuse_not_finite(scores_BNV[i], i)
                scores_MV = scores_BNV[i][torch.from_numpy(mask_N).to(scores_BNV.device)]
                yield i, F.cross_entropy(scores_MV, torch.from_numpy(codes_M).to(scores_BNV.device))

    def _refuse_not_finite(self, scores: Tensor, row: int) -> None:
        if not bool(scores.isfinite().all()):
            raise not_finite_error(self.name, [row], "float32")

    def _refuse_settings_of_others(self, card: Card) -> None:
        rule = self.rule(card)
        for name in sorted(self.model_fields_set & SETTINGS_OF.keys()):
            if SETTINGS_OF[name] != rule:
                message = f"output `loss`: `{name}` is a setting of a {SETTINGS_OF[name]} loss"
                raise OutputUnavailable(f"{message}; model `{card.name}` has a {rule} loss", hint=f"remove `{name}`")


def _refuse_other_losses(card: Card) -> None:
    """Raise OutputUnavailable for models whose loss in the reference is no cross entropy over classes."""
    of_one_class = card.family == "transformers/segformer" and card.gives["segmentation"][0] == 1
    if card.family == "transformers/mask2former" or of_one_class:
        other = "a binary cross entropy of its one class" if of_one_class else "one of matched queries"
        message = f"output `loss`: the reference's loss of model `{card.name}` ({card.family}) is {other}"
        raise OutputUnavailable(message, hint="write its masks, and compare them with `img2parquet evaluate`")


def problem_of(card: Card, num_labels: int, truth: Any) -> Problem:
    """Return config.json's `problem_type`; without one, choose like the reference, by the classes and the value."""
    configured = card.config.get("problem_type")
    if configured is not None:
        return cast(Problem, configured)
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if isinstance(parsed(truth), list | tuple) else PROBLEMS[1]


def losses_of_classes(logits_BK: Tensor, targets: Sequence[Any], problem: Problem) -> Tensor:
    """Compute the loss of each row: (B, K) -> (B,)."""
    import torch
    import torch.nn.functional as F

    if problem == "single_label_classification":
        return F.cross_entropy(logits_BK, torch.tensor(targets, device=logits_BK.device), reduction="none")
    targets_BK = torch.tensor(targets, dtype=torch.float32, device=logits_BK.device)
    if problem == "regression":
        return F.mse_loss(logits_BK, targets_BK, reduction="none").mean(1)
    return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none").mean(1)


def loss_of_map(scores_Khw: Tensor, ids_HW: Tensor, ignored: int) -> Tensor:
    """Compute the mean cross entropy over pixels that are not `ignored`: (K, h, w) and (H, W) -> a scalar.

    The scores are upsampled to the size of the ground truth. The softmax's denominator is summed a few classes at a
    time, so that memory never holds K maps of that size."""
    import torch

    most_HW = torch.full(ids_HW.shape, float("-inf"), device=scores_Khw.device)
    total_HW, own_HW = torch.zeros_like(most_HW), torch.zeros_like(most_HW)
    for first, some_kHW in upsample_in_chunks(scores_Khw, (len(ids_HW), ids_HW.shape[1])):
        last_HW, most_HW = most_HW, torch.maximum(most_HW, some_kHW.amax(0))
        total_HW = total_HW * (last_HW - most_HW).exp() + (some_kHW - most_HW).exp_().sum(0)
        places_HW = ids_HW - first
        inside_HW = (places_HW >= 0) & (places_HW < len(some_kHW))
        picked_HW = some_kHW.gather(0, places_HW.clamp(0, len(some_kHW) - 1)[None])[0]
        own_HW = torch.where(inside_HW, picked_HW, own_HW)
    return (most_HW + total_HW.log() - own_HW)[ids_HW != ignored].double().mean().float()


def _to_host(losses: Mapping[int, Tensor]) -> dict[int, float]:
    """Move all losses to the host at once, which waits for the device only once."""
    import torch

    values = torch.stack(list(losses.values())).tolist() if losses else []
    return dict(zip(losses, values, strict=True))
