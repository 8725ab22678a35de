"""The papers' trainings as files: every recipe is whole, builds its networks and its task, and takes a step on made data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon.zoo as zoo
from surgeon.cli import main
from surgeon.errors import ConfigError, RecipeError
from surgeon.layers.pafu import PAFUConv2d
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.zoo.finetune import FinetuneConfig, dry_run
from surgeon.zoo.finetune.parameters import group_parameters
from surgeon.zoo.finetune.schedule import RunPlan
from surgeon.zoo.recipes import FOLDER, recipe_names, recipes_for, training_recipe
from tests.support.training import task_data

Make = Callable[[Path], dict[str, Any]]

SLOW = {"ad_resnet", "ad_resnet_crowd", "pafu_resnet", "pafu_resnet_cifar", "pspnet"}
# Data of each task, and what makes the samples small enough for them.
DATA: dict[str, tuple[Make, dict[str, Any]]] = {
    "classification": (task_data.class_folders, {}),
    "denoising": (task_data.image_folders, {"patch": 24}),
    "real-denoising": (task_data.noisy_pairs, {"patch": 24, "noisy": "noisy", "clean": "clean"}),
    "super-resolution": (task_data.image_folders, {"patch": 24}),
    "demosaicking": (task_data.image_folders, {"patch": 24}),
    "crowd-counting": (task_data.crowds, {}),
    "segmentation": (task_data.masks, {}),
}


def made_data(task: str, root: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with data of this task, and options for it."""
    make, options = DATA[task]
    made = make(root)
    return made.pop("data"), made | options


def tiers(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


# --- what the files hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_whole(name: str) -> None:
    recipe = training_recipe(name)
    assert "small" in recipe.presets
    assert set(recipe.networks) <= set(zoo.names())
    assert len(recipe.source) > 20
    assert len(recipe.assumed) > 20
    assert recipe.data
    assert recipe.command == f"surgeon finetune --recipe {name} --data DIR"
    for preset in recipe.presets.values():
        assert set(preset.networks) <= set(zoo.names())
        assert preset.summary.endswith(".")
    paper, small = recipe.config(), recipe.with_presets("small").config()
    assert (paper.max_steps or 10**9) > 1000
    assert (small.max_steps or 10**9) <= 1000
    assert paper.new_lr_scale == small.new_lr_scale == 1, "trained from scratch: everything is new"


def test_every_network_of_the_papers_has_its_training() -> None:
    """All that surgery makes of a plain network, all ADFNets, and the two that are made by hand."""
    ours = [n for n in zoo.names() if zoo.entry(n).rules or zoo.entry(n).by_hand or n.startswith("adfnet")]
    assert len(ours) > 30
    assert [name for name in ours if not recipes_for(name)] == []


def test_plain_twins_are_trained_by_the_same_recipe() -> None:
    for name in zoo.names():
        plain = zoo.entry(name).plain
        if plain in zoo.names():
            assert {r.name for r, _ in recipes_for(name)} & {r.name for r, _ in recipes_for(plain)}, name


def test_a_preset_can_lead_to_a_network() -> None:
    assert [(recipe.name, preset) for recipe, preset in recipes_for("adfnet_gray")] == [("adfnet", "gray")]
    assert [(recipe.name, preset) for recipe, preset in recipes_for("linear_sr_x4")] == [("linear_sr", "x4")]
    assert recipes_for("mcnn") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adfnet", {"opt": "adam", "lr": 1e-4, "batch_size": 16, "decay_rate": 0.5, "decay_every": "200000"}),
        ("srcnn", {"opt": "adam", "lr": 1e-4, "batch_size": 16, "max_steps": 300_000}),
        ("linear_sr", {"alternate": 3}),
        ("pspnet", {"opt": "sgd", "lr": 0.01, "sched": "poly", "decay_rate": 0.9, "max_steps": 150_000}),
        ("pafu_resnet", {"opt": "sgd", "lr": 0.1, "batch_size": 256, "epochs": 90, "decay_every": "30ep"}),
    ],
)
def test_what_the_papers_say(name: str, expected: dict[str, Any]) -> None:
    config = training_recipe(name).config().to_dict()
    assert {key: config[key] for key in expected} == expected


def test_patches_and_losses_of_the_papers() -> None:
    options = training_recipe("adfnet").task_options
    assert (options["patch"], options["loss"]) == (128, "mse")
    options = training_recipe("adfnet_real").task_options
    assert (options["patch"], options["loss"]) == (256, "charbonnier")
    for scale in (2, 3, 4):
        recipe = training_recipe("espcnn").with_presets(*([f"x{scale}"] if scale > 2 else []))
        assert recipe.task_options["patch"] == 48 * scale
        assert recipe.model["scale"] == recipe.task_options["scale"] == scale


