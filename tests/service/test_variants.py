"""Variants behind one gateway: who answers, who takes over before anything was sent, and what the answer says."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import grpc
import httpx
import pytest
import pytest_asyncio

from service.core.answer import Delta, Finished
from service.core.attempt_time import attempt_time
from service.core.errors import FirstTokenLate, InternalError, InvalidRequest, NotFound, Overloaded, Unavailable
from service.core.variant import Route
from service.edges.grpc.server import GrpcServer
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.stubs import vqa_pb2_grpc
from service.edges.http.application import http_api
from service.text.prompt import PromptBuilder
from service.upstreams.models import Model
from service.upstreams.pool import Pool
from tests.service.test_clips import about, film
from tests.service.test_pipeline import request
from tests.service.upstreams.tritons import FakeTriton
from tests.support.calibrations import calibrated
from tests.support.fakes import CARD, CLOSER, TOKENIZER, FakeLanguage, FakeVision, House, png, until


class Sick:
    """A variant whose Tritons do or do not answer."""

    def __init__(self) -> None:
        self.answers = True


class Split(House):
    """A service with the variants stable and next, and others by their weights."""

    def __init__(self, weights: dict[str, float] | None = None, **knobs: object) -> None:
        super().__init__(**knobs)
        self.visions: dict[str, FakeVision] = {}
        self.languages: dict[str, FakeLanguage] = {}
        self.healths: dict[str, Sick] = {}
        self.pipeline.models.named = True
        self.pipeline.models.models = [
            self.variant(name, weight) for name, weight in (weights or {"stable": 95, "next": 5}).items()
        ]

    def variant(self, name: str, weight: float, **card_fields: object) -> Model:
        vision, language, health = FakeVision(), FakeLanguage(f" {name}"), Sick()
        self.visions[name], self.languages[name], self.healths[name] = vision, language, health
        card = replace(CARD, name=f"tiny-{name}", visual_fingerprint=f"v-{name}", **card_fields)
        prompts = PromptBuilder(card, TOKENIZER)
        return self.pipeline.model(vision, language, card, prompts, variant=name, weight=weight, health=health)

    def model(self, name: str) -> Model:
        return next(model for model in self.pipeline.models.models if model.variant == name)

    async def ask(self, route: Route | None = None, **fields: object) -> tuple[str, Finished]:
        texts: list[str] = []
        asked = replace(request(**fields), route=route or Route(session="s"))
        async with aclosing(self.answer(asked)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    texts.append(event.text)
                else:
                    end = event
        return "".join(texts), end


@pytest_asyncio.fixture
async def split() -> AsyncIterator[Split]:
    split = Split()
    yield split
    split.reader.close()


def session_of(split: Split, name: str) -> str:
    """A session that belongs to this variant."""
    for number in range(1000):
        asked = replace(request(), route=Route(session=str(number)))
        own, _ = split.pipeline.models.in_order(split.pipeline.models.choices(asked), "img")
        if own.variant == name:
            return str(number)
    raise AssertionError(name)


async def test_answers_of_a_thousand_sessions_follow_the_weights_within_three_points(split):
    image = (await split.keep_image(png())).id
    told = Counter()
    for number in range(1000):
        _, end = await split.ask(Route(session=str(number)), image=image)
        told[end.served.variant] += 1
    assert told["next"] / 10 == pytest.approx(5, abs=3)
    assert split.counted("glimpse_requests_total", outcome="ok", variant="next") == told["next"]


async def test_a_session_and_an_image_id_stay_with_their_variant_and_a_tenant_if_that_is_wished(split):
    split.pipeline.models.models = [split.variant("a", 1), split.variant("b", 1)]
    image = (await split.keep_image(png())).id
    by_image = {(await split.ask(Route(), image=image))[0] for _ in range(10)}
    assert len(by_image) == 1
    images = [(await split.keep_image(png((shade, 0, 0)))).id for shade in range(12)]
    assert len({(await split.ask(Route(), image=each))[0] for each in images}) == 2
    split.pipeline.models.sticky = "tenant"
    assert len({(await split.ask(Route(), image=each))[0] for each in images}) == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(Unavailable("gone"), "failed"), (InternalError("broken"), "failed"), (FirstTokenLate("late"), "late")],
)
@pytest.mark.parametrize("where", ["vision", "language"])
async def test_a_failure_before_the_first_text_moves_to_the_next_variant(split, failure, reason, where):
    session = session_of(split, "next")
    (split.visions if where == "vision" else split.languages)["next"].fault = failure
    text, end = await split.ask(Route(session=session))
    assert (text, end.served.variant, end.served.fallback_from) == ("stable", "stable", "next")
    assert end.served.model == "tiny-stable"
    # Both variants may have one Triton, which could not tell two requests of one id apart.
    assert split.languages["next"].request_ids == (["vqa_1"] if where == "language" else [])
    assert split.languages["stable"].request_ids == ["vqa_1-stable"]
    assert split.counted("glimpse_fallbacks_total", variant="next", reason=reason) == 1
    assert split.counted("glimpse_requests_total", outcome="ok", variant="stable") == 1
    assert split.counted("glimpse_resource_used", resource="llm") == 0
    assert split.counted("glimpse_requests_running", kind="one image") == 0


class Dawdling(FakeTriton):
    """Takes 100 s to see, by the attempt's clock, and as long until a first token."""

    async def _work(self, call: str) -> None:
        await super()._work(call)
        spent, now = attempt_time(), time.monotonic()
        spent.leave(now + 100.0)
        spent.enter(now)
        self.hangs = True


