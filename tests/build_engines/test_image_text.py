"""A BLIP-2 looks where the Q-Former of an image-text checkpoint looks, which reads the question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval

from build_engines.convert import __main__ as build
from build_engines.convert import inspection
from build_engines.convert.inspection import inspect
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.zero_shot import load_image_text
from service.core.card import ModelCard
from service.text.prompt import PromptBuilder
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt, save_instructblip_vicuna, write_blip2_image_text

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

QUESTIONS = ["what is the big circle", "which colour has the circle on the left?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("image-text")
    save_blip2_opt(found / "blip2")
    write_blip2_image_text(found / "image-text")
    return found


@pytest.fixture(scope="module")
def repository(folder: Path, exports: SharedExports) -> Path:
    arguments = ["--image-text", str(folder / "image-text"), "--out", str(folder / "repository")]
    assert exports.build(str(folder / "blip2"), *arguments) == 0
    return folder / "repository"


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def test_it_matches_image_and_text_as_transformers_does(folder: Path) -> None:
    """Though it reads features that come from behind another layer norm, the BLIP-2's."""
    model = Blip2ForImageTextRetrieval.from_pretrained(folder / "image-text", dtype=torch.float32).eval()
    blip2 = Checkpoint.load(folder / "blip2")
    mean, std = torch.tensor(blip2.image_mean), torch.tensor(blip2.image_std)
    read = AutoTokenizer.from_pretrained(folder / "image-text")(QUESTIONS, padding="max_length", max_length=32)
    ids, mask = torch.tensor(read["input_ids"]), torch.tensor(read["attention_mask"])
    normal = (pixels().float() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = model(normal, ids, mask, use_image_text_matching_head=True).logits_per_image
        ours = load_image_text(folder / "image-text", blip2.model.vision_model)
        features = blip2.vision_encoder()(pixels())[0]
        matches, shares = ours.matches(features, (ids.int(), mask.int()))
    torch.testing.assert_close(matches.mean(1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shares.sum(2), torch.ones(2, 32))
    assert (model.vision_model(normal).last_hidden_state - features).abs().max() > 0.05


def test_a_query_counts_by_how_well_it_matches_the_text(folder: Path) -> None:
    qformer = load_image_text(folder / "image-text", Checkpoint.load(folder / "blip2").model.vision_model)
    features = torch.randn(1, 257, 48, generator=torch.Generator().manual_seed(1))
    text = (torch.full((1, 32), 9, dtype=torch.int32), torch.ones(1, 32, dtype=torch.int32))
    with torch.no_grad():
        _, shares = qformer.matches(features, text)
        qformer.head.weight.zero_()
        torch.testing.assert_close(qformer.attention(features, text), shares.mean(1))
        qformer.head.weight[1, 0] = 1e4  # one query matches, and no other
        best = qformer.matches(features, text)[0].diff(dim=2)[0, :, 0].argmax()
        torch.testing.assert_close(qformer.attention(features, text), shares[:, best])
    assert (shares[:, best] - shares.mean(1)).abs().max() > 1e-4


def test_a_built_repository_looks_by_the_bare_question(folder: Path, repository: Path) -> None:
    card = ModelCard.from_json((repository / "card.json").read_text())
    assert (card.allocator, card.allocator_trained, card.closer_view) == ("zero-shot", True, False)
    assert (card.question_tokenizer, card.question_alone) == ("qformer_tokenizer.json", True)
    plain = Checkpoint.load(folder / "blip2")
    assert card.fingerprint == plain.vision_fingerprint()  # cached features stay valid
    assert card.visual_fingerprint != plain.visual_fingerprint()

    prompts = PromptBuilder.load(card, repository)
    words = AutoTokenizer.from_pretrained(folder / "image-text")
    asked = [prompts.question(text) for text in QUESTIONS]
    for text, question in zip(QUESTIONS, asked, strict=True):
        assert question.ids[: question.mask.sum()].tolist() == words(text)["input_ids"]

    features, saliency, entropy, texture = plain.vision_encoder()(pixels()[:1])
    ours = plain.knowing_already(folder / "image-text").allocator()
    graph = onnxruntime.InferenceSession(repository / "relevance_allocator" / "1" / "model.onnx")
    maps = []
    for question in asked:
        inputs = {
            "features": features, "saliency": saliency, "entropy": entropy, "texture": texture,
            "question_ids": torch.from_numpy(question.ids[None]),
            "question_mask": torch.from_numpy(question.mask[None]),
            "budget": torch.tensor([[64, 64, 32, 32]], dtype=torch.int32),
        }  # fmt: skip
        (relevance,) = graph.run(["relevance"], {name: value.detach().numpy() for name, value in inputs.items()})
        with torch.no_grad():
            np.testing.assert_allclose(relevance, ours(*inputs.values())[3].numpy(), atol=1e-4)
        maps.append(relevance)
    assert np.abs(maps[0] - maps[1]).max() > 1e-3


def test_other_weights_of_the_reader_are_another_build(folder: Path, tmp_path: Path) -> None:
    first = inspect(str(folder / "blip2"), image_text=str(folder / "image-text"))
    write_blip2_image_text(tmp_path / "other")
    _change(tmp_path / "other", "itm_head.weight")
    second = inspect(str(folder / "blip2"), image_text=str(tmp_path / "other"))
    changed = {name for name, digest in first.digests().items() if second.digests()[name] != digest}
    assert changed == {"image_text/model.safetensors"}
    assert first.parameters["relevance_allocator"] > 10_000


def _change(checkpoint: Path, name: str) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights[name] = weights[name] * 1.01
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_were_rounded_to_fp16_are_the_same_encoder(folder: Path, tmp_path: Path) -> None:
    write_blip2_image_text(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    qformer = load_image_text(tmp_path, Checkpoint.load(folder / "blip2").model.vision_model)
    assert qformer.head.weight.dtype == torch.float32


def test_the_reader_of_another_encoder_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_blip2_image_text(tmp_path / "other")
    _change(tmp_path / "other", "vision_model.encoder.layers.1.mlp.fc1.weight")
    arguments = ["--image-text", str(tmp_path / "other"), "--out", str(tmp_path / "repository"), "--until", "card"]
    assert build.main([str(folder / "blip2"), *arguments]) == 3
    assert "another vision encoder (vision_model.encoder.layers.1.mlp.fc1.weight differs)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("save", "more", "message"),
    [
        (save_instructblip_vicuna, [], "--image-text needs a BLIP-2 checkpoint"),
        (save_blip2_opt, ["--allocator", "adapted"], "and no --allocator"),
        (save_blip2_opt, ["--zero-shot"], "For a BLIP-2, use --image-text"),
        (save_blip2_opt, ["--image-text", "{itself}"], "holds Blip2ForConditionalGeneration: use a checkpoint of "
                                                       "Blip2ForImageTextRetrieval"),
        (save_blip2_opt, ["--image-text", "no/where/at/all"], "is neither a directory nor a hub name"),
    ],
)  # fmt: skip
def test_what_cannot_read_for_it_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    save: Callable[[Path], None], more: list[str], message: str,
) -> None:  # fmt: skip
    save(tmp_path / "checkpoint")
    more = [each.format(itself=tmp_path / "checkpoint") for each in more]
    arguments = ["--image-text", str(folder / "image-text"), "--out", str(tmp_path / "repository"), *more]
    assert build.main([str(tmp_path / "checkpoint"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_reader_of_other_sizes_is_refused_before_its_weights_are_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_blip2_image_text(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 4'))
    (tmp_path / "other" / "model.safetensors").unlink()
    arguments = ["--image-text", str(tmp_path / "other"), "--out", str(tmp_path / "repository")]
    assert build.main([str(folder / "blip2"), *arguments]) == 2
    assert "has another vision encoder (by its num_hidden_layers)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"use_qformer_text_input": true', '"use_qformer_text_input": false'), "reads no text of 32 tokens"),
        (('"max_position_embeddings": 64', '"max_position_embeddings": 31'), "reads no text of 32 tokens"),
        (('"vocab_size": 71', '"vocab_size": 70'), "goes up to id 70, but the Q-Former has 70 ids"),
    ],
)
def test_a_reader_that_cannot_read_every_question_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    write_blip2_image_text(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    assert change[0] in config.read_text()
    config.write_text(config.read_text().replace(*change))
    arguments = ["--image-text", str(tmp_path / "other"), "--out", str(tmp_path / "repository")]
    assert build.main([str(folder / "blip2"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_both_checkpoints_pass_before_the_weights_of_either_are_downloaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def downloaded(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns))
        if name == "some/typo":
            raise OSError("no such repository")
        return str(folder / name.split("/")[1])

    monkeypatch.setattr(inspection, "snapshot_download", downloaded)
    out = ["--out", str(tmp_path / "repository")]
    assert build.main(["some/blip2", "--image-text", "some/typo", *out]) == 2
    assert "some/typo cannot be downloaded: no such repository" in capsys.readouterr().err
    assert asked == [("some/blip2", False), ("some/typo", False)]
    asked.clear()
    assert build.main(["some/blip2", "--image-text", "some/image-text", *out, "--dry-run"]) == 0
    assert [name for name, weights in asked if weights] == ["some/blip2", "some/image-text"]


def test_a_layer_norm_that_cannot_be_undone_is_refused(folder: Path) -> None:
    encoder = Checkpoint.load(folder / "blip2").model.vision_model
    with torch.no_grad():
        encoder.post_layernorm.weight[3] = 0
    with pytest.raises(ValueError, match="has a weight of 0"):
        load_image_text(folder / "image-text", encoder)
