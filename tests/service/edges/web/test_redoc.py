"""/redoc in a real Chromium: it shows the API, and asks no other host for anything."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser

from tests.service.edges.web.conftest import Kept

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


async def test_redoc_shows_the_api_without_internet(service: Kept, browser: Browser) -> None:
    page = await browser.new_page()
    asked: list[str] = []
    page.on("requestfinished", lambda request: asked.append(request.url))
    await page.goto(f"{service.url}/redoc")
    await page.get_by_text("/v1/vqa/batch").first.wait_for(timeout=60_000)
    assert "Glimpse" in await page.locator("h1").first.inner_text()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith("data:")}
    assert hosts == {urlsplit(service.url).netloc}
    await page.close()
