"""The backend with no model, under the name that the tests here call it by."""

from __future__ import annotations

from qwenvl_app.testing import ScriptedBackend as FakeBackend
from qwenvl_app.testing import ScriptedGeneration as FakeGeneration
from qwenvl_app.testing import prompt_of

__all__ = ["FakeBackend", "FakeGeneration", "prompt_of"]
