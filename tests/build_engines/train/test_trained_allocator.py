"""A checkpoint with all allocator parts: on disk, exported, and with the Q-Former's groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from build_engines.convert.tensorrt_rules import MAY_VARY, faults
from build_engines.export import Graph, card, graphs
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.checkpoint import ALLOCATOR, Checkpoint, load_allocator, save_allocator
from build_engines.repository import CLOSER_GRAPHS, GRAPHS, Dimensions, models, write_repository
from tests.build_engines.test_export import assert_parity, random_inputs
from tests.service.core.test_tensors import graph_specs
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt, save_instructblip_vicuna, trained_allocator
from triton_models.query_groups import GroupRunner
from triton_models.session import Graph as Session

pytestmark = pytest.mark.slow

ALLOCATORS = ("relevance_allocator", "relevance_allocator_448")
SAVED: dict[str, Callable[[Path], None]] = {
    "blip2-opt": save_blip2_opt, "instructblip-vicuna": save_instructblip_vicuna
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A checkpoint of one family and its graphs. Those that a test looks at are exported."""

    checkpoint: Checkpoint
    graphs: dict[str, Graph]
    exports: SharedExports

    def path(self, name: str) -> Path:
        return self.exports.path(self.graphs[name])


@pytest.fixture(scope="module", params=SAVED)
def exported(
    request: pytest.FixtureRequest, exports: SharedExports, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    SAVED[request.param](folder / "checkpoint")
    save_allocator(trained_allocator(), folder / "checkpoint" / ALLOCATOR)
    facts = {"visual_tokens": [32, 128], "default_visual_tokens": [32, 64], "closer_view_at": 0.5, "licence": "none"}
    (folder / "checkpoint" / "model_card.json").write_text(json.dumps(facts))
    checkpoint = Checkpoint.load(folder / "checkpoint")
    found = {graph.name: graph for graph in graphs(checkpoint)}
    assert tuple(sorted(found)) == tuple(sorted(CLOSER_GRAPHS))
    return Exported(checkpoint, found, exports)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_its_graphs_match_pytorch(exported: Exported, name: str, batch: int) -> None:
    assert_parity(exported.graphs[name], exported.path(name), batch)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_its_graphs_have_the_configured_tensors(exported: Exported, name: str) -> None:
    told = card(exported.checkpoint)
    (model,) = (each for each in models(Dimensions(told.vision_width, 1, closer_view=True)) if each.name == name)
    graph = onnx.load(exported.path(name)).graph
    for values, tensors in ((graph.input, model.inputs), (graph.output, model.outputs)):
        assert graph_specs(values) == {tensor.name: (tensor.datatype, tensor.dims) for tensor in tensors}


@pytest.mark.parametrize("name", ALLOCATORS)
def test_its_graphs_are_ones_that_tensorrt_builds(exported: Exported, name: str) -> None:
    assert faults(onnx.load(exported.path(name)), MAY_VARY[name]) == []


def test_its_card_says_what_it_was_trained_for(exported: Exported) -> None:
    told = card(exported.checkpoint)
    assert told.allocator_trained
    assert told.closer_view
    assert (told.vision_tokens, told.visual_tokens, told.default_visual_tokens) == ((64, 256), (32, 128), (32, 64))
    assert (told.closer_view_at, told.metadata["licence"]) == (0.5, "none")
    assert "glimpse calibrate" in str(told.metadata["confidence"])


def test_its_card_squashes_pages_unless_it_says_otherwise_and_pads_with_the_encoders_mean(exported: Exported) -> None:
    checkpoint = exported.checkpoint
    assert card(checkpoint).fit == "squash"
    assert card(replace(checkpoint, card={**checkpoint.card, "fit": "tiles"})).fit == "tiles"
    with pytest.raises(ValueError, match="gives the fit 'crop': give one of squash, pad, tiles, auto"):
        card(replace(checkpoint, card={**checkpoint.card, "fit": "crop"}))
    padded = card(replace(checkpoint, image_mean=[0.48145466, 0.4578275, 0.40821073])).pad_colour
    assert padded == (123, 117, 104)


def by_groups(exported: Exported, seen: dict[str, Tensor], question: dict[str, Tensor], row: int) -> Tensor:
    """One image's visual tokens by PyTorch: every group alone, over its own tokens without padding."""
    mask, visual = seen["vision_mask"][row], []
    for group in range(1, int(seen["query_groups"][row]) + 1):
        tokens = seen["vision_tokens"][row : row + 1, mask > 0 if group == 1 else mask == group]
        visible = torch.ones(tokens.shape[:2], dtype=torch.int32)
        asked = [each[row : row + 1] for each in question.values()] if exported.checkpoint.reads_question else []
        visual.append(exported.checkpoint.qformer()(tokens, visible, *asked))
    return torch.cat(visual, dim=1)[0]


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_visual_budget_is_the_groups_over_their_regions(exported: Exported, name: str) -> None:
    graph = exported.graphs[name]
    inputs = random_inputs(graph, 4)
    most = 400 if name.endswith("448") else 256
    inputs["budget"] = torch.tensor([[most, most, count, count] for count in (32, 64, 96, 128)], dtype=torch.int32)
    question = {key: inputs[key] for key in ("question_ids", "question_mask")}
    question["question_ids"] = question["question_ids"] % 70  # InstructBLIP's Q-Former has fewer words
    fed = {key: value.numpy() for key, value in inputs.items()}
    outputs = ["vision_tokens", "vision_mask", "query_groups"]
    chosen = dict(zip(outputs, Session(exported.path(name)).run(fed, outputs), strict=True))
    runner = GroupRunner(exported.path("qformer"))
    found = runner.run(chosen | {key: value.numpy() for key, value in question.items()})
    assert found["visual_count"].tolist() == [[32], [64], [96], [128]]
    with torch.inference_mode():
        seen = dict(zip(graph.outputs, graph.module(*inputs.values()), strict=True))
        for row, count in enumerate((32, 64, 96, 128)):
            expected = by_groups(exported, seen, question, row).numpy()
            assert np.abs(found["visual_tokens"][row, :count] - expected).max() < 1e-3
            assert not found["visual_tokens"][row, count:].any()
            assert len(np.unique(expected[::32], axis=0)) == count // 32  # groups give different tokens
    if name.endswith("448"):
        assert int(seen["levels"].max()) == 2


def test_what_is_saved_is_loaded_rounded_to_half_precision(tmp_path: Path) -> None:
    allocator = trained_allocator()
    save_allocator(allocator, tmp_path / ALLOCATOR)
    found = load_allocator(tmp_path / ALLOCATOR)
    assert found.state_dict().keys() == allocator.state_dict().keys()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, allocator.state_dict()[name].half().float())


