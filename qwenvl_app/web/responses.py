"""JSON as the contract has it: keys in order, no spaces, Chinese unescaped, no line at the end."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.json.provider import DefaultJSONProvider


class ContractJSON(DefaultJSONProvider):
    """What ``jsonify`` and views that return a dict use."""

    ensure_ascii = False
    sort_keys = False

    def response(self, *args: Any, **kwargs: Any) -> Response:
        """A response with the bytes that the replaced service sent."""
        content = self._prepare_response_obj(args, kwargs)
        body = self.dumps(content, separators=(",", ":"))
        return Response(body, mimetype="application/json")
