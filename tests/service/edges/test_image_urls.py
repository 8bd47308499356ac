"""A question may name an image by its URL, in each API, if the operator allows the host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_network

import httpx
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from service.app import image_fetcher
from service.edges.http.application import http_api
from service.media.fetch import FetchRules, ImageFetcher
from service.media.formats import HAS_PDFIUM
from service.settings import Settings, SettingsError, read_settings
from service.telemetry.metrics import Metrics
from tests.support import films
from tests.support.documents import filled, pdf
from tests.support.fakes import House, png
from tests.support.image_hosts import ImageHost, Names, image_host, redirect, response

RED, GREY = png((240, 0, 0)), png((90, 90, 90))
NAMES = {"images.test": [["127.0.0.1"]], "inner.test": [["10.0.0.1"]]}


@dataclass
class Caller:
    house: House
    host: ImageHost
    http: httpx.AsyncClient

    def url(self, path: str, host: str = "images.test") -> str:
        return f"http://{host}:{self.host.port}{path}"

    async def ask(self, *images: str) -> httpx.Response:
        chosen = {"image": images[0]} if len(images) == 1 else {"images": images}
        return await self.http.post("/v1/vqa", json=chosen | {"question": "what colour?"})

    def holds_nothing(self) -> bool:
        return not any(self.house.admission.quota.held)


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    async with image_host("127.0.0.1") as host:
        rules = FetchRules(
            hosts=("images.test", "inner.test"),
            ports=frozenset({host.port}),
            allows_http=True,
            private_networks=(ip_network("127.0.0.1"),),
            max_bytes=100_000,
        )
        house = House(fetcher=ImageFetcher(rules, Metrics(), resolve=Names(NAMES)), max_image_bytes=100_000)
        app = httpx.ASGITransport(http_api(house.edge))
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as http:
            host.answers["/red.png"] = response(RED)
            host.answers["/grey.png"] = response(GREY)
            yield Caller(house, host, http)
        house.reader.close()


async def test_an_image_from_a_url_is_answered_about_cached_and_kept_as_if_it_was_sent(caller):
    first = (await caller.ask(caller.url("/red.png"))).json()
    again = (await caller.ask(caller.url("/red.png"))).json()
    by_id = (await caller.ask(first["image_ids"][0])).json()
    assert [answer["answer"] for answer in (first, again, by_id)] == ["red"] * 3
    assert [answer["vision"]["cache"] for answer in (first, again, by_id)] == ["miss", "hit", "hit"]
    assert first["image_ids"] == again["image_ids"] == by_id["image_ids"]
    assert caller.holds_nothing()


@pytest.mark.skipif(not HAS_PDFIUM, reason="needs the extra pdf")
async def test_each_field_takes_by_url_what_it_takes_as_bytes(caller):
    files = {"/red.png": RED, "/a.pdf": pdf([filled((220, 30, 40))]), "/a.webm": films.video(), "/a.gif": films.gif()}
    caller.host.answers |= {path: response(data) for path, data in files.items()}

    async def asked(**fields: object) -> httpx.Response:
        return await caller.http.post("/v1/vqa", json={"question": "what?"} | fields)

    for fields in ({"image": "/a.pdf"}, {"video": "/a.webm"}, {"video": "/a.gif"}, {"image": "/a.gif"}):
        answer = await asked(**{name: caller.url(path) for name, path in fields.items()})
        assert answer.status_code == 200, answer.text
    for field, path, found in [
        ("image", "/a.webm", "a WebM or Matroska video (send it as a video)"),
        ("video", "/a.pdf", "not a video that can be read: it looks like a PDF document"),
        ("video", "/red.png", "it looks like an image (PNG)"),
    ]:
        error = (await asked(**{field: caller.url(path)})).json()["error"]
        assert (error["param"], error["code"]) == (field, "invalid_image")
        assert found in error["message"]
    gone = (await asked(video=caller.url("/gone.webm"))).json()["error"]
    assert gone["message"].startswith("the video's URL does not lead to it")


async def test_several_urls_are_each_fetched_once_and_read_in_order(caller):
    red, grey = caller.url("/red.png"), caller.url("/grey.png")
    ids = (await caller.ask(red, grey, red)).json()["image_ids"]
    assert ids[0] == ids[2] != ids[1]
    assert caller.host.connections == 2


async def test_a_chat_and_a_form_may_have_urls(caller):
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": caller.url("/red.png")}}]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    answered = await caller.http.post("/v1/chat/completions", json=chat)
    assert answered.status_code == 200, answered.text
    fields = {"image": (None, caller.url("/red.png")), "question": (None, "what colour?")}
    assert (await caller.http.post("/v1/vqa", files=fields)).status_code == 200
    content[1]["image_url"]["url"] = caller.url("/red.png", "inner.test")
    refused = (await caller.http.post("/v1/chat/completions", json=chat)).json()["error"]
    assert (refused["param"], refused["code"]) == ("messages.0.content.1.image_url", "image_url_refused")


async def test_an_error_names_the_image_and_tells_neither_address_nor_query(caller):
    caller.host.answers["/away"] = redirect(caller.url("/red.png?token=hidden", "inner.test"))
    with capture_logs() as lines:
        answer = await caller.ask(caller.url("/red.png?token=secret"), caller.url("/away?token=secret"))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == ("images.1", "image_url_refused")
    assert error["message"].startswith("image 2 of 2: the image's URL is not fetched: inner.test has no public address")
    assert "10.0.0.1" not in answer.text
    assert "10.0.0.1" in str(lines)
    for told in (answer.text, str(lines)):
        assert "secret" not in told
        assert "hidden" not in told
    assert caller.holds_nothing()


async def test_fetched_bytes_count_in_the_quota(caller):
    caller.house.admission.quota.limits = caller.house.admission.quota.limits._replace(nbytes=200)
    answer = await caller.ask(caller.url("/red.png"))
    assert answer.status_code == 429, answer.text
    assert answer.headers["retry-after"]
    assert caller.holds_nothing()


async def test_a_url_that_is_too_long_is_not_cut(caller):
    answer = await caller.ask(caller.url("/red.png?" + "x" * 4096))
    assert answer.status_code == 400
    assert "more than 4,096" in answer.json()["error"]["message"]
    assert caller.host.connections == 0


def test_settings_become_rules():
    fetcher = image_fetcher(
        Settings(
            image_url_hosts="Images.example.org, *.cdn.example.org",
            image_url_ports="443,8443",
            image_url_private_networks="10.1.0.0/16,fd12::/16",
            max_image_bytes=1000,
        ),
        Metrics(),
    )
    assert fetcher is not None
    assert fetcher.rules == FetchRules(
        hosts=("images.example.org", "*.cdn.example.org"),
        max_bytes=1000,
        ports=frozenset({443, 8443}),
        private_networks=(ip_network("10.1.0.0/16"), ip_network("fd12::/16")),
    )
    fetcher.close()
    assert image_fetcher(Settings(), Metrics()) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HOSTS", "https://images.example.org", "is not a host: write names"),
        ("HOSTS", "images.example.org:443", "is not a host"),
        ("HOSTS", "*example.org", "is not a host"),
        ("HOSTS", "10.0.0.1", "is not a host"),
        ("PORTS", "443;80", "is not a port: write numbers"),
        ("PORTS", "0", "is not a port"),
        ("PRIVATE_NETWORKS", "10.0.0.1/8", "is not a network: write networks"),
        ("PRIVATE_NETWORKS", "inner", "is not a network"),
    ],
)
def test_a_wrong_setting_is_named(name, value, message):
    with pytest.raises(SettingsError, match=f"GLIMPSE_IMAGE_URL_{name}: .*{message}"):
        read_settings({f"GLIMPSE_IMAGE_URL_{name}": value})
