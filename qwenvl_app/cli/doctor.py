"""Will the service run here, with these settings? Each finding says what to change."""

from __future__ import annotations

import dataclasses
import platform
import re
import socket
from collections.abc import Iterator
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import psutil
import torch

from qwenvl_app import process
from qwenvl_app.engine import memory
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.hub import NotDownloaded
from qwenvl_app.loading import checkpoint, devices, footprint, plan
from qwenvl_app.settings import Settings

_ROOT = Path(__file__).resolve().parent.parent.parent
# Libraries, buffers and what CUDA takes for itself, beside what is counted here.
_BASE = int(1.5 * plan.GIB)


class Level(StrEnum):
    """FAIL: it will not run. WARN: it will, but perhaps not as expected."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    about: str
    text: str


def examine(settings: Settings, bind: str) -> Iterator[Finding]:
    """Look at everything; takes seconds, loads no model and changes nothing."""
    yield _versions()
    yield (device := _device(settings))
    yield _port(bind)
    try:
        found = checkpoint.find(settings.model, download=False)
        need = devices.estimate(found, settings)
    except NotDownloaded as error:
        text = f"{error}; `flask --app wsgi download` gets it, or else the first start"
        yield Finding(Level.WARN, "model", text)
        return
    except ModelLoadError as error:
        yield Finding(Level.FAIL, "model", str(error))
        return
    yield Finding(
        Level.OK,
        "model",
        f"complete; {need.parameters / 1e6:,.1f} million parameters, {plan.gib(need.weights)} in "
        f"{need.dtype}",
    )
    if device.level is not Level.FAIL:
        yield from _memory(settings, need)


def _versions() -> Finding:
    file = _ROOT / "requirements.txt"  # of a checkout; a wheel has the same in its metadata
    if file.is_file():
        text = file.read_text()
    else:
        needed = metadata.requires("qwenvl") or ()
        text = "\n".join(each for each in needed if "extra ==" not in each)
    pinned = re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE)
    other = []
    for name, expected in pinned:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found.split("+")[0] != expected:
            other.append(f"{name} is {found}, tested with {expected}")
    text = f"Python {platform.python_version()}, torch {torch.__version__}"
    if other:
        more = "pip install -r requirements.txt"
        return Finding(Level.WARN, "versions", f"{text}; {'; '.join(other)}; {more}")
    return Finding(Level.OK, "versions", f"{text}, and the rest as in requirements.txt")


def _device(settings: Settings) -> Finding:
    wanted, count = settings.device, torch.cuda.device_count()
    if wanted.startswith("cuda"):
        if not count:
            return Finding(Level.FAIL, "device", f"{_no_gpu()}; or set QWENVL_DEVICE=cpu")
        if int(wanted.partition(":")[2] or 0) >= count:
            text = f"there is no {wanted}: {count} GPUs, counted from 0; set QWENVL_DEVICE=auto"
            return Finding(Level.FAIL, "device", text)
    if wanted != "cpu" and count:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return Finding(Level.OK, "device", f"{wanted}: {names}")
    level = Level.OK if wanted == "cpu" or settings.model == "demo" else Level.WARN
    threads, _ = process.threads(settings.cpu_threads)
    counted = "1 thread" if threads == 1 else f"{threads} threads"
    more = "" if wanted == "cpu" else f" ({_no_gpu()})"
    return Finding(level, "device", f"the CPU, {counted} for a product{more}")


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install the CUDA build of the same version"
    return "torch sees no GPU: look at nvidia-smi, and at the unit's DeviceAllow"


def _memory(settings: Settings, need: footprint.Footprint) -> Iterator[Finding]:
    there = devices.memory(settings)
    now = plan.make(need, settings, there)
    if there.cpu:
        yield _verdict("memory", now)
        if not now.problem:
            idle = psutil.Process().memory_info().rss + need.weights
            most = idle + now.work
            text = f"about {plan.gib(idle)} when idle, and up to {plan.gib(most)} at once"
            yield Finding(Level.OK, "process", text)
        return
    total = [torch.cuda.mem_get_info(gpu)[1] for gpu in devices.gpus(settings.device)]
    empty = plan.make(need, settings, dataclasses.replace(there, free=total))
    yield _verdict("GPU memory", now, empty)
    yield _host(now, memory.free_memory(torch.device("cpu")))


def _verdict(about: str, made: plan.MemoryPlan, empty: plan.MemoryPlan | None = None) -> Finding:
    """What the plan comes to; ``empty`` is the one for a device that nobody uses."""
    level = Level.FAIL if made.problem else Level.WARN if made.tight else Level.OK
    if made.offloaded:
        level = Level.WARN
    if empty and level is not Level.OK and not (empty.problem or empty.offloaded):
        used = plan.gib(empty.free - made.free)
        text = f"{made}; but {used} are in use, perhaps by this service: stop it and ask again"
        return Finding(Level.WARN, about, text)
    return Finding(level, about, str(made))


def _host(made: plan.MemoryPlan, host: int) -> Finding:
    """The machine's memory beside GPUs."""
    wanted = _BASE + made.settings.max_concurrency * made.picture
    text = f"{plan.gib(host)} free, up to {plan.gib(wanted)} wanted for libraries and pictures"
    if host >= wanted:
        return Finding(Level.OK, "host memory", text)
    fewer = max(0, host - _BASE) // made.picture
    fits = f"QWENVL_MAX_CONCURRENCY={fewer} fits; or " if fewer else ""
    return Finding(Level.WARN, "host memory", f"{text}; {fits}lower QWENVL_MAX_IMAGE_MEGAPIXELS")


def _port(bind: str) -> Finding:
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gunicorn does
        try:
            probe.bind((host, int(port)))
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            more = f"see who has it with: ss -ltnp 'sport = :{port}' (perhaps this service itself)"
            return Finding(Level.FAIL, "port", f"cannot listen on {bind}: {why}; {more}")
    return Finding(Level.OK, "port", f"{bind} is free")
