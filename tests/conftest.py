"""Fixtures for all tests, and the check that every test gave back what it took."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.routing import Rule

from qwenvl_app import create_app, process, testing
from qwenvl_app.service.admission import Admission
from qwenvl_app.settings import Settings, load_settings
from qwenvl_app.testing import ScriptedBackend
from tests import declared
from tests.waiting import until
from tests.wire import MULTIPART, ROUTE, Answer

# In a new environment all libraries have to be compiled. Workers that each begin with another one
# find compiled what the others have begun with: they are there after 24 s, and not after 37.
_FIRST = {
    "gw1": ("sympy", "transformers.generation.utils"),
    "gw2": ("openai", "langchain_openai", "schemathesis"),
    "gw3": ("hypothesis", "playwright.sync_api", "modelscope_hub", "huggingface_hub"),
}
for _name in _FIRST.get(os.environ.get("PYTEST_XDIST_WORKER", ""), ()):
    importlib.import_module(_name)

if TYPE_CHECKING:  # of pytest-xdist's processes one runs no tests, and waits for no torch
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """As the service does: two threads on two busy cores spend their time waiting for another."""
    process.use_threads(0)


@pytest.fixture(scope="session", autouse=True)
def _routes() -> Iterator[None]:
    """The code that builds a route's URL is compiled once, and not for each application again.

    Each test has an application of its own, and half of the time it took was Python's compiler's.
    """
    compiled: dict[tuple[object, ...], Callable[..., tuple[str, str]]] = {}
    compile_builder = Rule._compile_builder

    def once(rule: Rule, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        key = (rule.rule, str(rule.defaults), tuple(rule._trace), append_unknown)
        if key not in compiled:
            compiled[key] = compile_builder(rule, append_unknown)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rule, "_compile_builder", once)
        yield


def pytest_configure(config: pytest.Config) -> None:
    """The fixtures that integrators use; as pytest_plugins they would come after their import."""
    config.pluginmanager.register(testing)
    if os.environ.get("CI") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(config))
    gc.disable()


class _FailuresAtOnce:
    """Prints the last lines of a failure as it happens: a run that is cut off never reports."""

    def __init__(self, config: pytest.Config):
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and isinstance(terminal, pytest.TerminalReporter):
            terminal.write_line(f"\n{report.nodeid}, {report.when}")
            for line in report.longreprtext.splitlines()[-15:]:
                terminal.write_line(line)


def pytest_collection_finish() -> None:
    """What was imported and collected stays, and to look through it again and again takes long."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):  # type: ignore[no-untyped-def]
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Threads that a test started have ended after it."""
    before = set(threading.enumerate())
    yield

    def left() -> list[threading.Thread]:
        return [t for t in set(threading.enumerate()) - before if not _stays_by_design(t)]

    until(lambda: not left(), 5, lambda: f"threads left running: {left()}")


def _stays_by_design(thread: threading.Thread) -> bool:
    """tqdm's monitor, of a loading bar; the pool in which torch.compile runs a C++ compiler."""
    inductor = sys.modules.get("torch._inductor.async_compile")
    pooled = inductor is not None and inductor.get_compile_threads() > 1
    compiling = inductor.AsyncCompile.pool()._threads if pooled else ()
    return type(thread).__name__ == "TMonitor" or thread in compiling


@pytest.fixture
def settings() -> Settings:
    return load_settings({})


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend("这是", "一个", "答案。")


@pytest.fixture
def app(settings: Settings, backend: ScriptedBackend) -> Iterator[Flask]:
    app = create_app(settings, backend)
    undeclared = declared.watch(app)
    yield app
    assert not undeclared, "an answer is not as /openapi.json says"
    app.extensions["qwenvl"]["disconnects"].close()
    admission: Admission = app.extensions["qwenvl"]["admission"]
    assert admission.free == admission.permits, "a permit was not given back"
    assert admission.waiting == 0
    assert all(generation.cancelled for generation in backend.generations)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded checkpoint's tokenizer; special tokens in a text are special to it."""
    from transformers import AutoTokenizer

    from qwenvl_app.loading.checkpoint import DEMO

    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


Post = Callable[..., Answer]


@pytest.fixture
def post(client: FlaskClient) -> Post:
    """Post a raw body to the documented route through Flask's test client."""

    def post(body: bytes, content_type: str | None = MULTIPART, path: str = ROUTE) -> Answer:
        response = client.post(path, data=body, content_type=content_type)
        headers = {name.lower(): value for name, value in response.headers}
        return Answer(response.status_code, headers, response.data)

    return post
