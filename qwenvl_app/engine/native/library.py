"""``native.cpp`` as a library: g++ compiles it at the first start, and it is kept for the next."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "native.cpp"
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread")
_CACHE = Path("~/.cache/qwenvl")
_PATIENCE_S = 60.0  # for the compiler, on a busy machine
_CONSTRUCTORS = ("new_team", "new_text", "new_tower")


def build() -> ctypes.CDLL | None:
    """The compiled source; None without a compiler, and the log says so."""
    if not (compiler := shutil.which("g++")):
        log.info("the model's layers are PyTorch's: with g++ installed they would be faster")
        return None
    try:
        with ExitStack() as stack:
            made = ctypes.CDLL(str(_compiled(compiler, _folder(stack))))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the model's layers are PyTorch's: %s %s", error, getattr(error, "stderr", ""))
        return None
    for name in _CONSTRUCTORS:
        getattr(made, name).restype = ctypes.c_void_p
    return made


def freed_with(owner: object, delete: Callable[[Any], None], made: Any) -> None:
    """``made`` is deleted with ``owner``; not by the process's end, when a thread may be in it."""
    weakref.finalize(owner, delete, made).atexit = False


def _compiled(compiler: str, folder: Path) -> Path:
    machine = _run(compiler, "-march=native", "-Q", "--help=target")
    sources = sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
    key = hashlib.sha256(
        b"".join([machine, *map(str.encode, _FLAGS), *(path.read_bytes() for path in sources)])
    )
    path = folder / f"native-{key.hexdigest()[:16]}.so"
    with _locked(folder):  # of processes that start together one compiles
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as here:
                made = Path(here, path.name)
                _run(compiler, *_FLAGS, "-o", str(made), str(_SOURCE))
                made.replace(path)
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process is in this at the same time; the system ends it for one that dies."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


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
