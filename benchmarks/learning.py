"""Do dynamic layers learn more than the convolutions they replace? Every arm's rate swept alike, several seeds, paired differences.

    python -m benchmarks.learning [--only NAME …] [--arms ARM …] [--seeds N] [--list] [--report] [--fresh]

For each arm of a study the learning rate is swept with seed 0 and chosen on images that neither train nor judge; where the best is
at the edge of the sweep, the sweep goes on. The other seeds are trained at that rate. Judged are the last weights, on other images
again. A difference to the plain network of the same seed counts as won or lost only beyond two standard errors over the seeds;
"undecided" otherwise. Writes benchmarks/results/learning.json; interrupted, it continues where it was.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _data as data
from benchmarks._paired import differences, outcome, signed, tally
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks.studies import STUDIES
from benchmarks.studies.study import Study
from surgeon.costs import cost
from surgeon.errors import TrainingError
from surgeon.visualize.adaptivity import observed
from surgeon.zoo.finetune import FinetuneConfig, finetune

EXTENSIONS = 2  # how often a sweep goes on beyond its edge
COLUMNS = (
    "arm",
    "parameters",
    "FLOPs",
    "seconds",
    "rate",
    "at edge",
    "seeds",
    "scores",
    "against",
    "difference",
    "verdict",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{name}: {make().title}" for name, make in STUDIES.items()))
        return 0
    rows = Rows(args.results / "learning.jsonl", fresh=args.fresh)
    chosen = {name: STUDIES[name]() for name in args.only}
    known = dict.fromkeys(arm for study in chosen.values() for arm in study.arms)
    if unknown := [arm for arm in args.arms or () if arm not in known]:
        parser.error(f"no network {unknown[0]!r} in {', '.join(chosen)}; there are: {', '.join(known)}")
    if not args.report:
        with tempfile.TemporaryDirectory() as work:
            for name, study in chosen.items():
                lacking = data.missing(study.needs, args.data)
                if lacking:
                    print(f"{name} left out: not in {args.data}: {', '.join(lacking)}", file=sys.stderr)
                    continue
                for arm in study.arms:
                    if args.arms is None or arm in args.arms:
                        settle(name, study, arm, rows, args.data, Path(work), args.seeds)
    for name, study in chosen.items():
        lines = summary(name, study, rows)
        if lines:
            print(f"\n{name}: {study.title}, {study.steps} steps of {study.batch}; {study.unit}")
            table(COLUMNS, [[line[column] for column in COLUMNS] for line in lines])
    found = {name: {"title": make().title, "lines": summary(name, make(), rows)} for name, make in STUDIES.items()}
    found = {name: entry for name, entry in found.items() if entry["lines"]}
    verdicts = [word for entry in found.values() for line in entry["lines"] for word in line["verdicts"].values()]
    print(f"\n{tally(verdicts)}")
    write_json(args.results / "learning.json", {"studies": found, "rows": rows.values()})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="NAME")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these networks of each study; default: all")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="only name the studies")
    parser.add_argument("--report", action="store_true", help="only print what there is")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser


# --- training ---------------------------------------------------------------------------------------------------------


def settle(name: str, study: Study, arm: str, rows: Rows, material: Path, work: Path, seeds: int) -> None:
    """Sweep the arm's rate, go on beyond an edge, and train the other seeds at the best."""
    if not list(study.arms[arm](material).parameters()):  # nothing to train
        _ensure(name, study, arm, 0.0, 0, rows, material, work)
        return
    rates = sorted(study.rates)
    for _ in range(EXTENSIONS + 1):
        for rate in rates:
            _ensure(name, study, arm, rate, 0, rows, material, work)
        best = best_rate(name, study, arm, rows)
        if best is None or rates[0] < best < rates[-1]:
            break
        rates = [rates[0] / 2, *rates] if best <= rates[0] else [*rates, rates[-1] * 2]
    if best is not None:
        for seed in range(1, seeds):
            _ensure(name, study, arm, best, seed, rows, material, work)


def _ensure(name: str, study: Study, arm: str, rate: float, seed: int, rows: Rows, material: Path, work: Path) -> None:
    key = f"{name}/{arm}/{rate:g}/{seed}"
    if key not in rows:
        rows.add(
            key, {"study": name, "arm": arm, "rate": rate, "seed": seed, **run(study, arm, rate, seed, material, work)}
        )
        print(f"{key}: {rows.rows[key]['chooses']}, {rows.rows[key]['scores']}", file=sys.stderr)


