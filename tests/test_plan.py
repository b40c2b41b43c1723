"""The plan for devices that are not here: the real models' numbers against pretended memory."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from qwenvl_app.loading import devices, plan
from qwenvl_app.loading.footprint import Footprint, estimate
from qwenvl_app.loading.plan import GIB, MIB, Memory, MemoryPlan
from qwenvl_app.settings import load_settings
from tests import real_shape
from tests.test_footprint import write

MARGIN = 512 * MIB
LARGEST = 16384 + 1000 + 1024  # tokens of a request


def published(
    width: int,
    layers: int,
    parameters: float,
    *,
    heads: int,
    vision: int = 1152,
    eager: bool = False,
) -> Footprint:
    """The footprint in bfloat16 on a GPU, from what is known of the published configurations."""
    config = real_shape.config(width, layers)
    config["text_config"] |= {"num_attention_heads": heads, "num_key_value_heads": 8}
    config["vision_config"] |= {
        "hidden_size": vision,
        "intermediate_size": 4304 if vision == 1152 else 4096,
    }
    with TemporaryDirectory() as folder:
        files = write(Path(folder), config)
        need = estimate(files, "bfloat16", 50e6, cpu=False, eager=eager)
    weights, layer = int(2 * parameters), 2 * 151936 * width
    return dataclasses.replace(need, weights=weights, layer=layer)


M2 = published(2048, 28, 2.13e9, heads=16, vision=1024)
M4 = published(2560, 36, 4.44e9, heads=32, vision=1024)
M8 = published(4096, 36, 8.77e9, heads=32)
M32 = published(5120, 64, 33.4e9, heads=64)
# What is free on a card before the model comes: 24 GB are 24,564 MiB on a 4090 and 23,034 on an L4,
# less what CUDA takes for itself.
CARDS = {"16": 15.6, "L4": 22.0, "24": 23.4, "48": 47.0, "80": 79.0}


def make(
    need: Footprint, *free: float, cpu: bool = False, host: float = 0, **changes
) -> MemoryPlan:
    sizes = [int(each * GIB) for each in free]
    memory = Memory(sizes, cpu=cpu, host=int(host * GIB))
    return plan.make(need, load_settings({}, **changes), memory)


# By card, how many of the largest requests (16.8 megapixels, a page of text, 1,024 tokens of
# answer) run at once; None: it does not start.
@pytest.mark.parametrize(
    ("need", "together"),
    [
        (M2, {"16": 3, "L4": 4, "24": 4, "48": 4, "80": 4}),
        (M4, {"16": 1, "L4": 3, "24": 3, "48": 4, "80": 4}),
        (M8, {"16": None, "L4": 1, "24": 1, "48": 4, "80": 4}),
        (M32, {"16": None, "L4": None, "24": None, "48": None, "80": 2}),
    ],
    ids=["2B", "4B", "8B", "32B"],
)
def test_cards(need: Footprint, together: dict[str, int | None]):
    found = {}
    for card, free in CARDS.items():
        made = make(need, free)
        found[card] = None if made.problem else made.together
        assert not made.tight
        if not made.problem:
            assert made.prefix_cache == 512 * MIB
            taken = need.weights + made.room + made.prefix_cache + MARGIN
            assert taken <= free * GIB, card  # nothing is promised twice
    assert found == together


def test_a_larger_card_is_used():
    """Half of what was free went to the KV cache whatever else was needed, and half to nothing."""
    rooms = [make(M8, CARDS[card]).kv_cache for card in ("L4", "24", "48", "80")]
    assert rooms == sorted(set(rooms))
    assert rooms[0] > 4 * GIB
    # No more than four requests could use, however large the card.
    assert make(M8, 200).kv_cache == make(M8, 400).kv_cache < 60 * GIB


def test_the_numbers_of_8b():
    """What the README says: 144 KiB a token."""
    assert M8.kv_token == 144 * 1024
    assert 2.5 * GIB < M8.tower < 3.5 * GIB


@pytest.mark.parametrize(
    ("need", "free", "changes", "words"),
    [
        (M8, 15.6, {}, "the weights do not fit; what would fit: a quantised or a smaller check"),
        (
            M8,
            19.5,
            {},
            "the largest allowed picture does not fit beside the weights; what would fit: "
            "QWENVL_MAX_IMAGE_MEGAPIXELS=",
        ),
        (
            M8,
            23.4,
            {"kv_cache_mb": 7000},
            "QWENVL_KV_CACHE_MB does not fit beside the weights; what would fit: "
            "QWENVL_KV_CACHE_MB=0, which makes it 5520 here, or a quantised",
        ),
    ],
)
def test_what_would_fit_is_said(need: Footprint, free: float, changes: dict[str, int], words: str):
    made = make(need, free, **changes)
    assert made.problem
    assert words in str(made)


def test_what_is_advised_works():
    made = make(M8, 19.5)
    assert made.problem
    megapixels = float(str(made).partition("QWENVL_MAX_IMAGE_MEGAPIXELS=")[2].split(",")[0])
    assert 5 < megapixels < 16
    smaller = make(M8.at(megapixels * 1e6), 19.5, max_image_megapixels=megapixels)
    assert not smaller.problem
    assert smaller.together >= 1


def test_advice_can_be_typed_as_it_is_printed():
    """Into an environment: it named keys that are no variables."""
    plans = [
        make(M8, 19.5),
        make(M8, 23.4, kv_cache_mb=7000),
        make(M2, 10, cpu=True),
        make(dataclasses.replace(M2, dtype="float32", weights=2 * M2.weights), 6),
    ]
    advised = [re.findall(r"(\w+)=([\w.]+)", str(made)) for made in plans]
    assert {name for each in advised for name, _ in each} == {
        *("QWENVL_MAX_IMAGE_MEGAPIXELS", "QWENVL_MAX_CONCURRENCY", "QWENVL_KV_CACHE_MB"),
        "QWENVL_DTYPE",
    }
    for each in advised:
        for variable in each:
            load_settings(dict([variable]))


def test_half_the_size_is_advised_where_it_is_known_to_help():
    made = make(dataclasses.replace(M2, dtype="float32", weights=2 * M2.weights), 6)
    assert "QWENVL_DTYPE=bfloat16" in str(made)


def test_a_cache_that_is_too_small_by_choice():
    """It starts: whose request is too large is told so."""
    made = make(M8, 79, kv_cache_mb=1000)
    assert not made.problem
    assert "QWENVL_KV_CACHE_MB is too small for the largest request: it is refused" in str(made)
    assert made.tokens == 1000 * MIB // M8.kv_token
    assert not made.shared
    assert made.patch == (0, 0)


def test_known_pictures_make_way():
    assert make(M8, 20.6).prefix_cache < 512 * MIB
    assert not make(M8, 20.6).problem


def test_eager_attention_is_known_to_be_greedy():
    """A square of the patches a head: half a terabyte for the largest picture."""
    made = make(published(4096, 36, 8.77e9, heads=32, eager=True), 79)
    assert made.problem
    assert "QWENVL_MAX_IMAGE_MEGAPIXELS=" in str(made)


def test_pictures_of_every_slot_count_on_a_cpu():
    """50 megapixels in each of four slots want 3.2 GB for themselves while they are decoded."""
    made = make(M2, 10, cpu=True)
    assert not made.problem
    assert "the largest picture in every slot at once does not fit; what would fit: " in str(made)
    assert "QWENVL_MAX_CONCURRENCY=" in str(made)
    assert "QWENVL_MAX_IMAGE_MEGAPIXELS=" in str(made)
    assert not make(M2, 64, cpu=True).tight


def test_several_gpus_leave_room_for_each_layers_keys():
    """accelerate might fill the first to the brim. Reckoned only: it was not run on GPUs."""
    made = make(M8, 15.6, 15.6, host=64)
    assert not made.problem
    assert not made.offloaded
    assert made.max_memory
    first, second = made.max_memory[0], made.max_memory[1]
    assert first + second >= M8.weights + M8.layer  # a layer is not divided
    for limit, tower in ((first, M8.tower), (second, 0)):
        keys = LARGEST * M8.token / 2  # half of the layers, and so of the largest request
        assert limit + keys + tower + MARGIN <= 15.6 * GIB
    assert made.max_memory["cpu"] == 64 * GIB
    assert make(M8, 23.4, host=64).max_memory is None


def loaded(need: Footprint, *free: float, shares: tuple[float, ...] = (1.0,), **changes):
    memory = Memory([int(each * GIB) for each in free], cpu=False, shares=shares)
    return plan.make(need, load_settings({}, **changes), memory)


def test_once_the_weights_are_loaded_what_is_left_is_divided():
    """As before, where the estimates were right."""
    before, after = make(M8, 23.4), loaded(M8, 23.4 - M8.weights / GIB)
    assert after.tokens == pytest.approx(before.tokens, rel=0.001)
    assert not after.problem
    assert " beside weights 16.3 GiB, " in str(after)
    larger = loaded(dataclasses.replace(M8, tower=2 * M8.tower), 23.4 - M8.weights / GIB)
    assert larger.together <= after.together
    assert larger.patch[0] > after.patch[0]


def test_what_was_measured_and_does_not_fit_is_refused():
    """An estimate was too low: the start says so, and not the fourth request."""
    made = loaded(dataclasses.replace(M8, tower=4 * M8.tower), 7)
    assert made.problem
    assert "the largest allowed picture does not fit beside the weights" in made.problem
    assert "QWENVL_MAX_IMAGE_MEGAPIXELS=" in str(made)
    assert "QWENVL_DTYPE" not in str(made)
    assert loaded(M8, 0.2).problem


def test_the_fullest_gpu_decides():
    """Each layer's keys lie beside its weights, and the tower is on the first."""
    one = loaded(M8, 12, 12, shares=(0.5, 0.5))
    assert one.tokens < loaded(M8, 15.5, 12, shares=(0.5, 0.5)).tokens
    assert one.tokens == loaded(M8, 12, 30, shares=(0.5, 0.5)).tokens
    keys = (one.room + one.prefix_cache) / 2
    assert keys + M8.tower + MARGIN <= 12 * GIB


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda", 1), ("auto", 0), ("cpu", 0)])
def test_weights_stay_outside_of_gpus_alone(monkeypatch, device: str, gpus: int):
    """Those that a CPU had no room for were to stay in its own memory, by the start's plan."""
    monkeypatch.setattr(devices, "gpus", lambda _device: [torch.device("cuda", 0)] * gpus)
    monkeypatch.setattr(devices, "free_memory", lambda where: 2 if where.type == "cpu" else 1)
    there = devices.memory(load_settings({}, device=device))
    assert there == Memory([2 - gpus], cpu=not gpus, host=2 * (device == "auto") * gpus)


