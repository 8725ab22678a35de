"""Operator dispatch: the first backend, in order of preference, with no reason not to run.

An operator has one definition (`reference`) and faster backends. Each backend's `why_not` lists the reasons why it cannot take
given inputs; nothing falls through silently. During an export, and inside the transforms of `torch.func`, the backend `portable`,
which consists of ordinary torch operations, takes precedence over all others; otherwise the environment variable SURGEON_BACKEND
selects the backend of every call that does not name one itself.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import BackendError

ENVIRONMENT = "SURGEON_BACKEND"

WhyNot = Callable[..., Iterable[str]]

NATIVE = "native"
PORTABLE = "portable"


@dataclass(frozen=True)
class Backend:
    """One implementation: `run` computes, `why_not` takes the same arguments and lists the reasons against running."""

    name: str
    run: Callable[..., Tensor]
    why_not: WhyNot


def _always(*args: Any, **kwargs: Any) -> list[str]:
    return []


def exporting() -> bool:
    """Whether `torch.export` is tracing, also for ONNX: its result must run where surgeon is not installed.

    By torch's flag itself: inside `torch.compile`, `torch.compiler.is_exporting()` is always true up to some version after 2.11.
    """
    return torch.compiler._is_exporting_flag


def tracing() -> bool:
    """Whether `torch.jit.trace` is active: sizes are then traced values, not numbers to check."""
    return bool(torch._C._get_tracing_state())


def transforming() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp, jacrev, …) is active: it supports ordinary operations only.

    Under `torch.compile` an operator stays one node.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class Operator:
    """An operator and its backends, in order of preference."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backends: dict[str, Backend] = {}

    def backend(self, name: str, why_not: WhyNot = _always) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
        """Decorator: append a backend."""

        def add(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            self.backends[name] = Backend(name, run, why_not)
            return run

        return add

    def why_not(self, name: str, *args: Any, **kwargs: Any) -> list[str]:
        """Reasons why the named backend cannot take these inputs; empty if it can."""
        if name not in self.backends:
            raise BackendError(f"{self.name} has no backend {name!r}; it has {', '.join(self.backends)}")
        return list(self.backends[name].why_not(*args, **kwargs))

    def choose(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Backend:
        """The backend that would run; raises `BackendError` with every reason if there is none."""
        if backend is None and PORTABLE in self.backends and (exporting() or transforming()):
            backend = PORTABLE
        elif backend is None:
            backend = self._from_environment(*args)
        names = list(self.backends) if backend is None else [backend]
        for name in names:
            found = self.backends.get(name)
            if found is not None and next(iter(found.why_not(*args, **kwargs)), None) is None:
                return found
        against = {name: self.why_not(name, *args, **kwargs) for name in names}
        told = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in against.items())
        raise BackendError(f"no backend can run {self.name} on these inputs ({told})")

    def _from_environment(self, *args: Any) -> str | None:
        """The backend named by SURGEON_BACKEND. Meta tensors ignore it, so that cost counts do not depend on it."""
        name = os.environ.get(ENVIRONMENT)
        if not name or any(isinstance(a, Tensor) and a.is_meta for a in args):
            return None
        if name not in self.backends:
            raise BackendError(f"{ENVIRONMENT} is {name!r}, but {self.name} has only {', '.join(self.backends)}")
        return name

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Tensor:
        return self.choose(*args, backend=backend, **kwargs).run(*args, **kwargs)
