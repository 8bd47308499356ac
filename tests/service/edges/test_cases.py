"""The table of cases over every transport, against one gateway: the same answer, the same kind of error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from service.core.card import ModelCard
from service.core.errors import STATUS
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.stubs.vqa_pb2_grpc import VisualQuestionAnsweringStub
from tests.service.edges.cases import CASES, Case, Outcome, in_base64, status_of
from tests.service.edges.openai.test_messages import assistant, image, text, user, video
from tests.support.calls import UNLIMITED, Failed, part_of, streamed
from tests.support.paths import PROJECT
from tests.support.servers import Gateway


class Vqa:
    """POST /v1/vqa."""

    def __init__(self, gateway: Gateway, card: ModelCard, *, stream: bool) -> None:
        self.http = httpx.AsyncClient(base_url=gateway.url, timeout=60, trust_env=False)
        self.stream = stream

    def body(self, case: Case) -> dict[str, Any]:
        body: dict[str, Any] = {"question": case.question} | dict(case.fields)
        if "page" in case.fields and len(case.images) == 1:
            body["image"] = in_base64(case.images[0])
        elif case.images:
            body["images"] = [in_base64(each) for each in case.images]
        if case.video is not None:
            body["video"] = in_base64(case.video)
        if case.frames is not None:
            body["frames"] = [in_base64(each) for each in case.frames]
        if case.turns:
            body["turns"] = [{"question": question, "answer": answer} for question, answer in case.turns]
        return body

    async def ask(self, case: Case) -> Outcome:
        response = await self.http.post("/v1/vqa", json=self.body(case) | {"stream": self.stream})
        said = response.json() if not response.headers["content-type"].startswith("text/event") else {}
        if "error" in said:
            return Outcome(status=response.status_code, code=said["error"]["code"])
        answer = said.get("answer", "")
        if self.stream:
            *deltas, said = [json.loads(each[6:]) for each in response.text.split("\n\n")[:-2]]
            answer = "".join(each["delta"] for each in deltas)
            if any("logprobs" in each for each in deltas):
                said["logprobs"] = [one for each in deltas for one in each["logprobs"]]
        return self.outcome(answer, said)

    def outcome(self, answer: str, said: dict[str, Any]) -> Outcome:
        tokens, logprobs = read(said.get("logprobs"))
        return Outcome(
            answer,
            said["finish_reason"],
            tuple(said["image_ids"]),
            said["usage"]["prompt_tokens"],
            said["usage"]["image_tokens"],
            said["usage"]["completion_tokens"],
            said["vision"]["vision_tokens"],
            said["vision"]["detail"],
            said["vision"]["fit"],
            said.get("relevance") or None,
            said["vision"].get("frames"),
            said.get("video_id", ""),
            said.get("abstained"),
            said.get("reason", ""),
            said.get("confidence"),
            said.get("found"),
            tokens=tokens,
            logprobs=logprobs,
        )

    async def close(self) -> None:
        await self.http.aclose()


class VqaBatch(Vqa):
    """POST /v1/vqa/batch, with one question: a list, or a line where others stream."""

    async def ask(self, case: Case) -> Outcome:
        body = self.body(case)
        kind, content = ("jsonl", json.dumps(body)) if self.stream else ("json", json.dumps([body]))
        headers = {"content-type": f"application/{kind}"}
        said = (await self.http.post("/v1/vqa/batch", content=content, headers=headers)).json()
        assert said["index"] == 0
        if "error" in said:
            return Outcome(status=said["status"], code=said["error"]["code"])
        return self.outcome(said["answer"], said)


class OpenAiChat:
    """POST /v1/chat/completions, by the openai package's client."""

    def __init__(self, gateway: Gateway, card: ModelCard, *, stream: bool) -> None:
        self.client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.model = card.name
        self.stream = stream

    async def ask(self, case: Case) -> Outcome:
        fields = dict(case.fields)
        fields |= fields.pop("budget", {})
        detail = fields.pop("detail", None)
        if "json_schema" in fields:
            named = {"name": "answer", "strict": True, "schema": fields.pop("json_schema")}
            fields["response_format"] = {"type": "json_schema", "json_schema": named}
        shown = [image(in_base64(each), **({"detail": detail} if detail else {})) for each in case.images]
        if case.video is not None:
            shown.append(video(in_base64(case.video)))
        messages = []
        for question, answer in case.turns:
            messages += [user(*shown, text(question)), assistant(answer)]
            shown = []
        messages.append(user(*shown, text(case.question)))
        asked: dict[str, Any] = {"model": self.model, "messages": messages, "extra_body": fields}
        try:
            return await (self._streamed(asked) if self.stream else self._whole(asked))
        except openai.APIStatusError as error:
            return Outcome(status=error.status_code, code=error.code or "")

    async def _whole(self, asked: dict[str, Any]) -> Outcome:
        said = await self.client.chat.completions.create(**asked)
        (choice,) = said.choices
        told = None if choice.logprobs is None else choice.logprobs.model_dump()["content"]
        return self._outcome(choice.message.content or "", choice.finish_reason, said.usage, said, told)

    async def _streamed(self, asked: dict[str, Any]) -> Outcome:
        stream = await self.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        *chunks, last, usage = [chunk async for chunk in stream]
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
        told = [one for piece in pieces for one in piece.model_dump()["content"]] if pieces else None
        return self._outcome(answer, last.choices[0].finish_reason, usage.usage, last, told)

    def _outcome(self, answer: str, finish_reason: str, usage: Any, ours: Any, told: Any) -> Outcome:
        tokens, logprobs = read(told)
        details = usage.prompt_tokens_details
        assert usage.prompt_tokens == details.text_tokens + details.image_tokens
        return Outcome(
            answer,
            finish_reason,
            tuple(ours.image_ids),
            details.text_tokens,
            details.image_tokens,
            usage.completion_tokens,
            ours.vision["vision_tokens"],
            ours.vision["detail"],
            ours.vision["fit"],
            getattr(ours, "relevance", None) or None,
            ours.vision.get("frames"),
            getattr(ours, "video_id", ""),
            getattr(ours, "abstained", None),
            getattr(ours, "reason", ""),
            getattr(ours, "confidence", None),
            getattr(ours, "found", None),
            tokens=tokens,
            logprobs=logprobs,
        )

    async def close(self) -> None:
        await self.client.close()


