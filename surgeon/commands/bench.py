"""`surgeon bench`: throughput, latency and memory of a converted model and its original, interleaved."""

import argparse
from typing import Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import add_device, print_json, whole
from surgeon.commands.cost import add_step_arguments, build, original_of
from surgeon.errors import ConfigError
from surgeon.util.waiting import waiting

DESCRIPTION = "measure a converted model against its original: latency, throughput, memory"
EXAMPLES = """  surgeon bench runs/resnet50-acda --batch-size 8
  surgeon bench runs/resnet50-acda --batch-size 32 --train --amp --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon bench`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("run", metavar="RUN", help="a folder written by surgeon")
    add_step_arguments(parser)
    parser.add_argument(
        "--compare", metavar="ORIGINAL", help="the model to compare with (default: the run's base model)"
    )
    parser.add_argument("--train", action="store_true", help="training steps instead of inference")
    parser.add_argument("--rounds", type=whole, default=10, metavar="N", help="steps of each model (default: 10)")
    add_device(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.positives(args, ("rounds",))
    if args.device == "mps":
        raise ConfigError("--device must be cpu, cuda or cuda:N here, got 'mps'")
    checks.run_folder(args.run)
    if args.compare:
        checks.model(args.compare)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.costs.measure import NoDeviceError, has_device, interleaved
    from surgeon.costs.settings import make_settings
    from surgeon.models.names import size_of
    from surgeon.util.machine import take_gpu

    device = ("cuda" if has_device() else "cpu") if args.device in (None, "auto") else args.device
    if device != "cpu":
        if not has_device():
            raise NoDeviceError(f"--device {device}: this machine has no CUDA device")
        take_gpu(device)
        device = "cuda"
    converted = build(args.run, trust_factory=args.trust_factory)
    original = build(args.compare) if args.compare else original_of(args)
    step = {
        "input_size": args.input_size or size_of(args.run),
        "batch_size": args.batch_size,
        "mode": "train" if args.train else "infer",
        "optimizer": args.optimizer,
        "amp": args.amp or False,
        "channels_last": args.channels_last,
    }
    settings = make_settings(original, **step)
    with waiting("measuring", quiet=args.quiet):
        timings = interleaved([original, converted], settings, rounds=args.rounds, device=device)
    rows: list[dict[str, Any]] = []
    for name, model, timing in zip(("original", "converted"), (original, converted), timings, strict=True):
        memory, how = _memory(model, settings, step, device)
        rows.append(
            {
                "model": name,
                "latency_s": timing.median,
                "spread": timing.spread,
                "images_per_s": timing.throughput,
                "peak_bytes": memory,
                "memory": how,
            }
        )
    document = {
        "run": args.run,
        "device": _device_name(device),
        "mode": step["mode"],
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "models": rows,
        "time_ratio": rows[1]["latency_s"] / rows[0]["latency_s"],
        "memory_ratio": rows[1]["peak_bytes"] / rows[0]["peak_bytes"],
    }
    if args.json:
        print_json(document)
    else:
        print("\n".join(_lines(document)))
    return 0


def _memory(model: Any, settings: Any, step: dict[str, Any], device: str) -> tuple[int, str]:
    if device == "cuda":
        from surgeon.costs.measure import measure

        return measure(model, settings).peak_bytes, "measured"
    from surgeon.costs import cost

    return cost(model, **step).peak_bytes, "predicted for CUDA"


def _device_name(device: str) -> str:
    import torch

    from surgeon.util.tables import counted

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {counted(torch.get_num_threads(), 'thread')}"


def _lines(document: dict[str, Any]) -> list[str]:
    from surgeon.util.tables import table

    rows = [
        [
            row["model"],
            f"{row['latency_s'] * 1e3:,.2f}",
            f"{row['spread']:.0%}",
            f"{row['images_per_s']:,.1f}",
            f"{row['peak_bytes'] / 2**20:,.1f}",
        ]
        for row in document["models"]
    ]
    header = ["", "ms a step", "spread", "images/s", "peak MiB"]
    what = "training" if document["mode"] == "train" else "inference"
    return [
        f"{document['run']}: {what}, batch {document['batch_size']}, {document['device']}, {document['rounds']} rounds",
        "",
        table(header, rows),
        "",
        f"converted / original: time {document['time_ratio']:.2f}, memory {document['memory_ratio']:.2f} "
        f"(memory {document['models'][0]['memory']})",
    ]
