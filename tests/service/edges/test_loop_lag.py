"""The event loop's lag is measured and exported."""

from __future__ import annotations

import asyncio
import time

import httpx

from service.edges.http.application import http_api
from service.edges.loop_lag import REST_S, LoopLag
from tests.support.fakes import House, cancelled, until


async def test_what_blocks_the_loop_is_seen():
    lags: list[float] = []
    lag = LoopLag(lags.append)
    assert lag.seconds == 0
    watching = asyncio.create_task(lag.watch())
    await until(lambda: len(lags) >= 3)
    lags.clear()
    assert lag.seconds < 0.1  # as a request does that comes first
    time.sleep(0.2)  # noqa: ASYNC251 - the fault that is looked for
    assert 0.1 < lag.seconds < 5  # known while it lasts
    await until(lambda: lags)
    assert 0.1 < max(lags) < 5
    await cancelled(watching)
    assert lag.seconds == 0


async def test_it_rests_while_the_loop_has_nothing_to_do_until_somebody_asks():
    lags: list[float] = []
    lag = LoopLag(lags.append)
    watching = asyncio.create_task(lag.watch())
    await until(lambda: not lag._asked.is_set())
    told = len(lags)
    await asyncio.sleep(0.5 * REST_S)
    assert len(lags) <= told + 1  # a tenth of a second was between two figures
    time.sleep(0.2)  # noqa: ASYNC251 - nobody was there to be held up
    assert lag.seconds < 0.1
    time.sleep(0.2)  # noqa: ASYNC251
    assert lag.seconds >= 0.2  # from the first who asked
    await until(lambda: lag._last >= 0.2)
    await cancelled(watching)
    assert lag.seconds == 0


async def test_the_lag_is_a_metric():
    house = House()
    watching = asyncio.create_task(LoopLag(house.metrics.event_loop_lag.observe).watch())
    await until(lambda: house.counted("glimpse_event_loop_lag_seconds_count") >= 3)
    await cancelled(watching)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(http_api(house.edge))) as client:
        text = (await client.get("http://localhost/metrics")).text
    assert "# TYPE glimpse_event_loop_lag_seconds histogram" in text
    house.reader.close()
