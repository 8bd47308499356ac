"""Small stand-ins for the two seams of service.pipeline, and a byte-level tokenizer to go with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image as Pillow
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from service.admission.admission import Admission
from service.app import gate_of, grpc_edge, http_edge, quotas_of, redis_tier, shared_images_of
from service.core.answer import Delta, Finished, KeptImage, LogProb
from service.core.card import ClipResampler, Engines, ModelCard
from service.core.models import Generation
from service.core.prompt import Prompt, Question
from service.core.request import Budget, ImageBytes, ImageId, ImageSource, Request, Sampling, Text
from service.core.vision import CloserFeatures, Relevance, Seen, SeenClip, VisionFeatures, dense
from service.media.decoder import ImageLimits
from service.media.fetch import ImageFetcher
from service.media.reader import ImageReader
from service.pipeline import Pipeline
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.text.prompt import PromptBuilder, token_bytes
from service.upstreams.models import Models
from service.upstreams.readiness import Readiness
from tests.support.samples import sample


def byte_level_tokenizer() -> Tokenizer:
    """Every byte is a token, some pairs are merged, and ids 0 to 2 are special."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red")]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "<pad>", "</s>")])
    return tokenizer


TOKENIZER = byte_level_tokenizer()
SPELLED = token_bytes(TOKENIZER)
CARD = ModelCard(
    name="tiny",
    fingerprint="f",
    visual_fingerprint="v",
    vocab_size=TOKENIZER.get_vocab_size(),
    hidden_size=4,
    vision_width=4,
    bos_id=0,
    end_id=2,
    pad_id=1,
    max_positions=192,
    prompt_template="Question: {question} Answer:",
    allocator_trained=True,
    vision_tokens=(64, 256),
    visual_tokens=(32, 32),
    interleaved=True,
    system_template="{system} ",
    top_log_probs=True,
)


# With a clip resampler, which reads a whole clip.
CLIPS = replace(CARD, max_positions=400, clip=ClipResampler(64, 32, (64, 256)))

# The same with a closer view and focus groups.
CLOSER = replace(CARD, closer_view=True, closer_view_at=0.6, visual_tokens=(32, 128))


def png(colour: tuple[int, int, int] = (200, 30, 40), size: tuple[int, int] = (224, 224)) -> bytes:
    out = BytesIO()
    Pillow.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def image_source(image: bytes | str) -> ImageSource:
    """A file, or the id of an image that was sent before."""
    return ImageId(image) if isinstance(image, str) else ImageBytes(image)


def asked(**changes: object) -> Request:
    """One question about one image."""
    parts = (image_source(png()), Text("what colour?"))
    return replace(Request("vqa_1", parts, Budget(), Sampling(max_tokens=16), timeout_s=10), **changes)


async def answered(house: House, request: Request) -> None:
    """Read the answer to its end."""
    async for _ in house.answer(request):
        pass


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


