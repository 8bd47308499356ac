"""The committed graphs against PyTorch; the exporter on a checkpoint of another shape."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration

from build_engines.convert.tensorrt_rules import MAY_VARY, faults
from build_engines.export import Graph, card, graphs
from build_engines.model.checkpoint import Checkpoint
from build_engines.repository import BESIDE_LLM, CLIP_GRAPH, CLIP_LLM, CLOSER_GRAPHS, GRAPHS, file_beside_llm
from tests.support.calibrations import calibrated
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-3  # max abs difference in FP32


@pytest.fixture(scope="module")
def reference() -> Checkpoint:
    return Checkpoint.load(ROOT / "reference")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Checkpoint:
    """A random BLIP-2 of odd sizes without allocator weights, in Hugging Face's format."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_blip2_opt(directory)
    return Checkpoint.load(directory)


def random_inputs(graph, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of the graph's types at another batch size, with plausible values."""
    generator = torch.Generator().manual_seed(batch)

    def like(name: str, example: torch.Tensor) -> torch.Tensor:  # noqa: PLR0911
        shape = (batch, *example.shape[1:])
        if name == "image":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        if name == "budget":
            return torch.tensor([[64, 100 + 90 * row, 32, 128 - 32 * row] for row in range(batch)], dtype=torch.int32)
        if name == "attend":
            lengths = torch.tensor([example.shape[1] - 9 * row for row in range(batch)])
            return (torch.arange(example.shape[1]) < lengths.unsqueeze(1)).int()
        if name in {"past_lengths", "input_lengths"}:
            return torch.tensor([int(example[0]) - row for row in range(batch)])
        if name == "input_ids":  # text and the three visual ids
            return torch.randint(250, graph.module.vocab_size + 3, shape, generator=generator)
        if example.dtype.is_floating_point:
            low = 0.0 if name in {"saliency", "entropy", "texture"} else -1.0
            return torch.rand(shape, generator=generator) * (1 - low) + low
        if name == "question_mask":
            return (torch.arange(shape[1]) < 7).int().expand(shape).contiguous()
        return torch.randint(0, 250, shape, generator=generator, dtype=example.dtype)

    return {name: like(name, example) for name, example in graph.inputs.items()}


def assert_parity(graph, path: Path, batch: int) -> None:
    inputs = random_inputs(graph, batch)
    with torch.inference_mode():
        expected = graph.module(*inputs.values())
    expected = expected if isinstance(expected, tuple) else (expected,)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    for name, ours, theirs in zip(graph.outputs, session.run(list(graph.outputs), given), expected, strict=True):
        if theirs.dtype.is_floating_point:
            assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE, name
        else:
            assert np.array_equal(ours, theirs.numpy()), name


def named(checkpoint: Checkpoint, name: str) -> Graph:
    return {graph.name: graph for graph in graphs(checkpoint)}[name]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CLOSER_GRAPHS)
def test_committed_graphs_match_pytorch(reference, name, batch):
    graph = named(reference, name)
    assert_parity(graph, ROOT / "model_repository" / graph.name / "1" / "model.onnx", batch)


def committed(name: str) -> Path:
    """The file of a graph in the committed repository."""
    repository = ROOT / "model_repository"
    return file_beside_llm(repository, name) if name in BESIDE_LLM else repository / name / "1" / "model.onnx"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_committed_decoder_for_clips_matches_pytorch(reference, batch):
    assert_parity(named(reference, CLIP_LLM), committed(CLIP_LLM), batch)


