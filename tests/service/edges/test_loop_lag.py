"""The event loop's lag is measured and exported."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx

from service.admission.scheduler import Scheduler
from service.app import build
from service.edges.http.application import http_api
from service.edges.loop_lag import REST_S, LoopLag
from service.settings import Settings
from tests.support.fakes import House, cancelled, until


async def test_what_blocks_the_loop_is_seen():
    lags: list[float] = []
    lag = LoopLag(lags.append, lambda: True)
    assert lag.seconds == 0
    watching = asyncio.create_task(lag.watch())
    await until(lambda: len(lags) >= 3)
    lags.clear()
    time.sleep(0.2)  # noqa: ASYNC251 - the fault that is looked for
    assert 0.1 < lag.seconds < 5  # known while it lasts
    await until(lambda: lags)
    assert 0.1 < max(lags) < 5
    await cancelled(watching)
    assert lag.seconds == 0


async def test_it_rests_while_the_loop_has_nothing_to_do_until_somebody_asks():
    lags: list[float] = []
    requests = 0
    lag = LoopLag(lags.append, lambda: bool(requests))
    watching = asyncio.create_task(lag.watch())
    await until(lambda: not lag._asked.is_set())
    told = len(lags)
    await asyncio.sleep(1.5 * REST_S)
    assert len(lags) <= told + 1  # a tenth of a second is between two figures otherwise
    time.sleep(0.2)  # noqa: ASYNC251 - there is no request that is held up
    assert lag.seconds < 0.1
    requests = 1
    time.sleep(0.2)  # noqa: ASYNC251
    assert lag.seconds >= 0.2  # since the first request asked
    await until(lambda: lag._last >= 0.2)
    await until(lambda: max(lags, default=0.0) >= 0.2)
    told = len(lags)
    await asyncio.sleep(REST_S)
    assert len(lags) >= told + 3  # though the loop has nothing to do
    await cancelled(watching)
    assert lag.seconds == 0


async def test_the_service_does_not_rest_while_it_has_a_request(repository: Path, tmp_path: Path):
    url = "127.0.0.1:9"  # nobody is asked
    settings = Settings(model_repository=repository, vision_url=url, llm_url=url, log_dir=tmp_path)
    app = build(settings, Scheduler)
    assert not app.lag._busy()
    with app.admission.reservation(""):
        assert app.lag._busy()
    assert not app.lag._busy()


async def test_the_lag_is_a_metric():
    house = House()
    watching = asyncio.create_task(LoopLag(house.metrics.event_loop_lag.observe, lambda: True).watch())
    await until(lambda: house.counted("glimpse_event_loop_lag_seconds_count") >= 3)
    await cancelled(watching)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(http_api(house.edge))) as client:
        text = (await client.get("http://localhost/metrics")).text
    assert "# TYPE glimpse_event_loop_lag_seconds histogram" in text
    house.reader.close()
