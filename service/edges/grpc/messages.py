"""Turn messages into the core's types and back. Nothing below this edge uses a message."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from service.core.answer import Delta, Finished, FrameSeen, KeptImage, TokenLogProb
from service.core.errors import GlimpseError, InvalidRequest, status_of, without_frames
from service.core.request import Clip, Exchange, ImageBytes, ImageId, ImageSource, ImageUrl, Part, Text
from service.core.vision import Relevance
from service.edges.asking import Fields, Names, frames_clip, naming
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.wire import fields_in, require_few_fields, varint
from service.edges.http.faults import invalid_request
from service.edges.http.schema import MAX_TURNS, NESTED, SCHEMA_TEXT, Asked, sure_fields, variant_fields

MAX_PARTS = 64  # of one question, as of a form
OPTIONAL = (
    *("max_tokens", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "regex", "json_schema"),
    *("min_confidence", "video_frames", "page"),
)
DETAILS = {pb.DETAIL_LOW: "low", pb.DETAIL_HIGH: "high", pb.DETAIL_AUTO: "auto"}
FITS = {pb.FIT_SQUASH: "squash", pb.FIT_PAD: "pad", pb.FIT_TILES: "tiles", pb.FIT_AUTO: "auto"}
VIDEO_SAMPLINGS = {pb.VIDEO_SAMPLING_UNIFORM: "uniform", pb.VIDEO_SAMPLING_CHANGE: "change"}
PRIORITIES = {pb.PRIORITY_NORMAL: "normal", pb.PRIORITY_LOW: "low"}
FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
CACHES = {"hit": pb.CACHE_HIT, "miss": pb.CACHE_MISS}
ABSTAIN_REASONS = {
    None: pb.ABSTAIN_REASON_UNSPECIFIED,
    "not_found": pb.ABSTAIN_REASON_NOT_FOUND,
    "unsure": pb.ABSTAIN_REASON_UNSURE,
    "unfamiliar_image": pb.ABSTAIN_REASON_UNFAMILIAR_IMAGE,
}
SEEN_DETAILS = {"low": pb.DETAIL_LOW, "high": pb.DETAIL_HIGH}
SEEN_FITS = {name: number for number, name in FITS.items()}
TOKENS = ("vision_tokens", "visual_tokens")
RANGE_ENDS = {
    f"budget.{name}.{i}": f"budget.{name}.{end}" for name in TOKENS for i, end in enumerate(("least", "most"))
}


class MessageFields(Asked):
    """Hold the fields that a message and JSON have in common. The same rules check them."""

    json_schema: Annotated[dict[str, Any] | None, SCHEMA_TEXT] = None

    def fields(self, parts: tuple[Part, ...], turns: tuple[Exchange, ...]) -> Fields:
        return replace(self._fields(None, None), parts=parts, turns=turns)


def question_in(data: bytes) -> pb.AnswerRequest:
    """Parse an encoded AnswerRequest. Raises InvalidRequest, TooLarge."""
    require_few_fields(data)
    message = pb.AnswerRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise InvalidRequest(
            "the message is not a glimpse.v1.AnswerRequest: generate your client from this server's proto",
            code="invalid_message",
        ) from exc
    return message


@dataclass(frozen=True, slots=True)
class BatchQuestion:
    """Hold one message of a batch, whose question is parsed when its turn comes."""

    index: int = 0
    data: bytes = b""  # an encoded AnswerRequest
    timeout_s: float | None = None
    fault: GlimpseError | None = None  # in place of a question; if the message has it, it may hide the index


def batch_question_in(data: bytes) -> BatchQuestion:
    """Read an encoded BatchRequest without parsing its question."""
    question = BatchQuestion()
    try:
        for number, start, end in fields_in(data, 0, len(data)):
            question = _with_field(question, number, data[start:end])
    except InvalidRequest as fault:
        without_frames(fault)
        return BatchQuestion(question.index, fault=fault)
    return question


def _with_field(question: BatchQuestion, number: int, content: bytes) -> BatchQuestion:
    """Raises InvalidRequest for a field that a BatchRequest does not have."""
    match number:
        case 1:
            return replace(question, index=varint(content, 0)[0] & 0xFFFF_FFFF)
        case 2:
            if question.data:
                raise InvalidRequest("question is given twice in one BatchRequest: send one message for each")
            return replace(question, data=content)
        case 3 if len(content) == 8:
            return replace(question, timeout_s=struct.unpack("<d", content)[0])
    raise InvalidRequest(
        f"field number {number} is none of this server's BatchRequest, or is cut off: leave it out",
        code="unknown_field",
    )


def error_message(error: GlimpseError) -> pb.Error:
    status, _ = grpc.StatusCode[status_of(error)[1]].value
    return pb.Error(status=status, code=error.code, message=error.message, type=error.type, param=error.param or "")


def chunk_in(data: bytes) -> bytes:
    """Parse an encoded PutImageRequest -> its bytes. Raises InvalidRequest."""
    message = pb.PutImageRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise InvalidRequest(
            "the message is not a glimpse.v1.PutImageRequest: generate your client from this server's proto",
            code="invalid_message",
        ) from exc
    return message.data


def fields_of(
    message: pb.AnswerRequest, *, stream: bool, timeout_s: float | None, priority: str | None = None
) -> tuple[Fields, Names]:
    """Check types and ranges of a question. `priority` is its default. Raises InvalidRequest, in the message's names.

    Errors that come later name our fields: `naming` turns them into the message's.
    """
    if len(message.turns) > MAX_TURNS:
        raise InvalidRequest(f"turns may hold at most {MAX_TURNS} items", param="turns")
    given: dict[str, object] = {"logprobs": message.logprobs, "top_logprobs": message.top_logprobs}
    given |= {name: getattr(message, name) for name in OPTIONAL if message.HasField(name)}
    if message.choices:
        given["choices"] = tuple(message.choices)
    if priority is not None:
        given["priority"] = priority
    if message.detail:
        given["detail"] = DETAILS.get(message.detail, message.detail)
    if message.fit:
        given["fit"] = FITS.get(message.fit, message.fit)
    if message.video_sampling:
        given["video_sampling"] = VIDEO_SAMPLINGS.get(message.video_sampling, message.video_sampling)
    if message.priority:
        given["priority"] = PRIORITIES.get(message.priority, message.priority)
    if message.HasField("budget"):
        given["budget"] = budget_of(message.budget)
    try:
        checked = MessageFields.model_validate({"question": "", "stop": tuple(message.stop), **given})
    except ValidationError as exc:
        with naming(RANGE_ENDS):
            raise invalid_request(exc, MessageFields.model_fields, NESTED) from exc
    if message.HasField("json_schema") and checked.json_schema is None:
        raise InvalidRequest("json_schema is null: send an object, or leave it out", param="json_schema")
    parts = parts_of(message.parts, "parts")
    turns = tuple(
        Exchange(parts_of(turn.parts, f"turns.{index}.parts"), turn.answer) for index, turn in enumerate(message.turns)
    )
    names = _names_of(message)
    fields = checked.fields(parts, turns)
    return replace(fields, stream=stream, timeout_s=timeout_s, system=message.system), names


def _names_of(message: pb.AnswerRequest) -> Names:
    """Return the message's names of our fields. Raises InvalidRequest if it has no image and no video."""
    names = {"images": "parts"}
    images: list[str] = []
    places = {f"turns.{index}.parts": turn.parts for index, turn in enumerate(message.turns)} | {"parts": message.parts}
    for where, parts in places.items():
        names[where.replace("parts", "question")] = where
        for index, part in enumerate(parts):
            kind = part.WhichOneof("part")
            place = f"{where}.{index}.{kind}"
            if kind.startswith("image"):
                images.append(place)
            elif kind != "text":
                names |= {"video": place, "frames": place}
                names |= {f"frames.{frame}": f"{place}.frames.{frame}" for frame in range(len(part.frames.frames))}
    names |= {f"images.{index}": place for index, place in enumerate(images)}
    if images:
        names["image"] = images[0]  # of one image; an error about several has its index
    elif "video" not in names:
        raise InvalidRequest("parts has no image or video: add one", param="parts", code="missing_field")
    return names