class Grpc:
    """Answer and StreamAnswer, by the generated stub."""

    def __init__(self, gateway: Gateway, card: ModelCard, *, stream: bool) -> None:
        self.channel = grpc.aio.insecure_channel(gateway.rpc, options=UNLIMITED)
        self.stub = VisualQuestionAnsweringStub(self.channel)
        self.stream = stream

    async def ask(self, case: Case) -> Outcome:
        fields = dict(case.fields)
        timeout_s = fields.pop("timeout_s", None)
        message = self._message(case, fields)
        try:
            if self.stream:
                text, said = await streamed(self.stub.StreamAnswer(message, timeout=timeout_s))
            else:
                said = await self.stub.Answer(message, timeout=timeout_s)
                text = said.answer
        except grpc.aio.AioRpcError as error:
            return self._failed(case, Failed(error))
        return self.outcome(text, said)

    def outcome(self, text: str, said: pb.AnswerResponse) -> Outcome:
        told = [{"bytes": each.token, "logprob": each.logprob, "top_logprobs": tops_of(each)} for each in said.logprobs]
        tokens, logprobs = read(told or None)
        return Outcome(
            text,
            FINISH_REASONS[said.finish_reason],
            tuple(said.image_ids),
            said.usage.prompt_tokens,
            said.usage.image_tokens,
            said.usage.completion_tokens,
            said.vision.vision_tokens,
            DETAILS[said.vision.detail],
            FITS[said.vision.fit],
            [relevance_in(each) for each in said.relevance] or None,
            [frame_in(each) for each in said.vision.frames] or None,
            said.video_id,
            said.abstained if said.HasField("abstained") else None,
            REASONS[said.abstain_reason],
            said.confidence if said.HasField("confidence") else None,
            said.found if said.HasField("found") else None,
            tokens=tokens,
            logprobs=logprobs,
        )

    def _message(self, case: Case, fields: dict[str, Any]) -> pb.AnswerRequest:
        budget = fields.pop("budget", {})
        if "json_schema" in fields:
            fields["json_schema"] = json.dumps(fields["json_schema"])
        kinds = {"detail": pb.Detail, "priority": pb.Priority, "fit": pb.Fit, "video_sampling": pb.VideoSampling}
        for name, values in kinds.items():
            if name in fields:
                word = f"{name}_{fields[name]}".upper()
                fields[name] = values.Value(word) if word in values.DESCRIPTOR.values_by_name else 99
        if budget:
            fields["budget"] = pb.Budget(**{name: pb.Range(least=a, most=b) for name, (a, b) in budget.items()})
        unknown = {name for name in fields if name not in pb.AnswerRequest.DESCRIPTOR.fields_by_name}
        known = {name: value for name, value in fields.items() if name not in unknown}
        shown, turns = [*map(part_of, case.images), *videos_of(case)], []
        for question, answer in case.turns:
            turns.append(pb.Turn(parts=[*shown, pb.Part(text=question)], answer=answer))
            shown = []
        message = pb.AnswerRequest(parts=[*shown, pb.Part(text=case.question)], turns=turns, **known)
        if unknown:
            message.MergeFromString(FIELD_127)
        return message

    def _failed(self, case: Case, failed: Failed) -> Outcome:
        """A row of STATUS has both statuses. A client whose deadline is over does not wait for the server's details."""
        kinds = case.error.__mro__ if case.error else ()
        expected = next((STATUS[kind] for kind in kinds if kind in STATUS), None)
        reason = failed.reason if failed.status else failed.code.lower()
        return Outcome(status=status_of(case) if expected and expected[1] == failed.code else 0, code=reason)

    async def close(self) -> None:
        await self.channel.close()


