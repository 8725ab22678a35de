"""A PAFU network whose layers select one kernel each, folded back: outputs, FLOPs, parameters and time.

    python -m benchmarks.collapsed [--model NAME] [--group-size N] [--batch B …] [--repeats R]

Every spatial convolution of the network becomes PAFU with kernels that differ, and each layer's selector, which still sees its
input, gets weights with which one kernel (a different one in each layer) wins at every pixel. `surgeon.collapse` must prove that
from the parameters. The times are medians of interleaved forward passes, as fractions of the original's.
Writes benchmarks/results/collapsed.json. Exit code 1 if a unit is kept, the FLOPs are not the original's, or outputs differ.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model

import surgeon
from benchmarks._bench import interleaved
from benchmarks._results import RESULTS, table, write_json
from surgeon.costs import cost
from surgeon.layers.pafu import PAFUConv2d


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision name (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="kernels of a unit (default: %(default)s)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="B")
    parser.add_argument("--size", type=int, default=224, help="of the images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    original = get_model(args.model, weights=None).eval()
    converted, _ = surgeon.convert(
        original, layers="all", type="pafu", group_size=args.group_size, perturbation=1.0, input_size=(3, 64, 64)
    )
    units = [module for module in converted.modules() if isinstance(module, PAFUConv2d)]
    for number, unit in enumerate(units):
        settle(unit, 1 + number % (args.group_size - 1))
    folded, report = surgeon.collapse(converted, input_size=(3, 64, 64))
    networks = {"original": original, "converted": converted, "collapsed": folded}
    kept = [layer.name for layer in report.layers if not layer.folded]
    evidence = sorted({str(layer.evidence) for layer in report.layers})
    facts = {
        **{"model": args.model, "units": len(units), "kept": kept, "evidence": evidence, "size": args.size},
        "max_rel_error": report.max_rel_error,
    }
    rows = [
        {"network": name, **costs(network, args.size), **times}
        for (name, network), times in zip(
            networks.items(), timed(list(networks.values()), args.batch, args.size, args.repeats), strict=True
        )
    ]
    columns = list(rows[0])
    print(f"{args.model}: {len(units)} units, {len(units) - len(kept)} folded ({', '.join(evidence)})")
    print(f"outputs of collapsed and converted differ by at most {report.max_rel_error:.2g} (relative)")
    table(columns, [[row[column] for column in columns] for row in rows])
    write_json(args.results / "collapsed.json", facts | {"rows": rows})
    same = rows[0]["flops"] == rows[2]["flops"] and rows[0]["parameters"] == rows[2]["parameters"]
    return int(bool(kept) or not same or any(isinstance(m, PAFUConv2d) for m in folded.modules()))


@torch.no_grad()
def settle(unit: PAFUConv2d, kernel: int) -> None:
    """Let one kernel win whatever the input: its lead in the bias is larger than what the weights can take away."""
    expand = unit.selector.expand
    expand.weight.normal_(std=0.1)
    lead = torch.zeros(unit.config.group_size)
    lead[kernel] = 2.1 * expand.weight.abs().flatten(1).sum(1).max()
    unit.selector.static_output.copy_(lead)


def costs(network: nn.Module, size: int) -> dict[str, Any]:
    """Parameters, and FLOPs of one image (1 MAC = 2)."""
    found = cost(network, input_size=(3, size, size), batch_size=1, mode="infer")
    return {"parameters": sum(p.numel() for p in network.parameters()), "flops": found.flops}


def timed(networks: Sequence[nn.Module], batches: Sequence[int], size: int, repeats: int) -> list[dict[str, float]]:
    """For each network and batch size the median CPU time of a forward pass, in ms and as a part of the first network's."""
    found: list[dict[str, float]] = [{} for _ in networks]
    for batch in batches:
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            medians = interleaved([partial(network, x) for network in networks], repeats)
        for values, (cpu, _) in zip(found, medians, strict=True):
            values |= {f"ms, batch {batch}": round(cpu, 1), f"ratio, batch {batch}": round(cpu / medians[0][0], 3)}
    return found


if __name__ == "__main__":
    sys.exit(main())
