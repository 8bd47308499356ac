"""Variants that are added, changed, drained and removed while the service runs, in a file and in Redis."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.app import fleet_of
from service.core.card import ModelCard
from service.core.errors import Unavailable
from service.settings import Settings, SettingsError
from service.telemetry.metrics import Metrics
from service.upstreams import fleet as fleet_module
from service.upstreams.fleet import Fleet, computed_in
from service.upstreams.store import VariantsFile, VariantsInRedis
from service.upstreams.variants import Variant, Variants, VariantsError
from tests.service.upstreams.tritons import FakeTriton
from tests.support.fakes import House, until
from tests.support.samples import sample

PORTS = {"stable": "127.0.0.1:11", "next": "127.0.0.1:12", "third": "127.0.0.1:13"}


def variant(name: str, repository: Path, weight: float = 1.0) -> Variant:
    return Variant(name, str(repository), (PORTS[name],), (PORTS[name],), weight)


def two(repository: Path) -> Variants:
    return Variants({name: variant(name, repository) for name in ("stable", "next")})


@pytest.fixture(autouse=True)
def _frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "LOOK_INTERVAL_S", 0.05)


class FakeFleet(Fleet):
    """Connects to no Triton."""

    def __init__(
        self, store: VariantsFile | VariantsInRedis, variants: Variants, metrics: Metrics, **settings: object
    ) -> None:
        self.tritons: dict[str, FakeTriton] = {}
        self.looks = 0
        told = Settings(variants="-", probe_interval_s=0.5, probe_timeout_s=1.0, **settings)
        super().__init__(store, variants, told, metrics)

    def _end_idle(self) -> None:
        super()._end_idle()
        self.looks += 1  # it has looked, and has done what followed

    async def looked_twice(self) -> None:
        """Wait for two whole looks from now on."""
        last = self.looks + 3  # one may have begun
        await until(lambda: self.looks >= last)

    def client(self, card: object, address: str) -> FakeTriton:
        return self.tritons.setdefault(address, FakeTriton(address))

    def metric(self, name: str) -> float | None:
        return sample(self._metrics, f"glimpse_{name}")

    @property
    def names(self) -> list[str]:
        return [model.variant for model in self.models.models if not model.is_draining]


@asynccontextmanager
async def running(store: VariantsFile | VariantsInRedis) -> AsyncIterator[FakeFleet]:
    house = House()
    fleet = FakeFleet(store, await store.loaded(), house.metrics)
    fleet.begin(
        lambda told, repository, pool: house.pipeline.model(
            pool, pool, repository.card, repository.prompts, variant=told.name, weight=told.weight, health=pool
        ),
        house.admission.llm_tokens,
    )
    work = asyncio.create_task(fleet.run())
    try:
        await until(lambda: fleet.ready and all(each.pool.answers for each in fleet.running.values()))
        yield fleet
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        house.reader.close()


async def test_changes_of_the_file_are_followed_and_a_variant_that_is_gone_ends_after_its_last_question(
    tmp_path: Path, repository: Path
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    async with running(VariantsFile(store.path)) as fleet:
        stable = fleet.models.models[0]
        await store.change(lambda before: before.added(variant("third", repository)).weighted({"stable": 7}))
        await until(lambda: "third" in fleet.names)
        assert fleet.models.models[0] is stable  # its connections and calls go on
        assert stable.weight == 7
        await store.change(lambda before: before.drained("stable"))
        await until(lambda: fleet.names == ["next", "third"])
        stable.in_flight += 1
        await store.change(lambda before: before.without("stable"))
        await until(lambda: len(fleet.models.models) == 2)
        assert fleet.tritons[PORTS["stable"]].is_open
        stable.in_flight -= 1
        await until(lambda: not fleet.tritons[PORTS["stable"]].is_open)
        store.path.write_text("{")
        await until(lambda: fleet.metric("variants_readable") == 0)
        assert fleet.names == ["next", "third"]


async def test_the_series_of_a_variant_end_a_while_after_it_unless_it_comes_back(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))

    def shown() -> set[str | None]:
        return {each.labels.get("variant") for metric in fleet._metrics.registry.collect() for each in metric.samples}

    def answered() -> float | None:
        return sample(fleet._metrics, "glimpse_requests_total", {"outcome": "ok", "variant": "next"})

    async with running(store) as fleet:
        fleet._metrics.requests.labels("ok", "next").inc()
        await store.change(lambda before: before.without("next"))
        await until(lambda: not fleet.tritons[PORTS["next"]].is_open)
        await fleet.looked_twice()
        assert answered() == 1  # Prometheus has not read it yet
        assert sample(fleet._metrics, "glimpse_variant_weight", {"variant": "next"}) is None
        await store.change(lambda before: before.added(variant("next", repository)))
        await until(lambda: fleet.names == ["stable", "next"])
        monkeypatch.setattr(fleet_module, "SERIES_S", 0.0)
        await fleet.looked_twice()
        assert answered() == 1
        await store.change(lambda before: before.without("next"))
        await until(lambda: "next" not in shown())
        assert "stable" in shown()


async def test_a_gauge_tells_of_the_models_that_a_variant_in_use_calls_and_of_no_others(
    tmp_path: Path, repository: Path
) -> None:
    plain, both = tmp_path / "plain", ("attend_448", "see")

    def gauges() -> list[float | None]:
        return [sample(fleet._metrics, "glimpse_model_ready", {"model": name}) for name in both]

    def served() -> list[float | None]:
        labels = ({"model": name, "precision": card["precision"]} for name in ("plain", card["name"]))
        return [sample(fleet._metrics, "glimpse_model_info", each) for each in labels]

    shutil.copytree(repository, plain)
    card = {"precision": "fp32"} | json.loads((plain / "card.json").read_text())
    (plain / "card.json").write_text(json.dumps(card | {"name": "plain", "closer_view": False}))
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: Variants({"stable": variant("stable", plain)}))
    async with running(store) as fleet:
        assert (gauges(), served()) == ([None, 1], [1, None])
        await store.change(lambda before: before.added(variant("next", repository)))
        await until(lambda: fleet.names == ["stable", "next"])
        assert (gauges(), served()) == ([1, 1], [1, 1])
        await store.change(lambda before: before.without("next"))
        await until(lambda: fleet.names == ["stable"])
        assert (gauges(), served()) == ([None, 1], [1, None])


async def test_a_fault_of_our_own_ends_no_fleet(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    async with running(store) as fleet:
        changed, faults = store.changed, [RuntimeError("can't start new thread")] * 3

        async def broken() -> Variants | None:
            if faults:
                raise faults.pop()
            return await changed()

        monkeypatch.setattr(store, "changed", broken)
        await store.change(lambda before: before.without("next"))
        with capture_logs() as lines:
            await until(lambda: fleet.names == ["stable"])
        assert [line["event"] for line in lines if line["log_level"] == "error"] == ["watch_failed"]  # once


def moved(repository: Path) -> Variants:
    """The variant stable, with another Triton."""
    there = (PORTS["third"],)
    return Variants({"stable": replace(variant("stable", repository), vision=there, llm=there)})


async def test_a_variant_whose_tritons_change_answers_all_the_time(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new Triton loads its models still, for longer than a new variant waits."""
    monkeypatch.setattr(fleet_module, "JOIN_S", 0.05)
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: Variants({"stable": variant("stable", repository)}))
    async with running(store) as fleet:
        old, new = fleet.running["stable"], fleet.client(None, PORTS["third"])
        new.probe_fault = Unavailable("it loads its models")
        with capture_logs() as lines:
            await store.change(lambda _: moved(repository))
            await until(lambda: [line for line in lines if line["event"] == "variant_does_not_answer"])
        await fleet.looked_twice()
        assert fleet.running["stable"] is old
        assert fleet.ready
        new.probe_fault = None
        await until(lambda: fleet.running["stable"] is not old)
        assert fleet.running["stable"].pool.answers
        await until(lambda: not fleet.tritons[PORTS["stable"]].is_open)
        assert fleet.ready


