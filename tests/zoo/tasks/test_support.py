"""The parts that tasks share: files and splits, draws, batches of different sizes, noise, metrics, pictures."""

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from surgeon.errors import ConfigError, DataError
from surgeon.util.parse import number_range
from surgeon.zoo.tasks import create_task
from surgeon.zoo.tasks.data import files, images
from surgeon.zoo.tasks.data.draws import global_seed, turned, turned_back
from surgeon.zoo.tasks.data.files import (
    FolderConfig,
    check_images,
    divide,
    find_roots,
    limited,
    list_images,
    look_through,
    open_image,
)
from surgeon.zoo.tasks.data.images import by_size, collate_padded, luma, on_multiple, unpadded
from surgeon.zoo.tasks.support.metrics import eight_bit, image_mean, pixel_loss, psnr, ssim
from surgeon.zoo.tasks.support.noise import gaussian, heteroskedastic
from surgeon.zoo.tasks.support.pictures import heat, labels_image, sheet, to_image
from tests.support.training.task_data import photo

# --- files and splits -------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_divided_set_falls_into_two_parts(count: int, fraction: float, seed: int) -> None:
    train, val = (divide(count, split, fraction, seed) for split in ("train", "val"))
    assert sorted(train + val) == list(range(count))
    assert len(val) == min(max(math.floor(count * fraction), 1), count - 1)


def test_a_division_follows_its_seed_and_keeps_the_shares_of_groups() -> None:
    assert divide(100, "val", 0.2, 0) == divide(100, "val", 0.2, 0) != divide(100, "val", 0.2, 1)
    groups = [0] * 60 + [1] * 30 + [2] * 10
    val = divide(100, "val", 0.2, 0, groups)
    assert [sum(groups[index] == group for index in val) for group in range(3)] == [12, 6, 2]


@given(st.integers(1, 100), st.integers(1, 120))
def test_a_limit_keeps_samples_spread_evenly(count: int, limit: int) -> None:
    kept = limited(range(count), limit)
    assert len(kept) == min(count, limit)
    gaps = np.diff(kept)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_the_folders_of_the_splits(tmp_path: Path) -> None:
    for name in ("both/train", "both/val", "one", "half/train", "wrong/val"):
        (tmp_path / name).mkdir(parents=True)
    both, one = tmp_path / "both", tmp_path / "one"
    roots = find_roots("t", FolderConfig(data=both))
    assert (roots.train, roots.val, roots.divided) == (both / "train", both / "val", False)
    assert find_roots("t", FolderConfig(data=one)).divided
    assert find_roots("t", FolderConfig(train=one)).divided
    for options, why in (
        ({"val": one}, "only val=.*one was given"),
        ({"data": tmp_path / "wrong"}, "wrong has val/ but no train/"),
    ):
        roots = find_roots("t", FolderConfig(**options))
        assert roots.of("val").is_dir()
        with pytest.raises(
            DataError, match=rf"task t has no training images: .*{why}; name a folder with train=FOLDER"
        ):
            roots.of("train")
    roots = find_roots("t", FolderConfig(data=both, val=one))
    assert (roots.train, roots.val) == (both / "train", one)
    assert find_roots("t", FolderConfig(data=str(one), val=both)).train == one
    for options, message in [
        ({}, "needs a folder"),
        ({"data": tmp_path / "none"}, "no folder .*none"),
        ({"data": tmp_path / "half"}, "has train/ but no val/"),
        ({"data": one, "train": both}, "has no val/"),
    ]:
        with pytest.raises(DataError, match=message):
            find_roots("t", FolderConfig(**options))


def test_splits_in_images_and_splits_that_would_be_mixed(tmp_path: Path) -> None:
    for name in ("a/images/train", "a/images/val", "b/data/images/Train", "b/data/images/Valid", "c/train", "c/valid"):
        (tmp_path / name).mkdir(parents=True)
    roots = find_roots("t", FolderConfig(data=tmp_path / "a"))
    assert (roots.train, roots.val) == (tmp_path / "a/images/train", tmp_path / "a/images/val")
    folder = tmp_path / "b/data/images"
    told = f"would be mixed and divided at random; name them with train={folder}/Train val={folder}/Valid"
    with pytest.raises(DataError, match=re.escape(told)):
        find_roots("t", FolderConfig(data=tmp_path / "b"))
    named = FolderConfig(data=tmp_path / "b", train=folder / "Train", val=folder / "Valid")
    assert find_roots("t", named).val == folder / "Valid"
    with pytest.raises(
        DataError, match=f"has train/ but no val/; name one with val={re.escape(str(tmp_path))}/c/valid"
    ):
        find_roots("t", FolderConfig(data=tmp_path / "c"))


