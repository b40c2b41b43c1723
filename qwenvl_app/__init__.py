"""A service that answers questions about images with a Qwen-VL model."""

from __future__ import annotations

from flask import Flask

from qwenvl_app import sharing
from qwenvl_app.backends import Backend, build
from qwenvl_app.generation import Status
from qwenvl_app.service import tracing
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.metrics import Metrics
from qwenvl_app.service.quota import Quota
from qwenvl_app.settings import Settings, current
from qwenvl_app.web import (
    auth,
    cors,
    errors,
    ops,
    page,
    proxies,
    recognize,
    request_id,
    request_log,
)
from qwenvl_app.web.answering import Service
from qwenvl_app.web.chat import models
from qwenvl_app.web.chat import route as chat
from qwenvl_app.web.chat.image_urls import Fetcher
from qwenvl_app.web.disconnects import Disconnects
from qwenvl_app.web.openapi import docs
from qwenvl_app.web.responses import ContractJSON


def create_app(settings: Settings | None = None, backend: Backend | None = None) -> Flask:
    """Wire the application. Without ``backend`` the settings' own is built and starts loading.

    Raises SettingsError. ``app.extensions["qwenvl"]`` holds parts and functions, for any thread:
    ``drain`` refuses all who have no permit, ``close`` ends every thread, both any number of times;
    ``refused`` counts what the worker answered itself, ``has_key`` judges ``Authorization``.
    """
    settings = settings or current()
    backend = backend or build(settings)
    admission = Admission(settings.max_concurrency, settings.max_waiting, settings.queue_timeout_s)
    disconnects = Disconnects()

    def status() -> Status:
        return admission.draining or backend.status()

    def close() -> None:
        admission.drain()
        disconnects.close()
        backend.close()
        metrics.close()
        traces.close()

    keys, traces = auth.Keys(settings.api_keys), tracing.start()
    metrics = Metrics(admission, status, backend.stats)
    app = _flask(settings)
    app.extensions["qwenvl"] = {
        "backend": backend,
        "admission": admission,
        "disconnects": disconnects,
        "status": status,
        "drain": admission.drain,
        "close": close,
        "refused": metrics.refuse,
        "has_key": keys.admit,
    }
    _for_every_route(app, settings, metrics, traces, keys)
    quota = Quota(settings.max_requests_per_key, sharing.directory())
    service = Service(settings, backend, admission, quota, disconnects, status, Fetcher(settings))
    _register_routes(app, service, metrics)
    return app


def _register_routes(app: Flask, service: Service, metrics: Metrics) -> None:
    settings = service.settings
    app.register_blueprint(recognize.blueprint(service))
    app.register_blueprint(chat.blueprint(service))
    app.register_blueprint(models.blueprint(settings))
    app.register_blueprint(ops.blueprint(service.status, metrics))
    app.register_blueprint(docs.blueprint())
    if settings.page == "on":
        app.register_blueprint(page.blueprint())


def _flask(settings: Settings) -> Flask:
    """Flask with its own limits, for servers that have none, and the recorded form of JSON."""
    app = Flask(__name__, static_folder=None)
    app.url_map.merge_slashes = False  # or //path is a redirect in HTML to wherever Host says
    app.json = ContractJSON(app)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_upload_mb * 2**20
    app.config["MAX_FORM_PARTS"] = settings.max_parts
    app.config["MAX_FORM_MEMORY_SIZE"] = settings.max_field_kb * 2**10
    if hops := settings.trusted_hops:
        app.wsgi_app = proxies.trust(app.wsgi_app, hops)  # type: ignore[method-assign]
    return app


def _for_every_route(
    app: Flask,
    settings: Settings,
    metrics: Metrics,
    traces: tracing.Traces,
    keys: auth.Keys,
) -> None:
    """Records, ids, errors, CORS and keys, in the order in which they see a request."""
    request_log.register(app, metrics, traces)
    request_id.register(app)
    errors.register(app)
    cors.register(app, settings.cors_origins)  # before the keys: a preflight can't carry one
    auth.register(app, keys)