def budget_of(budget: pb.Budget) -> dict[str, tuple[int, int]]:
    ranges = {name: getattr(budget, name) for name in TOKENS if budget.HasField(name)}
    return {name: (each.least, each.most) for name, each in ranges.items()}


def parts_of(parts: Sequence[pb.Part], where: str) -> tuple[Part, ...]:
    """Return texts, images and videos in their places. Raises InvalidRequest."""
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(f"{where} may hold at most {MAX_PARTS} items", param=where)
    return tuple(part_of(part, f"{where}.{index}") for index, part in enumerate(parts))


def part_of(part: pb.Part, where: str) -> Part:
    kind = part.WhichOneof("part")
    match kind:
        case "text":
            return Text(part.text)
        case "image" | "image_id" | "image_url":
            return source_in(part, kind)
        case "video" | "video_id" | "video_url":
            return Clip(source_in(part, kind))
        case "frames":
            place = f"{where}.frames"
            frames = [frame_of(each, f"{place}.frames.{index}") for index, each in enumerate(part.frames.frames)]
            return frames_clip(frames, place)
    raise InvalidRequest(f"{where} is empty: set its text, image or video", param=where)


def frame_of(frame: pb.Frame, where: str) -> ImageSource:
    kind = frame.WhichOneof("frame")
    if kind is None:
        raise InvalidRequest(f"{where} is empty: set its image, image_id or image_url", param=where)
    return source_in(frame, kind)


