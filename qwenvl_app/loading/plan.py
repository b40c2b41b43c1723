"""What the device's memory is used for, decided before anything is loaded.

The start and the doctor make the same plan. On one device the KV cache and the vision tower share
what the weights and the known pictures leave: a tower at work is when the fewest tokens are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qwenvl_app.loading.footprint import Footprint
from qwenvl_app.settings import Settings

GIB, MIB = 2**30, 2**20
# A pixel of a picture takes four bytes, and four times that for a moment if it is WebP.
# And of what it is resized to: itself, an array of it, and floats; these until it is encoded.
DECODING, DECODED, RESIZED, FLOATS = 16, 4, 19, 12
PROMPT = 1000  # tokens beside the picture: a page of text
# Code and tables that are only touched once the model runs: measured with the embedded model.
LIBRARIES = 40 * MIB
# Left alone: workspaces, fragments, kernels that CUDA loads late. A machine has other users too.
_GPU_MARGIN, _CPU_MARGIN, _CPU_SHARE = 512 * MIB, 256 * MIB, 0.1


_NO_ROOM = "the largest allowed picture does not fit beside the weights"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``problem`` is why it can't work, ``tight`` what may fail when all slots are busy."""

    need: Footprint
    settings: Settings
    free: int  # of all devices
    prefix_cache: int = 0  # for pictures that were asked about before
    room: int = 0  # for the KV cache, and for the tower if that shares it
    shared: bool = True
    tokens: int = 0  # in the KV cache
    max_memory: dict[int | str, int] | None = None  # for weights, where there are several devices
    offloaded: int = 0  # weights that stay in the machine's memory and are fetched in every step
    problem: str | None = None
    tight: str | None = None

    @property
    def kv_cache(self) -> int:
        """With what recurrent layers keep of every slot."""
        need = self.need
        return self.tokens * need.kv_token + self.settings.max_concurrency * need.state

    @property
    def patch(self) -> tuple[int, int]:
        """What a patch takes of ``kv_cache``: in the tower, and from there until it is read."""
        if not self.shared:
            return 0, 0
        need = self.need
        tower = need.tower.peak(need.patches) // max(1, need.patches) - need.tower.features
        features = need.tower.features
        return tower * need.kv_token // need.token + 1, features * need.kv_token // need.token + 1

    @property
    def together(self) -> int:
        """How many of the largest requests fit at once, one of them in the tower."""
        need, slots = self.need, self.settings.max_concurrency
        features = need.tower.features * need.patches
        each = need.token * _tokens(need, self.settings) + features
        tower = need.tower.peak(need.patches) - features if self.shared else 0
        if self.room >= each + tower:
            return min(slots, (self.room - tower) // each)
        return int(self.room >= each)

    def process(self, base: int) -> tuple[int, int]:
        """(idle, at most): what the process takes on a CPU, of which it has ``base`` already.

        At most: at the worst moment of the largest request in every slot.
        """
        need, slots, settings = self.need, self.settings.max_concurrency, self.settings
        pixels = settings.max_image_megapixels * 1e6
        tokens = slots * _tokens(need, settings)
        known = min(self.prefix_cache, slots * need.picture_tokens * need.kv_token)
        idle = base + LIBRARIES + need.tokenizer + _weights(need) + need.read - need.unread
        decoding = slots * picture(need, settings)
        encoding = slots * (DECODED * pixels + FLOATS * need.pixels) + need.tower.peak(need.patches)
        answering = (
            slots * (DECODED * pixels + need.state)
            + min(tokens, self.tokens) * need.token
            + known
            + settings.prefill_chunk * need.chunk_token
        )
        return idle, idle + int(max(decoding, encoding, answering))

    def __str__(self) -> str:
        need = self.need
        text = (
            f"{gib(max(0, self.free))} free; weights {gib(_weights(need) - self.offloaded)}, "
            f"vision tower up to {gib(need.tower.peak(need.patches))}, known pictures up to "
            f"{gib(self.prefix_cache)}, KV cache up to {gib(self.kv_cache)} "
            f"({self.tokens:,} tokens of {need.kv_token / 1024:.0f} KiB"
            f"{', less what the tower takes' if self.shared else ''})"
        )
        if self.offloaded:
            text += f"; {gib(self.offloaded)} of the weights stay outside, and every step is slower"
        if self.problem or self.tight:
            return f"{text}; {self.problem or self.tight}"
        if self.together < self.settings.max_concurrency:
            text += f"; of the largest requests {self.together} at a time, which is no error"
        return text


def make(
    need: Footprint, settings: Settings, free: Sequence[int], *, cpu: bool, host: int = 0
) -> MemoryPlan:
    """The plan for GPUs with so much ``free`` each, or for the CPU.

    ``host``: what the machine has for weights that no GPU has room for; 0: they have to fit.
    """

    def attempt(more: Settings, megapixels: float | None = None) -> MemoryPlan:
        smaller = need if megapixels is None else need.at(megapixels * 1e6)
        return _plan(smaller, more, free, cpu=cpu, host=host)

    plan = attempt(settings)
    if not (plan.problem or plan.tight):
        return plan
    advice = []
    for slots in range(settings.max_concurrency - 1, 0, -1):
        if _is_good(attempt(settings.model_copy(update={"max_concurrency": slots}))):
            advice.append(f"QWENVL_MAX_CONCURRENCY={slots}")
            break
    for megapixels in _smaller(settings.max_image_megapixels):
        change = {"max_image_megapixels": megapixels}
        if _is_good(attempt(settings.model_copy(update=change), megapixels)):
            advice.append(f"QWENVL_MAX_IMAGE_MEGAPIXELS={megapixels:g}")
            break
    if settings.kv_cache_mb:
        other = attempt(settings.model_copy(update={"kv_cache_mb": 0}))
        if _is_good(other):
            advice.append(f"QWENVL_KV_CACHE_MB=0, which makes it {other.kv_cache // MIB} here")
    if plan.problem:
        half = need.dtype == "float32" and not need.quantised
        advice += ["QWENVL_DTYPE=bfloat16"] * half + [
            "a quantised or a smaller checkpoint",
            "more memory",
        ]
    elif not advice:
        return plan
    why = f"{plan.problem or plan.tight}; what would fit: {', or '.join(advice)}"
    return replace(plan, problem=plan.problem and why, tight=plan.tight and why)


def picture(need: Footprint, settings: Settings) -> int:
    """The most that the machine needs for the picture of one request."""
    pixels = settings.max_image_megapixels * 1e6
    return int(max(DECODING * pixels, DECODED * pixels + RESIZED * need.pixels))


def gib(size: float) -> str:
    """For people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def _plan(
    need: Footprint, settings: Settings, free: Sequence[int], *, cpu: bool, host: int
) -> MemoryPlan:
    """Without advice."""
    slots, weights = settings.max_concurrency, _weights(need)
    pictures = picture(need, settings) if cpu else 0
    # A compiled step has no use for a cache that grows and shrinks with what lives.
    alone = len(free) == 1 and settings.compile == "off"
    shared = alone and not settings.kv_cache_mb
    plan = MemoryPlan(need, settings, sum(free), shared=shared)
    least = _least(need, settings, shared=shared)
    # Layers go to a device as a whole: on each but the last, less than one may find no place.
    spare = sum(_usable(need, settings, free, cpu=cpu)) - weights - (len(free) - 1) * need.layer
    if spare < least <= spare + weights and host > least - spare + need.layer:
        # accelerate keeps a place free for the layer that is fetched.
        plan, spare = replace(plan, offloaded=min(weights, least - spare + need.layer)), least
    if spare <= 0:
        return replace(plan, problem="the weights do not fit")
    if spare < least + pictures:
        own = "QWENVL_KV_CACHE_MB does not fit beside the weights"
        return replace(plan, problem=own if settings.kv_cache_mb else _NO_ROOM)
    prefix_cache = min(settings.prefix_cache_mb * MIB, spare - least - pictures)
    room = spare - prefix_cache - slots * pictures
    if room < least:
        room = least
        plan = replace(plan, tight="the largest picture in every slot at once does not fit")
    room = min(room, _most(need, settings)) - (0 if shared else _beside(need, settings))
    if len(free) > 1:
        # Each layer's keys lie beside its weights, so that there must be place for both.
        usable = sum(_usable(need, settings, free, cpu=cpu)) - _beside(need, settings)
        share = usable / (weights - plan.offloaded + (len(free) - 1) * need.layer) - 1
        room = min(room, int(share * need.layers) - prefix_cache)
    tokens = _asked(need, settings) or room // need.token
    if tokens < _tokens(need, settings):
        if not settings.kv_cache_mb:
            return replace(plan, problem=_NO_ROOM)
        why = "QWENVL_KV_CACHE_MB is too small for the largest request: it is refused"
        plan = replace(plan, tight=why)
    plan = replace(plan, prefix_cache=prefix_cache, room=room, tokens=tokens)
    if len(free) == 1 and not plan.offloaded:
        return plan
    return replace(plan, max_memory=_limits(plan, _usable(need, settings, free, cpu=cpu), host))


def _limits(plan: MemoryPlan, usable: list[int], host: int) -> dict[int | str, int]:
    """Of weights, for accelerate: ``usable`` less the tower, which is on the first, and the KV."""
    need = plan.need
    if len(usable) == 1:
        limits = [_weights(need) - plan.offloaded + need.layer]
    else:
        usable = [usable[0] - _beside(need, plan.settings), *usable[1:]]
        share = (plan.room + plan.prefix_cache) / need.layers
        limits = [math.ceil(size / (1 + share)) for size in usable]
    return {**dict(enumerate(limits)), "cpu": host}


def _usable(need: Footprint, settings: Settings, free: Sequence[int], *, cpu: bool) -> list[int]:
    """Of each device, for weights and caches."""
    fixed = settings.max_concurrency * need.state + settings.prefill_chunk * need.chunk_token
    if cpu:
        fixed += LIBRARIES + need.tokenizer
        return [size - max(_CPU_MARGIN, int(_CPU_SHARE * size)) - fixed for size in free]
    return [size - _GPU_MARGIN - fixed for size in free]


def _weights(need: Footprint) -> int:
    return need.weights + need.repacked


def _tokens(need: Footprint, settings: Settings) -> int:
    """Of the largest request, with a page of text for a prompt."""
    return min(need.picture_tokens + PROMPT + settings.max_new_tokens, need.max_length)


def _asked(need: Footprint, settings: Settings) -> int:
    """Tokens that QWENVL_KV_CACHE_MB has room for; 0 if it is not set."""
    states = settings.max_concurrency * need.state
    return max(0, settings.kv_cache_mb * MIB - states) // need.kv_token


def _least(need: Footprint, settings: Settings, *, shared: bool) -> int:
    """For one of the largest requests: what the tower takes and, then or at once, its tokens."""
    if shared:
        features = need.tower.features * need.patches
        tokens = features + _tokens(need, settings) * need.token
        return max(need.tower.peak(need.patches), tokens)
    tokens = _asked(need, settings) or _tokens(need, settings)
    return _beside(need, settings) + tokens * need.token


def _beside(need: Footprint, settings: Settings) -> int:
    """The tower's own memory: one picture is in it, while another is prefilled."""
    another = need.tower.features * need.patches if settings.max_concurrency > 1 else 0
    return need.tower.peak(need.patches) + another


def _most(need: Footprint, settings: Settings) -> int:
    """What every slot could use, whatever is asked."""
    prompt = need.picture_tokens + settings.max_prompt_chars + settings.max_new_tokens
    tokens = settings.max_concurrency * min(need.max_length, prompt)
    features = settings.max_concurrency * need.tower.features * need.patches
    return tokens * need.token + need.tower.peak(need.patches) + features


def _is_good(plan: MemoryPlan) -> bool:
    return not (plan.problem or plan.tight)


def _smaller(megapixels: float) -> Iterator[float]:
    """Sizes to try: down from so many to a quarter of one, in round numbers."""
    while megapixels > 0.3:
        megapixels *= 0.95
        yield float(f"{megapixels:.2g}")
