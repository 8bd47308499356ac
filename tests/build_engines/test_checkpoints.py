"""Exported checkpoints answer as transformers does, token for token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image as Pillow
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVideoForConditionalGeneration,
)

from build_engines.convert.tensorrt_rules import MAY_VARY, faults
from build_engines.export import Graph as GraphToExport
from build_engines.export import export, export_graph
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.decoder import decoder_of
from build_engines.repository import GRAPHS, Dimensions, write_repository
from service.core.card import ModelCard
from service.core.prompt import Prompt
from service.core.request import Budget, Sampling
from service.media.decoder import ImageLimits, decode
from service.text.prompt import PromptBuilder, load_tokenizer
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import (
    VideoProcessor,
    save_blip2_flan_t5,
    save_blip2_opt,
    save_idefics,
    save_instructblip_flan_t5,
    save_instructblip_vicuna,
    save_instructblip_video_flan_t5,
    save_instructblip_video_vicuna,
)
from triton_models.batcher import Batcher, Limits, Sequence
from triton_models.cross_decoder import OnnxCrossDecoder
from triton_models.decoder import OnnxDecoder
from triton_models.encoder_decoder import OnnxEncoderDecoder
from triton_models.language_model import open_language_model
from triton_models.query_groups import GroupRunner
from triton_models.session import Graph

pytestmark = pytest.mark.slow

LONGEST = 24  # tokens of an answer
QUESTIONS = ["what is red?", "Which colour has the big circle on the left", "a"]


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint, on disk and exported."""

    directory: Path
    repository: Path
    model: type
    processor: type

    @property
    def card(self) -> ModelCard:
        return ModelCard.from_json((self.repository / "card.json").read_text())

    @property
    def frames(self) -> int:
        """Pictures that a question is about."""
        return self.card.frames if self.processor is VideoProcessor else 1

    @property
    def full(self) -> Budget:
        """Every patch, and one group of visual tokens."""
        return Budget(vision_tokens=(256, 256), visual_tokens=(self.card.queries,) * 2)


SAVED: dict[str, tuple[Callable[[Path], None], type, type]] = {
    "blip2-opt": (save_blip2_opt, Blip2ForConditionalGeneration, Blip2Processor),
    "instructblip-vicuna": (
        save_instructblip_vicuna, InstructBlipForConditionalGeneration, InstructBlipProcessor
    ),
    "blip2-flan-t5": (save_blip2_flan_t5, Blip2ForConditionalGeneration, Blip2Processor),
    "instructblip-flan-t5": (
        save_instructblip_flan_t5, InstructBlipForConditionalGeneration, InstructBlipProcessor
    ),
    "instructblip-video-vicuna": (
        save_instructblip_video_vicuna, InstructBlipVideoForConditionalGeneration, VideoProcessor
    ),
    "instructblip-video-flan-t5": (
        save_instructblip_video_flan_t5, InstructBlipVideoForConditionalGeneration, VideoProcessor
    ),
    "idefics": (save_idefics, IdeficsForVisionText2Text, IdeficsProcessor),
}  # fmt: skip

# The tokens before a prompt and after an answer, by the tokenizer, of a checkpoint whose configuration names others.
OF_TOKENIZER = {"instructblip-vicuna": (2, 2)}