class FakeVision:
    """Sees, encodes and attends at once, or when `gate` is set; `fault` is raised instead where there is one.

    An image's features are its mean, and its visual tokens too: so it shows which image, and which view, was attended
    to.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.gated: tuple[str, ...] = ("see", "encode", "attend", "attend_448")  # the calls that wait at the gate
        self.fault: Exception | None = None
        self.fault_of: dict[str, Exception] = {}  # by the call that raises it
        self.map = np.full((16, 16), 0.5, np.float32)
        self.calls: list[str] = []
        self.budgets: list[Budget] = []
        self.sees_patches = False  # a patch's features are then its colour
        self.times: list[list[float]] = []
        self.shown: list[VisionFeatures] = []  # the frames of the last clip that was attended to
        self.particularize = 0.5
        self.jitter = 0.0  # added to the visual tokens of each call, times its number

    def close(self, *calls: str) -> None:
        """These wait until the gate is set."""
        self.gated = calls
        self.gate.clear()

    async def see(
        self, image: np.ndarray, question: Question, budget: Budget, timeout_s: float
    ) -> tuple[VisionFeatures, Seen]:
        assert image.shape == (3, 224, 224)
        await self._work("see")
        features = self._features(image)
        return features, self._seen(features, budget, 0)

    async def encode(self, images: np.ndarray, timeout_s: float) -> list[VisionFeatures]:
        assert images.shape[1:] == (3, 224, 224)
        await self._work(f"encode {len(images)}")
        return [self._features(image) for image in images]

    async def attend(
        self,
        vision: VisionFeatures,
        question: Question,
        budget: Budget,
        timeout_s: float,
        closer: CloserFeatures | None = None,
    ) -> Seen:
        await self._work("attend_448" if closer else "attend")
        if closer is None:
            return self._seen(vision, budget, 0)
        assert dense(closer.features).shape == (1024, 4)
        return replace(self._seen(vision, budget, 2), detail="high")

    async def attend_clip(
        self,
        frames: Sequence[VisionFeatures],
        times: Sequence[float],
        question: Question,
        budget: Budget,
        timeout_s: float,
    ) -> SeenClip:
        """The visual tokens are the mean of the frames."""
        await self._work(f"attend_clip {len(frames)}")
        self.budgets.append(budget)
        self.times.append(list(times))
        self.shown = list(frames)
        seen = [self._seen(frame, Budget(), 0) for frame in frames]
        mean = np.mean([each.visual_tokens.mean() for each in seen])
        tokens = np.full((budget.visual_tokens[1], 4), mean, np.float32)
        return SeenClip(tokens, tuple(each.relevance for each in seen), budget)

    async def _work(self, call: str) -> None:
        self.calls.append(call)
        if call.split(maxsplit=1)[0] in self.gated:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        if (fault := self.fault_of.get(call.split(maxsplit=1)[0])) is not None:
            raise fault

    def _features(self, image: np.ndarray) -> VisionFeatures:
        features = np.full((257, 4), image.mean(), np.float32)
        if self.sees_patches:
            patches = image.reshape(3, 16, 14, 16, 14).mean((2, 4)).reshape(3, 256).T
            features[1:] = np.concatenate([patches, 255 - patches[:, :1]], axis=1)
        return VisionFeatures(
            features,
            np.zeros(256, np.float32),
            np.zeros(256, np.float32),
            np.zeros((13, 16, 16), np.float32),
        )

    def _seen(self, vision: VisionFeatures, budget: Budget, level: int) -> Seen:
        self.budgets.append(budget)
        relevance = Relevance(
            self.map,
            np.full((3, 16, 16), 0.25, np.float32),
            np.diag([level] * 8).astype(np.int32),
            np.array([self.particularize, 0.5, 0.5], np.float32),
        )
        shade = dense(vision.features).mean() + self.jitter * len(self.calls)
        return Seen(np.full((budget.visual_tokens[1], 4), shade, np.float32), relevance, budget)


class FakeLanguage:
    """Says `answer` token by token and then the end's token; waits at `gate` before token number `wait_at`."""

    def __init__(self, answer: str = " red") -> None:
        self.tokens: list[int] = [*ids_of(answer), CARD.end_id]
        self.gate = asyncio.Event()
        self.gate.set()
        self.wait_at = 0
        self.at_once = 1  # tokens of a response
        self.fault: Exception | None = None  # raised at the gate
        self.sampling: list[Sampling] = []
        self.prompts: list[Prompt] = []
        self.request_ids: list[str] = []
        self.open = 0

    def say(self, answer: str) -> None:
        self.tokens = [*ids_of(answer), CARD.end_id]

    async def generate(self, generation: Generation, timeout_s: float) -> AsyncGenerator[tuple[int, ...], None]:
        """Token number n has the log probability -n / 2, and the likeliest ones are ids 3, 4, ... at half of it."""
        sampling, log_probs = generation.sampling, generation.log_probs
        self.prompts.append(generation.prompt)
        self.sampling.append(sampling)
        self.request_ids.append(generation.request_id)
        self.open += 1
        try:
            said, response = self.tokens[: sampling.max_tokens], list[int]()
            for place, token in enumerate(said):
                if place == self.wait_at:
                    await self.gate.wait()
                    if self.fault is not None:
                        raise self.fault
                if log_probs is not None:
                    top = tuple((3 + each, -place / 4) for each in range(sampling.top_log_probs))
                    log_probs.append(LogProb(-place / 2, top))
                response.append(token)
                if len(response) == self.at_once or place == len(said) - 1:
                    yield tuple(response)
                    response.clear()
        finally:
            self.open -= 1


