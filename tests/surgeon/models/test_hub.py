"""Model cards, and folders on the Hub: what goes up, what comes down, and one clear error for everything that may fail.

The Hub's client is real; only the calls that would write to its servers are replaced, by ones that fill the client's own cache.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, errors
from PIL import Image
from torch import nn

import surgeon
from surgeon.cli import main
from surgeon.errors import CheckpointError, ConfigError, HubError
from surgeon.models.checkpoint import save
from surgeon.models.hub import FILES, fetch
from surgeon.records.card import PLACE, license_of, model_card
from surgeon.records.recipe import BaseModel, Recipe, Rule, Trained, Weights, get_recipe, set_recipe
from surgeon.records.report import Report
from surgeon.util.files import inside
from tests.support.tiny_runs import X, contents, tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories that lie in the client's cache, as it lays them out: names are links to blobs."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.made: list[tuple[str, bool | None]] = []
        self.commits: list[dict[str, Any]] = []
        self.cards: set[str] = set()

    def put(self, repo_id: str, files: dict[str, bytes]) -> Path:
        home = self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = home / "snapshots" / COMMIT
        for folder in (home / "blobs", home / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(COMMIT)
        for name, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            (home / "blobs" / digest).write_bytes(content)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(Path("..", "..", "blobs", digest))
        return snapshot

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.made.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> Any:
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        self.put(repo_id, files)
        self.commits.append({"repo_id": repo_id, "files": files, **options})
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{COMMIT}", pr_url="https://hub/pr/1")

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return repo_id in self.cards and filename == "README.md"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(made.cache))
    for call in (made.create_repo, made.create_commit, made.file_exists):
        monkeypatch.setattr(huggingface_hub.HfApi, call.__name__, staticmethod(call))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tiny(), tmp_path / "run")
    return tmp_path / "run"


# --- the card -----------------------------------------------------------------------------------------------------------


def pretrained_recipe() -> Recipe:
    weights = Weights(kind="pretrained", path="timm/resnet18.a1_in1k")
    base = BaseModel(source="timm", name="resnet18.a1_in1k", weights=weights)
    return Recipe(rules=(Rule(layers="layer4.0.conv2", type="acda", options={"atoms": 4, "scales": 3}),), base=base)


def test_the_metadata_are_what_the_hub_reads() -> None:
    card = ModelCard(model_card(pretrained_recipe()))
    assert card.data.to_dict() == {
        "library_name": "surgeon",
        "base_model": "timm/resnet18.a1_in1k",
        "license": "apache-2.0",
        "tags": ["surgeon", "dynamic-convolution", "acda", "timm"],
    }


@pytest.mark.parametrize(
    ("name", "stated", "terms"),
    [
        ("convnextv2_tiny.fcmae", "cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ("mobilevitv2_050.cvnets_in1k", "cvnets-license", {"license": "other", "license_name": "cvnets-license"}),
    ],
)
def test_the_license_is_that_of_the_base(name: str, stated: str, terms: dict[str, str]) -> None:
    recipe = pretrained_recipe()
    assert recipe.base is not None
    recipe = replace(recipe, base=replace(recipe.base, name=name))
    assert license_of(recipe.base) == stated
    data = ModelCard(model_card(recipe)).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == terms


def test_random_weights_have_no_license_of_others() -> None:
    base = BaseModel(source="timm", name="resnet18", weights=Weights(kind="random", seed=3))
    text = model_card(Recipe(rules=(), base=base))
    assert "license" not in ModelCard(text).data.to_dict()
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "random ones of seed 3" in text
    assert "license of its weights" not in text


def test_the_card_of_a_conversion_has_layers_and_costs(tmp_path: Path) -> None:
    model, report = surgeon.convert(tiny(), layers="layer3.0.conv1", type="acda", atoms=4, input_size=64)
    save(model, tmp_path / "run", report=report)
    text = (tmp_path / "run" / "README.md").read_text()
    (entry,) = report.replaced
    row = next(line for line in text.splitlines() if line.startswith("| `layer3.0.conv1`"))
    assert row.count(" | ") == 8
    assert "acda m4 S3" in row
    assert f"{entry.geometry['in_channels']}\\>{entry.geometry['out_channels']} 1x1" in row
    assert f"x{report.params_after / report.params_before:.2f}" in text
    assert "\n| FLOPs in convolutions for one image of 3x64x64 | " in text
    assert "FLOPs are for one image of 3x64x64 (1 MAC = 2 FLOPs)" in text
    assert "| `layer4.0.conv1` | pafu n3 | - |" in text, "layers of an earlier conversion, without numbers"
    code = text.partition("```python\n")[2].partition("```")[0].replace(PLACE, str(tmp_path / "run"))
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["outputs"].shape == (1, 1000)
    assert len([line for line in code.splitlines() if line]) == 4


def test_a_card_says_how_its_inputs_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example ran on noise, and neither mean nor crop was in it."""
    model = surgeon.open_model("test_resnet", weights="random", num_classes=3)
    recipe = get_recipe(model)
    assert recipe is not None
    inputs = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "crop_mode": "squash"}
    set_recipe(model, replace(recipe, task=Trained(name="classification", inputs=inputs)))
    save(model, tmp_path / "run")
    code = (tmp_path / "run" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    made = "create_transform(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), crop_mode='squash')"
    assert made in code
    assert "randn" not in code
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), (255, 0, 128)).save("photo.jpg")
    scope: dict[str, Any] = {}
    exec(compile(code.replace(PLACE, "run"), "README.md", "exec"), scope)
    assert scope["outputs"].shape == (1, 3)


