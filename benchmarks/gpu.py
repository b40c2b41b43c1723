"""Everything that a GPU can tell, in under nine minutes: ``python -m benchmarks.gpu``.

It needs no network, no weights and no package but those of requirements.txt: a model of the 8B
shape is drawn on the card. Each figure is printed and written to the file at once, each group of
parts has a process of its own and a time limit, and what fails is told and passed over.
``--small`` does the same with little on a CPU, and with ``--device pretended`` on a GPU that is
not there (``generate``, the service and what is compiled are on the CPU then).
"""

from __future__ import annotations

import argparse
import base64
import io
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import requests
import torch
import transformers

from benchmarks import gpu_parts as parts
from benchmarks.gpu_bench import Bench, Report, ask, meter, pretended
from benchmarks.shapes import Shape
from qwenvl_app import process
from tests.e2e.server import ROOT, Server
from tests.gpu.meter import Meter

# Seconds of each group, in the order of what one wants to know first; together under nine minutes.
LIMITS = {"equivalence": 50, "eager": 150, "graphs": 60, "http": 60, "inductor": 210}
CLIENTS, EACH = 4, 4


def work(name: str, bench: Bench) -> Iterator[partial[None]]:
    """The parts of one group; what the next ones need is made between them."""
    if name == "equivalence":
        yield partial(parts.equivalence, bench, ("off", "auto"))
        return
    loaded = bench.model(bench.shape)
    if name == "eager":
        yield partial(parts.generating, bench, loaded)
    loaded = bench.moved(bench.fused(loaded))
    if name == "eager":
        yield partial(parts.steps, bench, loaded, "off")
        for part in (parts.first_token, parts.memory, parts.running_out):
            yield partial(part, bench, loaded)
    elif name == "graphs":
        yield partial(parts.steps, bench, loaded, "auto")
    elif name == "inductor":
        yield partial(parts.steps, bench, loaded, "on")
        yield partial(parts.equivalence, bench, ("on",))


def group(name: str, bench: Bench) -> None:
    """The parts of one group, each whatever became of those before it."""
    for part in work(name, bench):
        began = time.monotonic()
        try:
            part()
        except Exception as error:  # whatever it is, the next part is worth its time
            traceback.print_exc()
            bench.report.put("failed", f"{name}: {part.func.__name__}", repr(error)[:300])
        took = time.monotonic() - began
        bench.report.put("seconds", f"{name}: {part.func.__name__}", took)


def service(bench: Bench) -> None:
    """Requests a second and their seconds, of the service itself under four clients."""
    name, put = "http", bench.report.put
    directory = bench.shape.write(bench.folder / "served")
    settings = {
        "QWENVL_MODEL": str(directory),
        "QWENVL_DEVICE": "cuda" if bench.device == "cuda" else "cpu",
        "QWENVL_REPETITION_LIMIT": "0",
    }
    log = bench.folder / "http" / "log"
    log.parent.mkdir()
    began = time.monotonic()
    with Server(log, **settings) as server:
        try:
            server.wait(seconds=bench.deadline - time.monotonic())
            put(name, "seconds to ready", time.monotonic() - began)
            late = bench.deadline
            asked = [bench.megapixels[1]] * CLIENTS * EACH
            with ThreadPoolExecutor(CLIENTS) as pool:
                jobs = [partial(chat, server.url, size, bench.tokens, late) for size in asked]
                list(pool.map(lambda job: job(99), jobs[:CLIENTS]))  # they warm up
                began = time.monotonic()
                spent = sorted(pool.map(lambda job: job[1](job[0]), enumerate(jobs)))
                whole = time.monotonic() - began
            put(name, "requests/s", len(spent) / whole)
            put(name, "tokens/s", len(spent) * bench.tokens / whole)
            put(name, "median s", statistics.median(spent))
            put(name, "longest s", spent[-1])
            figures = requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()
            put(
                name,
                "metrics",
                [line for line in figures if line[:11] in ("qwenvl_gpu_", "qwenvl_cuda")],
            )
        finally:
            lines = log.read_text(encoding="utf-8").splitlines()
            put(name, "log", [line for line in lines if "memory" in line or "WARN" in line][-8:])


def chat(url: str, megapixels: float, tokens: int, deadline: float, number: int) -> float:
    """Seconds of one answer about a picture. Raises for one that is too short."""
    buffer = io.BytesIO()
    ask(megapixels, number).images[0].save(buffer, "JPEG")
    data = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": "描述一下这张图片。"},
    ]
    body = {"model": "qwenvl", "messages": [{"role": "user", "content": content}]}
    body |= {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    began = time.monotonic()
    response = requests.post(
        f"{url}/v1/chat/completions", json=body, timeout=max(1, deadline - began)
    )
    spent = time.monotonic() - began
    if response.status_code != 200 or response.json()["usage"]["completion_tokens"] != tokens:
        raise RuntimeError(f"{response.status_code}: {response.text[:300]}")
    return spent


def bench_of(chosen: argparse.Namespace, folder: Path, books: Meter | None, limit: float) -> Bench:
    """Sizes: the published ones, or such that a CPU needs a minute for all."""
    small = chosen.small
    return Bench(
        chosen.device,
        Shape(128, 2, 2, 512 * 512) if small else Shape(),
        Shape(128, 3, 3, 512 * 512) if small else Shape(layers=4, depth=4),
        folder,
        Report(chosen.json),
        books,
        time.monotonic() + limit,
        (1, 2) if small else (1, 4, 16),
        8 if small else 64,
        (0.01, 0.02, 0.04, 0.08) if small else (0.3, 1, 4, 12),
    )


def run_group(chosen: argparse.Namespace) -> None:
    """In a process of its own: one group."""
    process.use_threads(0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        books = meter(chosen.device)
        if chosen.device == "pretended":
            books = stack.enter_context(pretended())
        bench = bench_of(chosen, Path(folder), books, 0.8 * LIMITS[chosen.group])
        group(chosen.group, bench)


def run_all(chosen: argparse.Namespace) -> None:
    """Every group in turn."""
    chosen.json.unlink(missing_ok=True)
    report = Report(chosen.json)
    card = torch.cuda.get_device_name() if chosen.device == "cuda" else chosen.device
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    report.put("where", "device", card)
    report.put("where", "versions", f"{versions}, transformers {transformers.__version__}")
    for name in chosen.groups:
        began = time.monotonic()
        try:
            if name == "http":
                with tempfile.TemporaryDirectory() as folder:
                    service(bench_of(chosen, Path(folder), None, LIMITS[name]))
            else:
                command = [sys.executable, "-m", "benchmarks.gpu", "--group", name]
                command += ["--device", chosen.device, "--json", str(chosen.json)]
                command += ["--small"] * chosen.small
                done = subprocess.run(command, cwd=ROOT, check=False, timeout=LIMITS[name])
                if done.returncode:
                    raise RuntimeError(f"exit status {done.returncode}")
        except Exception as error:
            Report(chosen.json).put("failed", name, repr(error)[-300:])
        Report(chosen.json).put("seconds", name, time.monotonic() - began)


def main() -> None:
    """Measure, print, and write JSON as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, default=Path("gpu.json"), help="a file for the figures"
    )
    parser.add_argument("--small", action="store_true", help="a small shape, for a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu", "pretended"), default=None)
    parser.add_argument("--groups", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--group", choices=LIMITS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.json = chosen.json.absolute()
    chosen.device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.device != "cuda" and not chosen.small:
        parser.error("there is no GPU: --small tries it on a CPU")
    (run_group if chosen.group else run_all)(chosen)


if __name__ == "__main__":
    main()
