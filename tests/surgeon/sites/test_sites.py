"""What is observed of a model: every convolution, calls, stages, neighbors, and what forbids a replacement."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError, NothingReplacedError, in_terminal
from surgeon.sites.sites import ConvSite, find_sites


def by_name(model: nn.Module, example: object = None, **more: object) -> dict[str, ConvSite]:
    return {s.name: s for s in find_sites(model, example, **more).convs}


def test_resnet18_is_described() -> None:
    sites = by_name(timm.create_model("resnet18"), input_size=64)
    assert len(sites) == 20
    assert {name: s.stage for name, s in sites.items() if name.endswith("0.conv1") or "." not in name} == {
        "conv1": "stem",
        "layer1.0.conv1": "stage1",
        "layer2.0.conv1": "stage2",
        "layer3.0.conv1": "stage3",
        "layer4.0.conv1": "stage4",
    }
    assert [s.name for s in sites.values() if s.first_of_stage] == [f"layer{i}.0.conv1" for i in (1, 2, 3, 4)]
    conv = sites["layer2.0.conv2"]
    assert (conv.calls[0].input, conv.calls[0].output) == ((2, 128, 8, 8), (2, 128, 8, 8))
    assert conv.macs == 128 * 128 * 9 * 64
    assert conv.traced
    assert (conv.producer, conv.followers) == ("ReLU", ("BatchNorm2d", "add"))
    assert all(not s.reasons for s in sites.values())


def test_the_model_is_not_touched() -> None:
    model = timm.create_model("resnet18")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    surgeon.inspect(model, torch.randn(1, 3, 64, 64))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", {"conv1": "stem", "layer1.1.conv2": "stage1", "layer4.0.downsample.0": "stage4"}),
        ("mobilenet_v2", {"features.0.0": "stem", "features.4.conv.1.0": "stage2", "features.18.0": "stage4"}),
        ("densenet121", {"features.conv0": "stem", "features.denseblock4.denselayer1.conv2": "stage4"}),
    ],
)
def test_stages_of_torchvision_models_come_from_output_strides(name: str, stages: dict[str, str]) -> None:
    sites = by_name(torchvision.models.get_model(name, weights=None), input_size=64)
    assert {key: sites[key].stage for key in stages} == stages


def test_a_backbone_and_a_head_are_told_apart() -> None:
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
    sites = by_name(model, input_size=64)
    assert sites["backbone.0.0"].stage == "stem"
    assert sites["backbone.2.block.1.0"].stage == "stage1"
    assert sites["backbone.16.0"].stage == "stage3"
    assert sites["classifier.0.convs.1.0"].stage == "stage3"
    assert sites["backbone.4.block.2.fc1"].stage == "stage2"  # squeeze-and-excitation, on one pixel


class Cifar(nn.Module):
    """Reduces by 4 at most."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        self.layer3 = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return out


def test_small_networks_have_stages_without_a_stem() -> None:
    sites = by_name(Cifar(), torch.randn(1, 3, 32, 32))
    assert [s.stage for s in sites.values()] == ["stage1"] * 3 + ["stage2"] * 2 + ["stage3"] * 2
    assert [s.name for s in sites.values() if s.first_of_stage] == ["layer1.0", "layer2.0", "layer3.0"]


class Odd(nn.Module):
    """Shared, sliced, tied, unused, odd kinds of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.shared
        self.sliced = nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.tied.weight
        self.unused = nn.Conv2d(4, 4, 3, padding=1)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.looked_at = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alias(self.shared(x))
        x = x + F.conv2d(x, self.sliced.weight[:, :, 1:2, 1:2])
        x = self.looked_at(self.other(self.tied(x)).to(self.looked_at.weight.dtype))
        x = x + self.line(x.flatten(2)).view_as(x)
        out: Tensor = self.up(x)
        return out


def test_odd_convolutions_are_listed_with_reasons() -> None:
    sites = by_name(Odd(), torch.randn(1, 4, 8, 8))
    assert list(sites) == ["shared", "sliced", "tied", "other", "unused", "line", "up", "looked_at"]
    assert sites["shared"].aliases == ("alias",)
    assert len(sites["shared"].calls) == 2
    assert sites["shared"].macs == 2 * 4 * 4 * 9 * 64
    assert sites["shared"].reasons == ()
    assert "read outside its own forward, by the model itself" in sites["sliced"].reasons[0]
    assert sites["tied"].reasons == ("its parameters are shared with other.weight",)
    assert sites["other"].reasons == ("its parameters are shared with tied.weight",)
    assert sites["unused"].reasons == ()
    assert sites["unused"].notes == ("the forward pass never reaches it",)
    assert sites["unused"].macs is None
    assert "Conv1d" in sites["line"].reasons[0]
    assert "ConvTranspose2d" in sites["up"].reasons[0]
    assert sites["looked_at"].reasons == ()


def test_a_read_on_an_untaken_path_is_found() -> None:
    reasons = [s.reasons for s in find_sites(timm.create_model("mobilevitv2_050"), input_size=64).convs if s.reasons]
    assert len(reasons) == 9
    assert all("LinearSelfAttention._forward_cross_attn" in reason[0] for reason in reasons)


def test_modules_that_cannot_be_read_are_refused() -> None:
    class Twice(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(super().forward(input))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    model = nn.Sequential(
        Twice(3, 3, 3, padding=1),
        normed,
        nn.LazyConv2d(3, 3, padding=1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1)),
        nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False),
    )
    model[4].weight.data = model[4].weight.data.to(torch.bfloat16)
    model[4].bias.data = model[4].bias.data.to(torch.bfloat16)
    model[4].register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    sites = by_name(model, torch.randn(1, 3, 8, 8))
    assert "not one conv2d" in sites["0"].reasons[0]
    assert "old-style weight_norm" in sites["1"].reasons[0]
    assert "not initialized" in sites["2"].reasons[0]
    assert sites["3"].reasons == ()
    assert "parametrized" in sites["3"].notes[0]
    assert sites["4"].reasons == ()
    assert "hooks move" in sites["4"].notes[0]


def test_an_unbatched_call_is_refused() -> None:
    sites = by_name(nn.Sequential(nn.Conv2d(3, 3, 3)), torch.randn(3, 8, 8))
    assert sites["0"].reasons == ("it is called with an unbatched input (C, H, W)",)


class Branching(nn.Module):
    """Cannot be traced: its path depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) if float(x.sum()) > -1e9 else x
        return out


