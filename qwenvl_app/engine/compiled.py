"""The decode step, compiled, and on a GPU recorded once and replayed: the setting ``compile``.

A decode step is over a thousand small operators, and to launch them takes longer than to run them.
torch.compile fuses many of them, once for all shapes; a CUDA graph launches what is left in one go,
but is bound to its shapes and addresses. So the rows of a call are padded to a power of two and
their length is the whole cache's, which grows in powers of two: few graphs serve many steps.
(vLLM, ``vllm/v1/cudagraph_dispatcher.py``, pads its batches for the same reason.)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwenvl_app import process
from qwenvl_app.engine.kv_cache import FEWEST_SLOTS, SlotCache, power_of_two
from qwenvl_app.errors import ModelLoadError

Step = Callable[..., torch.Tensor]


class CompiledDecode:
    """``Runner.decode`` with shapes that seldom change. Used by the engine's thread alone.

    ``step`` (ids (rows,), positions (rows,), mask, cache) is the model's: logits (rows,
    vocabulary). Compiles in its first call, which takes a minute. Raises ModelLoadError.
    """

    def __init__(self, step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], Any]):
        if not shutil.which("g++"):  # torch would say so after long, and name its own variables
            raise ModelLoadError(
                "QWENVL_COMPILE=on needs a C++ compiler: install g++, or set QWENVL_COMPILE=off"
            )

        def body(
            inputs: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
        ) -> torch.Tensor:
            ids, positions, starts = inputs
            columns = torch.arange(keys[0].shape[2], device=inputs.device)
            mask = (columns <= starts[:, None])[:, None, None]
            logits: torch.Tensor = step(ids, positions, mask, _Cells(keys, values, starts))
            return logits

        self._body: Step = torch.compile(body)
        self._graphs: dict[int, Graph | None] = {}  # by rows; None: has run once, not recorded
        self._compiled = False
        self._version = -1  # of the cache whose addresses are in the graphs

    def fits(self, cache: SlotCache, rows: int) -> bool:
        """Whether there is room in ``cache`` for a call of ``rows``, padded."""
        return power_of_two(rows, FEWEST_SLOTS) <= cache.slots

    def __call__(
        self, cache: SlotCache, ids: list[int], positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        """One token for each of the slots 0 to n; logits (n, vocabulary), until the next call."""
        count = len(ids)
        padding = [0] * (power_of_two(count, FEWEST_SLOTS) - count)
        inputs = torch.tensor([each + padding for each in (ids, positions, starts)])
        inputs = inputs.to(cache.layout.devices[0])
        if cache.version != self._version:
            self._graphs.clear()
            self._version = cache.version
        rows = inputs.shape[1]
        if graph := self._graphs.get(rows):
            return graph.replay(inputs)[:count]
        keys, values = cache.first(rows)
        if not self._compiled:
            packed = keys[0].is_cpu and keys[0].dtype is torch.float32
            process.freeze_compiled_weights(packed)
            _mark(inputs, keys, values)
            self._compiled = True
        if _records(inputs.device) and rows in self._graphs:
            self._graphs[rows] = graph = Graph(self._body, inputs, keys, values)
            return graph.replay(inputs)[:count]
        self._graphs[rows] = None  # a recording has to find everything made that is made but once
        return self._body(inputs, keys, values)[:count]


def _mark(inputs: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Tell torch.compile which sizes change from call to call."""
    torch._dynamo.mark_dynamic(inputs, 1)
    for tensor in (*keys, *values):
        torch._dynamo.mark_dynamic(tensor, (0, 2))


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What ``sdpa`` is in transformers, but heads share keys and values when compiled, too.

    For one query token it takes the heads that share them for as many tokens of one head; but under
    torch.compile it copies keys and values for every head, which may be more than all weights.
    """
    rows, heads, width, size = query.shape
    if width > 1:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
        return result
    packed = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    attended = F.scaled_dot_product_attention(packed, key, value, attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, size), None


ATTENTION = "sdpa_packed"
AttentionInterface.register(ATTENTION, _attend)


class _Cells(Cache):
    """The slots of a ``SlotCache`` in one compiled call: writes one column of each."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], starts: torch.Tensor):
        super().__init__(layers=[])
        self._keys, self._values, self._starts = keys, values, starts

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows = torch.arange(keys.shape[0], device=keys.device)
        keys[rows, :, self._starts] = key_states[:, :, 0]
        values[rows, :, self._starts] = value_states[:, :, 0]
        return keys, values


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


class Graph:
    """A call of ``body``, recorded: replayed on whatever lies at the same addresses then."""

    def __init__(
        self,
        body: Step,
        inputs: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ):
        self._inputs = inputs.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Requests' threads may copy their prompts to the GPU meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = body(self._inputs, keys, values)

    def replay(self, inputs: torch.Tensor) -> torch.Tensor:
        """The logits for other inputs, until the next call."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._logits
