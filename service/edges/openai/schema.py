"""Define the wire types of OpenAI's chat API: the fields of a body, of an answer and of a stream's chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    ValidationError,
)

from service.core import answer
from service.core.answer import Finished
from service.core.confidence import Reason
from service.core.errors import InvalidRequest
from service.core.frames import FrameSampling
from service.core.request import Detail, Priority, Sampling
from service.core.viewport import AskedFit
from service.edges.http.faults import UNNAMED, invalid_request
from service.edges.http.schema import (
    ABSTAINED,
    CHOICES,
    CONFIDENCE,
    FALLBACK_FROM,
    FIT,
    FOUND,
    JSON_SCHEMA,
    LEAST_PENALTY,
    LEAST_TEMPERATURE,
    LEAST_TIMEOUT_S,
    LEAST_TOP_P,
    LOGPROBS,
    PAGE,
    REASON,
    REGEX,
    TOP_LOGPROBS,
    TOP_NEEDS_LOGPROBS,
    VARIANT,
    VIDEO_ID,
    VIDEO_SAMPLING,
    WHOLE,
    Choices,
    ErrorBody,
    Flag,
    Page,
    Regex,
    TimingMs,
    TokenLogprob,
    Tokens,
    TopLogprobs,
    VideoFrames,
    Vision,
    WireRelevance,
    WithNulls,
    having,
    stop_schema,
    stops,
)
from service.edges.openai.unsupported import Only, Refused, Unsupported, unsupported

MAX_STOPS = 4
MAX_MESSAGES = 256

# Bounds of OpenAI's.
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ImageAddress(BaseModel):
    """An image, and the size at which it is seen."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="ImageUrl")

    url: str = Field(description="A `data:` URL with base64, or the id `img_...` of an image that was sent before.")
    detail: Detail | None = Field(None, description="One for all images of a request. Left out: `low`.")


class VideoAddress(BaseModel):
    """A video, as vLLM's clients send it."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="VideoUrl")

    url: str = Field(
        description="A `data:` URL with base64, or the id `img_...` of a video that was sent before. MP4, MOV, WebM, "
        "or an animated GIF or WebP."
    )


class FileContent(BaseModel):
    """A PDF or an image, as OpenAI's clients send files: either its bytes or its id."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        title="FileContent",
        json_schema_extra={"oneOf": [having("file_data", "string"), having("file_id", "string")]},
    )

    file_data: str | None = Field(
        None, description="A `data:` URL with base64, such as `data:application/pdf;base64,...`."
    )
    file_id: str | None = Field(None, description="The id `img_...` of a file that was sent before.")
    filename: str | None = Field(None, max_length=512, description="It has no effect.")


PART_TYPES = ("text", "image_url", "video_url", "file")


def _part_type(value: str) -> str:
    if value not in PART_TYPES:
        raise unsupported('send parts of type "text", "image_url", "video_url" and "file"')
    return value


class ContentPart(BaseModel):
    """A text, an image, a video or a file of a message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Annotated[str, AfterValidator(_part_type)] = Field(json_schema_extra={"enum": list(PART_TYPES)})
    text: str | None = None
    image_url: ImageAddress | None = None
    video_url: VideoAddress | None = None
    file: FileContent | None = None
    input_audio: Refused = None
    prompt_cache_breakpoint: Refused = None
    refusal: Refused = None


def _content_tag(content: object) -> str | None:
    return "text" if isinstance(content, str) else UNNAMED if isinstance(content, list) else None


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[ContentPart, ...], Tag(UNNAMED)],
    Discriminator(
        _content_tag,
        custom_error_type="content_type",
        custom_error_message='must be a string or a list of parts, such as {"type": "text", "text": "which shape?"}',
    ),
]


def _role(value: str) -> str:
    if value not in ("system", "developer", "user", "assistant"):
        raise unsupported('send messages of the roles "system", "developer", "user" and "assistant"')
    return value


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Annotated[str, AfterValidator(_role)] = Field(
        json_schema_extra={"enum": ["system", "developer", "user", "assistant"]}
    )
    content: Content | None = Field(
        None, description="Only a user's message may have images or the one video of a conversation."
    )
    annotations: Annotated[object, Only([])] = None
    audio: Refused = None
    function_call: Refused = None
    name: str | None = Field(None, max_length=512, description="Of the speaker. It has no effect.")
    parsed: object = Field(
        None, description="Of an assistant's message that a client parsed and sends back. It has no effect."
    )
    refusal: Refused = None
    tool_call_id: Refused = None
    tool_calls: Annotated[object, Only([])] = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: Flag = Field(False, description="Send one more chunk, with `usage` and no choices.")
    include_obfuscation: Annotated[object, Only(False)] = None


class NamedSchema(BaseModel):
    """A schema with a name, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="JSONSchema")

    name: str = Field(max_length=64, description="It has no effect.")
    description: str | None = Field(None, description="It has no effect.")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Left out: any object.")
    strict: bool | None = Field(None, description="It has no effect: answers always follow the schema.")


