"""What a run keeps and how it returns: checkpoints, the log, and the guard against NaN and infinity."""

import logging
import math
from pathlib import Path

import pytest
import torch

from surgeon.errors import CheckpointError, TrainingError
from surgeon.util.parse import parse_span
from surgeon.zoo.finetune.guard import Guard, NotFiniteError
from surgeon.zoo.finetune.state import Log, Store, TrainingProgress, read_log, read_tree, write_tree
from tests.support.training.tasks import make_restorer

# --- checkpoints --------------------------------------------------------------------------------------------------


def test_trees_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "momentum": shared[::2]}, 1: {"empty": torch.empty(0, 2)}},
        "groups": [{"betas": (0.9, 0.999), "foreach": None, "nested": [1, "a", True], "lr": 0.1}],
        "half": torch.ones(2, 3, dtype=torch.bfloat16).t(),
        "alias": shared,
        "again": shared,
    }
    write_tree(tmp_path / "a.safetensors", tree)
    back = read_tree(tmp_path / "a.safetensors")
    assert list(back["state"]) == [0, 1]
    assert back["groups"] == tree["groups"]
    torch.testing.assert_close(back["state"][0], tree["state"][0], rtol=0, atol=0)
    for name in ("half", "alias", "again"):
        torch.testing.assert_close(back[name], tree[name], rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_tree_of_foreign_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="/optimizer/hook in the state of the run is a function"):
        write_tree(tmp_path / "a.safetensors", {"optimizer": {"hook": parse_span}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["bit", "cut", "text", "empty"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.safetensors"
    write_tree(file, {"weights": torch.arange(100.0)})
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-7] ^= 1
    elif damage == "cut":
        del content[-50:]
    elif damage == "text":
        content[:] = content.replace(b"weights", b"wEights")
    else:
        content.clear()
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_tree(file)


def test_the_store_keeps_what_is_needed(tmp_path: Path) -> None:
    store = Store(tmp_path, every=10)
    store.create()
    for step, best in ((0, 0), (10, 0), (20, 15), (23, 15), (27, 25)):
        if best not in store.steps("best"):
            store.save_best({"w": torch.tensor(float(best))}, best)
        store.save({"model": {}}, TrainingProgress(step=step, best=1.0, best_step=best))
    assert store.steps() == [10, 20, 23, 27]  # the newest two, and the newest two to which a run is set back
    assert store.steps("best") == [0, 15, 25]  # those that they name
    newest = store.newest()
    regular = store.newest(regular=True)
    assert newest is not None
    assert regular is not None
    assert (newest[1].step, regular[1].step) == (27, 20)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path, every=10)
    store.create()
    store.save_best({"w": torch.zeros(1)}, 0)
    for step in (10, 20):
        store.save({"model": {"w": torch.ones(50)}}, TrainingProgress(step=step, best=1.0, best_step=0))
    file = store.path("step", 20)
    file.write_bytes(file.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING, "surgeon"):
        found = store.newest()
    assert found is not None
    assert found[1].step == 10
    assert "step-000000020.safetensors is damaged" in caplog.text
    store.path("step", 10).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):
        store.newest()
    assert Store(tmp_path / "none", every=10).folder.exists() is False


def test_the_log_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    for step in range(1, 5):
        log.add({"step": step})
    with log.file.open("a") as stream:
        stream.write('{"step": 5, "lo')  # killed while it was written
    log.cut(2)
    assert [row["step"] for row in read_log(log.file)] == [1, 2]


# --- the guard ----------------------------------------------------------------------------------------------------


def test_the_guard_sees_what_is_not_finite() -> None:
    guard = Guard(most=2, factor=0.5)
    guard.check(1.0, 2.0, scaled=False)
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        guard.check(math.nan, 2.0, scaled=False)
    with pytest.raises(NotFiniteError, match="the norm of the gradient is inf"):
        guard.check(1.0, math.inf, scaled=False)
    model = make_restorer()
    guard.check_weights(model)
    with torch.no_grad():
        model.get_parameter("last.bias")[1] = math.inf
    with pytest.raises(NotFiniteError, match=r"the weights of last\.bias are not finite"):
        guard.check_weights(model)


def test_a_loss_scaler_may_search_for_its_scale() -> None:
    guard = Guard(most=2, factor=0.5)
    for _ in range(20):
        guard.check(1.0, math.inf, scaled=True)
    with pytest.raises(NotFiniteError):
        guard.check(1.0, math.inf, scaled=True)


def test_returns_are_counted() -> None:
    guard = Guard(most=2, factor=0.5)
    progress = TrainingProgress(step=7)
    for count in (1, 2):
        progress = guard.rolled_back(NotFiniteError("bad"), 8, progress, TrainingProgress(step=5))
        assert (progress.step, progress.rollbacks, progress.lr_factor) == (5, count, 0.5**count)
    with pytest.raises(TrainingError, match=r"step 8: bad, after 2 rollbacks .* times 0.25"):
        guard.rolled_back(NotFiniteError("bad"), 8, progress, TrainingProgress(step=5))
