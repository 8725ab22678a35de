"""The papers' toy experiments: pattern detection (ACDA §3.3, figure 6) and SAD (PAFU §3.2, figure 2), trained from scratch.

    python -m benchmarks.toys [--quick] [--only pattern sad] [--seeds N] [--fresh]

pattern: one 7×7 convolution against one ACDA layer, the same steps, mean squared error on the training image; *equivariance* is
the largest difference between the moved output and the output of the moved image, away from borders and relative to the output.
sad: PAFU with two 5×5 kernels against a plain, a residual and a kernel-predicting network of about as many parameters; mean
absolute error on unseen images; how far PAFU's two kernels are from a Dirac and from zero; its selection as a picture.
Writes benchmarks/results/toys.json (--quick: toys-quick.json); resumes if interrupted.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks._results import RESULTS, ROOT, Rows, table, write_json
from surgeon.layers.acda import ACDAConfig, ACDAConv2d
from surgeon.layers.pafu import PAFUConfig, PAFUConv2d
from surgeon.layers.sekg.operator import dconv
from surgeon.zoo.finetune import FinetuneConfig, finetune
from surgeon.zoo.tasks import create_task

PICTURE = ROOT / "docs" / "pictures" / "sad-selection.png"
STEPS = {"pattern": 4000, "sad": 6000}
QUICK_STEPS = {"pattern": 1500, "sad": 400}
SHIFT, MARGIN = 20, 8
RATE, NEW_RATE = 3e-3, 1.0  # everything is new
# A selector that learns as fast as the kernels takes one kernel everywhere before the other is worth anything, and stays with it.
SLOW_SELECTOR = {("sad", "pafu"): (1e-2, 0.1)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--steps", type=int, help="steps of every arm")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default: %(default)s")
    args = parser.parse_args(argv)
    name = "toys-quick" if args.quick else "toys"
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    for seed in range(args.seeds):
        for toy in args.only:
            steps = args.steps or (QUICK_STEPS if args.quick else STEPS)[toy]
            for arm in ARMS[toy]:
                if f"{toy}/{arm}/{seed}" not in rows:
                    rows.add(f"{toy}/{arm}/{seed}", run(toy, arm, seed, steps, args.picture))
    _print(rows.values())
    write_json(args.results / f"{name}.json", {"rows": rows.values()})
    return 0


def run(
    toy: str, arm: str, seed: int, steps: int, picture: Path, make: Callable[[], nn.Module] | None = None
) -> dict[str, Any]:
    """Train one network, that of the arm or what `make` makes, from scratch and look at it."""
    torch.manual_seed(seed)
    model = (make or ARMS[toy][arm])()
    task = (
        create_task("pattern-detection", seed=seed, shift=SHIFT) if toy == "pattern" else create_task("sad", seed=seed)
    )
    rate, new_rate = SLOW_SELECTOR.get((toy, arm), (RATE, NEW_RATE))
    config = FinetuneConfig(
        max_steps=steps,
        epochs=1e6,
        batch_size=1,
        opt="adam",
        lr=rate,
        weight_decay=0.0,
        new_lr_scale=new_rate,
        regularization=1.0,  # PAFU, equation 4
        temperature_end=1.0,
        recalibrate=0,
        eval_every="100%",
        keep="last",
        seed=seed,
    )
    started = time.perf_counter()
    trained = finetune(model, task, config).model.eval()
    facts: dict[str, Any] = {
        "toy": toy,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in trained.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    with torch.no_grad():
        if toy == "pattern":
            return facts | _pattern(trained, task)
        return facts | _sad(trained, task, picture if arm == "pafu" and seed == 0 else None)


# --- pattern detection ------------------------------------------------------------------------------------------------


def _pattern(model: nn.Module, task: Any) -> dict[str, Any]:
    still, moved = task.dataset("train")[0], task.dataset("val")[0]
    out, out_moved = model(still["input"][None]), model(moved["input"][None])
    inside = slice(SHIFT + MARGIN, -MARGIN)
    there = out.roll((SHIFT, SHIFT), (2, 3))[..., inside, inside]
    difference = (out_moved[..., inside, inside] - there).abs().max()
    return {
        "error": float((out - still["target"]).square().mean()),
        "error_moved": float((out_moved - moved["target"]).square().mean()),
        "equivariance": float(difference / out.abs().max()),
    }


def _one_conv() -> nn.Conv2d:
    return nn.Conv2d(1, 1, 7, padding=3)


def _one_acda() -> nn.Module:
    return ACDAConv2d.from_conv(_one_conv(), ACDAConfig(atoms=6, scales=3, hidden=64))


# --- SAD --------------------------------------------------------------------------------------------------------------


class Plain(nn.Sequential):
    """3×3 convolutions of `width` channels with ReLU between, five layers."""

    def __init__(self, width: int, outputs: int = 3, layers: int = 5) -> None:
        widths = [3, *[width] * (layers - 1), outputs]
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        super().__init__(*parts[:-1])


class Residual(Plain):
    """The same, its output added to the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Predicted(Plain):
    """Kernel prediction: a 5×5 filter for every pixel, shared by the colors."""

    def forward(self, x: Tensor) -> Tensor:
        kernels = super().forward(x)[:, None].expand(-1, 3, -1, -1, -1)
        return dconv(x, kernels.contiguous(), (5, 5), padding=(2, 2))