async def test_a_variant_whose_calls_together_take_the_budget_is_left_for_the_next(split):
    models = []
    for number, (name, triton) in enumerate({"stable": Dawdling(), "next": FakeTriton()}.items()):
        address = (f"127.0.0.1:{number + 1}",)
        pool = Pool(
            name,
            CARD,
            address,
            address,
            client=lambda _, triton=triton: triton,
            budget=split.pipeline.models.retries,
            metrics=split.metrics,
            first_token_s=100.0,
        )
        await pool.follow()
        async with asyncio.TaskGroup() as probes:
            pool.begin_probes(probes, 1.0)
        triton.language.say(f" {name}")
        prompts = PromptBuilder(CARD, TOKENIZER)
        models.append(split.pipeline.model(pool, pool, CARD, prompts, variant=name, weight=1.0, health=pool))
    split.pipeline.models.models = models
    answer, end = await split.ask(Route(session=session_of(split, "stable")))
    assert (answer, end.served.fallback_from) == ("next", "stable")
    assert split.counted("glimpse_fallbacks_total", variant="stable", reason="late") == 1


async def test_a_failure_after_text_was_sent_is_the_callers(split):
    language = split.languages["stable"]
    language.fault, language.wait_at = Unavailable("gone"), 2
    with pytest.raises(Unavailable):
        await split.ask(Route(session=session_of(split, "stable")))
    assert split.languages["next"].prompts == []


async def test_a_caller_that_names_its_variant_gets_no_other(split):
    split.visions["next"].fault = Unavailable("gone")
    for route in (Route(variant="next"), Route(model="next"), Route(model="tiny-next")):
        with pytest.raises(Unavailable):
            await split.ask(route)
    assert (await split.ask(Route(model="glimpse")))[0] == "stable"
    assert (await split.ask(Route(model="tiny-stable")))[0] == "stable"
    with pytest.raises(InvalidRequest, match="there is no variant 'nxt': the variants are stable, next"):
        await split.ask(Route(variant="nxt"))
    with pytest.raises(NotFound, match="'glimpse' or 'tiny-stable' or 'tiny-next' or 'stable' or 'next'"):
        await split.ask(Route(model="nxt"))