def source_in(message: pb.Part | pb.Frame, name: str) -> ImageSource:
    """Return the file, the id or the URL in a field, whose name says which of them it is."""
    value = getattr(message, name)
    if name.endswith("_id"):
        return ImageId(value.strip())
    return ImageUrl(value.strip()) if name.endswith("_url") else ImageBytes(value)


def answer_message(
    request_id: str,
    model: str,
    text: str,
    end: Finished,
    explain: bool,
    log_probs: Iterable[TokenLogProb] = (),
) -> pb.AnswerResponse:
    """Write an answer; without a text, the end of a stream."""
    sure, variant = sure_fields(end), variant_fields(end)
    return pb.AnswerResponse(
        id=request_id,
        model=model if end.served is None else end.served.model,
        variant=variant["variant"] or "",
        fallback_from=variant["fallback_from"] or "",
        answer=text,
        finish_reason=FINISH_REASONS[end.finish_reason],
        image_ids=end.image_ids,
        video_id=end.clip_id,
        usage=pb.Usage(
            prompt_tokens=end.prompt_tokens,
            completion_tokens=end.completion_tokens,
            image_tokens=end.visual_tokens,
        ),
        vision=pb.Vision(
            cache=CACHES[end.cache],
            vision_tokens=end.vision_tokens,
            visual_tokens=end.visual_tokens,
            detail=SEEN_DETAILS[end.detail],
            reduced=end.reduced,
            fit=SEEN_FITS[end.fit],
            familiar=None if end.confidence is None else end.confidence.familiar,
            frames=[seen_frame_message(frame, explain) for frame in end.frames],
        ),
        timing_ms=pb.TimingMs(**end.timing_ms),
        relevance=[relevance_message(each) for each in end.relevance] if explain else [],
        confidence=sure["confidence"],
        found=sure["found"],
        abstained=sure["abstained"],
        abstain_reason=ABSTAIN_REASONS[sure["reason"]],
        logprobs=map(log_prob_message, log_probs),
    )


def log_prob_message(told: TokenLogProb) -> pb.TokenLogProb:
    return pb.TokenLogProb(
        token=told.spelled, logprob=told.log_prob, top_logprobs=[log_prob_message(each) for each in told.top]
    )


def event_message(
    request_id: str, model: str, event: Delta | Finished, explain: bool, log_probs: Iterable[TokenLogProb] = ()
) -> pb.AnswerEvent:
    """Write an event of a stream. `log_probs` are those of all deltas; the end has them."""
    if isinstance(event, Delta):
        return pb.AnswerEvent(delta=event.text)
    return pb.AnswerEvent(end=answer_message(request_id, model, "", event, explain, log_probs))


def relevance_message(relevance: Relevance) -> pb.Relevance:
    propositional, perspectival, participatory = (score.ravel().tolist() for score in relevance.scores)
    message = frame_relevance_message(relevance)
    message.propositional.extend(propositional)
    message.perspectival.extend(perspectival)
    message.participatory.extend(participatory)
    return message


def seen_frame_message(frame: FrameSeen, explain: bool) -> pb.SeenFrame:
    return pb.SeenFrame(
        index=frame.index,
        time_s=frame.time_s,
        image_id=frame.image_id,
        relevance=frame_relevance_message(frame.relevance) if explain else None,
    )


def frame_relevance_message(relevance: Relevance) -> pb.Relevance:
    """Write it without its three scores, as of a frame."""
    particularize, explore, diversify = relevance.tensions.tolist()
    return pb.Relevance(
        map=relevance.map.ravel().tolist(),
        levels=relevance.levels.ravel().tolist(),
        tensions=pb.Tensions(particularize=particularize, explore=explore, diversify=diversify),
        area=[round(place, 4) for place in relevance.area],
    )


def kept_message(kept: KeptImage) -> pb.PutImageResponse:
    message = pb.PutImageResponse(id=kept.id, bytes=kept.nbytes, width=kept.width, height=kept.height, pages=kept.pages)
    message.expires_at.FromMilliseconds(round(kept.expires_at * 1e3))
    return message
