"""Vision graphs for GPUs, with every size fixed except the batch.

TensorRT plans and ONNX Runtime use these graphs, with the contract's tensors. On a CPU, the Python runner around the
Q-Former's graph runs only the requested groups. Here the graph itself does this: a plan has no runner, and a runner
cannot index tensors on a GPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from build_engines.export import Graph, examples, graphs, names
from build_engines.model.checkpoint import QUERIES, Checkpoint
from service.core.tensors import MODELS, VISION_SLOTS
from service.core.vision import MAX_VISUAL_TOKENS


class StaticQFormer(nn.Module):
    """Run all groups of the Q-Former in one graph.

    vision_tokens [B, 401, D], vision_mask int32 [B, 401], query_groups int32 [B, 1], question_ids and question_mask
    int32 [B, 32] -> visual_tokens [B, 128, H], rows past the count 0, and visual_count int32 [B, 1].

    `groups` is the most that a request may ask for, each of `queries` visual tokens. Each group is a separate batch of
    the Q-Former.
    """

    def __init__(self, qformer: nn.Module, groups: int, reads_question: bool, queries: int = QUERIES) -> None:
        super().__init__()
        self.qformer = qformer
        self.groups = groups
        self.reads_question = reads_question
        self.queries = queries

    def forward(
        self, vision_tokens: Tensor, vision_mask: Tensor, query_groups: Tensor, question_ids: Tensor,
        question_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = []
        for group in range(1, self.groups + 1):
            attend = ((vision_mask > 0) if group == 1 else (vision_mask == group)).int()
            question = (question_ids, question_mask) if self.reads_question else ()
            tokens = self.qformer(vision_tokens, attend, *question)
            rows.append(tokens * (query_groups >= group).to(tokens.dtype).unsqueeze(2))
        visual = torch.cat(rows, dim=1)
        missing = MAX_VISUAL_TOKENS - visual.shape[1]
        if missing:
            visual = nn.functional.pad(visual, (0, 0, 0, missing))
        count = query_groups * self.queries
        return visual, count if self.reads_question else count + unread(question_ids, question_mask)


class PaddedTokens(nn.Module):
    """Pad an allocator's first two outputs to [B, 401, D] and [B, 401].

    They are the vision tokens and their mask. The Q-Former's graph then reads the same number of rows from either
    allocator.
    """

    def __init__(self, allocator: nn.Module) -> None:
        super().__init__()
        self.allocator = allocator

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tokens, mask, *rest = self.allocator(*inputs)
        missing = VISION_SLOTS - mask.shape[1]
        if missing:
            mask = nn.functional.pad(mask, (0, missing))
            tokens = nn.functional.pad(tokens, (0, 0, 0, missing))
        return tokens, mask, *rest


class ReadsQuestion(nn.Module):
    """Let an untrained allocator read its question inputs without an effect."""

    def __init__(self, allocator: nn.Module, groups_output: int, names: list[str]) -> None:
        super().__init__()
        self.allocator = allocator
        self.groups_output = groups_output
        self.ids, self.mask = names.index("question_ids"), names.index("question_mask")

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = list(self.allocator(*inputs))
        outputs[self.groups_output] = outputs[self.groups_output] + unread(inputs[self.ids], inputs[self.mask])
        return tuple(outputs)


def unread(question_ids: Tensor, question_mask: Tensor) -> Tensor:
    """int32 [B, 1], always 0, computed from both inputs.

    TensorRT drops inputs that nothing reads, and Triton then refuses the model.
    """
    return ((question_ids + question_mask).amax(1, keepdim=True) < 0).int()


def static_graphs(checkpoint: Checkpoint, groups: int) -> list[Graph]:
    """The vision models of `graphs`, in the form that GPUs run."""
    found = []
    for graph in graphs(checkpoint):
        if graph.name == "llm":
            continue
        if graph.name == "qformer":
            found.append(_static_qformer(checkpoint, groups))
        elif graph.name.startswith("relevance_allocator"):
            module: nn.Module = PaddedTokens(graph.module)
            if checkpoint.participatory is None and checkpoint.zero_shot is None:
                module = ReadsQuestion(module, list(graph.outputs).index("query_groups"), list(graph.inputs))
            found.append(dataclasses.replace(graph, module=module.eval()))
        else:
            found.append(graph)
    return found


def _static_qformer(checkpoint: Checkpoint, groups: int) -> Graph:
    width = checkpoint.model.config.vision_config.hidden_size
    inputs = examples(MODELS["qformer"].inputs, {"D": width, "R": VISION_SLOTS})
    inputs |= {name: torch.ones_like(inputs[name]) for name in ("vision_mask", "query_groups", "question_mask")}
    return Graph(
        "qformer",
        StaticQFormer(checkpoint.qformer(), groups, checkpoint.reads_question, checkpoint.queries).eval(),
        inputs,
        {name: {0: "batch"} for name in inputs},
        names(MODELS["qformer"].outputs),
    )
