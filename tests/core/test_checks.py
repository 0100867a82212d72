"""What is wrong is said when the optimizer is built, and the model stays as it was."""

from typing import Any

import pytest
from torch import nn, optim

from chunkft import ChunkedOptimizer
from chunkft.errors import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": 2.5}, r"chunks=2\.5 must be a whole number"),
        ({"chunks": True}, "chunks=True must be a whole number"),
        ({"interval": "4"}, "interval='4' must be a whole number"),
        ({"chunks": 0}, "chunks=0"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"moments": "forget"}, "moments='forget' is not one of"),
        ({"master": "bf16"}, "master='bf16' is not one of"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be above 0"),
        ({"optimizer_class": "adamw"}, "optimizer_class='adamw' needs a class"),
        ({"optimizer_class": optim.LBFGS}, "LBFGS"),
    ],
)
def test_a_setting_out_of_its_range(settings: dict[str, Any], message: str) -> None:
    model = nn.Linear(4, 4)
    kind = settings.pop("optimizer_class", optim.AdamW)
    with pytest.raises(InputError, match=message):
        ChunkedOptimizer(model, kind, lr=0.1, **{"chunks": 2, **settings})
    assert all(p.requires_grad for p in model.parameters())
    ChunkedOptimizer(model, optim.AdamW, lr=0.1, chunks=2)


def test_parameters_in_place_of_the_model() -> None:
    with pytest.raises(InputError, match="pass the model itself"):
        ChunkedOptimizer(nn.Linear(4, 4).parameters(), optim.AdamW, lr=0.1, chunks=2)
