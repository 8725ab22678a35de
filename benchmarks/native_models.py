"""What the compiled operators bring to whole layers, generator included, and to networks: forward, against torch's operators.

    python -m benchmarks.native_models [--repeats N] [--size N]

Layers: a 3×3 convolution on the shapes A to D of benchmarks.operators, converted. Networks: torchvision's ResNet-50 with ACDA in
stages 3 and 4 on 224×224, ADFNet on 128×128, one image. Both ways run the same modules, in turns, in eval mode without
gradients, on one thread; times are medians of process CPU time. Writes benchmarks/results/native_models.json.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

import surgeon
from benchmarks._bench import interleaved
from benchmarks._models import awaken_kernels
from benchmarks._operator_cases import SHAPES
from benchmarks._results import RESULTS, table, write_json
from surgeon import zoo
from surgeon.layers.ops.dispatch import ENVIRONMENT

BACKENDS = ("native", "torch")
TYPES = ("acda", "pafu", "sekg")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--size", type=int, default=224, metavar="N", help="of ResNet-50's image (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for what, build in cases(args.size):
        original, converted, x = build()
        rows.append({"what": what, "images": len(x), **compare(original, converted, x, args.repeats)})
    table(*lines(rows))
    write_json(args.results / "native_models.json", {"rows": rows})
    return 0


Built = tuple[nn.Module | None, nn.Module, Tensor]


def cases(size: int) -> Iterator[tuple[str, Callable[[], Built]]]:
    """Names, and functions that make original, converted and input."""
    for type_name in TYPES:
        for shape in SHAPES:
            yield f"{type_name} {shape}", lambda t=type_name, s=shape: layer(t, s)
    yield "resnet50, acda in stages 3 and 4", lambda: resnet(size)
    yield "adfnet 128", adfnet


def layer(type_name: str, shape: str) -> Built:
    images, channels, side = SHAPES[shape]
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False)).eval()
    x = torch.randn(images, channels, side, side)
    return model, surgeon.convert(model, type_name, layers="0", example_inputs=x[:1])[0], x


def resnet(size: int) -> Built:
    model, x = resnet50().eval(), torch.randn(1, 3, size, size)
    return model, surgeon.convert(model, "acda", layers="stage3,stage4", example_inputs=x)[0].eval(), x


def adfnet() -> Built:
    net = zoo.create("adfnet").eval()
    awaken_kernels(net, std=0.01)
    return None, net, torch.rand(1, zoo.entry("adfnet").input_size[0], 128, 128)


def compare(original: nn.Module | None, converted: nn.Module, x: Tensor, repeats: int) -> dict[str, Any]:
    """CPU ms of the original (if there is one) and of the converted model by backend; the largest difference of the outputs."""

    def forward(model: nn.Module, backend: str | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                y: Tensor = model(x)
            return y

        return run if backend is None else lambda: chosen(backend, run)

    runs = {backend: forward(converted, backend) for backend in BACKENDS}
    outputs = [run() for run in runs.values()]
    if original is not None:
        runs["original"] = forward(original, None)
    times = interleaved(list(runs.values()), repeats)
    difference = float((outputs[0] - outputs[1]).abs().max())
    return {name: cpu for name, (cpu, _) in zip(runs, times, strict=True)} | {"difference": difference}


def chosen(backend: str, run: Callable[[], Tensor]) -> Tensor:
    """Run with `SURGEON_BACKEND` set, unless native is to be chosen: it is, by itself, wherever it can run."""
    before = os.environ.pop(ENVIRONMENT, None)
    if backend != "native":
        os.environ[ENVIRONMENT] = backend
    try:
        return run()
    finally:
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def lines(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows."""
    headers = [
        "forward",
        "native, ms",
        "torch, ms",
        "torch / native",
        "native, images/s",
        "torch, images/s",
        "native / original",
    ]
    cells = []
    for row in rows:
        original = f"{row['native'] / row['original']:.2f}" if "original" in row else ""
        rates = [f"{1e3 * row['images'] / row[backend]:.3g}" for backend in BACKENDS]
        times = [f"{row[backend]:.3g}" for backend in BACKENDS]
        cells.append([row["what"], *times, f"{row['torch'] / row['native']:.2f}", *rates, original])
    return headers, cells


if __name__ == "__main__":
    sys.exit(main())
