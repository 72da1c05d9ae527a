"""The server against its own OpenAPI description: schemathesis makes up requests, right ones and wrong ones."""

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks

from tests.serve_fixtures import serving, toy_engine

load_all_checks()
# A description cannot say that roles alternate, that a conversation fits the context, that the model exists.
SILENT = CHECKS.get_by_names(["positive_data_acceptance"])
# schemathesis does not count 413 as a refusal
REFUSED = CHECKS.get_by_names(["positive_data_acceptance", "negative_data_rejection"])


@pytest.fixture(scope="module")
def described():
    """(server, its description)."""
    with serving(toy_engine(), queue=1000) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        yield running, schema


def operations(schema) -> list[str]:
    return sorted(o.ok().label for o in schema.get_all_operations())


def test_everything_is_described(described):
    assert operations(described[1]) == [
        "GET /health",
        "GET /metrics",
        "GET /stats",
        "GET /tokenizer_info",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "POST /detokenize",
        "POST /tokenize",
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
    ]


def fuzz(described, examples: int) -> None:
    running, schema = described
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*hypothesis.HealthCheck],  # pyright: ignore[reportArgumentType]
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue

            @settings
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def run(case):
                response = case.call(base_url=running.url, timeout=120)
                assert response.status_code < 500
                case.validate_response(response, excluded_checks=REFUSED if response.status_code == 413 else SILENT)

            run()
    running.idle()
    assert running.worker.failure is None


def test_made_up_requests(described):
    fuzz(described, 5)


@pytest.mark.slow
def test_many_made_up_requests(described):
    fuzz(described, 150)