class ResponseFormat(BaseModel):
    """A constraint on the answer: any text, a JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(None, description="With `json_schema` only, and then needed.")

    def schema_of_answer(self) -> dict[str, Any] | None:
        """Return the answer's JSON schema, or None for any text. Raises InvalidRequest."""
        if self.type == "json_schema" and self.json_schema is None:
            raise InvalidRequest(
                "the field response_format.json_schema is missing", param="response_format", code="missing_field"
            )
        if self.type != "json_schema" and self.json_schema is not None:
            raise InvalidRequest(
                f'response_format has a json_schema and the type "{self.type}": make the type "json_schema"',
                param="response_format",
            )
        if self.type == "text":
            return None
        return (self.json_schema and self.json_schema.schema_) or {"type": "object"}


def _greedy_if_small(temperature: float) -> float:
    return 0.0 if temperature < LEAST_TEMPERATURE else temperature


def _least_top_p(top_p: float) -> float:
    return max(top_p, LEAST_TOP_P)


def _without_sign(seed: int) -> int:
    return seed % 2**63


CHAT_VIDEO_FRAMES: Any = Field(
    None,
    description="At most so many frames of the video are looked at. Left out: as many as the model says and as fit.",
)


class ChatRequest(Unsupported):
    """A conversation about images or a video, as OpenAI's clients send it.

    A field that is left out means what /v1/vqa says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=TOP_NEEDS_LOGPROBS)

    model: str = Field(description="The served model's name: see `GET /v1/models`.")
    messages: Annotated[tuple[ChatMessage, ...], Field(max_length=MAX_MESSAGES, json_schema_extra={"minItems": 1})] = (
        Field(description="System messages first, then the user's and the assistant's in turn; the user's is last.")
    )
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000), WHOLE] | None = Field(
        None, description=f"The answer ends here at the latest. Left out: {Sampling().max_tokens}."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000), WHOLE] | None = Field(
        None, description="Another name of `max_tokens`."
    )
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_greedy_if_small)] | None = Field(
        0.0, description=f"Below {LEAST_TEMPERATURE} it is 0, which takes the likeliest token each time."
    )
    top_p: Annotated[float, Field(ge=0, le=1), AfterValidator(_least_top_p)] | None = Field(
        1.0, description="Draw from the likeliest tokens with this much probability; 0 takes the likeliest one."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE, AfterValidator(_without_sign)] | None = Field(
        None, description="The same seed draws the same answer."
    )
    stop: Annotated[tuple[str, ...], stops(MAX_STOPS), stop_schema(MAX_STOPS)] = Field(
        (), description="The answer ends before any of these strings."
    )
    stream: Flag = Field(False, description="Server-sent events as the answer is written.")
    stream_options: StreamOptions | None = None
    logprobs: Flag = LOGPROBS
    top_logprobs: TopLogprobs | None = TOP_LOGPROBS
    response_format: ResponseFormat | None = Field(None, description="A constraint on the answer.")
    user: str | None = Field(None, max_length=512, description="Your name of the end user. It has no effect.")
    safety_identifier: str | None = Field(None, max_length=512, description="As `user`.")
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = Field(
        None, description="Your own notes. They have no effect."
    )
    prompt_cache_key: str | None = Field(None, max_length=512, description="It has no effect.")
    prompt_cache_retention: str | None = Field(None, max_length=512, description="It has no effect.")
    # Ours.
    choices: Choices | None = CHOICES
    regex: Regex | None = REGEX
    json_schema: dict[str, Any] | None = JSON_SCHEMA
    top_k: Annotated[int, Field(ge=0, le=1_000_000), WHOLE] | None = Field(
        0, description="Draw from this many tokens; 0 switches the filter off."
    )
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=10)] | None = Field(
        1.0, description="Above 1, repeated tokens become less likely."
    )
    vision_tokens: tuple[Tokens, Tokens] | None = Field(
        None, description="Least and most tokens that the Q-Former reads of each image."
    )
    visual_tokens: tuple[Tokens, Tokens] | None = Field(
        None, description="Least and most tokens that the LLM reads of each image; multiples of 32."
    )
    fit: AskedFit | None = FIT
    page: Page | None = PAGE
    video_frames: VideoFrames | None = CHAT_VIDEO_FRAMES
    video_sampling: FrameSampling | None = VIDEO_SAMPLING
    timeout_s: float | None = Field(None, ge=LEAST_TIMEOUT_S, description="Seconds until the request is given up.")
    priority: Priority | None = Field(
        Priority.NORMAL, description="`low` lets your other requests go first while the service is busy."
    )
    explain: Flag = Field(False, description="Tell where the images were looked at closely, and why.")
    min_confidence: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="With less confidence the answer is marked `abstained`."
    )

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Types are not converted: "16" is not a number. Raises InvalidRequest."""
        try:
            return cls.model_validate_json(body, strict=True)
        except ValidationError as exc:
            raise invalid_request(exc, SUPPORTED, NESTED) from exc


