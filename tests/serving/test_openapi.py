"""The OpenAPI document and the server agree: schemathesis asks what it allows and what not.

`MMLM_FUZZ_EXAMPLES=N` sets how many requests each path gets.
"""

from __future__ import annotations

import os

import pytest

from mmlm.serving.openai_api import ApiLimits, build_api
from tests.serving.fakes import FakeSpeaker

pytestmark = pytest.mark.slow
schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
modes = pytest.importorskip("schemathesis.generation").GenerationMode

EXAMPLES = int(os.environ.get("MMLM_FUZZ_EXAMPLES", "100"))
LIMITS = ApiLimits(max_new_tokens=4, max_body_bytes=200_000)
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
# A schema cannot say that base64 must hold a picture, nor that the last turn is a question:
# what it allows may still be refused, with one of the errors that it names.
LEFT_OUT = [schemathesis.checks.positive_data_acceptance]


def asked_of(mode, **options):
    """Return the document of a server, and how requests are made from it."""
    app = build_api([FakeSpeaker("fake")], limits=LIMITS, **options)
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    document.config.generation.update(modes=[mode])
    return document


sound, broken = asked_of(modes.POSITIVE), asked_of(modes.NEGATIVE)
guarded = asked_of(modes.POSITIVE, keys=["key"])


@sound.parametrize()
@SETTINGS
def test_what_the_document_allows_is_answered_as_it_says(case):
    case.call_and_validate(excluded_checks=LEFT_OUT)


@broken.include(method="POST").parametrize()
@SETTINGS
def test_what_the_document_forbids_is_refused_as_it_says(case):
    case.call_and_validate(excluded_checks=LEFT_OUT)


@guarded.include(path="/v1/models").parametrize()
@SETTINGS
def test_a_key_is_asked_for_where_the_document_says_so(case):
    case.call_and_validate(excluded_checks=LEFT_OUT, headers={"Authorization": "Bearer key"})
