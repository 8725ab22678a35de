"""Accelerate: device, precision, processes."""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgeon.errors import ConfigError
from surgeon.util.machine import take_gpu, tell_slow_bfloat16
from surgeon.zoo.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

# Environment variables of `accelerate launch` that enable another way to train.
_BACKENDS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


def make_accelerator(config: FinetuneConfig) -> "Accelerator":
    """A new accelerator, independent of earlier ones in this process. Raises `ConfigError` if the device lacks an option."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    for name in _BACKENDS:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise ConfigError(f"{name} is set: surgeon trains with Accelerate's plain data parallelism; unset it")
    take_gpu(config.device)
    # Set explicitly, because only then does Accelerate join torchrun's processes on a machine without a GPU.
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    known = AcceleratorState._shared_state
    if known and known.get("_mixed_precision") != config.amp:
        AcceleratorState._reset_state()  # it keeps the precision of the first run in a process and refuses another
    accelerator = Accelerator(
        mixed_precision=config.amp,
        cpu=cpu,
        # Passed as a plugin, because `accelerate launch` sets an environment variable that overrides the number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulate, sync_with_dataloader=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )
    if config.amp == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("amp fp16 needs a GPU; on the CPU use bf16 (--amp bf16)")
    if config.amp == "bf16":
        tell_slow_bfloat16(accelerator.device.type)
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size is over all processes: {config.batch_size} samples cannot be split over {accelerator.num_processes}"
        )
    return accelerator


def prepare(
    accelerator: "Accelerator", model: nn.Module, optimizer: torch.optim.Optimizer, unused: bool
) -> tuple[nn.Module, Any]:
    """The model and the optimizer wrapped by Accelerate. `unused`: some parameters get no gradient in a step."""
    accelerator.ddp_handler.find_unused_parameters = unused
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    return wrapped, optimizer


def release(accelerator: "Accelerator", model: nn.Module, forward: Any = None) -> None:
    """Release the model without the wrapper's `forward`; `forward` is one that this object alone had before it was wrapped."""
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(plain).pop(name, None)  # remains of the wrapper: the class has its own `forward`
    if forward is not None:
        plain.forward = forward
    accelerator.free_memory()
