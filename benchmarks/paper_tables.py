"""The papers' comparisons, repeated: ours against the plain network, trained for equal steps, evaluated on the same images.

    python -m benchmarks.paper_tables [--only "PAFU 2" …] [--seeds 3] [--list] [--report] [--fresh]
    python -m benchmarks.paper_tables --data DIR --only "ADFNet 1"

ACDA Tables 1, 3, 4, 5, 6, 7 and B; PAFU Tables 1 to 6; ADFNet Tables 1, 2, 4 and Figure 7. Without --data at small scale: the
recipes' preset `small` (minutes per row, small networks, few steps) on real images of the evaluation material. With --data at the
papers' scale; DIR contains one folder per data set (benchmarks/_paper_data.py names them). The paper's numbers are in separate
columns: small scale only shows which of two networks learns more in few steps.

A row is one network and seed; an interrupted run resumes, and a row trained for a different number of steps than its comparison
is retrained. Writes benchmarks/results/paper_tables.json (--data: paper_tables-full.json).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import _data as data
from benchmarks._paired import differences, outcome, signed, tally
from benchmarks._paper_acda import acda
from benchmarks._paper_adfnet import adfnet
from benchmarks._paper_costs import COSTS, cost_rows
from benchmarks._paper_data import CIFAR_FOLDERS, FULL, SMALL, DataSet, unpack_cifar
from benchmarks._paper_pafu import pafu
from benchmarks._paper_tables import Arm, Comparison
from benchmarks._results import RESULTS, ROOT, Rows, table, write_json
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune import finetune
from surgeon.zoo.recipes import TrainingRecipe, training_recipe
from surgeon.zoo.tasks import Task
from surgeon.zoo.tasks.support.pictures import sheet, to_image

# Images that say, at small scale, whether measuring BatchNorm statistics anew helped; 32 for other metrics.
VALIDATED = {"psnr": 1, "error": 500}
DERIVED = {"error": "top1", "error5": "top5"}  # one minus a share


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    chosen = [c for c in comparisons() if not args.only or c.table in args.only or c.key in args.only]
    costs = [name for name in COSTS if not args.only or name in args.only]
    if not chosen and not costs:
        print(f"no such table: {', '.join(args.only)}; --list names them", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join([*costs, *(f"{c.key}: {c.title} ({len(c.arms)} networks)" for c in chosen)]))
        return 0
    full = args.data is not None
    name = "paper_tables-full" if full else "paper_tables"
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    if not args.report:
        with tempfile.TemporaryDirectory() as work:
            sets = _sets(args, chosen, Path(work))
            for cost in costs:
                if cost not in rows:
                    rows.add(cost, {"table": cost, "costs": cost_rows(cost)})
            _train(args, chosen, sets, rows, full)
    wanted = {*costs, *(c.key for c in chosen)}
    shown = [row for row in rows.values() if row.get("comparison", row["table"]) in wanted]
    for title, headers, lines in texts(shown):
        print(f"\n{title}")
        table(headers, lines)
    print(f"\n{summary(shown)}")
    write_json(args.results / f"{name}.json", {"scale": "full" if full else "small", "rows": rows.values()})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TABLE", help="as --list names them: 'PAFU 2', 'PAFU 2/x3'"
    )
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="only these, as the tables name them")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="only name the tables")
    parser.add_argument("--report", action="store_true", help="only print what there is")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of every network, in place of the recipe's")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the papers' data sets: full scale")
    parser.add_argument(
        "--small-data", type=Path, default=data.data_folder(), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="of a denoised image (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser


def comparisons() -> list[Comparison]:
    """All that are trained, in the order of the papers."""
    return [*acda(), *pafu(), *adfnet()]


# --- training ---------------------------------------------------------------------------------------------------------


def _sets(args: argparse.Namespace, chosen: Sequence[Comparison], work: Path) -> dict[str, DataSet]:
    """Data sets by name, those that are there; says of the others what they lack."""
    small = args.data is None
    root, known = (args.small_data, SMALL) if small else (args.data, FULL)
    found: dict[str, DataSet] = {}
    for name in dict.fromkeys(c.data for c in chosen):
        if name not in known:
            print(f"{name}: nothing stands for it at small scale", file=sys.stderr)
            continue
        made = known[name]
        if small and made.train.get("data") == CIFAR_FOLDERS and (root / "cifar10").is_dir():
            unpack_cifar(root, work)
            located = made.located(work)
        else:
            located = made.located(root)
        lacking = located.missing()
        if lacking:
            print(f"{name}: there is no {', '.join(lacking)}", file=sys.stderr)
        else:
            found[name] = located
    return found


def _train(
    args: argparse.Namespace, chosen: Sequence[Comparison], sets: Mapping[str, DataSet], rows: Rows, full: bool
) -> None:
    """Every row that is not there yet: the first seed of all tables, then the second."""
    todo = [
        (seed, comparison, arm)
        for seed in range(args.seeds)
        for comparison in chosen
        if comparison.data in sets
        for arm in comparison.arms
        if arm.trained_as is None and (not args.networks or arm.name in args.networks)
        if _is_lacking(rows, f"{comparison.key}/{arm.name}/{seed}", _changes(comparison, arm, full, args.steps))
    ]
    for seed, comparison, arm in tqdm(todo, desc="networks", disable=None):
        model, task, made = run(comparison, arm, sets[comparison.data], seed, full=full, steps=args.steps)
        for judged, facts in made:
            rows.add(
                f"{comparison.key}/{judged.name}/{seed}",
                {"table": comparison.table, "comparison": comparison.key, "network": judged.name, "seed": seed} | facts,
            )
        if (comparison.key, seed) == (SHOWN, 0) and arm.name in SHOWN_ARMS:
            show(args.picture, args.results, arm.name, model, task)


def _changes(comparison: Comparison, arm: Arm, full: bool, steps: int | None) -> dict[str, Any]:
    """What the training of an arm changes of its recipe."""
    short = {"recalibrate": 16, "eval_every": "100%", "checkpoint_every": "100%", "keep": "last"}
    common = {} if full else short | dict(comparison.small_train)
    return common | dict(arm.train) | ({} if steps is None else {"max_steps": steps})


def _is_lacking(rows: Rows, key: str, changes: Mapping[str, Any]) -> bool:
    """Whether a row is not there, or was trained for other steps than these changes say, if they do."""
    row = rows.rows.get(key)
    return row is None or changes.get("max_steps") not in (None, row["steps"])


def run(
    comparison: Comparison, arm: Arm, found: DataSet, seed: int, *, full: bool, steps: int | None = None
) -> tuple[nn.Module, Task, list[tuple[Arm, dict[str, Any]]]]:
    """Train one network: it, its task, and the rows of the arm and of those that are the same network judged otherwise."""
    recipe = _recipe(comparison, arm, full)
    model = network(recipe, arm, seed, full)
    limit = {} if full else {"val_limit": VALIDATED.get(next(iter(comparison.metrics)), 32)}
    task = _task(recipe, found.train | limit, seed)
    started = time.process_time()
    result = finetune(
        model, task, recipe.config(model, seed=seed, **_changes(comparison, arm, full, steps)), quiet=not full
    )
    facts: dict[str, Any] = {
        "scale": "full" if full else "small",
        "data": found.note,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "steps": result.summary.steps,
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    judged = [other for other in comparison.arms if other is arm or other.trained_as == arm.name]
    made = [
        (other, facts | {"scores": judge(comparison, other, recipe, result.model, found, seed)}) for other in judged
    ]
    return result.model, task, made


def _recipe(comparison: Comparison, arm: Arm, full: bool) -> TrainingRecipe:
    """How the arm is trained, with the comparison's options."""
    from dataclasses import replace

    presets = (*comparison.presets, *arm.presets, *(() if full else ("small",)))
    base = training_recipe(arm.recipe or comparison.recipe)
    made = base.with_presets(*(name for name in presets if name in base.presets))
    options = made.task_options | comparison.task_options
    if not full:
        other = comparison.small_task is not None
        options = comparison.small_options if other else options | comparison.small_options
        made = replace(made, task=comparison.small_task or made.task)
    return replace(made, task_options=dict(options))


