"""Define the wire types of HTTP: the fields of a body and of an answer. Nothing below this edge uses them."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from service.core.answer import Finished, KeptImage
from service.core.card import ModelCard
from service.core.errors import GlimpseError, InvalidRequest
from service.core.request import Detail, Exchange, ImageBytes, ImageSource, Priority, Sampling, Text
from service.core.vision import FloatArray, Relevance
from service.edges.asking import Fields, source_of
from service.edges.http.body import MAX_NAME_CHARS, FormPart

MAX_STOPS = 8
MAX_STOP_CHARS = 64
MAX_TURNS = 64
MAX_FAULTS = 100  # if a body has more, an error gives only their number


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError('must be a string or a list of strings, such as ["."]')
    if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"may hold at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


JSON_EXAMPLES = {
    "budget": '{"vision_tokens": [64, 128]}',
    "turns": '[{"question": "is there a ring?", "answer": "yes"}]',
}


def _from_json_text(value: object, info: ValidationInfo) -> object:
    """Parse a form's field, which is text; pass on any other value."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as exc:
        raise ValueError(f"must be JSON text, such as {JSON_EXAMPLES[info.field_name or '']}") from exc


Tokens = Annotated[int, Field(ge=0, le=1_000_000)]


class WireTurn(BaseModel):
    """A question that was asked before, and its answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="Turn")

    question: str
    answer: str


class WireBudget(BaseModel):
    """The least and the most tokens for each image. A part that is left out is the model's default."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="Budget")

    vision_tokens: tuple[Tokens, Tokens] | None = Field(None, description="Tokens that the Q-Former reads.")
    visual_tokens: tuple[Tokens, Tokens] | None = Field(None, description="Tokens that the LLM reads; multiples of 32.")