@pytest.fixture(scope="module", params=SAVED)
def family(request: pytest.FixtureRequest, exports: SharedExports, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One family by the exporter's own command, the others by a build, which is what test_build_serves.py serves."""
    name = request.param
    if name != "instructblip-vicuna":
        return built(name, exports)
    save, model, processor = SAVED[name]
    folder = tmp_path_factory.mktemp(name)
    save(folder / name)
    export(folder / name, folder / "repository", exports.write)
    return Family(folder / name, folder / "repository", model, processor)


def built(name: str, exports: SharedExports) -> Family:
    """The family's checkpoint and its build, which nobody changes."""
    save, model, processor = SAVED[name]
    folder = exports.built(name, save)
    return Family(folder / name, folder / "repository", model, processor)


def pictures(frames: int = 1) -> list[bytes]:
    """One picture a question, or a clip of so many, of the encoder's size, so that no resampling differs."""
    generator = np.random.default_rng(5)
    files = []
    for _ in range(len(QUESTIONS) * frames):
        out = BytesIO()
        coarse = generator.integers(0, 256, (14, 14, 3), np.uint8)
        Pillow.fromarray(coarse).resize((224, 224), Pillow.Resampling.NEAREST).save(out, "PNG")
        files.append(out.getvalue())
    return files


def of_transformers(family: Family, **wishes: float) -> list[list[int]]:
    """New tokens of greedy answers by the family's own processor and `generate`."""
    model = family.model.from_pretrained(family.directory, dtype=torch.float32).eval()
    processor = family.processor.from_pretrained(family.directory)
    if own := OF_TOKENIZER.get(family.directory.name):
        wishes |= {"eos_token_id": own[1]}
    said = []
    shown = batched(pictures(family.frames), family.frames)
    for clip, question in zip(shown, QUESTIONS, strict=True):
        text = family.card.prompt_template.replace("{question}", question)
        image = Pillow.open(BytesIO(clip[0]))
        if family.processor is VideoProcessor:
            given = processor([decode(picture, ImageLimits()).pixels for picture in clip], text)
        else:
            told = {"text": [image, text]} if family.processor is IdeficsProcessor else {"images": image, "text": text}
            given = processor(**told, return_tensors="pt")
        tokens = model.generate(**given, max_new_tokens=LONGEST, do_sample=False, **wishes)[0].tolist()
        if model.config.get_text_config().is_encoder_decoder:
            tokens = tokens[1:]  # the decoder's start token
        prompt = given["input_ids"].shape[1]
        said.append(tokens[prompt:] if len(tokens) > LONGEST else tokens)
    return said


def seen(family: Family, prompts: PromptBuilder) -> list[Prompt]:
    """Run all questions in one batch through the exported vision models, with full budgets and one group."""
    models = {
        name: Graph(family.repository / name / "1" / "model.onnx") for name in ("vision_encoder", "relevance_allocator")
    }
    questions = [prompts.question(question) for question in QUESTIONS for _ in range(family.frames)]
    asked = {
        "question_ids": np.stack([question.ids for question in questions]),
        "question_mask": np.stack([question.mask for question in questions]),
    }
    pixels = np.stack([decode(picture, ImageLimits()).pixels for picture in pictures(family.frames)])
    vision = ["features", "saliency", "entropy", "texture"]
    found = dict(zip(vision, models["vision_encoder"].run({"image": pixels}, vision), strict=True))
    chosen = ["vision_tokens", "vision_mask", "query_groups"]
    budget = np.stack([family.full.to_array()] * len(questions))
    tokens = models["relevance_allocator"].run(found | asked | {"budget": budget}, chosen)
    runner = GroupRunner(family.repository / "qformer" / "1" / "model.onnx")
    visual = runner.run(dict(zip(chosen, tokens, strict=True)) | asked)
    assert visual["visual_count"].tolist() == [[family.card.queries]] * len(questions)
    shown = batched([(row[: family.card.queries], b"") for row in visual["visual_tokens"]], family.frames)
    return [prompts.compose(question, clip) for question, clip in zip(QUESTIONS, shown, strict=True)]


def batched(each: list[Any], size: int) -> list[list[Any]]:
    return [each[start : start + size] for start in range(0, len(each), size)]


def opened(family: Family, max_rows: int) -> OnnxDecoder | OnnxEncoderDecoder | OnnxCrossDecoder:
    return open_language_model(family.repository / "llm" / "1" / "model.onnx", family.card, max_rows=max_rows)


def of_the_graphs(family: Family) -> list[list[int]]:
    """Run the same through the repository's models: prompts of different lengths, decoded together."""
    prompts = PromptBuilder.load(family.card, family.repository)
    decoder = opened(family, len(QUESTIONS))
    asked = seen(family, prompts)
    tokens = decoder.prefill(asked, [decoder.recall(each) for each in asked]).argmax(1)
    steps = [tokens]
    while len(steps) < LONGEST:
        steps.append(decoder.step(steps[-1]).argmax(1))
    said = [list(map(int, row)) for row in np.stack(steps, axis=1)]
    end = family.card.end_id
    return [row[: row.index(end) + 1] if end in row else row for row in said]


def test_answers_are_those_of_transformers_token_for_token(family: Family) -> None:
    expected = of_transformers(family)
    assert of_the_graphs(family) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(QUESTIONS)  # image and question both change the answer
    assert max(len(set(tokens)) for tokens in expected) > 5


@dataclass(frozen=True)
class Wish:
    """One request of a mixed batch."""

    question: int  # its number
    max_tokens: int = LONGEST
    penalty: float = 1.0
    stopped_after: int | None = None  # tokens


def in_one_batcher(family: Family, wishes: list[Wish], limits: Limits, stagger: int) -> list[list[int]]:
    """Run requests through the batcher, one more every `stagger` iterations -> each one's tokens."""
    asked = seen(family, PromptBuilder.load(family.card, family.repository))
    batcher = Batcher(opened(family, max_rows=4), limits)
    said: list[list[int]] = [[] for _ in wishes]
    waiting = [
        Sequence(
            str(number), asked[wish.question],
            Sampling(max_tokens=wish.max_tokens, repetition_penalty=wish.penalty),
            family.card.end_id, owner=number,
        )
        for number, wish in reversed(list(enumerate(wishes)))
    ]  # fmt: skip
    while waiting or batcher.running or batcher.waiting:
        if waiting and batcher.iterations % stagger == 0:
            batcher.submit(waiting.pop())
        for event in batcher.iterate():
            assert event.error is None
            if event.token is not None:
                said[event.sequence.owner].append(event.token)
            if event.generated == wishes[event.sequence.owner].stopped_after:
                batcher.stop(event.sequence.request_id)
    return said


def test_requests_come_and_go_and_answer_as_if_alone(family: Family) -> None:
    """Full batches of four rows, prompts read in one prefill and longer ones, answers that end early or are stopped."""
    expected = of_transformers(family)
    wishes = [
        Wish(0),
        Wish(1, max_tokens=3),
        Wish(2),
        Wish(0, max_tokens=9),
        Wish(1, stopped_after=5),
        Wish(2),
        Wish(0),
    ]
    wishes += [Wish(1), Wish(2, max_tokens=1), Wish(0)]
    for limits, stagger in ((Limits(), 1), (Limits(max_prefill_tokens=40), 3)):
        for wish, tokens in zip(wishes, in_one_batcher(family, wishes, limits, stagger), strict=True):
            most = wish.max_tokens if wish.stopped_after is None else wish.stopped_after
            assert tokens == expected[wish.question][:most], wish


def test_a_repetition_penalty_counts_what_the_decoder_has_read(family: Family) -> None:
    if family.card.architecture == "decoder-only":
        pytest.skip("transformers also counts the placeholders of a decoder-only model's image")
    said = in_one_batcher(family, [Wish(number, penalty=1.7) for number in range(len(QUESTIONS))], Limits(), 1)
    assert said == of_transformers(family, repetition_penalty=1.7)
    assert said != of_transformers(family)


def test_a_row_that_is_not_finite_is_scrubbed_and_the_shorter_one_after_it_reads_as_if_alone(family: Family) -> None:
    """What is behind the shorter one's end, in its prompt or images, is masked by a weight of 0, and 0 * NaN is NaN."""
    prompts = PromptBuilder.load(family.card, family.repository)
    beside, longest, shortest = seen(family, prompts)
    images = 2 if family.processor is IdeficsProcessor else 1
    poisoned = prompts.compose(QUESTIONS[1], [(np.full_like(longest.visual_tokens, np.nan), b"")] * images)
    assert poisoned.input_ids.size > shortest.input_ids.size
    decoder, alone = opened(family, max_rows=2), opened(family, max_rows=1)
    decoder.prefill([beside, poisoned], [decoder.recall(each) for each in (beside, poisoned)])
    decoder.step(np.array([3, 4]))  # numbers may also become too large later
    decoder.scrub(1)
    decoder.drop(1)
    expected, found = (each.prefill([shortest], [each.recall(shortest)]) for each in (alone, decoder))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(decoder.step(np.array([5, 6]))[1:], alone.step(np.array([6])), atol=1e-4)


def test_the_card_says_what_the_gateway_needs_to_know(family: Family) -> None:
    card = family.card
    config = family.model.config_class.from_pretrained(family.directory)
    assert not card.allocator_trained
    assert card.name == family.directory.name
    text = config.get_text_config()
    if card.image_marks is None:  # test_idefics.py has the others
        assert (card.vocab_size, card.hidden_size) == (text.vocab_size, text.hidden_size)
    begin, end = OF_TOKENIZER.get(card.name, (text.bos_token_id, text.eos_token_id))
    own = {"bos_id": begin, "text_end_id": None, "decoder_start_id": None}
    if text.is_encoder_decoder:
        own = {"bos_id": None, "text_end_id": end, "decoder_start_id": text.decoder_start_token_id}
    assert {name: getattr(card, name) for name in own} == own
    assert card.end_id == end
    assert 0 <= card.pad_id < card.vocab_size
    short = family.directory.name not in ("blip2-opt", "idefics")
    assert card.prompt_template == ("Question: {question} Short answer:" if short else "Question: {question} Answer:")
    architecture = "decoder-only" if card.image_marks is None else "cross-attention"
    assert card.architecture == ("encoder-decoder" if text.is_encoder_decoder else architecture)
    assert card.question_tokenizer in {path.name for path in family.repository.glob("*tokenizer.json")}


def test_their_vision_models_are_ones_that_tensorrt_builds(family: Family) -> None:
    for name in ("vision_encoder", "relevance_allocator", "qformer"):
        assert faults(onnx.load(family.repository / name / "1" / "model.onnx"), MAY_VARY[name]) == []


def test_a_checkpoint_is_found_by_its_name_on_the_hub(tmp_path: Path) -> None:
    """Load a checkpoint from the hub's cache, in huggingface_hub's layout."""
    kept = tmp_path / "models--somebody--something"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    save_instructblip_vicuna(kept / "snapshots" / ("0" * 40))
    code = (
        "from build_engines.model.checkpoint import Checkpoint; "
        "found = Checkpoint.load('somebody/something'); print(found.card['name'], type(found.model).__name__)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["something", "InstructBlipForConditionalGeneration"]


def test_what_is_neither_directory_nor_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a directory nor a hub name"):
        Checkpoint.load(tmp_path / "nothing")


def test_a_tokenizer_kept_as_a_list_of_words_is_converted(tmp_path: Path) -> None:
    """Older Q-Formers have this file instead of tokenizer.json."""
    save_instructblip_vicuna(tmp_path / "tiny")
    folder = tmp_path / "tiny" / "qformer_tokenizer"
    expected = load_tokenizer(folder / "tokenizer.json")
    words = sorted(expected.get_vocab().items(), key=lambda item: item[1])
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    found = Checkpoint.load(tmp_path / "tiny").tokenizers(tmp_path)
    converted = load_tokenizer(found["qformer_tokenizer.json"])
    for question in QUESTIONS:
        assert converted.encode(question).ids == expected.encode(question).ids


def test_a_language_model_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear cannot be exported: use OPT or Llama"):
        decoder_of(torch.nn.Linear(1, 1))


def test_weights_too_large_for_one_file_lie_beside_the_graph(tmp_path: Path) -> None:
    module, given = torch.nn.Linear(400, 400).eval(), torch.rand(2, 400)
    graph = GraphToExport("llm", module, {"a": given}, {"a": {0: "batch"}}, ["b"])
    beside = tmp_path / "llm.onnx.data"
    beside.write_bytes(b"of an export before")
    export_graph(graph, tmp_path / "llm.onnx", most_inline_bytes=1000)
    assert (tmp_path / "llm.onnx").stat().st_size < 10_000
    assert beside.stat().st_size < 700_000
    for name in GRAPHS:  # as if each were as large
        onnx.save(onnx.load(tmp_path / "llm.onnx", load_external_data=False), tmp_path / f"{name}.onnx")
    clips = tmp_path / "repository" / "llm" / "1" / "clips.onnx"
    clips.parent.mkdir(parents=True)
    clips.write_bytes(b"of a checkpoint before")
    write_repository(tmp_path / "repository", Dimensions(1, 1), tmp_path, {})
    assert not clips.exists()
    session = onnxruntime.InferenceSession(tmp_path / "repository" / "llm" / "1" / "model.onnx")
    (served,) = session.run(None, {"a": given.numpy()})
    assert np.abs(served - module(given).detach().numpy()).max() < 1e-5
