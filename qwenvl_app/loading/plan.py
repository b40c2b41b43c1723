"""How the device's memory is divided: by estimates, and on a GPU again by what was measured.

The start and the doctor make the same plan. On one device the KV cache and the vision tower share
what the weights and the known pictures leave: a tower at work is when the fewest tokens are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qwenvl_app.loading.footprint import Footprint
from qwenvl_app.settings import Settings

GIB, MIB = 2**30, 2**20
# A pixel of a picture takes four bytes, and four times that for a moment if it is WebP.
# And of what it is resized to: itself, an array of it, and floats; these until it is encoded.
DECODING, DECODED, RESIZED, FLOATS = 16, 4, 19, 12
_PROMPT = 1000  # tokens beside the picture: a page of text
# Left alone: workspaces, fragments, kernels that CUDA loads late. On a CPU the tokenizer's tables
# (up to 130 MiB), and code that is only touched once the model runs; a machine has other users too.
_GPU_MARGIN, _CPU_MARGIN, _CPU_SHARE = 512 * MIB, 320 * MIB, 0.1
_NO_ROOM = "the largest allowed picture does not fit beside the weights"


@dataclass(frozen=True)
class Memory:
    """What is there: GPUs with so many bytes free each, or the CPU with its one number.

    ``host``: what the machine has for weights that no GPU has room for; 0: they have to fit.
    ``shares``: the weights are loaded, and each device has such a part of the KV cache.
    """

    free: Sequence[int]
    cpu: bool
    host: int = 0
    shares: Sequence[float] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``problem`` is why it can't work, ``tight`` what may fail when all slots are busy."""

    need: Footprint
    settings: Settings
    memory: Memory
    shared: bool  # memory of tower and KV cache
    largest: int  # tokens of the largest request
    prefix_cache: int = 0  # for pictures that were asked about before
    room: int = 0  # for the KV cache, and for the tower if that shares it
    tokens: int = 0  # in the KV cache
    max_memory: dict[int | str, int] | None = None  # of weights, where a device may be too small
    offloaded: int = 0  # weights that stay in the machine's memory and are fetched in every step
    problem: str | None = None
    tight: str | None = None
    advice: str = ""  # what would fit

    @property
    def free(self) -> int:
        """Of all devices."""
        return sum(self.memory.free)

    @property
    def kv_cache(self) -> int:
        """With what recurrent layers keep of every slot."""
        return self.tokens * self.need.kv_token + self.settings.max_concurrency * self.need.state

    @property
    def patch(self) -> tuple[float, float]:
        """What a patch takes of ``tokens``: in the tower, and from there until it is read."""
        need = self.need
        rate = self.shared / need.token / max(1, need.patches)
        return rate * (need.tower - need.features), rate * need.features

    @property
    def together(self) -> int:
        """How many of the largest requests fit at once, one of them in the tower."""
        tower = self.shared * (self.need.tower - self.need.features)
        each = self.need.token * self.largest + self.need.features
        fit = (self.room - tower) // each or int(self.room >= each)
        return max(0, min(self.settings.max_concurrency, fit))

    @property
    def picture(self) -> int:
        """The most that the machine needs for the picture of one request."""
        pixels = self.settings.max_image_megapixels * 1e6
        return int(max(DECODING * pixels, DECODED * pixels + RESIZED * self.need.pixels))

    @property
    def work(self) -> int:
        """On a CPU: the most that an idle process takes for the largest request in every slot."""
        need, slots = self.need, self.settings.max_concurrency
        held = slots * DECODED * self.settings.max_image_megapixels * 1e6
        encoding = held + slots * FLOATS * need.pixels + need.tower
        tokens = min(slots * self.largest, self.tokens) * need.token
        kept = min(self.prefix_cache, slots * need.picture_tokens * need.kv_token)
        return int(max(slots * self.picture, encoding, held + slots * need.state + tokens + kept))

    def __str__(self) -> str:
        need = self.need
        text = (
            f"{gib(max(0, self.free))} free{' beside' if self.memory.shares else ';'} "
            f"weights {gib(need.weights - self.offloaded)}, vision tower up to {gib(need.tower)}, "
            f"known pictures up to {gib(self.prefix_cache)}, KV cache up to {gib(self.kv_cache)} "
            f"({self.tokens:,} tokens of {need.kv_token / 1024:.0f} KiB"
            f"{', less what the tower takes' if self.shared else ''})"
        )
        if self.offloaded:
            text += f"; {gib(self.offloaded)} of the weights stay outside, and every step is slower"
        if self.problem or self.tight:
            return f"{text}; {self.problem or self.tight}{self.advice}"
        if self.together < self.settings.max_concurrency:
            text += f"; of the largest requests {self.together} at a time, which is no error"
        return text


