"""Switches that hold for the whole process, each with why it is thrown.

Logging has its own such place, ``logs.config``. Libraries are imported where they are switched, so
that nothing here makes an import of torch.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any


@cache
def _cores() -> int:
    """As torch found them: affinity and OMP_NUM_THREADS counted in."""
    import torch

    return torch.get_num_threads()


def threads(count: int) -> tuple[int, int]:
    """Of the setting ``cpu_threads``: for one product, and for a call that takes long."""
    return count or max(1, _cores() - 1), count or _cores()


def use_threads(count: int) -> None:
    """Threads of one product, 0 for all cores but one. For threads that have not used torch yet.

    One core stays free for the threads that read requests and decode pictures.
    """
    import torch

    torch.set_num_threads(threads(count)[0])


def return_free_memory() -> None:
    """Let glibc give back what was freed: that of tensors of up to 32 MiB it keeps otherwise."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def keep_objects() -> None:
    """Have the garbage collector leave alone what is there now: libraries and a model.

    To look through those 400,000 objects takes 0.2 s, in which no other thread runs and no answer
    goes on. What nothing refers to any more still goes, unless it refers to itself.
    """
    gc.collect()
    gc.freeze()


def freeze_compiled_weights(freeze: bool) -> None:
    """Whether torch.compile takes weights as constants, as it must take packed ones.

    Packed weights (``engine/fused.py``) are opaque. Others it would pack itself, and keep both.
    """
    import torch

    torch._inductor.config.freezing = freeze


def quiet_pillow() -> None:
    """Pillow says nothing of odd or broken pictures: what a client sends is not the service's.

    Its warnings hold a file's own words, and Python keeps each text that it has shown: a line in
    the log for each file, and memory that is never given back. It logs errors too.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def quiet_modelscope(longest_s: int) -> None:
    """ModelScope's client logs where all others do, draws no bars, and allows a file ``longest_s``.

    Its own limit is an hour, too little for 5 GB on a slow line. A download that stands still ends
    sooner. It reads both from its module.
    """
    from modelscope_hub import _download

    library = logging.getLogger("modelscope_hub")
    library.handlers.clear()
    library.propagate = True
    internals: Any = _download
    if not isinstance(internals.tqdm, partial):
        internals.tqdm = partial(internals.tqdm, disable=True)
    internals.DOWNLOAD_TOTAL_TIMEOUT = max(internals.DOWNLOAD_TOTAL_TIMEOUT, longest_s)


def quiet_huggingface() -> None:
    """Hugging Face's client tells no torch and no agent, and signed addresses stay out of the log.

    Which agents there are it would ask the hub, in a request of its own.
    """
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def omit_created_series() -> None:
    """Prometheus' client would double its series with the time at which each began."""
    import prometheus_client

    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


def share_metrics(directory: Path) -> None:
    """Prometheus' client keeps values in files there: those of each process that is forked later.

    By itself it asks its variable when it is imported, which the master does before it knows that
    there will be several workers.
    """
    from prometheus_client import values

    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]


def forget_metrics(directory: Path, pid: int) -> None:
    """Gauges of a process that has ended count no longer; its counters do."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]


def allow_files(wanted: int) -> None:
    """Raise the limit on open files, often 1,024, as far as need be and may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
