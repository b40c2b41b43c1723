"""The decode step, recorded as CUDA graphs and compiled before that: the setting ``compile``.

A decode step is over a thousand small operators, and to launch them takes longer than to run them.
A CUDA graph launches all in one go, but is bound to its shapes and addresses. So the rows of a call
and the columns that they look at are padded to powers of two: few graphs serve many steps. (vLLM,
``vllm/v1/cudagraph_dispatcher.py``, pads its batches for the same reason.) torch.compile fuses many
operators before, once for all shapes; it looks at the whole length of the cache.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from qwenvl_app import process
from qwenvl_app.engine.kv_cache import FEWEST_SLOTS, SlotCache, power_of_two
from qwenvl_app.errors import ModelLoadError, is_out_of_memory

log = logging.getLogger(__name__)

Step = Callable[..., torch.Tensor]
Eager = Callable[[SlotCache, list[int], list[int], list[int]], torch.Tensor]
Shape = tuple[int, int]  # of a call: its rows, and the columns of the cache that they look at

# Fewer are not worth a graph: attention to 512 takes 0.4 ms of a step, to 2,048 1.5 (8B, H100).
_FEWEST_COLUMNS = 512


class CompiledDecode:
    """``Runner.decode`` with shapes that seldom change. Used by the engine's thread alone.

    ``step`` (ids (rows,), positions (rows,), mask, cache) is the model's: logits (rows,
    vocabulary). ``eager`` is ``Runner.decode`` without all this. ``inductor``: ``step`` goes
    through torch.compile, in the first call, which takes a minute. Raises ModelLoadError.

    A graph's logits are compared with those of ``eager``, on the same cache, before it is used. If
    they differ, or the recording fails, there are no graphs from then on (``failures``).
    """

    def __init__(self, step: Step, eager: Eager, *, inductor: bool):
        if inductor and not shutil.which("g++"):  # torch would say so late, and in its own words
            raise ModelLoadError(
                "QWENVL_COMPILE=on needs a C++ compiler: install g++, or set QWENVL_COMPILE=off"
            )

        def body(
            inputs: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
        ) -> torch.Tensor:
            ids, positions, starts = inputs
            columns = torch.arange(keys[0].shape[2], device=inputs.device)
            mask = (columns <= starts[:, None])[:, None, None]
            return step(ids, positions, mask, _Cells(keys, values, starts))

        self._body: Step = torch.compile(body) if inductor else body
        self._eager, self._fuses = eager, inductor
        self._least = FEWEST_SLOTS if inductor else 1
        self.graphs: dict[Shape, Graph] = {}
        self._calls: Counter[Shape] = Counter()  # on the cache that the graphs are bound to
        self._version = -1  # of that cache
        self._compiled = False
        self.failures = 0

    def fits(self, cache: SlotCache, rows: int) -> bool:
        """Whether there is room in ``cache`` for a call of ``rows``, padded."""
        return not self.failures and power_of_two(rows, self._least) <= cache.slots

    def rehearse(self, cache: SlotCache, slots: int, length: int) -> None:
        """Record the graphs of up to ``slots`` rows, on noise in a cache that nobody uses.

        It keeps room for so many slots of up to ``length`` tokens.
        """
        if self._fuses or not (length := cache.hold(slots, length)):
            return
        tensors = [tensor for side in cache.first(cache.slots, cache.length) for tensor in side]
        for tensor in tensors:
            tensor.normal_()
        lengths = [length]
        while lengths[-1] > _FEWEST_COLUMNS:
            lengths.append(lengths[-1] // 2)
        for rows in (2**n for n in range(power_of_two(slots).bit_length())):
            for longest in 2 * lengths:
                if self.fits(cache, rows):
                    starts = [longest - 1 - (37 * row) % longest for row in range(rows)]
                    self(cache, list(range(rows)), starts, starts)
        for tensor in tensors:
            tensor.zero_()

    def __call__(
        self, cache: SlotCache, ids: list[int], positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        """One token for each of the slots 0 to n; logits (n, vocabulary), until the next call."""
        if cache.version != self._version:
            self.graphs.clear()
            self._calls.clear()
            self._version = cache.version
        count, device = len(ids), cache.layout.devices[0]
        rows, columns = self._shape(cache, starts)
        padding = [0] * (rows - count)
        inputs = torch.tensor([each + padding for each in (ids, positions, starts)]).to(device)
        if graph := self.graphs.get((rows, columns)):
            return graph.replay(inputs)[:count]
        self._calls[rows, columns] += 1
        # At the first call on a cache nobody knows yet whether it stays for longer.
        records = _records(device) and self._calls[rows, columns] == 2
        if self._fuses and not records:
            return self._run_compiled(inputs, *cache.first(rows, columns))[:count]
        logits = self._eager(cache, ids, positions, starts)
        if records:
            self._record(cache, inputs, columns, logits)
        return logits

    def _shape(self, cache: SlotCache, starts: list[int]) -> Shape:
        rows = power_of_two(len(starts), self._least)
        if self._fuses:
            return rows, cache.length
        return rows, min(power_of_two(max(starts) + 1, _FEWEST_COLUMNS), cache.length)

    def _run_compiled(
        self, inputs: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        if not self._compiled:
            packed = keys[0].is_cpu and keys[0].dtype is torch.float32
            process.freeze_compiled_weights(packed)
            _mark(inputs, keys, values)
            self._compiled = True
        return self._body(inputs, keys, values)

    def _record(
        self, cache: SlotCache, inputs: torch.Tensor, columns: int, expected: torch.Tensor
    ) -> None:
        """Make a graph of a call whose logits are ``expected``: it writes what is there already."""
        rows = inputs.shape[1]
        keys, values = cache.first(rows, columns)
        pool = next((graph.pool for graph in self.graphs.values()), None)
        try:
            if not expected.isfinite().all():  # which says nothing about a graph
                self._calls[rows, columns] -= 1
                return
            self._body(inputs, keys, values)  # a recording has to find what is made but once
            graph = Graph(self._body, inputs, keys, values, pool)
            if not alike(graph.replay(inputs)[: len(expected)], expected):
                raise ValueError("its logits are not those of the model")
        except Exception as error:
            if is_out_of_memory(error):  # of no meaning for the next cache
                log.warning("there is no memory for a CUDA graph of %d rows", rows)
                return
            self.failures += 1
            self.graphs.clear()
            log.exception("CUDA graphs are not used: QWENVL_COMPILE=off does not try")
        else:
            self.graphs[rows, columns] = graph


def alike(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether both (rows, vocabulary) differ by rounding alone: a wrong row or place is off by 1.

    In half precision two kernels that are both right may differ by some hundredths of the size.
    """
    close = 1e-3 if expected.dtype is torch.float32 else 0.2
    expected = expected.float()
    off = (logits.float() - expected).square().mean(-1)
    return bool((off <= close**2 * expected.var(-1)).all())


def _mark(inputs: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Tell torch.compile which sizes change from call to call."""
    torch._dynamo.mark_dynamic(inputs, 1)
    for tensor in (*keys, *values):
        torch._dynamo.mark_dynamic(tensor, (0, 2))


class _Cells(Cache):
    """The slots of a ``SlotCache`` in one compiled call: writes one column of each."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], starts: torch.Tensor):
        super().__init__(layers=[])
        self._keys, self._values, self._starts = keys, values, starts
        self._rows = torch.arange(len(starts), device=starts.device)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._rows, :, self._starts] = key_states[:, :, 0]
        values[self._rows, :, self._starts] = value_states[:, :, 0]
        return keys, values


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


class Graph:
    """A call of ``body``, recorded: replayed on whatever lies at the same addresses then.

    ``pool``: another graph's, of its memory; of the two only one has to know its logits at a time.
    """

    def __init__(
        self,
        body: Step,
        inputs: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        pool: Any,
    ):
        self._inputs = inputs.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Requests' threads may copy their prompts to the GPU meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = body(self._inputs, keys, values)
        self.pool = self._graph.pool()

    def replay(self, inputs: torch.Tensor) -> torch.Tensor:
        """The logits for other inputs, until the next call."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._logits
