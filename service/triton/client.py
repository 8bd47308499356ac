"""See, attend and generate on Triton, with the gateway's own types."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import grpc  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from service.core.card import ModelCard
from service.core.errors import DeadlineExceeded, GlimpseError, InternalError, Overloaded, Unavailable
from service.core.models import Generation
from service.core.prompt import Prompt, Question
from service.core.request import Budget, Sampling
from service.core.tensors import DTYPES, Arrays
from service.core.vision import (
    IMAGE_SIZE,
    QUESTION_TOKENS,
    CloserFeatures,
    Seen,
    SeenClip,
    UInt8Array,
    VisionFeatures,
    dense,
)
from service.triton import codec
from service.triton.calls import Calls, Metadata
from service.triton.contract import CALLED
from service.triton.errors import MESSAGES, naming_constraint

# The image of a probe of vqa: 1x1, black.
_PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")

PROBE_SHARE = 0.02  # of an idle model's time; a probe of ViT-B takes 0.5 s on a CPU


class TritonClient:
    """See, attend and generate on one or two Tritons. Every method raises GlimpseError only."""

    def __init__(self, vision_url: str, llm_url: str, metadata: Metadata = (), text_type: str = "UINT8") -> None:
        """`host:port` of Triton's gRPC, or `unix:` and the path of a socket. The two may be equal, and then share one
        channel. `metadata` goes with each `load` and `unload`. `text_type` is the card's."""
        self._text_type = text_type
        self._is_tensorrt_llm = text_type == "BYTES"
        self._calls = Calls(vision_url, llm_url, metadata)
        self._probe_took: dict[str, float] = {}  # seconds, the shortest: longer ones waited in a queue

    async def __aenter__(self) -> TritonClient:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Open the channels. The first call opens the connections."""
        await self._calls.connect()

    async def close(self) -> None:
        """End the calls in flight with Unavailable and close the channels."""
        await self._calls.close()

    @property
    def in_flight(self) -> int:
        """Calls that `abandon` could still end."""
        return self._calls.in_flight

    @property
    def is_idle(self) -> bool:
        """Whether no call is in flight, also none that nobody waits for."""
        return self._calls.is_idle

    async def see(
        self, image: UInt8Array, question: Question, budget: Budget, timeout_s: float
    ) -> tuple[VisionFeatures, Seen]:
        """Encode and attend in one call. `image` is RGB [3, 224, 224]."""
        arrays = await self._calls.infer(
            "see", {"image": image[np.newaxis], **codec.asked(question, budget)}, timeout_s
        )
        return codec.features(arrays)[0], codec.seen(arrays, budget)

    async def encode(self, images: UInt8Array, timeout_s: float) -> list[VisionFeatures]:
        """Encode one batch, without a question. `images` is RGB [N, 3, 224, 224]."""
        return codec.features(await self._calls.infer("vision_encoder", {"image": images}, timeout_s))

    async def attend(
        self,
        vision: VisionFeatures,
        question: Question,
        budget: Budget,
        timeout_s: float,
        closer: CloserFeatures | None = None,
    ) -> Seen:
        """Attend to features that an earlier `see` or `encode` gave. `closer` allows level 2."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "features": dense(vision.features)[np.newaxis],
            "saliency": vision.saliency[np.newaxis],
            "entropy": vision.entropy[np.newaxis],
            "texture": vision.texture[np.newaxis],
            **codec.asked(question, budget),
        }
        if closer is None:
            return codec.seen(await self._calls.infer("attend", tensors, timeout_s), budget)
        tensors["detail_features"] = dense(closer.features)[np.newaxis]
        return replace(codec.seen(await self._calls.infer("attend_448", tensors, timeout_s), budget), detail="high")

    async def attend_clip(
        self,
        frames: Sequence[VisionFeatures],
        times: Sequence[float],
        question: Question,
        budget: Budget,
        timeout_s: float,
    ) -> SeenClip:
        """Attend to the features of a clip's frames together. `times` are from 0 to 1, `budget` is that of the clip.

        The request has megabytes, so a thread makes it.
        """
        begun = time.monotonic()
        request = await asyncio.to_thread(codec.clip_request, frames, times, question, budget)
        left_s = timeout_s - (time.monotonic() - begun)
        return codec.seen_clip(await self._calls.send("attend_clip", request, left_s), budget)

    async def generate(self, generation: Generation, timeout_s: float) -> AsyncGenerator[tuple[int, ...], None]:
        """Yield token ids as they come, `end_id` included if it was generated.

        TensorRT-LLM never sends `end_id`: it is added if an answer ends before its most tokens. It tells no log
        probability of it either.

        Closing the generator stops the sequence; the model then ends the stream. Raises Unavailable if no token follows
        the last one within `stall_timeout_s`.
        """
        codec.require_consistent(generation.prompt)
        request_id, log_probs = generation.request_id, generation.log_probs
        inputs = codec.llm_inputs(generation, self._text_type)

        def request(tensors: Arrays) -> bytes:
            return codec.request("llm", tensors, request_id, for_tensorrt_llm=self._is_tensorrt_llm)

        def stop() -> grpc.aio.UnaryStreamCall:
            return self._calls.stream("llm", request(inputs | {"stop": np.array([[True]])}))

        left = generation.sampling.max_tokens
        responses = self._calls.responses("llm", request(inputs), timeout_s, generation.stall_timeout_s, stop)
        with naming_constraint(generation.sampling.guide):
            async with contextlib.aclosing(responses):
                async for response in responses:
                    try:
                        if log_probs is None:
                            tokens = codec.tokens(response)
                        else:
                            tokens, told = codec.tokens_with_log_probs(response)
                            log_probs += told
                    except (LookupError, TypeError, ValueError) as exc:  # another repository's outputs
                        raise Unavailable(MESSAGES[Unavailable].format(model="llm"), cause=str(exc)) from exc
                    left -= len(tokens)
                    if tokens:
                        yield tokens
        if self._is_tensorrt_llm and left > 0 and generation.end_id >= 0:
            yield (generation.end_id,)

    async def answer(
        self, image_bytes: bytes, question: str, *, max_tokens: int, timeout_s: float, stall_timeout_s: float = 5.0
    ) -> AsyncGenerator[bytes, None]:
        """Stream the greedy answer of the `vqa` ensemble, as a plain Triton client gets it.

        The gateway does not answer requests with it, because a cancel does not reach a running step of an ensemble.
        """
        tensors: dict[str, npt.NDArray[Any]] = {
            "image_bytes": np.frombuffer(image_bytes, np.uint8)[np.newaxis],
            "question": np.frombuffer(question.encode(), np.uint8)[np.newaxis],
            "max_tokens": np.array([[max_tokens]], np.int32),
        }
        responses = self._calls.responses("vqa", codec.request("vqa", tensors), timeout_s, stall_timeout_s)
        async with contextlib.aclosing(responses):
            async for response in responses:
                for content in response.raw_output_contents:
                    yield content

    async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
        """Run one inference of a model of CALLED with the least work. Raises Unavailable, whatever went wrong.

        No inference is run if every step of the model answered a request within the last `fresh_s` seconds. A `fresh_s`
        above 0 is raised, if necessary, so that probes of an idle model take less than PROBE_SHARE of the time. If the
        probe times out, but the steps that the model shares with others answered meanwhile, it is busy, not dead.
        """
        begun = time.monotonic()
        steps = set(CALLED[model].through) if model in CALLED else {model}
        if fresh_s:
            fresh_s = max(fresh_s, self._probe_took.get(model, 0.0) / PROBE_SHARE)
        if model not in self._calls.failing() and steps <= self._calls.answering_since(begun - fresh_s):
            return
        try:
            await self._probe(model, card, timeout_s)
            took = time.monotonic() - begun
            self._probe_took[model] = min(took, self._probe_took.get(model, took))
        except Overloaded:
            return  # it is alive
        except Unavailable:
            raise
        except GlimpseError as exc:
            shared = steps & {step for name, other in CALLED.items() if name != model for step in other.through}
            if isinstance(exc, DeadlineExceeded) and shared and shared <= self._calls.answering_since(begun):
                return
            why = f"no answer in {timeout_s:g} s" if isinstance(exc, DeadlineExceeded) else exc.message
            raise Unavailable(f"the model {model} does not answer its probe: {why}", cause=exc.cause) from exc

    async def _probe(self, model: str, card: ModelCard, timeout_s: float) -> None:
        question = Question(np.zeros(QUESTION_TOKENS, np.int32), np.zeros(QUESTION_TOKENS, np.int32))
        budget = Budget((card.vision_tokens[0],) * 2, (card.visual_tokens[0],) * 2)
        match model:
            case "see":
                await self.see(np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8), question, budget, timeout_s)
            case "attend" | "attend_448":
                first, second = (
                    {name: np.zeros(shape, DTYPES[card.type_of(name)]) for name, shape in shapes.items()}
                    for shapes in card.feature_shapes.values()
                )
                closer = CloserFeatures(**second) if model == "attend_448" else None
                await self.attend(VisionFeatures(**first), question, budget, timeout_s, closer)
            case "attend_clip":
                shapes = card.feature_shapes[IMAGE_SIZE]
                blank = VisionFeatures(**{name: np.zeros(s, DTYPES[card.type_of(name)]) for name, s in shapes.items()})
                await self.attend_clip([blank], [0.0], question, budget, timeout_s)
            case "llm":
                for clip_weights in (False, True) if card.clip_weights else (False,):
                    await self._probe_llm(card, clip_weights, timeout_s)
            case "vqa":
                pieces = self.answer(_PNG, "?", max_tokens=1, timeout_s=timeout_s)
                async with contextlib.aclosing(pieces):
                    async for _ in pieces:
                        pass
            case _:
                raise InternalError(f"no probe for the model {model}")

    async def _probe_llm(self, card: ModelCard, clip_weights: bool, timeout_s: float) -> None:
        prompt = Prompt(
            input_ids=np.array([card.vocab_size, 0], np.int32),  # not the end id: a card may have none, -1
            visual_tokens=np.zeros((1, card.hidden_size), DTYPES[card.float_type]),
            extra_ids=np.array([1, 0], np.uint64),
            clip_weights=clip_weights,
        )
        generation = Generation(
            prompt,
            Sampling(max_tokens=1),
            end_id=card.end_id,
            pad_id=card.pad_id,
            request_id=f"probe-{uuid4().hex}",  # closing a stream stops by id, and another gateway probes too
            stall_timeout_s=timeout_s,
        )
        async with contextlib.aclosing(self.generate(generation, timeout_s)) as tokens:
            async for _ in tokens:
                pass

    def failing(self, model: str) -> bool:
        """Whether requests lately found that the model, or one that it needs, does not answer."""
        return any(set(CALLED[name].through) <= set(CALLED[model].through) for name in self._calls.failing())

    async def ready(self, timeout_s: float = 1.0) -> bool:
        """Return whether every server reports ready. Triton does so even if a model's process is dead: see `probe`."""
        return await self._calls.ready(timeout_s)

    async def load(self, model: str, timeout_s: float = 60.0) -> None:
        """Load a model and the ensembles that wait for it."""
        await self._calls.load(model, timeout_s)

    async def unload(self, model: str, timeout_s: float = 60.0) -> None:
        await self._calls.unload(model, timeout_s)

    def abandon(self, lost: str) -> None:
        """End every request in flight that needs the model `lost`, at once, with Unavailable."""
        self._calls.abandon(lost)

    def unhealthy(self) -> set[str]:
        """Return the models whose process did not report to Triton, by requests since the last call of this."""
        return self._calls.unhealthy()
