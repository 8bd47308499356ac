"""Define the wire types of HTTP: the fields of a body and of an answer. Nothing below this edge uses them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, Self

import numpy as np
import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    WithJsonSchema,
)

from service.core.answer import Delta, Finished, FrameSeen, KeptImage, TokenLogProb
from service.core.card import ModelCard
from service.core.confidence import Reason
from service.core.errors import GlimpseError, InvalidRequest, naming_frame, naming_image, naming_video
from service.core.frames import MAX_FRAMES, FrameSampling
from service.core.guide import MAX_CHOICES, MAX_REGEX_CHARS
from service.core.request import (
    MAX_TOP_LOG_PROBS,
    Detail,
    Exchange,
    ImageBytes,
    ImageSource,
    Priority,
    Sampling,
    Text,
)
from service.core.viewport import FAR_FROM_SQUARE, AskedFit, Fit
from service.core.vision import FloatArray, Relevance
from service.edges.asking import Fields
from service.edges.http.body import FormPart
from service.edges.http.faults import invalid_request
from service.edges.image_text import read_image
from service.edges.slices import SLICE_BYTES, joined

MAX_STOPS = 8
MAX_STOP_CHARS = 64
MAX_TURNS = 64

# Least values of what divides or bounds float32 numbers behind this edge, all far above float32's smallest normal
# number (1.2e-38). Scores of tokens are below 1,000, so that nothing that they are divided by makes them infinite.
LEAST_TEMPERATURE = 0.01  # vLLM's bound: below it softmax is all or nothing in half precision
LEAST_TOP_P = 1e-6  # float32 tells probabilities near 1 apart to 6e-8
LEAST_PENALTY = 0.01  # a hundredfold score; 10 is the most
LEAST_TIMEOUT_S = 1e-6  # Triton counts microseconds


def stop_schema(most: int) -> WithJsonSchema:
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    return WithJsonSchema({"anyOf": [stop, {"type": "array", "items": stop, "maxItems": most}, {"type": "null"}]})


# Of a question, those that the core takes as they are.
PLAIN_FIELDS = (
    *("max_tokens", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "stop", "detail", "fit"),
    *("timeout_s", "priority", "stream", "choices", "regex", "json_schema", "min_confidence"),
    *("video_frames", "video_sampling", "page"),
)


def or_default(default: object) -> BeforeValidator:
    """null stands for a field that was left out."""
    return BeforeValidator(lambda value: default if value is None else value)


def _whole(value: object) -> object:
    """16.0 is an integer in JSON Schema, and in JSON that knows one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


FLAG_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _flag(value: object) -> object:
    """A form's words for a flag, in any case: some clients write True."""
    found = FLAG_WORDS.get(value.lower()) if isinstance(value, str) else value
    if found is None:
        raise ValueError("must be true or false")
    return found


def greedy_or_drawn(value: float) -> float:
    """Check a temperature, whose bounds are checked already. Raises ValueError."""
    if 0 < value < LEAST_TEMPERATURE:
        raise ValueError(f"must be 0, which is greedy, or at least {LEAST_TEMPERATURE}")
    return value + 0.0  # 0 for -0


def stops(most: int) -> BeforeValidator:
    """Take a string, a list of at most so many, or null, as a tuple."""

    def checked(value: object) -> object:
        if value is None:
            return ()
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError('must be a string or a list of strings, such as ["."]')
        if len(stops) > most or not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"may hold at most {most} strings of 1 to {MAX_STOP_CHARS} characters")
        return tuple(stops)

    return BeforeValidator(checked)


def _from_json_text(example: str) -> Callable[[object], object]:
    """A form has text only."""

    def parsed(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as exc:
            raise ValueError(f"must be JSON text, such as {example}") from exc

    return parsed


# A list would stand for a field that repeats.
TURNS_AS_TEXT = {
    "anyOf": [
        {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "type": "array",
                "items": {"$ref": "#/components/schemas/WireTurn"},
                "maxItems": MAX_TURNS,
            },
        },
        {"type": "null"},
    ]
}
NOT_BLANK = r"\S"  # said in the schema, and checked by the core
ImageText = Annotated[str, Field(json_schema_extra={"pattern": NOT_BLANK})]
FILE_SCHEMA = {"type": "string", "format": "binary", "minLength": 1}
FILES_SCHEMA = {"type": "array", "items": FILE_SCHEMA, "minItems": 1}


