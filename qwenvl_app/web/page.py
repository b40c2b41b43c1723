"""``GET /``: the page for people, and the files that it needs, all of them from here."""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Response, make_response, render_template, request, send_from_directory
from werkzeug.exceptions import MethodNotAllowed

from qwenvl_app.version import VERSION

# Nothing from elsewhere, nothing inline (W3C, Content Security Policy Level 3). A picture is a blob
# until it is sent.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAMPLES = Path(__file__).resolve().parent / "samples"  # in the checkout demo/samples leads here


def blueprint() -> Blueprint:
    """The page, its files under ``/static`` and its pictures under ``/samples``."""
    routes = Blueprint("page", __name__, static_folder="static", template_folder="templates")

    @routes.get("/", provide_automatic_options=False)
    def page() -> str:
        """The page itself; it asks the other routes for all the rest."""
        return render_template("page.html", version=VERSION, samples=_samples())

    @routes.get("/samples/<name>", provide_automatic_options=False)
    def sample(name: str) -> Response:
        """A picture that the demo model knows."""
        return send_from_directory(SAMPLES, name)

    @routes.after_request
    def protect(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @routes.before_app_request
    def without_a_path() -> Response | None:
        """``http://host`` is ``http://host/`` (RFC 3986, 6.2.3), with no redirect to any Host."""
        if request.environ["PATH_INFO"]:
            return None
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(("GET", "HEAD"))
        return protect(make_response(page()))

    return routes


def _samples() -> list[str]:
    return sorted(path.name for path in SAMPLES.iterdir())
