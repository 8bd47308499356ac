"""Turn a question into ids for the allocator and the LLM, and the answer's tokens into text."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import dropwhile
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import Unigram

from service.core.card import LLM_TOKENIZER, ImageMarks, ModelCard
from service.core.errors import InvalidRequest
from service.core.frames import MAX_FRAMES
from service.core.prompt import Prompt, Question
from service.core.request import Clip, Part, Request, Text
from service.core.vision import QUESTION_TOKENS, FloatArray

KEPT_TEXTS = 256
KEPT_CHARS = 4_000  # of a text that is kept: twice a question's most


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizers` file. It reads the name of a special token in a question as plain text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    if isinstance(tokenizer.model, Unigram):
        _cut_special_names(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _cut_special_names(tokenizer: Tokenizer) -> None:
    """Cut the names of special tokens in a text after their first character.

    SentencePiece's control tokens are pieces of a unigram vocabulary too, so a text's `</s>` would become one.
    """
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if names:
        pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1)
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer is not None else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])


Piece = str | None  # of a prompt: text, or the place of the next image


class PromptBuilder:
    """Build BLIP-2's prompt: the visual tokens, BOS, then the card's template with the question.

    A FlanT5 has learnt no BOS, but an end token after the whole prompt. An IDEFICS reads BOS first, and marks around
    each image's visual tokens (`ImageMarks`).

    Earlier questions come first, in the same template, each with its answer: "Question: a Answer: b Question: c
    Answer:". A system message, in the card's `system_template`, stands directly before the first question's template.
    The allocator and the Q-Former read the last question only.

    A clip's visual tokens stand in its place without a text between its frames, as those of several images do.

    An image's visual tokens take the image's place in the prompt:
      - If the image comes before all text of its question, they come before the template: `<image> Question: a
        Answer:`. At the start of the prompt they also come before BOS.
      - Otherwise, if the card is not `interleaved`, they come there too, in the images' order.
      - Otherwise they come inside the template, directly after the text before the image. Spaces join the texts as if
        there were no image between them. Each text between images is tokenised separately:
        `Question: a <image> b Answer:` becomes the text "Question: a", the visual tokens, and the text " b Answer:".
        For an IDEFICS, no text begins or ends with a space, as in IdeficsProcessor.
    """

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, qformer_tokenizer: Tokenizer | None = None) -> None:
        """Pass `qformer_tokenizer` if the Q-Former reads the question in its own ids."""
        self.card = card
        self.tokenizer = tokenizer if card.image_marks is None else _never_first(tokenizer)
        self.qformer_tokenizer = qformer_tokenizer
        self._first = [] if card.bos_id is None else [card.bos_id]
        self._last = [] if card.text_end_id is None else [card.text_end_id]
        # A request's texts are encoded to count their tokens, and again for its prompt.
        self._kept = lru_cache(KEPT_TEXTS)(self._encoded)
        if qformer_tokenizer is not None:
            qformer_tokenizer.enable_truncation(QUESTION_TOKENS)  # cuts the words, and keeps [CLS] and [SEP]

    @classmethod
    def load(cls, card: ModelCard, repository: Path) -> Self:
        """Load the files that the card names. Raises Exception, as `tokenizers` does, if a file cannot be read."""
        own = None if card.question_tokenizer == LLM_TOKENIZER else load_tokenizer(repository / card.question_tokenizer)
        return cls(card, load_tokenizer(repository / LLM_TOKENIZER), own)

    def question(self, text: str) -> Question:
        """Return the question for the allocator and InstructBLIP's Q-Former. It is cut to QUESTION_TOKENS.

        The ids are the bare question's in the LLM's vocabulary, without BOS. If a Q-Former reads it by its own
        tokenizer, they are the whole prompt's in its vocabulary, with its special tokens, as InstructBlipProcessor
        does; or the bare question's, as the card says. Padding is id 0: every vocabulary has it, and the mask hides it.
        """
        if self.qformer_tokenizer is None:
            ids = self._encode(text)[:QUESTION_TOKENS]
        else:
            ids = self.qformer_tokenizer.encode(text if self.card.question_alone else self._prompt(text)).ids
        padding = [0] * (QUESTION_TOKENS - len(ids))
        return Question(
            ids=np.array(ids + padding, np.int32),
            mask=np.array([1] * len(ids) + padding, np.int32),
        )

    def text_ids(self, question: str) -> list[int]:
        """Return the ids of the template with the question, after BOS or before the text's end token.

        Visual tokens of one image belong at `place_of_image`.
        """
        pieces = [self._prompt(question)] if self.card.image_marks is None else [None, self._prompt(question)]
        return [each for ids in self._layout(pieces) if ids is not None for each in ids]

    def frames(self, request: Request) -> int:
        """Return how many frames of the request's clip are looked at, at most; 0 without a clip.

        If the request does not say, it is the card's number, or as many as fit into the model's positions.
        """
        if (clip := request.clip) is None:
            return 0
        most = min(self.card.frames if clip.frames is None else clip.frames, self.card.most_frames)
        if isinstance(clip.source, tuple):
            most = min(most, len(clip.source))
        if clip.frames is None:
            return max(self._frames_that_fit(request, most), 1)
        return most

    def pictures(self, request: Request) -> int:
        """Count the images, and the frames of the clip whose features are needed, at most."""
        clip, frames = request.clip, self.frames(request)
        if clip is not None and clip.sampling == "change":
            frames = len(clip.source) if isinstance(clip.source, tuple) else MAX_FRAMES
        return len(request.images) + frames

    def visual_tokens(self, request: Request) -> int:
        """Count the visual tokens of all images and of the clip, at the budget's most."""
        return self._visual_tokens(request, self.frames(request))

    def _visual_tokens(self, request: Request, frames: int) -> int:
        each, images = request.budget.visual_tokens[1], len(request.images)
        if self.card.clip is not None and frames:
            return images * each + self.card.clip.visual_tokens
        return (images + frames) * each

    def _prompt_tokens(self, request: Request, frames: int) -> int:
        """Count the text's tokens."""
        pieces = _pieces(self.card, request, self._places(frames))
        return sum(len(ids) for ids in self._layout(pieces) if ids is not None)

    def _places(self, frames: int) -> int:
        """Return how many places for visual tokens a clip of so many frames has in the prompt."""
        return 1 if self.card.clip is not None else frames

    def _frames_that_fit(self, request: Request, most: int) -> int:
        """Return the most frames, up to `most`, for which the request has room; 0 if none has."""
        room = self.card.max_positions - request.sampling.max_tokens
        for frames in range(most, 0, -1):
            visual = self._visual_tokens(request, frames)
            if visual <= self._visual_room and visual + self._prompt_tokens(request, frames) <= room:
                return frames
        return 0

    @property
    def _visual_room(self) -> int:
        """Return the most visual tokens of one request."""
        most = self.card.most_visual_tokens
        return self.card.max_positions if most is None else most

    def require_room(self, request: Request) -> int:
        """Count visual tokens at the budget's most, prompt tokens and answer tokens together.

        Raises InvalidRequest if they exceed the model's positions, or the visual tokens their own bound.
        """
        images, max_tokens, frames = len(request.images), request.sampling.max_tokens, self.frames(request)
        visual, prompt = self._visual_tokens(request, frames), self._prompt_tokens(request, frames)
        several = _of_several(images, frames)
        if self.card.most_visual_tokens is not None and visual > self.card.most_visual_tokens:
            self._refuse_visual(request, frames, f"{visual} visual tokens{several}")
        total = visual + prompt + max_tokens
        if total > self.card.max_positions:
            room = self.card.max_positions - visual - prompt
            fewer = self._frames_that_fit(request, frames - 1)
            if fewer:
                param, mend = "video_frames", f"{fewer} frames fit, so set video_frames to {fewer}"
            elif room > 0:
                param, mend = "max_tokens", f"lower max_tokens to {room}"
            elif images > 1:
                param, mend = "images", "ask about fewer images"
            elif request.exchanges:
                param, mend = "turns", "leave the earliest turns out"
            else:
                param, mend = "question", "shorten the question"
            raise InvalidRequest(
                f"{visual} visual{several} + {prompt} prompt + {max_tokens} max_tokens = {total} tokens, "
                f"{self.card.name} has room for {self.card.max_positions}: {mend}",
                param=param,
                code="context_length_exceeded",
            )
        return total

    def _refuse_visual(self, request: Request, frames: int, shown: str) -> NoReturn:
        """Raise InvalidRequest, which says how to show less."""
        if fewer := self._frames_that_fit(request, frames - 1):
            param, mend = "video_frames", f"{fewer} frames fit, so set video_frames to {fewer}"
        elif len(request.images) > 1:
            param, mend = "images", "ask about fewer images, or lower budget.visual_tokens"
        else:
            param, mend = "budget.visual_tokens", "lower budget.visual_tokens"
        raise InvalidRequest(
            f"{shown}, {self.card.name} has room for {self.card.most_visual_tokens} in one request: {mend}",
            param=param,
            code="context_length_exceeded",
        )

    def compose(self, question: str, images: Sequence[tuple[FloatArray, bytes]], *, is_clip: bool = False) -> Prompt:
        """Compose the prompt of some images, or of a clip, and then one question.

        `images` are as for `compose_request`; a clip has one entry, or one for each frame.
        """
        weights = self.card.clip_weights and (is_clip or len(images) > 1)
        return self._composed([*[None] * len(images), self._prompt(question)], images, clip_weights=weights)

    def compose_request(
        self,
        request: Request,
        images: Sequence[tuple[FloatArray, bytes]],
        clip: Sequence[tuple[FloatArray, bytes]] = (),
    ) -> Prompt:
        """Compose a request's prompt.

        `images` has one entry for each of the request's images, in order: visual tokens [N, H] and a key. The key names
        everything that decides them (image, question, budget, models). `clip` has one entry for each frame of its clip
        that is looked at, or one for all of them.
        """
        following, ordered = iter(images), list[tuple[FloatArray, bytes]]()
        for part in request.pictures:
            ordered += clip if isinstance(part, Clip) else [next(following)]
        weights = self.card.uses_clip_weights(request)
        return self._composed(_pieces(self.card, request, len(clip)), ordered, clip_weights=weights)

    def _composed(
        self, pieces: Iterable[Piece], images: Sequence[tuple[FloatArray, bytes]], *, clip_weights: bool
    ) -> Prompt:
        visual_tokens = images[0][0] if len(images) == 1 else np.concatenate([tokens for tokens, _ in images])
        visual_ids = np.arange(self.card.vocab_size, self.card.vocab_size + len(visual_tokens), dtype=np.int32)
        rows, following = 0, iter(images)
        input_ids: list[npt.NDArray[np.int32]] = []
        extra_ids: list[npt.NDArray[np.uint64]] = []
        for text in self._layout(pieces):
            if text is None:
                tokens, key = next(following)
                input_ids.append(visual_ids[rows : rows + len(tokens)])
                extra_ids.append(visual_token_ids(key, len(tokens)))
                rows += len(tokens)
            else:
                input_ids.append(np.array(text, np.int32))
                extra_ids.append(np.zeros(len(text), np.uint64))
        return Prompt(np.concatenate(input_ids), visual_tokens, np.concatenate(extra_ids), clip_weights)

    def _layout(self, pieces: Iterable[Piece]) -> Iterator[list[int] | None]:
        """Yield the ids of each text, and None at the place of an image.

        BOS comes before the first text, the text's end token after everything.
        """
        if self.card.image_marks is not None:
            yield from self._marked(pieces, self.card.image_marks)
            return
        start = self._first
        for piece in pieces:
            if piece is None:
                yield None
            else:
                yield start + self._encode(piece)
                start = []
        if self._last:
            yield self._last

    def _marked(self, pieces: Iterable[Piece], marks: ImageMarks) -> Iterator[list[int] | None]:
        """Yield BOS, texts without spaces around them, and marks around the places of images, as IdeficsProcessor."""
        yield self._first
        after_image = False
        for piece in pieces:
            if piece is None:
                yield [] if after_image else [marks.around]
                yield None
                yield [marks.image, marks.around]
                after_image = True
            elif text := piece.strip(" "):
                yield self._encode(text)
                after_image = False

    def _prompt(self, question: str) -> str:
        return self.card.prompt_template.replace("{question}", question)

    def _encode(self, text: str) -> list[int]:
        return list(self._kept(text)) if len(text) <= KEPT_CHARS else self._encoded(text)

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _never_first(tokenizer: Tokenizer) -> Tokenizer:
    """Let a tokenizer read each text as one that does not begin the prompt: BOS stands there.

    SentencePiece puts a space before the first text.
    """
    before = tokenizer.pre_tokenizer
    if isinstance(before, pre_tokenizers.Metaspace) and before.prepend_scheme == "first":
        before.prepend_scheme = "never"
        tokenizer.pre_tokenizer = before
    return tokenizer