def having(name: str, kind: str) -> dict[str, Any]:
    """The schema of an object that has this field, and not as null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


# top_logprobs needs logprobs.
TOP_NEEDS_LOGPROBS: dict[str, Any] = {
    "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
    "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
}
IMAGE, IMAGES = having("image", "string"), having("images", "array")
VIDEO, FRAMES = having("video", "string"), having("frames", "array")
ABOUT_A_VIDEO: dict[str, Any] = {"anyOf": [having("video_frames", "integer"), having("video_sampling", "string")]}
# Images, a video or both; one field for each. video_frames and video_sampling need a video, page needs one image.
SOMETHING_SEEN: dict[str, Any] = {
    "anyOf": [IMAGE, IMAGES, VIDEO, FRAMES],
    "allOf": [
        {"not": {"allOf": [IMAGE, IMAGES]}},
        {"not": {"allOf": [VIDEO, FRAMES]}},
        {"if": ABOUT_A_VIDEO, "then": {"anyOf": [VIDEO, FRAMES]}},
        {
            "if": having("page", "integer"),
            "then": {"allOf": [IMAGE, *({"not": each} for each in (IMAGES, VIDEO, FRAMES))]},
        },
    ],
}
SOMETHING_SEEN_BY_FORM: dict[str, Any] = {
    "anyOf": [{"required": [name]} for name in ("image", "video", "frames")],
    "allOf": [
        {"not": {"required": ["video", "frames"]}},
        {"anyOf": [{"not": ABOUT_A_VIDEO}, *({"required": [name]} for name in ("video", "frames"))]},
        {
            "anyOf": [
                {"not": having("page", "integer")},
                {
                    "required": ["image"],
                    "properties": {"image": {"maxItems": 1}},
                    "allOf": [{"not": {"required": [name]}} for name in ("video", "frames")],
                },
            ]
        },
    ],
}
WHOLE = BeforeValidator(_whole)  # stands after a Field, whose bounds would else be missing in the JSON Schema
GREEDY_OR_DRAWN: dict[str, Any] = {"anyOf": [{"const": 0}, {"minimum": LEAST_TEMPERATURE}]}
Tokens = Annotated[int, Field(ge=0, le=1_000_000), WHOLE]
FormFlag = Annotated[
    bool,
    or_default(False),
    BeforeValidator(_flag),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": [*FLAG_WORDS, "True", "False", 0, 1]}, {"type": "null"}]}),
]
Flag = Annotated[bool, or_default(False), WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "null"}]})]
Temperature = Annotated[
    float,
    Field(ge=0, le=5, json_schema_extra=GREEDY_OR_DRAWN),
    AfterValidator(greedy_or_drawn),
]


# Constrained output: at most one of them is given.
Choices = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_CHOICES)]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)]
CHOICES: Any = Field(None, description="The answer is one of these texts.", examples=[["yes", "no"]])
# A form has no types: whatever a choice is, it arrives as text.
CHOICES_OF_A_FORM: dict[str, Any] = {"anyOf": [{}, {"type": "null"}]}
REGEX: Any = Field(None, description="The answer matches this regular expression from its first to its last character.")
SCHEMA_TEXT = BeforeValidator(_from_json_text('{"type": "object"}'))
JSON_SCHEMA: Any = Field(None, description="The answer is JSON of this schema.", examples=[{"type": "object"}])


LEAST_LOGPROB = -9999.0  # OpenAI's, in place of minus infinity, which JSON does not have
FIT: Any = Field(
    None,
    description="How an image that is not square meets the square encoder: `squash` changes its proportions, `pad` "
    "keeps them, `tiles` looks at the whole and then at the part that the question is about, `auto` tiles an image "
    f"of more than {FAR_FROM_SQUARE:g} to 1 and squashes others. Left out: the model's own.",
)
MAX_PAGE = 1_000_000
Page = Annotated[int, Field(ge=1, le=MAX_PAGE), WHOLE]
PAGE: Any = Field(
    None,
    description="The page of the one image, if it is a TIFF or a PDF of several. Left out: 1. Only with `image`.",
    examples=[2],
)
VideoFrames = Annotated[int, Field(ge=1, le=MAX_FRAMES), WHOLE]
VIDEO_FRAMES: Any = Field(
    None,
    description="At most so many frames of the video are looked at. Left out: as many as the model says "
    "(`GET /v1/models`) and as fit, or all of `frames`.",
    examples=[16],
)
VIDEO_SAMPLING: Any = Field(
    None,
    description=f"Which frames: `uniform` takes them evenly spaced; `change` leaves out those of up to {MAX_FRAMES} "
    "that look like the one before. Left out: `uniform`.",
    examples=["change"],
)
LOGPROBS: Any = Field(False, description="Tell each token's log probability.")
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOG_PROBS), WHOLE]
TOP_LOGPROBS: Any = Field(0, description="Tell so many of the likeliest tokens beside each token; needs `logprobs`.")


class WireTurn(BaseModel):
    """A question that was asked before, and its answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="Turn")

    question: str = Field(json_schema_extra={"pattern": NOT_BLANK})
    answer: str = Field(json_schema_extra={"pattern": NOT_BLANK})


