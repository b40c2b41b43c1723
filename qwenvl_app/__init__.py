"""A service that answers questions about images with a Qwen-VL model."""

from __future__ import annotations

from flask import Flask

from qwenvl_app.admission import Admission
from qwenvl_app.backends import Backend, build
from qwenvl_app.settings import Settings, load_settings
from qwenvl_app.web import errors, ops, recognize, request_id
from qwenvl_app.web.responses import ContractJSON


def create_app(settings: Settings | None = None, backend: Backend | None = None) -> Flask:
    """Wire the application. Without ``backend`` the settings' own is built and starts loading.

    Raises SettingsError. ``app.extensions["qwenvl"]`` holds the backend and the admission.
    """
    settings = settings or load_settings()
    backend = backend or build(settings)
    admission = Admission(settings.max_concurrency, settings.max_waiting, settings.queue_timeout_s)
    app = Flask(__name__, static_folder=None)
    app.json = ContractJSON(app)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_upload_mb * 2**20
    app.config["MAX_FORM_PARTS"] = settings.max_parts
    app.config["MAX_FORM_MEMORY_SIZE"] = settings.max_field_kb * 2**10
    app.extensions["qwenvl"] = {"backend": backend, "admission": admission}
    request_id.register(app)
    errors.register(app)
    app.register_blueprint(recognize.blueprint(settings, backend, admission))
    app.register_blueprint(ops.blueprint(backend))
    return app
