"""A device's memory, as torch's books have it; ``pretend.Gpus`` keeps the same books."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class Meter(Protocol):
    """Of a device's memory, in bytes."""

    @property
    def allocated(self) -> int: ...

    @property
    def peak(self) -> int: ...

    def restart(self) -> None:
        """The peak is what is allocated now."""

    def limit(self, room: int) -> AbstractContextManager[None]:
        """Within the block, so many bytes are left."""

    def here(self) -> AbstractContextManager[None]:
        """Within the block, this thread may use the device."""


class Cuda:
    def __init__(self, device: torch.device):
        # torch's limit of a process wants a device with its number.
        self._device = torch.device("cuda", device.index or 0)

    @property
    def allocated(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    @contextmanager
    def limit(self, room: int) -> Iterator[None]:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self._device).total_memory
        held = torch.cuda.memory_reserved(self._device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + room) / total), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def here(self) -> AbstractContextManager[None]:
        return nullcontext()