async def test_a_change_that_is_taken_back_leaves_what_was_there(tmp_path: Path, repository: Path) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    first = Variants({"stable": variant("stable", repository)})
    await store.change(lambda _: first)
    async with running(store) as fleet:
        old, new = fleet.running["stable"], fleet.client(None, PORTS["third"])
        new.probe_fault = Unavailable("it loads its models")
        await store.change(lambda _: moved(repository))
        await until(lambda: new.is_open)
        await store.change(lambda _: first)
        await until(lambda: not new.is_open)
        assert fleet.running["stable"] is old
        assert fleet.ready


@pytest.mark.parametrize("how", ["drained", "removed", "without weight"])
async def test_the_last_variant_that_answers_goes_on_until_its_successor_joins(
    tmp_path: Path, repository: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor loads its models for longer than a new variant waits."""
    monkeypatch.setattr(fleet_module, "JOIN_S", 0.05)
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: Variants({"stable": variant("stable", repository)}))
    async with running(store) as fleet:
        old, new = fleet.running["stable"], fleet.client(None, PORTS["next"])
        new.probe_fault = Unavailable("it loads its models")

        def changed(before: Variants) -> Variants:
            after = before.added(variant("next", repository))
            if how == "without weight":
                return after.weighted({"stable": 0, "next": 1})
            return after.drained("stable") if how == "drained" else after.without("stable")

        with capture_logs() as lines:
            await store.change(changed)
            await until(lambda: {"variant_does_not_answer", "variants_wait"} <= {line["event"] for line in lines})
            await fleet.looked_twice()
        assert [line["event"] for line in lines].count("variants_wait") == 1
        assert fleet.ready
        assert [(each.weight, each.is_draining) for each in fleet.models.models if each.variant == "stable"] == [
            (1, False)
        ]
        new.probe_fault = None
        if how == "without weight":
            await until(lambda: [each.weight for each in fleet.models.models] == [0, 1])
            return
        await until(lambda: fleet.names == ["next"])
        assert fleet.ready
        if how == "removed":
            await until(lambda: not fleet.tritons[PORTS["stable"]].is_open)
        else:
            assert fleet.running["stable"] is old


async def test_a_new_variant_that_does_not_answer_gets_no_questions(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that answers has no weight, so it gets all questions."""
    monkeypatch.setattr(fleet_module, "JOIN_S", 0.05)
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: Variants({"stable": variant("stable", repository, 0)}))
    async with running(store) as fleet:
        fleet.client(None, PORTS["next"]).probe_fault = Unavailable("it loads its models")
        await store.change(lambda before: before.added(variant("next", repository, 100)))
        await until(lambda: fleet.names == ["stable", "next"])
        assert [model.weight for model in fleet.models.models] == [0, 0]
        fleet.tritons[PORTS["next"]].probe_fault = None
        await until(lambda: [model.weight for model in fleet.models.models] == [0, 100])