def test_cifar_rates_fall_where_the_paper_says() -> None:
    """Divided by 10 after 32,000 and 48,000 steps, the warm-up of 400 among them."""
    recipe = training_recipe("pafu_resnet_cifar")
    plan = RunPlan.make(recipe.config(), 50_000, group_parameters(zoo.create("resnet20_cifar")))
    assert plan.total == 64_000
    assert [plan.warmup + milestone for milestone in plan.milestones] == [32_000, 48_000]


# --- building and training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiers(recipe_names()))
def test_small_takes_a_step(name: str, tmp_path: Path) -> None:
    recipe = training_recipe(name).with_presets("small")
    data, options = made_data(recipe.task, tmp_path)
    task = recipe.make_task(data, **options)
    model, base = recipe.make_model(seed=3)
    assert base is not None
    assert (base.source, base.name) == ("zoo", recipe.networks[0])
    assert (base.weights.kind, base.weights.seed) == ("random", 3)
    found = dry_run(model, task, recipe.config(model, batch_size=2))
    assert found.steps == recipe.train["max_steps"]
    assert found.loss == found.loss
    assert all(group["lr_scale"] == 1 for group in found.groups)


@pytest.mark.parametrize("name", tiers(recipe_names()))
def test_paper_scale_is_planned(name: str) -> None:
    """The options of the paper's scale make a plan, phases and all; the network is the small one of the same kind."""
    recipe = training_recipe(name)
    model, _ = recipe.with_presets("small").make_model()
    config = recipe.config(model)
    plan = RunPlan.make(config, 50_000, group_parameters(model))
    assert plan.total > 5_000
    assert plan.per_step == config.batch_size


def test_the_alternation_is_for_networks_with_selectors() -> None:
    recipe = training_recipe("linear_demosaic")
    ours, _ = recipe.make_model()
    plain, _ = recipe.make_model("zoo/linear_demosaic")
    assert any(isinstance(m, PAFUConv2d) for m in ours.modules())
    assert recipe.config(ours).alternate == 3
    assert recipe.config(plain).alternate is None
    assert recipe.config(plain, alternate=2).alternate == 2, "what is asked for is not dropped"


def test_what_is_given_lies_over_the_recipe() -> None:
    recipe = training_recipe("adfnet")
    assert recipe.config(lr=0.5).lr == 0.5
    assert (recipe.config().epochs, recipe.config().max_steps) == (None, 950_000)
    by_epochs = recipe.config(epochs=2.0)
    assert (by_epochs.epochs, by_epochs.max_steps) == (2.0, None)
    by_steps = training_recipe("lenet").config(max_steps=7)
    assert (by_steps.epochs, by_steps.max_steps) == (None, 7)
    other = recipe.config(sched="cosine")
    assert (other.sched, other.decay_rate, other.decay_every) == ("cosine", None, None)
    assert recipe.config(sched="step").decay_every == "200000"
    assert training_recipe("pafu_resnet_cifar").config(sched="constant").milestones == ()
    both = training_recipe("lenet").config(epochs=1.0, max_steps=7)
    assert (both.epochs, both.max_steps) == (1.0, 7)


