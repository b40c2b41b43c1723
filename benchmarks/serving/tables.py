"""Tables of what was measured, in Markdown, written between two marks of a page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving import parts, texts
from benchmarks.serving.contenders import OURS
from benchmarks.serving.rows import Row, centiles, names, pick, rate, ratio, values

BEGIN, END = "<!-- make bench: from here -->", "<!-- make bench: to here -->"


def table(head: list[str], body: Iterator[list[str]]) -> Iterator[str]:
    """Markdown's lines; none if there is nothing in it."""
    lines = [f"| {' | '.join(cells)} |" for cells in body]
    if lines:
        yield from ("", f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *lines)


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: list[float]) -> str:
    """Median, 95 % and 99 %."""
    return ", ".join(map(number, centiles(values))) if values else "-"


def _cells(
    them: list[str], rows: list[Row], show: Callable[[list[Row]], str], of: Callable[[Row], float]
) -> Iterator[str]:
    """A cell for each contender; beside others than ours, ours over it."""
    ours = [row for row in rows if row["name"] == OURS and row["answered"]]
    for name in them:
        theirs = [row for row in rows if row["name"] == name and row["answered"]]
        if not theirs:
            yield "-"
        elif name == OURS or not ours:
            yield show(theirs)
        else:
            yield f"{show(theirs)} ({ratio(ours, theirs, of):.2f})"


def rates(rows: list[Row]) -> Iterator[str]:
    """Requests and tokens a second."""
    rows = [row for row in rows if row["part"] in ("easy-VQA", "long", "longest")]
    them = names(rows)

    def body() -> Iterator[list[str]]:
        for part, unit, what in (
            ("easy-VQA", "answered", "easy-VQA, requests/s"),
            ("long", "tokens", "long answers, tokens/s"),
            ("longest", "tokens", "very long answers, tokens/s"),
        ):
            for clients in values(pick(rows, part), "clients"):
                these = pick(rows, part, clients=clients)
                cells = _cells(
                    them,
                    these,
                    lambda some, unit=unit: number(rate(some, unit)),  # type: ignore[misc]
                    lambda row, unit=unit: row[unit] / row["seconds"],  # type: ignore[misc]
                )
                yield [f"{what}, {clients} client{'s' * (clients > 1)}", *cells]

    yield from table(["", *them], body())


def streams(rows: list[Row]) -> Iterator[str]:
    """Time to the first token and between tokens, by clients."""
    head = ["clients", "", "first token p50, p95, p99 ms", "a token p50, p95, p99 ms", "answers"]
    these = pick(rows, "streams")
    yield from table(
        head,
        (
            [
                str(row["clients"]),
                row["name"],
                spread(row["first_ms"]),
                spread(row["token_ms"]),
                str(row["answered"]),
            ]
            for row in these
        ),
    )


def arrivals(rows: list[Row]) -> Iterator[str]:
    """The same under random arrivals."""
    head = ["of capacity", "", "requests/s", "answers", "first token p50, p95, p99 ms"]
    head += ["a token p50, p95, p99 ms", "whole answer p50, p95, p99 ms", "failed"]
    these = sorted(pick(rows, "arrivals"), key=lambda row: row["share"])
    yield from table(
        head,
        (
            [
                f"{row['share']:.0%}",
                row["name"],
                f"{number(row['rate'])} of {number(row['capacity'])}",
                str(row["answered"]),
                spread(row["first_ms"]),
                spread(row["token_ms"]),
                spread(row["whole_ms"]),
                str(row["failed"]),
            ]
            for row in these
        ),
    )


def _first(row: Row) -> float:
    return float(row["first_ms"][0])


def _median_first(rows: list[Row]) -> str:
    return number(statistics.median(map(_first, rows)))


def pictures(rows: list[Row]) -> Iterator[str]:
    """Time to the first token against pixels, then of the questions about one picture."""
    these = pick(rows, "pictures")
    them = names(these)
    yield from table(
        ["megapixels, alone: first token, ms", *them],
        (
            [
                str(size),
                *_cells(them, pick(these, "pictures", megapixels=size), _median_first, _first),
            ]
            for size in values(these, "megapixels")
        ),
    )
    those = pick(rows, "one picture")
    yield from table(
        ["one picture of a megapixel: first token, ms", *them],
        (
            [
                f"question {number}",
                *_cells(them, pick(those, "one picture", number=number), _median_first, _first),
            ]
            for number in values(those, "number")
        ),
    )