async def test_a_variant_whose_tritons_are_all_out_is_not_asked(split):
    split.healths["stable"].answers = False
    text, end = await split.ask(Route(session=session_of(split, "stable")))
    assert (text, end.served.fallback_from) == ("next", "stable")
    assert split.visions["stable"].calls == []
    assert split.counted("glimpse_fallbacks_total", variant="stable", reason="out") == 1
    split.healths["next"].answers = False
    assert (await split.ask(Route(session=session_of(split, "stable"))))[0] == "stable"  # one try is better than none


async def test_a_variant_that_goes_out_while_another_fails_is_passed():
    house = Split({"a": 3, "b": 2, "c": 1})
    own = session_of(house, "a")
    house.visions["a"].fault = Unavailable("gone")
    see = house.visions["a"].see

    async def see_and_b_goes_out(*given):
        house.healths["b"].answers = False
        return await see(*given)

    house.visions["a"].see = see_and_b_goes_out
    text, end = await house.ask(Route(session=own))
    assert (text, end.served.variant, end.served.fallback_from) == ("c", "c", "a")
    assert house.counted("glimpse_fallbacks_total", reason="failed", variant="a") == 1
    house.reader.close()


async def test_all_variants_that_a_request_may_try_are_in_use_until_it_is_over(split):
    split.languages["stable"].gate.clear()
    asking = asyncio.create_task(split.ask(Route(session=session_of(split, "stable"))))
    await until(lambda: split.languages["stable"].prompts)
    used = {name: (split.model(name).users, split.model(name).in_flight) for name in ("stable", "next")}
    assert used == {"stable": (1, 1), "next": (1, 0)}
    split.languages["stable"].gate.set()
    await asking
    assert [split.model(name).users for name in ("stable", "next")] == [0, 0]


@pytest.mark.parametrize("turned", [False, True])
async def test_a_request_is_charged_the_most_that_any_variant_can_use_which_may_answer_it(turned):
    split = Split(quota_images_per_minute=100, quota_visual_tokens_per_minute=1000)
    few = replace(CARD, name="few", max_positions=4000, frames=3)
    many = replace(CARD, name="many", max_positions=4000, visual_tokens=(32, 64), default_visual_tokens=(64, 64))
    split.pipeline.models.models = [
        split.pipeline.model(
            FakeVision(), FakeLanguage(), card, PromptBuilder(card, TOKENIZER), variant=card.name, weight=1.0
        )
        for card in ((many, few) if turned else (few, many))
    ]
    asked = about(film(), gave_budget=(False, False))
    assert len(split.pipeline.models.choices(asked)) == 2
    with split.pipeline.reservation("t") as reservation:
        async with aclosing(split.pipeline.answer(asked, reservation)) as events:
            await anext(events)
            told = dict(reservation.account.headers())
    assert told["x-ratelimit-remaining-images"] == str(100 - 8)
    assert told["x-ratelimit-remaining-visual-tokens"] == str(1000 - 8 * 64)
    split.reader.close()


async def test_a_fallback_keeps_the_images_that_the_request_looks_at(split):
    image = (await split.keep_image(png())).id
    store, seen = split.pipeline.images.store, []
    split.visions["stable"].fault = Unavailable("gone")
    see = split.visions["next"].see

    async def noted(*given):
        seen.append(store.held_bytes)
        return await see(*given)

    split.visions["next"].see = noted
    _, end = await split.ask(Route(session=session_of(split, "stable")), image=image)
    assert end.served.variant == "next"
    assert seen == [store.nbytes]
    assert store.held_bytes == 0


async def test_without_a_retry_in_the_budget_a_failure_is_the_callers(split):
    split.pipeline.models.retries.tokens = 0.0
    split.visions["stable"].fault = Unavailable("gone")
    with pytest.raises(Unavailable):
        await split.ask(Route(session=session_of(split, "stable")))


