"""All of it in one go: ``python -m benchmarks.serving``, or ``make bench``.

Ours, ours with PyTorch's decode steps, the replaced service (``benchmarks/original.py``), and
``generate`` are started with the same checkpoints; peers run already, on this machine
(``benchmarks/peers.md`` says how). Figures go to results.json as they come, then tables and plots
into RESULTS.md between two marks.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.checkpoints import write_checkpoint
from benchmarks.serving import parts
from benchmarks.serving.contenders import Peer, all_of
from benchmarks.serving.machine import machine
from benchmarks.serving.rows import Row
from benchmarks.serving.tables import write

SIZES = {"full": parts.FULL, "quick": parts.QUICK, "smallest": parts.SMALLEST}


def measured(
    size: parts.Size, only: list[str], settings: list[str], peers: list[Peer]
) -> Generator[Row]:
    """Rows of all parts that ``only`` names, all if it names none."""
    rng = random.Random()

    def chosen(those: dict[str, parts.Part]) -> dict[str, parts.Part]:
        return {name: part for name, part in those.items() if not only or name in only}

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for checkpoint, those, urls in (
            ("demo", chosen(parts.DEMO), {peer.name: peer.demo for peer in peers}),
            (folder, chosen(parts.LONG), {peer.name: peer.long for peer in peers}),
        ):
            if not those:
                continue
            with ExitStack() as stack:
                print(f"starting those who serve {checkpoint}", flush=True)
                them = all_of(stack, checkpoint, settings, urls)
                for name, part in those.items():
                    print(name, flush=True)
                    for row in part(size, them, rng):
                        yield {"part": name} | row
        if size.slots and (not only or "slots" in only):
            for row in parts.slots(size, folder, rng):
                yield {"part": "slots"} | row


def dumped(results: Row) -> str:
    """JSON, a line for each row."""
    head = json.dumps(results | {"rows": []}, ensure_ascii=False).removesuffix("]}")
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in results["rows"])
    return f"{head}\n{rows}\n]}}\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="*", type=Peer.parse, default=[], metavar="NAME=URL,URL")
    for size in ("quick", "smallest"):
        parser.add_argument(f"--{size}", action="store_const", const=size, dest="size")
    parser.add_argument(
        "--compile", nargs="*", choices=("auto", "off", "on"), default=["auto", "off"]
    )
    names = [*parts.DEMO, *parts.LONG, "slots"]
    parser.add_argument("--only", nargs="*", choices=names, default=[])
    parser.add_argument("--into", type=Path, default=Path("benchmarks"), help="of RESULTS.md")
    parser.add_argument("--minutes", type=float, default=30, help="after which it ends")
    parser.add_argument("--again", action="store_true", help="from results.json, nothing measured")
    parser.set_defaults(size="full")
    chosen = parser.parse_args(arguments)
    stored = chosen.into / "results.json"
    if chosen.again:
        results = json.loads(stored.read_text(encoding="utf-8"))
    else:
        began = time.monotonic()
        results = {"date": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC", "machine": machine()}
        results |= {"size": chosen.size, "minutes": 0.0, "rows": []}
        size = SIZES[chosen.size]
        with closing(measured(size, chosen.only, chosen.compile, chosen.peers)) as rows:
            for row in rows:
                results["rows"].append(row)
                results["minutes"] = round((time.monotonic() - began) / 60, 1)
                stored.write_text(dumped(results), encoding="utf-8")
                if results["minutes"] > chosen.minutes:
                    print(f"{chosen.minutes} minutes are gone: the rest is left out")
                    break
    from benchmarks.serving.plots import draw  # matplotlib takes a second, and minutes come first

    drawn = draw(results["rows"], chosen.into)
    write(results, drawn, chosen.into / "RESULTS.md")
    print(f"{chosen.into / 'RESULTS.md'}, after {results['minutes']} minutes")


if __name__ == "__main__":
    main()
