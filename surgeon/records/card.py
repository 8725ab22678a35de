"""The model card of a surgeon folder: README.md for the Hugging Face Hub, metadata first, then usage and facts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.records.collapse_report import CollapseReport
from surgeon.records.preprocessing import recorded_inputs
from surgeon.records.recipe import CONVOLUTION, BaseModel, Recipe, unquoted
from surgeon.records.report import Replaced, Report, flops, geometry_text, options_text
from surgeon.util.outputs import WEIGHTS
from surgeon.util.tables import count, counted, error

FILE = "README.md"
_CLASSES = 20  # named in a card
PLACE = "path/of/this/folder"  # placeholder in a card until it is published under a name

# License identifiers of the Hub; any other is `other`, with its name.
_LICENSES = (
    "apache-2.0",
    "apple-amlr",
    "apple-ascl",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "gemma",
    "mit",
    "unknown",
)


def model_card(
    recipe: Recipe, report: Report | CollapseReport | None = None, scores: Mapping[str, float] | None = None
) -> str:
    """Markdown with a YAML header, for a model that `recipe` describes layer by layer.

    Contains only known facts: costs come from the report, the license is that of the base model's published
    weights. `scores`: metrics on the validation samples of the task that it was fine-tuned on.
    """
    parts = [_title(recipe, report), _use(recipe), _trained(recipe, scores or {}), _replacements(recipe, report)]
    parts += [_cost(report), _origin(recipe)]
    return f"---\n{_metadata(recipe)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def license_of(base: BaseModel | None) -> str | None:
    """The license of the base model's weights if its library states one; timm does for published ones."""
    if base is None or base.source != "timm" or base.weights.kind != "pretrained":
        return None
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(base.name, allow_unregistered=True)
    return None if found is None or not found.license else str(found.license)


def found_by_search(told: str, weights: str | None) -> str:
    """A section for a card that is already written: how a search found the placement.

    `told` is the value that it was chosen by; `weights` the training whose weights these are, if that is one of several.
    """
    lines = [f"- the best placement of a search: {_plain(told)}"]
    if weights is not None:
        lines.append(f"- its weights are those of {_plain(weights)}; the scores above are of that seed alone")
    return "\n".join(["\n## How it was found", "", *lines]) + "\n"


def _metadata(recipe: Recipe) -> str:
    from huggingface_hub import ModelCardData

    base = recipe.base
    kinds = sorted({rule.type for rule in recipe.rules} - {CONVOLUTION})
    source = [base.source] if base is not None and base.source in ("timm", "torchvision") else []
    stated = license_of(base)
    known = stated is None or stated in _LICENSES
    data = ModelCardData(
        library_name="surgeon",
        tags=["surgeon", "dynamic-convolution", *kinds, *source],
        base_model=_hub_id(base),
        license=stated if known else "other",
        license_name=None if known else stated,
    )
    return str(data.to_yaml())


def _hub_id(base: BaseModel | None) -> str | None:
    """ORG/NAME of the Hub repository that the base model's weights came from."""
    if base is None or base.source != "timm" or base.weights.kind != "pretrained" or base.weights.path is None:
        return None
    name = base.weights.path.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")[0]
    return name if name.count("/") == 1 and "://" not in name and not name.startswith("local-dir") else None


def _title(recipe: Recipe, report: Report | CollapseReport | None) -> str:
    name = _architecture(recipe.base) if recipe.base is not None else (report.model if report is not None else None)
    of = (
        f" of {recipe.base.source}" if recipe.base is not None and recipe.base.source in ("timm", "torchvision") else ""
    )
    dynamic = [rule for rule in recipe.rules if rule.type != CONVOLUTION]
    shown = _code(name) if name else "A network"
    if not dynamic:
        return f"# {shown}\n\n{shown}{of}, written by surgeon; none of its convolutions is dynamic."
    layers = "one convolution is" if len(dynamic) == 1 else f"{len(dynamic)} convolutions are"
    return f"# {shown} with dynamic convolutions\n\n{shown}{of}, in which {layers} content-adaptive (see the table)."


def _use(recipe: Recipe) -> str:
    """Loading instructions, in a few lines; with the preparation of an image if the recipe records it."""
    base = recipe.base
    more, first = "", ""
    if base is None:
        more, first = ", base=model", "`model` is one of the original architecture; its weights do not matter.\n\n"
    elif base.source == "factory":
        more = ", trust_factory=True"
        first = f"The base model is built by {_code(base.name)}, code that you must have and trust.\n\n"
    lines = ["import surgeon", "import torch", "", f'model = surgeon.from_pretrained("{PLACE}"{more})  # in eval mode']
    inputs = recorded_inputs(recipe)
    if inputs.get("input_size"):
        lines[1:2] = ["from PIL import Image", "from timm.data import create_transform"]
        given = ", ".join(f"{key}={_literal(value)}" for key, value in inputs.items())
        mode = "L" if inputs["input_size"][0] == 1 else "RGB"
        lines.append(f"transform = create_transform({given})")
        lines.append(f'outputs = model(transform(Image.open("photo.jpg").convert("{mode}")).unsqueeze(0))')
    elif base is not None and base.input_size:
        lines.append(f"outputs = model(torch.randn(1, {', '.join(map(str, base.input_size))}))")
    code = "\n".join(lines)
    return (
        f"## Use\n\n{first}```python\n{code}\n```\n\nNothing in the folder is executed, and there are no pickles in it."
    )


def _literal(value: Any) -> str:
    """A value of a recipe as Python: lists as tuples."""
    return repr(tuple(value) if isinstance(value, list) else value)


