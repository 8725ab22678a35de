"""Which networks export, their dynamic dimensions, and the file's error: every zoo entry, then timm and torchvision.

    python -m benchmarks.export_coverage [--only GLOB …] [--libraries zoo timm torchvision] [--format torch] [--report]
                                         [--retry [--free batch]]

Zoo entries unchanged; from the libraries, the smallest model of each family, all its spatial convolutions converted, the layer
type changing from family to family. Weights that start at or near zero (generators, the last norm of a block, layer scales) are
enlarged, and batch norms get statistics, so that a wrong dynamic part would show: `varies` is the output's relative change with it
switched off, and a network in which that is less than 1e-3, or that returns NaN, is "blind", not "ok". The file is
checked by `surgeon.export` (onnxruntime or torch.export.load against eager, two batch sizes and two image sizes where the model
allows). A network that amplifies float32 rounding so much that the check allowed an error above 1e-4 is "loose".
Each network runs in a separate process with a limit on time; `--retry --free batch` reruns those that exceeded it, with
only the batch dynamic. Resumes if interrupted. Writes
benchmarks/results/export_coverage.json and the table in docs/export.md (benchmarks.report).
"""

import argparse
import contextlib
import fnmatch
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import surgeon
from benchmarks._models import KINDS, Case, awaken, awaken_kernels, build, cases, settle_norms, tensors
from benchmarks._results import RESULTS, ROOT, Rows, only, table, write_json
from surgeon import zoo
from surgeon.errors import InputError, SurgeonError
from surgeon.exporting.export import TOLERANCE
from surgeon.layers.pafu import PAFUConv2d
from surgeon.layers.sekg.dconv import SEKG
from surgeon.sites.inputs import Inputs, map_tensors
from surgeon.sites.observe import observe
from surgeon.surgery.compare import compare
from surgeon.surgery.rewrite import dynamic_layers, static
from surgeon.surgery.running import run
from surgeon.util.copying import copy_model

LIBRARIES = ("zoo", "timm", "torchvision")
TYPES = ("acda", "pafu", "sekg")
NOTHING = 1e-3  # where the dynamic part changes less, it is not checked
STDS = (0.02, 0.005, 0.001, 0.0001)  # of the weights that make kernels, the largest that leaves rounding small
ROUNDING = 1e-5
IMAGES = 8  # on which that is measured
LARGE, SMALL = 256, 224  # pixels


@dataclass(frozen=True)
class Network:
    """A zoo entry, or a library's model whose spatial convolutions become `type`."""

    library: str
    name: str
    kind: str = ""
    family: str = ""
    type: str = ""

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"


def networks(libraries: Sequence[str]) -> list[Network]:
    """The zoo first; then the smallest model of each family, in the order of the coverage matrix."""
    found = [Network("zoo", name) for name in zoo.names()] if "zoo" in libraries else []
    families: dict[tuple[str, str], list[Case]] = {}
    for case in cases():
        if case.library in libraries:
            families.setdefault((case.library, case.family), []).append(case)
    for number, members in enumerate(families.values(), start=1):
        # The smallest; one for videos only where there is no other.
        case = min(members, key=lambda case: (KINDS.index(case.kind), _parameters(case)))
        found.append(Network(case.library, case.name, case.kind, case.family, TYPES[number % len(TYPES)]))
    return found