def network(recipe: TrainingRecipe, arm: Arm, seed: int, full: bool) -> nn.Module:
    """The arm's network with weights from the seed."""
    from surgeon.zoo import entry
    from surgeon.zoo.surgery import operate

    name = arm.network if full or arm.small_network is None else arm.small_network
    if name.startswith("timm:"):
        return recipe.make_model(name.removeprefix("timm:"), weights="random", seed=seed)[0]
    options = dict(arm.model) | ({} if full else dict(arm.small_model))
    model, _ = recipe.make_model(f"zoo/{name}", weights="random", seed=seed, options=options)
    by_surgery = arm.rules and (not full or name == "realsr_conv")
    return operate(model, arm.rules, entry(name).input_size) if by_surgery else model


def _task(recipe: TrainingRecipe, options: Mapping[str, Any], seed: int) -> Task:
    return recipe.make_task(seed=seed, **options)


def judge(
    comparison: Comparison, arm: Arm, recipe: TrainingRecipe, model: nn.Module, found: DataSet, seed: int
) -> dict[str, float]:
    """Scores of a trained network, "Set5 psnr" and the like."""
    scores = {}
    for name, options in found.judge.items():
        task = _task(recipe, {**options, **arm.judged_by}, seed)
        metrics = evaluate(task.bind(model), task, batch_size=1 if "psnr" in task.metrics() else 50)
        for metric, factor in comparison.metrics.items():
            value = 1 - metrics[DERIVED[metric]] if metric in DERIVED else metrics[metric]
            scores[f"{name} {metric}"] = factor * value
    return scores


# --- the picture ------------------------------------------------------------------------------------------------------

SHOWN = "ADFNet 7/DnCNN 5-32"
SHOWN_ARMS = ("DnCNN", "DConv-DnCNN")
PICTURE = ROOT / "docs" / "pictures" / "denoiser.png"
CROP = 192  # pixels from the middle of the image