@pytest.mark.parametrize(
    ("frames", "budget"),
    [(1, (64, 256)), (2, (64, 64)), (3, (64, 200)), (5, (100, 120)), (8, (64, 256)), (32, (64, 200))],
)
def test_the_committed_clip_graph_matches_pytorch(reference, frames, budget):
    """At any number of frames. What is exported today is this graph: see test_build.py."""
    graph = named(reference, CLIP_GRAPH)
    generator = torch.Generator().manual_seed(frames)
    features = torch.randn(1, 257, 160, generator=generator).repeat(frames, 1, 1)
    features[frames // 2 :, 60:90] += torch.randn(30, 160, generator=generator)  # something changes half-way
    inputs = {
        "features": features,
        "saliency": torch.rand(frames, 256, generator=generator),
        "entropy": torch.rand(frames, 256, generator=generator),
        "texture": torch.rand(frames, 13, 16, 16, generator=generator),
        "times": torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1),
        "question_ids": torch.randint(5, 400, (32,), generator=generator, dtype=torch.int32),
        "question_mask": (torch.arange(32) < 9).int(),
        "clip_budget": torch.tensor(budget, dtype=torch.int32),
    }
    assert list(inputs) == list(graph.inputs)
    with torch.inference_mode():
        expected = graph.module(*inputs.values())
    session = onnxruntime.InferenceSession(committed(CLIP_GRAPH), providers=["CPUExecutionProvider"])
    found = session.run(list(graph.outputs), {name: tensor.numpy() for name, tensor in inputs.items()})
    for name, ours, theirs in zip(graph.outputs, found, expected, strict=True):
        assert ours.shape == tuple(theirs.shape), name
        assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE, name


def test_a_card_tells_of_the_clip_resampler_and_of_the_weights_for_clips(reference, tiny):
    told = card(reference).clip
    assert told is not None
    assert (told.visual_tokens, told.frames, told.vision_tokens) == (64, 32, (64, 256))
    assert told.fingerprint == reference.clip_fingerprint() != ""
    assert card(reference).clip_weights
    assert card(tiny).clip is None
    assert not card(tiny).clip_weights
    assert not {CLIP_GRAPH, CLIP_LLM} & {graph.name for graph in graphs(tiny)}


@pytest.mark.parametrize("name", GRAPHS)
def test_exporter_keeps_any_blip2s_answers(tiny: Checkpoint, exports: SharedExports, name: str):
    graph = named(tiny, name)
    path = exports.path(graph)
    for batch in (1, 3):
        assert_parity(graph, path, batch)
    if graph.name in MAY_VARY:
        assert faults(onnx.load(path), MAY_VARY[graph.name]) == []


def test_only_what_varies_is_dynamic(reference):
    for graph in graphs(reference):
        model = onnx.load(committed(graph.name))
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            found = [dim.dim_param or dim.dim_value for dim in dims]
            varies = graph.dynamic.get(value.name, {})
            assert found == [varies.get(axis, size) for axis, size in enumerate(graph.inputs[value.name].shape)]


def test_exported_files_hold_no_paths_of_the_machine_that_made_them():
    for graph in (ROOT / "model_repository").glob("*/1/*.onnx"):
        assert b"site-packages" not in graph.read_bytes()


def test_decoder_matches_transformers_with_and_without_a_past(reference):
    decoder, language_model = reference.decoder(), reference.model.language_model
    text = reference.model.config.text_config
    ids, visual = torch.randint(5, 400, (2, 9)), torch.randn(2, 4, text.hidden_size)
    given = torch.cat([text.vocab_size + torch.arange(4).expand(2, -1), ids], dim=1)
    heads, head_dim = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    empty = [torch.zeros(2, heads, 0, head_dim)] * (2 * text.num_hidden_layers)
    with torch.inference_mode():
        embedded = torch.cat([visual, language_model.get_input_embeddings()(ids)], dim=1)
        expected = language_model(inputs_embeds=embedded).logits[:, -1]
        whole, *_ = decoder(given, visual, torch.zeros(2).long(), torch.full((2,), 13), *empty)
        _, *past = decoder(given[:, :10], visual, torch.zeros(2).long(), torch.full((2,), 10), *empty)
        rest, *_ = decoder(given[:, 10:], visual, torch.full((2,), 10), torch.full((2,), 3), *past)
    assert torch.allclose(whole, expected, atol=1e-4)
    assert torch.allclose(rest, expected, atol=1e-4)


def test_a_checkpoint_without_allocator_weights_says_so(tiny):
    told = card(tiny)
    assert not told.allocator_trained
    assert (told.hidden_size, told.vision_width, told.vocab_size) == (40, 48, 300)


