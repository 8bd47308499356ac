"""A real Chromium, and the page of a service that needs no Triton."""

from __future__ import annotations

import asyncio
import base64
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import playwright
import pytest_asyncio
import uvicorn
from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright

from service.edges.http.application import http_api
from service.edges.http.protocol import limited_protocol
from service.serving import Server
from tests.support.fakes import CLOSER, FakeProber, House

# Root has no sandbox. The pages are our own. A process in reserve for the next page is never used: each page has a
# context of its own.
ARGUMENTS = ["--no-sandbox", "--disable-features=SpareRendererForSitePerProcess"]
PATIENCE_MS = 60_000  # a busy machine takes seconds to start a page
# A file's bytes in the page from `text`, which is base64: Playwright sends a list as an object for each item.
BYTES = "Uint8Array.from(atob(text), (each) => each.charCodeAt(0))"
NODE = Path(playwright.__file__).parent / "driver" / "node"
COMMANDS = {  # that run what the page shows as code
    "curl": ["sh", "-c"],
    "Python": [sys.executable, "-c"],
    "JavaScript": [str(NODE), "--input-type=module", "--eval"],
}
BLOCKED = (
    "document.addEventListener('securitypolicyviolation', (e) => console.error(e.violatedDirective, e.blockedURI))"
)
BY_BROWSER = "Failed to load resource"  # one for each error status, which tests expect by their statuses


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield browser
        await browser.close()


class Visit:
    """One page of the service in a browser, and everything that it must not do."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.faults: list[str] = []
        self.requests: list[Request] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", self._note)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(BY_BROWSER):
            self.faults.append(message.text)

    def _note(self, request: Request) -> None:
        if not request.url.startswith("blob:"):  # a file that the visitor chose, in the browser's own memory
            self.requests.append(request)

    def posted(self, path: str) -> list[Request]:
        return [each for each in self.requests if each.method == "POST" and urlsplit(each.url).path == path]

    async def ask(self, question: str) -> None:
        await self.page.fill("#question", question)
        await self.page.click("#ask")

    async def answers(self) -> list[str]:
        """The newest question's answers, once they are complete."""
        entry = self.page.locator("#answers > li").first
        await self.page.wait_for_selector("#form[aria-busy=false]")
        return await entry.locator(".answer").all_inner_texts()

    async def choose(self, content: bytes, name: str = "photo.png") -> None:
        await self.page.set_input_files("#file", {"name": name, "mimeType": "", "buffer": content})

    async def picture(self) -> str:
        """What the first canvas shows, as a data URL."""
        return str(await self.page.locator("#stage canvas").first.evaluate("(canvas) => canvas.toDataURL()"))

    def check(self) -> None:
        assert self.faults == []
        assert {f"{urlsplit(each.url).scheme}://{urlsplit(each.url).netloc}" for each in self.requests} == {self.url}


def text_of(content: bytes) -> str:
    """BYTES reads it."""
    return base64.b64encode(content).decode()


Open = Callable[..., Awaitable[Visit]]


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(browser: Browser) -> AsyncIterator[Open]:
    """Opens the page of the service at a URL. At the end, what it logged and whom it asked is checked."""
    visits: list[Visit] = []
    async with AsyncExitStack() as open_contexts:

        async def open_page(url: str, **context: Any) -> Visit:
            fresh = await browser.new_context(**context)
            open_contexts.push_async_callback(fresh.close)
            await fresh.add_init_script(BLOCKED)
            page = await fresh.new_page()
            page.set_default_timeout(PATIENCE_MS)
            visits.append(Visit(page, url))
            await page.goto(url)
            await page.wait_for_selector("#model:not([hidden])")
            return visits[-1]

        yield open_page
        for visit in visits:
            visit.check()


class Kept:
    """A service without Triton in this event loop, and its address. `stop` ends it."""

    def __init__(self, house: House, listener: socket.socket) -> None:
        self.house = house
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            http_api(house.edge),
            http=limited_protocol(house.edge),
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=0,
        )
        self.server = Server(config)
        self.running = asyncio.create_task(self.server.serve(sockets=[listener]))

    async def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        await self.running


@asynccontextmanager
async def kept(**settings: object) -> AsyncIterator[Kept]:
    house = House(CLOSER, **settings)
    house.language.say("a red square")
    await house.readiness.probe(FakeProber(), house.pipeline.card, 1.0)
    kept = Kept(house, socket.create_server(("127.0.0.1", 0)))
    try:
        yield kept
    finally:
        await kept.stop()
        house.reader.close()


@pytest_asyncio.fixture(loop_scope="session")
async def service() -> AsyncIterator[Kept]:
    async with kept() as each:
        yield each


@pytest_asyncio.fixture(loop_scope="session")
async def visit(service: Kept, open_page: Open) -> Visit:
    """The page of the service without Triton, on a desk."""
    return await open_page(service.url, viewport={"width": 1280, "height": 900})
