"""The routes' own tests once more, with a socket between the routes and the scripted backend.

What reaches the backend behind the upstream has to be what reaches it in one process, and what it
says has to come back whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask

from qwenvl_app.service.admission import Admission
from qwenvl_app.testing import ScriptedBackend
from tests import declared
from tests.remote import fronted, served
from tests.test_chat import (  # noqa: F401
    test_a_stream,
    test_models,
    test_what_an_answer_has_to_be,
    test_what_the_backend_is_asked,
)
from tests.test_contract import (  # noqa: F401
    test_a_file_name_in_gbk_is_no_error,
    test_a_slash_at_the_end_is_the_same_route,
    test_accepted,
    test_of_two_images_the_last_counts,
    test_recorded_answers,
)
from tests.test_recognize import test_a_prompt_comes_through_unchanged  # noqa: F401
from tests.test_recognize_stream import (  # noqa: F401
    test_headers_of_an_answer_in_one_piece,
    test_who_gets_events,
)
from tests.test_tools import (  # noqa: F401
    test_a_call_that_was_cut_is_no_call,
    test_a_stream_with_calls,
    test_an_answer_with_calls,
    test_calls_after_reasoning_with_log_probabilities,
    test_one_call_at_most,
    test_what_is_required_is_a_constraint,
    test_with_the_choice_none_there_are_no_tools,
)


@pytest.fixture
def app(backend: ScriptedBackend) -> Iterator[Flask]:
    """The service in front of one whose backend is ``backend``."""
    with served(backend) as url, fronted(url) as (app, _):
        undeclared = declared.watch(app)
        yield app
        assert not undeclared, "an answer is not as /openapi.json says"
        admission: Admission = app.extensions["qwenvl"]["admission"]
        assert (admission.free, admission.waiting) == (admission.permits, 0)
