"""IDEFICS sees several images in their places, as transformers does: the prompt, what each word sees, the tokens."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image as Pillow
from transformers import IdeficsForVisionText2Text, IdeficsProcessor
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from build_engines.adapt.__main__ import main as adapt
from build_engines.convert.inspection import inspect
from build_engines.convert.options import Refused
from service.core.card import ImageMarks, ModelCard
from service.core.prompt import Prompt
from service.core.request import Budget, Exchange, ImageBytes, Request, Sampling, Text
from service.media.decoder import ImageLimits, decode
from service.text.prompt import Detokeniser, PromptBuilder, load_tokenizer, token_bytes
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.support.servers import StartGateway, free_ports
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_idefics
from triton_models.batcher import Batcher, Limits, Sequence
from triton_models.cross_decoder import Columns, OnnxCrossDecoder
from triton_models.language_model import open_language_model
from triton_models.query_groups import GroupRunner
from triton_models.session import Graph

pytestmark = pytest.mark.slow

LONGEST = 16  # tokens of an answer
FULL = Budget(vision_tokens=(256, 256), visual_tokens=(64, 64))
LATENTS = 64


@pytest.fixture(scope="module")
def checkpoint(exports: SharedExports) -> Path:
    return exports.built("idefics", save_idefics) / "idefics"


@pytest.fixture(scope="module")
def built(checkpoint: Path) -> Path:
    """What `glimpse build --profile embedded` makes of the checkpoint."""
    return checkpoint.parent / "repository"


@pytest.fixture(scope="module")
def card(built: Path) -> ModelCard:
    return ModelCard.from_json((built / "card.json").read_text())


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> IdeficsProcessor:
    return IdeficsProcessor.from_pretrained(checkpoint)


def picture(number: int) -> bytes:
    """A picture of the encoder's size, so that no resampling differs."""
    coarse = np.random.default_rng(number).integers(0, 256, (14, 14, 3), np.uint8)
    out = BytesIO()
    Pillow.fromarray(coarse).resize((224, 224), Pillow.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


PICTURES = [picture(number) for number in range(4)]
A, B, C, D = (ImageBytes(data) for data in PICTURES)


def request(*parts: Text | ImageBytes, exchanges: tuple[Exchange, ...] = ()) -> Request:
    return Request("r", parts, FULL, Sampling(max_tokens=LONGEST), timeout_s=60, exchanges=exchanges)


# Each request beside what a caller of transformers would give the processor.
ASKED: dict[str, tuple[Request, list[str | bytes]]] = {
    "an image first": (request(A, Text("what is red?")), [A.data, "Question: what is red? Answer:"]),
    "an image between texts": (
        request(Text("Which circle in"), B, Text("is big?")),
        ["Question: Which circle in", B.data, "is big? Answer:"],
    ),
    "images side by side": (request(A, B, Text("a")), [A.data, B.data, "Question: a Answer:"]),
    "images apart": (
        request(A, Text("or"), B, C, Text("which?")),
        [A.data, "Question: or", B.data, C.data, "which? Answer:"],
    ),
    "examples before the question": (
        request(D, Text("how?"), exchanges=(Exchange((A, Text("what?")), "red"), Exchange((B, Text("a?")), "b"))),
        [A.data, "Question: what? Answer: red\n", B.data, "Question: a? Answer: b\n", D.data, "Question: how? Answer:"],
    ),
    "an image only in an example": (
        request(Text("and now?"), exchanges=(Exchange((Text("see"), C, Text("there")), "yes"),)),
        ["Question: see", C.data, "there Answer: yes\nQuestion: and now? Answer:"],
    ),
    "one image twice": (request(A, Text("a"), A, Text("b")), [A.data, "Question: a", A.data, "b Answer:"]),
}  # fmt: skip


def given_to_transformers(processor: IdeficsProcessor, told: list[str | bytes]) -> dict[str, torch.Tensor]:
    items = [item if isinstance(item, str) else Pillow.open(BytesIO(item)) for item in told]
    return dict(processor(text=items, return_tensors="pt"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path, processor: IdeficsProcessor) -> dict[str, list[int]]:
    """New tokens of greedy answers by transformers, up to the end token."""
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint, dtype=torch.float32).eval()
    said = {}
    for name, (_, told) in ASKED.items():
        given = given_to_transformers(processor, told)
        tokens = model.generate(**given, max_new_tokens=LONGEST, do_sample=False)[0].tolist()
        said[name] = tokens[given["input_ids"].shape[1] :]
    return said


def test_answers_depend_on_which_image_a_word_sees(
    checkpoint: Path, processor: IdeficsProcessor, expected: dict[str, list[int]]
) -> None:
    """So that the tests below would notice a wrong mask."""
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for name in ("images side by side", "images apart", "examples before the question"):
        given = given_to_transformers(processor, ASKED[name][1])
        given["image_attention_mask"] = torch.ones_like(given["image_attention_mask"])
        tokens = model.generate(**given, max_new_tokens=LONGEST, do_sample=False)[0].tolist()
        assert tokens[given["input_ids"].shape[1] :] != expected[name], name


@pytest.fixture(scope="module")
def prompts(built: Path, card: ModelCard) -> dict[str, Prompt]:
    """The prompts of ASKED, with visual tokens from the built graphs."""
    builder = PromptBuilder.load(card, built)
    models = {name: Graph(built / name / "1" / "model.onnx") for name in ("vision_encoder", "relevance_allocator")}
    runner = GroupRunner(built / "qformer" / "1" / "model.onnx")

    def seen(data: bytes, question: str) -> np.ndarray:
        names = ["features", "saliency", "entropy", "texture"]
        pixels = decode(data, ImageLimits()).pixels[np.newaxis]
        found = dict(zip(names, models["vision_encoder"].run({"image": pixels}, names), strict=True))
        asked = builder.question(question)
        found |= {"question_ids": asked.ids[np.newaxis], "question_mask": asked.mask[np.newaxis]}
        names = ["vision_tokens", "vision_mask", "query_groups"]
        tokens = models["relevance_allocator"].run(found | {"budget": FULL.to_array()[np.newaxis]}, names)
        visual = runner.run(dict(zip(names, tokens, strict=True)))
        assert visual["visual_count"].tolist() == [[LATENTS]]
        return visual["visual_tokens"][0, :LATENTS]

    made = {}
    for name, (asked, _) in ASKED.items():
        images = [(seen(image.data, asked.question), image.data) for image in asked.images]
        made[name] = builder.compose_request(asked, images)
    return made


def opened(built: Path, card: ModelCard, max_rows: int, prefix_cache_bytes: int = 0) -> OnnxCrossDecoder:
    path = built / "llm" / "1" / "model.onnx"
    decoder = open_language_model(path, card, max_rows=max_rows, prefix_cache_bytes=prefix_cache_bytes)
    assert isinstance(decoder, OnnxCrossDecoder)
    return decoder


def test_the_card_tells_how_images_stand_in_the_text(card: ModelCard, processor: IdeficsProcessor) -> None:
    around, image = processor.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])
    assert card.image_marks == ImageMarks(around=around, image=image, end=processor.tokenizer.eos_token_id)
    assert card.architecture == "cross-attention"
    assert (card.vocab_size, card.hidden_size, card.vision_width) == (len(processor.tokenizer), 48, 48)
    assert card.visual_tokens == card.default_visual_tokens == (64, 64)
    assert (card.allocator, card.allocator_trained, card.interleaved) == ("fixed", False, True)
    assert ModelCard.from_json(card.to_json()) == card


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "no resampler": ({"use_resampler": False}, "has no resampler .*use an IDEFICS with one"),
    "other latents": ({"perceiver_config": {"resampler_n_latents": 32}}, "has 32 latents: use an IDEFICS with 64"),
    "other pixels": ({"vision_config": {"image_size": 336}}, "sees 336 pixels in patches of 14"),
    "other rotary positions": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "rotary positions of type dynamic",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(
    fault: str, checkpoint: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(checkpoint, wrong)
    config = json.loads((wrong / "config.json").read_text())
    change, why = WRONG[fault]
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=why):
        inspect(str(wrong))