class GrpcBatch(Grpc):
    """Batch, with one question; another one stands in front where others stream."""

    async def ask(self, case: Case) -> Outcome:
        fields = dict(case.fields)
        timeout_s = fields.pop("timeout_s", None)
        asked = [pb.BatchRequest(index=1, question=self._message(case, fields), timeout_s=timeout_s)]
        if self.stream:
            asked.insert(0, pb.BatchRequest(index=2, question=pb.AnswerRequest(parts=[pb.Part(text="?")])))
        call = self.stub.Batch(iter(asked))
        results = {}
        while (result := await call.read()) is not grpc.aio.EOF:
            results[result.index] = result
        assert sorted(results) == sorted(each.index for each in asked)
        said = results[1]
        if said.HasField("error"):
            statuses = [
                status for status in STATUS.values() if grpc.StatusCode[status[1]].value[0] == said.error.status
            ]
            known = status_of(case) in [status for status, _ in statuses]
            return Outcome(status=status_of(case) if known else 0, code=said.error.code)
        return self.outcome(said.answer.answer, said.answer)


FIELD_127 = b"\xf8\x07\x01"
FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
REASONS = {
    pb.ABSTAIN_REASON_UNSPECIFIED: "",
    pb.ABSTAIN_REASON_NOT_FOUND: "not_found",
    pb.ABSTAIN_REASON_UNSURE: "unsure",
    pb.ABSTAIN_REASON_UNFAMILIAR_IMAGE: "unfamiliar_image",
}
FITS = {pb.FIT_SQUASH: "squash", pb.FIT_PAD: "pad", pb.FIT_TILES: "tiles"}
DETAILS = {pb.DETAIL_LOW: "low", pb.DETAIL_HIGH: "high"}
# What has no gRPC: an image is bytes there, and a deadline beyond the limit is cut.
NOT_IN_GRPC = ("not base64", "a video that is not base64", "a timeout that is too long")


# OpenAI's chat has no list of frames, and takes any temperature up to 2.
NOT_IN_CHAT = ("frames", "a video twice", "no frames", "too many frames", "a temperature too small")