def run(study: Study, arm: str, rate: float, seed: int, material: Path, work: Path) -> dict[str, Any]:
    """Train one network: what chooses its rate, its scores, what it costs, and how adaptive its layers are."""
    torch.manual_seed(seed)
    model, task = study.arms[arm](material), study.task(material, work, seed)
    if not list(model.parameters()):
        none: dict[str, Any] = {"steps": 0, "flops": 0, "parameters": 0, "cpu_seconds": 0.0, "chooses": 0.0}
        return none | {"higher_chooses": True, "scores": study.judge(model, material), "layers": []}
    options = {**study.changes, **study.ours.get(arm, {})}
    config = FinetuneConfig(
        max_steps=study.steps,
        epochs=1e6,
        batch_size=study.batch,
        eval_batch_size=1 if study.unit == "dB" else 50,
        lr=rate,
        seed=seed,
        keep="last",
        eval_every="100%",
        checkpoint_every="100%",
        **({"recalibrate": 0} | options),
    )
    size = tuple(task.dataset("train")[0]["input"].shape)
    facts: dict[str, Any] = {"steps": study.steps, "flops": cost(model, input_size=size, mode="infer").flops}
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    started = time.process_time()
    try:
        result = finetune(model, task, config)
    except TrainingError as error:
        return facts | {"chooses": None, "scores": None, "failed": str(error)}
    facts["cpu_seconds"] = round(time.process_time() - started, 1)
    trained = result.model.eval()
    with observed(trained) as layers, torch.no_grad():
        trained(task.dataset("val")[0]["input"][None])
    return facts | {
        "chooses": _finite(result.summary.result.metrics[task.primary]),
        "higher_chooses": task.higher_is_better,
        "scores": study.judge(trained, material),
        "layers": [layer.to_dict() for layer in layers],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def best_rate(name: str, study: Study, arm: str, rows: Rows) -> float | None:
    """The rate that the choosing images prefer, of seed 0."""
    swept = [row for row in _of(name, arm, rows) if row["seed"] == 0 and row["chooses"] is not None]
    if not swept:
        return None
    sign = 1 if swept[0]["higher_chooses"] else -1
    return float(max(swept, key=lambda row: sign * row["chooses"])["rate"])


def _of(name: str, arm: str, rows: Rows) -> list[dict[str, Any]]:
    return [row for row in rows.values() if (row["study"], row["arm"]) == (name, arm)]


# --- what came out ----------------------------------------------------------------------------------------------------


def summary(name: str, study: Study, rows: Rows) -> list[dict[str, Any]]:
    """A line per arm and network that it is compared with."""
    settled = {arm: _settled(name, study, arm, rows) for arm in study.arms}
    plain = next(iter(study.arms))
    lines = []
    for arm, by_seed in settled.items():
        if not by_seed:
            continue
        first = next(iter(by_seed.values()))
        rates = sorted(row["rate"] for row in _of(name, arm, rows) if row["seed"] == 0)
        facts = {
            "arm": arm,
            "parameters": first["parameters"],
            "FLOPs": first["flops"],
            "seconds": statistics.mean(row["cpu_seconds"] for row in by_seed.values()),
            "rate": first["rate"],
            "swept": rates,
            "at edge": first["rate"] > 0 and first["rate"] in (rates[0], rates[-1]),
            "seeds": len(by_seed),
            "scores": "; ".join(f"{what} {_mean(by_seed, what):.2f}" for what in first["scores"]),
            "distance": _distance(by_seed.values()),
        }
        others = [other for other in (plain, study.wide) if other and other != arm and arm != study.wide]
        for other in others or [None]:
            gaps = {} if other is None else differences(_scores(by_seed), _scores(settled[other]))
            lines.append(
                facts
                | {
                    "against": other or "",
                    "difference": "; ".join(
                        f"{what} {signed(values)}{_ahead(values, study.lower)}" for what, values in gaps.items()
                    ),
                    "verdict": "; ".join(f"{what} {outcome(values, study.lower)}" for what, values in gaps.items()),
                    "verdicts": {what: outcome(values, study.lower) for what, values in gaps.items()},
                }
            )
    return lines


def _ahead(values: Sequence[float], lower: bool) -> str:
    """How many of several seeds are ahead."""
    better = sum((value < 0) if lower else (value > 0) for value in values)
    return f" ({better} of {len(values)} ahead)" if len(values) > 1 else ""


def _settled(name: str, study: Study, arm: str, rows: Rows) -> dict[int, dict[str, Any]]:
    """Rows by seed at the arm's best rate."""
    best = best_rate(name, study, arm, rows)
    return {row["seed"]: row for row in _of(name, arm, rows) if row["rate"] == best and row["scores"] is not None}


def _scores(by_seed: Mapping[int, Any]) -> dict[int, dict[str, float]]:
    return {seed: row["scores"] for seed, row in by_seed.items()}


def _mean(by_seed: Mapping[int, Any], what: str) -> float:
    return statistics.mean(row["scores"][what] for row in by_seed.values())


def _distance(rows: Any) -> float | None:
    """Mean intra-image cosine distance of the codes over layers and seeds."""
    found = [layer["distance"] for row in rows for layer in row["layers"] if layer["distance"] is not None]
    return statistics.mean(found) if found else None


if __name__ == "__main__":
    sys.exit(main())
