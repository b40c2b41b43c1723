"""How the device's memory is divided: by estimates, and on a GPU again by what was measured.

The start and the doctor make the same plan. On one device the KV cache and the vision tower share
what the weights and the known pictures leave: a tower at work is when the fewest tokens are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from qwenvl_app.loading.footprint import Footprint
from qwenvl_app.settings import Settings

GIB, MIB = 2**30, 2**20
_PROMPT = 1000  # tokens beside the picture: a page of text
# Bytes a pixel: of a picture (WebP) while it is decoded, then; and of what it is resized to.
_DECODING, _DECODED, _RESIZED = 16, 4, 19
# Left alone: workspaces, fragments, kernels that CUDA loads late; on a CPU there are other users.
_GPU_MARGIN, _CPU_MARGIN, _CPU_SHARE = 512 * MIB, 320 * MIB, 0.1
_CHANGE = (
    "lower QWENVL_MAX_IMAGE_MEGAPIXELS or QWENVL_KV_CACHE_MB, set QWENVL_DTYPE=bfloat16, or take a "
    "quantised or a smaller checkpoint"
)


class Memory(NamedTuple):
    """What is there."""

    free: Sequence[int]  # bytes of each GPU, or of the CPU alone
    cpu: bool
    host: int = 0  # of the machine, for weights that no GPU has room for; 0: they have to fit
    shares: Sequence[float] = ()  # each GPU's of the KV cache, once the weights are loaded


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``problem`` is why it can't work, ``tight`` what may fail when all slots are busy."""

    need: Footprint
    settings: Settings
    memory: Memory
    pictures: int  # the most that the machine needs for those of all requests
    max_memory: dict[int | str, int] | None = None  # of weights, where a device may be too small
    offloaded: int = 0  # weights that stay in the machine's memory and are fetched in every step
    prefix_cache: int = 0  # for pictures that were asked about before
    tokens: int = 0  # in the KV cache
    kv_cache: int = 0  # of these, and what recurrent layers keep of every slot
    # What a patch takes of ``tokens``, if it does: in the tower, and from there until it is read.
    patch: tuple[float, float] = (0, 0)
    problem: str = ""
    tight: str = ""

    @property
    def kept(self) -> int:
        """The most that all requests take, but for their pictures."""
        return self.prefix_cache + self.tokens * self.need.token

    def __str__(self) -> str:
        need = self.need
        text = (
            f"{gib(sum(self.memory.free))} free{' beside' if self.memory.shares else ';'} "
            f"weights {gib(need.weights - self.offloaded)}, vision tower up to {gib(need.tower)}, "
            f"known pictures up to {gib(self.prefix_cache)}, KV cache up to {gib(self.kv_cache)} "
            f"({self.tokens:,} tokens of {need.kv_token / 1024:.0f} KiB"
            f"{', less what the tower takes' if any(self.patch) else ''})"
        )
        if self.offloaded:
            text += f"; {gib(self.offloaded)} of the weights stay outside, and every step is slower"
        return "; ".join(filter(None, (text, self.problem or self.tight)))


def gib(size: float) -> str:
    """For people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def make(need: Footprint, settings: Settings, memory: Memory) -> MemoryPlan:
    """The plan for ``memory``; what is wrong with it says what to change."""
    slots, answered = settings.max_concurrency, need.picture_tokens + settings.max_new_tokens
    pixels = settings.max_image_megapixels * 1e6
    pictures = slots * int(max(_DECODING * pixels, _DECODED * pixels + _RESIZED * need.pixels))
    # A compiled step's cache does not shrink with what lives: the tower has memory of its own then.
    shared = len(memory.free) == 1 and settings.compile != "on" and not settings.kv_cache_mb
    largest = min(answered + min(_PROMPT, settings.max_prompt_chars), need.max_length)
    asked = max(0, settings.kv_cache_mb * MIB - slots * need.state) // need.kv_token
    least = max(need.tower * shared, (asked or largest) * need.token + need.features)
    beside = 0 if shared else need.tower
    plan, spare = _place(MemoryPlan(need, settings, memory, pictures), least, beside)
    decoded = pictures // slots * memory.cpu
    if spare < least + decoded:
        why = "the largest allowed picture does not fit beside the weights"
        if spare <= 0 and not memory.shares:
            why = "the weights do not fit"
        return replace(plan, problem=f"{why}: {_CHANGE}")
    prefix_cache = min(settings.prefix_cache_mb * MIB, spare - least - decoded)
    room, tight = spare - prefix_cache - slots * decoded, ""
    if room < least:
        tight = (
            "the largest picture in every slot at once does not fit: lower QWENVL_MAX_CONCURRENCY "
            "or QWENVL_MAX_IMAGE_MEGAPIXELS"
        )
    if 0 < asked < largest:
        tight = "QWENVL_KV_CACHE_MB is too small for the largest request: it is refused"
    # No more than every slot could use, whatever is asked.
    each = min(need.max_length, answered + settings.max_prompt_chars) * need.token + need.features
    tokens = asked or min(max(room, least), slots * each + need.tower) // need.token
    rate = shared / need.token / max(1, need.patches)
    return replace(
        plan,
        prefix_cache=prefix_cache,
        tokens=tokens,
        kv_cache=tokens * need.kv_token + slots * need.state,
        patch=(rate * (need.tower - need.features), rate * need.features),
        tight=tight,
    )


def _place(plan: MemoryPlan, least: int, beside: int) -> tuple[MemoryPlan, int]:
    """The plan with where weights go, and what they leave, of which ``least`` is wanted.

    ``beside``: memory of the first device that is nobody else's.
    """
    need, memory, settings = plan.need, plan.memory, plan.settings
    margin = max(_CPU_MARGIN, int(_CPU_SHARE * memory.free[0])) if memory.cpu else _GPU_MARGIN
    # What a step takes whatever is in it, and recurrent layers for every slot.
    margin += settings.max_concurrency * need.state + settings.prefill_chunk * need.chunk_token
    usable = [size - margin for size in memory.free]
    usable[0] -= beside
    if memory.shares:  # each layer's keys lie beside its weights
        sizes = zip(usable, memory.shares, strict=True)
        return plan, int(min(size / share for size, share in sizes if share))
    # Layers go to a device as a whole: on each but the last, less than one may find no place.
    spare = sum(usable) - need.weights - (len(usable) - 1) * need.layer
    # accelerate keeps a place free for the layer that is fetched.
    outside = least - spare + need.layer
    if spare < least <= spare + need.weights and memory.host > outside:
        plan, spare = replace(plan, offloaded=min(need.weights, outside)), least
    if len(usable) > 1 or plan.offloaded:
        limits: dict[int | str, int] = {"cpu": memory.host}
        for number, size in enumerate(usable):  # which accelerate fills evenly
            limits[number] = max(0, size - least // len(usable))
        plan = replace(plan, max_memory=limits)
    return plan, spare
