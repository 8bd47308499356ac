import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Detail(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DETAIL_UNSPECIFIED: _ClassVar[Detail]
    DETAIL_LOW: _ClassVar[Detail]
    DETAIL_HIGH: _ClassVar[Detail]
    DETAIL_AUTO: _ClassVar[Detail]

class Fit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIT_UNSPECIFIED: _ClassVar[Fit]
    FIT_SQUASH: _ClassVar[Fit]
    FIT_PAD: _ClassVar[Fit]
    FIT_TILES: _ClassVar[Fit]
    FIT_AUTO: _ClassVar[Fit]

class VideoSampling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VIDEO_SAMPLING_UNSPECIFIED: _ClassVar[VideoSampling]
    VIDEO_SAMPLING_UNIFORM: _ClassVar[VideoSampling]
    VIDEO_SAMPLING_CHANGE: _ClassVar[VideoSampling]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class AbstainReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ABSTAIN_REASON_UNSPECIFIED: _ClassVar[AbstainReason]
    ABSTAIN_REASON_NOT_FOUND: _ClassVar[AbstainReason]
    ABSTAIN_REASON_UNSURE: _ClassVar[AbstainReason]
    ABSTAIN_REASON_UNFAMILIAR_IMAGE: _ClassVar[AbstainReason]

class Cache(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_UNSPECIFIED: _ClassVar[Cache]
    CACHE_HIT: _ClassVar[Cache]
    CACHE_MISS: _ClassVar[Cache]
DETAIL_UNSPECIFIED: Detail
DETAIL_LOW: Detail
DETAIL_HIGH: Detail
DETAIL_AUTO: Detail
FIT_UNSPECIFIED: Fit
FIT_SQUASH: Fit
FIT_PAD: Fit
FIT_TILES: Fit
FIT_AUTO: Fit
VIDEO_SAMPLING_UNSPECIFIED: VideoSampling
VIDEO_SAMPLING_UNIFORM: VideoSampling
VIDEO_SAMPLING_CHANGE: VideoSampling
PRIORITY_UNSPECIFIED: Priority
PRIORITY_NORMAL: Priority
PRIORITY_LOW: Priority
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
ABSTAIN_REASON_UNSPECIFIED: AbstainReason
ABSTAIN_REASON_NOT_FOUND: AbstainReason
ABSTAIN_REASON_UNSURE: AbstainReason
ABSTAIN_REASON_UNFAMILIAR_IMAGE: AbstainReason
CACHE_UNSPECIFIED: Cache
CACHE_HIT: Cache
CACHE_MISS: Cache

class Part(_message.Message):
    __slots__ = ("text", "image", "image_id", "image_url", "video", "video_id", "video_url", "frames")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_URL_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    VIDEO_URL_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: bytes
    image_id: str
    image_url: str
    video: bytes
    video_id: str
    video_url: str
    frames: Frames
    def __init__(self, text: _Optional[str] = ..., image: _Optional[bytes] = ..., image_id: _Optional[str] = ..., image_url: _Optional[str] = ..., video: _Optional[bytes] = ..., video_id: _Optional[str] = ..., video_url: _Optional[str] = ..., frames: _Optional[_Union[Frames, _Mapping]] = ...) -> None: ...

class Frames(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    def __init__(self, frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("image", "image_id", "image_url")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_URL_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    image_id: str
    image_url: str
    def __init__(self, image: _Optional[bytes] = ..., image_id: _Optional[str] = ..., image_url: _Optional[str] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("parts", "answer")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    answer: str
    def __init__(self, parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., answer: _Optional[str] = ...) -> None: ...

class Range(_message.Message):
    __slots__ = ("least", "most")
    LEAST_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    least: int
    most: int
    def __init__(self, least: _Optional[int] = ..., most: _Optional[int] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("vision_tokens", "visual_tokens")
    VISION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    vision_tokens: Range
    visual_tokens: Range
    def __init__(self, vision_tokens: _Optional[_Union[Range, _Mapping]] = ..., visual_tokens: _Optional[_Union[Range, _Mapping]] = ...) -> None: ...

class AnswerRequest(_message.Message):
    __slots__ = ("parts", "turns", "budget", "detail", "max_tokens", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "stop", "priority", "explain", "choices", "regex", "json_schema", "min_confidence", "logprobs", "top_logprobs", "system", "fit", "video_frames", "video_sampling", "page")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    MIN_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FRAMES_FIELD_NUMBER: _ClassVar[int]
    VIDEO_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    budget: Budget
    detail: Detail
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    repetition_penalty: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    priority: Priority
    explain: bool
    choices: _containers.RepeatedScalarFieldContainer[str]
    regex: str
    json_schema: str
    min_confidence: float
    logprobs: bool
    top_logprobs: int
    system: str
    fit: Fit
    video_frames: int
    video_sampling: VideoSampling
    page: int
    def __init__(self, parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ..., detail: _Optional[_Union[Detail, str]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., explain: _Optional[bool] = ..., choices: _Optional[_Iterable[str]] = ..., regex: _Optional[str] = ..., json_schema: _Optional[str] = ..., min_confidence: _Optional[float] = ..., logprobs: _Optional[bool] = ..., top_logprobs: _Optional[int] = ..., system: _Optional[str] = ..., fit: _Optional[_Union[Fit, str]] = ..., video_frames: _Optional[int] = ..., video_sampling: _Optional[_Union[VideoSampling, str]] = ..., page: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "image_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., image_tokens: _Optional[int] = ...) -> None: ...

class Vision(_message.Message):
    __slots__ = ("cache", "vision_tokens", "visual_tokens", "detail", "reduced", "familiar", "fit", "frames")
    CACHE_FIELD_NUMBER: _ClassVar[int]
    VISION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
    FAMILIAR_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    cache: Cache
    vision_tokens: int
    visual_tokens: int
    detail: Detail
    reduced: bool
    familiar: float
    fit: Fit
    frames: _containers.RepeatedCompositeFieldContainer[SeenFrame]
    def __init__(self, cache: _Optional[_Union[Cache, str]] = ..., vision_tokens: _Optional[int] = ..., visual_tokens: _Optional[int] = ..., detail: _Optional[_Union[Detail, str]] = ..., reduced: _Optional[bool] = ..., familiar: _Optional[float] = ..., fit: _Optional[_Union[Fit, str]] = ..., frames: _Optional[_Iterable[_Union[SeenFrame, _Mapping]]] = ...) -> None: ...

class SeenFrame(_message.Message):
    __slots__ = ("index", "time_s", "relevance", "image_id")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    index: int
    time_s: float
    relevance: Relevance
    image_id: str
    def __init__(self, index: _Optional[int] = ..., time_s: _Optional[float] = ..., relevance: _Optional[_Union[Relevance, _Mapping]] = ..., image_id: _Optional[str] = ...) -> None: ...

class TimingMs(_message.Message):
    __slots__ = ("queue", "load", "vision", "first_token", "total")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    VISION_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    queue: float
    load: float
    vision: float
    first_token: float
    total: float
    def __init__(self, queue: _Optional[float] = ..., load: _Optional[float] = ..., vision: _Optional[float] = ..., first_token: _Optional[float] = ..., total: _Optional[float] = ...) -> None: ...

class Relevance(_message.Message):
    __slots__ = ("map", "propositional", "perspectival", "participatory", "levels", "tensions", "area")
    MAP_FIELD_NUMBER: _ClassVar[int]
    PROPOSITIONAL_FIELD_NUMBER: _ClassVar[int]
    PERSPECTIVAL_FIELD_NUMBER: _ClassVar[int]
    PARTICIPATORY_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    TENSIONS_FIELD_NUMBER: _ClassVar[int]
    AREA_FIELD_NUMBER: _ClassVar[int]
    map: _containers.RepeatedScalarFieldContainer[float]
    propositional: _containers.RepeatedScalarFieldContainer[float]
    perspectival: _containers.RepeatedScalarFieldContainer[float]
    participatory: _containers.RepeatedScalarFieldContainer[float]
    levels: _containers.RepeatedScalarFieldContainer[int]
    tensions: Tensions
    area: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, map: _Optional[_Iterable[float]] = ..., propositional: _Optional[_Iterable[float]] = ..., perspectival: _Optional[_Iterable[float]] = ..., participatory: _Optional[_Iterable[float]] = ..., levels: _Optional[_Iterable[int]] = ..., tensions: _Optional[_Union[Tensions, _Mapping]] = ..., area: _Optional[_Iterable[float]] = ...) -> None: ...

class Tensions(_message.Message):
    __slots__ = ("particularize", "explore", "diversify")
    PARTICULARIZE_FIELD_NUMBER: _ClassVar[int]
    EXPLORE_FIELD_NUMBER: _ClassVar[int]
    DIVERSIFY_FIELD_NUMBER: _ClassVar[int]
    particularize: float
    explore: float
    diversify: float
    def __init__(self, particularize: _Optional[float] = ..., explore: _Optional[float] = ..., diversify: _Optional[float] = ...) -> None: ...

class TokenLogProb(_message.Message):
    __slots__ = ("token", "logprob", "top_logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogProb]
    def __init__(self, token: _Optional[bytes] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogProb, _Mapping]]] = ...) -> None: ...

class AnswerResponse(_message.Message):
    __slots__ = ("id", "model", "answer", "finish_reason", "image_ids", "usage", "vision", "timing_ms", "relevance", "confidence", "found", "abstained", "abstain_reason", "logprobs", "variant", "fallback_from", "video_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    IMAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    VISION_FIELD_NUMBER: _ClassVar[int]
    TIMING_MS_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ABSTAINED_FIELD_NUMBER: _ClassVar[int]
    ABSTAIN_REASON_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FROM_FIELD_NUMBER: _ClassVar[int]
    VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    answer: str
    finish_reason: FinishReason
    image_ids: _containers.RepeatedScalarFieldContainer[str]
    usage: Usage
    vision: Vision
    timing_ms: TimingMs
    relevance: _containers.RepeatedCompositeFieldContainer[Relevance]
    confidence: float
    found: float
    abstained: bool
    abstain_reason: AbstainReason
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogProb]
    variant: str
    fallback_from: str
    video_id: str
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., answer: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., image_ids: _Optional[_Iterable[str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., vision: _Optional[_Union[Vision, _Mapping]] = ..., timing_ms: _Optional[_Union[TimingMs, _Mapping]] = ..., relevance: _Optional[_Iterable[_Union[Relevance, _Mapping]]] = ..., confidence: _Optional[float] = ..., found: _Optional[float] = ..., abstained: _Optional[bool] = ..., abstain_reason: _Optional[_Union[AbstainReason, str]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogProb, _Mapping]]] = ..., variant: _Optional[str] = ..., fallback_from: _Optional[str] = ..., video_id: _Optional[str] = ...) -> None: ...

class AnswerEvent(_message.Message):
    __slots__ = ("delta", "end")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    delta: str
    end: AnswerResponse
    def __init__(self, delta: _Optional[str] = ..., end: _Optional[_Union[AnswerResponse, _Mapping]] = ...) -> None: ...

class PutImageRequest(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class PutImageResponse(_message.Message):
    __slots__ = ("id", "bytes", "width", "height", "expires_at", "pages")
    ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    id: str
    bytes: int
    width: int
    height: int
    expires_at: _timestamp_pb2.Timestamp
    pages: int
    def __init__(self, id: _Optional[str] = ..., bytes: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pages: _Optional[int] = ...) -> None: ...

class BatchRequest(_message.Message):
    __slots__ = ("index", "question", "timeout_s")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    index: int
    question: AnswerRequest
    timeout_s: float
    def __init__(self, index: _Optional[int] = ..., question: _Optional[_Union[AnswerRequest, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class BatchResponse(_message.Message):
    __slots__ = ("index", "answer", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    answer: AnswerResponse
    error: Error
    def __init__(self, index: _Optional[int] = ..., answer: _Optional[_Union[AnswerResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("status", "code", "message", "type", "param")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    status: int
    code: str
    message: str
    type: str
    param: str
    def __init__(self, status: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., type: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...
