"""What the workers of one service share: a directory in memory, made by gunicorn's master.

There is one only where there are several workers (``backend = "remote"``). It holds the metrics'
values, a file of each worker (``process.share_metrics``), and a file that is locked for what only
one of them may do at a time. The kernel gives locks back when their holder dies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwenvl_app import process

_CPUS = 2**61  # the first of the places that stand for CPUs; those of quotas are below
_MOST_WORKERS = 4096  # of two generations, while one takes over from the other

_directory: Path | None = None
_cpu: Lock | None = None


def begin(parent: str | None) -> None:
    """Make the directory, for the workers that are forked from now on; once.

    ``parent``: where; None: where temporary files are.
    """
    global _directory  # noqa: PLW0603  # what a fork inherits has no other place
    if _directory is None:
        _directory = Path(tempfile.mkdtemp(prefix="qwenvl-", dir=parent))
        process.share_metrics(_directory)


def end() -> None:
    """Remove it. In the master, when there are no workers any more."""
    if _directory:
        shutil.rmtree(_directory, ignore_errors=True)


def forget(pid: int) -> None:
    """A worker has ended: what it had under way counts no longer."""
    if _directory:
        process.forget_metrics(_directory, pid)


def directory() -> Path | None:
    """None where one worker is all there is."""
    return _directory


class Lock:
    """The right to one ``place``, a number below 2**62, among all workers. For one thread."""

    def __init__(self, directory: Path):
        self._file = os.open(directory / "locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, place: int) -> bool:
        """Whether it was free. Never blocks."""
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _flock(place))
        except OSError:
            return False
        return True

    def wait(self, place: int) -> None:
        """Take it as soon as it is free."""
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, _flock(place))

    def give_back(self) -> None:
        """Give back all that was taken. Once."""
        os.close(self._file)


def stay_on_one_cpu(workers: int) -> None:
    """Have one CPU for each of the ``workers``; at the start of one, before it has threads.

    Python's threads hand one lock around, thirty times a request: on two CPUs that costs half as
    much as the request (benchmarks/RESULTS.md). With fewer workers than CPUs nothing is done: who
    decodes a picture lets the others go on, on other CPUs.
    """
    global _cpu  # noqa: PLW0603  # held until the process ends
    if _directory is None or not hasattr(os, "sched_setaffinity"):  # it is Linux's
        return
    cpus = sorted(os.sched_getaffinity(0))
    if workers < len(cpus):
        return
    lock = Lock(_directory)
    for place in range(_MOST_WORKERS):
        if lock.take(_CPUS + place):
            os.sched_setaffinity(0, {cpus[place % len(cpus)]})
            _cpu = lock
            return
    lock.give_back()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Run the block in one worker after another; where there is one only, at once."""
    if _directory is None:
        yield
        return
    lock = Lock(_directory)
    try:
        lock.wait(0)
        yield
    finally:
        lock.give_back()


def _flock(place: int) -> bytes:
    """``struct flock`` of fcntl(2): one byte, which need not be in the file."""
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
