"""Metrics where several workers answer: what each of them knows, added up for whoever scrapes one.

Counters and histograms are added by Prometheus' client, from its files in the shared directory
(https://prometheus.github.io/client_python/multiprocess/). It has no gauges that are asked for
when somebody scrapes; so each worker publishes its own, every second.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

_PERIOD_S = 1.0
# Of the gauges, those whose sum over all workers is the service's. The others are the same in each:
# a build, a phase, and what an engine in this process would have.
_ADDED = ("num_requests_running", "num_requests_waiting", "batch_sequences", "batch_slots")


class AllWorkers:
    """The registry that is scraped. Starts a thread, which ``close`` ends.

    ``gauges`` are this worker's, with names that begin with ``prefix``; ``directory`` is shared.
    """

    def __init__(self, gauges: Collector, prefix: str, directory: Path):
        self.registry = CollectorRegistry()
        self._own, self._names = gauges, [prefix + name for name in _ADDED]
        self._published = {
            metric.name: Gauge(
                metric.name, metric.documentation, registry=None, multiprocess_mode="livesum"
            )
            for metric in gauges.collect()
            if metric.name in self._names
        }
        self._closed = threading.Event()
        self.registry.register(_Fresh(self.publish, directory))
        self.registry.register(_Others(gauges, self._names))
        self.registry.register(_Processes())
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def publish(self) -> None:
        """Tell the others of this worker's gauges. Any thread."""
        for metric in self._own.collect():
            if gauge := self._published.get(metric.name):
                gauge.set(metric.samples[0].value)

    def close(self) -> None:
        """End the thread. Any number of times."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_PERIOD_S):
            self.publish()


class _Fresh(MultiProcessCollector):
    """The files' values, this worker's gauges as of now among them."""

    def __init__(self, publish: Callable[[], None], directory: Path):
        super().__init__(None, str(directory))  # type: ignore[no-untyped-call]
        self._publish = publish

    def collect(self) -> Iterable[Metric]:
        """Of all workers."""
        self._publish()
        return super().collect()  # type: ignore[no-untyped-call,no-any-return]


class _Others(Collector):
    """The gauges that are not added up."""

    def __init__(self, gauges: Collector, added: list[str]):
        self._gauges, self._added = gauges, added

    def collect(self) -> Iterator[Metric]:
        """As this worker sees them."""
        return (metric for metric in self._gauges.collect() if metric.name not in self._added)


class _Processes(Collector):
    """What ProcessCollector says of one process, of all children of this one's parent.

    Sums, those that have ended counted in where it is a counter's; the start is the latest one's,
    so that a worker that dies is seen, and ``process_max_fds`` the lowest limit.
    """

    def collect(self) -> Iterator[Metric]:
        """Nothing without /proc."""
        master = os.getppid()
        added: dict[str, Metric] = {}
        for pid in _children(master):
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                if metric.name not in added:
                    added[metric.name] = metric
                    continue
                sample, (more,) = added[metric.name].samples[0], metric.samples
                join = {"process_start_time_seconds": max, "process_max_fds": min}
                value = join.get(metric.name, _add)(sample.value, more.value)
                added[metric.name].samples[0] = sample._replace(value=value)
        if cpu := added.get("process_cpu_seconds"):
            sample = cpu.samples[0]
            cpu.samples[0] = sample._replace(value=sample.value + _ended_cpu_s(master))
        return iter(added.values())


def _add(a: float, b: float) -> float:
    return a + b


def _ended_cpu_s(pid: int) -> float:
    """Of children that have ended: cutime and cstime of proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
