"""Will the service run here, with these settings? Each finding says what to change."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from qwenvl_app.engine.memory import free_memory
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading import checkpoint, footprint
from qwenvl_app.settings import Settings

_ROOT = Path(__file__).resolve().parent.parent
_GIB, _MIB = 2**30, 2**20
# Qwen3-VL's patches are 16 by 16, and two by two of them make a token.
_PIXELS_A_TOKEN = 32 * 32
# Libraries, buffers and what CUDA takes for itself, beside what is counted here.
_BASE = int(1.5 * _GIB)
# Of a decoded picture: RGB, a copy while it is turned or resized, floats of the resized one.
_BYTES_A_PIXEL = 12


class Level(StrEnum):
    """FAIL: it will not run. WARN: it will, but perhaps not as expected."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
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
        directory = checkpoint.find(settings.model, download=False)
        checkpoint.check(directory)
    except checkpoint.NotDownloaded as error:
        text = f"{error}; `flask --app wsgi download` gets it, or else the first start"
        yield Finding(Level.WARN, "model", text)
        return
    except ModelLoadError as error:
        yield Finding(Level.FAIL, "model", str(error))
        return
    try:
        need = footprint.measure(directory, settings.dtype, settings.max_image_megapixels * 1e6)
    except (KeyError, TypeError, ValueError) as error:
        text = f"config.json or preprocessor_config.json lacks what is needed ({error})"
        yield Finding(Level.FAIL, "model", f"{text}; copy or download them again")
        return
    yield Finding(
        Level.OK,
        "model",
        f"complete; {need.parameters / 1e6:,.1f} million parameters, {_gib(need.weights)} in "
        f"{need.dtype}",
    )
    if device.level is not Level.FAIL:
        yield from _memory(settings, need)


def _versions() -> Finding:
    pinned = re.findall(
        r"^([a-z-]+)==(\S+)", (_ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    other = []
    for name, expected in pinned:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
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
            return Finding(Level.FAIL, "device", f"{_no_gpu()}; or set DEVICE to auto or cpu")
        if int(wanted.partition(":")[2] or 0) >= count:
            text = f"there is no {wanted}: {count} GPUs, counted from 0; set DEVICE"
            return Finding(Level.FAIL, "device", text)
    if wanted != "cpu" and count:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return Finding(Level.OK, "device", f"{wanted}: {names}")
    level = Level.OK if wanted == "cpu" or settings.model == "demo" else Level.WARN
    more = "" if wanted == "cpu" else f" ({_no_gpu()})"
    return Finding(level, "device", f"the CPU, {torch.get_num_threads()} threads{more}")


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install the CUDA build of the same version"
    return "torch sees no GPU: look at nvidia-smi, and at the unit's DeviceAllow"


def _memory(settings: Settings, need: footprint.Footprint) -> Iterator[Finding]:
    gpus = _gpus(settings)
    host = free_memory(torch.device("cpu"))
    picture = settings.max_image_megapixels * 1e6 * _BYTES_A_PIXEL
    pictures = settings.max_concurrency * picture
    if not gpus:
        free = host - _BASE - int(pictures)
        yield _fits("memory", settings, need, free, free)
        return
    free, total = map(sum, zip(*map(torch.cuda.mem_get_info, gpus), strict=True))
    yield _fits("GPU memory", settings, need, free - _BASE, total - _BASE)
    text = f"{_gib(host)} free, up to {_gib(_BASE + pictures)} wanted for libraries and pictures"
    if host >= _BASE + pictures:
        yield Finding(Level.OK, "host memory", text)
    else:
        fewer = int(max(0, host - _BASE) / picture)
        fits = f"MAX_CONCURRENCY={fewer} fits; or " if fewer else ""
        more = f"; {fits}lower MAX_IMAGE_MEGAPIXELS"
        yield Finding(Level.WARN, "host memory", text + more)


def _gpus(settings: Settings) -> list[torch.device]:
    if settings.device == "auto":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device(settings.device)] if settings.device.startswith("cuda") else []


def _fits(
    about: str, settings: Settings, need: footprint.Footprint, free: int, total: int
) -> Finding:
    """What is needed against ``free`` bytes, and against all there are if those are too few."""
    level, text = _judge(settings, need, free)
    if level is not Level.OK and _judge(settings, need, total)[0] not in (level, Level.FAIL):
        level = Level.WARN
        used = _gib(total - free)
        text += f"; but {used} are in use, perhaps by this service: stop it and ask again"
    return Finding(level, about, text)


def _judge(settings: Settings, need: footprint.Footprint, free: int) -> tuple[Level, str]:
    """Weights, KV cache, known pictures and the vision tower against ``free`` bytes."""
    after = free - need.weights
    cache = settings.kv_cache_mb * _MIB or after // 2
    known = settings.prefix_cache_mb * _MIB
    everyone = need.kv(settings.max_concurrency, settings.max_new_tokens)
    text = (
        f"{_gib(max(0, free))} free; weights {_gib(need.weights)}, KV cache {_gib(max(0, cache))} "
        f"where {settings.max_concurrency} of the largest requests want {_gib(everyone)}, vision "
        f"tower up to {_gib(need.vision)}, known pictures {_gib(known)}; "
    )
    if after <= 0:
        half = "DTYPE=bfloat16, " if need.dtype == "float32" else ""
        more = f"the weights do not fit: take {half}a smaller checkpoint or more memory"
        return Level.FAIL, text + more
    too_much = cache + need.vision + known > after
    level = Level.FAIL if too_much and settings.kv_cache_mb else Level.WARN
    advice = _advice(settings, need, after - need.vision)
    if cache < need.kv(1, settings.max_new_tokens):
        return level, f"{text}the largest request does not fit: {advice}"
    if too_much:
        return level, f"{text}together too much: {advice}"
    if cache < everyone:
        return Level.OK, f"{text}large ones wait for one another; that is no error"
    return Level.OK, text.removesuffix("; ")


def _advice(settings: Settings, need: footprint.Footprint, spare: int) -> str:
    """Values that fit, where both caches together may take ``spare`` bytes."""
    least = -(-need.kv(1, settings.max_new_tokens) // _MIB)
    room = spare // _MIB
    if room < least:
        largest = need.picture_tokens * _PIXELS_A_TOKEN / 1e6
        return (
            f"MAX_IMAGE_MEGAPIXELS below {largest:.1f} refuses larger pictures, which then need "
            "not fit; or take a smaller checkpoint or more memory"
        )
    known = min(settings.prefix_cache_mb, room - least)
    lower = f" and PREFIX_CACHE_MB={known}" if known < settings.prefix_cache_mb else ""
    upto = f" to {room - known}" if room - known > least else ""
    return f"KV_CACHE_MB={least}{upto}{lower} would fit"


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


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.0f} MiB"
