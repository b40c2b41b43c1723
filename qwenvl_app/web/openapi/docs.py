"""``/openapi.json``, and ``/docs``, where Swagger UI shows it: every file of it from here.

All addresses are relative, so that they are right behind a proxy that puts a prefix before them.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from mimetypes import guess_type

from flask import Blueprint, Response, abort, request

from qwenvl_app.web.openapi import document as openapi

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>qwenvl API</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Without validatorUrl Swagger UI would ask one of its makers'.
_START = """const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();
SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true, validatorUrl: null});
"""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")
PATHS = frozenset(
    ("/openapi.json", "/docs", "/docs/start.js", *(f"/docs/{name}" for name in FILES))
)


def blueprint() -> Blueprint:
    """The routes. They need no key: what they tell is no secret, and the same everywhere."""
    routes = Blueprint("docs", __name__)

    @routes.get("/openapi.json", provide_automatic_options=False)
    def document() -> Response:
        """The document."""
        return Response(openapi.document(), mimetype="application/json")

    @routes.get("/docs", provide_automatic_options=False)
    def page() -> Response:
        """The page."""
        return Response(_PAGE, mimetype="text/html")

    @routes.get("/docs/start.js", provide_automatic_options=False)
    def start() -> Response:
        """What starts Swagger UI; inline it would need a hole in the policy."""
        return Response(_START, mimetype="text/javascript")

    @routes.get("/docs/<name>", provide_automatic_options=False)
    def asset(name: str) -> Response:
        """A file of Swagger UI's own, of those that the page needs."""
        if name not in FILES:
            abort(404)
        return Response(_read(name), mimetype=guess_type(name)[0])

    @routes.after_request
    def finish(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-cache"  # ask whether it is still the same
        response.add_etag()
        response.make_conditional(request)
        return response

    return routes


@cache
def _read(name: str) -> bytes:
    return (files("flask_swagger_ui") / "dist" / name).read_bytes()