def test_a_card_names_published_weights_only_where_they_are() -> None:
    def card(kind: str) -> str:
        base = BaseModel(source="timm", name="resnet18.a1_in1k", weights=Weights(kind=kind, path="mine.pth", seed=1))
        return model_card(Recipe(rules=(), base=base))

    for kind in ("given", "file", "random"):
        assert "a1_in1k" not in card(kind)
        assert "- base model: `resnet18` (timm)" in card(kind)
    assert "- base model: `resnet18.a1_in1k` (timm)" in card("pretrained")


def test_a_card_without_measured_errors_has_no_column_for_them(tmp_path: Path) -> None:
    model, report = surgeon.convert(tiny(), layers="layer3.0.conv1", type="acda", atoms=4, input_size=64, check=False)
    save(model, tmp_path / "run", report=report)
    text = (tmp_path / "run" / "README.md").read_text()
    assert "nan" not in text
    assert "| error |" not in text
    assert "nan" not in (tmp_path / "run" / "report.txt").read_text()


def test_names_of_strangers_are_no_markup() -> None:
    rules = (Rule(layers=json.dumps("a|b`<script>\n# c"), type="acda", options={"atoms": 4, "scales": 3}),)
    base = BaseModel(source="factory", name="x:y\n---\n# z", weights=Weights(kind="given"))
    text = model_card(Recipe(rules=rules, base=base, versions={"torch": "<b>|\n# x"}))
    assert "\n# c" not in text
    assert "\n# z" not in text
    assert "\n# x" not in text
    assert "| `a\\|b'<script> # c` |" in text
    assert "\\<b\\>" in text
    assert "trust_factory=True" in text


def test_a_card_lists_the_classes(tmp_path: Path) -> None:
    model = surgeon.open_model("test_resnet", weights="random", num_classes=3)
    recipe = get_recipe(model)
    assert recipe is not None
    set_recipe(model, replace(recipe, classes=("cat", "hot|dog", "<b>")))
    surgeon.save(model, tmp_path / "run")
    assert "- 3 outputs, in this order: cat, hot\\|dog, \\<b\\>\n" in (tmp_path / "run" / "README.md").read_text()
    text = model_card(replace(recipe, classes=tuple(f"class{number}" for number in range(1000))))
    (line,) = [line for line in text.splitlines() if line.startswith("- 1000 outputs, in this order: class0, class1, ")]
    shown = line.count("class")
    assert line.endswith(f"class{shown - 1} and {1000 - shown} more, in `recipe.json`")


