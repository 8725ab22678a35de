"""What a report says of errors is what was compared."""

import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import VerificationError
from surgeon.surgery.compare import Difference
from surgeon.surgery.verify import Settled, judge

FINE = Difference(max_abs=0.0, max_rel=0.0, compared=1)
NOTHING = Difference(max_abs=0.0, max_rel=0.0)


def _never() -> Settled:
    raise AssertionError("nothing is to be settled")


def test_exact_is_never_said_without_a_comparison() -> None:
    """C: every checked conversion passes here, so that none of the suite, or of anybody, is exact by having compared nothing."""
    for layers in ({}, {"a": FINE, "b": NOTHING}):
        with pytest.raises(VerificationError, match="nothing could be compared"):
            judge(NOTHING, layers, torch.float32, _never)
    assert judge(FINE, {}, torch.float32, _never).exact
    assert judge(NOTHING, {"a": FINE}, torch.float32, _never).exact


class Branch(nn.Module):
    """A residual branch that fresh weights multiply by zero, as zero-initialized networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.conv(x)


def test_the_line_of_errors_begins_with_the_layers_where_outputs_are_equal() -> None:
    """N5: outputs that no layer's error reaches say nothing; the line begins with the layers."""
    _, report = surgeon.convert(Branch(), layers="conv", type="acda", example_inputs=torch.randn(2, 3, 8, 8))
    (line,) = [line for line in report.to_text().splitlines() if line.startswith("error ")]
    assert "worst layer" in line
    assert line.endswith("the outputs do not show it (0)")
