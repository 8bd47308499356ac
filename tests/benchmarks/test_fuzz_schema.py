"""schemathesis finds nothing that the service does and its OpenAPI does not say, nor the other way round."""

from __future__ import annotations

import pytest

from benchmarks.fuzz import schema
from tests.support.servers import Gateway

EXAMPLES = 10  # an operation
NOT_ESTIMATES = r"^(?!/v1/vqa/estimate)"  # which take the body of /v1/vqa


@pytest.mark.needs("schemathesis")
def test_the_service_does_what_its_openapi_says(gateway: Gateway, tmp_path):
    report = schema.run(gateway.url, EXAMPLES, seed=1, folder=tmp_path, only=NOT_ESTIMATES)
    assert report["wrong"] == []
    assert report["operations"] == 11
    assert report["cases"] > 200
