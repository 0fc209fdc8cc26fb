"""The OpenAPI document against the server: generated requests find no 500, and no answer that it does not name."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from dit_hub.serving.limits import Limits

from .served import Served, serving

# Not among them: that data of the right shape is accepted, for the names of classes and schedulers are not in it.
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection, unsupported_method, ignored_auth,
]  # fmt: skip

OPERATIONS = [
    ("POST", "/v1/images/generations"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{name}"),
    ("DELETE", "/v1/batches/{name}"),
    ("GET", "/v1/batches/{name}/results"),
    ("GET", "/v1/batches/{name}/results/{shard}"),
    ("POST", "/v1/batches/{name}/resume"),
    ("POST", "/v1/batches/{name}/cancel"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = Limits(images=2, steps=3, side=64, batches=1000)
    with serving(limits=limits, batch_folder=tmp_path_factory.mktemp("batches")) as one:
        yield one


@pytest.fixture(scope="module")
def document(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_all_operations_are_here(document: Any) -> None:
    found = [(one.ok().method.upper(), one.ok().path) for one in document.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


# Strings in paths and lines of text have no wrong shape.
CASES = [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
CASES += [("POST", "/v1/images/generations", GenerationMode.NEGATIVE)]

schemathesis.serializer.alias("application/jsonl", "text/plain")


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_generated_requests_find_no_fault(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=30, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    @hypothesis.given(case=document[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()
