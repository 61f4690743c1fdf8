"""The comparison tolerates differences that float32's rounding explains, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import oracle


class Cancels(nn.Module):
    """The small difference of two large terms: float32 keeps three or four digits of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return (y + 300) ** 2 - y**2 - 90_000


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Cancels()


def expected(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": model(x)}


def test_a_difference_that_rounding_explains_is_let_through(model: nn.Module) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    exact, floor = oracle.rounding(expected, model, x)
    theirs = {"y": (exact["y"] * (1 + 2e-5)).float()}
    mine = {"y": (exact["y"] + 3 * floor["y"] * exact["y"].abs().max()).float()}
    oracle.agree_to_rounding(mine, theirs, expected, model, x)


def test_a_difference_beyond_rounding_is_not(model: nn.Module) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    theirs = expected(model, x)
    mine = {"y": theirs["y"] * (1 + 1e-3)}
    with pytest.raises(AssertionError, match="where rounding explains"):
        oracle.agree_to_rounding(mine, theirs, expected, model, x)


def test_the_model_is_as_before_afterwards(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    oracle.rounding(expected, model, torch.ones(1, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.inner._forward_hooks  # type: ignore[union-attr]
