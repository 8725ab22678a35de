"""`surgeon export`: one file that runs without surgeon. Imports torch when it runs."""

import argparse
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    add_seed,
    add_trust,
    add_weights,
    build,
    input_size,
    print_json,
    size,
    tell,
    whole,
)
from surgeon.errors import ConfigError
from surgeon.util.outputs import check_file_output, export_format

if TYPE_CHECKING:
    from surgeon.commands.common.console import Progress

DESCRIPTION = "write a model to one ONNX or torch.export file, verified against the model"
EXAMPLES = """  surgeon export runs/resnet50-acda -o model.onnx
  surgeon export runs/resnet50-acda --format torch -o model.pt2
  surgeon export zoo/adfnet --weights random --free size -o adfnet.onnx --json

The file is run at two batch sizes and three image sizes, if these are dynamic, and compared
with the model before it gets its name. ONNX models of more than 1.5 GiB have their weights in a
second file, FILE.data, which must stay next to it. Exit code 1: torch.export or ONNX refuses the
model, or the file is not equivalent; then nothing is written.
"""

_SLOW = 20.0  # seconds of tracing and writing after which a faster option is suggested


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon export`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("model", metavar="RUN|MODEL", help="a folder written by surgeon, or a model's name")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write (.onnx, .pt2)")
    parser.add_argument("--format", choices=("onnx", "torch"), help="default: by FILE's suffix")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--input-size", type=size, metavar="SIZE", help="224, 320x240 (HxW) or 3x224x224 (CxHxW)")
    parser.add_argument(
        "--free",
        choices=("auto", "size", "batch", "none"),
        default="auto",
        help="dynamic dimensions: batch and image size, batch, none (one image at a time), or as many as the model allows "
        "(default: auto)",
    )
    parser.add_argument("--opset", type=whole, metavar="N", help="ONNX opset (default: that of torch.onnx)")
    add_weights(parser)
    add_seed(parser, "for random weights")
    add_trust(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    path = Path(args.output)
    form = export_format(args.format, path)
    if form == "torch" and args.opset is not None:
        raise ConfigError("--opset applies to ONNX; a torch.export archive has none")
    if args.opset is not None and args.opset < 1:
        raise ConfigError(f"--opset must be at least 1, got {args.opset}")
    check_file_output(path, force=args.force)
    checks.model_of(args)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.commands.common.console import Progress, width
    from surgeon.exporting.export import check_target, export

    path = Path(args.output)
    form = export_format(args.format, path)
    check_target(path.absolute(), form, force=args.force)
    with Progress(enabled=not args.quiet) as bars, _Patience(args, bars) as progress:
        progress("load", 0, 1)
        model, base = build(args)
        result = export(
            model,
            path,
            format=form,
            input_size=input_size(args, base),
            free=args.free,
            opset=args.opset,
            force=args.force,
            progress=progress,
        )
    if args.json:
        print_json({"run": args.model, **result.to_dict()})
    else:
        print(f"{args.model}: {result.to_text(width())}", end="")
    return 0


class _Patience:
    """Passes progress on, and suggests a faster option once if dynamic sizes make an export slow."""

    def __init__(self, args: argparse.Namespace, progress: "Progress") -> None:
        hint = "free sizes are traced with symbols, which is slow here: --free none exports one size much faster"
        self.progress, self.asked = progress, args.free != "none"
        self.timer = threading.Timer(_SLOW, tell, (args, hint))
        self.timer.daemon = True

    def __enter__(self) -> "_Patience":
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage.startswith("trace") and self.asked:
            self.asked = False
            self.timer.start()
        elif stage.startswith(("read", "check")):
            self.timer.cancel()
        self.progress(stage, done, total)
