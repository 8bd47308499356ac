"""What / gives to browsers and to programs, and the files of the page."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from service.edges.http.application import http_api
from service.edges.web.front import FILES, LINKS, STATIC
from tests.support.fakes import House
from tests.support.paths import PROJECT

OF_A_BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
SCRIPTS = sorted(name for name in FILES if name.endswith(".js"))


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[httpx.AsyncClient]:
    house = House()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(http_api(house.edge)), base_url="http://localhost"
    ) as http:
        yield http
    house.reader.close()


@pytest.mark.parametrize("accept", [OF_A_BROWSER, "*/*", "text/html", "application/json, text/html"])
async def test_people_get_the_page(caller, accept):
    page = await caller.get("/", headers={"accept": accept})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == "accept"
    for path in LINKS.values():
        assert path in page.text or path == "v1/images"


@pytest.mark.parametrize("accept", ["application/json", "Application/JSON;q=0.9, */*;q=0.1"])
async def test_programs_get_addresses_that_lead_somewhere(caller, accept):
    answer = await caller.get("/", headers={"accept": accept})
    assert (answer.headers["content-type"], answer.headers["vary"]) == ("application/json", "accept")
    for path in answer.json()["links"].values():
        assert (await caller.get(str(answer.url.join(path)))).status_code in (200, 405, 503)  # 405: to be posted


@pytest.mark.parametrize("accept", [OF_A_BROWSER, "application/json"])
async def test_head_of_the_page_is_get_without_its_body(caller, accept):
    get, head = [await caller.request(method, "/", headers={"accept": accept}) for method in ("GET", "HEAD")]
    assert head.content == b""
    for name in ("content-type", "content-length", "etag", "content-security-policy"):
        assert head.headers.get(name) == get.headers.get(name)


@pytest.mark.parametrize("name", sorted(FILES))
async def test_a_file_is_sent_once_and_then_compared(caller, name):
    path = "/" if name == "index.html" else f"/page/{name}"
    first = await caller.get(path)
    assert first.status_code == 200
    assert first.content == (STATIC / name).read_bytes()
    assert first.headers["cache-control"] == "no-cache"
    assert first.headers["x-content-type-options"] == "nosniff"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = await caller.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert (await caller.get(path, headers={"if-none-match": '"other"'})).status_code == 200


@pytest.mark.parametrize("name", ["none.js", "README.md", "..%2ffront.py", "../front.py", "."])
async def test_nothing_else_is_sent(caller, name):
    answer = await caller.get(f"/page/{name}", follow_redirects=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_the_policy_allows_this_service_only(caller):
    policy = (await caller.get("/")).headers["content-security-policy"]
    allowed = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert allowed.pop("require-trusted-types-for") == "'script'"
    assert allowed.pop("media-src") == "blob:"  # a file that the visitor chose
    assert allowed.pop("img-src") == "'self' blob:"
    assert set(allowed.values()) == {"'none'", "'self'"}
    assert allowed["default-src"] == allowed["frame-ancestors"] == allowed["form-action"] == "'none'"


def test_the_page_has_no_script_or_style_of_its_own():
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page) == []
    assert not [name for name in SCRIPTS if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b", text(name))]


def test_no_file_names_another_host():
    for name in (*SCRIPTS, "page.css", "index.html"):
        assert set(re.findall(r"https?://[\w.:-]+", text(name))) <= {"http://localhost:8080"}  # an example


def test_every_file_is_used_and_explained():
    everything = "".join(text(name) for name in (*SCRIPTS, "index.html", "page.css"))
    read_me = (STATIC / "README.md").read_text()
    for name in FILES:
        assert name == "index.html" or name in everything
        assert name in read_me or name.startswith("new_")
    assert set(re.findall(r'from "\./([\w.]+)"', everything)) <= set(SCRIPTS)


def test_the_package_holds_the_files_of_the_page():
    assert '"service.edges.web" = ["static/*"]' in (PROJECT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".webp")])
def test_the_examples_are_scenes_that_training_never_saw(name):
    scene = PROJECT / "build_engines" / "evaluation" / "scenes" / name
    assert FILES[name].content == scene.read_bytes()


def text(name: str) -> str:
    return (STATIC / name).read_text()