def show(file: Path, results: Path, name: str, model: nn.Module, task: Task) -> None:
    """Denoise the first image of validation, keep the crop, and draw noisy, plain, ours, clean when both networks are there."""
    sample = task.dataset("val")[0]
    with torch.no_grad():
        restored = task.predict(model.eval(), {"input": sample["input"][None]})[0]
    kept = results / ".paper_tables-crops.pt"
    crops: dict[str, Tensor] = torch.load(kept, weights_only=True) if kept.is_file() else {}
    crops |= {"noisy": _crop(sample["input"]), "clean": _crop(sample["target"]), name: _crop(restored)}
    torch.save(crops, kept)
    if not all(arm in crops for arm in SHOWN_ARMS):
        return
    order = ("noisy", *SHOWN_ARMS, "clean")
    captions = [
        f"{data.psnr(crops[key].clamp(0, 1), crops['clean']):.2f} dB" if key != "clean" else "" for key in order
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet([[to_image(crops[key]) for key in order]], order, [captions]).save(file)


def _crop(image: Tensor) -> Tensor:
    top, left = (image.shape[1] - CROP) // 2, (image.shape[2] - CROP) // 2
    return image[:, max(top, 0) : max(top, 0) + CROP, max(left, 0) : max(left, 0) + CROP].clone()


# --- what came out ----------------------------------------------------------------------------------------------------

HEADERS = (
    "network",
    "parameters",
    "steps",
    "seeds",
    "ours",
    "difference",
    "verdict",
    "published",
    "published difference",
)


def texts(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Sequence[str], list[list[Any]]]]:
    """(title, headers, lines) of every table that has rows."""
    for row in rows:
        if row["table"] in COSTS:
            costs = row["costs"]
            yield f"{row['table']}: {COSTS[row['table']]}", list(costs[0]), [_exact(line) for line in costs]
    for comparison in comparisons():
        found = [row for row in rows if row.get("comparison") == comparison.key]
        if found:
            stands = next((row["data"] for row in found if row["data"]), "")
            notes = "; ".join(filter(None, (stands, comparison.note)))
            yield (
                f"{comparison.table}, {comparison.title}{f' ({notes})' if notes else ''}",
                HEADERS,
                lines(comparison, found),
            )


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many of the networks that have one beside them won, lost, or neither."""
    column = HEADERS.index("verdict")
    lines = [line for _, headers, found in texts(rows) if headers is HEADERS for line in found]
    return tally([word for line in lines if line[column] for word in line[column].split("; ")])


def _exact(line: dict[str, Any]) -> list[Any]:
    """A line of a cost table, with all digits of what is counted."""
    return [f"{v:,}" if isinstance(v, int | float) and not isinstance(v, bool) else v for v in line.values()]


def lines(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A line a network: mean over seeds, difference from the network beside it seed by seed, and what the paper prints."""
    steps = {
        arm.name: max((r["steps"] for r in rows if r["network"] == arm.name), default=0) for arm in comparison.arms
    }
    by_arm = {
        arm.name: {
            row["seed"]: row["scores"]
            for row in rows
            if row["network"] == arm.name and row["steps"] == steps[arm.name]  # not those of an earlier, shorter run
        }
        for arm in comparison.arms
    }
    parameters = {row["network"]: row["parameters"] for row in rows}
    published = {arm.name: arm.published for arm in comparison.arms}
    made = []
    for arm in comparison.arms:
        seeds = by_arm[arm.name]
        if not seeds:
            continue
        names = list(next(iter(seeds.values())))
        gaps = differences(seeds, by_arm[arm.of] if arm.of and steps[arm.of] == steps[arm.name] else {})
        printed = published[arm.name]
        beside = {k: v - published[arm.of][k] for k, v in printed.items() if arm.of and k in published[arm.of]}
        if arm.of is not None:
            beside |= comparison.differences
        made.append(
            [
                arm.name,
                f"{parameters[arm.name]:,}",
                steps[arm.name],
                len(seeds),
                _numbers({name: mean(s[name] for s in seeds.values()) for name in names}),
                _labeled({name: signed(values, 3 if name.endswith("ssim") else 2) for name, values in gaps.items()}),
                _verdict(gaps, comparison),
                _numbers(printed),
                _numbers(beside, plus=True),
            ]
        )
    return made


def _verdict(gaps: Mapping[str, Sequence[float]], comparison: Comparison) -> str:
    """Of every test set by the primary metric."""
    primary = next(iter(comparison.metrics))
    return "; ".join(
        outcome(found, comparison.lower) for name, found in gaps.items() if name.endswith(f" {primary}") and found
    )


def _numbers(values: Mapping[str, float], *, plus: bool = False) -> str:
    sign = "+" if plus else ""
    return _labeled({name: f"{v:{sign}{'.3f' if name.endswith('ssim') else '.2f'}}" for name, v in values.items()})


def _labeled(values: Mapping[str, str]) -> str:
    parts = (f"{name} {value}" for name, value in values.items())
    return "; ".join(part.replace(" psnr ", " ").replace(" error ", " ") for part in parts)


if __name__ == "__main__":
    sys.exit(main())