def _of_several(images: int, frames: int) -> str:
    """Say for an error what is shown, if it is not just one image."""
    several = f"{images} images" if images > 1 or (images and frames) else ""
    several = " and ".join(filter(None, [several, f"{frames} frames" if frames else ""]))
    return several and f" of {several}"


def place_of_image(card: ModelCard, text_ids: Sequence[int] | npt.NDArray[np.int32]) -> int:
    """Return where the visual tokens belong in the ids of `PromptBuilder.text_ids`."""
    return 0 if card.image_marks is None else list(text_ids).index(card.image_marks.image)


def _pieces(card: ModelCard, request: Request, frames: int) -> list[Piece]:
    """Return the whole conversation in order. Texts without an image between them are one piece.

    `frames` is the number of places for visual tokens that the clip has.
    """
    pieces: list[Piece] = []

    def add(*following: Piece) -> None:
        for piece in following:
            if piece is not None and pieces and (before := pieces[-1]) is not None:
                pieces[-1] = before + piece
            else:
                pieces.append(piece)

    before = card.system_template.replace("{system}", request.system) if request.system else ""
    for exchange in request.exchanges:
        add(*_question_pieces(card, exchange.parts, before, frames), f" {exchange.answer}")
        before = " " if card.image_marks is None else "\n"
    add(*_question_pieces(card, request.parts, before, frames))
    return pieces