class Asked(BaseModel):
    """Hold the fields that JSON and a form have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    question: str = Field(description="The question about the image.", examples=["what colour is the circle?"])
    turns: tuple[WireTurn, ...] = Field(
        (), max_length=MAX_TURNS, description="Earlier questions about the same images, with answers; oldest first."
    )
    max_tokens: int = Field(
        Sampling().max_tokens, ge=1, le=1_000_000, description="The answer ends here at the latest."
    )
    temperature: float = Field(0.0, ge=0, le=5, description="0 takes the most likely token each time.")
    top_k: int = Field(
        0, ge=0, le=1_000_000, description="Draw only from this number of most likely tokens; 0: no filter."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw only from the fewest most likely tokens whose probabilities reach this sum."
    )
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="The same seed draws the same answer.")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="Above 1, repeated tokens become less likely.")
    stop: Annotated[
        tuple[str, ...],
        BeforeValidator(_stops),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}], "default": []}),
    ] = Field((), description="The answer ends before any of these strings.")
    detail: Detail = Field(
        "low",
        description="`high` adds a closer view of 448x448 pixels. `auto` adds it if the question needs it, the image "
        "has the pixels and the service has room.",
    )
    budget: WireBudget | None = Field(None, description="How closely to look, in tokens.")
    timeout_s: float | None = Field(None, gt=0, description="Seconds until the request is given up.")
    priority: Priority = Field(
        Priority.NORMAL, description="`low` lets your other requests go first while the service is busy."
    )
    stream: bool = Field(False, description="Send the answer as server-sent events.")
    explain: bool = Field(False, description="Add `relevance`: where the model looked, and why.")

    def _fields(self, image: str | None, images: Sequence[ImageSource | str] | None) -> Fields:
        budget = self.budget or WireBudget()
        return Fields(
            parts=(Text(self.question),),
            image=image,
            images=None if images is None else tuple(images),
            turns=tuple(Exchange((Text(turn.question),), turn.answer) for turn in self.turns),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            detail=self.detail,
            vision_tokens=budget.vision_tokens,
            visual_tokens=budget.visual_tokens,
            timeout_s=self.timeout_s,
            priority=self.priority,
            stream=self.stream,
        )


class VqaRequest(Asked):
    """A question about one image or several, as JSON."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["image"]}, {"required": ["images"]}]})

    image: str | None = Field(
        None,
        description="Base64, a `data:` URL, or the id `img_...` of an image sent to `POST /v1/images`.",
        examples=["img_6d0f1c0a4f5b2e3c9a8b7c6d5e4f3a2b"],
    )
    images: tuple[str, ...] | None = Field(
        None, min_length=1, description="Several images in place of `image`; the model reads them in this order."
    )

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Read a JSON body. Types are not converted: "16" is not a number. Raises InvalidRequest."""
        try:
            return cls.model_validate_json(body, strict=True)
        except ValidationError as exc:
            raise invalid_request(exc, cls.model_fields) from exc

    def fields(self) -> Fields:
        return self._fields(self.image, self.images)


class VqaForm(Asked):
    """A question about one image or several, as a form: `curl -F image=@x.png -F image=@y.png -F question=...`."""

    image: list[bytes] = Field(description="The file, or the same text as JSON's `image`. The field may repeat.")
    turns: Annotated[tuple[WireTurn, ...], BeforeValidator(_from_json_text)] = Field(
        (), max_length=MAX_TURNS, description="JSON text, as in JSON's `turns`."
    )
    budget: Annotated[WireBudget | None, BeforeValidator(_from_json_text)] = Field(
        None, description="JSON text, as in JSON's `budget`."
    )

    @classmethod
    def from_parts(cls, parts: Sequence[FormPart]) -> tuple[Self, list[ImageSource]]:
        """Read a form -> its fields, and its images in order. Raises InvalidRequest."""
        fields: dict[str, Any] = {}
        images: list[ImageSource] = []
        for part in parts:
            name = part.name
            if name in fields and name not in ("image", "stop"):
                raise InvalidRequest(f"{name} is given twice: send it once", param=name)
            if name == "image":
                fields.setdefault(name, []).append(b"")
                images.append(ImageBytes(bytes(part.data)) if part.is_file else source_of(_text(part)))
            elif name == "stop":
                fields.setdefault(name, []).append(_text(part))
            else:
                fields[name] = _text(part)
        nothing = [name for name in ("seed", "budget", "timeout_s") if fields.get(name) == "null"]
        try:
            return cls.model_validate({name: fields[name] for name in fields.keys() - nothing}), images
        except ValidationError as exc:
            raise invalid_request(exc, cls.model_fields) from exc

    def fields(self, images: Sequence[ImageSource]) -> Fields:
        """Return the checked fields. `images` are those that `from_parts` returned."""
        return self._fields(None, images)


def _text(part: FormPart) -> str:
    try:
        return part.data.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest(
            f"{part.name} is not UTF-8 text: send text, or send a file as image (curl -F image=@FILE)", param=part.name
        ) from exc


def invalid_request(exc: ValidationError, known: dict[str, Any]) -> InvalidRequest:
    """Describe a body's first fault, and count the others. The message quotes only a short piece of the body."""
    count = exc.error_count()
    if count > MAX_FAULTS:
        return InvalidRequest(f"the body has {count:,} faults; the fields are {', '.join(known)}")
    fault = exc.errors(include_url=False)[0]
    param = ".".join(str(step) for step in fault["loc"])[:MAX_NAME_CHARS]
    more = f" (and {count - 1} more)" if count > 1 else ""
    match fault["type"]:
        case "json_invalid":
            reason = fault["msg"].removeprefix("Invalid JSON: ")
            return InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json")
        case "extra_forbidden":
            near = difflib.get_close_matches(param, known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
            return InvalidRequest(f"there is no field {param!r}: {mend}{more}", param=param, code="unknown_field")
        case "missing":
            return InvalidRequest(f"the field {param} is missing{more}", param=param, code="missing_field")
        case "model_type" | "model_attributes_type":
            return InvalidRequest(f"{param or 'the body'} must be a JSON object", param=param or None)
        case "too_short":
            reason = f"must have {fault['ctx']['min_length']} or more items"
        case "too_long":
            reason = f"must have {fault['ctx']['max_length']} or fewer items"
        case _:
            reason = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = reprlib.repr(fault["input"])  # repr itself has no bound, and fails on deeply nested values
    shown = given if len(given) <= 60 else f"{given[:57]}..."
    return InvalidRequest(f"{param} {reason}; it is {shown}{more}", param=param)


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Text tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens of the answer.")
    image_tokens: int = Field(description="Visual tokens that the LLM read.")


class Vision(BaseModel):
    """How the images were seen, all of them together."""

    cache: Literal["hit", "miss"] = Field(description="hit if nothing had to be encoded.")
    vision_tokens: int = Field(description="Vision tokens that the allocator kept.")
    visual_tokens: int = Field(description="Visual tokens that the LLM read.")
    detail: Literal["low", "high"] = Field(description="high if a closer view was used.")
    reduced: bool = Field(description="Looked less closely than the request allows, because of load.")


class TimingMs(BaseModel):
    queue: float
    load: float
    vision: float
    first_token: float = Field(description="Until the first text. Without `stream` all text is there at once.")
    total: float


class Scores(BaseModel):
    propositional: list[list[float]]
    perspectival: list[list[float]]
    participatory: list[list[float]]


class Tensions(BaseModel):
    particularize: float
    explore: float
    diversify: float


class WireRelevance(BaseModel):
    """Where one image was looked at closely; `map` and `scores` are 16x16 in [0, 1], `levels` 8x8."""

    model_config = ConfigDict(title="Relevance")

    map: list[list[float]]
    scores: Scores
    levels: list[list[int]]
    tensions: Tensions

    @classmethod
    def of(cls, relevance: Relevance) -> Self:
        propositional, perspectival, participatory = (_rounded(score) for score in relevance.scores)
        particularize, explore, diversify = _rounded(relevance.tensions)
        return cls(
            map=_rounded(relevance.map),
            scores=Scores(propositional=propositional, perspectival=perspectival, participatory=participatory),
            levels=relevance.levels.tolist(),
            tensions=Tensions(particularize=particularize, explore=explore, diversify=diversify),
        )


def _rounded(values: FloatArray) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()


class VqaEnd(BaseModel):
    """An answer without its text: the last event of a stream before [DONE]."""

    id: str
    model: str
    answer: str | None = Field(None, description="Left out, because the deltas are the answer.")
    finish_reason: Literal["stop", "length"]
    image_ids: list[str]
    usage: Usage
    vision: Vision
    timing_ms: TimingMs
    relevance: list[WireRelevance] | None = Field(None, description="One an image; with `explain` only.")

    @classmethod
    def fields_of(cls, request_id: str, model: str, end: Finished, explain: bool) -> dict[str, Any]:
        return {
            "id": request_id,
            "model": model,
            "finish_reason": end.finish_reason,
            "image_ids": end.image_ids,
            "usage": Usage(
                prompt_tokens=end.prompt_tokens,
                completion_tokens=end.completion_tokens,
                image_tokens=end.visual_tokens,
            ),
            "vision": Vision(
                cache=end.cache,
                vision_tokens=end.vision_tokens,
                visual_tokens=end.visual_tokens,
                detail=end.detail,
                reduced=end.reduced,
            ),
            "timing_ms": TimingMs(**end.timing_ms),
            "relevance": [WireRelevance.of(each) for each in end.relevance] if explain else None,
        }


class VqaAnswer(VqaEnd):
    answer: str = Field(description="The whole answer.")


class UploadedImage(BaseModel):
    id: str = Field(description="Use it as `image` in questions.")
    bytes: int
    width: int
    height: int
    expires_at: float = Field(description="Seconds since the epoch.")

    @classmethod
    def of(cls, kept: KeptImage) -> Self:
        return cls(
            id=kept.id, bytes=kept.nbytes, width=kept.width, height=kept.height, expires_at=round(kept.expires_at, 3)
        )


class WireError(BaseModel):
    model_config = ConfigDict(title="Error")

    message: str = Field(description="What is wrong and what to do.")
    type: str
    param: str | None = Field(description="The field at fault.")
    code: str = Field(description="Stable, for programs.")


class ErrorBody(BaseModel):
    error: WireError

    @classmethod
    def of(cls, error: GlimpseError) -> Self:
        return cls(error=WireError(message=error.message, type=error.type, param=error.param, code=error.code))


class CloserView(BaseModel):
    vision_tokens: tuple[int, int] = Field(description="The budgets that are allowed with a closer view.")
    auto_at: float = Field(description="Detail `auto` looks closer if `particularize` reaches this.")

    @classmethod
    def of(cls, card: ModelCard) -> Self | None:
        if not card.closer_view:
            return None
        return cls(vision_tokens=card.vision_tokens_for("high"), auto_at=card.closer_view_at)


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    owned_by: str = "glimpse"
    fingerprint: str = Field(description="Of the vision encoder's weights.")
    allocator_trained: bool = Field(description="Whether relevance depends on the question.")
    max_positions: int = Field(description="Most visual, prompt and answer tokens together.")
    budget: WireBudget = Field(description="The budgets that are allowed.")
    default_visual_tokens: tuple[int, int] = Field(description="Used if a request has no budget of visual tokens.")
    closer_view: CloserView | None = Field(None, description="Left out if the model has no closer view.")
    metadata: dict[str, Any]

    @classmethod
    def of(cls, card: ModelCard) -> Self:
        return cls(
            id=card.name,
            fingerprint=card.fingerprint,
            allocator_trained=card.allocator_trained,
            max_positions=card.max_positions,
            budget=WireBudget(vision_tokens=card.vision_tokens, visual_tokens=card.visual_tokens),
            default_visual_tokens=card.default_visual_tokens,
            closer_view=CloserView.of(card),
            metadata=dict(card.metadata),
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "not ready"]
    faults: dict[str, str] = Field(default_factory=dict, description="By model or `gateway`, why it does not answer.")