def test_a_tokenizer_without_the_marks_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(checkpoint, wrong)
    text = (wrong / "tokenizer.json").read_text()
    (wrong / "tokenizer.json").write_text(text.replace('"<image>"', '"<picture>"'))
    with pytest.raises(Refused, match="tokenizer without <fake_token_around_image> and <image>"):
        inspect(str(wrong))


def test_adapting_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_bytes(PICTURES[0])
    assert adapt([str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out")]) != 0
    assert "idefics is an IDEFICS, which `glimpse adapt` cannot adapt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ASKED)
def test_a_prompt_and_what_each_word_sees_are_those_of_the_processor(
    name: str, prompts: dict[str, Prompt], card: ModelCard, processor: IdeficsProcessor
) -> None:
    given = given_to_transformers(processor, ASKED[name][1])
    columns = Columns.of(prompts[name], card.vocab_size, processor.tokenizer.eos_token_id)
    assert columns.text.tolist() == given["input_ids"][0].tolist()
    images = np.arange(given["image_attention_mask"].shape[2])
    sees = (columns.starts[:, np.newaxis] <= LATENTS * images) & (LATENTS * images < columns.ends[:, np.newaxis])
    assert sees.astype(int).tolist() == given["image_attention_mask"][0].int().tolist()
    widths = set((columns.ends - columns.starts).tolist())
    assert widths <= {0, LATENTS}


def test_words_after_a_documents_end_see_no_image_until_the_next(processor: IdeficsProcessor) -> None:
    tokenizer = processor.tokenizer
    vocab_size, end = len(tokenizer), tokenizer.eos_token_id
    around, image = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])
    generator = np.random.default_rng(3)
    for _ in range(50):
        words = generator.choice([300, 301, end, image, around], 20).tolist()
        count = words.count(image)
        ids, rows = [], 0
        for word in [*words, 302]:
            if word == image:
                ids += range(vocab_size + 2 * rows, vocab_size + 2 * rows + 2)
                rows += 1
            ids.append(word)
        prompt = Prompt(np.array(ids, np.int32), np.zeros((2 * count, 48), np.float32), np.zeros(len(ids), np.uint64))
        columns = Columns.of(prompt, vocab_size, end)
        packed = torch.tensor([[*words, 302]])
        mask, _ = image_attention_mask_for_packed_input_ids(packed, tokenizer, "pt")
        told = incremental_to_binary_attention_mask(mask, "pt", num_classes=max(1, count))[0].tolist()
        sees = [
            [int(start <= 2 * each < stop) for each in range(max(1, count))]
            for start, stop in zip(columns.starts, columns.ends, strict=True)
        ]
        assert sees == told


