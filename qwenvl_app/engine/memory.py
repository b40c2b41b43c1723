"""How much memory there is: of the machine, of the process's control group, of GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on ``device``: a GPU, or else the machine, under its limits."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    groups = _OWN.read_text(encoding="ascii") if _OWN.is_file() else ""
    own = groups.partition("0::")[2].split("\n")[0]  # the line of version 2
    return max(0, min([psutil.virtual_memory().available, *_limits(_CGROUPS, own)]))


def _limits(root: Path, own: str) -> list[int]:
    """What is left under the limit of each control group (v2) that ``own``'s path leads through.

    Under systemd that path is the unit's and has its MemoryMax; in a container it is often "/".
    """
    group, left = root / own.strip("/"), []
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()) != "max":
            used = int((folder / "memory.current").read_text(encoding="ascii"))
            left.append(int(most) - used + _reclaimable(folder / "memory.stat"))
        if folder == root:
            break
    return left


def _reclaimable(stat: Path) -> int:
    """Page cache that goes when memory is wanted, such as a checkpoint that was just read."""
    lines = stat.read_text(encoding="ascii").splitlines() if stat.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def gpu_memory(devices: Iterable[torch.device]) -> dict[tuple[int, str], int]:
    """Bytes by (GPU, kind). From torch's own books: a GPU that hangs can't stop this."""
    sizes = {}
    for device in {device for device in devices if device.type == "cuda"}:
        index = device.index or 0
        sizes[index, "allocated"] = torch.cuda.memory_allocated(device)
        sizes[index, "reserved"] = torch.cuda.memory_reserved(device)
        sizes[index, "total"] = torch.cuda.get_device_properties(device).total_memory
    return sizes


def place(module: Any) -> torch.device:
    """Where ``module``, which has a weight of its own, computes.

    Weights that no GPU has room for are nowhere ("meta") until accelerate fetches them for a call.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    device: torch.device = module.weight.device
    return torch.device(hook.execution_device) if hook and device.type == "meta" else device
