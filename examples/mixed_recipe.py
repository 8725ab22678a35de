"""Give different layers different types by a recipe, and see what each costs.

python examples/mixed_recipe.py [MODEL]
"""

import sys

import timm

import surgeon

RECIPE = {
    "format": "surgeon-recipe",
    "version": 2,
    "rules": [
        {"layers": "stage3,stage4", "type": "acda", "options": {"atoms": 4, "scales": 2}},
        {"layers": "first-of-stage,!stage1,!stage2", "type": "pafu", "options": {"group_size": 4}},
    ],
}


def main(name: str = "resnet18") -> None:
    recipe = surgeon.Recipe.from_dict(RECIPE)
    model, report = surgeon.convert(timm.create_model(name), layers=recipe)
    for entry in report.replaced:
        print(f"{entry.name:<20} {entry.type:<5} {entry.params_before:>9,} -> {entry.params_after:>9,} parameters")
    print(f"relative error {report.max_rel_error}, of {type(model).__name__}, which is still timm's class")


if __name__ == "__main__":
    main(*sys.argv[1:])
