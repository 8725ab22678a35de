"""Predicted against measured peak memory: 20 models, original and converted, training in float32 and AMP, and inference.

    python -m benchmarks.memory_accuracy [--models resnet50 …] [--batch-sizes 8 32] [--kinds train …] [--original-only]

With a CUDA device the real step is run and CUDA's own count is the measure. Without one the measure is an independent count:
torch's MemTracker over fake CPU tensors; the first line and the JSON say which it was. For AMP that runs under the CPU's autocast,
with layer and group norms and interpolation in float32 as under CUDA's.
Prints a row per case and the errors' median and worst, writes benchmarks/results/memory_accuracy.json. A killed run resumes
(--fresh: starts over).
"""

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from benchmarks._results import RESULTS, Rows, only, table, write_json
from surgeon.costs import Option, cost
from surgeon.costs.build import resolved_config
from surgeon.costs.measure import has_device, measure
from surgeon.costs.settings import make_settings
from surgeon.layers.base import LayerConfig
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.registry import layer_class, layer_types
from surgeon.sites.sites import find_sites

MODELS = (
    *(
        "resnet18",
        "resnet50",
        "resnet101",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "seresnet50",
        "densenet121",
        "vgg16_bn",
    ),
    *(
        "convnext_atto",
        "convnext_tiny",
        "efficientnet_b0",
        "tf_efficientnetv2_b0",
        "mobilenetv2_100",
        "mobilenetv3_large_100",
    ),
    *("regnety_016", "res2net50_26w_4s", "ghostnet_100", "hrnet_w18_small", "repvgg_a0", "resnetv2_50x1_bit"),
)
KINDS = {"train": {"mode": "train"}, "train-amp": {"mode": "train", "amp": True}, "infer": {"mode": "infer"}}
Placement = dict[str, tuple[ConvGeometry, str, LayerConfig]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32], metavar="N")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--original-only", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    how = "CUDA" if has_device() else "MemTracker on fake CPU tensors"
    print(f"measured by: {how}")
    rows = Rows(args.results / f"memory_accuracy_{'cuda' if has_device() else 'fake'}.jsonl", fresh=args.fresh)
    for name in args.models:
        placements: list[Placement] = [{}] if args.original_only else [{}, _placement(name)]
        for key, case in _cases(name, placements, args.batch_sizes, args.kinds):
            if key not in rows.rows:
                rows.add(key, _row(name, **case))
                row = rows.rows[key]
                print(
                    f"{key:55s} {row['predicted'] / 2**20:9.1f} {row['measured'] / 2**20:9.1f} MiB {row['error']:+.2%}"
                )
    _summary(list(rows.rows.values()), how, args.results)
    return 0


def _cases(
    name: str, placements: list[Placement], batches: Sequence[int], kinds: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for placement in placements:
        what = "converted" if placement else "original"
        for batch in batches:
            for kind in kinds:
                yield f"{name} {what} {kind} {batch}", {"placement": placement, "batch": batch, "kind": kind}


def _placement(name: str) -> Placement:
    """Every second spatial convolution, the layer types in turn."""
    sites = [
        s for s in find_sites(timm.create_model(name)).convs if not s.is_pointwise and not s.reasons and s.geometry
    ]
    result: Placement = {}
    types = layer_types()
    for i, site in enumerate(sites[1::2]):
        kind = types[i % len(types)]
        assert site.geometry is not None
        if not layer_class(kind).why_not(site.geometry, layer_class(kind).Config()):
            result[site.name] = (site.geometry, kind, resolved_config(site.geometry, Option(kind, {})))
    return result


def _build(name: str, placement: Placement) -> nn.Module:
    model: nn.Module = timm.create_model(name)
    for site, (geometry, kind, config) in placement.items():
        model.set_submodule(site, layer_class(kind)(geometry, config))
    return model


def _row(name: str, placement: Placement, batch: int, kind: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = _build(name, placement)
    options: dict[str, Any] = dict(KINDS[kind])
    predicted = cost(model, batch_size=batch, **options)
    if has_device():
        real = _build(name, placement)
        settings = make_settings(real, input_size=None, batch_size=batch, **({"amp": False} | KINDS[kind]))
        measured = measure(real, settings).peak_bytes
    else:
        measured = _tracked(name, placement, batch, KINDS[kind], predicted.input_size)
    return {
        "model": name,
        "converted": len(placement),
        "batch": batch,
        "kind": kind,
        "predicted": predicted.peak_bytes,
        "total": predicted.total_bytes,
        "measured": measured,
        "error": predicted.peak_bytes / measured - 1,
        "estimated": predicted.estimated,
    }


class _LikeCuda(TorchFunctionMode):
    """Layer and group norms and interpolation in float32, as CUDA's autocast has them and the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, F.group_norm, F.interpolate, torch.layer_norm, torch.group_norm):
            args, kwargs = tree_map_only(Tensor, lambda t: t.float(), (args, kwargs))
        return func(*args, **kwargs)


def _tracked(name: str, placement: Placement, batch: int, kind: dict[str, Any], size: tuple[int, ...]) -> int:
    real = _build(name, placement)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(real)
    with mode:
        return tracked(model, torch.randn(batch, *size), train=kind["mode"] == "train", amp=bool(kind.get("amp")))


def tracked(model: nn.Module, x: Tensor, *, train: bool, amp: bool = False) -> int:
    """Peak of two training steps, or of one inference, by torch's MemTracker, bytes; model and input are fake tensors."""
    model.train(train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, x)
    with tracker:
        for _ in range(2 if train else 1):
            like_cuda = _LikeCuda() if amp else nullcontext()
            with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=amp), like_cuda:
                out = model(x)
                loss = F.cross_entropy(out, torch.zeros(len(x), dtype=torch.long)) if train else None
                del out
            if loss is not None:
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
            tracker.reset_mod_stats()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def _summary(rows: list[dict[str, Any]], how: str, results: Path) -> None:
    lines = []
    for kind in KINDS:
        for converted in (False, True):
            errors = [abs(row["error"]) for row in rows if row["kind"] == kind and bool(row["converted"]) == converted]
            if errors:
                what = "converted" if converted else "original"
                lines.append((f"{kind}, {what}", len(errors), f"{statistics.median(errors):.2%}", f"{max(errors):.2%}"))
    print()
    table(("case", "models x batches", "median error", "worst"), lines)
    told = [only(row, ("key", "kind", "converted", "error")) for row in rows]
    write_json(results / "memory_accuracy.json", {"measured_by": how, "rows": told})
    print(f"written: {results / 'memory_accuracy.json'}")


if __name__ == "__main__":
    sys.exit(main())
