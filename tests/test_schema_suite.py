"""The schemas of JSON-Schema-Test-Suite: what a model of random weights writes to one fits it.

``data/json_schemas.jsonl`` has all that are valid in draft 2020-12, of drafts 6 to 2020-12 and v1
(github.com/json-schema-org/JSON-Schema-Test-Suite at 44401e0, MIT), without ``$schema``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenvl_app.errors import BadSchema
from qwenvl_app.generation import Constraint, FinishReason
from qwenvl_app.loading.load import load
from tests.engines import running, spread
from tests.test_grammar import answer, asked, fits

SCHEMAS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/json_schemas.jsonl").read_text("utf-8").splitlines()
]
SEEDS = 4  # a schema that allows anything is often cut: no answer says nothing


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_answers_fit_and_what_is_refused_is_named():
    fitting, left, refused = 0, SCHEMAS, []
    with running(spread(load("demo")), kv_cache_bytes=2**29) as engine:
        for seed in range(SEEDS):
            taken = []
            for schema in left:
                try:
                    limits = {"seed": seed, "max_new_tokens": 256}
                    sequence = engine.submit(asked(Constraint("json", schema), **limits))
                    taken.append((schema, sequence))
                except BadSchema as error:
                    refused.append((schema, error.keyword))
            left = []
            for schema, sequence in taken:
                text, reason = answer(sequence)
                if reason is FinishReason.LENGTH:
                    left.append(schema)
                else:
                    fits(text, schema)
                    fitting += 1
    assert fitting >= 200
    assert [schema for schema, keyword in refused if keyword is None] == []
