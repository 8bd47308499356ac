"""Run the Q-Former over query groups: the same 32 queries once for each group that a request uses.

A small budget therefore costs less. B: images. N: vision tokens. D: vision width. H: the LLM's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.core.errors import InvalidRequest
from service.core.vision import MAX_VISUAL_TOKENS
from triton_models.engine import Array, open_engine


class GroupRunner:
    """Run the Q-Former's graph [B, N, D] -> [B, 32, H] over query groups.

    Group 1 reads all tokens whose mask is above 0; group g > 1 reads only those whose mask is g. Padding is cut off
    before the run, and the focus groups' tokens are gathered. Each of the two runs is as long as its longest list.
    """

    def __init__(self, graph: Path, intra_op_threads: int = 1, library: str = "onnxruntime") -> None:
        self._graph = open_engine(graph, intra_op_threads, library=library)
        _, queries, hidden = self._graph.outputs["visual_tokens"]
        self.queries = int(queries)
        self.hidden_size = int(hidden)
        self._float = self._graph.float_type("visual_tokens")
        self.groups = MAX_VISUAL_TOKENS // self.queries
        self._reads_question = "question_ids" in self._graph.inputs  # InstructBLIP's does

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model's inputs by name, rows first -> visual_tokens [B, 128, H], visual_count int32 [B, 1]."""
        mask, groups = inputs["vision_mask"], inputs["query_groups"][:, 0]
        if mask.shape[1] != inputs["vision_tokens"].shape[1]:
            raise InvalidRequest(
                f"vision_mask has {mask.shape[1]} entries for {inputs['vision_tokens'].shape[1]} vision_tokens: "
                "send one for each",
                param="vision_mask",
            )
        if groups.min() < 1 or groups.max() > self.groups:
            raise InvalidRequest(
                f"query_groups has values from {groups.min()} to {groups.max()}: send 1 to {self.groups}",
                param="query_groups",
            )
        visual = np.zeros((len(mask), self.groups, self.queries, self.hidden_size), self._float)
        everyone = np.arange(len(mask))
        visual[everyone, 0] = self._query(inputs, everyone, mask > 0)
        if groups.max() > 1:
            image, group = np.nonzero(np.arange(1, self.groups) < groups[:, np.newaxis])
            visual[image, group + 1] = self._query(inputs, image, mask[image] == group[:, np.newaxis] + 2)
        count = (groups * self.queries).astype(np.int32)[:, np.newaxis]
        return {"visual_tokens": visual.reshape(len(mask), -1, self.hidden_size), "visual_count": count}

    def _query(
        self, inputs: Mapping[str, Array], images: npt.NDArray[np.intp], visible: npt.NDArray[np.bool_]
    ) -> Array:
        """Run the graph once: row i reads the `visible` [n, N] vision tokens of image images[i] -> [n, 32, H]."""
        counts = np.count_nonzero(visible, axis=1)
        if not counts.all():
            raise InvalidRequest(
                "vision_mask leaves a query group without a vision token: mark at least one per group",
                param="vision_mask",
            )
        longest = int(counts.max())
        if visible[:, :longest].sum() == counts.sum():  # the visible tokens already come first
            tokens, attend = inputs["vision_tokens"][images, :longest], visible[:, :longest]
        else:
            front = np.argsort(~visible, axis=1, kind="stable")[:, :longest]
            tokens = inputs["vision_tokens"][images[:, np.newaxis], front]
            attend = np.take_along_axis(visible, front, axis=1)
        feeds: dict[str, Array] = {"vision_tokens": tokens, "attend": attend.astype(np.int32)}
        if self._reads_question:
            feeds |= {name: inputs[name][images] for name in ("question_ids", "question_mask")}
        return self._graph.run(feeds, ["visual_tokens"])[0]
