"""Options mean the same in all commands that have them; the shell can complete them; models say what fits."""

import argparse
import builtins
import json
from typing import Any

import pytest

import surgeon.cli
from surgeon.cli import main
from surgeon.commands.common.arguments import amp, amp_dtype, device
from surgeon.errors import ConfigError
from surgeon.util.machine import take_gpu
from surgeon.zoo.finetune import FinetuneConfig

COMMANDS: dict[str, list[str]] = {
    "finetune": ["finetune", "run", "--task", "sad"],
    "try": ["try", "run", "--task", "sad"],
    "evaluate": ["evaluate", "run", "--task", "sad"],
    "cost": ["cost", "run"],
    "bench": ["bench", "run"],
}


def parsed(*argv: str) -> argparse.Namespace:
    return surgeon.cli._parser().parse_args(argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_words_for_a_precision_are_the_same(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    of = {word: parsed(*COMMANDS[command], "--amp", word).amp for word in ("fp16", "float16", "bf16", "bfloat16", "no")}
    assert of["fp16"] == of["float16"] == parsed(*COMMANDS[command], "--amp").amp
    assert of["bf16"] == of["bfloat16"]
    assert len(set(of.values())) == 3
    assert not parsed(*COMMANDS[command]).amp
    assert main([*COMMANDS[command], "--amp", "half"]) == 2
    assert "--amp: expected no, fp16 (float16) or bf16 (bfloat16), got 'half'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "cost"])
def test_the_words_for_a_device_are_the_same(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("auto", "cpu", "cuda", "cuda:1"):
        assert parsed(*COMMANDS[command], "--device", word).device == word
    assert main([*COMMANDS[command], "--device", "gpu"]) == 2
    assert "--device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["cuda:", "cuda:-1", "cuda:x", "cuda:12345", "CPU", ""])
def test_other_devices_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        device(text)


def test_precisions_have_two_names() -> None:
    assert [(amp(word), amp_dtype(word)) for word in ("fp16", "bfloat16", "no")] == [
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("no", None),
    ]


def test_a_config_takes_a_gpu_by_its_number() -> None:
    assert FinetuneConfig(device="cuda:3").device == "cuda:3"
    for wrong in ("cuda:N", "cuda:x", "gpu"):
        with pytest.raises(ConfigError, match="device must be one of auto, cpu, cuda, cuda:N"):
            FinetuneConfig(device=wrong)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("auto", "cpu", "cuda:1", "cuda"):
        take_gpu(name)
    assert taken == [1, 0]
    with pytest.raises(ConfigError, match="device cuda:2: this machine has 2 CUDA devices"):
        take_gpu("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="with several processes each takes its own GPU"):
        take_gpu("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="this machine has no CUDA devices"):
        take_gpu("cuda")


def test_the_help_of_convert_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    places = [lines.index(f"{head}:") for head in ("model", "what to convert", "layer options (others with --option)")]
    assert places == sorted(places)
    assert lines.index("output:") > places[-1]


@pytest.mark.parametrize("command", ["try", "finetune", "evaluate", "search"])
@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["net", "--input-size", "64"], " A task's options are given so: --task-option input_size=64"),
        (["--input-size=3,64,64", "net"], " A task's options are given so: --task-option input_size=3,64,64"),
        (["--task", "denoising", "--sigma", "25", "net"], " A task's options are given so: --task-option sigma=25"),
        (["net", "--task", "denoising", "--sigmas"], ""),
        (["net", "--task", "classification", "--sigma", "25"], ""),
    ],
)
def test_an_option_of_the_task_is_told_as_such(
    command: str, words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *words]) == 2
    unknown = next(word for word in words if word.startswith(("--input-size", "--sigma")))
    assert capsys.readouterr().err.startswith(f"surgeon: error: there is no option {unknown}{'.' * bool(hint)}{hint}")


@pytest.mark.parametrize(("command", "flag"), [("evaluate", "-o"), ("inspect", "--output"), ("cost", "-o")])
def test_a_command_that_writes_no_file_says_how_to_keep_what_it_prints(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "net", flag, "there"]) == 2
    told = f"there is no option {flag}. surgeon {command} writes no file: surgeon {command} ... --json > FILE keeps"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_can_complete_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is declared, and not installed here")
    assert main(["--print-completion", shell]) == 0
    out = capsys.readouterr().out
    assert "--max-time" in out
    assert "visualize" in out


def test_without_the_library_completion_is_one_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "shtab":
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["--print-completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err
    assert main(["--print-completion", "fish"]) == 2
    assert "there is no choice 'fish'" in capsys.readouterr().err


def test_models_say_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "test_resnet", "--type", "pafu"]) == 0
    assert capsys.readouterr().out == "test_resnet: 15 of 15 convolutions can become pafu\n"
    assert main(["models", "test_resnet", "--type", "pafu", "--json", "--quiet"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"model": "test_resnet", "convolutions": 15, "fitting": 15, "why_not": None}
    assert main(["models", "test_resnet", "--type", "pafo"]) == 2
    assert "'pafo'" in capsys.readouterr().err


def test_every_command_that_loads_a_folder_can_trust_its_factory() -> None:
    """The error names --trust-factory, so the option is there."""
    commands = next(a for a in surgeon.cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    loads = {name for name, one in commands.items() if {a.dest for a in one._actions} & {"model", "run"}}
    trusts = {name for name, one in commands.items() if any(a.dest == "trust_factory" for a in one._actions)}
    assert loads - trusts == {"push"}  # which builds nothing


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["finetune", "net", "--learning-rate", "3e-4"], "--learning-rate. Did you mean '--lr'?"),
        (["finetune", "net", "--optimizer=sgd"], "--optimizer=sgd. Did you mean '--opt'?"),
        (["search", "net", "--opt", "sgd"], "--opt. Did you mean '--optimizer'?"),
        (["convert", "net", "--output_dir", "x"], "--output_dir. Did you mean '--output'?"),
        (["visualize", "run", "--images", "photos", "-o", "x"], "--images. IMAGE is given without an option"),
    ],
)
def test_names_of_other_programs_are_known(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert f"there is no option {hint}" in capsys.readouterr().err
