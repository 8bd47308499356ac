"""Pages of other origins may call the service from a browser if a setting says so."""

from __future__ import annotations

import base64

import httpx
import pytest

from service.edges.http.application import http_api
from service.settings import SettingsError, read_settings
from tests.support.fakes import House, png

APP = "https://app.example"
ASKED = {"image": base64.b64encode(png()).decode(), "question": "what colour?"}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-tenant-id"}


async def called(
    origins: str, method: str, origin: str = APP, asked: dict[str, str] = PREFLIGHT, **request: object
) -> httpx.Response:
    house = House(cors_origins=origins)
    transport = httpx.ASGITransport(http_api(house.edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        headers = {"origin": origin} | (asked if method == "OPTIONS" else {})
        response = await http.request(method, "/v1/vqa", headers=headers, **request)  # type: ignore[arg-type]
    house.reader.close()
    return response


async def test_no_origin_is_allowed_unless_it_is_set():
    assert "access-control-allow-origin" not in (await called("", "POST", json=ASKED)).headers
    assert (await called("", "OPTIONS")).status_code == 405


@pytest.mark.parametrize("origins", [APP, f"http://localhost:3000, {APP}"])
async def test_an_origin_that_is_set_may_call_and_read_errors_too(origins):
    asked = await called(origins, "OPTIONS")
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, APP)
    for body, status in ((ASKED, 200), ({}, 400)):
        response = await called(origins, "POST", json=body)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, APP)
        assert "x-request-id" in response.headers["access-control-expose-headers"]


STAINLESS = "authorization,content-type,traceparent,x-stainless-arch,x-stainless-lang,x-stainless-retry-count"


@pytest.mark.parametrize(("method", "sent"), [("POST", STAINLESS), ("PATCH", "content-type,x-api-key")])
async def test_openais_client_and_an_administrator_may_call_from_a_page(method, sent):
    asked = {"access-control-request-method": method, "access-control-request-headers": sent}
    response = await called(APP, "OPTIONS", asked=asked)
    assert response.status_code == 200, response.text
    assert set(sent.split(",")) <= set(response.headers["access-control-allow-headers"].replace(" ", "").split(","))
    assert "access-control-allow-credentials" not in response.headers


async def test_other_origins_are_not_told_anything():
    response = await called(APP, "POST", origin="https://other.example", json=ASKED)
    assert "access-control-allow-origin" not in response.headers
    assert (await called(APP, "OPTIONS", origin="https://other.example")).status_code == 400


async def test_a_star_is_any_origin():
    assert (await called("*", "POST", json=ASKED)).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://*.example", "null"])
def test_what_is_no_origin_is_told_at_start(origin):
    with pytest.raises(SettingsError, match=r"GLIMPSE_CORS_ORIGINS.* is not an origin: write https://HOST"):
        read_settings({"GLIMPSE_CORS_ORIGINS": origin})