def _trained(recipe: Recipe, scores: Mapping[str, float]) -> str:
    """The task, the scores on it, and the classes."""
    lines, task = [], recipe.task
    if task is not None:
        options = ", ".join(f"{key}={value}" for key, value in task.options.items())
        length = f", {counted(task.steps, 'step')} of training by surgeon" if task.steps else ""
        lines.append(f"- fine-tuned on {_code(task.name)}{f' with {_code(options)}' if options else ''}{length}")
    if scores:
        lines.append(f"- on its validation samples: {', '.join(f'{_plain(k)} {v:.5g}' for k, v in scores.items())}")
    if recipe.classes is not None:
        named, more = recipe.classes[:_CLASSES], len(recipe.classes) - _CLASSES
        rest = f" and {more} more, in `recipe.json`" if more > 0 else ""
        lines.append(f"- {len(recipe.classes)} outputs, in this order: {_plain(', '.join(named))}{rest}")
    return "\n".join(["## What it was trained for", "", *lines]) if lines else ""


def _replacements(recipe: Recipe, report: Report | CollapseReport | None) -> str:
    """A row for each layer of the recipe, with the report's numbers if it has any for that layer."""
    if not recipe.rules:
        return ""
    known = {entry.name: entry for entry in report.replaced} if isinstance(report, Report) else {}
    measured = any(not math.isnan(entry.max_rel_error) for entry in known.values())  # a search does not
    header = ["layer", "became"]
    rows = []
    for rule in recipe.rules:
        name = unquoted(rule.layers)
        became = "{}x{} convolution".format(*rule.options["window"]) if rule.type == CONVOLUTION else ""
        rows.append([_code(name), became or options_text(rule.type, rule.options), *_numbers(known.get(name))])
    if known:
        header += ["stage", "geometry", "parameters", "after", "FLOPs", "after", *(["error"] if measured else [])]
    told = "All options are in `recipe.json`."
    if known:
        size = report.input_size if isinstance(report, Report) else None
        told += f" FLOPs are for one image of {_sized(size) or 'unknown size'} (1 MAC = 2 FLOPs)"
        told += "; the error is the layer's, relative, right after it." if measured else "."
    rows = [row[: len(header)] for row in rows]
    return f"## What the layers became\n\n{_table(header, rows, left=4)}\n\n{told}"


def _numbers(entry: Replaced | None) -> list[str]:
    if entry is None:
        return ["-"] * 7
    params, work = (entry.params_before, entry.params_after), (entry.macs_before, entry.macs_after)
    told = [entry.stage or "-", geometry_text(entry.geometry), *map(count, params), *map(flops, work)]
    return [*map(_plain, told), error(entry.max_rel_error)]


def _cost(report: Report | CollapseReport | None) -> str:
    if report is None:
        return ""
    if isinstance(report, Report):
        heading, names, where = "Cost", ("original", "converted"), "in convolutions"
        work = [None if macs is None else 2 * macs for macs in (report.macs_before, report.macs_after)]
    else:
        heading, names, where = "Cost before and after collapsing", ("before", "after"), ""
        work = [report.flops_before, report.flops_after]
    rows = []
    at = f"for one image of {_sized(report.input_size)}" if report.input_size else ""
    flops_of = " ".join(part for part in ("FLOPs", where, at) if part)
    for what, (before, after) in (("parameters", (report.params_before, report.params_after)), (flops_of, work)):
        factor = f"x{after / before:.2f}" if before and after is not None else "-"
        rows.append([what, count(before), count(after), factor])
    return f"## {heading}\n\n{_table(['', *names, 'factor'], rows, left=1)}"


def _sized(size: Sequence[int] | None) -> str:
    return "x".join(map(str, size or ()))


def _architecture(base: BaseModel) -> str:
    """Its name; without timm's tag, which names published weights, if it has others."""
    if base.source != "timm" or base.weights.kind == "pretrained" or ":" in base.name:
        return base.name
    return base.name.partition(".")[0]


def _origin(recipe: Recipe) -> str:
    base = recipe.base
    versions = ", ".join(f"{name} {version}" for name, version in recipe.versions.items())
    lines = [f"- written with {_plain(versions)}"] if versions else []
    if base is not None:
        weights = {
            "pretrained": f"published ones{f' ({_code(base.weights.path)})' if base.weights.path else ''}",
            "random": f"random ones of seed {base.weights.seed}: nothing published is in them",
            "file": _file(base.weights.path),
            "given": "those that its factory gave it"
            if base.source == "factory"
            else "those of the model object that was saved",
        }[base.weights.kind]
        stated = license_of(base)
        lines = [f"- base model: {_code(_architecture(base))} ({base.source})", f"- its weights: {weights}", *lines]
        if base.weights.kind != "random":
            lines.append(
                f"- license of its weights: {_plain(stated) if stated else 'not stated; ask where they are from'}"
            )
    return "\n".join(["## Where it comes from", "", *lines]) if lines else ""


def _file(path: str | None) -> str:
    """A weights file by its name; that of a surgeon folder by the folder's."""
    if not path:
        return "a file"
    file = Path(path)
    return f"those of the folder {_code(file.parent.name)}" if file.name == WEIGHTS else f"the file {_code(file.name)}"


# --- Markdown -----------------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]], *, left: int) -> str:
    """A Markdown table; columns from `left` on are right-aligned."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _plain(text: str) -> str:
    """Text that stays in its cell and line and contains no markup."""
    return "".join(f"\\{letter}" if letter in "\\|<>[]*_`#" else letter for letter in " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