def test_what_no_gpu_has_room_for_stays_outside():
    made = make(M8, 15.6, host=64)
    assert not made.problem
    assert 0 < made.offloaded < 7 * GIB
    assert "of the weights stay outside, and every step is slower" in str(made)
    assert made.max_memory
    # One layer's place is for those that are fetched.
    assert made.max_memory[0] + made.room + MARGIN <= 15.6 * GIB
    assert make(M8, 15.6, host=2).problem
    assert make(M8, 15.6).problem  # with device="cuda"


def test_the_tower_and_the_cache_share():
    """What a patch takes is in tokens, so that the scheduler can reckon."""
    made = make(M8, 22.0)
    assert made.shared
    tower, features = (M8.patches * cost for cost in made.patch)
    assert tower > features > 0
    assert tower + features <= made.tokens
    assert made.tokens - features >= LARGEST


def test_a_compiled_step_shares_with_nobody():
    """Its cache grows in powers of two and keeps what it has: the tower has memory of its own."""
    made = make(M8, 47, compile="on")
    assert not made.shared
    assert made.patch == (0, 0)
    tokens = made.tokens * M8.token
    assert M8.weights + tokens + M8.tower + made.prefix_cache + MARGIN <= 47 * GIB
    assert made.tokens < make(M8, 47).tokens


def test_recurrent_layers_keep_a_state_for_every_slot():
    """The engine takes it from the KV cache's budget (``Layout.tokens_in``)."""
    recurrent = dataclasses.replace(M8, state=50 * MIB)
    made = make(recurrent, 23.4)
    assert made.kv_cache == made.tokens * M8.kv_token + 4 * 50 * MIB
    assert made.tokens < make(M8, 23.4).tokens