@pytest.mark.parametrize("parts", [(), ("participatory",), ("closer",), ("participatory", "balancing")])
def test_each_part_may_be_missing(tmp_path: Path, parts: tuple[str, ...]) -> None:
    whole = trained_allocator()
    own = [getattr(whole, part) if part in parts else None for part in ("participatory", "balancing", "closer")]
    save_allocator(RelevanceAllocator(*own), tmp_path / ALLOCATOR)
    found = load_allocator(tmp_path / ALLOCATOR)
    assert [each is None for each in (found.participatory, found.balancing, found.closer)] == [x is None for x in own]
    assert load_allocator(tmp_path / "none").participatory is None


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / ALLOCATOR
    save_allocator(trained_allocator(), path)
    weights = load_file(path)
    for wrong, told in (
        (weights | {"other.weight": torch.zeros(1)}, "holds weights of unknown parts: other"),
        ({name: weight for name, weight in weights.items() if name != "closer.norm.weight"}, "incomplete"),
        ({name: weight for name, weight in weights.items() if name != "closer.out.bias"}, "incomplete"),
        ({name: weight for name, weight in weights.items() if "balancing" in name}, "participatory knowing"),
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=told):
            load_allocator(path)


@pytest.mark.parametrize("told", [[32, 48], [64, 32], [0, 32], [32, 160], [32], "32", [32.0, 64.0]])
def test_visual_tokens_that_are_no_groups_are_refused(exported: Exported, told: object) -> None:
    with pytest.raises(ValueError, match="visual tokens"):
        card(replace(exported.checkpoint, card={"name": "x", "visual_tokens": told}))


def test_a_repository_keeps_no_closer_view_of_a_checkpoint_before(exported: Exported, tmp_path: Path) -> None:
    for name in CLOSER_GRAPHS:
        (tmp_path / f"{name}.onnx").write_bytes(b"")
    repository = tmp_path / "repository"
    for closer_view in (True, False):
        dimensions = Dimensions(1, 1, closer_view=closer_view)
        write_repository(repository, dimensions, tmp_path, {})
        assert {path.name for path in repository.iterdir()} == {model.name for model in models(dimensions)}
        graphs_there = {path.parts[-3] for path in repository.glob("*/1/model.onnx")}
        assert graphs_there == set(CLOSER_GRAPHS if closer_view else GRAPHS)
