"""The service around a script, for the page's tests: what is asked decides what is answered.

It loads as long as there is the file that ``PAGE_LOADING`` names.
"""

from __future__ import annotations

import os
from pathlib import Path

from qwenvl_app import create_app
from qwenvl_app.generation import GenerationRequest, Phase, Status
from qwenvl_app.testing import ScriptedBackend, prompt_of

MARKS = """```json
[{"bbox_2d": [100, 200, 500, 800], "label": "box"}, {"point_2d": [900, 100], "label": "dot"}]
```"""


def answer(request: GenerationRequest) -> list[str]:
    """Long for "count", marks for "find", else the picture's size."""
    prompt = prompt_of(request)
    if "count" in prompt:
        return [f"{number} " for number in range(200)]
    if "find" in prompt:
        return [MARKS]
    width, height = request.images[-1].size
    return [f"{width} x {height}, ", f"{len(request.messages)} messages"]


class Backend(ScriptedBackend):
    """It may be loading."""

    def status(self) -> Status:
        loading = Path(os.environ.get("PAGE_LOADING", "")).is_file()
        return Status(Phase.LOADING, "weights") if loading else Status(Phase.READY)


backend = Backend()
backend.answer, backend.apart_s = answer, 0.05
app = create_app(backend=backend)