def _question_pieces(card: ModelCard, parts: Sequence[Part], before: str, frames: int) -> Iterator[Piece]:
    """Yield one question in its template, after the text `before`, with its images and its clip in place.

    An image before all of a question's text comes before `before` too, but after it for an IDEFICS.
    """
    head, _, tail = card.prompt_template.partition("{question}")
    if not card.interleaved:
        parts = sorted(parts, key=lambda part: isinstance(part, Text))
    inside = list(dropwhile(lambda part: not isinstance(part, Text), parts))
    images = [place for part in parts[: len(parts) - len(inside)] for place in _places_of(part, frames)]
    yield from [*images, before + head] if card.image_marks is None else [before, *images, head]
    for place, part in enumerate(inside):
        if isinstance(part, Text):
            yield (" " if place else "") + part.text
        else:
            yield from _places_of(part, frames)
    yield tail


def _places_of(part: Part, frames: int) -> list[None]:
    return [None] * (frames if isinstance(part, Clip) else 1)


def visual_token_ids(key: bytes, count: int) -> npt.NDArray[np.uint64]:
    """Return [count] ids >= 1, one a visual token.

    Equal ids mean equal embeddings, so an LLM server may share their keys and values.
    """
    ids = np.frombuffer(blake3(key).digest(length=8 * count), np.uint64)
    return np.maximum(ids, np.uint64(1))


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of each id; none for special tokens.

    It knows byte-level BPE (GPT-2, OPT) and SentencePiece with byte fallback (Llama, Vicuna). Raises ValueError for
    another kind of tokenizer.
    """
    description = json.loads(tokenizer.to_str())
    kinds = {str(step["type"]) for step in _steps(description["decoder"])}
    added = {token["id"]: token for token in description["added_tokens"]}
    if "ByteLevel" in kinds:
        spell = _spell_byte_level
    elif kinds & {"ByteFallback", "Metaspace"}:
        spell = _spell_sentencepiece
    else:
        raise ValueError(f"the tokenizer's decoder {sorted(kinds)} is neither byte-level nor SentencePiece")
    spelled = []
    for i in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        token = tokenizer.id_to_token(i)
        if i in added:
            spelled.append(b"" if added[i]["special"] else added[i]["content"].encode())
        else:
            spelled.append(spell(token) if token is not None else b"")
    return spelled


def _steps(decoder: dict[str, object] | None) -> Iterable[dict[str, object]]:
    if decoder is None:
        return []
    steps = decoder.get("decoders")
    return steps if isinstance(steps, list) else [decoder]


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: a printable byte is its own character, the others get code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()


def _spell_byte_level(token: str) -> bytes:
    return bytes(BYTE_OF[character] for character in token)


def _spell_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


class Detokeniser:
    """Turn one answer's tokens into text, as they come.

    Text is emitted once it is certain: whole characters only, and nothing that could be the start of a stop string.
    White space before the answer is dropped. The first complete stop string ends the answer and is not part of it. The
    text is the same, however the tokens are split over calls.
    """

    def __init__(self, spelled: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._spelled = spelled
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._started = False

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that these tokens make certain; "" after a stop string."""
        return self.push_bytes(b"".join(self._spelled[i] if 0 <= i < len(self._spelled) else b"" for i in ids))

    def push_bytes(self, data: bytes) -> str:
        if self.stopped:
            return ""
        text = self._held + self._utf8.decode(data)
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        end = self._stop_in(text)
        if end is not None:
            self.stopped, self._held = True, ""
            return text[:end]
        kept = self._possible_stop(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return the text held back so far; call it after the last token. It drops an unfinished character's bytes."""
        rest, self._held = self._held, ""
        return rest

    def _stop_in(self, text: str) -> int | None:
        """Return the start of the stop string that ends first, or None; of two that end together, the longer one's."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_stop(self, text: str) -> int:
        """Count the characters at the end that could be the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
