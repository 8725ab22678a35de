"""What copies of models and their runs share: seeding."""

import pytest
import torch

from surgeon.util.copying import seed_torch


def test_seeds_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator the CPU's generator alone is seeded, with one torch seeds them all."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    for there in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        seed_torch(3)
        assert torch.rand(4).equal(expected)
    asked: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", asked.append)
    seed_torch(4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    seed_torch(5)
    assert asked == [4]