def test_seeds_give_other_weights() -> None:
    recipe = training_recipe("linear_sr")
    first, second, again = (next(iter(recipe.make_model(seed=seed)[0].state_dict().values())) for seed in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_options_of_the_recipe_are_for_its_own_networks() -> None:
    recipe = training_recipe("adfnet").with_presets("small")
    assert sum(p.numel() for p in recipe.make_model()[0].parameters()) < 1e6
    model, _ = recipe.make_model("zoo/dncnn_color", weights="random")
    assert len([m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]) == 20


# --- bad files --------------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, **values: Any) -> Path:
    document = json.loads((FOLDER / "lenet.json").read_text()) | values
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return path


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    recipe = training_recipe(changed(tmp_path, networks=["resnet20_cifar"]))
    assert recipe.networks == ("resnet20_cifar",)
    assert recipe.config() == training_recipe("lenet").config()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"format": "surgeon-recipe"}, "is no training recipe"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"tasks": "x"}, "has no key 'tasks'"),
        ({"task": "sorting"}, "unknown task 'sorting'"),
        ({"train": {"learning_rate": 1}}, "no option learning_rate"),
        ({"train": {"lr": -1}}, "lr must be a number > 0, got -1"),
        ({"task_options": {"sigma": 5}}, "task classification has no option 'sigma'"),
        ({"networks": []}, "networks must name at least one"),
        ({"networks": "lenet"}, "networks must be a list of names, got 'lenet'"),
        ({"presets": {"small": {"train": {"sched": "up"}}}}, "preset small: sched must be one of"),
        ({"presets": {"small": {"lr": 1}}}, "preset small has no key 'lr'"),
        ({"summary": None}, "summary must be a text, got None"),
        ({"model": [1]}, "model must be a JSON object"),
    ],
)
def test_wrong_recipes_are_named(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        training_recipe(changed(tmp_path, **values))


def test_unknown_names() -> None:
    with pytest.raises(RecipeError, match=r"no training recipe 'adfnett'.*Did you mean 'adfnet'"):
        training_recipe("adfnett")
    with pytest.raises(RecipeError, match="cannot read"):
        training_recipe("nowhere.json")
    with pytest.raises(ConfigError, match="recipe espcnn has no preset 'x5'; it has x3, x4, small"):
        training_recipe("espcnn").with_presets("x5")


# --- the command ------------------------------------------------------------------------------------------------------


def test_finetune_by_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, _ = made_data("super-resolution", tmp_path / "data")
    short = ["--max-steps", "4", "--batch-size", "2", "--task-option", "patch=12", "--quiet"]
    call = ["finetune", "--recipe", "linear_sr", "--preset", "x3", "small", "--data", str(data), *short]
    assert main([*call, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == "runs/pafu_linear_sr_x3-linear_sr"
    assert document["steps"] == 4
    run = json.loads(Path("runs/pafu_linear_sr_x3-linear_sr/training/run.json").read_text())
    assert run["config"]["alternate"] == 3
    recorded = json.loads(Path("runs/pafu_linear_sr_x3-linear_sr/recipe.json").read_text())["base"]
    assert recorded["name"] == "pafu_linear_sr_x3"
    import surgeon

    assert dynamic_layers(surgeon.load("runs/pafu_linear_sr_x3-linear_sr"))
    twin = ["finetune", "zoo/linear_sr_x3", *call[1:]]
    assert main([*twin, "--seed", "1"]) == 0
    assert "written to  runs/linear_sr_x3-linear_sr" in capsys.readouterr().out
    assert main([*twin, "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out


def test_further_options_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = made_data("denoising", tmp_path)
    call = ["finetune", "--recipe", "adfnet_backbones", "--preset", "small", "--data", str(data), "--dry-run", "--json"]
    numbers = []
    for depth in (5, 7):
        assert main([*call, "--model-args", f"depth={depth}", "--task-option", "patch=16", "--batch-size", "2"]) == 0
        numbers.append(json.loads(capsys.readouterr().out)["cost"]["params"])
    assert numbers[1] - numbers[0] == 2 * (9 * 16 * 16 + 2 * 16)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "RUN|MODEL must be given, and --task; or --recipe NAME"),
        (["zoo/lenet"], "--task must be given: zoo/lenet does not record a task"),
        (["zoo/lenet", "--task", "classification", "--preset", "small"], "--preset small is a preset of a recipe"),
        (["--recipe", "lenet", "--task", "denoising"], "is for the task classification, got --task denoising"),
        (["--recipe", "lenet", "--preset", "tiny"], "has no preset 'tiny'"),
        (["--recipe", "lenett"], "Did you mean 'lenet'"),
        (["--recipe", "lenet", "--task-option", "sigma=3"], "has no option 'sigma'"),
        (
            ["--recipe", "lenet", "--sched", "cosine", "--milestones", "50%"],
            "milestones and the schedule multistep need each other",
        ),
        (["--recipe", "lenet", "--model-args", "width=3", "--data", "."], "width=3"),
    ],
)
def test_bad_calls(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", *arguments, "-o", str(tmp_path / "out")]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert told in error, error
    assert not (tmp_path / "out").exists()


def test_the_zoo_names_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "pafu_linear_sr_x3"]) == 0
    out = capsys.readouterr().out
    assert "surgeon finetune zoo/pafu_linear_sr_x3 --recipe linear_sr --preset x3 --data DIR" in out
    assert "surgeon convert --recipe zoo/pafu_linear_sr_x3" in out
    assert main(["zoo", "rdn_mdcb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"][0]["recipe"] == "adfnet_backbones"
    assert "dense block" in found["by_hand"]


# --- surgery by a network's name --------------------------------------------------------------------------------------


def test_converting_by_the_name_of_a_zoo_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["convert", "zoo/linear_sr_x2", "--recipe", "zoo/pafu_linear_sr_x2", "--weights", "random"]
    assert main([*arguments, "-o", str(out), "--quiet"]) == 0
    import surgeon

    shapes = {key: value.shape for key, value in surgeon.load(out).state_dict().items()}
    assert shapes == {key: value.shape for key, value in zoo.create("pafu_linear_sr_x2").state_dict().items()}
    capsys.readouterr()
    assert main(["convert", "zoo/dncnn", "--recipe", "zoo/dncnn_dconv", "--dry-run"]) == 2
    assert (
        "no recipe makes zoo/dncnn_dconv from another network: the DConv replaces a convolution"
        in capsys.readouterr().err
    )
    assert main(["convert", "zoo/dncnn", "--recipe", "zoo/dncn", "--dry-run"]) == 2
    assert "Did you mean dncnn" in capsys.readouterr().err


def test_defaults_are_as_before() -> None:
    config = FinetuneConfig()
    assert (config.epochs, config.max_steps, config.decay_rate, config.decay_every, config.milestones) == (
        10.0,
        None,
        None,
        None,
        (),
    )