class WireBudget(BaseModel):
    """The least and the most tokens for each image, or each frame of a video.

    With a clip resampler (`clip` of `GET /v1/models`), those of all frames together. A part that is left out is the
    model's default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, title="Budget")

    vision_tokens: tuple[Tokens, Tokens] | None = Field(None, description="Tokens that the Q-Former reads.")
    visual_tokens: tuple[Tokens, Tokens] | None = Field(None, description="Tokens that the LLM reads; multiples of 32.")


class Asked(BaseModel):
    """Hold the fields that JSON and a form have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    question: str = Field(
        description="What you want to know.",
        examples=["what character is on the pink square?"],
        json_schema_extra={"pattern": NOT_BLANK},
    )
    turns: Annotated[tuple[WireTurn, ...], Field(max_length=MAX_TURNS)] | None = Field(
        (), description="What was asked about the same images before, and answered; oldest first."
    )
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000), WHOLE] | None = Field(
        Sampling().max_tokens, description="The answer ends here at the latest."
    )
    temperature: Temperature | None = Field(0.0, description="0 takes the likeliest token each time.")
    top_k: Annotated[int, Field(ge=0, le=1_000_000), WHOLE] | None = Field(
        0, description="Draw from this many tokens; 0 switches the filter off."
    )
    top_p: Annotated[float, Field(ge=LEAST_TOP_P, le=1)] | None = Field(
        1.0, description="Draw from the likeliest tokens with this much probability."
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), WHOLE] | None = Field(
        None, description="The same seed draws the same answer."
    )
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=10)] | None = Field(
        1.0, description="Above 1, repeated tokens become less likely."
    )
    stop: Annotated[tuple[str, ...], stops(MAX_STOPS), stop_schema(MAX_STOPS)] = Field(
        (), description="The answer ends before any of these strings."
    )
    choices: Choices | None = CHOICES
    regex: Regex | None = REGEX
    json_schema: dict[str, Any] | None = JSON_SCHEMA
    detail: Detail | None = Field(
        "low",
        description="`high` adds a closer view of 448x448 pixels. `auto` adds it if the question needs it, the image "
        "has the pixels and the service has room.",
    )
    fit: AskedFit | None = FIT
    page: Page | None = PAGE
    video_frames: VideoFrames | None = VIDEO_FRAMES
    video_sampling: FrameSampling | None = VIDEO_SAMPLING
    budget: WireBudget | None = Field(None, description="How closely to look, in tokens.")
    timeout_s: float | None = Field(None, ge=LEAST_TIMEOUT_S, description="Seconds until the request is given up.")
    priority: Priority | None = Field(
        Priority.NORMAL, description="`low` lets your other requests go first while the service is busy."
    )
    min_confidence: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="With less confidence the answer is marked `abstained`."
    )
    logprobs: Flag = LOGPROBS
    top_logprobs: TopLogprobs | None = TOP_LOGPROBS
    stream: Flag = Field(False, description="Server-sent events as the answer is written.")
    explain: Flag = Field(False, description="Tell where the image was looked at closely, and why.")

    def _fields(
        self, image: ImageSource | str | None, images: Sequence[ImageSource | str] | None, **clip: Any
    ) -> Fields:
        """null stands for a field that was left out."""
        budget = self.budget or WireBudget()
        given = {name: value for name in PLAIN_FIELDS if (value := getattr(self, name)) is not None}
        return Fields(
            parts=(Text(self.question),),
            image=image,
            images=None if images is None else tuple(images),
            turns=tuple(Exchange((Text(turn.question),), turn.answer) for turn in self.turns or ()),
            vision_tokens=budget.vision_tokens,
            visual_tokens=budget.visual_tokens,
            log_probs=bool(self.logprobs),
            top_log_probs=self.top_logprobs or 0,
            **clip,
            **given,
        )


