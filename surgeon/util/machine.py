"""What this machine is: a name that no other has, whether a process of it still runs, and how much memory it has."""

import contextlib
import hashlib
import os
import socket
from functools import cache
from pathlib import Path

from surgeon.errors import ConfigError
from surgeon.util.parse import parse_quantity

MEMORY = "SURGEON_MEMORY"  # environment: bytes that a model or an input may take, in the place of the machine's memory


@cache
def machine() -> str:
    """Host name, and a hash of the boot and of the namespace of process ids: names and numbers alone are not unique.

    Containers and cloned machines share their host name, and each has a process 1.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return f"{parts[0]}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def has_ended(process: int) -> bool:
    """Whether there is no process of this number on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it is there, and another user's
        return False
    return False


def memory() -> int:
    """Bytes that this machine, or this process's control group, has; `SURGEON_MEMORY` (16GiB) overrides."""
    given = os.environ.get(MEMORY)
    if given:
        return int(parse_quantity(given, MEMORY))
    if not hasattr(os, "sysconf"):
        return 2**62  # nobody knows
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(file).read_text(encoding="ascii")))
    return found


class TooLargeError(ConfigError):
    """Something would take more than this machine has, or than anybody needs."""


def check_memory(needed: int, what: str) -> None:
    """Raise `TooLargeError` for what this machine has no memory for, before it is allocated. `needed` is in bytes."""
    limit = memory()
    if needed > limit:
        raise TooLargeError(
            f"{what} would take {needed:,} bytes ({needed / 2**30:,.1f} GiB), and this machine has {limit / 2**30:,.1f} GiB; "
            f"if it is meant, set {MEMORY} to a higher number (64GiB)"
        )


def take_gpu(device: str) -> None:
    """Make the GPU that is asked for the one that "cuda" means. Raises `ConfigError` where there is none."""
    if not device.startswith("cuda"):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise ConfigError(f"device {device}: this machine has {count or 'no'} CUDA device{'s' if count != 1 else ''}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"device {device}: of several processes each takes its own GPU; leave it at auto")
    torch.cuda.set_device(index)
