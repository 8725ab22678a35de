"""ADFNet against itself on the unfold formulation: CPU time and peak memory of a forward pass, and of a training step.

    python -m benchmarks.adfnet [--network adfnet] [--size 128] [--repeats 9] [--threads 1] [--step]

Both run the same network with the same weights and input; only the dynamic filtering differs: surgeon's operators, or the
reference, which unfolds the input and multiplies and sums. Times are medians of interleaved runs in one process, peaks are from
separate processes, minus the memory held before. Also prints the largest difference of the outputs. Writes
benchmarks/results/adfnet.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._bench import in_subprocess, interleaved, peak_rss
from benchmarks._models import awaken_kernels
from benchmarks._results import RESULTS, table, write_json
from surgeon import zoo
from surgeon.layers.sekg.blocks import use_backend

BACKENDS = {"surgeon": None, "unfold": "reference"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="adfnet", metavar="NAME", help="of the zoo (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, metavar="N", help="side of the image (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--step", action="store_true", help="forward and backward instead of forward")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--peak-of", choices=list(BACKENDS), help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(json.dumps(peak(args)))
        return 0
    document = compare(args)
    headers = ("filtering", "CPU ms", "wall ms", "peak growth MB")
    table(headers, [[name, *document[name].values()] for name in BACKENDS])
    print(f"unfold / surgeon: CPU time {document['time_ratio']:.2f}, peak memory {document['memory_ratio']:.2f}")
    print(f"largest difference of the outputs: {document['difference']:.1e}")
    write_json(args.results / "adfnet.json", document)
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Times, peaks and ratios of both formulations."""
    nets = {name: network(args.network, backend) for name, backend in BACKENDS.items()}
    x = image(args)
    times = interleaved([lambda net=net: run(net, x, args.step) for net in nets.values()], args.repeats)
    with torch.no_grad():
        outputs = [net(x) for net in nets.values()]
    options = ["--network", args.network, "--size", str(args.size), "--threads", str(args.threads)]
    options += ["--step"] if args.step else []
    document: dict[str, Any] = {"network": args.network, "size": args.size, "step": args.step, "repeats": args.repeats}
    for name, (cpu, wall) in zip(BACKENDS, times, strict=True):
        grown = in_subprocess("benchmarks.adfnet", ["--peak-of", name, *options], args.threads)
        document[name] = {"cpu_ms": cpu, "wall_ms": wall, "peak_growth_mb": grown / 1e6}
    ours, unfold = document["surgeon"], document["unfold"]
    return document | {
        "time_ratio": unfold["cpu_ms"] / ours["cpu_ms"],
        "memory_ratio": unfold["peak_growth_mb"] / ours["peak_growth_mb"],
        "difference": float((outputs[0] - outputs[1]).abs().max()),
    }


def network(name: str, backend: str | None) -> nn.Module:
    """With generated kernels that are not zero, the same for every backend."""
    torch.manual_seed(0)
    net = zoo.create(name).eval()
    awaken_kernels(net, std=0.01)
    use_backend(net, backend)
    return net


def image(args: argparse.Namespace) -> Tensor:
    """One random image of the network's channels."""
    channels = zoo.entry(args.network).input_size[0]
    return torch.rand(1, channels, args.size, args.size, generator=torch.Generator().manual_seed(1))


def run(net: nn.Module, x: Tensor, step: bool) -> None:
    """A forward pass, with its backward pass if `step`."""
    if not step:
        with torch.no_grad():
            net(x)
        return
    net.zero_grad()
    net(x).square().mean().backward()


def peak(args: argparse.Namespace) -> int:
    """Bytes by which one pass on `args.peak_of` raises this process' peak memory."""
    net, x = network(args.network, BACKENDS[args.peak_of]), image(args)
    run(net, x[..., :16, :16], args.step)  # what is loaded and allocated once
    before = peak_rss()
    run(net, x, args.step)
    return peak_rss() - before


if __name__ == "__main__":
    sys.exit(main())