class VqaRequest(Asked):
    """A question about images, a video or both, as JSON."""

    model_config = ConfigDict(json_schema_extra={**SOMETHING_SEEN, **TOP_NEEDS_LOGPROBS})

    image: ImageText | None = Field(
        None,
        description="Base64, a `data:` URL, or the id `img_...` of an image sent to `POST /v1/images`.",
        examples=["img_6d0f1c0a4f5b2e3c9a8b7c6d5e4f3a2b"],
    )
    images: Annotated[tuple[ImageText, ...], Field(min_length=1)] | None = Field(
        None, description="Several, each as `image`, in its place; the model reads them in this order."
    )
    video: ImageText | None = Field(
        None,
        description="A short video: MP4, MOV, WebM, or an animated GIF or WebP, in one of the ways of `image`.",
        examples=["img_5b2e3c9a8b7c6d5e4f3a2b6d0f1c0a4f"],
    )
    frames: Annotated[tuple[ImageText, ...], Field(min_length=1, max_length=MAX_FRAMES)] | None = Field(
        None,
        description="A video's frames in order, each as `image`, in place of `video`.",
        examples=[["img_6d0f1c0a4f5b2e3c9a8b7c6d5e4f3a2b", "img_2b6d0f1c0a4f5b2e3c9a8b7c6d5e4f3a"]],
    )

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Types are not converted: "16" is not a number. Raises InvalidRequest."""
        try:
            return cls.model_validate_json(body, strict=True)
        except ValidationError as exc:
            raise invalid_request(exc, cls.model_fields, NESTED) from exc

    def fields(self) -> Fields:
        return self._fields(self.image, self.images, video=self.video, frames=self.frames)


class VqaForm(Asked):
    """A question about images, a video or both, as a form: `curl -F image=@x.png -F image=@y.png -F question=...`."""

    model_config = ConfigDict(json_schema_extra={"required": ["question"], **SOMETHING_SEEN_BY_FORM})

    image: Annotated[list[bytes], WithJsonSchema(FILES_SCHEMA)] = Field(
        default_factory=list, description="The file, or what JSON's `image` may hold; it may repeat."
    )
    video: Annotated[list[bytes], WithJsonSchema(FILE_SCHEMA)] = Field(
        default_factory=list, description="The file, or what JSON's `video` may hold."
    )
    frames: Annotated[list[bytes], WithJsonSchema(FILES_SCHEMA | {"maxItems": MAX_FRAMES})] = Field(
        default_factory=list, description="As `image`, for the frames of a video in order; it repeats."
    )
    turns: Annotated[
        Annotated[tuple[WireTurn, ...], Field(max_length=MAX_TURNS)] | None,
        BeforeValidator(_from_json_text('[{"question": "which shape?", "answer": "a circle"}]')),
        WithJsonSchema(TURNS_AS_TEXT),
    ] = Field((), description="JSON text, as in JSON's `turns`.")
    budget: Annotated[WireBudget | None, BeforeValidator(_from_json_text('{"vision_tokens": [64, 128]}'))] = Field(
        None, description="JSON text, as in JSON's `budget`."
    )
    choices: Annotated[Choices | None, WithJsonSchema(CHOICES_OF_A_FORM)] = Field(
        None, description="One of these texts; the field repeats."
    )
    json_schema: Annotated[dict[str, Any] | None, SCHEMA_TEXT] = Field(
        None, description="JSON text, as JSON's `json_schema`."
    )
    stream: FormFlag = Field(False, description=Asked.model_fields["stream"].description)
    logprobs: FormFlag = LOGPROBS
    explain: FormFlag = Field(False, description=Asked.model_fields["explain"].description)

    @classmethod
    async def from_parts(cls, parts: Sequence[FormPart]) -> tuple[Self, FormFiles]:
        """Read a form -> its fields and its files. Raises InvalidRequest."""
        fields: dict[str, Any] = {}
        files = FormFiles()
        for part in parts:
            name = part.name
            if name not in cls.model_fields:
                fields[name] = None  # refused below by its name, whatever it holds
            elif name in FILES:
                await files.take(name, part, sum(each.name == name for each in parts))
            elif name in ("stop", "choices"):
                fields.setdefault(name, []).append(_text(part))
            elif name in fields:
                raise InvalidRequest(f"{name} is given twice", param=name)
            else:
                fields[name] = _text(part)
        given = {name: value for name, value in fields.items() if name == "question" or value not in NOTHING}
        try:
            return cls.model_validate(given), files
        except ValidationError as exc:
            raise invalid_request(exc, cls.model_fields, NESTED) from exc

    def fields(self, files: FormFiles) -> Fields:
        """`files` are those that `from_parts` gave."""
        image, several = (None, files.image) if len(files.image) > 1 else (next(iter(files.image), None), None)
        video, frames = next(iter(files.video), None), tuple(files.frames) or None
        return self._fields(image, several, video=video, frames=frames)


@dataclass(frozen=True, slots=True)
class FormFiles:
    """Hold the files of a form, by the names of their fields."""

    image: list[ImageSource] = field(default_factory=list)
    video: list[ImageSource] = field(default_factory=list)
    frames: list[ImageSource] = field(default_factory=list)

    async def take(self, name: str, part: FormPart, of: int) -> None:
        """Add a file, or what stands for one as text; the form has `of` such fields. Raises InvalidRequest."""
        taken: list[ImageSource] = getattr(self, name)
        if name == "video" and taken:
            raise InvalidRequest("video is given twice: send one video, or its frames in order as frames", param=name)
        content = await joined(part.content.all())
        if _is_file(part):
            taken.append(ImageBytes(content))
        elif content[:64].strip() != b"null":
            naming = {
                "image": naming_image(len(taken), of),
                "video": naming_video(),
                "frames": naming_frame(len(taken), of),
            }
            with naming[name]:
                taken.append(await read_image(content))


NESTED: Mapping[str, Collection[str]] = {"turns": WireTurn.model_fields, "budget": WireBudget.model_fields}
FILES = tuple(each.name for each in fields(FormFiles))
NOTHING = ("null", ["null"])  # a form's words for a field that is left out


FILE_TYPES = (b"image/", b"video/", b"application/pdf", b"application/octet-stream")


def _is_file(part: FormPart) -> bool:
    """Whether a form's image or video is a file: by its name, by its type, or because it is not text."""
    content_type = part.headers.get(b"content-type", b"").lower()
    return part.is_file or content_type.startswith(FILE_TYPES) or not _is_utf8(part)


