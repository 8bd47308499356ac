"""schemathesis finds nothing that the service does and its OpenAPI does not say, nor the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzz import schema
from service.core.access import Scope
from service.triton_server.supervision import EmbeddedTriton
from service.upstreams.variants import Variant, Variants
from tests.support.keys import Keys
from tests.support.servers import Gateway, StartGateway

EXAMPLES = 10  # an operation
NOT_ESTIMATES = r"^(?!/v1/vqa/estimate)"  # which take the body of /v1/vqa


@pytest.mark.needs("schemathesis")
def test_the_service_does_what_its_openapi_says(gateway: Gateway, tmp_path):
    report = schema.run(gateway.url, EXAMPLES, seed=1, folder=tmp_path, only=NOT_ESTIMATES)
    assert report["wrong"] == []
    assert report["operations"] == 13
    assert report["cases"] > 200


@pytest.mark.needs("schemathesis")
@pytest.mark.slow
def test_an_administrators_calls_do_what_the_openapi_says(
    start_gateway: StartGateway, triton: EmbeddedTriton, repository: Path, tmp_path: Path
):
    keys, file, address = Keys(tmp_path), tmp_path / "variants.json", (triton.access.url,)
    names = {"stable": 95.0, "next": 5.0}
    variants = Variants({name: Variant(name, str(repository), address, address, part) for name, part in names.items()})
    file.write_bytes(variants.to_json())
    key = keys.make("ops", frozenset({Scope.ADMIN}))
    with start_gateway({"GLIMPSE_VARIANTS": str(file), "GLIMPSE_KEYS": str(keys.path)}) as gateway:
        report = schema.run(
            gateway.url,
            EXAMPLES,
            seed=1,
            folder=tmp_path,
            key=key,
            only="^/v1/variants",
            phases="examples,coverage,fuzzing",  # nothing links to them
        )
    assert report["wrong"] == []
    assert report["operations"] == 2
    assert report["cases"] > 50