def _parameters(case: Case) -> int:
    """Of torchvision's models as its weights say; of timm's families the matrix has the smallest model first."""
    if case.library == "timm":
        return 0
    count: int = torchvision.models.get_model_weights(case.name).DEFAULT.meta["num_params"]
    return count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="networks by library/name, as 'zoo/adfnet*'")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx")
    parser.add_argument(
        "--free", choices=("auto", "batch"), default="auto", help="batch: do not ask for free image sizes"
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a network (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--report", action="store_true", help="only write the JSON from the rows there are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        network = Network(**json.loads(args.one))
        print(json.dumps(measure(network, args.format, args.free)), flush=True)
        return 0
    name = "export_coverage" if args.format == "onnx" else f"export_coverage-{args.format}"
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    chosen = networks(args.libraries)
    if args.only:
        chosen = [n for n in chosen if any(fnmatch.fnmatch(n.key, pattern) for pattern in args.only)]
    for network in tqdm([] if args.report else chosen, desc="export", unit="network", disable=None):
        if network.key not in rows or (args.retry and rows.rows[network.key]["status"] != "ok"):
            row, before = vars(network) | in_process(network, args), rows.rows.get(network.key, {})
            if args.free == "batch" and before.get("status") == "unknown" and "reason" not in row:
                row["reason"] = f"with free image sizes {before['reason']}"
            rows.add(network.key, row)
            write_json(
                args.results / f"{name}.json",
                {"format": args.format, "rows": [only(row, FIELDS) for row in rows.values()]},
            )
    write_json(
        args.results / f"{name}.json", {"format": args.format, "rows": [only(row, FIELDS) for row in rows.values()]}
    )
    table(HEADERS, [line(row) for row in rows.values()])
    return 0


FIELDS = (
    *(
        "key",
        "library",
        "name",
        "type",
        "status",
        "reason",
        "free",
        "fixed",
        "foreign",
        "rel_error",
        "varies",
        "seconds",
    ),
)
HEADERS = ("network", "layers became", "status", "free", "relative error", "varies", "seconds", "why")


def line(row: dict[str, Any]) -> list[Any]:
    """What the table says of a network."""
    reasons = [row["reason"]] if "reason" in row else []
    reasons += [why for why in dict.fromkeys(row.get("fixed", {}).values()) if why != "asked for"]
    if row.get("foreign"):
        reasons.append(f"needs {', '.join(row['foreign'])}")
    error, varies = (f"{row[key]:.0e}" if row.get(key) is not None else "-" for key in ("rel_error", "varies"))
    why = "; ".join(reasons)
    return [
        f"{row['library']}/{row['name']}",
        row["type"] or "-",
        row["status"],
        " ".join(row.get("free", [])),
        error,
        varies,
        f"{row['seconds']:.0f}" if "seconds" in row else "-",
        why,
    ]


def in_process(network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one network; a process that dies or takes too long gives one that says so."""
    command = [sys.executable, "-P", "-m", "benchmarks.export_coverage", "--format", args.format]
    command += ["--free", args.free, "--one", json.dumps(vars(network))]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=args.timeout,
        )
    except subprocess.TimeoutExpired:
        return {"status": "unknown", "reason": f"not done after {args.timeout:g} s"}
    lines = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode < 0:
        by = signal.Signals(-done.returncode).name
        return {
            "status": "crashed",
            "reason": f"killed by {by}" + (", as when memory runs out" if by == "SIGKILL" else ""),
        }
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        return {"status": "crashed", "reason": f"code {done.returncode}: {said}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(network: Network, form: str, free: str = "auto") -> dict[str, Any]:
    """Build, convert, export; in this process."""
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    try:
        model, inputs = _model(network)
        varies = _varies(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            made = surgeon.export(model, Path(folder) / "model", format=form, example_inputs=inputs.args, free=free)
    except SurgeonError as error:
        return {"status": "refused", "reason": str(error), "seconds": round(time.perf_counter() - started, 1)}
    error = max(check.max_rel for check in made.checks)
    blind, loose = varies is not None and not NOTHING < varies < math.inf, error > TOLERANCE  # infinite: it gives NaNs
    return {
        "status": "blind" if blind else "loose" if loose else "ok",
        "varies": varies,
        "seconds": round(time.perf_counter() - started, 1),
        "rel_error": error,
        "checks": len(made.checks),
        **{name: getattr(made, name) for name in ("free", "fixed", "foreign", "operators", "size")},
    }


def _model(network: Network) -> tuple[nn.Module, Inputs]:
    """Its dynamic parts vary as much as they can (at most STDS[0]) while float32's own rounding stays small."""
    torch.manual_seed(0)
    if network.library == "zoo":
        made = zoo.create(network.name).eval()
        inputs = observe(made, (), input_size=zoo.entry(network.name).input_size).inputs
    else:
        plain = build(Case(network.library, network.kind, network.family, network.name))
        inputs = _inputs(plain)
        made, _ = surgeon.convert(plain, layers="all", type=network.type, example_inputs=inputs.args, inplace=True)
    batches = _batches(inputs)
    for std in STDS:
        model = copy_model(made)
        _awaken(model, inputs, std)
        if _rounding(model, batches) <= ROUNDING:
            break
    return model, inputs


def _inputs(model: nn.Module) -> Inputs:
    """Of its own size, or where that is above LARGE of SMALL, if the model takes it: larger images make nothing but longer sums."""
    own = observe(model, ()).inputs
    images = _images(own)
    if images is not None and max(images.shape[2:]) > LARGE:
        with contextlib.suppress(InputError):
            return observe(model, (), input_size=(images.shape[1], SMALL, SMALL)).inputs
    return own


def _images(inputs: Inputs) -> Tensor | None:
    """The batch of images, where that is all that the model takes."""
    if inputs.kwargs or len(inputs.args) != 1 or not isinstance(inputs.args[0], Tensor) or inputs.args[0].dim() != 4:
        return None
    return inputs.args[0]


def _batches(inputs: Inputs) -> list[Inputs]:
    """These and as many random images as make IMAGES, where the model takes a batch of images: one in ten may be what explodes."""
    images = _images(inputs)
    if images is None:
        return [inputs]
    generator = torch.Generator().manual_seed(0)
    others = [torch.randn(images.shape, generator=generator) for _ in range(IMAGES // len(images) - 1)]
    return [inputs, *(Inputs(args=(images,)) for images in others)]


def _awaken(model: nn.Module, inputs: Inputs, std: float) -> None:
    torch.manual_seed(0)
    awaken_kernels(model, std)
    awaken(model)
    with torch.no_grad():
        for layer in dynamic_layers(model).values():
            if isinstance(layer, PAFUConv2d):  # it starts by preferring its first kernel
                layer.selector.set_static_output(torch.zeros(layer.config.group_size))
    settle_norms(model, lambda: model(*inputs.args))


def _rounding(model: nn.Module, batches: Sequence[Inputs]) -> float:
    """How far the model in float32 is from itself in float64, relative, up to the first batch where that is more than ROUNDING.

    0 where it does not run in float64, infinite with NaNs.
    """
    double, most = copy_model(model).double(), 0.0
    for inputs in batches:
        found = map_tensors(run(model, inputs), Tensor.double)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors(found)):
            return math.inf
        try:
            most = max(most, compare(run(double, inputs.to_dtype(torch.float64)), found).max_rel)
        except InputError:
            return most
        if most > ROUNDING:
            break
    return most


def _varies(model: nn.Module, inputs: Inputs) -> float | None:
    """The relative change of the output where the dynamic parts are switched off; None without dynamic layers."""
    generators = [name for name, module in model.named_modules() if isinstance(module, SEKG)]
    if not generators and not dynamic_layers(model):
        return None
    plain = copy_model(model)
    with torch.no_grad(), static(plain):
        for name in generators:
            plain.get_submodule(name).weight.zero_()
        return compare(run(model, inputs), run(plain, inputs)).max_rel


if __name__ == "__main__":
    sys.exit(main())