def _is_utf8(part: FormPart) -> bool:
    """By its first slice, whose last character may be cut."""
    first = next(iter(part.content.all()), b"")[:SLICE_BYTES]
    try:
        first.decode()
    except UnicodeDecodeError as exc:
        return len(first) < part.content.nbytes and exc.start >= len(first) - 3
    return True


def _text(part: FormPart) -> str:
    try:
        return part.data.decode()
    except UnicodeDecodeError as exc:
        mend = "send the file in the field image" if part.is_file else "encode it as UTF-8"
        raise InvalidRequest(f"{part.name} is not UTF-8 text: {mend}", param=part.name) from exc


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Text tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens of the answer.")
    image_tokens: int = Field(description="Visual tokens that the LLM read.")


def sure_field(description: str) -> Any:
    return Field(None, description=description, exclude_if=lambda value: value is None)


VIDEO_ID = Field(
    None,
    description="Id to ask again about the same video; with a video file only.",
    exclude_if=lambda value: value is None,
)
VARIANT = Field(
    None,
    description="The variant that answered; without variants it is left out.",
    exclude_if=lambda value: value is None,
)
FALLBACK_FROM = Field(
    None,
    description="The variant that should have answered, if it failed before its first token.",
    exclude_if=lambda value: value is None,
)


class Tensions(BaseModel):
    particularize: float
    explore: float
    diversify: float

    @classmethod
    def of(cls, relevance: Relevance) -> Self:
        particularize, explore, diversify = _rounded(relevance.tensions)
        return cls(particularize=particularize, explore=explore, diversify=diversify)


class FrameRelevance(BaseModel):
    """Where one frame was looked at closely: `map`, `levels`, `tensions` and `area` as an image's."""

    map: list[list[float]]
    levels: list[list[int]]
    tensions: Tensions
    area: tuple[float, float, float, float]

    @classmethod
    def of(cls, relevance: Relevance) -> Self:
        return cls(
            map=_rounded(relevance.map),
            levels=relevance.levels.tolist(),
            tensions=Tensions.of(relevance),
            area=tuple(round(place, 4) for place in relevance.area),
        )


class WireFrame(BaseModel):
    """One frame of a video that was looked at."""

    model_config = ConfigDict(title="Frame")

    index: int = Field(description="In the video, from 0.")
    time_s: float | None = Field(
        None,
        description="Seconds from its start; left out of `frames`.",
        exclude_if=lambda value: value is None,
    )
    image_id: str | None = Field(
        None, description="Its id as an image, with `frames` only.", exclude_if=lambda value: value is None
    )
    relevance: FrameRelevance | None = Field(
        None, description="With `explain` only.", exclude_if=lambda value: value is None
    )

    @classmethod
    def of(cls, frame: FrameSeen, explain: bool) -> Self:
        return cls(
            index=frame.index,
            time_s=None if frame.time_s is None else round(frame.time_s, 3),
            image_id=frame.image_id or None,
            relevance=FrameRelevance.of(frame.relevance) if explain else None,
        )


