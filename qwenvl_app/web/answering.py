"""What every route that generates does: a permit, the generation, and giving both back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from types import TracebackType
from typing import NamedTuple

from flask import g, request

from qwenvl_app.backends import Backend, require_ready
from qwenvl_app.generation import Delta, GenerationRequest, Status
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.deadline import Deadline
from qwenvl_app.service.quota import Quota
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.settings import Settings
from qwenvl_app.web import request_log
from qwenvl_app.web.chat.image_urls import Fetcher
from qwenvl_app.web.disconnects import Disconnects


class Service(NamedTuple):
    """What routes that generate are bound to."""

    settings: Settings
    backend: Backend
    admission: Admission
    quota: Quota
    disconnects: Disconnects
    status: Callable[[], Status]
    fetcher: Fetcher


class Answering:
    """One request from its arrival to the end of its answer, on the thread of the request.

    ``held`` has all that must be given back. Closing it does so, any number of times: leave it as a
    context, or hand its ``pop_all().close`` to ``response.call_on_close`` for a streamed answer.
    """

    def __init__(self, service: Service):
        self.held = ExitStack()
        self.record: RequestRecord = request_log.current()
        self.request_id: str = g.request_id
        self.deadline = Deadline(self.record.arrived + service.settings.request_timeout_s)
        self.originals: list[bytes] = []
        self._service = service
        self._counted = False

    def __enter__(self) -> Answering:
        """Watch the client."""
        connection = request.environ.get("gunicorn.socket")
        self.held.enter_context(self._service.disconnects.watch(connection, self.deadline))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give back what is still held; what failed is not measured by the admission."""
        self.held.__exit__(kind, error, trace)

    @property
    def owner(self) -> str:
        """Whose key the request brought; "" where none is asked for."""
        return self.record.key or ""

    def fetch(self, urls: Mapping[str, str], spent: int) -> dict[str, bytes]:
        """The pictures that are on other hosts; see ``Fetcher.fetch``. Raises ServiceError.

        Before ``admit``: a slow host holds no permit.
        """
        if not urls:
            return {}
        require_ready(self._service.status())
        self._count()  # or one owner could fetch so much at once that nobody else may
        with self.record.stage("fetch"):
            return self._service.fetcher.fetch(urls, spent, self.deadline, self.request_id)

    def admit(self) -> None:
        """Take a permit. Raises ServiceError."""
        require_ready(self._service.status())
        self._count()
        waited = self.held.enter_context(self._service.admission.admit(self.deadline))
        self.record.waited("queue", waited)

    def _count(self) -> None:
        """Among what the key's owner has under way, once. Raises KeyLimit."""
        if not self._counted:
            self.held.enter_context(self._service.quota.hold(self.record.key))
            self._counted = True

    def keep(self, original: bytes) -> None:
        """The file of a decoded picture, in the order of the pictures, if the backend wants it."""
        if self._service.settings.backend == "remote":
            self.originals.append(original)

    def generate(self, asked: GenerationRequest) -> Iterator[Delta]:
        """Start generating, and wait for the first words. Raises ServiceError, iterated too.

        So what fails before them is an answer with a status of its own, where one is streamed, too.
        """
        self.deadline.check()
        self.record.submit()
        generation = self._service.backend.generate(asked)
        self.originals = []  # an answer that streams would keep them to its end
        self.held.callback(generation.cancel)
        self.held.enter_context(self.deadline.on_leaving(generation.cancel))
        deltas = self._deltas(iter(generation))
        return chain(list(islice(deltas, 1)), deltas)

    def _deltas(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            self.record.add(delta)
            if delta.text or delta.reasoning or delta.logprobs or delta.finish_reason is not None:
                yield delta
        self.deadline.check()
