"""Activations equal the reference's, and none of them is missing."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from img2parquet.errors import CheckpointError
from img2parquet.models.kernels.activations import ACTIVATIONS, activation
from tests.models import oracle


@pytest.mark.parametrize("name", sorted(ACT2FN.keys() & ACTIVATIONS.keys()))
def test_activations_are_the_reference_s(name: str) -> None:
    x = 4 * torch.randn((3, 50), generator=torch.Generator().manual_seed(0))
    oracle.agree({name: activation(name)(x)}, {name: ACT2FN[name](x)}, 1e-6)


def test_no_activation_of_the_reference_is_forgotten() -> None:
    assert ACT2FN.keys() - ACTIVATIONS.keys() == {"prelu", "xielu"}  # these have trained parameters
    with pytest.raises(CheckpointError, match="trained parameters"):
        activation("prelu")
