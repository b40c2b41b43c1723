"""How cost grows, as SVG. The same figures make the same files."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.serving import texts
from benchmarks.serving.contenders import GENERATE
from benchmarks.serving.rows import Row, centiles, names, pick, rate, values


def draw(rows: list[Row], folder: Path) -> dict[str, str]:
    """Write the plots for which there are figures; file names, and what each shows."""
    # The same file from the same figures, and text as text.
    plt.rcParams.update({"svg.hashsalt": "qwenvl", "svg.fonttype": "none"})
    colors = {name: f"C{number}" for number, name in enumerate(names(rows))}
    (folder / "plots").mkdir(exist_ok=True)
    drawn = {}
    for part, (file, text, draws) in _PLOTS.items():
        if pick(rows, part):
            _save(
                folder / "plots" / file, [partial(each, rows=rows, colors=colors) for each in draws]
            )
            drawn[f"plots/{file}"] = text
    return drawn


def _save(target: Path, draws: list[Callable[[Axes], None]]) -> None:
    wide = 5.5 * len(draws)
    figure, axes = plt.subplots(
        1, len(draws), figsize=(wide, 3.6), layout="constrained", squeeze=False
    )
    for axis, each in zip(axes[0], draws, strict=True):
        each(axis)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def _rates(
    axis: Axes, rows: list[Row], part: str, unit: str, label: str, colors: dict[str, str]
) -> None:
    for name in names(pick(rows, part)):
        these = pick(rows, part, name=name)
        clients = values(these, "clients")
        found = [rate(pick(these, part, clients=each), unit) for each in clients]
        axis.plot(
            clients, found, "o:" if name == GENERATE else "o-", label=name, color=colors[name]
        )
    axis.set(xlabel="clients", ylabel=label, ylim=(0, None), title=part)


def _streamed(axis: Axes, rows: list[Row], key: str, label: str, colors: dict[str, str]) -> None:
    for name in names(pick(rows, "streams")):
        these = [row for row in pick(rows, "streams", name=name) if row[key]]
        if these:
            found = [centiles(row[key])[0] for row in these]
            axis.plot(values(these, "clients"), found, "o-", label=name, color=colors[name])
    axis.set(xlabel="clients", ylabel=label, yscale="log")


def _tokens(axis: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    for row in pick(rows, "longest", clients=1):
        if len(curve := row["curve_ms"]) > 1:
            tokens = [row["tokens"] * number / len(curve) for number in range(len(curve))]
            axis.plot(
                tokens, [at / 1000 for at in curve], label=row["name"], color=colors[row["name"]]
            )
    axis.set(xlabel="tokens", ylabel="seconds", ylim=(0, None))


def _pixels(axis: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    for name in names(pick(rows, "pictures")):
        these = [row for row in pick(rows, "pictures", name=name) if row["answered"]]
        sizes = values(these, "megapixels")
        found = [
            statistics.median(
                row["first_ms"][0] for row in pick(these, "pictures", megapixels=size)
            )
            for size in sizes
        ]
        axis.plot(sizes, found, "o-", label=name, color=colors[name])
    axis.set(xlabel="megapixels", xscale="log", ylabel="ms to the first token", yscale="log")


def _load(axis: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    for name in names(pick(rows, "arrivals")):
        these = [row for row in pick(rows, "arrivals", name=name) if row["answered"]]
        for index, style in ((0, "o:"), (2, "o-")):
            found = [centiles(row["first_ms"])[index] for row in these]
            label = f"{name}, {('p50', 'p95', 'p99')[index]}"
            axis.plot(
                [row["share"] for row in these], found, style, label=label, color=colors[name]
            )
    axis.set(xlabel="share of capacity", ylabel="ms to the first token", yscale="log")


def _slots(axis: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    del colors  # all are of ours
    these = [row for row in pick(rows, "slots") if row["answered"]]
    count = [row["slots"] for row in these]
    axis.plot(count, [row["tokens"] / row["seconds"] for row in these], "o-", label="tokens/s")
    for key, label in (("first_ms", "ms to the first token, p50"), ("token_ms", "ms a token, p50")):
        axis.plot(count, [centiles(row[key])[0] for row in these], "o--", label=label)
    axis.set(xlabel="slots", yscale="log")


_Draw = Callable[..., None]
_EASY = partial(_rates, part="easy-VQA", unit="answered", label="requests/s")
_LONG = partial(_rates, part="long", unit="tokens", label="tokens/s")
_FIRST = partial(_streamed, key="first_ms", label="ms to the first token, p50")
_TOKEN = partial(_streamed, key="token_ms", label="ms a token, p50")
# By the part that has to be there: the file, what stands below it, and its axes.
_PLOTS: dict[str, tuple[str, str, tuple[_Draw, ...]]] = {
    "long": ("clients.svg", texts.COST_OF_CLIENTS, (_EASY, _LONG)),
    "streams": ("first.svg", texts.COST_OF_FIRST, (_FIRST, _TOKEN)),
    "longest": ("tokens.svg", texts.COST_OF_TOKENS, (_tokens,)),
    "pictures": ("pixels.svg", texts.COST_OF_PIXELS, (_pixels,)),
    "arrivals": ("load.svg", texts.COST_OF_LOAD, (_load,)),
    "slots": ("slots.svg", texts.COST_OF_SLOTS, (_slots,)),
}
