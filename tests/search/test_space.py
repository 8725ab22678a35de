"""The space: from a description, hashed, refused with reasons; placements as recipes that convert takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import ConfigError, NothingReplacedError, SelectionError
from surgeon.records.recipe import Recipe, get_recipe
from surgeon.search.space import SpaceConfig, make_space


class Small(nn.Module):
    """Two stages, one grouped convolution, one 1×1, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.deep = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.idle = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(self.mix(self.stem(x).relu()).relu()).relu()
        return self.head(self.deep(x).mean(dim=(2, 3)))


Small.pretrained_cfg = {"input_size": (3, 16, 16)}


def test_the_defaults_hold_the_papers_choices() -> None:
    assert [option.label for option in SpaceConfig().make_options()] == [
        "acda(atoms=6, scales=3)",
        "acda(atoms=4, scales=1)",
        "acda(atoms=6, scales=1)",
        "pafu(group_size=4)",
        "pafu(group_size=8)",
        "sekg",
    ]


def test_a_short_description_gives_every_combination() -> None:
    config = SpaceConfig(types=("acda", "pafu"), atoms=(4, 6), scales=(1, 3), group_sizes=(4,))
    assert [option.label for option in config.make_options()] == [
        "acda(atoms=4, scales=1)",
        "acda(atoms=4, scales=3)",
        "acda(atoms=6, scales=1)",
        "acda(atoms=6, scales=3)",
        "pafu(group_size=4)",
    ]
    assert {option.type for option in SpaceConfig(atoms=(4,)).make_options()} == {"acda"}
    assert [o.label for o in SpaceConfig(types=("sekg",)).make_options()] == ["sekg"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"types": ["acdc"]}, ["space.yaml: types: unknown layer type", "acdc", "acda"]),
        ({"options": [{"type": "pafu"}, {"type": "acdc"}]}, ["space.yaml: option 2: unknown layer type", "acdc"]),
        ({"types": ["sekg"], "scales": [2]}, ["space.yaml: scales"]),
        ({"types": ["pafu"], "atoms": [4]}, ["atoms", "pafu"]),
        ({"atoms": [0]}, ["atoms", "0"]),
        ({"atoms": ["four"]}, ["atoms", "four"]),
        ({"atmos": [4]}, ["atmos", "atoms"]),
        ({"options": [{"kind": "acda"}]}, ["options", "type"]),
        (["acda"], ["mapping"]),
    ],
)
def test_wrong_descriptions(values: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        SpaceConfig.from_dict(values, "space.yaml")
    assert all(word in str(caught.value) for word in words)


def test_a_description_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("types: [acda, sekg]\natoms: [4]\nlayers: [stage1, '!stem']\n")
    config = SpaceConfig.read(tmp_path / "a.yaml")
    assert config.layers == "stage1,!stem"
    assert [option.label for option in config.make_options()] == ["acda(atoms=4)", "sekg"]
    (tmp_path / "b.json").write_text(json.dumps({"options": [{"type": "pafu", "options": {"group_size": 3}}]}))
    assert [o.label for o in SpaceConfig.read(tmp_path / "b.json").make_options()] == ["pafu(group_size=3)"]
    (tmp_path / "c.yaml").write_text("types: [acda")
    for name in ("c.yaml", "nowhere.yaml"):
        with pytest.raises(ConfigError, match=name):
            SpaceConfig.read(tmp_path / name)


def test_a_space_of_a_model() -> None:
    space = make_space(Small(), SpaceConfig(types=("acda", "sekg")))
    assert space.layers == ("stem", "mix", "deep")  # neither the 1×1 nor the one that is never called
    assert space.labels[0] == "keep"
    assert space.types[1:] == ("acda", "acda", "acda", "sekg")
    column = space.labels.index("sekg")
    for i, layer in enumerate(space.layers):
        assert bool(space.why_not(i, column)) is not bool(space.allowed[i, column]), layer


def test_empty_spaces_say_why() -> None:
    with pytest.raises(SelectionError, match="stage9"):
        make_space(Small(), SpaceConfig(layers="stage9"))
    with pytest.raises(ConfigError, match="empty"):
        make_space(nn.Sequential(nn.Conv2d(3, 4, 1)))
    weird = SpaceConfig.from_dict({"options": [{"type": "sekg", "options": {"kernel_groups": 7}}]})
    with pytest.raises(NothingReplacedError, match="nothing was replaced"):
        make_space(Small(), weird)


def test_hashes_are_stable_and_tell_placements_apart() -> None:
    config = SpaceConfig(types=("acda",), atoms=(4, 6))
    space, again = make_space(Small(), config), make_space(Small(), config)
    assert space.hash == again.hash
    wider = make_space(Small(), SpaceConfig(types=("pafu", "acda"), atoms=(6, 4), group_sizes=(4,)))
    assert wider.hash != space.hash
    seen = {space.hash_of(p) for p in np.ndindex(3, 3, 3)}
    assert len(seen) == 27
    names = space.names([1, 0, 2])
    assert names == {"stem": "acda(atoms=4)", "deep": "acda(atoms=6)"}
    assert wider.hash_of(wider.placement(names)) == space.hash_of([1, 0, 2])
    assert space.hash_of([0, 0, 0]) == "44136fa355b3678a"  # of no replacement, in every space and version


def test_placements_are_checked() -> None:
    space = make_space(Small(), SpaceConfig(types=("acda", "sekg")))
    with pytest.raises(ConfigError, match="3 layers, got 2"):
        space.names([0, 0])
    with pytest.raises(ConfigError, match="no option 9"):
        space.names([0, 0, 9])
    with pytest.raises(ConfigError, match="'conv9'"):
        space.placement({"conv9": "sekg"})


@pytest.mark.parametrize("choice", [[1, 0, 3], [2, 3, 1], [3, 1, 2]])
def test_recipes_go_through_convert(choice: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    space = make_space(model, SpaceConfig(types=("acda", "pafu", "sekg"), atoms=(4,), scales=(1,), group_sizes=(4,)))
    placement = [j if space.allowed[i, j] else 0 for i, j in enumerate(choice)]
    recipe = space.recipe(placement, seed=5)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    read = Recipe.read(tmp_path / "recipe.json")
    converted, report = surgeon.convert(model, recipe=read, input_size=16)
    assert {entry.name: entry.type for entry in report.replaced} == {
        layer: space.types[j] for layer, j in zip(space.layers, placement, strict=True) if j
    }
    resolved = get_recipe(converted)
    assert resolved is not None
    assert {rule.layers: rule.type for rule in resolved.rules} == {rule.layers: rule.type for rule in recipe.rules}
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(converted.eval()(x), model(x), rtol=1e-4, atol=1e-5)
