"""Which pages of other origins may ask from a browser. Never with credentials.

By hand: flask-cors is ten times as much for options that nobody sets here, and reflects origins
with credentials where one word is set wrongly, which was the replaced service's mistake.
"""

from __future__ import annotations

from collections.abc import Sequence

from flask import Flask, Response, request

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    # The openai package sends a dozen of its own. The star is all but Authorization (Fetch, 3.3.3).
    "Access-Control-Allow-Headers": "Authorization, *",
    "Access-Control-Max-Age": "7200",  # the longest that Chrome remembers
}
_EXPOSED = (
    "X-Request-ID, Retry-After, "
    "X-Finish-Reason, X-Prompt-Tokens, X-Cached-Tokens, X-Completion-Tokens, X-Reasoning-Tokens"
)


def register(app: Flask, origins: Sequence[str]) -> None:
    """Answer preflights and mark every answer, errors too. ``*`` is anyone, no origins nobody."""
    anyone = "*" in origins

    def preflight() -> Response | None:
        asked = "Origin" in request.headers and "Access-Control-Request-Method" in request.headers
        if request.method != "OPTIONS" or not asked:
            return None
        return Response(status=204, headers=_PREFLIGHT)  # ``allow`` says whether that origin may

    def allow(response: Response) -> Response:
        if not anyone:
            response.vary.add("Origin")
        origin = "*" if anyone else request.headers.get("Origin")
        if origin in origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        return response

    if origins:
        app.before_request(preflight)
        app.after_request(allow)
