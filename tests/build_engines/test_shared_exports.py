"""Equal graphs have equal digests, so that the tests export each of them once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from build_engines.export import graphs
from build_engines.model.checkpoint import Checkpoint
from tests.support import tiny_checkpoints
from tests.support.graph_digest import digest_of

pytestmark = pytest.mark.slow  # it writes and loads checkpoints

FAMILIES = {name: save for name, save in vars(tiny_checkpoints).items() if name.startswith("save_")}


def digests(save: Callable[[Path], None], folder: Path) -> dict[str, str]:
    """By graph's name, of a checkpoint that is saved in the folder."""
    save(folder)
    return {graph.name: digest_of(graph) for graph in graphs(Checkpoint.load(folder))}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_has_the_same_graphs_wherever_it_lies(name: str, tmp_path: Path) -> None:
    assert digests(FAMILIES[name], tmp_path / "here") == digests(FAMILIES[name], tmp_path / "there" / "deeper")


def test_two_families_with_one_language_model_share_its_graphs(tmp_path: Path) -> None:
    blip2, instructblip = (
        digests(FAMILIES[name], tmp_path / name) for name in ("save_blip2_flan_t5", "save_instructblip_flan_t5")
    )
    shared = {name for name in blip2 if blip2[name] == instructblip[name]}
    assert shared == {"relevance_allocator", "llm_encoder", "llm"}
