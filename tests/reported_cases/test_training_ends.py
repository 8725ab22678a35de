"""Training that is killed, runs out of disk, cannot make a step, or finds its folder tampered with."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import CheckpointError, ConfigError, DataError, TrainingError
from surgeon.zoo.finetune import FinetuneConfig, dry_run, finetune
from surgeon.zoo.finetune.batches import STOPS, _leave_signals_to_parent, training_batches
from surgeon.zoo.finetune.evaluation import Evaluation
from surgeon.zoo.finetune.folder import RunFolder
from surgeon.zoo.finetune.journal import TrainingJournal
from surgeon.zoo.finetune.loop import Interrupted, Trainer
from surgeon.zoo.finetune.optimizer import try_optimizer
from surgeon.zoo.finetune.state import finite, read_log, read_tree, write_tree
from surgeon.zoo.tasks import Sample, TaskDataset, create_task
from tests.support.training.runs import SHORT, interrupt_at, interrupted, with_
from tests.support.training.tasks import make_restorer, regression

# --- T8, T7: other processes ----------------------------------------------------------------------------------------


def test_a_run_that_is_alive_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T8: `finetune --resume` while the run is alive; `--force`, too."""
    model = interrupted(monkeypatch, regression(), tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with RunFolder(tmp_path / "run").locked():
        for how in ({"resume": True}, {"force": True}):
            with pytest.raises(CheckpointError, match="is running in another process"):
                finetune(model, regression(), SHORT, tmp_path / "run", **how)
    assert (
        before[1:]
        == sorted(path.name for path in (tmp_path / "run").rglob("*") if path.name != ".lock")[-len(before) + 1 :]
    )
    assert finetune(model, regression(), SHORT, tmp_path / "run", resume=True).summary.stopped == "steps"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_lock_goes_with_the_run_not_with_its_loader_processes(tmp_path: Path) -> None:
    """T8: the processes of a loader outlive a killed run for some seconds."""
    (tmp_path / "training").mkdir()
    folder = RunFolder(tmp_path)
    with folder.locked():
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with folder.locked():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", STOPS)
def test_each_signal_that_asks_to_stop_leaves_a_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T7: SIGTERM, SIGHUP; a signal that the tests' own caller ignores (nohup) is set to its default first."""
    interrupt_at(monkeypatch, 2, number)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted, match="after step 3"):
            finetune(make_restorer(), regression(), SHORT, tmp_path / "run")
    finally:
        signal.signal(number, before)


def test_loader_processes_leave_the_first_signal_to_the_training() -> None:
    """T7: workers die first; a second SIGTERM (that of the loader's own end) ends them."""
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        _leave_signals_to_parent(0)
        for number in STOPS:
            os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- T20: full disks, files that break in a loader's process ---------------------------------------------------------


