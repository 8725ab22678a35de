"""Arguments shared by several commands, and their value types. Nothing heavy is imported."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from surgeon.errors import ConfigError
from surgeon.util.declared import training_defaults
from surgeon.util.files import parse_json, told
from surgeon.util.parse import parse_input_size

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel

MOST = 2**31 - 1  # maximum of a count
_STDOUT: ContextVar[TextIO | None] = ContextVar("stdout", default=None)

_SAYS_NOTHING = {
    f"{verb}{noun}" for verb in ("make", "build", "create", "get") for noun in ("", "_model", "_net", "_network")
} | {"model", "net", "network", "factory"}


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, with the value parsed as JSON if possible, otherwise as a string; an argparse type."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, parse_json(value, key, ConfigError)
    except ConfigError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return key, value
        raise argparse.ArgumentTypeError(str(error)) from error


def whole(text: str) -> int:
    """An integer in the range of a count; an argparse type."""
    value = _integer(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"expected an integer, got {told(text)}")
    if abs(value) > MOST:
        raise argparse.ArgumentTypeError(f"expected at most {MOST:,}, got {told(text)}")
    return value


class Assignments(argparse.Action):
    """Collects KEY=VALUE pairs over all uses of an option; a repeated key is an error."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        pairs = [*getattr(namespace, self.dest), *values]
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise argparse.ArgumentError(self, f"{key} is given {keys.count(key)} times; give it once")
        setattr(namespace, self.dest, pairs)


def positive(text: str) -> int:
    """An integer of at least 1; an argparse type."""
    value = _integer(text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {told(text)}")
    return whole(text)


def seed(text: str) -> int:
    """A random seed of 63 bits; an argparse type."""
    value = _integer(text)
    if value is None or not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^63 - 1, got {told(text)}")
    return value


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[+-]?\d{1,30}\s*", text) else None


def size(text: str) -> tuple[int, ...]:
    """(H, W) or (C, H, W); an argparse type, the same for all commands."""
    try:
        values = parse_input_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"expected SIZE, HxW or CxHxW, got {told(text)}") from error
    return values * 2 if len(values) == 1 else values


def add_pairs(parser: Any, flag: str, help_: str, *, dest: str | None = None) -> None:
    """An option of KEY=VALUE pairs, empty if not given."""
    dest = dest or flag.lstrip("-").replace("-", "_")
    parser.add_argument(
        flag, dest=dest, type=assignment, nargs="+", action=Assignments, default=[], metavar="KEY=VALUE", help=help_
    )


def add_seed(parser: Any, of: str) -> None:
    """`--seed`; `of` says what it seeds."""
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=f"{of} (default: 0)")


def add_trust(parser: Any) -> None:
    """`--trust-factory`, of every command that loads a folder."""
    parser.add_argument(
        "--trust-factory", action="store_true", help="run the package.module:factory named by a folder's recipe"
    )


# --- groups of arguments ---------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, weights: str | None = None) -> None:
    """A model by name, for `build`; `weights` is the help on a default other than auto."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a timm name, torchvision/NAME, zoo/NAME, hf-hub:ID, a surgeon folder, a .pt2 file, or package.module:factory",
    )
    group = parser.add_argument_group("model")
    add_weights(group, weights)
    add_seed(group, "for random weights and the conversion")
    group.add_argument("--input-size", type=size, metavar="SIZE", help="224, 320x240 (HxW) or 3x224x224 (CxHxW)")
    add_trust(group)


def add_weights(group: Any, weights: str | None = None) -> None:
    """`--weights`, and the options of a model by its name; `weights` is the help on a default other than auto."""
    default, told_ = ("auto", "auto") if weights is None else (None, weights)
    help_ = f"weights of a MODEL by name (default: {told_})"
    group.add_argument("--weights", default=default, metavar="auto|pretrained|random|FILE", help=help_)
    add_model_options(group)


def add_model_options(group: Any) -> None:
    """`--num-classes` and `--model-args`, of a model by its name; `checks.model_of` refuses them for a folder."""
    group.add_argument("--num-classes", type=positive, metavar="N", help="classes of a MODEL's head, as in its weights")
    add_pairs(group, "--model-args", "additional options of a MODEL by name")


def amp(text: str) -> str:
    """A precision in fine-tuning's terms: no, fp16 or bf16; an argparse type, the same words for all commands."""
    known = {"no": "no", "fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected no, fp16 (float16) or bf16 (bfloat16), got {told(text)}")
    return known[text]


def amp_dtype(text: str) -> str | None:
    """A precision as a torch dtype name, None for no; an argparse type, the same words for all commands."""
    return {"no": None, "fp16": "float16", "bf16": "bfloat16"}[amp(text)]


def device(text: str) -> str:
    """auto, cpu, cuda, cuda:N or mps; an argparse type, the same for all commands."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:N or mps, got {told(text)}")
    return text


def add_amp(parser: Any, kind: Callable[[str], str | None] = amp_dtype) -> None:
    """`--amp`, alone or with a precision; None if not given."""
    const = kind("fp16")
    help_ = "automatic mixed precision: fp16 (--amp alone), bf16 or no"
    parser.add_argument("--amp", type=kind, nargs="?", const=const, metavar="fp16|bf16|no", help=help_)


def add_device(parser: Any) -> None:
    """`--device`."""
    parser.add_argument(
        "--device", type=device, metavar="auto|cpu|cuda[:N]|mps", help="default: auto, a GPU if there is one"
    )


def natural(text: str) -> int:
    """An integer of at least 0; an argparse type."""
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {told(text)}")
    return value


def _number(text: str) -> float:
    """A finite number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def above_zero(text: str, such: str = "") -> float:
    """A finite number above 0; an argparse type. `such` is an example for the message."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0{such}, got {told(text)}")
    return value


def rate(text: str) -> float:
    """A learning rate; an argparse type."""
    return above_zero(text, ", such as 3e-4")


def one_rate(text: str) -> float:
    """One of several learning rates; an argparse type."""
    return above_zero(text, ", such as 3e-4" + ", or several with blanks between them" * ("," in text))


def not_negative(text: str) -> float:
    """A finite number of at least 0; an argparse type."""
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {told(text)}")
    return value


def share(text: str) -> float:
    """A number from 0 to less than 1; an argparse type."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to less than 1, such as 0.02, got {told(text)}")
    return value