def videos_of(case: Case) -> list[pb.Part]:
    parts = []
    if case.video is not None:
        name = "video" if isinstance(case.video, bytes) else "video_id"
        parts.append(pb.Part(**{name: case.video}))
    if case.frames is not None:
        frames = [pb.Frame(**{"image" if isinstance(each, bytes) else "image_id": each}) for each in case.frames]
        parts.append(pb.Part(frames=pb.Frames(frames=frames)))
    return parts


def tops_of(told: pb.TokenLogProb) -> list[dict[str, Any]]:
    return [{"bytes": top.token, "logprob": top.logprob} for top in told.top_logprobs]


def read(told: list[dict[str, Any]] | None) -> tuple[Any, tuple[float, ...]]:
    """Tokens, each with the likeliest ones, and all their log probabilities."""
    if told is None:
        return None, ()
    tokens = tuple((bytes(each["bytes"]), tuple(bytes(top["bytes"]) for top in each["top_logprobs"])) for each in told)
    return tokens, tuple(one["logprob"] for each in told for one in (each, *each["top_logprobs"]))


def grid(values: Iterable[float]) -> Any:
    return np.round(np.array(list(values), np.float64).reshape(16, 16), 4).tolist()


def relevance_in(message: pb.Relevance) -> dict[str, Any]:
    """As HTTP writes it."""
    scores = {name: grid(getattr(message, name)) for name in ("propositional", "perspectival", "participatory")}
    return frame_relevance_in(message) | {"scores": scores}


def frame_in(message: pb.SeenFrame) -> dict[str, Any]:
    """As HTTP writes it."""
    told: dict[str, Any] = {"index": message.index}
    if message.HasField("time_s"):
        told["time_s"] = round(message.time_s, 3)
    if message.image_id:
        told["image_id"] = message.image_id
    if message.HasField("relevance"):
        told["relevance"] = frame_relevance_in(message.relevance)
    return told


def frame_relevance_in(message: pb.Relevance) -> dict[str, Any]:
    return {
        "map": grid(message.map),
        "levels": np.reshape(message.levels, (8, 8)).tolist(),
        "tensions": {
            name: round(getattr(message.tensions, name), 4) for name in ("particularize", "explore", "diversify")
        },
        "area": list(message.area),
    }


TRANSPORTS = {"vqa": Vqa, "batch": VqaBatch, "chat": OpenAiChat, "grpc": Grpc, "grpc batch": GrpcBatch}


@pytest.fixture(scope="module", autouse=True)
def committed(repository: Path) -> None:
    if repository != PROJECT / "model_repository":
        pytest.skip("the budgets of the table are those of the committed models")


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 45


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_transport_says_the_same(case: Case, gateway: Gateway, card: ModelCard) -> None:
    outcomes = {}
    for name, transport in TRANSPORTS.items():
        if case.name in (NOT_IN_GRPC if name.startswith("grpc") else NOT_IN_CHAT if name == "chat" else ()):
            continue
        for stream in (False, True):
            asker = transport(gateway, card, stream=stream)
            outcomes[name, stream] = await asker.ask(case)
            await asker.close()
    first = outcomes["vqa", False]
    assert {key: outcome for key, outcome in outcomes.items() if outcome != first} == {}, first
    assert (first.status, first.code) == (status_of(case), case.code)
    assert bool(first.answer) is (case.error is None)
    for other in outcomes.values():
        assert other.logprobs == pytest.approx(first.logprobs, abs=0.001)
        assert (other.confidence, other.found) == pytest.approx((first.confidence, first.found), abs=0.001)
    assert (first.confidence is not None) is (case.error is None)
    one_image = case.video is None and case.frames is None and len(case.images) == 1
    assert first.found is None or one_image  # nothing is said of what is found in several
    assert (first.abstained is not None) is (case.error is None and "min_confidence" in case.fields)
    assert bool(first.frames) is bool(case.error is None and (case.video or case.frames))
    assert bool(first.tokens) is (case.error is None and "logprobs" in case.fields)