def test_a_callers_own_marks_are_plain_text(built: Path, card: ModelCard) -> None:
    builder = PromptBuilder.load(card, built)
    ids = builder.text_ids("<image> </s> <fake_token_around_image>")
    assert card.image_marks is not None
    marks = card.image_marks
    assert [ids.count(each) for each in (marks.image, marks.around, marks.end)] == [1, 2, 0]
    assert load_tokenizer(built / "tokenizer.json").decode(ids).count("<image>") == 1


def test_tokens_are_those_of_transformers_alone(
    built: Path, card: ModelCard, prompts: dict[str, Prompt], expected: dict[str, list[int]]
) -> None:
    for name, prompt in prompts.items():
        assert in_one_batcher(built, card, [prompt], Limits(), 1) == [expected[name]], name
    assert len({tuple(tokens) for tokens in expected.values()}) > len(ASKED) - 2
    assert max(len(set(tokens)) for tokens in expected.values()) > 3


def in_one_batcher(
    built: Path, card: ModelCard, asked: list[Prompt], limits: Limits, stagger: int, prefix_cache_bytes: int = 0
) -> list[list[int]]:
    """Run requests through the batcher, one more every `stagger` iterations -> each one's tokens."""
    batcher = Batcher(opened(built, card, 4, prefix_cache_bytes), limits)
    said: list[list[int]] = [[] for _ in asked]
    waiting = [
        Sequence(str(number), prompt, Sampling(max_tokens=LONGEST), card.end_id, owner=number)
        for number, prompt in reversed(list(enumerate(asked)))
    ]
    while waiting or batcher.running or batcher.waiting:
        if waiting and batcher.iterations % stagger == 0:
            batcher.submit(waiting.pop())
        for event in batcher.iterate():
            assert event.error is None
            if event.token is not None:
                said[event.sequence.owner].append(event.token)
    if prefix_cache_bytes:
        assert batcher.prefix_hits > len(asked) // 2
    return said