def decay(text: str) -> float:
    """A number between 0 and 1, without both; an argparse type."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, such as 0.999, got {told(text)}")
    return value


def add_batch_size(parser: Any, told: str, default: int | None = None) -> None:
    """`--batch-size`."""
    parser.add_argument("--batch-size", type=positive, default=default, metavar="N", help=told)


def add_workers(parser: Any) -> None:
    """`--workers`."""
    parser.add_argument("--workers", type=natural, default=0, metavar="N", help="data-loading processes (default: 0)")


def with_default(flag: str, told: str) -> str:
    """The help of an option with the config's default, unless that is to do nothing, or is already in it."""
    value = training_defaults().get(flag.lstrip("-").replace("-", "_"))
    if value in (None, False, 0, "0") or "(default: " in told:
        return told
    shown = "on" if value is True else f"{value:g}" if isinstance(value, float) else value
    return f"{told} (default: {shown})".replace("%", "%%")


def add_lr(parser: Any, told: str = "peak learning rate", *, nargs: str | None = None) -> None:
    """`--lr`, left to the config if not given."""
    parser.add_argument("--lr", type=rate if nargs is None else one_rate, nargs=nargs, metavar="X", help=told)


def add_run(parser: argparse.ArgumentParser) -> None:
    """A folder written by surgeon."""
    parser.add_argument("run", metavar="RUN", help="a folder written by surgeon, or hf-hub:ORG/NAME")
    add_trust(parser)


def add_output(parser: Any, *, required: bool, help_: str) -> None:
    """An output folder."""
    parser.add_argument("-o", "--output", required=required, metavar="OUT", help=help_)
    parser.add_argument("--force", action="store_true", help="replace OUT if surgeon wrote it")


# --- evaluating them ----------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, head: Literal["own", "weights"] = "own") -> "tuple[nn.Module, BaseModel | None]":
    """The model of the arguments, and its base model, if known; `head` is as in `build_model`."""
    from surgeon.models.names import build_model

    model, base = build_model(
        args.model,
        weights=args.weights,
        seed=getattr(args, "seed", 0),
        num_classes=args.num_classes,
        input_size=getattr(args, "input_size", None),
        options=dict(args.model_args),
        trust_factory=args.trust_factory,
        head=head,
    )
    tell_weights(args, base)
    return model, base


def tell_weights(args: argparse.Namespace, base: "BaseModel | None") -> None:
    """Say on stderr that the weights are the factory's own, which may be random, if no others were asked for."""
    if args.weights == "auto" and base is not None and base.source == "factory" and base.name == args.model:
        tell(args, f"the weights are as {base.name} makes them; --weights FILE loads a state dict")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a model by its name, for records."""
    return dict(args.model_args) | ({} if args.num_classes is None else {"num_classes": args.num_classes})


def building(args: argparse.Namespace) -> str:
    """The message while the model is built; it names published weights, which may have to be downloaded."""
    own = ":" in args.model or args.model.startswith("zoo/") or Path(args.model).exists()
    published = args.weights in ("auto", "pretrained") and not own
    return f"building {args.model}{' with its published weights (--weights random: without)' if published else ''}"


def weights_for_shapes(spec: str, given: str | None = None) -> str:
    """As given, otherwise `shapes`: where only these matter, nothing is downloaded. Folders and programs have their own."""
    if given is not None:
        return given
    from surgeon.models.hub import folder_if_any
    from surgeon.models.programs import is_program
    from surgeon.util.outputs import is_surgeon_folder

    return "auto" if is_surgeon_folder(folder_if_any(spec)) or is_program(spec) else "shapes"


def model_name(spec: str) -> str:
    """The last part of a model's name, for naming folders; the module's if a factory's own says nothing (`mynet:make`)."""
    module, _, name = spec.rstrip("/").rpartition("/")[2].rpartition(":")
    return module.rpartition(".")[2] if module and name in _SAYS_NOTHING else name


def input_size(args: argparse.Namespace, base: "BaseModel | None") -> tuple[int, ...] | None:
    """As given, or the model's own; None if neither is known."""
    given: tuple[int, ...] | None = args.input_size
    return given or (base.input_size or None if base is not None else None)


def tell(args: argparse.Namespace, text: str) -> None:
    """Print a line on stderr, unless --quiet."""
    if not args.quiet:
        print(f"surgeon: {text}", file=sys.stderr, flush=True)


@contextmanager
def one_document() -> Iterator[None]:
    """Redirect libraries' prints to stderr: stdout contains only what `print_json` prints."""
    before = _STDOUT.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _STDOUT.reset(before)


def print_json(values: Any) -> None:
    """Print the single document of --json."""
    print(json.dumps(values, indent=2), file=_STDOUT.get(), flush=True)