def slots(rows: list[Row]) -> Iterator[str]:
    """Ours with more slots."""
    head = ["slots", "tokens/s", "first token p50, p95, p99 ms", "a token p50, p95, p99 ms", "MiB"]
    yield from table(
        head,
        (
            [
                str(row["slots"]),
                number(row["tokens"] / row["seconds"]),
                spread(row["first_ms"]),
                spread(row["token_ms"]),
                number(row["rss_mib"]),
            ]
            for row in pick(rows, "slots")
        ),
    )


def costs(rows: list[Row]) -> Iterator[str]:
    """CPU time and memory."""

    def cpu(part: str, unit: str, name: str) -> str:
        these = [row for row in pick(rows, part, name=name) if row[unit]]
        spent = sum(row["cpu_s"] for row in these)
        return number(1000 * spent / sum(row[unit] for row in these)) if these else "-"

    def body() -> Iterator[list[str]]:
        for name in names([row for row in rows if row["part"] != "slots"]):
            resident = [
                row["rss_mib"] for row in rows if row["name"] == name and row.get("rss_mib")
            ]
            yield [
                name,
                cpu("easy-VQA", "answered", name),
                cpu("long", "tokens", name),
                number(max(resident)) if resident else "-",
            ]

    yield from table(["", "CPU ms, easy-VQA", "CPU ms a token, long answers", "most MiB"], body())


def problems(rows: list[Row]) -> Iterator[str]:
    """Wrong answers and errors, if there are any."""
    for name in names(rows):
        these = [row for row in rows if row["name"] == name]
        wrong = sum(row.get("wrong", 0) for row in these)
        failed = sum(row.get("failed", 0) for row in these)
        errors = sorted({error for row in these for error in row["errors"]})
        if wrong or failed or errors:
            yield f"- {name}: {wrong} wrong, {failed} failed. {'; '.join(errors)}"


def page(results: dict[str, Any], plots: dict[str, str]) -> str:
    """All that stands between the marks. ``plots``: what each file shows."""
    rows = results["rows"]
    size = {"full": parts.FULL, "quick": parts.QUICK}.get(results["size"], parts.SMALLEST)
    lengths = ", ".join(map(str, parts.LENGTHS))
    sections: list[tuple[str, str, Iterator[str]]] = [
        ("Requests and tokens a second", texts.RATES.format(size=size), rates(rows)),
        ("Piece by piece", texts.STREAMS.format(size=size), streams(rows)),
        ("Arrivals at random", texts.ARRIVALS.format(size=size, lengths=lengths), arrivals(rows)),
        ("Pictures", texts.PICTURES, pictures(rows)),
        ("CPU and memory", texts.COSTS, costs(rows)),
        (
            "Slots",
            texts.SLOTS.format(most=max(size.slots, default=0), tokens=size.tokens // 2),
            slots(rows),
        ),
        ("Wrong or failed", "", problems(rows)),
    ]
    lines = [f"{results['date']}, {results['minutes']} minutes, size {results['size']}."]
    lines += [f"Machine: {results['machine']}.", ""]
    for title, text, found in sections:
        if below := list(found):
            lines += [f"### {title}", "", *([text.strip()] if text else []), *below, ""]
    if plots:
        lines += ["### How cost grows", ""]
    for file, text in plots.items():
        lines += [f"![{Path(file).stem}]({file})", "", text.strip(), ""]
    return "\n".join(lines)


def write(results: dict[str, Any], plots: dict[str, str], target: Path) -> None:
    """Put it between the marks of ``target``; at its end, marks and all, where it has none."""
    old = target.read_text(encoding="utf-8") if target.exists() else "# Results\n"
    if BEGIN not in old:
        old = f"{old}\n{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n\n{page(results, plots)}\n{END}{after}"
    target.write_text(new, encoding="utf-8")
