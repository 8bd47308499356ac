"""Turn the messages of a chat into a question with earlier turns, and our names of fields into the chat's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from service.core.errors import InvalidRequest
from service.core.request import Clip, Detail, Exchange, ImageId, ImageSource, Part, Text
from service.edges.asking import Fields, Names, naming
from service.edges.http.faults import UNSUPPORTED
from service.edges.image_text import source_of
from service.edges.openai.schema import PART_TYPES, ChatMessage, ChatRequest, ContentPart, FileContent

# Those that the core takes as they are.
PLAIN_FIELDS = (
    *("temperature", "top_k", "top_p", "seed", "repetition_penalty", "stop", "vision_tokens", "visual_tokens"),
    *("timeout_s", "priority", "stream", "choices", "regex", "json_schema", "min_confidence", "fit"),
    *("video_frames", "video_sampling", "page"),
)
SYSTEM = ("system", "developer")


def fields_of(chat: ChatRequest, images: Mapping[str, ImageSource] = MappingProxyType({})) -> tuple[Fields, Names]:
    """Turn a chat into a question. `images` are those that were read before, by their URLs.

    Raises InvalidRequest, in the chat's names.

    Errors that come later name our fields: `naming` turns them into the chat's.
    """
    if not chat.messages:
        raise InvalidRequest("messages is empty: add the user's question", param="messages")
    talk = _Conversation(images)
    for index, message in enumerate(chat.messages):
        talk.add(f"messages.{index}", message)
    talk.end(f"messages.{len(chat.messages) - 1}")
    if chat.stream_options is not None and not chat.stream:
        raise InvalidRequest("stream_options needs stream: set stream to true", param="stream_options")
    max_tokens = _max_tokens(chat)
    names = talk.names | {"budget.vision_tokens": "vision_tokens", "budget.visual_tokens": "visual_tokens"}
    given = {name: value for name in PLAIN_FIELDS if (value := getattr(chat, name)) is not None}
    if max_tokens:
        name, given["max_tokens"] = max_tokens
        names["max_tokens"] = name
    if talk.details:
        place, given["detail"] = talk.details[0]
        names["detail"] = place
    if chat.response_format is not None and (schema := chat.response_format.schema_of_answer()) is not None:
        if chat.json_schema is not None:
            raise InvalidRequest("response_format and json_schema are both given: leave one out", param="json_schema")
        given["json_schema"], names["json_schema"] = schema, "response_format"
    given |= {"log_probs": bool(chat.logprobs), "top_log_probs": chat.top_logprobs or 0}
    system = " ".join(talk.system)
    return Fields(parts=tuple(talk.asked), turns=tuple(talk.turns), system=system, **given), names


def _max_tokens(chat: ChatRequest) -> tuple[str, int] | None:
    """Return the name that the caller used, and the value."""
    if chat.max_completion_tokens is None:
        return None if chat.max_tokens is None else ("max_tokens", chat.max_tokens)
    if chat.max_tokens is not None:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens are both given: leave max_tokens out", param="max_tokens"
        )
    return "max_completion_tokens", chat.max_completion_tokens


@dataclass(slots=True)
class _Conversation:
    """Collect messages in order. Several messages of the user in succession are one question."""

    read: Mapping[str, ImageSource]  # images and videos, by their URLs
    system: list[str] = field(default_factory=list)
    turns: list[Exchange] = field(default_factory=list)
    asked: list[Part] = field(default_factory=list)  # of the question that has no answer yet
    names: dict[str, str] = field(default_factory=lambda: {"images": "messages", "turns": "messages"})
    images: list[str] = field(default_factory=list)  # their places, in order
    video: str = ""  # its place
    details: list[tuple[str, Detail]] = field(default_factory=list)  # that are given, each with its place
    is_asked: bool = False

    def add(self, place: str, message: ChatMessage) -> None:
        content = f"{place}.content"
        if message.parsed is not None and message.role != "assistant":
            raise InvalidRequest(
                f"{place}.parsed is given, and only an assistant's message may have it: leave it out",
                param=f"{place}.parsed",
                code=UNSUPPORTED,
            )
        if message.role == "user":
            self.asked += self._parts(content, message)
            self.names["question"] = content
            self.is_asked = True
        elif message.role in SYSTEM:
            if self.is_asked or self.turns:
                raise InvalidRequest(
                    f"{place} is a {message.role} message behind others: put it first", param=f"{place}.role"
                )
            self.system.append(_text(content, message))
            self.names.setdefault("system", content)
        else:
            if not self.is_asked:
                raise InvalidRequest(
                    f"{place} is the assistant's, and no message of the user's stands before it: leave it out",
                    param=f"{place}.role",
                )
            turn = f"turns.{len(self.turns)}"
            self.names |= {f"{turn}.question": self.names["question"], f"{turn}.answer": content}
            self.turns.append(Exchange(tuple(self.asked), _text(content, message)))
            self.asked, self.is_asked = [], False

    def end(self, last: str) -> None:
        """Check the whole. Raises InvalidRequest."""
        if not self.is_asked:
            raise InvalidRequest(f"{last} must be the user's question: add one", param=f"{last}.role")
        if not self.images and not self.video:
            raise InvalidRequest(
                'messages have no image or video: add {"type": "image_url", "image_url": {"url": '
                '"data:image/png;base64,..."}} to the content of the user\'s message',
                param="messages",
                code="missing_field",
            )
        self.names |= {f"images.{index}": place for index, place in enumerate(self.images)}
        if self.images:
            self.names["image"] = self.images[0]  # of one image; an error about several has its index
        if self.video:
            self.names["video"] = self.video
        for place, detail in self.details:
            if detail != self.details[0][1]:
                raise InvalidRequest(
                    f"{place} is {detail!r}, and {self.details[0][0]} is {self.details[0][1]!r}: give all images one "
                    "detail",
                    param=place,
                )

    def _parts(self, content: str, message: ChatMessage) -> Iterator[Part]:
        for place, part in _content(content, message):
            if part.video_url is not None:
                yield self._video(f"{place}.video_url", part.video_url.url)
                continue
            if part.file is not None:
                yield self._file(f"{place}.file", part.file)
                continue
            if part.image_url is None:
                yield Text(_text_of(place, part))
                continue
            self.images.append(f"{place}.image_url")
            if part.image_url.detail is not None:
                self.details.append((f"{place}.image_url.detail", part.image_url.detail))
            with naming({"image": f"{place}.image_url"}):
                yield self.read.get(part.image_url.url) or source_of(part.image_url.url)

    def _file(self, place: str, file: FileContent) -> ImageSource:
        """Return a file, which is seen as an image is. Raises InvalidRequest."""
        if (file.file_data is None) == (file.file_id is None):
            raise InvalidRequest(
                f"{place} needs one of file_data and file_id: send the file's bytes or its id", param=place
            )
        if file.file_id is not None:
            self.images.append(f"{place}.file_id")
            return ImageId(file.file_id.strip())
        self.images.append(f"{place}.file_data")
        data = file.file_data or ""
        with naming({"image": f"{place}.file_data"}):
            return self.read.get(data) or source_of(data)

    def _video(self, place: str, url: str) -> Clip:
        if self.video:
            raise InvalidRequest(
                f"{place} is a second video beside {self.video}: ask about one video at a time", param=place
            )
        self.video = place
        with naming({"image": place}):
            return Clip(self.read.get(url) or source_of(url))


def places_of_images(chat: ChatRequest) -> Iterator[tuple[str, str]]:
    """Yield the place and the URL of each image and video."""
    for index, message in enumerate(chat.messages):
        for number, part in enumerate(message.content if isinstance(message.content, tuple) else ()):
            place = f"messages.{index}.content.{number}"
            if part.image_url is not None:
                yield f"{place}.image_url", part.image_url.url
            if part.video_url is not None:
                yield f"{place}.video_url", part.video_url.url
            if part.file is not None and part.file.file_data is not None:
                yield f"{place}.file.file_data", part.file.file_data


def _content(content: str, message: ChatMessage) -> Iterator[tuple[str, ContentPart]]:
    """Yield the parts, each with its place. Raises InvalidRequest for a part without what its type says."""
    if isinstance(message.content, str):
        yield content, ContentPart(type="text", text=message.content)
        return
    for index, part in enumerate(message.content or ()):
        place = f"{content}.{index}"
        if getattr(part, part.type) is None:
            raise InvalidRequest(
                f"the field {place}.{part.type} is missing", param=f"{place}.{part.type}", code="missing_field"
            )
        for other in PART_TYPES:
            if other != part.type and getattr(part, other) is not None:
                raise InvalidRequest(
                    f"{place} has the type {part.type}: send {other} as a part of its own", param=f"{place}.{other}"
                )
        yield place, part


def _text(content: str, message: ChatMessage) -> str:
    """Return the text of a message that may hold nothing else. Raises InvalidRequest."""
    return " ".join(_text_of(place, part) for place, part in _content(content, message))


def _text_of(place: str, part: ContentPart) -> str:
    if part.text is None:
        kind = part.type.removesuffix("_url")
        raise InvalidRequest(
            f"{place} is {'an' if kind == 'image' else 'a'} {kind}: {kind}s go into messages of the user",
            param=f"{place}.{part.type}",
            code=UNSUPPORTED,
        )
    return part.text