@pytest.mark.parametrize("options", [{"val_fraction": 0}, {"val_fraction": 1.5}, {"train_limit": 0}])
def test_wrong_options_of_folders(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        FolderConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": "abc"}, "patch must be an integer or none, got 'abc'"),
        ({"patch": 3.5}, "patch must be an integer or none"),
        ({"augment": "yes"}, "augment must be true or false, got 'yes'"),
        ({"multiple": True}, "multiple must be an integer, got True"),
        ({"val_fraction": "0.1"}, "val_fraction must be a number"),
        ({"train_limit": "3"}, "train_limit must be an integer or none"),
        ({"input_size": (3, 4)}, r"input_size must be a list of 3, such as \[3,64,64\]"),
        ({"input_size": (3, 4, 5)}, "input_size must be square"),
        ({"mean": ("a",)}, "mean must be a list"),
        ({"data": 3}, "data must be a path or none"),
        ({"sigma": None}, "sigma must be a number or a text"),
    ],
)
def test_options_of_the_wrong_type_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_task("denoising", **options)


def test_options_may_be_written_as_people_do() -> None:
    config = create_task(
        "denoising", data="photos", val_seed=1, val_sigma=25, input_size=[3, 8, 8], sigma="0-55"
    ).config
    assert config.data == Path("photos")


def test_images_are_found_below_a_folder_without_hidden_ones(tmp_path: Path) -> None:
    photo(tmp_path / "b/2.png", 8, 8)
    photo(tmp_path / "1.JPG", 8, 8)
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs/3.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    assert [path.name for path in list_images(tmp_path)] == ["1.JPG", "2.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        list_images(tmp_path / "empty")


def test_corrupt_images_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    good = [photo(tmp_path / f"good{index}.png", 20, 20) for index in range(3)]
    bad = [tmp_path / f"bad{index}.png" for index in range(7)]
    for path in bad[:6]:
        path.write_bytes(b"no image")
    bad[6].write_bytes(good[0].read_bytes()[:300])  # the header is there, the pixels are not
    with pytest.raises(DataError) as caught:
        check_images("t", [*good, *bad])
    message = str(caught.value)
    assert "(7)" in message
    assert all(str(path) in message for path in bad[:5])
    assert str(bad[5]) not in message
    assert "and 2 more" in message
    check_images("t", good)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png", 20, 20)
    check_images("t", [path])
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png"):
        check_images("t", [path])


def test_of_large_sets_a_part_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [photo(tmp_path / f"{index}.png", 12, 12) for index in range(9)]
    decoded: list[Path] = []
    monkeypatch.setattr(files, "DECODED", 3)
    monkeypatch.setattr(files, "open_image", lambda path: decoded.append(path))
    check_images("t", paths)
    assert decoded == [paths[2], paths[5], paths[8]]
    paths[0].write_bytes(b"no image")  # the headers of the others are read
    with pytest.raises(DataError, match=r"0\.png"):
        check_images("t", paths)


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="8 bits"):
        open_image(tmp_path / "deep.png")


def test_readers_keep_images_and_leave_them_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [photo(tmp_path / f"{index}.png", 10, 10, index) for index in range(3)]
    monkeypatch.setattr(images, "CACHE_BYTES", 600)
    reader = images.Reader("RGB")
    first = [reader(path) for path in paths]
    assert [reader(path) is image for path, image in zip(paths, first, strict=True)] == [True, True, False]
    assert pickle.loads(pickle.dumps(reader))(paths[0]) is not first[0]
    assert len(pickle.dumps(reader)) < 300


def test_transparent_palettes_are_read(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=b"\xff\x80")
    assert images.Reader("RGB")(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


def test_progress_is_shown_on_stderr_only_when_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    look_through("nothing", range(10), lambda item: None)
    assert capsys.readouterr() == ("", "")


# --- draws and tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(8))
def test_every_symmetry_has_its_inverse(turn: int) -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(turned_back(turned(x, turn), turn), x)


def test_the_symmetries_are_the_eight_of_the_square() -> None:
    x = torch.arange(9.0).view(3, 3)
    assert len({tuple(turned(x, turn).flatten().tolist()) for turn in range(8)}) == 8


def test_global_draws_follow_the_generator() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        import random

        with global_seed(torch.Generator().manual_seed(seed)):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1) == draw(1)
    assert all(a != b for a, b in zip(draw(1), draw(2), strict=True))


def test_images_of_different_sizes_in_one_batch_are_run_as_if_alone() -> None:
    samples = [{"input": torch.randn(1, h, w), "count": torch.tensor(1.0)} for h, w in ((5, 7), (6, 4), (5, 7))]
    batch = collate_padded(samples, {"input": 9.0})
    assert batch["input"].shape == (3, 1, 6, 7)
    assert batch["input_size"].tolist() == [[5, 7], [6, 4], [5, 7]]
    assert (batch["input"][1, 0, :, 4:] == 9).all()
    seen = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x.cumsum(-1).repeat_interleave(2, -2)

    out = by_size(run, batch["input"], batch["input_size"])
    assert sorted(seen) == [(1, 1, 6, 4), (2, 1, 5, 7)]
    for sample, one in zip(samples, unpadded(out, batch["input_size"] * torch.tensor([2, 1])), strict=True):
        assert torch.equal(one[0], run(sample["input"][None])[0])


