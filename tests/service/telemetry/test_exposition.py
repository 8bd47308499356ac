"""That the metrics' text is never old, and that asking for it takes a bounded share of the loop's time."""

import asyncio
import itertools

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import choose_encoder

from service.telemetry.exposition import MOST_SHARE, Exposition, is_open_metrics

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
RENDERING_S = 0.002


class Asked:
    """A registry with one counter, whose rendering takes RENDERING_S by its clock."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counter = Counter("asked", "How often.", registry=self.registry)
        self.clock = itertools.count(0.0, RENDERING_S)
        self.exposition = Exposition(self.registry, clock=self.clock.__next__)

    async def ask(self, accept: str = "") -> str:
        text, _ = await self.exposition.text(accept)
        return text.decode()


async def test_a_text_is_as_new_as_its_question():
    asked = Asked()
    for number in range(1, 4):
        asked.counter.inc()
        assert f"asked_total {number}.0" in await asked.ask()


async def test_a_crowd_gets_one_text_and_another_type_its_own():
    asked = Asked()
    texts = await asyncio.gather(*(asked.ask(accept) for accept in ["", OPEN_METRICS] * 20))
    assert len(set(texts)) == 2
    assert all(text.endswith("# EOF\n") for text in texts[1::2])
    assert next(asked.clock) == 2 * 2 * RENDERING_S  # it was asked before and after each of two renderings


async def test_there_are_two_texts_whatever_version_a_caller_names():
    """Each text is rendered in its turn: callers must not add turns."""
    asked = Asked()
    versions = [f"{OPEN_METRICS}.{number}" for number in range(30)] + [
        f"text/plain; version=1.0.{number}; escaping=allow-utf-8" for number in range(30)
    ]
    versions[29], versions[59] = f"{OPEN_METRICS.partition(';')[0]}; version=abc", "text/plain; version=1.x"
    texts = await asyncio.gather(*map(asked.ask, versions))
    assert len(set(texts)) == 2
    assert all(text.endswith("# EOF\n") for text in texts[:30])
    assert next(asked.clock) == 2 * 2 * RENDERING_S


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("*/*", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;q=0.3", True),
        ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1,text/plain", True),
        ("text/plain;version=1.0.0;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5", False),
        ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5", True),
        ("application/openmetrics-text; version=0.0.1", False),
    ],
)
def test_the_text_is_the_one_that_prometheus_client_would_choose(accept, is_open):
    assert is_open_metrics(accept) is is_open
    assert choose_encoder(accept)[1].startswith("application/openmetrics-text") is is_open


async def test_renderings_leave_the_loop_to_others():
    asked, loop = Asked(), asyncio.get_running_loop()
    began = loop.time()
    for _ in range(4):
        await asked.ask()
    assert loop.time() - began >= 3 * RENDERING_S / MOST_SHARE * 0.9


async def test_one_that_goes_away_leaves_the_text_to_the_others():
    asked = Asked()
    await asked.ask()
    first, second = asyncio.create_task(asked.ask()), asyncio.create_task(asked.ask())
    await asyncio.sleep(0)
    first.cancel()
    assert "asked_total" in await second
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_rendering_that_fails_says_so_and_the_next_is_made():
    class Failing:
        fails = True

        def collect(self) -> list[object]:
            if self.fails:
                raise ValueError("no metrics")
            return []

    asked, failing = Asked(), Failing()
    asked.registry.register(failing)
    with pytest.raises(ValueError, match="no metrics"):
        await asked.ask()
    failing.fails = False
    assert "asked_total" in await asked.ask()