def make(need: Footprint, settings: Settings, memory: Memory) -> MemoryPlan:
    """The plan for ``memory``, with advice if it can't work."""
    plan = _divide(need, settings, memory)
    if not (plan.problem or plan.tight):
        return plan
    advice = list(_other_settings(plan))
    if plan.problem:
        half = need.dtype == "float32" and not (need.quantised or memory.shares)
        advice += ["QWENVL_DTYPE=bfloat16"] * half
        advice += ["a quantised or a smaller checkpoint", "more memory"]
    return replace(plan, advice=f"; what would fit: {', or '.join(advice)}" if advice else "")


def gib(size: float) -> str:
    """For people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def _other_settings(plan: MemoryPlan) -> Iterator[str]:
    """Those with which it works, each by itself and as it is typed."""
    settings = plan.settings
    for name, values in (
        ("max_concurrency", range(settings.max_concurrency - 1, 0, -1)),
        ("max_image_megapixels", _smaller(settings.max_image_megapixels)),
        ("kv_cache_mb", [0] * bool(settings.kv_cache_mb)),
    ):
        for value in values:
            changed = settings.model_copy(update={name: value})
            need = plan.need.at(changed.max_image_megapixels * 1e6)
            other = _divide(need, changed, plan.memory)
            if not (other.problem or other.tight):
                more = f", which makes it {other.kv_cache // MIB} here" if value == 0 else ""
                yield f"QWENVL_{name.upper()}={value:g}{more}"
                break


def _smaller(megapixels: float) -> Iterator[float]:
    """Sizes to try: down from so many to a quarter of one, in round numbers."""
    while megapixels > 0.3:
        megapixels *= 0.95
        yield float(f"{megapixels:.2g}")


def _divide(need: Footprint, settings: Settings, memory: Memory) -> MemoryPlan:
    slots, answered = settings.max_concurrency, need.picture_tokens + settings.max_new_tokens
    # A compiled step's cache does not shrink with what lives.
    shared = len(memory.free) == 1 and settings.compile != "on" and not settings.kv_cache_mb
    largest = min(answered + min(_PROMPT, settings.max_prompt_chars), need.max_length)
    plan = MemoryPlan(need, settings, memory, shared, largest)
    pictures = plan.picture * memory.cpu
    # The tower's own memory: one picture is in it, while another is prefilled.
    beside = 0 if shared else need.tower + need.features * (slots > 1)
    asked = max(0, settings.kv_cache_mb * MIB - slots * need.state) // need.kv_token
    tokens = (asked or largest) * need.token
    least = max(need.tower, tokens + need.features) if shared else beside + tokens
    plan, spare = _spare(plan, least, beside)
    if spare < least + pictures:
        own = "QWENVL_KV_CACHE_MB does not fit beside the weights"
        why = own if settings.kv_cache_mb else _NO_ROOM
        if spare <= 0:
            why = _NO_ROOM if memory.shares else "the weights do not fit"
        return replace(plan, problem=why)
    prefix_cache = min(settings.prefix_cache_mb * MIB, spare - least - pictures)
    room, tight = spare - prefix_cache - slots * pictures, None
    if room < least:
        tight = "the largest picture in every slot at once does not fit"
    if 0 < asked < largest:
        tight = "QWENVL_KV_CACHE_MB is too small for the largest request: it is refused"
    # No more than every slot could use, whatever is asked.
    each = min(need.max_length, answered + settings.max_prompt_chars) * need.token + need.features
    room = min(max(room, least), slots * each + need.tower) - beside
    tokens = asked or room // need.token
    return replace(plan, prefix_cache=prefix_cache, room=room, tokens=tokens, tight=tight)


def _spare(plan: MemoryPlan, least: int, beside: int) -> tuple[MemoryPlan, int]:
    """What the weights leave, of which ``least`` is wanted; the plan with where they go."""
    need, memory, devices = plan.need, plan.memory, len(plan.memory.free)
    margin = _GPU_MARGIN
    if memory.cpu:
        margin = max(_CPU_MARGIN, int(_CPU_SHARE * memory.free[0]))
    # What a step takes whatever is in it, and recurrent layers for every slot.
    settings = plan.settings
    margin += settings.max_concurrency * need.state + settings.prefill_chunk * need.chunk_token
    usable = [size - margin for size in memory.free]
    if memory.shares:  # each layer's keys lie beside its weights
        sizes = zip([usable[0] - beside, *usable[1:]], memory.shares, strict=True)
        return plan, beside + int(min(size / share for size, share in sizes if share))
    # Layers go to a device as a whole: on each but the last, less than one may find no place.
    spare = sum(usable) - need.weights - (devices - 1) * need.layer
    # accelerate keeps a place free for the layer that is fetched.
    outside = least - spare + need.layer
    if spare < least <= spare + need.weights and memory.host > outside:
        plan, spare = replace(plan, offloaded=min(need.weights, outside)), least
    if devices > 1 or plan.offloaded:
        limits: dict[int | str, int] = {"cpu": memory.host}
        for number, size in enumerate(usable):  # which accelerate fills evenly
            limits[number] = max(0, size - (least - beside) // devices - beside * (not number))
        plan = replace(plan, max_memory=limits)
    return plan, spare