def _pafu() -> nn.Module:
    """From scratch: the selector's last convolution, which is zero where a trained convolution is replaced, is drawn at random."""
    config = PAFUConfig(group_size=2, hidden=44, selector_depth=3, perturbation=1.0, temperature=5.0)
    layer = PAFUConv2d.from_conv(nn.Conv2d(3, 3, 5, padding=2, bias=False), config)
    layer.selector.expand.reset_parameters()
    return layer


def _sad(model: nn.Module, task: Any, picture: Path | None) -> dict[str, Any]:
    samples = [task.dataset("val")[i] for i in range(20)]
    x, target = (torch.stack([sample[key] for sample in samples]) for key in ("input", "target"))
    out = model(x)
    facts: dict[str, Any] = {"error": float((out - target).abs().mean()), "identity": float((x - target).abs().mean())}
    if isinstance(model, PAFUConv2d):
        dirac = torch.zeros(3, 3, 5, 5)
        dirac[range(3), range(3), 2, 2] = 1
        wanted = (dirac, torch.zeros_like(dirac))
        kernels = (model.kernel, *model.further_kernels.view(1, 3, 5, 5, 3).permute(0, 1, 4, 2, 3))
        distances = [
            [float((k - w).norm() / dirac.norm()) for k, w in zip(p, wanted, strict=True)]
            for p in permutations(kernels)
        ]
        facts["from_dirac"], facts["from_zero"] = min(distances, key=sum)
        if picture is not None:
            _draw(x[0], target[0], out[0], model.selector(x[:1]).argmax(1), picture)
    return facts


def _draw(x: Tensor, target: Tensor, out: Tensor, mask: Tensor, path: Path) -> None:
    """Input, target, output and selection beside each other."""
    parts = [x, target, out.clamp(0, 1), mask.float().expand(3, -1, -1)]
    gap = torch.ones(3, x.shape[1], 4)
    row = torch.cat([piece for part in parts for piece in (part, gap)][:-1], 2)
    image = Image.fromarray((row.permute(1, 2, 0) * 255).round().byte().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path, optimize=True)


ARMS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "pattern": {"conv": _one_conv, "acda": _one_acda},
    "sad": {
        "pafu": _pafu,
        "plain": lambda: Plain(35),
        "residual": lambda: Residual(35),
        "predicted": lambda: Predicted(38, outputs=25, layers=4),
    },
}


def _print(rows: list[dict[str, Any]]) -> None:
    columns = (
        "toy",
        "arm",
        "seed",
        "steps",
        "parameters",
        "error",
        "error_moved",
        "equivariance",
        "from_dirac",
        "from_zero",
    )
    table((*columns, "seconds"), [[row.get(column) for column in (*columns, "seconds")] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