class Vision(BaseModel):
    """How the images were seen, all of them together."""

    cache: Literal["hit", "miss"] = Field(description="hit if nothing had to be encoded.")
    vision_tokens: int = Field(description="Vision tokens that the allocator kept.")
    visual_tokens: int = Field(description="Visual tokens that the LLM read.")
    detail: Literal["low", "high"] = Field(description="high if a closer view was used.")
    reduced: bool = Field(description="Looked less closely than the request allows, because of load.")
    fit: Fit = Field(description="How the LLM saw images that are not square; `tiles` if it saw a part of one.")
    familiar: float | None = sure_field(
        "Probability that the images are of the kind that the model learnt from. Left out if it is not calibrated for "
        "such questions."
    )
    frames: list[WireFrame] | None = Field(
        None,
        description="The frames of the video that were looked at, in order; with a video only.",
        exclude_if=lambda value: value is None,
    )


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


class WireRelevance(BaseModel):
    """Where one image was looked at closely; `map` and `scores` are 16x16 in [0, 1], `levels` 8x8.

    `area` says where they lie in the upright image.
    """

    model_config = ConfigDict(title="Relevance")

    map: list[list[float]]
    scores: Scores
    levels: list[list[int]] = Field(description="Level of detail of each cell: 0 to 2, or -1 for one that is left out.")
    tensions: Tensions
    area: tuple[float, float, float, float] = Field(
        description="Left, top, right and bottom as shares of the image's width and height. Padding lies below 0 and "
        "above 1."
    )

    @classmethod
    def of(cls, relevance: Relevance) -> Self:
        propositional, perspectival, participatory = (_rounded(score) for score in relevance.scores)
        return cls(
            map=_rounded(relevance.map),
            scores=Scores(propositional=propositional, perspectival=perspectival, participatory=participatory),
            levels=relevance.levels.tolist(),
            tensions=Tensions.of(relevance),
            area=tuple(round(place, 4) for place in relevance.area),
        )


def _rounded(values: FloatArray) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()


CONFIDENCE = sure_field(
    "Probability that the answer is right; left out if the model is not calibrated for such a question."
)
FOUND = sure_field("Probability that what the question names is in the image; left out if it names nothing.")
ABSTAINED = sure_field("Whether the confidence is below `min_confidence`; with `min_confidence` only.")
REASON = sure_field("Why it abstained; with `abstained: true` only.")


class TopLogprob(BaseModel):
    """A token, and the model's own log probability of it, before constraint, penalty, temperature and filters."""

    token: str = Field(description="Its text. Bytes that are part of a character are escaped, such as `\\\\xc3`.")
    logprob: float
    bytes: list[int]

    @classmethod
    def fields_of(cls, told: TokenLogProb) -> dict[str, Any]:
        token = told.spelled.decode(errors="backslashreplace")
        return {"token": token, "logprob": max(told.log_prob, LEAST_LOGPROB), "bytes": list(told.spelled)}


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob] = Field(description="Likeliest first, as many as `top_logprobs` asks for.")

    @classmethod
    def all_of(cls, said: Delta) -> list[Self]:
        return [
            cls(top_logprobs=[TopLogprob(**TopLogprob.fields_of(top)) for top in each.top], **cls.fields_of(each))
            for each in said.log_probs
        ]


TOKEN_LOGPROBS: Any = Field(
    None, description="Each token of the text; with `logprobs` only.", exclude_if=lambda value: value is None
)


class VqaEnd(BaseModel):
    """An answer without its text: the last event of a stream before [DONE]."""

    id: str
    model: str
    answer: str | None = Field(None, description="Left out, because the deltas are the answer.")
    finish_reason: Literal["stop", "length"]
    image_ids: list[str]
    video_id: str | None = VIDEO_ID
    usage: Usage
    vision: Vision
    timing_ms: TimingMs
    confidence: float | None = CONFIDENCE
    found: float | None = FOUND
    abstained: bool | None = ABSTAINED
    reason: Reason | None = REASON
    variant: str | None = VARIANT
    fallback_from: str | None = FALLBACK_FROM
    relevance: list[WireRelevance] | None = Field(None, description="One an image; with `explain` only.")

    @classmethod
    def fields_of(cls, request_id: str, model: str, end: Finished, explain: bool) -> dict[str, Any]:
        return {
            "id": request_id,
            "model": model if end.served is None else end.served.model,
            "finish_reason": end.finish_reason,
            "usage": Usage(
                prompt_tokens=end.prompt_tokens,
                completion_tokens=end.completion_tokens,
                image_tokens=end.visual_tokens,
            ),
            **seen_fields(end, explain),
        }