@pytest.mark.parametrize(
    ("limits", "stagger", "prefix_cache_bytes"),
    [
        (Limits(max_prefill_padding=1.0, max_prefill_tokens=2000), 1, 0),  # prompts of any lengths in one run
        (Limits(), 1, 0),
        (Limits(max_prefill_tokens=40), 3, 0),  # every prompt in pieces, some within an image
        (Limits(max_prefill_tokens=40), 2, 1 << 24),
        (Limits(max_prefill_padding=1.0, max_prefill_tokens=2000), 1, 1 << 24),
    ],
)
def test_mixed_batches_answer_as_if_alone(
    built: Path,
    card: ModelCard,
    prompts: dict[str, Prompt],
    expected: dict[str, list[int]],
    limits: Limits,
    stagger: int,
    prefix_cache_bytes: int,
) -> None:
    """Four rows with one to three images each, read whole and in pieces, with and without known beginnings."""
    names = [*prompts, *reversed(prompts), *prompts]
    said = in_one_batcher(built, card, [prompts[name] for name in names], limits, stagger, prefix_cache_bytes)
    assert said == [expected[name] for name in names]


@pytest.mark.parametrize("name", ["images apart", "one image twice"])
def test_a_full_memory_while_a_prompt_is_joined_for_the_prefix_cache_fails_nobody(
    name: str,
    built: Path,
    card: ModelCard,
    prompts: dict[str, Prompt],
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    decoder = opened(built, card, 4, 1 << 24)
    monkeypatch.setattr(decoder, "_joined", full)
    logits = decoder.prefill([prompts[name]], [decoder.recall(prompts[name])])
    assert logits.argmax(axis=1).tolist() == expected[name][:1]
    assert decoder.step(np.array(expected[name][:1])).argmax(axis=1).tolist() == expected[name][1:2]
    assert decoder.rows == 1


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def address(built: Path, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """gRPC address of an embedded Triton that serves the repository."""
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    log_path = tmp_path_factory.mktemp("triton") / "triton.log"
    async with (
        TritonClient(access.url, access.url) as client,
        EmbeddedTriton(built, client=client, card=card, log_path=log_path, access=access),
    ):
        yield access.url


@pytest.fixture(scope="module")
def service(built: Path, address: str, start_gateway: StartGateway) -> Iterator[str]:
    """Address of a gateway in front of that Triton."""
    settings = {
        "GLIMPSE_MODEL_REPOSITORY": str(built), "GLIMPSE_VISION_URL": address, "GLIMPSE_LLM_URL": address,
    }  # fmt: skip
    with start_gateway(settings) as gateway:
        yield gateway.url


def chat(asked: Request) -> dict[str, Any]:
    """The request as OpenAI's clients write it, images in their places."""

    def content(parts: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": part.text} if isinstance(part, Text)
            else {"type": "image_url",
                  "image_url": {"url": f"data:image/png;base64,{base64.b64encode(part.data).decode()}"}}
            for part in parts
        ]  # fmt: skip

    messages: list[dict[str, Any]] = []
    for exchange in asked.exchanges:
        messages.append({"role": "user", "content": content(exchange.parts)})
        messages.append({"role": "assistant", "content": exchange.answer})
    messages.append({"role": "user", "content": content(asked.parts)})
    return {"model": "idefics", "messages": messages, "max_tokens": LONGEST, "temperature": 0} | asdict(FULL)


async def test_served_answers_about_several_images_are_those_of_transformers(
    service: str, built: Path, card: ModelCard, expected: dict[str, list[int]]
) -> None:
    """One request at a time, and then twice all of them at once: full batches of prompts with one to three images."""
    spelled = token_bytes(PromptBuilder.load(card, built).tokenizer)

    def text(tokens: list[int]) -> str:
        said = Detokeniser(spelled)
        return said.push(token for token in tokens if token != card.end_id) + said.finish()

    async with httpx.AsyncClient(base_url=service, timeout=60.0) as http:

        async def answer(name: str) -> str:
            told = (await http.post("/v1/chat/completions", json=chat(ASKED[name][0]))).raise_for_status().json()
            return str(told["choices"][0]["message"]["content"])

        for name in ASKED:
            assert await answer(name) == text(expected[name]), name
        names = [*ASKED, *ASKED]
        assert await asyncio.gather(*map(answer, names)) == [text(expected[name]) for name in names]
        told = (await http.get("/v1/models")).raise_for_status().json()["data"][0]
        assert (told["architecture"], told["default_visual_tokens"]) == ("cross-attention", [64, 64])
