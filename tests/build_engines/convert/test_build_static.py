"""The static graphs in PyTorch equal the CPU's runner, and read every input."""

from __future__ import annotations

import pytest
import torch

from build_engines.convert.static import StaticQFormer, static_graphs
from build_engines.export import graphs
from build_engines.model.checkpoint import Checkpoint
from tests.support.tiny_checkpoints import save_blip2_opt, save_idefics, save_instructblip_vicuna

pytestmark = pytest.mark.slow


SAVED = {"opt": save_blip2_opt, "vicuna": save_instructblip_vicuna, "idefics": save_idefics}


@pytest.fixture(scope="module", params=SAVED.values(), ids=list(SAVED))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    request.param(directory)
    return Checkpoint.load(directory)


def test_every_group_reads_its_own_tokens_and_the_rest_is_zero(checkpoint: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(2)
    width = checkpoint.model.config.vision_config.hidden_size
    tokens = torch.randn(3, 401, width, generator=generator)
    mask = torch.randint(0, 5, (3, 401), generator=generator, dtype=torch.int32)
    queries = checkpoint.queries
    most = 128 // queries
    groups = torch.tensor([[1], [most - 1], [most]], dtype=torch.int32)
    ids, seen = torch.randint(0, 50, (3, 32), generator=generator).int(), torch.ones(3, 32, dtype=torch.int32)
    qformer = checkpoint.qformer()
    question = (ids, seen) if checkpoint.reads_question else ()
    with torch.inference_mode():
        visual, count = StaticQFormer(qformer, most, checkpoint.reads_question, queries)(
            tokens, mask, groups, ids, seen
        )
        expected = torch.zeros_like(visual)
        for group in range(1, most + 1):
            attend = (mask > 0 if group == 1 else mask == group).int()
            rows = qformer(tokens, attend, *question)
            used = groups[:, 0] >= group
            expected[used, queries * (group - 1) : queries * group] = rows[used]
    assert visual.shape[1] == 128
    assert torch.allclose(visual, expected, atol=1e-5)
    assert count[:, 0].tolist() == (queries * groups[:, 0]).tolist()


def test_either_allocator_hands_on_the_same_number_of_rows(checkpoint: Checkpoint) -> None:
    (given,) = (graph for graph in graphs(checkpoint) if graph.name == "relevance_allocator")
    (padded,) = (graph for graph in static_graphs(checkpoint, 1) if graph.name == given.name)
    with torch.inference_mode():
        tokens, mask, *others = given.module(*given.inputs.values())
        all_tokens, all_mask, *same = padded.module(*padded.inputs.values())
    assert (tokens.shape[1], all_tokens.shape[1]) == (257, 401)
    assert torch.equal(all_tokens[:, :257], tokens)
    assert torch.equal(all_mask[:, :257], mask)
    assert not all_mask[:, 257:].any()
    assert all(torch.equal(one, other) for one, other in zip(others, same, strict=True))


def test_their_graphs_have_the_contracts_tensors_and_read_all_of_them(checkpoint: Checkpoint) -> None:
    found = {graph.name: graph for graph in static_graphs(checkpoint, 1)}
    assert list(found["qformer"].inputs) == [
        "vision_tokens", "vision_mask", "query_groups", "question_ids", "question_mask",
    ]  # fmt: skip
    assert list(found["qformer"].outputs) == ["visual_tokens", "visual_count"]
    assert "llm" not in found
    for graph in found.values():
        program = torch.export.export(graph.module, tuple(graph.inputs.values()), strict=False)
        unread = [node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users]
        assert not [name for name in unread if not name.startswith(("p_", "b_", "c_"))], graph.name