def seen_fields(end: Finished, explain: bool) -> dict[str, Any]:
    """Tell how the images were seen and what took how long: the fields that no other service has."""
    return {
        "image_ids": end.image_ids,
        "video_id": end.clip_id or None,
        "vision": Vision(
            cache=end.cache,
            vision_tokens=end.vision_tokens,
            visual_tokens=end.visual_tokens,
            detail=end.detail,
            reduced=end.reduced,
            fit=end.fit,
            familiar=None if end.confidence is None else round(end.confidence.familiar, 4),
            frames=[WireFrame.of(frame, explain) for frame in end.frames] or None,
        ),
        "timing_ms": TimingMs(**end.timing_ms),
        **sure_fields(end),
        **variant_fields(end),
        "relevance": [WireRelevance.of(each) for each in end.relevance] if explain else None,
    }


def variant_fields(end: Finished) -> dict[str, str | None]:
    """Tell which variant answered. None stands for a field that is left out: a service without variants has none."""
    served = end.served
    if served is None or not served.is_named:
        return {"variant": None, "fallback_from": None}
    return {"variant": served.variant, "fallback_from": served.fallback_from or None}


def sure_fields(end: Finished) -> dict[str, Any]:
    """Tell how sure the answer is. None stands for a field that is left out."""
    sure = end.confidence
    return {
        "confidence": None if sure is None else round(sure.value, 4),
        "found": None if sure is None or sure.found is None else round(sure.found, 4),
        "abstained": end.abstained,
        "reason": end.abstain_reason,
    }


class WireError(BaseModel):
    model_config = ConfigDict(title="Error")

    message: str = Field(description="What is wrong and what to do.")
    type: str
    param: str | None = Field(description="The field at fault.")
    code: str = Field(description="Stable, for programs.")


class WithNulls(BaseModel):
    """Fields without a value are sent as null."""


class ErrorBody(WithNulls):
    error: WireError

    @classmethod
    def of(cls, error: GlimpseError) -> Self:
        return cls(error=WireError(message=error.message, type=error.type, param=error.param, code=error.code))


class VqaDelta(BaseModel):
    """The next piece of the answer's text."""

    id: str
    delta: str
    logprobs: list[TokenLogprob] | None = TOKEN_LOGPROBS


class VqaEvent(RootModel[VqaDelta | VqaEnd | ErrorBody]):
    """One event of a stream: deltas, then the end; or an error in place of what was still to come."""


class VqaAnswer(VqaEnd):
    answer: str = Field(description="The whole answer.")
    logprobs: list[TokenLogprob] | None = TOKEN_LOGPROBS


class UploadedImage(BaseModel):
    id: str = Field(description="Use it as `image` in questions, or as `video` if it is one.")
    bytes: int
    width: int
    height: int
    pages: int = Field(description="Of a TIFF or a PDF; of other files 1. `width` and `height` are those of the first.")
    expires_at: float = Field(description="Seconds since the epoch.")

    @classmethod
    def of(cls, kept: KeptImage) -> Self:
        return cls(
            id=kept.id,
            bytes=kept.nbytes,
            width=kept.width,
            height=kept.height,
            pages=kept.pages,
            expires_at=round(kept.expires_at, 3),
        )


class DeletedImage(BaseModel):
    id: str
    deleted: Literal[True] = True


class CloserView(BaseModel):
    vision_tokens: tuple[int, int] = Field(description="The budgets that are allowed with a closer view.")
    auto_at: float = Field(description="Detail `auto` looks closer if `particularize` reaches this.")

    @classmethod
    def of(cls, card: ModelCard) -> Self | None:
        if not card.closer_view:
            return None
        return cls(vision_tokens=card.vision_tokens_for("high"), auto_at=card.closer_view_at)


