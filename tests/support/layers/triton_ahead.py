"""Compile the Triton kernels ahead of time, as the operators would launch them, without a GPU; report registers and spills.

    python -m tests.support.layers.triton_ahead ARCH DTYPE [--all]

A process of its own, for Triton's driver is replaced by one that only knows the architecture (80 or 90). Prints one JSON list of
{kernel, config, spills, registers, shared}: the first configuration of every kernel, with `--all` every configuration.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from surgeon.layers.acda import triton as acda
from surgeon.layers.pafu import triton as pafu
from surgeon.layers.pafu.frames import FrameProblem, Grads, Window
from surgeon.layers.sekg import triton as dconv
from surgeon.layers.sekg import triton_layer as dconv_layer
from surgeon.layers.sekg.lean import LayerInputs


class Architecture:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(dtype: torch.dtype, every: bool) -> list[dict[str, Any]]:
    """Call the operators with every launch replaced by a compilation."""
    found: dict[str, dict[str, Any]] = {}

    def compiled(kernel: Any, programs: Any, *args: Any, tune: bool = True, **constants: Any) -> None:
        tuner = kernel.of(next(a for a in args if isinstance(a, Tensor)).dtype)
        for config in tuner.configs if every and tune else tuner.configs[:1]:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                built = tuner.fn.run(
                    *args, grid=None, warmup=True, **constants, **config.all_kwargs(), enable_fp_fusion=True
                )
            kept = {key: value for key, value in constants.items() if isinstance(value, int | str)}
            row = {
                "kernel": tuner.fn.__name__,
                "config": str(config),
                "constants": kept,
                "shared": built.metadata.shared,
            }
            text = log.getvalue()
            if text:  # else it was compiled before
                row["spills"] = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
                row["registers"] = max(map(int, re.findall(r"Used (\d+) registers", text)))
                found[json.dumps(row)] = row

    modules: tuple[ModuleType, ...] = (acda, dconv, pafu)
    for module in modules:
        module.launch = compiled
    for call in (*calls(dtype), *(smallest(dtype) if every else ())):
        call()
    return list(found.values())


def calls(dtype: torch.dtype) -> Iterator[Any]:
    """Forward and backward of every operator, with the channels of a ResNet's middle."""
    same = ((1, 1), (1, 1), (1, 1))

    def make(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype).contiguous(
            memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
        )

    x, maps = make(2, 64, 14, 14), make(2, 64, 14, 14)
    operands = (x, make(2, 108, 14, 14), make(18, 7, 7), make(1, 7, 7), make(64, 64, 7))
    geometry = ((1, 1), (3, 3), (1, 1), 1)
    yield lambda: acda.forward(*operands, *geometry)
    yield lambda: acda.backward(maps, *operands, *geometry, [True] * 5)
    kernels = make(2, 64, 9, 14, 14)
    yield lambda: dconv.forward(x, kernels, (3, 3), *same)
    yield lambda: dconv.backward(maps, x, kernels, (3, 3), (True, True), *same)
    given = LayerInputs(x, maps, make(9 * 64, 64), make(64, 1, 3, 3), make(64), *same)
    yield lambda: dconv_layer.forward(given)
    index = torch.zeros(2, 14, 14, dtype=torch.int64)
    problem = FrameProblem(x, make(64, 64, 3, 3), make(7, 64, 64, 3, 3), index, Window((3, 3), *same, 1), [])
    sums = Grads(x.float(), [torch.zeros(64, 3, 3, 64)] * 8, torch.zeros(2, 14, 14, 8))
    yield lambda: pafu.forward(problem, torch.empty_like(x))
    yield lambda: pafu.backward(problem, maps, sums)


def smallest(dtype: torch.dtype) -> Iterator[Any]:
    """Everything there is one of: Triton compiles arguments that are 1 as constants."""
    one = ((1, 1), (0, 0), (1, 1))

    def make(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    x = make(1, 1, 1, 1)
    operands = (x, make(1, 1, 1, 1), make(1, 1, 1), make(0, 1, 1), make(1, 1, 1))
    yield lambda: acda.forward(*operands, *one, 1)
    yield lambda: acda.backward(x, *operands, *one, 1, [True] * 5)
    yield lambda: dconv.forward(x, make(1, 1, 1, 1, 1), (1, 1), *one)
    yield lambda: dconv.backward(x, x, make(1, 1, 1, 1, 1), (1, 1), (True, True), *one)
    given = LayerInputs(x, x, make(1, 1), make(2, 1, 1, 1), None, *one)
    yield lambda: dconv_layer.backward(make(1, 2, 1, 1), given, [True] * 5)
    problem = FrameProblem(
        x, x, make(0, 1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), Window((1, 1), *one, 1), []
    )
    sums = Grads(x.float(), [torch.zeros(1, 1, 1, 1)], torch.zeros(1, 1, 1, 1))
    yield lambda: pafu.forward(problem, torch.empty_like(x))
    yield lambda: pafu.backward(problem, x, sums)


def main(arguments: list[str]) -> int:
    capability, dtype, *rest = arguments
    triton.runtime.driver.set_active(Architecture(int(capability)))
    triton.knobs.nvidia.dump_ptxas_log = True
    print(json.dumps(compile_all(getattr(torch, dtype), "--all" in rest)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
