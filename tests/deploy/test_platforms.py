"""The service as managed platforms start it and call it: Vertex AI's custom containers, and Hugging Face's Spaces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml

from tests.support.paths import PROJECT
from tests.support.servers import Gateway, free_ports, started_gateway

VERTEX, SPACE = PROJECT / "deploy" / "vertex", PROJECT / "deploy" / "huggingface"


@contextmanager
def started(folder: Path, triton: str, port: int, environment: Mapping[str, str]) -> Iterator[Gateway]:
    """A service whose port only the platform's variables say."""
    told = {"GLIMPSE_HTTP_PORT": "", "GLIMPSE_VISION_URL": triton, "GLIMPSE_LLM_URL": triton, **environment}
    with started_gateway(folder, told) as process:
        gateway = replace(process, url=f"http://127.0.0.1:{port}")
        gateway.wait_until_ready()
        yield gateway


def test_vertex_ai_asks_on_its_port_and_its_routes(tmp_path, triton):
    (port,) = free_ports(1)
    route = "/v1/endpoints/17/deployedModels/4"
    platform = {
        "AIP_HTTP_PORT": str(port),
        "AIP_HEALTH_ROUTE": route,
        "AIP_PREDICT_ROUTE": f"{route}:predict",
        "GLIMPSE_ELASTIC_FIDELITY": "false",
    }
    with started(tmp_path, triton.access.url, port, platform) as gateway, httpx.Client(base_url=gateway.url) as http:
        assert http.get(route).status_code == 200
        asked = json.loads((VERTEX / "request.json").read_text())
        said = http.post(f"{route}:predict", json=asked, timeout=60)
        assert said.status_code == 200, said.text
        assert said.json().keys() == {"predictions"}
        count, description = said.json()["predictions"]
        assert count["answer"].isdecimal()
        assert count["usage"]["completion_tokens"] <= 16 < description["usage"]["completion_tokens"] <= 64
        alone = http.post("/v1/vqa", json=asked["instances"][0], timeout=60).json()
        assert alone["answer"] == count["answer"]


def variables_of(dockerfile: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^ENV |^    )(\w+)=(\S+)", dockerfile, re.MULTILINE))


def test_a_space_asks_at_its_port(tmp_path, triton):
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    dockerfile = (SPACE / "Dockerfile").read_text()
    variables = variables_of(dockerfile)
    assert (front["sdk"], str(front["app_port"])) == ("docker", variables["GLIMPSE_HTTP_PORT"])
    assert f"EXPOSE {front['app_port']}" in dockerfile
    (port,) = free_ports(1)  # in the place of the Space's, which may be taken here
    image = variables_of((PROJECT / "Dockerfile").read_text())
    environment = {name: image[name] for name in ("GLIMPSE_LOG_DIR", "HOME", "PYTHONDONTWRITEBYTECODE")}
    environment |= variables | {"GLIMPSE_HTTP_PORT": str(port)}
    with started(tmp_path, triton.access.url, port, environment) as gateway, httpx.Client(base_url=gateway.url) as http:
        assert http.get("/").headers["content-type"].startswith("text/html")
        asked = json.loads((VERTEX / "request.json").read_text())["instances"][0]
        assert http.post("/v1/vqa", json=asked, timeout=60).json()["answer"].isdecimal()
        assert http.post("/v1/vqa/predict", json={"instances": [asked]}).status_code == 404


@pytest.mark.parametrize("folder", [VERTEX, SPACE], ids=lambda path: path.name)
def test_a_page_names_settings_and_files_that_exist(folder):
    from service.settings import PREFIX, Settings  # noqa: PLC0415

    page = (folder / "README.md").read_text()
    names = set(re.findall(rf"{PREFIX}[A-Z_]+[A-Z]", page))
    assert names
    assert {name.removeprefix(PREFIX).lower() for name in names} <= set(Settings.model_fields)
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (folder / link).exists()
