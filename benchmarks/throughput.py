"""What continuous batching brings, over HTTP: ``python -m benchmarks.throughput``.

Two services on loopback with the same checkpoint take turns with the same work: ours, and the
replaced one (one request at a time, ``benchmarks.original``); ``generate`` itself, in this process
and with no server, is measured beside them. Ratios are of paired blocks of one run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from matplotlib import pyplot as plt
from tqdm import tqdm

from benchmarks.checkpoints import write_checkpoint
from benchmarks.original import APP, OPTIONS, answer
from demo.evaluate import Case, ask, package_cases
from qwenvl_app.cli.bench import noise
from qwenvl_app.loading.load import load
from tests.e2e.server import Server

NEW_TOKENS = 256


def answered(
    way: Callable[[Case], str], cases: list[Case], clients: int
) -> tuple[float, list[str]]:
    """Seconds in which ``clients`` at once get all answers, and those. Raises for an error."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(way, cases))
    spent = time.perf_counter() - began
    if bad := [text for text in answers if text[:4] in ("500 ", "503 ", "504 ")]:
        raise RuntimeError(bad[0])
    return spent, answers


def timed(url: str, cases: list[Case], clients: int) -> float:
    """Seconds in which ``clients`` at once get all answers."""
    return answered(partial(ask, url), cases, clients)[0]


def paired(ways: dict[str, Callable[[], float]], blocks: int, title: str) -> dict[str, list[float]]:
    """Seconds of each way in each block; the ways take turns, and the first block warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for block in tqdm(range(-1, blocks), desc=title):
        for name, way in ways.items():
            spent = way()
            if block >= 0:
                seconds[name].append(spent)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster ``fast`` is, in the median of the pairs."""
    pairs = zip(seconds[slow], seconds[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


def long_answers(folder: Path, blocks: int, report: dict[str, float]) -> None:
    """256 new tokens about a small picture of its own."""
    checkpoint = folder / "checkpoint"
    rng = random.Random(0)
    options = {
        "QWENVL_MODEL": str(checkpoint),
        "QWENVL_MAX_NEW_TOKENS": str(NEW_TOKENS),
        "QWENVL_REPETITION_LIMIT": "0",
    }
    loaded = load(str(checkpoint))

    def cases(count: int) -> list[Case]:
        return [Case("", noise(rng, 128), "image/png", "what is it?", "") for _ in range(count)]

    def alone() -> float:
        picture = folder / "alone.png"
        picture.write_bytes(cases(1)[0].image)
        began = time.perf_counter()
        answer(loaded, picture, "what is it?", NEW_TOKENS)
        return time.perf_counter() - began

    ours = Server(folder / "ours-long" / "log", **options)
    theirs = Server(folder / "original-long" / "log", APP, OPTIONS, **options)
    try:
        ours.wait(), theirs.wait()
        one = paired(
            {
                "ours": lambda: timed(ours.url, cases(1), 1),
                "original": lambda: timed(theirs.url, cases(1), 1),
                "generate": alone,
            },
            blocks,
            "256 tokens, 1 client",
        )
        four = paired(
            {
                "ours": lambda: timed(ours.url, cases(4), 4),
                "original": lambda: timed(theirs.url, cases(4), 4),
            },
            blocks,
            "256 tokens, 4 clients",
        )
    finally:
        ours.stop(), theirs.stop()
    for clients, seconds in ((1, one), (4, four)):
        for name, spent in seconds.items():
            rate = clients * NEW_TOKENS / statistics.median(spent)
            report[f"256 tokens, {clients} client(s), {name}, tokens/s"] = rate
    report["256 tokens, 1 client, ours / generate"] = ratio(one, "generate", "ours")
    report["256 tokens, 4 clients, ours / original"] = ratio(four, "original", "ours")


def short_answers(folder: Path, blocks: int, report: dict[str, float]) -> None:
    """easy-VQA's test questions, a picture each, with the embedded model."""
    by_picture = {case.image: case for case in package_cases()}
    cases = list(by_picture.values())
    ours = Server(folder / "ours-short" / "log")
    theirs = Server(folder / "original-short" / "log", APP, OPTIONS)
    try:
        ours.wait(), theirs.wait()
        for clients in (1, 4):
            each = 10 * clients
            taken = {"ours": 0, "original": 0}

            def block(name: str, url: str, clients=clients, each=each, taken=taken) -> float:
                first = taken[name] % (len(cases) - each)
                taken[name] += each
                return timed(url, cases[first : first + each], clients)

            seconds = paired(
                {
                    "ours": lambda block=block: block("ours", ours.url),
                    "original": lambda block=block: block("original", theirs.url),
                },
                2 * blocks,
                f"easy-VQA, {clients} client(s)",
            )
            for name, spent in seconds.items():
                rate = each / statistics.median(spent)
                report[f"easy-VQA, {clients} client(s), {name}, requests/s"] = rate
            key = f"easy-VQA, {clients} client(s), ours / original"
            report[key] = ratio(seconds, "original", "ours")
    finally:
        ours.stop(), theirs.stop()


def same_picture(folder: Path, blocks: int, report: dict[str, float]) -> None:
    """Time to the first (and only) token of three questions about one picture of a megapixel."""
    rng = random.Random(1)
    server = Server(
        folder / "same" / "log",
        QWENVL_MODEL=str(folder / "checkpoint"),
        QWENVL_MAX_NEW_TOKENS="1",
    )
    spent: list[list[float]] = [[], [], []]
    try:
        server.wait()
        for block in tqdm(range(-1, blocks), desc="the same picture"):
            image = noise(rng, 1024)
            for number, prompt in enumerate(("what is it?", "which color?", "how many?")):
                seconds = timed(server.url, [Case("", image, "image/png", prompt, "")], 1)
                if block >= 0:
                    spent[number].append(seconds)
    finally:
        server.stop()
    for number, name in ((1, "second"), (2, "third")):
        pairs = zip(spent[number], spent[0], strict=True)
        report[f"the {name} question's time to first token / the first's"] = statistics.median(
            later / first for later, first in pairs
        )
    report["the first question's time to first token, ms"] = statistics.median(spent[0]) * 1000


PARTS = {"long": long_answers, "short": short_answers, "same": same_picture}


def draw(report: dict[str, float], target: Path) -> None:
    """The rates as bars."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, start, unit in (
        (axes[0], "256 tokens", "tokens/s"),
        (axes[1], "easy-VQA", "requests/s"),
    ):
        bars = {
            key.removeprefix(f"{start}, ").removesuffix(f", {unit}").replace(", ", "\n"): value
            for key, value in report.items()
            if key.startswith(start) and key.endswith(unit)
        }
        colors = ["tab:blue" if "ours" in name else "tab:gray" for name in bars]
        axis.bar(list(bars), list(bars.values()), color=colors)
        axis.set(title=f"{start}: {unit}")
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--only", choices=PARTS, help="one part, no plot")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/throughput.png"))
    arguments = parser.parse_args()
    report: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for part in ("ours-long", "original-long", "ours-short", "original-short", "same"):
            (folder / part).mkdir()
        (folder / "checkpoint").mkdir()
        write_checkpoint(folder / "checkpoint")
        for name, measure in PARTS.items():
            if arguments.only in (None, name):
                measure(folder, arguments.blocks, report)
    if arguments.only is None:
        draw(report, arguments.plot)
    print(json.dumps({key: round(value, 2) for key, value in report.items()}, indent=1))


if __name__ == "__main__":
    main()