def test_a_card_may_be_edited_or_gone(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    surgeon.load(saved)
    assert "README.md" not in json.loads((saved / "recipe.json").read_text())["artefact"]["files"]
    (saved / "README.md").unlink()
    surgeon.load(saved)


def test_a_model_that_nobody_can_build_says_how_it_loads(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

    save(Own(), tmp_path / "own")
    assert 'from_pretrained("path/of/this/folder", base=model)' in (tmp_path / "own" / "README.md").read_text()


# --- up and down ----------------------------------------------------------------------------------------------------------


def test_a_folder_goes_up_and_comes_down(hub: Hub, saved: Path) -> None:
    (saved / "training").mkdir()
    (saved / "training" / "secret.pkl").write_bytes(b"x")
    (saved / "notes.txt").write_text("mine")
    address = surgeon.push_to_hub(saved, "me/net", private=True, commit_message="first", revision="dev")
    assert address == f"https://hub/me/net/commit/{COMMIT}"
    assert hub.made == [("me/net", True)]
    (commit,) = hub.commits
    assert sorted(commit["files"]) == ["README.md", "model.safetensors", "recipe.json"]
    assert (commit["commit_message"], commit["revision"], commit["create_pr"]) == ("first", "dev", False)
    assert 'surgeon.from_pretrained("me/net")' in commit["files"]["README.md"].decode()
    for name in ("me/net", "hf-hub:me/net"):
        back = surgeon.from_pretrained(name)
        assert torch.equal(back(X), surgeon.load(saved)(X))
        assert not back.training
    assert torch.equal(surgeon.from_pretrained(saved)(X), back(X))
    assert torch.equal(surgeon.from_pretrained("me/net", revision=COMMIT, cache_dir=hub.cache)(X), back(X))


def test_a_model_goes_up_and_leaves_the_card_that_is_there(hub: Hub) -> None:
    model = tiny()
    report = Report(replaced=[], skipped=[], model="test_resnet")
    assert surgeon.push_to_hub(model, "me/net", report=report, create_pr=True) == "https://hub/pr/1"
    assert sorted(hub.commits[0]["files"]) == sorted(set(FILES) - {"program.pt2"})
    assert torch.equal(surgeon.from_pretrained("me/net")(X), model(X))
    hub.cards.add("me/net")
    surgeon.push_to_hub(model, "me/net")
    assert sorted(hub.commits[1]["files"]) == ["model.safetensors", "recipe.json"]


def test_a_program_in_the_cache_is_a_link_to_its_blob(hub: Hub, tmp_path: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
    torch.export.save(torch.export.export(conv, (torch.randn(2, 3, 16, 16),)), tmp_path / "m.pt2")
    assert main(["convert", "m.pt2", "--layers", "all", "--type", "pafu", "-o", "run", "--quiet"]) == 0
    surgeon.push_to_hub("run", "me/program")
    assert "program.pt2" in hub.commits[0]["files"]
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(surgeon.from_pretrained("me/program")(x), conv(x), atol=1e-5)


def test_links_that_only_look_like_the_caches_are_refused(tmp_path: Path) -> None:
    snapshot = tmp_path / "home" / "snapshots" / "c"
    snapshot.mkdir(parents=True)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("x")
    (tmp_path / "home" / "blobs").symlink_to(tmp_path / "secrets")
    (snapshot / "program.pt2").symlink_to(tmp_path / "home" / "blobs" / "key")
    with pytest.raises(CheckpointError, match="links are not followed"):
        inside(snapshot, "program.pt2")


def test_commands_take_repositories_for_folders(
    hub: Hub, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = surgeon.models.names.build_model("test_resnet", weights="random")
    model, report = surgeon.convert(model, layers="stage4", type="pafu", inplace=True, input_size=64)
    save(model, "mine", base=base, report=report)
    assert main(["push", "mine", "me/net", "--private", "--message", "m", "--quiet"]) == 0
    assert f"pushed to   https://hub/me/net/commit/{COMMIT}" in capsys.readouterr().out
    assert main(["push", "mine", "me/net", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["repo_id"] == "me/net"
    assert main(["verify", "hf-hub:me/net", "--input-size", "64", "--quiet"]) == 0
    assert "hf-hub:me/net computes what the original computes" in capsys.readouterr().out
    assert main(["inspect", "hf-hub:me/net", "--input-size", "64"]) == 0
    assert "hf-hub:me/net: 15 convolutions" in capsys.readouterr().out
    assert main(["revert", "hf-hub:me/net", "-o", "plain"]) == 0
    assert main(["cost", "hf-hub:me/net", "--infer", "--input-size", "64", "--compare", "--quiet"]) == 0
    assert main(["inspect", "hf-hub:me/net", "--weights", "random"]) == 2
    assert "hf-hub:me/net is a surgeon folder" in capsys.readouterr().err


# --- what may fail --------------------------------------------------------------------------------------------------------


def test_no_token_is_said_before_anything_goes_out(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", "run", "me/net", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "requires a token: log in (`hf auth login`), or set HF_TOKEN; create" in line
    assert hub.made == []
    surgeon.push_to_hub(saved, "me/net", token="hf_given")
    assert hub.made


def test_what_is_no_whole_folder_is_not_pushed(hub: Hub, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no surgeon folder nowhere"):
        surgeon.push_to_hub("nowhere", "me/net")
    (saved / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is damaged"):
        surgeon.push_to_hub(saved, "me/net")
    with pytest.raises(ConfigError, match="apply to a model"):
        surgeon.push_to_hub(saved, "me/net", report=Report(replaced=[], skipped=[]))
    assert hub.made == []


def test_other_repositories_are_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/other", {"recipe.json": b'{"cake": 1}', "model.bin": b"x"})
    with pytest.raises(CheckpointError, match="me/other is not a surgeon repository: its recipe"):
        surgeon.from_pretrained("me/other")
    with pytest.raises(CheckpointError, match="me/absent: it is not in the cache, and the Hub cannot be reached"):
        surgeon.from_pretrained("me/absent")
    with pytest.raises(CheckpointError, match="a repository on the Hub is named ORG/NAME"):
        surgeon.from_pretrained("absent")
    monkeypatch.chdir(tmp_path)
    Path("runs/there").mkdir(parents=True)
    Path("runs/there/recipe.json").touch()
    with pytest.raises(
        HubError, match=r"^there is no folder runs/here\. Did you mean .?runs/there.*\? On the Hub, hf-hub:"
    ):
        surgeon.from_pretrained("runs/here")
    with pytest.raises(CheckpointError, match="expected a repository ORG/NAME"):
        surgeon.from_pretrained("hf-hub:a/b/c")
    with pytest.raises(ConfigError, match="has no revision"):
        surgeon.from_pretrained(tmp_path, revision="main")


def test_damage_on_the_way_is_found(hub: Hub, saved: Path) -> None:
    hub.put("me/net", contents(saved) | {"model.safetensors": b"x" * 100})
    with pytest.raises(CheckpointError, match="is damaged"):
        surgeon.from_pretrained("me/net")


def test_a_repository_of_timm_stays_one(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "hf-hub:timm/resnet18.a1_in1k"]) == 2
    assert "hf-hub:timm/resnet18.a1_in1k is unavailable: not in the cache" in capsys.readouterr().err
    assert main(["verify", "hf-hub:timm/resnet18.a1_in1k", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it is not in the cache, and the Hub cannot be reached" in line


def answer(kind: type[Exception], status: int) -> Exception:
    return kind("the server's words", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (errors.RepositoryNotFoundError, "there is no such repository on the Hub, or it is private"),
        (errors.GatedRepoError, "request access on its page"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.RemoteEntryNotFoundError, "is not a surgeon repository: it has no recipe.json"),
        (errors.HfHubHTTPError, "the Hub answers 403: the server's words; the token lacks permission"),
        (OSError, "OSError: no space left"),
    ],
)
def test_answers_of_the_hub_are_one_clear_error(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], told: str
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise answer(kind, 403) if issubclass(kind, errors.HfHubHTTPError) else kind("no space left")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=told) as raised:
        fetch("me/net")
    assert str(raised.value).startswith("hf-hub:me/net")
    assert "\n" not in str(raised.value)


def test_the_recipe_of_a_fetched_model_is_its_own(hub: Hub, saved: Path) -> None:
    model = surgeon.load(saved)
    surgeon.push_to_hub(model, "me/net")
    found, own = get_recipe(surgeon.from_pretrained("me/net")), get_recipe(model)
    assert found is not None
    assert own is not None
    assert found.rules == own.rules