def test_a_checkpoints_calibration_goes_into_the_card_if_it_is_of_these_weights(tiny):
    width = tiny.model.config.vision_config.hidden_size
    weights = {"weights": tiny.visual_fingerprint(), "language": tiny.language_fingerprint()}
    fitted = replace(calibrated(width), fitted_on=weights | {"images": 7})
    told = card(replace(tiny, card={"name": "tiny", "confidence": fitted.to_json()}))
    assert told.confidence is not None
    assert told.confidence.to_json() == fitted.to_json()
    assert "about 7 images" in told.metadata["confidence"]
    other = replace(fitted, fitted_on={"weights": "of others"})
    dropped = card(replace(tiny, card={"name": "tiny", "confidence": other.to_json()}))
    assert dropped.confidence is None
    assert "of other weights" in dropped.metadata["confidence"]
    assert card(tiny).confidence is None
    assert "not calibrated" in card(tiny).metadata["confidence"]


def another_weight(folder: Path, part: str) -> None:
    """Change one weight whose name begins with this."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if name.startswith(part))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"] |= {"a": told["model"]["vocab"]["b"], "b": told["model"]["vocab"]["a"]}
    path.write_text(json.dumps(told))


def another_bos(folder: Path) -> None:
    """In the configuration: older versions took the token before a prompt from there."""
    told = json.loads((folder / "config.json").read_text())
    told["text_config"]["bos_token_id"] = 0
    (folder / "config.json").write_text(json.dumps(told))


@pytest.mark.parametrize("language", [True, False])
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda folder: another_weight(folder, "language_model."), False),
        (another_tokenizer, False),
        (another_bos, False),
        (lambda folder: (folder / "model_card.json").write_text('{"prompt": "{question}"}'), False),
        (lambda folder: (folder / "model_card.json").write_text('{"licence": "MIT"}'), True),
    ],
    ids=["language model", "tokenizer", "BOS", "prompt", "nothing"],
)
def test_a_calibration_of_another_language_model_is_dropped(tiny, tmp_path, change, kept, language):
    """Confidence comes from its log probabilities. The fingerprint needs no loaded language model."""
    weights = {"weights": tiny.visual_fingerprint(), "language": card(tiny).language_fingerprint}
    fitted = replace(calibrated(tiny.model.config.vision_config.hidden_size), fitted_on=weights)
    shutil.copytree(tiny.directory, tmp_path / "other")
    change(tmp_path / "other")
    other = Checkpoint.load(tmp_path / "other", language=language)
    told = card(replace(other, card=other.card | {"confidence": fitted.to_json()}))
    assert told.visual_fingerprint == tiny.visual_fingerprint()
    assert (told.confidence is not None) == kept
    assert kept or "of another prompt" in told.metadata["confidence"]


def test_of_several_tokens_that_end_an_answer_one_must_be_chosen(tiny, tmp_path):
    """As transformers' Trainer leaves them: the tokenizer's, then the checkpoint's own."""
    shutil.copytree(tiny.directory, tmp_path / "tuned")
    told = tmp_path / "tuned" / "generation_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"eos_token_id": [2, 13]}))
    with pytest.raises(ValueError, match=r"any of the tokens 2 \('</s>'\), 13 .*\{\"end_id\": 13\}"):
        card(Checkpoint.load(tmp_path / "tuned"))
    (tmp_path / "tuned" / "model_card.json").write_text('{"end_id": 13}')
    assert card(Checkpoint.load(tmp_path / "tuned")).end_id == 13


def test_a_default_of_visual_tokens_that_is_not_offered_is_refused(tiny):
    told = {"name": "tiny", "default_visual_tokens": [32, 64]}
    assert card(replace(tiny, card=told | {"visual_tokens": [32, 128]})).default_visual_tokens == (32, 64)
    with pytest.raises(ValueError, match="outside its visual_tokens"):
        card(replace(tiny, card=told))


def test_another_image_size_is_refused_before_anything_is_exported(tmp_path, tiny):
    config = json.loads((tiny.directory / "config.json").read_text())
    config["vision_config"]["image_size"] = 364
    Blip2ForConditionalGeneration(Blip2Config(**config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sees 364 pixels in patches of 14"):
        Checkpoint.load(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        Checkpoint.load(tmp_path)