async def test_a_moment_without_an_answer_does_not_end_the_wait_for_a_successor(
    tmp_path: Path, repository: Path
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    async with running(store) as fleet:
        stable, following = (fleet.tritons[PORTS[name]] for name in ("stable", "next"))
        following.probe_fault = Unavailable("it is down")
        await until(lambda: not fleet.running["next"].pool.answers)
        with capture_logs() as lines:
            await store.change(lambda before: before.without("stable"))
            await until(lambda: [line for line in lines if line["event"] == "variants_wait"])
        stable.probe_fault = Unavailable("one probe fails")
        await until(lambda: not fleet.running["stable"].pool.answers)
        await fleet.looked_twice()
        stable.probe_fault = None
        await until(lambda: fleet.ready)
        assert "stable" in fleet.names


async def test_a_variant_that_gets_no_questions_is_removed_though_the_others_are_down(
    tmp_path: Path, repository: Path
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    named = {name: variant(name, repository, weight) for name, weight in (("stable", 100), ("next", 0))}
    await store.change(lambda _: Variants(named))
    async with running(store) as fleet:
        await until(lambda: not fleet.degraded)
        fleet.tritons[PORTS["stable"]].probe_fault = Unavailable("it is down")
        await until(lambda: not fleet.running["stable"].pool.answers)
        await store.change(lambda before: before.without("next"))
        await until(lambda: fleet.names == ["stable"])


async def test_a_variant_that_is_gone_ends_though_its_triton_hangs(tmp_path: Path, repository: Path) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    async with running(store) as fleet:
        triton = fleet.tritons[PORTS["stable"]]
        triton.hangs = True
        await until(lambda: triton.busy)
        await store.change(lambda before: before.without("stable"))
        await until(lambda: not triton.is_open)
        assert fleet.ready


async def test_a_changed_variant_does_not_wait_for_its_tritons_for_ever(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "JOIN_S", 0.05)
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    async with running(store) as fleet:
        third = fleet.client(None, PORTS["third"])

        async def probe(*_: object) -> None:
            await asyncio.Event().wait()

        third.probe = probe  # type: ignore[method-assign]
        with capture_logs() as lines:
            await store.change(lambda before: before.added(variant("third", repository)))
            await until(lambda: "third" in fleet.names)
        assert [line["variant"] for line in lines if line["event"] == "variant_does_not_answer"] == ["third"]
        assert fleet.ready
        assert not fleet.running["third"].pool.answers


@pytest.mark.parametrize("what", ["a request that may still try it", "work that went on without its request"])
async def test_a_variant_that_is_gone_stays_connected_while_it_is_used(
    tmp_path: Path, repository: Path, what: str
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    async with running(store) as fleet:
        stable, triton = fleet.running["stable"].model, fleet.tritons[PORTS["stable"]]
        assert stable is not None
        if what.startswith("a request"):
            stable.users += 1
        else:
            triton.busy += 1
        await store.change(lambda before: before.without("stable"))
        await until(lambda: fleet.names == ["next"])
        await fleet.looked_twice()
        assert triton.is_open
        stable.users = triton.busy = 0
        await until(lambda: not triton.is_open)


async def test_the_service_is_ready_while_one_variant_answers_and_names_the_tritons_that_are_out(
    tmp_path: Path, repository: Path
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    async with running(store) as fleet:
        await until(lambda: not fleet.degraded)
        running_of = fleet._running
        for member in running_of["next"].pool.vision.members.values():
            member.faults["see"] = "it does not answer"
        assert fleet.faults == {}
        assert fleet.degraded == {f"next/{PORTS['next']}": "it does not answer"}
        for member in running_of["stable"].pool.llm.members.values():
            member.faults["llm"] = "it does not answer"
        assert fleet.faults.keys() == {f"stable/{PORTS['stable']}", f"next/{PORTS['next']}"}
        fleet.stop()
        assert fleet.faults == {"gateway": "this server is stopping"}


async def test_gateways_that_share_a_redis_follow_the_same_variants(redis_server, repository: Path) -> None:
    store = VariantsInRedis(redis_server.url)
    assert await store.loaded() == Variants()
    await store.change(lambda _: two(repository))
    async with running(VariantsInRedis(redis_server.url)) as one, running(VariantsInRedis(redis_server.url)) as other:
        await asyncio.gather(
            *(VariantsInRedis(redis_server.url).change(lambda v, n=n: v.weighted({n: 9})) for n in ("stable", "next"))
        )
        for fleet in (one, other):
            await until(lambda fleet=fleet: [model.weight for model in fleet.models.models] == [9, 9])
        redis_server.kill()
        await until(lambda: one.metric("variants_readable") == 0)
        assert one.names == ["stable", "next"]


def test_a_gateway_needs_a_variant_that_may_answer_and_models_that_can_be_read(
    tmp_path: Path, repository: Path
) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    with pytest.raises(SettingsError, match="has no variant that may answer"):
        FakeFleet(store, two(repository).drained("stable").drained("next"), Metrics())
    with pytest.raises(SettingsError, match="is not a model repository that can be read"):
        FakeFleet(store, two(tmp_path / "none"), Metrics())


def test_every_variant_must_fit_the_llm_tokens_that_are_set(tmp_path: Path, repository: Path) -> None:
    larger = longer_copy(repository, tmp_path / "larger", 4096)
    told = two(repository).added(replace(variant("next", larger), weight=0.0))
    store = VariantsFile(tmp_path / "variants.json")
    with pytest.raises(
        SettingsError, match=r"has 400 LLM tokens for all requests, and one request of .* can need 4096"
    ):
        FakeFleet(store, told, Metrics(), llm_tokens=400)
    assert FakeFleet(store, told, Metrics(), llm_tokens=4096).names == []


async def test_a_variant_that_joins_later_must_fit_too(tmp_path: Path, repository: Path) -> None:
    store = VariantsFile(tmp_path / "variants.json")
    await store.change(lambda _: two(repository))
    larger = longer_copy(repository, tmp_path / "larger", 1_000_000)
    async with running(VariantsFile(store.path)) as fleet:
        with capture_logs() as logs:
            await store.change(lambda before: before.added(variant("third", larger)))
            await until(lambda: fleet.metric("variants_readable") == 0)
        assert "GLIMPSE_LLM_TOKENS=1000000 or more" in logs[0]["reason"]
        assert fleet.names == ["stable", "next"]


def longer_copy(repository: Path, folder: Path, positions: int) -> Path:
    """The same models, with a card of so many positions."""
    shutil.copytree(repository, folder)
    card = ModelCard.from_json((folder / "card.json").read_text())
    (folder / "card.json").write_text(replace(card, max_positions=positions).to_json())
    return folder


def test_a_variant_computes_in_the_precision_that_it_says(tmp_path: Path, repository: Path) -> None:
    told = Variants({"stable": replace(variant("stable", repository), precision="int8")})
    told = Variants.from_json(told.added(variant("next", repository)).to_json())
    fleet = FakeFleet(VariantsFile(tmp_path / "variants.json"), told, Metrics())
    int8, built = (fleet._running[name].repository.card for name in ("stable", "next"))
    assert (int8.precision, built.precision) == ("int8", "fp32")
    assert int8.fingerprint != built.fingerprint  # caches do not mix them
    with pytest.raises(VariantsError, match="precision of x must be one of fp32, bf16, int8, int4"):
        Variant.parse("x", {"models": "m", "tritons": ["a:1"], "precision": "fp64"})
    for_gpu = replace(built, precision="fp16")
    assert computed_in(for_gpu, None, "it") is for_gpu
    assert computed_in(for_gpu, "fp16", "it") is for_gpu
    with pytest.raises(
        SettingsError, match=r"it is int8: the models were built in fp16 for a GPU: leave the precision out"
    ):
        computed_in(for_gpu, "int8", "it")


def test_tritons_of_the_settings_are_one_variant_whose_name_is_not_shown(repository: Path) -> None:
    settings = Settings(
        vision_url="127.0.0.1:11", llm_url="127.0.0.1:12", model_repository=repository, precision="bf16"
    )
    fleet = fleet_of(settings, Metrics())
    assert fleet is not None
    assert not fleet.models.named
    assert fleet.primary.repository.card.precision == "bf16"
    assert fleet.faults == {"gateway": "no Triton was found yet"}
    asyncio.run(fleet.primary.pool.follow())
    assert set(fleet.faults) == {"127.0.0.1:11", "127.0.0.1:12"}  # and no variant's name
    with pytest.raises(SettingsError, match="set GLIMPSE_MODEL_REPOSITORY to a folder"):
        fleet_of(settings.model_copy(update={"model_repository": repository / "none"}), Metrics())
    with pytest.raises(SettingsError, match="GLIMPSE_PRECISION is int8, but each variant has its own"):
        fleet_of(Settings(variants="variants.json", precision="int8"), Metrics())


@pytest.mark.slow
def test_the_commands_write_what_gateways_read(tmp_path: Path) -> None:
    def variants(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "glimpse"), "variants", *arguments, "--variants", "v.json"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert variants("list").stdout == "no variants\n"
    variants("add", "stable", "--models", "/m/7", "--triton", "a:1", "--triton", "b:1", "--weight", "95")
    told = variants("add", "next", "--models", "/m/8", "--vision", "v:1", "--llm", "l:1", "--weight", "5").stdout
    assert told.splitlines() == [
        "stable  weight 95 (95.0 %)  Tritons a:1 b:1  models /m/7",
        "next  weight 5 (5.0 %)  vision v:1  LLM l:1  models /m/8",
    ]
    assert "next  weight 50" in variants("weights", "next=50").stdout
    assert "stable  drains" in variants("drain", "stable").stdout
    assert "stable  weight 95" in variants("drain", "stable", "--undo").stdout
    assert variants("remove", "next").stdout.count("\n") == 1
    refused = variants("weights", "nxt=1")
    assert (refused.returncode, refused.stderr) == (1, "glimpse: there is no variant 'nxt': the variants are stable\n")
    refused = variants("weights", "stable=-1")
    assert (refused.returncode, "write NAME=WEIGHT" in refused.stderr) == (1, True)
    found = asyncio.run(VariantsFile(tmp_path / "v.json").loaded())
    assert list(found.variants) == ["stable"]
    (tmp_path / "v.json").write_text("[")
    with pytest.raises(VariantsError, match=r"v.json: not JSON"):
        asyncio.run(VariantsFile(tmp_path / "v.json").loaded())