def test_what_cannot_be_traced_or_run_on_meta_is_still_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), Branching(), nn.Conv2d(3, 3, 3))
    found = find_sites(model, torch.randn(1, 3, 16, 16))
    assert found.seen.device == "real"
    assert [s.name for s in found.convs] == ["0", "1.inner.0", "2"]
    assert all(len(s.calls) == 1 and s.traced for s in found.convs)
    assert found.convs[1].followers == ("BatchNorm2d", "ReLU", "output")
    assert found.convs[0].followers == ("Branching", "Conv2d")


def test_detection_models_are_run_on_a_list_of_images() -> None:
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    sites = by_name(model)
    assert all(s.calls for s in sites.values())
    assert len(sites["rpn.head.conv.0.0"].calls) == 3
    assert sites["backbone.body.0.0"].stage == "stem"


def test_inputs_that_do_not_fit_are_told() -> None:
    model = timm.create_model("resnet18")
    with pytest.raises(InputError, match=r"ResNet does not run on these inputs: \(1, 5, 32, 32\) gave RuntimeError"):
        surgeon.inspect(model, torch.randn(1, 5, 32, 32))
    with pytest.raises(InputError, match="input_size must be"):
        surgeon.inspect(model, input_size=(1, 2, 3, 4))
    with pytest.raises(InputError, match="example_inputs must be"):
        surgeon.inspect(model, "picture.jpg")


def test_what_does_not_run_names_what_to_give_instead() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(InputError, match=r"\({\.\.\.},\) passes a dict as one argument\) or input_size"):
        surgeon.inspect(model, {"image": torch.ones(1, 3, 8, 8)})
    for flags, said in (
        ({"--input-size"}, r" 3 channels: --input-size 3x8x9\.$"),
        (set(), r"but got 1 channels instead$"),
    ):
        with in_terminal(frozenset(flags)), pytest.raises(InputError, match=said):
            surgeon.inspect(model, input_size=(1, 8, 9))
    converted, _ = surgeon.convert(model, "acda", layers="all", input_size=8)
    with pytest.raises(InputError, match=r"Pass calibration=\.\.\. [^.]*that it takes\.$"):
        surgeon.collapse(converted, calibration=torch.ones(1, 1, 8, 8))


def test_dynamic_layers_are_listed_as_such() -> None:
    model, _ = surgeon.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), layers="all", type="pafu", group_size=2)
    found = surgeon.inspect(model)
    (site,) = found
    assert site.dynamic == "pafu"
    assert site.reasons == ("it is already a dynamic layer (pafu)",)
    text = str(found)
    assert text.splitlines()[4].endswith(" is pafu"), "not what it can become"
    assert "it is already a dynamic layer (pafu) (1)" in text


def test_a_site_is_plain_json() -> None:
    import json

    (site,) = surgeon.inspect(nn.Sequential(nn.Conv2d(3, 4, 3)))
    values = json.loads(json.dumps(site.to_dict()))
    assert values["geometry"]["kernel_size"] == [3, 3]
    assert values["calls"][0]["input"] == [2, 3, 224, 224]


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a block"])
def test_a_function_that_calls_what_is_not_copied_with_the_model(inside: bool) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3))
    place = model[0] if inside else model
    own = place.forward
    vars(place)["forward"] = lambda x: 2 * own(x)
    x = torch.randn(1, 3, 8, 8)
    told = "0.forward" if inside else "forward"
    with pytest.raises(NothingReplacedError, match=rf"held outside the module tree too, by {told}, which would keep"):
        surgeon.convert(model, layers="0.0", type="pafu", example_inputs=x)
    expected = model(x)
    changed, report = surgeon.convert(model, layers="0.0", type="pafu", example_inputs=x, inplace=True)
    assert report.replaced
    assert changed is model
    assert torch.allclose(model(x), expected, atol=1e-5)
    with torch.no_grad():
        model[0][0].bias += 1
    assert not torch.allclose(model(x), expected, atol=1e-2)