def test_a_log_that_cannot_be_written_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """T20: disk full outside checkpoints: log.jsonl, TensorBoard."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    from surgeon.zoo.finetune.state import Log

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Log, "add", full)
    monkeypatch.setattr(RecordWriter, "write", full)  # in TensorBoard's thread
    result = finetune(make_restorer(), regression(), with_(max_steps=3), tmp_path / "run")
    assert result.summary.steps == 3
    assert caplog.text.count("rows are lost") == 1
    assert caplog.text.count("TensorBoard's files cannot be written any more: No space left on device") == 1


class Broken(TaskDataset):
    """Raises, or dies, in whichever process reads it."""

    seed = 0

    def __init__(self, kills: bool = False) -> None:
        self.kills = kills

    def __len__(self) -> int:
        return 4

    def __getitem__(self, draw: int) -> Sample:
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("cannot read the image a.png: truncated")


@pytest.mark.parametrize(
    ("kills", "error", "told"),
    [
        (False, DataError, r"^cannot read the image a.png: truncated$"),
        (True, TrainingError, "a data-loading process died"),
    ],
)
def test_what_breaks_in_a_loader_process_is_told_in_one_line(kills: bool, error: type[Exception], told: str) -> None:
    """T20: a loader worker killed, a bad file inside one."""
    with pytest.raises(error, match=told) as caught:
        next(training_batches(regression(), Broken(kills), [[0, 1]], 1))
    assert "\n" not in str(caught.value)


# --- T2, T15, T16, T25: steps that cannot be made ---------------------------------------------------------------------


def test_a_loss_that_is_none_under_a_scaler_returns_and_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2: fp16, NaN loss; a GradScaler of the CPU stands for that of a GPU."""
    from accelerate import Accelerator

    from surgeon.zoo.finetune import run as module

    def scaled(config: FinetuneConfig) -> Accelerator:
        found = make(config)
        found.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        found.native_amp = True
        monkeypatch.setattr(type(found), "mixed_precision", property(lambda self: "fp16"))
        return found

    make, failed = module.make_accelerator, []
    monkeypatch.setattr(module, "make_accelerator", scaled)
    losses = Trainer._losses

    def poisoned(trainer: Trainer, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        loss, task_loss = losses(trainer, model, batch)
        failed.append(1)
        return (loss * float("nan"), task_loss) if len(failed) == 3 else (loss, task_loss)

    monkeypatch.setattr(Trainer, "_losses", poisoned)
    result = finetune(make_restorer(), regression(), SHORT, tmp_path / "run")
    assert (result.summary.rollbacks, result.summary.stopped) == (1, "steps")


def test_an_optimizer_that_cannot_be_used_says_so_before_the_run(tmp_path: Path) -> None:
    """T15: `--opt adahessian`: a raw error at the first step."""
    with pytest.raises(ConfigError, match="opt adahessian cannot be used here: "):
        finetune(make_restorer(), regression(), with_(opt="adahessian", max_steps=1), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.parametrize("opt", ["adafactorbv", "nadamw"])
def test_optimizers_whose_state_has_dtypes_can_be_kept(opt: str) -> None:
    """T15: `adafactorbv*`: raw errors at the first checkpoint."""
    try_optimizer(FinetuneConfig(opt=opt), torch.device("cpu"))


class Norm(nn.Module):
    """A BatchNorm after a global pool, as in DeepLab's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = x + self.pool(x)
        return out


def test_a_batch_norm_of_one_value_is_told_with_what_helps() -> None:
    """T16: DeepLab at batch size 1; also in `--dry-run`."""
    for run in (finetune, dry_run):
        with pytest.raises(ConfigError, match=r"single value per channel from a batch \(1, 3, 8, 8\).*--freeze-bn"):
            run(Norm(), regression(), with_(batch_size=1, max_steps=1))
    assert finetune(Norm(), regression(), with_(batch_size=1, max_steps=1, freeze_bn=True)).summary.steps == 1


def test_other_backends_of_accelerate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """T25: `ACCELERATE_USE_DEEPSPEED`."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_DEEPSPEED is set"):
        finetune(make_restorer(), regression(), with_(max_steps=1))


def test_an_input_size_that_is_a_text_is_told() -> None:
    """T25: `input_size=3,32,32`."""
    with pytest.raises(ConfigError, match=r"input_size must be .*, got '3,32,32'"):
        create_task("sad", input_size="3,32,32")


# --- R12, T25: a tampered folder ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        interrupted(patched, regression(), folder, 3)
    return folder


def copied(folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(folder, target)
    return target


def state_of(folder: Path) -> dict[str, Any]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("key", ["model", "weights", "task", "options", "config", "processes", "versions"])
def test_a_record_without_a_field_is_refused(stopped: Path, tmp_path: Path, key: str) -> None:
    """R12, T25: run.json without `task`, `config` or `processes`."""
    folder = copied(stopped, tmp_path / "run")
    values = json.loads((folder / "training/run.json").read_text())
    del values[key]
    (folder / "training/run.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"run.json: {key} must be .*, got nothing"):
        finetune(make_restorer(), regression(), SHORT, folder, resume=True)


def test_a_record_whose_data_are_none_is_refused(stopped: Path, tmp_path: Path) -> None:
    """R12: the fingerprint, too."""
    folder = copied(stopped, tmp_path / "run")
    values = json.loads((folder / "training/run.json").read_text())
    for data, told in (
        (5, "data must be"),
        (values["data"] | {"classes": [{}]}, "classes: item 0 must be of type str"),
    ):
        (folder / "training/run.json").write_text(json.dumps(values | {"data": data}))
        with pytest.raises(CheckpointError, match=told):
            finetune(make_restorer(), regression(), SHORT, folder, resume=True)


@pytest.mark.parametrize(
    "line", [b"\xff\xfe{}", b'{"step": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[1]", b'{"step": "a"}']
)
def test_a_log_that_is_none_is_refused(stopped: Path, tmp_path: Path, line: bytes) -> None:
    """R12, T25: log.jsonl that is no UTF-8 or too deep."""
    folder = copied(stopped, tmp_path / "run")
    with (folder / "training/log.jsonl").open("ab") as file:
        file.write(line + b"\n")
    before = state_of(folder)
    with pytest.raises(CheckpointError, match=r"log\.jsonl"):
        finetune(make_restorer(), regression(), SHORT, folder, resume=True)
    assert state_of(folder) == before


def _set(*keys: Any, value: Any) -> Any:
    def change(tree: dict[str, Any]) -> Any:
        inner = tree
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return tree

    return change


def _drop(key: str) -> Any:
    return lambda tree: {name: value for name, value in tree.items() if name != key}


TAMPERED = {
    "a number": (lambda tree: 5, "must be a JSON object, got 5"),
    "no optimizer": (_drop("optimizer"), "optimizer must be"),
    "no progress": (_drop("progress"), "progress must be of type dict"),
    "negative step": (_set("progress", "step", value=-1), "step must not be negative"),
    "another step": (_set("progress", "step", value=1), "step 1, best_step .* in a file of step"),
    "no measures": (_set("progress", "start", value={}), "progress: start: start must be"),
    "unknown measures": (_set("progress", "start", "start", value={"x": 1}), "start: start: metrics must be"),
    "further measures": (lambda tree: _further(tree), "start: start must have metrics"),
    "rollbacks": (_set("progress", "rollbacks", value="many"), "rollbacks must be of type int"),
    "unknown progress": (_set("progress", "more", value=1), "is missing, or should not have, more"),
    "other groups": (_set("optimizer", "param_groups", value=[]), "optimizer has 0 groups"),
    "optimizer's state": (_set("optimizer", "state", value={"x": {}}), "state has 'x'"),
    "weights": (_set("model", "first.bias", value=torch.zeros(3)), "model: first.bias is not a tensor"),
    "further weights": (_set("model", "x", value=torch.zeros(3)), "model: x is only in the file"),
    "an average": (_set("ema", value={}), "ema is there, against the options"),
}


def _further(tree: dict[str, Any]) -> Any:
    tree["progress"]["start"]["start"]["x"] = 1
    return tree


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_checkpoint_is_refused_with_file_and_field(
    stopped: Path, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """R12: checkpoint trees that are numbers, without `optimizer`, with other parameter groups, negative steps, ..."""
    folder = copied(stopped, tmp_path / "run")
    change, told = TAMPERED[case]
    for file in (folder / "training/checkpoints").glob("step-*"):
        write_tree(file, change(read_tree(file)))
    before = state_of(folder)
    with pytest.raises(CheckpointError, match=rf"step-0.*\.safetensors.*{told}"):
        finetune(make_restorer(), regression(), SHORT, folder, resume=True)
    assert state_of(folder) == before


def test_a_tree_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    """R12: checkpoint trees that are too deep."""
    tree: Any = 1
    for _ in range(300):
        tree = [tree]
    write_tree(tmp_path / "a.safetensors", {"x": tree})
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not valid JSON: it is nested too deep"):
        read_tree(tmp_path / "a.safetensors")


def test_numbers_that_are_none_stay_what_they_are_and_the_log_stays_json(tmp_path: Path) -> None:
    """T22: `Infinity` in JSON lines."""
    write_tree(tmp_path / "a.safetensors", {"best": float("inf"), "last": {"x": float("-inf")}})
    assert read_tree(tmp_path / "a.safetensors") == {"best": float("inf"), "last": {"x": float("-inf")}}
    journal = TrainingJournal(tmp_path, quiet=True)
    journal.evaluation({"step": 1, "metrics": {"psnr": float("inf")}}, Evaluation({}, 0.0))
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()
    assert list(read_log(tmp_path / "log.jsonl")) == [{"step": 1, "metrics": {"psnr": None}}]
    assert finite([float("nan"), 1]) == [None, 1]
