"""This machine: a unique name, whether one of its processes still runs, and its memory."""

import contextlib
import hashlib
import logging
import os
import socket
from functools import cache
from pathlib import Path

from surgeon.errors import ConfigError
from surgeon.util.parse import parse_quantity

logger = logging.getLogger(__name__)

MEMORY = "SURGEON_MEMORY"  # environment: bytes allowed for a model or an input, instead of the machine's memory


@cache
def machine() -> str:
    """Host name plus a hash of the boot and of the process-id namespace: names and numbers alone are not unique.

    Containers and cloned machines share their host name, and each has a process 1.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return f"{parts[0]}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def has_ended(process: int) -> bool:
    """Whether no process with this number exists on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it exists and belongs to another user
        return False
    return False


def memory() -> int:
    """Bytes of memory available to this machine or this process's control group; `SURGEON_MEMORY` (16GiB) overrides."""
    given = os.environ.get(MEMORY)
    if given:
        return int(parse_quantity(given, MEMORY))
    if not hasattr(os, "sysconf"):
        return 2**62  # unknown
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(file).read_text(encoding="ascii")))
    return found


class TooLargeError(ConfigError):
    """A request beyond this machine's memory, or beyond any sensible size."""


def check_memory(needed: int, what: str) -> None:
    """Raise `TooLargeError` before an allocation that this machine lacks the memory for. `needed` is in bytes."""
    limit = memory()
    if needed > limit:
        raise TooLargeError(
            f"{what} would take {needed:,} bytes ({needed / 2**30:,.1f} GiB), and this machine has {limit / 2**30:,.1f} GiB; "
            f"if this is intended, set {MEMORY} to a higher number (64GiB)"
        )


def take_gpu(device: str) -> None:
    """Make "cuda" refer to the requested GPU. Raises `ConfigError` if it does not exist."""
    if not device.startswith("cuda"):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise ConfigError(f"device {device}: this machine has {count or 'no'} CUDA device{'s' if count != 1 else ''}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"device {device}: with several processes each takes its own GPU; leave it at auto")
    torch.cuda.set_device(index)


@cache
def tell_slow_bfloat16(device: str) -> None:
    """Warn, once in a process, of a CPU without instructions for bfloat16: torch's convolutions are plain loops there."""
    import torch

    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if device == "cpu" and supported is not None and not supported():
        logger.warning("this CPU has no instructions for bfloat16: convolutions take many times as long as in float32")
