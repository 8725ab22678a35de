"""`surgeon evaluate`: a model's metrics on a task, compared with its original's. Imports torch when it runs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    add_amp,
    add_batch_size,
    add_device,
    add_seed,
    add_trust,
    add_weights,
    add_workers,
    build,
    building,
    positive,
    print_json,
)
from surgeon.commands.common.originals import named_original
from surgeon.commands.common.tasks import add_task, make_task, settle
from surgeon.errors import ConfigError, ModelError, SurgeonError
from surgeon.records.training import original_folder, trainings, unequal_training
from surgeon.util.few import few_judge
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel, Recipe
    from surgeon.visualize.adaptivity import Adaptivity
    from surgeon.zoo.tasks import Task

NEEDS = ("torch", "timm", "torchmetrics")  # libraries
DESCRIPTION = "metrics of a model on a task, compared with its original's"
EXAMPLES = """  surgeon evaluate runs/resnet50-acda --task classification --data imagenet/
  surgeon evaluate runs/dncnn-sekg --task denoising --data photos/ --task-option sigma=25
  surgeon evaluate resnet50 --task classification --data imagenet/ --original none --limit 500
  surgeon evaluate runs/mine --task classification --data cifar/ --original zoo/resnet20_cifar \\
      --original-weights resnet20.pth
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon evaluate`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("model", metavar="RUN|MODEL", help="a folder written by surgeon, or a model's name")
    group = parser.add_argument_group("task")
    add_task(group)
    group.add_argument("--split", choices=("val", "train"), default="val", help="default: val")
    group.add_argument("--limit", type=positive, metavar="N", help="only N samples, spread evenly over the split")
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--original",
        default="auto",
        metavar="auto|none|MODEL",
        help="auto: the base model of a run, with the weights it was converted with (default)",
    )
    group.add_argument("--original-weights", metavar="FILE", help="its weights, if they cannot be found")
    group = parser.add_argument_group("execution")
    add_weights(group)
    add_seed(group, "for the task and random weights")
    add_batch_size(group, "samples per batch (default: 32)", 32)
    add_amp(group)
    add_device(group)
    add_workers(group)
    add_trust(group)


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded; settles the task."""
    checks.model_of(args)
    named = args.original not in ("auto", "none")
    if named:
        checks.model(args.original)
    checks.other_weights(args.original_weights, "--original-weights", named=named)
    args.given_options = [name for name, _ in args.task_options]
    settle(args)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.commands.common.console import Progress, width
    from surgeon.records.report import jsonable
    from surgeon.zoo.tasks.data.judged import judged

    task = _task(args)
    notes: list[str] = []
    with waiting(building(args), quiet=args.quiet):
        model, recipe, base = _model(args)
        original, name, beside = _original(args, recipe, notes)
    if original is not None and (told := unequal_training(args.model, recipe, name, beside)) is not None:
        notes.append(told)
    if args.split == "val":
        past = [(args.model, record) for record in trainings(args.model, recipe)]
        if original is not None:
            past += [(name, record) for record in trainings(name, beside)]
        task, images = judged(task, args.given_options, past)
        for note in images:  # also with --quiet: it says what the metrics are of
            print(f"surgeon: {note}", file=sys.stderr, flush=True)
        notes += images
    with waiting("looking through the data", quiet=args.quiet):
        task.check()
    device = _default_device() if args.device in (None, "auto") else args.device
    with Progress(enabled=not args.quiet) as progress:
        found = _measure(model, args.model, task, args, device, progress, notes)
        notes += [] if (unknown := task.unknown_images(model, base)) is None else [unknown]
        compared = None
        if original is not None:
            measured = _measure(original, name, task, args, device, progress, notes, original=True)
            compared = {"model": name, **measured}
    notes += [] if (same := _one_filter(found["layers"])) is None else [same]
    samples = len(task.dataset(args.split))
    if (few := few_judge(samples, "the metrics say little of other images")) is not None:
        notes.append(few)
    document = {
        "model": args.model,
        "task": task.name,
        "split": args.split,
        "samples": samples,
        "device": device,
        "amp": args.amp,
        "multiple": task.multiple,
        "primary": task.primary,
        "higher_is_better": task.higher_is_better,
        **found,
        "original": compared,
        "original_missing": original is None and args.original == "auto",
        "notes": notes,
    }
    if args.json:
        print_json(jsonable(document))
    else:
        print(text(document, width()))
    return 0


def _task(args: argparse.Namespace) -> "Task":
    limit = {} if args.limit is None else {f"{args.split}_limit": args.limit}
    try:
        return make_task(args, args.seed, **limit)
    except TypeError as error:
        raise ConfigError(f"task {args.task} cannot be created with these options: {error}") from error


def _model(args: argparse.Namespace) -> "tuple[nn.Module, Recipe | None, BaseModel | None]":
    from surgeon.records.recipe import get_recipe

    model, base = build(args, head="weights")
    recipe = get_recipe(model)
    if recipe is None and args.original == "auto":
        args.original = "none"  # a model given by name is an original
    return model, recipe, base


def _original(
    args: argparse.Namespace, recipe: "Recipe | None", notes: list[str]
) -> "tuple[nn.Module | None, str, Recipe | None]":
    """The model to compare with, None if there is none, its name and its recipe."""
    from surgeon.models.names import restore
    from surgeon.records.recipe import get_recipe

    if args.original == "none":
        return None, "", None
    base = None if recipe is None else recipe.base
    if args.original != "auto":
        given = {"seed": args.seed, "trust_factory": args.trust_factory}
        named, told = named_original(args.original, args.original_weights, base, flag="--original-weights", **given)
        notes += [] if told is None else [told]
        return named, args.original, get_recipe(named)
    if base is None:
        notes.append("no original: the run does not record its base model (name one with --original MODEL)")
        return None, "", None
    try:
        original = restore(base, weights=args.original_weights, head="weights", trust_factory=args.trust_factory)
    except ModelError as error:
        if args.original_weights:
            raise
        notes.append(f"no original: {error} (--original MODEL names another, --original-weights FILE its weights)")
        return None, "", None
    return original, _named(base), None


def _named(base: "BaseModel") -> str:
    """The original by the folder whose weights it has, if it was converted from one, otherwise by its own name."""
    folder = original_folder(base)
    if folder is None:
        return base.name
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _measure(
    model: "nn.Module",
    name: str,
    task: "Task",
    args: argparse.Namespace,
    device: str,
    progress: Any,
    notes: list[str],
    *,
    original: bool = False,
) -> dict[str, Any]:
    """Metrics, parameters and FLOPs of one model, which is fitted to the task first; an untrained head has no metrics."""
    from surgeon.zoo.evaluate import evaluate

    layers: list[Adaptivity] = []
    model, given = task.fitted(model)
    images = task.images()
    scored = given is None or (args.original_weights if original else args.weights) == "random"
    if not scored and not original:
        raise ModelError(
            f"{name} was given {given}: there is nothing to evaluate before it is trained (`surgeon finetune` trains "
            "it; --weights random evaluates a model by name untrained, for the level of chance)"
        )
    if given is not None:
        notes.append(f"{name} was given {given}" + ("" if scored else "; only its cost is compared"))
    flops, size = _flops(model, task, args.split, name, notes)
    metrics: dict[str, float] = {}
    if scored:
        short = name.rstrip("/").rpartition("/")[2]
        metrics = evaluate(
            model,
            task,
            split=args.split,
            batch_size=args.batch_size,
            device=device,
            amp=args.amp,
            workers=args.workers,
            progress=lambda stage, done, total: progress(f"evaluate {short}", done, total),
            layers=layers,
        )
    params = sum(p.numel() for p in model.parameters())
    return {
        "metrics": metrics,
        "params": params,
        "flops": flops,
        "input_size": size,
        "images": images,
        "layers": [x.to_dict() for x in layers],
    }


def _flops(model: "nn.Module", task: "Task", split: Any, name: str, notes: list[str]) -> tuple[int | None, list[int]]:
    """FLOPs of one forward pass of the split's first input, and that input's shape, padded as in the evaluation."""
    from surgeon.costs import cost

    size = task.padded(tuple(task.dataset(split)[0]["input"].shape))
    try:
        return cost(model, input_size=size, mode="infer").flops, list(size)
    except SurgeonError as error:
        notes.append(f"the FLOPs of {name} cannot be counted: {error}")
        return None, list(size)


# --- text ---------------------------------------------------------------------------------------------------------


def text(document: dict[str, Any], width: int) -> str:
    """The result as text: metrics, parameters and FLOPs, of one or two models with the difference."""
    from surgeon.util.tables import count, paragraph, shorten, table

    beside = document["original"]
    samples = f"{document['samples']} sample{'s' * (document['samples'] != 1)}"
    head = f"{document['model']}: {document['task']}, {samples} of {document['split']}"
    if document["original_missing"]:
        head += "; no original to compare with, see the note"
    columns = [document] + ([beside] if beside else [])
    rows = []
    for name, value in document["metrics"].items():
        mark = "*" if name == document["primary"] else ""
        cells = [_number(column["metrics"].get(name)) for column in columns]
        rows.append([name + mark, *cells, *([_difference(value, beside["metrics"].get(name))] if beside else [])])
    for title, key in (("parameters", "params"), ("FLOPs", "flops")):
        cells = [count(column[key]) for column in columns]
        factor = f"x{document[key] / beside[key]:.2f}" if beside and document[key] and beside[key] else "-"
        rows.append([title, *cells, *([factor] if beside else [])])
    header = ["", "this model", *([shorten(beside["model"], 24), "change"] if beside else [])]
    way = "higher" if document["higher_is_better"] else "lower"
    size = "x".join(map(str, document["input_size"]))
    lines = [paragraph(head, width=width), "", table(header, rows, width=width), ""]
    told = f"* decides, {way} is better."
    if any(column["flops"] is not None for column in columns):
        padded = f", padded to multiples of {document['multiple']}" if document["multiple"] > 1 else ""
        told += f" FLOPs (1 MAC = 2 FLOPs) are those of one input of {size}{padded}."
    lines.append(paragraph(told, width=width))
    shown = dict.fromkeys(column["images"] for column in columns if column["images"])
    for number, images in enumerate(shown):
        lines.append(paragraph(f"{'images of the original' if number else 'images'}: {images}", width=width, hang="  "))
    if document["layers"]:
        lines += ["", _layers(document["layers"], width), ""]
        lines.append(paragraph(ADAPTIVITY, width=width))
    lines += [paragraph(f"note: {note}", width=width, hang="  ") for note in document["notes"]]
    return "\n".join(lines)


_SAME = 1e-6  # distance of codes that differ by rounding


def _one_filter(layers: list[dict[str, Any]]) -> str | None:
    """A note on the layers that have the same code at every pixel; None if there are none."""
    from surgeon.records.report import name_list

    same = [layer["name"] for layer in layers if layer["distance"] is not None and layer["distance"] < _SAME]
    if not same:
        return None
    told = "nothing adapts there; if training has ended, `surgeon collapse` can fold it"
    return f"one filter at every pixel in {name_list(same, 6)}: {told}"


ADAPTIVITY = (
    "content: part of the generator's last map that varies over an image. saturated: part of it at the ends of tanh. distance: "
    "1 - cos of the codes of two pixels (0: one filter everywhere; filters may hardly differ where codes do: `surgeon visualize`). "
    "All on the first batch."
)


def _layers(layers: list[dict[str, Any]], width: int) -> str:
    from surgeon.util.tables import table

    def share(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0e}" if 0 < value < 5e-4 else f"{value:.3f}"

    rows = [[x["name"], x["type"], share(x["content"]), share(x["saturated"]), share(x["distance"])] for x in layers]
    return table(["dynamic layer", "type", "content", "saturated", "distance"], rows, width=width)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.1f}"


def _difference(value: float, other: float | None) -> str:
    return "-" if other is None else f"{value - other:+.4f}" if abs(value) < 1000 else f"{value - other:+.1f}"