async def test_a_draining_variant_and_one_without_weight_get_no_questions_of_the_split(split):
    split.model("stable").is_draining = True
    assert (await split.ask())[0] == "next"
    with pytest.raises(InvalidRequest, match="the variants are next"):
        await split.ask(Route(variant="stable"))
    split.model("stable").is_draining = False
    split.model("next").weight = 0
    split.visions["stable"].fault = Unavailable("gone")
    with pytest.raises(Unavailable):
        await split.ask()
    assert (await split.ask(Route(variant="next")))[0] == "next"


async def test_the_next_variant_uses_its_own_defaults_and_one_that_cannot_answer_is_passed(split):
    closer = replace(CLOSER, name="tiny-closer", default_visual_tokens=(64, 64))
    other = split.pipeline.model(
        FakeVision(), FakeLanguage(" closer"), closer, PromptBuilder(closer, TOKENIZER), variant="closer", weight=1
    )
    split.pipeline.models.models = [split.variant("stable", 1000), other]
    split.visions["stable"].fault = Unavailable("gone")
    asked = replace(request(), route=Route(session=session_of(split, "stable")), gave_budget=(False, False))
    async with aclosing(split.answer(asked)) as events:
        *_, end = [event async for event in events]
    assert (end.served.variant, end.visual_tokens) == ("closer", 64)
    assert (await split.ask(Route(session="s"), detail="high"))[0] == "closer"


