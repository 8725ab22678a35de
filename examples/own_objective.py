"""Search placements under budgets with Optuna and an objective of your own; here, how long one training step takes.

python examples/own_objective.py [MODEL] [TRIALS]
"""

import sys
import time

import optuna
import timm
import torch

import surgeon
from surgeon.search import Budgets, Gate, PlacementSampler, SpaceConfig


def main(name: str = "resnet18", trials: str = "10") -> optuna.Study:
    model = timm.create_model(name).eval()
    gate = Gate(model, SpaceConfig(layers="stage4"), Budgets.parse(flops="+10%", max_layers=2), input_size=64)
    sampler = PlacementSampler(gate.space, gate)

    def objective(trial: optuna.Trial) -> float:
        placement = sampler.suggest(trial)
        if not placement.any():
            return seconds(model)
        return seconds(surgeon.convert(model, recipe=gate.space.recipe(placement), check=False)[0])

    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=int(trials))
    print(study.best_value, {layer: kind for layer, kind in study.best_params.items() if kind != "keep"})
    print({layer: round(part, 2) for layer, part in optuna.importance.get_param_importances(study).items()})
    return study


def seconds(model: torch.nn.Module) -> float:
    """One step of training on noise. Your own objective fine-tunes and validates."""
    start = time.perf_counter()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
