"""Crowd counting: density maps, annotations in all forms, counts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import surgeon.zoo as zoo
from surgeon.errors import ConfigError, DataError, InputError
from surgeon.zoo.tasks import create_task
from surgeon.zoo.tasks.data.points import point_files, read_points
from surgeon.zoo.tasks.support.density import adaptive_sigmas, density_map
from tests.support.training.task_data import crowds, photo


def whole(points: np.ndarray, sigmas: np.ndarray, height: int, width: int, stride: int = 1) -> Tensor:
    return density_map(points, sigmas, height, width, stride, (0, 0, height, width))


# --- density maps -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(8, 50), st.integers(8, 50), st.sampled_from([1, 2, 4, 8]), st.floats(0.3, 30))
def test_a_map_sums_to_the_number_of_points_also_at_borders(
    count: int, height: int, width: int, stride: int, sigma: float
) -> None:
    rng = np.random.default_rng(count)
    points = rng.uniform((0, 0), (width - 1, height - 1), (count, 2))
    points[: count // 3] = (0, 0)
    points[count // 3 : count // 2] = (width - 1, height - 1)
    density = whole(points, np.full(count, sigma), height, width, stride)
    assert density.shape == (1, -(-height // stride), -(-width // stride))
    assert density.sum().item() == pytest.approx(count, rel=1e-5, abs=1e-6)


def test_a_point_is_a_gaussian_by_hand() -> None:
    density = whole(np.array([[12.0, 7.0]]), np.array([2.0]), 40, 50)[0]
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    expected = torch.exp(-((x - 12) ** 2 + (y - 7) ** 2) / 8)
    assert torch.allclose(density, expected / expected.sum(), atol=1e-7)


def test_cells_and_boxes_are_those_of_the_whole_map() -> None:
    rng = np.random.default_rng(1)
    points, sigmas = rng.uniform(0, 30, (20, 2)), rng.uniform(1, 5, 20)
    full = whole(points, sigmas, 37, 31)
    padded = nn.functional.pad(full, (0, 1, 0, 3))
    cells = padded.view(1, 10, 4, 8, 4).sum((2, 4))
    assert torch.allclose(whole(points, sigmas, 37, 31, 4), cells, atol=1e-6)
    box = density_map(points, sigmas, 37, 31, 4, (8, 4, 16, 12))
    assert torch.allclose(box, cells[:, 2:6, 1:4], atol=1e-6)


def test_adaptive_spreads_by_hand() -> None:
    points = np.array([[0.0, 0], [10, 0], [0, 20], [0, -20], [1000, 0]])
    sigmas = adaptive_sigmas(points, 100, 100)
    assert sigmas[0] == pytest.approx(0.3 * (10 + 20 + 20) / 3)
    assert sigmas[4] == pytest.approx(0.3 * (990 + 2 * np.hypot(1000, 20)) / 3, rel=0.01)
    assert adaptive_sigmas(points[:2], 100, 100).tolist() == pytest.approx([3, 3])
    assert adaptive_sigmas(points[:1], 100, 60).tolist() == pytest.approx([0.3 * 20])
    assert adaptive_sigmas(points[:0], 100, 100).shape == (0,)
    assert adaptive_sigmas(np.zeros((4, 2)), 100, 100).tolist() == [1, 1, 1, 1]  # heads in one place


# --- annotations ------------------------------------------------------------------------------------------------------

POINTS = np.array([[3.5, 4.0], [10.0, 20.0]])


def written(folder: Path, form: str) -> Path:
    """The points as some data set keeps them."""
    path = folder / f"a.{form.split('-')[0]}"
    if form == "npy":
        np.save(path, POINTS.astype(np.float32))
    elif form == "json-list":
        path.write_text(json.dumps(POINTS.tolist()))
    elif form == "json-key":
        path.write_text(json.dumps({"img_id": "a", "human_num": 2, "points": POINTS.tolist()}))
    elif form == "json-xy":
        path.write_text(json.dumps({"points": [{"x": x, "y": y} for x, y in POINTS]}))
    elif form == "mat-ucf":
        scipy.io.savemat(path, {"annPoints": POINTS})
    elif form == "mat-shanghai":
        info = np.empty((1, 1), dtype=object)
        info[0, 0] = {"location": POINTS, "number": np.array([[2]])}
        scipy.io.savemat(path, {"image_info": info})
    elif form == "mat-only":
        scipy.io.savemat(path, {"heads": POINTS, "date": "2016"})
    return path


@pytest.mark.parametrize("form", ["npy", "json-list", "json-key", "json-xy", "mat-ucf", "mat-shanghai", "mat-only"])
def test_points_in_every_form(tmp_path: Path, form: str) -> None:
    points = read_points(written(tmp_path, form))
    assert points.dtype == np.float64
    assert np.array_equal(points, POINTS)


def test_a_picture_without_people(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((0, 2)))
    (tmp_path / "b.json").write_text("[]")
    scipy.io.savemat(tmp_path / "c.mat", {"annPoints": np.zeros((0, 0))})
    for name in ("a.npy", "b.json", "c.mat"):
        assert read_points(tmp_path / name).shape == (0, 2)


def test_files_that_hold_no_points_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(7))
    np.save(tmp_path / "nan.npy", np.array([[1.0, np.nan]]))
    (tmp_path / "key.json").write_text('{"heads": []}')
    (tmp_path / "broken.json").write_text("[[1, 2")
    (tmp_path / "text.mat").write_bytes(b"x" * 200)
    scipy.io.savemat(tmp_path / "two.mat", {"a": POINTS, "b": POINTS})
    (tmp_path / "hdf5.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(80))
    for name in ("one.npy", "nan.npy", "key.json", "broken.json", "text.mat", "two.mat", "hdf5.mat"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read_points(tmp_path / name)
    with pytest.raises(DataError, match=r"MATLAB 7\.3 .* save it with -v7"):
        read_points(tmp_path / "hdf5.mat")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="allow_pickle"):
        read_points(tmp_path / "a.npy")


def test_points_are_found_beside_pictures_and_in_their_own_folder(tmp_path: Path) -> None:
    photo(tmp_path / "beside/1.jpg", 20, 20)
    scipy.io.savemat(tmp_path / "beside/1_ann.mat", {"annPoints": POINTS})
    photo(tmp_path / "part_A/images/IMG_1.jpg", 20, 20)
    (tmp_path / "part_A/ground_truth").mkdir()
    scipy.io.savemat(tmp_path / "part_A/ground_truth/GT_IMG_1.mat", {"annPoints": POINTS})
    for folder, points in (("beside", "1_ann.mat"), ("part_A", "GT_IMG_1.mat")):
        assert [pair[1].name for pair in point_files(tmp_path / folder)] == [points]


def test_pictures_without_points_and_the_reverse_are_named(tmp_path: Path) -> None:
    options = crowds(tmp_path)
    (tmp_path / "val/0.npy").rename(tmp_path / "val/9.npy")
    with pytest.raises(DataError, match=r"val/0\.jpg has no points") as caught:
        create_task("crowd-counting", **options).check()
    assert "val/9.npy has no picture" in str(caught.value)
    (tmp_path / "val/9.npy").rename(tmp_path / "val/0.npy")
    (tmp_path / "val/0.json").write_text("[]")
    with pytest.raises(DataError, match="has 2 files of points"):
        create_task("crowd-counting", **options).check()


def test_points_outside_are_an_error_or_clipped_or_dropped(tmp_path: Path) -> None:
    options = crowds(tmp_path)
    np.save(tmp_path / "val/1.npy", np.array([[5.0, 5], [74, 70], [300, 5]]))  # 73x70: the second is rounded up
    with pytest.raises(
        DataError, match=r"val/1\.npy: 1 of 3 points are outside 1\.jpg \(73x70\), the first at \(300, 5\)"
    ):
        create_task("crowd-counting", **options).check()
    for outside, count in (("clip", 3), ("drop", 2)):
        task = create_task("crowd-counting", **options, outside=outside)
        task.check()
        sample = task.dataset("val")[1]
        assert sample["count"].item() == count
        assert sample["target"].sum().item() == pytest.approx(count, rel=1e-5)


# --- task -------------------------------------------------------------------------------------------------------------


def test_pieces_carry_their_part_of_the_density(tmp_path: Path) -> None:
    """A mark in the picture stays over its point, through cutting and mirroring."""
    for split in ("train", "val"):
        path = tmp_path / split / "a.png"
        path.parent.mkdir()
        image = Image.new("L", (96, 80), 0)
        image.putpixel((53, 38), 255)
        image.save(path)
        np.save(tmp_path / split / "a.npy", np.array([[53.0, 38.0]]))
    task = create_task("crowd-counting", data=tmp_path, patch=64, stride=4, sigma=0.5, color=False, mean=(0,), std=(1,))
    train = task.dataset("train")
    mirrored = set()
    for draw in range(20):
        sample = train[draw]
        assert sample["target"].shape == (1, 16, 16)
        _, y, x = (sample["input"] == 1).nonzero()[0].tolist()
        cell = int(sample["target"].argmax())
        assert (cell // 16, cell % 16) == (y // 4, x // 4)
        assert sample["target"].sum().item() == pytest.approx(sample["count"].item(), rel=1e-5)
        mirrored.add(x % 4 == 53 % 4)
    assert mirrored == {True, False}


def test_metrics_and_loss_by_hand(tmp_path: Path) -> None:
    task = create_task("crowd-counting", **crowds(tmp_path), density_scale=10)
    output = torch.zeros(2, 1, 4, 4)
    output[0, 0, 1] = 10
    output[1, 0, 0, 0] = 70
    batch = {"count": torch.tensor([7.0, 6.0]), "target": torch.zeros(2, 1, 4, 4)}
    metrics = task.metrics()
    task.update(metrics, output, batch)  # 4 and 7 people
    assert metrics["mae"].compute().item() == 2
    assert metrics["mse"].compute().item() == pytest.approx(np.sqrt((9 + 1) / 2))
    assert task.loss(output, batch).item() == (4 * 100 + 4900) / 2


def test_the_model_says_channels_and_stride(tmp_path: Path) -> None:
    options = crowds(tmp_path)
    task = create_task("crowd-counting", **options)
    model = zoo.create("mcnn")
    task.bind(model)
    sample = task.dataset("val")[0]
    gray = torch.tensor(np.asarray(Image.open(tmp_path / "val/0.jpg").convert("L"), dtype=np.float32))
    assert torch.allclose(sample["input"][0], (gray - 127.5) / 128, atol=1e-5)
    assert sample["target"].shape == (1, 18, 18)
    assert task.predict(model, task.collate([sample])).shape == (1, 1, 18, 18)
    other = create_task("crowd-counting", **options)
    other.bind(nn.Conv2d(3, 1, 8, stride=8))
    assert other.dataset("val")[0]["target"].shape == (1, 9, 9)
    with pytest.raises(InputError, match="stride is 8"):
        create_task("crowd-counting", **options, stride=4).bind(nn.Conv2d(3, 1, 8, stride=8))
    with pytest.raises(InputError, match="density map"):
        create_task("crowd-counting", **options).bind(nn.Conv2d(3, 2, 3, padding=1))


def test_models_that_round_down_see_the_border(tmp_path: Path) -> None:
    task = create_task("crowd-counting", **crowds(tmp_path))
    model = nn.Conv2d(3, 1, 4, stride=4)
    task.bind(model)
    batch = task.collate([task.dataset("val")[index] for index in range(3)])
    output = task.predict(model, batch)
    assert output.shape == batch["target"].shape
    assert task.loss(output, batch).isfinite()


def test_a_folder_can_be_divided_and_small_pictures_are_named(tmp_path: Path) -> None:
    crowds(tmp_path)
    task = create_task("crowd-counting", train=tmp_path / "train", val_fraction=0.5, patch=64)
    task.check()
    assert (len(task.dataset("train")), len(task.dataset("val"))) == (2, 2)
    with pytest.raises(DataError, match="smaller than 128x128; give a smaller patch="):
        create_task("crowd-counting", data=tmp_path, patch=128).check()


@pytest.mark.parametrize(
    "options", [{"sigma": "wide"}, {"sigma": 0}, {"outside": "keep"}, {"density_scale": 0}, {"stride": 0}]
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        create_task("crowd-counting", **options)


def test_a_number_may_come_as_text() -> None:
    assert create_task("crowd-counting", sigma="3.5").config.sigma == 3.5