@pytest_asyncio.fixture
async def http(split: Split) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(http_api(split.edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def test_http_answers_say_their_variant_in_a_header_and_a_field(split, http):
    form = {"files": {"image": png()}, "data": {"question": "what?"}}
    answer = await http.post("/v1/vqa", **form, headers={"x-glimpse-variant": "next"})
    assert answer.headers["x-glimpse-variant"] == answer.json()["variant"] == "next"
    assert answer.json()["model"] == "tiny-next"
    assert "fallback_from" not in answer.json()
    split.visions["stable"].fault = Unavailable("gone")
    headers = {"x-session-id": session_of(split, "stable")}
    answer = await http.post("/v1/vqa", **form, headers=headers)
    assert (answer.headers["x-glimpse-variant"], answer.json()["fallback_from"]) == ("next", "stable")
    form["data"]["stream"] = "true"
    events = await http.post("/v1/vqa", **form, headers=headers)
    assert events.headers["x-glimpse-variant"] == "next"
    assert '"variant":"next","fallback_from":"stable"' in events.text
    refused = await http.post("/v1/vqa", **form, headers={"x-glimpse-variant": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_variant")
    refused = await http.post("/v1/vqa", **form, headers={"x-session-id": "a b"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_session")


async def test_the_headers_are_described_if_there_are_variants(http):
    asked = (await http.get("/openapi.json")).json()["paths"]["/v1/vqa"]["post"]["parameters"]
    assert [each["name"] for each in asked] == ["x-tenant-id", "x-glimpse-variant", "x-session-id"]


async def test_each_line_of_a_batch_says_its_variant(split, http):
    image = (await http.post("/v1/images", content=png())).json()["id"]
    lines = await http.post(
        "/v1/vqa/batch", json=[{"image": image, "question": "what?"}] * 2, headers={"x-glimpse-variant": "next"}
    )
    assert lines.text.count('"variant":"next"') == 2


async def test_openais_clients_choose_by_model_and_see_all_of_them(split, http):
    assert [each["id"] for each in (await http.get("/v1/models")).json()["data"]] == ["glimpse", "stable", "next"]
    assert (await http.get("/v1/models/next")).json()["card"] == "tiny-next"
    image = (await http.post("/v1/images", content=png())).json()["id"]
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": image}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    answer = await http.post("/v1/chat/completions", json=body | {"model": "next"})
    assert (answer.json()["model"], answer.json()["variant"]) == ("tiny-next", "next")
    chunks = await http.post("/v1/chat/completions", json=body | {"model": "next", "stream": True})
    assert chunks.text.count('"model":"tiny-next"') == chunks.text.count("chat.completion.chunk") > 2
    assert (await http.post("/v1/chat/completions", json=body | {"model": "other"})).status_code == 404


async def test_a_least_confidence_is_asked_of_a_variant_that_is_calibrated(split, http):
    split.pipeline.models.models[1] = split.variant("next", 5, confidence=calibrated(CARD.vision_width))
    form = {"files": {"image": png()}, "data": {"question": "what?", "min_confidence": "0"}}
    for session in (session_of(split, "stable"), session_of(split, "next")):
        answer = await http.post("/v1/vqa", **form, headers={"x-session-id": session})
        assert (answer.status_code, answer.json()["variant"], answer.json()["abstained"]) == (200, "next", False)


async def test_a_system_message_and_likeliest_tokens_are_asked_of_a_variant_that_has_them(split, http):
    plain = {"system_template": "", "top_log_probs": 0}
    split.pipeline.models.models = [split.variant("stable", 5, **plain), split.variant("next", 5)]
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}}
    user = {"role": "user", "content": [image, {"type": "text", "text": "what?"}]}
    brief = {"model": "glimpse", "messages": [{"role": "system", "content": "be brief"}, user]}
    likeliest = {"model": "glimpse", "messages": [user], "logprobs": True, "top_logprobs": 2}
    for body in (brief, likeliest):
        for session in (session_of(split, "stable"), session_of(split, "next")):
            answer = await http.post("/v1/chat/completions", json=body, headers={"x-session-id": session})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "tiny-next"
    split.pipeline.models.models = [split.variant("stable", 5, **plain)]
    answer = await http.post("/v1/chat/completions", json=brief)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.0.content")
    assert "has no place for a system message" in answer.json()["error"]["message"]
    error = (await http.post("/v1/chat/completions", json=likeliest)).json()["error"]
    assert (error["param"], error["code"]) == ("top_logprobs", "top_logprobs_not_supported")


async def test_a_service_without_variants_does_not_speak_of_one():
    house = House()
    transport = httpx.ASGITransport(http_api(house.edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.post("/v1/vqa", files={"image": png()}, data={"question": "what?"})
        assert "variant" not in answer.text
        assert "x-glimpse-variant" not in answer.headers
        refused = await http.post(
            "/v1/vqa", files={"image": png()}, data={"question": "what?"}, headers={"x-glimpse-variant": "next"}
        )
        assert "the variants are default" in refused.text
    house.reader.close()


async def test_without_variants_a_follow_up_makes_the_calls_that_it_always_made():
    house = House()
    image = (await house.keep_image(png())).id
    for _ in range(3):
        async with aclosing(house.answer(request(image=image))) as events:
            assert [event async for event in events][-1].served.fallback_from == ""
    assert house.vision.calls == ["see", "attend", "attend"]
    assert len(house.language.prompts) == 3
    assert house.counted("glimpse_fallbacks_total", variant="default", reason="failed") == 0
    house.reader.close()


async def test_a_refusal_for_lack_of_room_is_not_tried_at_another_variant():
    split = Split(max_requests_in_flight=1)
    with split.admission.reservation("") as reservation:
        reservation.reserve(split.admission.quota.limits)
        with pytest.raises(Overloaded):
            await split.ask()
    assert split.visions["stable"].calls == split.visions["next"].calls == []
    split.reader.close()


async def test_grpc_names_a_variant_in_metadata_and_the_answer(split):
    server = GrpcServer(split.rpc)
    port = server.listen("127.0.0.1", 0)
    await server.server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = vqa_pb2_grpc.VisualQuestionAnsweringStub(channel)
            parts = [pb.Part(text="what?"), pb.Part(image=png())]
            call = stub.Answer(pb.AnswerRequest(parts=parts), metadata=(("x-glimpse-variant", "next"),))
            assert (await call).variant == "next"
            assert dict(await call.trailing_metadata())["x-glimpse-variant"] == "next"
            call = stub.Answer(pb.AnswerRequest(parts=parts), metadata=(("x-glimpse-variant", "x"),))
            with pytest.raises(grpc.aio.AioRpcError, match="the variants are stable, next"):
                await call
    finally:
        await server.server.stop(None)
