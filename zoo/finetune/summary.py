"""Summary of a run: the original, the starting network, and the fine-tuned one, side by side."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from surgeon.costs import cost
from surgeon.errors import SurgeonError
from surgeon.util.tables import count, counted, paragraph, table
from surgeon.zoo.finetune.state import finite


@dataclass(frozen=True, kw_only=True)
class MeasuredNetwork:
    """One network on the task. FLOPs per input of the training size (1 MAC = 2 FLOPs), seconds for one evaluation."""

    metrics: dict[str, float]
    parameters: int
    flops: float | None
    seconds: float


@dataclass(kw_only=True)
class Summary:
    """Text and JSON summary of a run."""

    task: str
    primary: str
    higher_is_better: bool
    original: MeasuredNetwork | None
    start: MeasuredNetwork
    result: MeasuredNetwork
    steps: int
    epochs: float
    stopped: str  # "steps", "time" or "patience"
    kept_step: int  # of the kept weights
    recalibrated: bool  # whether the BatchNorm statistics measured at the end are the ones kept
    rollbacks: int
    seconds: float  # of training
    groups: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    input_size: list[int] = field(default_factory=list)  # (C, H, W), of which the FLOPs are
    images: str | None = None  # how the inputs were made of them
    train_samples: int | None = None
    val_samples: int | None = None
    earlier_steps: int = 0  # of the weights that it started from
    keep: str = "last"  # "best": the kept step was chosen on the samples that judge

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; NaN and infinity become null."""
        values: dict[str, Any] = finite(asdict(self))
        return values

    def to_json(self) -> str:
        """The text of summary.json."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_text(self, width: int = 80) -> str:
        """A table and a few lines."""
        rows = []
        names = [self.primary, *(name for name in self.start.metrics if name != self.primary)]
        for label, found in (("original", self.original), ("at the start", self.start), ("fine-tuned", self.result)):
            if found is not None:
                metrics = [f"{found.metrics[name]:.5g}" for name in names]
                flops = "-" if found.flops is None else count(round(found.flops))
                rows.append((label, *metrics, count(found.parameters), flops))
        arrow = "higher" if self.higher_is_better else "lower"
        why = {"steps": "all steps done", "time": "out of time", "patience": "no better for too long"}[self.stopped]
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        of = "" if self.train_samples is None else f" of {counted(self.train_samples, 'sample')}"
        chosen = ", which also choose the step" if self.keep == "best" else ""
        on = "" if self.val_samples is None else f", on {counted(self.val_samples, 'sample')}{chosen}"
        kept = f"kept: the weights of {self._kept()} ({self.primary}: {arrow} is better{on})"
        lines = [
            f"{self.task}: {steps}, {self.epochs:.2f} epochs{of}, {self.seconds:.1f} s of training ({why})",
            paragraph(kept, width=width, hang="  "),
        ]
        if self.images is not None:
            lines.append(paragraph(f"images: {self.images}", width=width, hang="  "))
        if self.recalibrated:
            lines.append("BatchNorm statistics were recalibrated at the end")
        if self.rollbacks:
            lines.append(f"rolled back {self.rollbacks} times after NaN or infinity; see training/log.jsonl")
        lines += [paragraph(f"note: {note}", width=width, hang="  ") for note in [*self.notes, *self._worse()]]
        if self.input_size and self.result.flops is not None:
            lines.append(f"FLOPs are those of one input of {'x'.join(map(str, self.input_size))}")
        header = ("", *names, "params", "FLOPs")
        return "\n".join([table(header, rows, width=width), "", *lines]) + "\n"

    def _kept(self) -> str:
        start = self.steps and not self.kept_step
        return f"step {self.kept_step}" + (", the start; no later ones are better" if start else "")

    def _worse(self) -> list[str]:
        """A note if the training made the network worse."""
        before, after = (found.metrics[self.primary] for found in (self.start, self.result))
        if not (after < before if self.higher_is_better else after > before):
            return []
        return [
            f"worse than at the start ({self.primary} {after:.5g}, was {before:.5g}): longer training, or a smaller --lr"
        ]


def measured(
    model: nn.Module, metrics: dict[str, float], seconds: float, input_size: tuple[int, ...]
) -> MeasuredNetwork:
    """Metrics, and the network's cost."""
    return MeasuredNetwork(
        metrics=metrics,
        parameters=sum(p.numel() for p in model.parameters()),
        flops=_flops(model, input_size),
        seconds=seconds,
    )


def _flops(model: nn.Module, input_size: tuple[int, ...]) -> float | None:
    """FLOPs of one input, None if the model cannot be traced with one image tensor."""
    if len(input_size) != 3:
        return None
    try:
        return float(cost(model, input_size=input_size, mode="infer").flops)
    except SurgeonError:
        return None