class ClipReading(BaseModel):
    """What the clip resampler reads and makes of all frames of a video together."""

    visual_tokens: int = Field(description="Visual tokens of the whole video, whatever the budget is.")
    vision_tokens: tuple[int, int] = Field(description="The least and the most of all frames together.")
    frames: int = Field(description="The most frames of a video that are looked at.")

    @classmethod
    def of(cls, card: ModelCard) -> Self | None:
        clip = card.clip
        if clip is None:
            return None
        return cls(visual_tokens=clip.visual_tokens, vision_tokens=clip.vision_tokens, frames=clip.frames)


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Since when this gateway serves it, in seconds since the epoch.")
    owned_by: str = "glimpse"
    card: str | None = Field(None, description="The name of the models, if the id is a variant's.")
    fingerprint: str = Field(description="Of the vision encoder's weights.")
    visual_fingerprint: str = Field(description="Of all weights up to an image's visual tokens.")
    language_fingerprint: str | None = Field(
        None, description="Of the LLM, the prompt and the tokenizers. Left out if an older build did not tell it."
    )
    precision: str = Field(
        description="Precision of the models' computation: fp32, bf16, int8, int4; fp16 or fp8 on a GPU."
    )
    allocator_trained: bool = Field(description="Whether relevance depends on the question.")
    allocator: str = Field(
        description="How the allocator came about: `trained` on answers, `distilled` from the full view, `zero-shot` "
        "from what the checkpoint knows, or `fixed`: relevance does not depend on the question."
    )
    architecture: Literal["decoder-only", "encoder-decoder", "cross-attention"] = Field(
        description="Of the LLM. An encoder-decoder (FlanT5) reads each prompt anew, without the prefix cache. "
        "`cross-attention`: text and images are apart, and each word sees the last image before it (IDEFICS)."
    )
    max_positions: int = Field(description="Most visual, prompt and answer tokens together.")
    budget: WireBudget = Field(description="The budgets that are allowed.")
    default_visual_tokens: tuple[int, int] = Field(description="Used if a request has no budget of visual tokens.")
    default_vision_tokens: tuple[int, int] = Field(description="Used at detail `low` if it has none of vision tokens.")
    closer_view: CloserView | None = Field(None, description="Left out if the model has no closer view.")
    fit: AskedFit = Field(description="How an image that is not square is fitted if a question does not say.")
    video_frames: int = Field(description="The most frames of a video that are looked at if a question does not say.")
    clip: ClipReading | None = Field(
        None, description="Left out if the model has no clip resampler: then it looks at each frame as at an image."
    )
    clip_weights: bool = Field(
        description="Whether the LLM answers about a video or several images with weights of its own for them."
    )
    interleaved: bool = Field(description="Whether images stand inside a question's text, or always before it.")
    system_messages: bool = Field(description="Whether the model takes a system message.")
    calibrated: bool = Field(
        description="Whether answers about one image carry a confidence; `metadata.confidence` says why."
    )
    calibrated_several: bool = Field(
        description="Whether answers about a video or several images have a confidence that was fitted to them."
    )
    images_shared: bool = Field(
        description="Whether every gateway knows an image's id, or only the one that got the image."
    )
    metadata: dict[str, Any] | None = Field(None, description="Licence, training, accuracy; left out in short.")

    @classmethod
    def of(cls, card: ModelCard, created: int, images_shared: bool) -> Self:
        return cls(
            id=card.name,
            created=created,
            fingerprint=card.fingerprint,
            visual_fingerprint=card.visual_fingerprint,
            language_fingerprint=card.language_fingerprint or None,
            precision=card.precision,
            allocator_trained=card.allocator_trained,
            allocator=card.allocator or ("trained" if card.allocator_trained else "fixed"),
            architecture=card.architecture,
            max_positions=card.max_positions,
            budget=WireBudget(vision_tokens=card.vision_tokens, visual_tokens=card.visual_tokens),
            default_visual_tokens=card.default_visual_tokens,
            default_vision_tokens=card.unasked_vision_tokens("low"),
            closer_view=CloserView.of(card),
            fit=card.fit,
            video_frames=card.frames,
            clip=ClipReading.of(card),
            clip_weights=card.clip_weights,
            interleaved=card.interleaved,
            system_messages=bool(card.system_template),
            calibrated=card.confidence is not None,
            calibrated_several=card.confidence is not None and card.confidence.several is not None,
            images_shared=images_shared,
            metadata=dict(card.metadata),
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "not ready"]
    faults: dict[str, str] = Field(
        default_factory=dict, description="By model, Triton, `gateway` or `keys`, why it does not answer."
    )
    degraded: dict[str, str] | None = Field(
        None,
        description="By Triton's address, after its variant's name if there are variants (`VARIANT/ADDRESS`), why it "
        "gets no requests although the service is ready.",
    )
