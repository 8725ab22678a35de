"""Recipes: written and read back unchanged; whatever is wrong in one is one clear error that says where."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgeon
from surgeon.errors import RecipeError
from surgeon.records.recipe import FORMAT, VERSION, BaseModel, Recipe, Rule, Weights, get_recipe, set_recipe, versions

MINIMAL = {"format": "surgeon-recipe", "version": 2, "rules": [{"layers": "stage3", "type": "pafu"}]}

whole = st.integers(-(2**63), 2**63 - 1)  # what a file of ours holds
names = st.text(min_size=1, max_size=20).filter(str.strip)
bases = st.builds(
    BaseModel,
    source=st.sampled_from(["timm", "torchvision", "zoo", "factory"]),
    name=names,
    kwargs=st.dictionaries(names, st.one_of(whole, st.booleans(), st.none(), names), max_size=3),
    input_size=st.lists(st.integers(1, 512), max_size=3).map(tuple),
    weights=st.builds(
        Weights,
        kind=st.sampled_from(["pretrained", "random", "file", "given"]),
        seed=st.none() | whole,
        path=st.none() | names,
        sha256=st.none() | names,
    ),
)
rules = st.builds(
    Rule, layers=names, type=st.just("pafu"), options=st.fixed_dictionaries({"group_size": st.integers(2, 9)})
)


@given(st.builds(Recipe, rules=st.lists(rules, max_size=3).map(tuple), base=st.none() | bases, seed=whole))
def test_a_recipe_comes_back_as_it_was(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_what_a_person_writes_needs_only_format_version_and_rules() -> None:
    recipe = Recipe.from_dict(MINIMAL)
    assert recipe == Recipe(rules=(Rule(layers="stage3", type="pafu"),))
    assert recipe.base is None


def test_version_1_means_the_layers_of_the_papers() -> None:
    """Recipes and folders written before the norm came keep what they were."""
    from surgeon.layers import PAFUConfig

    (rule,) = Recipe.from_dict(MINIMAL | {"version": 1}).rules
    assert rule.options == {"shared": False, "selection": "gumbel", "norm": None}
    named = {"layers": "stage3", "type": "pafu", "options": {"norm": "batch"}}
    assert Recipe.from_dict(MINIMAL | {"version": 1, "rules": [named]}).rules[0].options["norm"] == "batch"
    assert PAFUConfig.from_dict(Recipe.from_dict(MINIMAL).rules[0].options) == PAFUConfig()


@pytest.mark.parametrize("type", ["acda", "pafu", "sekg"])
def test_a_folder_of_version_1_loads_and_computes_the_same(type: str, tmp_path: Path) -> None:
    from surgeon.layers import layer_class

    paper = layer_class(type).Config.paper
    model = timm.create_model("resnet10t", num_classes=3)
    model, report = surgeon.convert(model, layers="layer4.0.conv1", type=type, check=False, **paper)
    surgeon.save(model, tmp_path / "run", report=report)
    file = tmp_path / "run" / "recipe.json"
    values = json.loads(file.read_text())
    for rule in values["rules"]:
        rule["options"] = {key: value for key, value in rule["options"].items() if key not in paper}
    file.write_text(json.dumps(values | {"version": 1}))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(surgeon.load(tmp_path / "run")(x), model.eval()(x))


def test_layers_may_be_a_list() -> None:
    values = MINIMAL | {"rules": [{"layers": ["stage3", "!layer3.0"], "type": "pafu"}]}
    assert Recipe.from_dict(values).rules[0].layers == "stage3,!layer3.0"


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (MINIMAL | changes).items() if value is not ...}


RULE = MINIMAL["rules"][0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], ["JSON object", "[]"]),
        (changed(format=...), ["format", FORMAT]),
        (changed(format="onnx"), ["format", "'onnx'"]),
        (changed(version="1"), ["version", "'1'"]),
        (changed(version=True), ["version", "True"]),
        (changed(rule=[]), ["no key 'rule'", "rules"]),
        (changed(rules={}), ["rules", "list"]),
        (changed(rules=["stage3"]), ["rule 1", "JSON object"]),
        (changed(rules=[RULE, RULE | {"lyers": "x"}]), ["rule 2", "'lyers'"]),
        (changed(rules=[{"type": "pafu"}]), ["rule 1", "layers", "nothing"]),
        (changed(rules=[{"layers": " ", "type": "pafu"}]), ["rule 1", "layers"]),
        (changed(rules=[RULE | {"type": "pafo"}]), ["rule 1", "'pafo'", "pafu"]),
        (changed(rules=[RULE | {"type": 3}]), ["rule 1", "type", "3"]),
        (changed(rules=[RULE | {"options": {"group_size": 1}}]), ["rule 1", "group_size", "got 1"]),
        (changed(rules=[RULE | {"options": {"group": 4}}]), ["rule 1", "'group'", "group_size"]),
        (changed(rules=[RULE | {"options": {"group_size": "8"}}]), ["rule 1", "group_size", "'8'"]),
        (changed(seed="0"), ["seed", "'0'"]),
        (changed(versions={"torch": 2}), ["versions", "torch"]),
        (changed(base={"source": "keras"}), ["base", "source", "'keras'"]),
        (changed(base={"source": "timm", "name": "x", "weights": {"kind": "stolen"}}), ["weights", "kind", "'stolen'"]),
        (changed(base={"source": "timm", "name": "x", "input_size": [0], "weights": {}}), ["input_size", "[0]"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place(values: Any, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(values, "my.json")
    assert all(word in str(caught.value) for word in ["my.json", *words]), str(caught.value)


def test_a_newer_version_names_both_versions() -> None:
    with pytest.raises(RecipeError, match=rf"version {VERSION + 1}, newer than version {VERSION} "):
        Recipe.from_dict(changed(version=VERSION + 1, something_new=1))


def test_files_that_are_no_recipes(tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.read(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"format": ')
    with pytest.raises(RecipeError, match=r"bad\.json is not valid JSON.*line 1"):
        Recipe.read(tmp_path / "bad.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Recipe.read(tmp_path / "bytes.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RecipeError, match="not valid JSON"):
        Recipe.read(tmp_path / "deep.json")


def test_a_folder_stands_for_the_recipe_in_it(tmp_path: Any) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(MINIMAL))
    assert Recipe.read(tmp_path) == Recipe.from_dict(MINIMAL)


def test_a_model_carries_its_recipe() -> None:
    model = torch.nn.Identity()
    assert get_recipe(model) is None
    set_recipe(model, None)
    recipe = Recipe.from_dict(MINIMAL)
    set_recipe(model, recipe)
    assert get_recipe(model) is recipe
    set_recipe(model, None)
    assert get_recipe(model) is None


def test_versions_name_what_matters() -> None:
    assert set(versions()) == {"surgeon", "torch", "torchvision", "timm", "python"}
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