class Strain:
    """A controller of fidelity that stays at one level."""

    def __init__(self, level: int) -> None:
        self.level = level

    def observe(self, now: float, waiting_since: float | None) -> int:
        return self.level


class FakeProber:
    """Every model answers but those in `faults`."""

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}

    async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
        if model in self.faults:
            raise self.faults[model]


class House:
    """A whole service but for Triton, which is asked each time: there is no visual cache unless it is asked for."""

    def __init__(
        self,
        card: ModelCard = CARD,
        *,
        admission: type[Admission] = Admission,
        fetcher: ImageFetcher | None = None,
        **knobs: object,
    ) -> None:
        self.settings = Settings(**{"visual_cache_bytes": 0} | knobs)
        self.metrics = Metrics()
        self.vision = FakeVision()
        self.language = FakeLanguage()
        self.reader = ImageReader(ImageLimits(self.settings.max_image_bytes, self.settings.max_image_pixels), threads=1)
        self.readiness = Readiness(card.called, self.metrics)
        self.admission = admission(self.settings, Engines(), card.max_positions, self.metrics)
        self.shared = redis_tier(self.settings, card, self.metrics)
        self.gate = gate_of(self.settings, self.metrics)
        self.quotas = quotas_of(self.settings, self.gate, self.shared, self.metrics)
        self.shared_images = shared_images_of(self.settings, self.shared, self.metrics)
        models = Models([])
        self.pipeline = Pipeline(
            admission=self.admission,
            models=models,
            reader=self.reader,
            settings=self.settings,
            metrics=self.metrics,
            shared=self.shared,
            accounts=self.quotas,
            shared_images=self.shared_images,
            fetcher=fetcher,
        )
        models.models = [self.pipeline.model(self.vision, self.language, card, PromptBuilder(card, TOKENIZER))]
        self.edge = http_edge(self.pipeline, self.readiness, self.settings, self.metrics, access=self.gate)
        self.rpc = grpc_edge(self.pipeline, self.readiness, self.settings, self.metrics, access=self.gate)

    async def answer(self, request: Request) -> AsyncGenerator[Delta | Finished, None]:
        """As the pipeline does, with a reservation of its own."""
        with self.admission.reservation(request.tenant) as reservation:
            async with aclosing(self.pipeline.answer(request, reservation)) as events:
                async for event in events:
                    yield event

    async def keep_image(self, data: bytes) -> KeptImage:
        with self.admission.reservation("") as reservation:
            return await self.pipeline.keep_image(data, reservation)

    def counted(self, name: str, **labels: str) -> float:
        return sample(self.metrics, name, labels) or 0.0

    def outcomes(self) -> dict[str, float]:
        """How often each outcome was counted; those that never happened are left out."""
        return {
            sample.labels["outcome"]: sample.value
            for metric in self.metrics.requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.value
        }


async def turns() -> None:
    """Lets every task that can run do so."""
    for _ in range(30):
        await asyncio.sleep(0)


async def until(condition: object, timeout_s: float = 20.0) -> None:
    """Waits for what another thread brings about; the condition is asked at every turn of the loop."""
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def cancelled(task: asyncio.Task[object]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
