"""The capacity model against what queueing theory knows in closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sizing
from benchmarks.cluster_model import Cluster, Load, Outcome, Simulation

ROOT = Path(__file__).resolve().parent.parent


def constant(tokens: float):
    return lambda _, count: np.full(count, tokens)


def exponential(mean: float):
    return lambda random, count: random.exponential(mean, count)


def cluster(**changes) -> Cluster:
    """One slow front end or one engine is what is looked at; the rest costs nothing."""
    free = {"fronts": 1, "engines": 1, "slots": 10**6, "waiting": 10**9}
    free |= {"front_s": 0.0, "prefill_s": 0.0, "known_s": 0.0, "step_s": lambda rows: 1.0}
    return Cluster(**{**free, **changes})


def simulate(what: Cluster, load: Load, requests: int = 40_000) -> Outcome:
    return Simulation(what, load, requests).run()


def erlang_c(servers: int, busy: float) -> float:
    """The chance that an arrival waits in M/M/c, where ``busy`` is the load of one server."""
    offered = servers * busy
    last = offered**servers / math.factorial(servers) / (1 - busy)
    return last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)


def mean_wait(outcome: Outcome) -> float:
    settled = outcome.settled()
    return float((outcome.begun - outcome.front)[settled].mean())


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_a_front_end_is_a_queue_with_one_server(busy: float):
    """Pollaczek and Khinchin, M/D/1."""
    outcome = simulate(cluster(front_s=1.0), Load(busy, constant(1e-9)))
    wait = outcome.front[outcome.settled()].mean() - 1
    assert wait == pytest.approx(busy / (2 * (1 - busy)), rel=0.08)


@pytest.mark.parametrize("busy", [0.6, 0.75])
def test_slots_are_servers(busy: float):
    """M/M/c: answers of random length, a step that takes as long for many as for one."""
    slots, tokens = 2, 10.0
    load = Load(busy * slots / tokens, exponential(tokens))
    outcome = simulate(cluster(slots=slots), load)
    expected = erlang_c(slots, busy) * tokens / (slots * (1 - busy))
    assert mean_wait(outcome) == pytest.approx(expected, rel=0.12)


def test_answers_of_one_length_wait_half_as_long():
    """M/D/c: Cosmetatos' approximation, good to about two percent."""
    slots, tokens, busy = 2, 10.0, 0.75
    outcome = simulate(cluster(slots=slots), Load(busy * slots / tokens, constant(tokens)))
    random = erlang_c(slots, busy) * tokens / (slots * (1 - busy))
    more = (1 - busy) * (slots - 1) * (math.sqrt(4 + 5 * slots) - 2) / (16 * busy * slots)
    assert mean_wait(outcome) == pytest.approx(0.5 * (1 + more) * random, rel=0.12)


def test_with_slots_for_all_nobody_waits():
    """M/D/infinity: how many are there has the mean and the variance of Poisson's distribution."""
    outcome = simulate(cluster(), Load(5.0, constant(10.0)))
    assert mean_wait(outcome) == 0
    assert outcome.ended == pytest.approx(np.full(40_000, 10.0))
    times = np.linspace(500, 7500, 20_001)
    arrived, left = outcome.arrived, np.sort(outcome.arrived + outcome.ended)
    there = np.searchsorted(arrived, times) - np.searchsorted(left, times)
    assert there.mean() == pytest.approx(50, rel=0.03)
    assert there.var() == pytest.approx(50, rel=0.15)


def test_littles_law():
    """In a whole cluster: requests within are the rate times the time that each is there."""
    made = cluster(
        fronts=3, engines=4, slots=16, front_s=0.01, prefill_s=0.04, known_s=0.01, cached=50,
        step_s=lambda rows: 0.006 + 0.0001 * rows,
    )  # fmt: skip
    outcome = simulate(made, Load(30, exponential(100), pictures=500), 20_000)
    settled = outcome.settled()
    begin, end = outcome.arrived[settled][[0, -1]]
    times = np.linspace(begin, end, 20_001)
    left = np.sort(outcome.arrived + outcome.ended)
    there = np.searchsorted(outcome.arrived, times) - np.searchsorted(left, times)
    rate = settled.sum() / (end - begin)
    assert there.mean() == pytest.approx(rate * outcome.ended[settled].mean(), rel=0.02)
    assert (outcome.front < outcome.begun + 1e-9).all()
    assert (outcome.begun < outcome.first).all()
    assert (outcome.first < outcome.ended).all()


def test_an_engine_does_what_the_arithmetic_says_and_no_more():
    """Far beyond its capacity: each request's prefill and share of the steps, back to back."""
    engine = sizing.Engine()
    made = cluster(
        slots=engine.slots, prefill_s=engine.prefill_s(), step_s=engine.step_s, waiting=64
    )
    load = Load(3 * engine.requests_per_s(), constant(engine.work.answer_tokens))
    outcome = simulate(made, load, 6000)
    done = np.sort((outcome.arrived + outcome.ended)[outcome.settled()])
    assert outcome.refused > 0.5
    rate = (len(done) - 1) / (done[-1] - done[0])
    assert rate == pytest.approx(engine.requests_per_s(), rel=0.05)


def test_hashing_finds_more_in_the_caches():
    """Every engine has its own pictures, where otherwise all have the same."""
    hits = []
    for hashing, floor in ((True, 4), (True, 1), (False, 1)):
        made = cluster(
            fronts=8, engines=16, slots=64, prefill_s=0.04, known_s=0.01, cached=100,
            hashing=hashing, floor=floor, step_s=lambda rows: 0.01,
        )  # fmt: skip
        outcome = simulate(made, Load(100, constant(50), pictures=2000), 20_000)
        assert outcome.refused == 0
        hits.append(outcome.known.mean())
    assert hits[0] > hits[1] + 0.02
    assert hits[1] > 1.3 * hits[2]


def test_the_page_has_the_tables_as_they_are_computed():
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    for line in [*sizing.rates(), *sizing.table()]:
        assert line in page


def test_the_arithmetic_by_hand():
    """Qwen3-VL-8B on an H100, as in the page."""
    engine = sizing.Engine()
    assert engine.model.kv_bytes == 147_456
    assert engine.step_s(1) == pytest.approx(6.5e-3, rel=0.02)  # 15.1 GB at 2.3 TB/s
    assert engine.gpus(1000) == math.ceil(1000 / (0.7 * engine.requests_per_s()))
