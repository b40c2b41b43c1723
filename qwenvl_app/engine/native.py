"""The decode step on a CPU in C++: ``native.cpp``, which g++ compiles at the first start.

PyTorch reads the weights for a few rows at a third of the memory's rate, and makes hundreds of
calls besides. Here a step is one call, during which other threads have the interpreter's lock. It
is for dense models in float32, and checked against the model's own step before it is used. The
weights are there twice then: a prefill has them as oneDNN wants them (``fused.py``).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import shutil
import subprocess
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from qwenvl_app.engine.compiled import Eager, alike
from qwenvl_app.engine.kv_cache import BLOCK, SlotCache
from qwenvl_app.engine.native_layout import Call, Model, fits, model_of

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread")
_CACHE = Path("~/.cache/qwenvl")
ALL_KINDS = 5  # rows: more are, as five, tiles of up to four one after another
_PATIENCE_S = 60.0  # for the compiler, on a busy machine


class NativeDecode:
    """``Runner.decode`` in one call. Used by the engine's thread alone.

    ``create`` makes it; it has the weights in the order in which they are read. ``threads`` share
    a product.
    """

    def __init__(self, library: ctypes.CDLL, model: Model, threads: int):
        self._model, self._decode = model, library.decode
        self._decode.argtypes = (ctypes.c_void_p, ctypes.POINTER(Call))
        library.create.restype = ctypes.c_void_p
        library.destroy.argtypes = (ctypes.c_void_p,)
        self._decoder = library.create(ctypes.byref(model), threads)
        self._cache: SlotCache | None = None
        self._version = -1  # of that cache, whose addresses are the following
        self._keys = self._values = (ctypes.c_void_p * 0)()
        weakref.finalize(self, library.destroy, self._decoder)

    def __call__(
        self, cache: SlotCache, ids: list[int], positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        """One token for each of the slots 0 to n; logits (n, vocabulary)."""
        if cache is not self._cache or cache.version != self._version:
            self._cache, self._version = cache, cache.version
            self._keys, self._values = map(_addresses, cache.first(cache.slots, cache.length))
        inputs = torch.tensor([ids, positions, starts])
        logits = torch.empty(len(ids), self._model.vocabulary)
        call = Call(
            rows=len(ids),
            length=cache.length,
            ids=inputs[0],
            positions=inputs[1],
            starts=inputs[2],
            keys=ctypes.addressof(self._keys),
            values=ctypes.addressof(self._values),
            logits=logits,
        )
        self._decode(self._decoder, call)
        return logits

    def agrees(self, eager: Eager, cache: SlotCache, rows: int) -> bool:
        """Whether its logits are those of ``eager`` (``Runner.decode``), on noise in ``cache``."""
        cache.fit(rows, BLOCK)
        for tensor in (tensor for side in cache.first(rows, BLOCK) for tensor in side):
            tensor.normal_()
        starts = [(BLOCK // 2 + 37 * row) % BLOCK for row in range(rows)]
        made = [step(cache, list(range(rows)), starts, starts) for step in (self, eager)]
        cache.reset()
        return alike(*made)


def _addresses(tensors: list[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def create(model: Any, room: int) -> NativeDecode | None:
    """That of ``model``, whose weights are not packed yet; None, and the log says why.

    ``room``: bytes that its own weights may take.
    """
    text = model.model.language_model
    if not fits(text):
        return None
    size = sum(each.nbytes for each in (*text.layers.parameters(), model.lm_head.weight))
    if size > room:
        log.info("decode steps are PyTorch's: %d MiB more would make them faster", size // 2**20)
        return None
    if library := _library():
        with torch.inference_mode():
            return NativeDecode(library, model_of(model, library.block()), torch.get_num_threads())
    return None


def _library() -> ctypes.CDLL | None:
    """The compiled source, which is kept for the next start."""
    if not (compiler := shutil.which("g++")):
        log.info("decode steps are PyTorch's: with g++ installed they would take a third of it")
        return None
    try:
        with ExitStack() as stack:
            machine = _run(compiler, "-march=native", "-Q", "--help=target")
            key = hashlib.sha256(
                b"".join([machine, *map(str.encode, _FLAGS), _SOURCE.read_bytes()])
            )
            folder = _folder(stack)
            path = folder / f"decode-{key.hexdigest()[:16]}.so"
            if not path.exists():
                made = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)), path.name)
                _run(compiler, *_FLAGS, "-o", str(made), str(_SOURCE))
                made.replace(path)  # another process may do the same
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("decode steps are PyTorch's: %s %s", error, getattr(error, "stderr", ""))
        return None


def _run(*command: str) -> bytes:
    done = subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE_S)  # noqa: S603
    return done.stdout


def _folder(stack: ExitStack) -> Path:
    """The user's own, where it can be written; a library has to come from nobody else."""
    try:
        folder = _CACHE.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # no home
        return Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return folder
