"""What a cluster can do at 10, 1,000 and 100,000 requests per second, simulated.

``python -m benchmarks.capacity`` prints the table of docs/capacity.md and draws its plots, in a
minute or two. The GPUs' times are ``sizing``'s arithmetic, the front ends' are measured. Nothing of
it was measured on a cluster.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from tqdm import tqdm

from benchmarks.cluster_model import Cluster, Load, Outcome, Simulation
from benchmarks.sizing import BUSY, GPUS, Engine, Gpu, Work

# Seconds of a front end's core: to read a request (RESULTS.md, "What was found on the way"), to
# decode a JPEG of a megapixel once (measured), and to pass a token on (assumed; parsing: 7 us).
READ_S, DECODE_S, TOKEN_S = 1.5e-3, 3.9e-3, 0.05e-3
PERMITS = 256  # the largest max_concurrency
CORE_PRICE = 0.05  # of an hour of one core and 2 GB
PICTURE_BYTES = 300_000
PICTURES = 100  # different ones that are asked about, for each request per second
CELL = 1000.0  # requests per second of one cluster; more is several clusters


class Plan(NamedTuple):
    """How many of each, for so many requests per second about pictures that nobody knows."""

    load: float
    engine: Engine
    engines: int
    fronts: int

    @classmethod
    def of(cls, load: float, gpu: Gpu) -> Plan:
        """Both ``BUSY``; one more engine where a single one would do, so that it may fail."""
        engine = Engine(gpu)
        engines = max(2, engine.gpus(load))
        by_cpu = load * front_s(engine.work) / BUSY
        by_permits = engines * engine.slots / PERMITS
        return cls(load, engine, engines, max(2, math.ceil(max(by_cpu, by_permits))))

    def cluster(self, *, hashing: bool = True, floor: float = 1.0) -> Cluster:
        """As the simulation takes it."""
        engine = self.engine
        live = engine.slots * (engine.work.context + engine.work.answer_tokens / 2)
        return Cluster(
            fronts=self.fronts,
            engines=self.engines,
            slots=engine.slots,
            front_s=front_s(engine.work),
            prefill_s=engine.prefill_s(),
            known_s=engine.prefill_s(known=True),
            step_s=engine.step_s,
            cached=int((engine.cache_tokens - live) / engine.work.picture_tokens),
            hashing=hashing,
            floor=floor,
        )

    def run(self, requests: int, *, hashing: bool = True, floor: float = 1.0) -> Outcome:
        """With the load that it is planned for."""
        load = Load(
            self.load,
            lambda random, count: random.exponential(self.engine.work.answer_tokens, count),
            pictures=max(1, int(PICTURES * self.load)),
        )
        return Simulation(self.cluster(hashing=hashing, floor=floor), load, requests).run()

    def price(self) -> float:
        """Of an hour."""
        return self.engines * self.engine.gpu.price + self.fronts * CORE_PRICE


def front_s(work: Work) -> float:
    """Seconds of its one core that a request costs a front end."""
    return READ_S + DECODE_S + work.answer_tokens * TOKEN_S


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """p50 and p99."""
    return tuple(np.percentile(values, (50, 99)))


def rows(gpu: Gpu, requests: int) -> Iterator[str]:
    """The table of the page."""
    yield (
        "| Requests/s | Clusters | GPUs | Front ends | Known pictures | GPUs, were that certain | "
        "Prefill | Slots taken | Front ends busy | First token p50, p99 | Whole answer p50, p99 | "
        "Pictures in | $/h | $ a million |"
    )
    yield "| --- " * 14 + "|"
    for load in (10.0, 1000.0, 100_000.0):
        cells = max(1, math.ceil(load / CELL))
        plan = Plan.of(load / cells, gpu)
        outcome = plan.run(requests)
        counts = outcome.settled()
        known = outcome.known[counts].mean()
        certain = max(2, math.ceil(plan.load / BUSY / plan.engine.requests_per_s(known)))
        decoding = (outcome.ended - outcome.first)[counts].mean()
        taken = plan.load * decoding / plan.engines / plan.engine.slots
        span = plan.engines * (outcome.arrived[-1] - outcome.arrived[0])
        first, whole = (percentiles(each[counts]) for each in (outcome.first, outcome.ended))
        price = cells * plan.price()
        yield (
            f"| {load:,.0f} | {cells} | {cells * plan.engines:,} | {cells * plan.fronts:,} | "
            f"{known:.0%} | {cells * certain:,} | {outcome.prefill_s / span:.0%} | {taken:.0%} | "
            f"{plan.load * front_s(plan.engine.work) / plan.fronts:.0%} | "
            f"{first[0]:.2f}, {first[1]:.2f} s | {whole[0]:.1f}, {whole[1]:.1f} s | "
            f"{8 * load * PICTURE_BYTES / 1e9:,.3g} Gbit/s | {price:,.0f} | "
            f"{price / load / 3600 * 1e6:,.0f} |"
        )


def plot_load(axis: plt.Axes, gpu: Gpu, requests: int) -> None:
    """Latency against load, of clusters of several sizes."""
    for engines, style in ((1, ":"), (8, "--"), (64, "-")):
        engine = Engine(gpu)
        plan = Plan(engines * engine.requests_per_s(), engine, engines, 10**6)
        plan = plan._replace(fronts=max(1, math.ceil(plan.load * front_s(engine.work) / BUSY)))
        shares = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
        times = []
        for share in tqdm(shares, desc=f"{engines} engines", leave=False):
            cold = replace(plan.cluster(), cached=0)
            load = Load(
                share * plan.load, lambda random, count: random.exponential(150, count), 10_000
            )
            outcome = Simulation(cold, load, min(requests, 4000 * engines)).run()
            times.append(percentiles(outcome.first[outcome.settled()]))
        for index, color in ((0, "tab:blue"), (1, "tab:red")):
            label = f"{('p50', 'p99')[index]}, {engines} GPU{'s' * (engines > 1)}"
            axis.plot(shares, [each[index] for each in times], style, color=color, label=label)
    axis.set(xlabel="load / capacity", ylabel="seconds to the first token", yscale="log")
    axis.set_title("Until the first token (no picture twice)")
    axis.legend(fontsize=7)


def plot_hits(axis: plt.Axes, gpu: Gpu, requests: int) -> None:
    """Hit rates against the number of engines, at one load for each."""
    counts = (1, 2, 4, 8, 16, 32, 64)
    for hashing, floor, label in (
        (True, 4, "a picture has its engine, floor of 4"),
        (True, 1, "a picture has its engine"),
        (False, 1, "the least busy engine"),
    ):
        hits = []
        for engines in tqdm(counts, desc=label, leave=False):
            plan = Plan(engines * BUSY * Engine(gpu).requests_per_s(), Engine(gpu), engines, 2)
            plan = plan._replace(fronts=max(2, engines // 4))
            outcome = plan.run(min(requests, 3000 * engines), hashing=hashing, floor=floor)
            hits.append(outcome.known[outcome.settled()].mean())
        axis.plot(counts, hits, "o-", label=label)
    axis.set(xlabel="engines", xscale="log", ylim=(0, 1), ylabel="pictures found in a cache")
    axis.set_title("Where the prefix caches are")
    axis.legend(fontsize=7)


def plot_price(axis: plt.Axes) -> None:
    """GPUs against load."""
    loads = np.geomspace(1, 100_000, 60)
    for gpu in GPUS:
        axis.plot(loads, [Engine(gpu).gpus(load) for load in loads], label=gpu.name)
    axis.set(xlabel="requests/s", xscale="log", ylabel="GPUs", yscale="log")
    axis.set_title("GPUs (150 tokens, 70 % busy)")
    axis.legend(fontsize=7)


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default=GPUS[0].name, choices=[gpu.name for gpu in GPUS])
    parser.add_argument("--price", type=float, help="of a GPU hour, in dollars")
    parser.add_argument("--requests", type=int, default=60_000, help="of each run")
    parser.add_argument("--plot", type=Path, default=Path("docs/capacity.svg"))
    args = parser.parse_args()
    gpu = next(gpu for gpu in GPUS if gpu.name == args.gpu)
    if args.price is not None:
        gpu = replace(gpu, price=args.price)
    print("\n".join(rows(gpu, args.requests)))
    # The same file from the same figures, and text as text.
    plt.rcParams.update({"svg.hashsalt": "qwenvl", "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    plot_load(axes[0], gpu, args.requests)
    plot_hits(axes[1], gpu, args.requests)
    plot_price(axes[2])
    figure.suptitle(f"Simulated: Qwen3-VL-8B on {gpu.name}, a picture of a megapixel, 150 tokens")
    figure.savefig(args.plot, metadata={"Date": None})


if __name__ == "__main__":
    main()