SUPPORTED = tuple(name for name in ChatRequest.model_fields if name not in Unsupported.model_fields)
NESTED = {
    "messages": ("role", "content"),
    "content": ("type", *PART_TYPES),
    "image_url": tuple(ImageAddress.model_fields),
    "video_url": tuple(VideoAddress.model_fields),
    "file": tuple(FileContent.model_fields),
    "stream_options": ("include_usage",),
    "response_format": tuple(ResponseFormat.model_fields),
    "json_schema": ("name", "description", "schema", "strict"),
}


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Visual tokens, if no image had to be encoded; else 0.")
    image_tokens: int = Field(description="Visual tokens that the LLM read.")
    text_tokens: int
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    accepted_prediction_tokens: int = 0
    audio_tokens: int = 0
    reasoning_tokens: int = 0
    rejected_prediction_tokens: int = 0


class ChatUsage(BaseModel):
    prompt_tokens: int = Field(description="Text and visual tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens of the answer.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()

    @classmethod
    def of(cls, end: Finished) -> Self:
        prompt_tokens = end.prompt_tokens + end.visual_tokens
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=end.completion_tokens,
            total_tokens=prompt_tokens + end.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=end.visual_tokens if end.cache == "hit" else 0,
                image_tokens=end.visual_tokens,
                text_tokens=end.prompt_tokens,
            ),
        )


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, said: answer.Delta) -> Self:
        return cls(content=TokenLogprob.all_of(said))


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = Field(None, description="With `logprobs` only.")
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """A whole answer, as OpenAI's API gives it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since the epoch.")
    model: str
    system_fingerprint: str = Field(description="Of the weights up to the visual tokens.")
    choices: tuple[Choice]
    usage: ChatUsage


class SeenFields(WithNulls):
    """What no other service tells: ids, how the images were seen, and what took how long."""

    image_ids: list[str] = Field(description="Ids to ask again about the same images, in the messages' order.")
    video_id: str | None = VIDEO_ID
    vision: Vision
    timing_ms: TimingMs
    confidence: float | None = CONFIDENCE
    found: float | None = FOUND
    abstained: bool | None = ABSTAINED
    reason: Reason | None = REASON
    variant: str | None = VARIANT
    fallback_from: str | None = FALLBACK_FROM
    relevance: list[WireRelevance] | None = Field(
        None, description="One an image; with `explain` only.", exclude_if=lambda value: value is None
    )


class ChatCompletion(SeenFields, Completion):
    """A whole answer, with our fields beside OpenAI's."""


class Delta(BaseModel):
    role: Literal["assistant"] | None = Field(None, description="In the first chunk.")
    content: str | None = Field(None, description="The next piece of the answer's text.")


class ChunkChoice(BaseModel):
    index: Literal[0] = 0
    delta: Delta
    logprobs: ChoiceLogprobs | None = Field(None, description="With `logprobs` only.")
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream: the role, pieces of text, the end, and with `include_usage` the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice] = Field(description="None in the chunk with the usage.", max_length=1)
    usage: ChatUsage | None = Field(None, description="In the last chunk, with `stream_options.include_usage` only.")
    image_ids: list[str] | None = Field(None, description="With `finish_reason`, as the next three.")
    video_id: str | None = VIDEO_ID
    vision: Vision | None = None
    timing_ms: TimingMs | None = None
    confidence: float | None = CONFIDENCE
    found: float | None = FOUND
    abstained: bool | None = ABSTAINED
    reason: Reason | None = REASON
    variant: str | None = VARIANT
    fallback_from: str | None = FALLBACK_FROM
    relevance: list[WireRelevance] | None = None


class ChatEvent(RootModel[ChatCompletionChunk | ErrorBody]):
    """One event of a stream: chunks; or an error in place of what was still to come."""


class DeletedFile(BaseModel):
    """An image that was deleted as a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class KeptFile(BaseModel):
    """An image that was taken as a file."""

    id: str = Field(
        description="Use it as `image_url.url`, `video_url.url` or `file.file_id` in messages, and as `image` or "
        "`video` in questions."
    )
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Seconds since the epoch.")
    expires_at: int = Field(description="Seconds since the epoch.")
    filename: str
    purpose: Literal["vision", "user_data"] = "vision"
    status: Literal["processed"] = "processed"
    width: int
    height: int
    pages: int = Field(description="Of a TIFF or a PDF; of other files 1.")