def test_a_multiple_is_filled_up_and_cut_off() -> None:
    x = torch.randn(1, 1, 5, 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-2] % 4 == x.shape[-1] % 4 == 0
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    out = on_multiple(run, x, 4, scale=2)
    assert torch.equal(out[..., ::2, ::2], x)
    assert out.shape == (1, 1, 10, 16)


# --- noise and metrics ------------------------------------------------------------------------------------------------


def test_noise_has_the_stated_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.full((400, 400), 0.25)
    assert (gaussian(x, 0.1, generator) - x).std().item() == pytest.approx(0.1, rel=0.01)
    noise = heteroskedastic(x, 0.01, 0.02, generator) - x
    assert noise.std().item() == pytest.approx(math.sqrt(0.01 * 0.25 + 0.02**2), rel=0.01)


def test_ranges_of_numbers() -> None:
    assert number_range("s", 25) == (25, 25)
    assert number_range("s", "0-55") == (0, 55)
    assert number_range("s", "1e-4-1e-2") == (1e-4, 1e-2)
    for wrong in ("-3", "55-0", "a", "1-2-3", ""):
        with pytest.raises(ConfigError, match="s must be a number"):
            number_range("s", wrong)


def test_psnr_is_that_of_each_image_by_hand() -> None:
    target = torch.zeros(2, 3, 8, 8)
    output = target.clone()
    output[0] += 0.1
    output[1, :, :4] -= 0.5  # clipped to 0: no error
    output[1, :, 4:] += 0.2
    assert psnr(output, target).tolist() == pytest.approx([20.0, -10 * math.log10(0.02)], abs=1e-4)


def test_ssim_of_flat_images_and_of_an_image_with_itself_by_hand() -> None:
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.7)
    c1 = 0.01**2
    assert ssim(a, b).item() == pytest.approx((2 * 0.5 * 0.7 + c1) / (0.5**2 + 0.7**2 + c1), abs=1e-5)
    x = torch.rand(2, 3, 20, 20)
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_ssim_takes_windows_inside_the_image() -> None:
    """Against the definition, window by window, in float64."""
    x, y = torch.rand(13, 14, dtype=torch.float64), torch.rand(13, 14, dtype=torch.float64)
    g = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    w = torch.outer(g, g) / torch.outer(g, g).sum()
    values = []
    for i in range(3):
        for j in range(4):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * a * a).sum() - ma**2, (w * b * b).sum() - mb**2, (w * a * b).sum() - ma * mb
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    expected = torch.stack(values).mean().item()
    assert ssim(x[None, None].float(), y[None, None].float()).item() == pytest.approx(expected, abs=1e-4)


def test_a_nan_does_not_vanish_from_a_mean() -> None:
    metric = image_mean()
    metric.update(torch.tensor([1.0, float("nan")]))
    assert metric.compute().isnan()


def test_losses_by_hand() -> None:
    output, target = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert pixel_loss("l1", output, target).item() == 1.5
    assert pixel_loss("mse", output, target).item() == 2.5
    assert pixel_loss("charbonnier", target, target).item() == pytest.approx(1e-3)


def test_luma_is_studio_range() -> None:
    white, black = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    assert luma(white).item() * 255 == pytest.approx(235, abs=1e-3)
    assert luma(black).item() * 255 == pytest.approx(16, abs=1e-3)
    assert eight_bit(torch.tensor([0.5, 1.2, -1])).tolist() == pytest.approx([128 / 255, 1, 0])


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_sheet_holds_its_pictures_in_rows() -> None:
    red = Image.new("RGB", (10, 5), (255, 0, 0))
    blue = Image.new("RGB", (600, 300), (0, 0, 255))
    out = sheet([[red, blue], [blue]], ("a", "b"), [["x", "y"], ["z"]], side=100)
    colors = {color for _, color in out.getcolors(out.width * out.height)}
    assert {(255, 0, 0), (0, 0, 255), (255, 255, 255)} <= colors
    assert out.width >= 200
    count = {color: n for n, color in out.getcolors(out.width * out.height)}
    assert count[255, 0, 0] == 100 * 50
    assert count[0, 0, 255] == 2 * 100 * 50


def test_maps_and_labels_as_pictures() -> None:
    assert heat(torch.tensor([[0.0, 3.0]])).getpixel((0, 0)) == (0, 0, 0)
    assert heat(torch.tensor([[0.0, 3.0]])).getpixel((1, 0)) == (255, 255, 255)
    assert heat(torch.zeros(2, 2)).getpixel((0, 0)) == (0, 0, 0)
    labels = labels_image(torch.tensor([[0, 1, 2, 7]]), ignore=7)
    colors = [labels.getpixel((x, 0)) for x in range(4)]
    assert len(set(colors)) == 4
    assert colors[3] == (255, 255, 255)
    assert to_image(torch.full((1, 2, 2), float("nan"))).getpixel((0, 0)) == (0, 0, 0)
