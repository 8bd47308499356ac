"""The parts that the stage `allocator` trains, between the frozen encoder and language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration

from build_engines.model.allocator import RelevanceAllocator, Weighed
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.qformer import QFormer
from build_engines.model.relaxation import Choice, choose, gates_of, region_gates
from build_engines.scenes.questions import Question
from build_engines.scenes.world import GRID
from build_engines.train.adapters import adapt
from build_engines.train.architecture import QUERIES, new_model
from build_engines.train.course import Measures
from build_engines.train.language import decoder_of, row_losses
from build_engines.train.looks import Looks
from build_engines.train.packing import Packer
from build_engines.train.queries import SlotReadout
from build_engines.train.relevance import SHOWN, question_tensors
from build_engines.train.selection import GUIDED, select_each
from build_engines.train.stages import Plan, device, mixed, muon_and_adam, tensor
from build_engines.train.symbols import SlotTable
from build_engines.train.tokens import new_tokenizer

START_RATE = 0.4  # of the learning rates of balancing and the closer view, from a published checkpoint
DEAD_POSITIONS = 96  # the language model's positions from here were never trained


@dataclass
class Rows:
    """Questions about a batch of looks.

    Row i asks question i about image owner[i], and its policy chooses the cells.
    """

    looks: Looks
    owner: Tensor
    questions: list[Question]
    policies: list[str]
    budget: Tensor  # int32 [R, 4]
    closely: bool

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def guided(self) -> Tensor:
        """bool [R]."""
        return torch.tensor([policy == GUIDED for policy in self.policies], device=self.owner.device)

    def truth(self) -> Tensor:
        """float [R, 256]: the patches that show an object asked about."""
        coverage = self.looks.coverage
        shares = [
            coverage[scene][list(question.asked)].max(0).reshape(GRID * GRID)
            for scene, question in zip(self.owner.tolist(), self.questions, strict=True)
        ]
        return tensor((np.stack(shares) > SHOWN).astype(np.float32))


class Looking:
    """The chain after the encoder, with the parts used only in training."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(5)
        self.large_budgets = plan.large_budgets
        self.tokenizer = new_tokenizer()
        self.model: Blip2ForConditionalGeneration = new_model(self.tokenizer, plan.config(self.tokenizer))
        width = self.model.config.vision_config.hidden_size
        self.participatory = ParticipatoryKnowing(len(self.tokenizer), width)
        self.balancing = OpponentProcessing(self.participatory.coupling_width)
        self.closer = CloserView(width)
        self.readout = SlotReadout(self.model.config.qformer_config.hidden_size)
        self.table = SlotTable(self.model.config.text_config.hidden_size)
        for module in (*self.modules.values(), self.table):
            module.to(device())
        self.model.set_attn_implementation("sdpa")
        self.model.requires_grad_(False)
        self.allocator = RelevanceAllocator(self.participatory, self.balancing, self.closer).to(device())
        self.qformer = QFormer(self.model)
        self.qformer.requires_grad_(True)
        self.positions = self.model.language_model.model.decoder.embed_positions
        self.positions.requires_grad_(True)
        self.rate = 1.0  # of the learning rates of balancing and the closer view
        self.adapter_rank, self.adapters = plan.adapter_rank, list[nn.Parameter]()
        self.packer = Packer(self.tokenizer)
        self._decode = decoder_of(self.model.language_model)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {
            "model": self.model,
            "participatory": self.participatory,
            "balancing": self.balancing,
            "closer": self.closer,
            "readout": self.readout,
        }

    @property
    def first_position(self) -> int:
        """The row of position 0: OPT starts at 2."""
        return len(self.positions.weight) - self.model.config.text_config.max_position_embeddings

    def start_from(self, plan: Plan) -> None:
        """Load the weights of the stage `joint`, and balancing and the closer view of a published checkpoint.

        Without one, untrained positions start as those of the words after a 32-token prefix.
        """
        joint = plan.finished("joint")
        for name in ("model", "participatory", "readout"):
            self.modules[name].load_state_dict(joint[name])
        self.table.load_state_dict(plan.finished("language")["table"])
        if plan.start:
            published = plan.published()
            self.balancing.load_state_dict(cast(nn.Module, published.balancing).state_dict())
            self.closer.load_state_dict(cast(nn.Module, published.closer).state_dict())
            self.rate = START_RATE
        else:
            self._begin_positions()
        if self.adapter_rank:
            self.adapters = adapt(self.model.language_model, self.adapter_rank)
            self.positions.requires_grad_(True)

    def _begin_positions(self) -> None:
        rows, start = self.positions.weight.data, self.first_position
        words = rows[start + QUERIES : start + DEAD_POSITIONS].clone()
        rows[start + DEAD_POSITIONS : start + 4 * QUERIES] = words[:QUERIES]
        rows[start + 4 * QUERIES : start + 4 * QUERIES + len(words)] = words

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Low learning rates for the trained Q-Former, high ones for new parts."""
        model = self.model
        seeing = [self.qformer.layernorm, model.language_projection, self.readout, self.positions]
        gentle = muon_and_adam(
            [model.qformer.encoder],
            [model.query_tokens, *(p for module in seeing for p in module.parameters())],
            muon=0.003,
            adam=4e-4,
        )
        groups = [
            {"params": list(self.participatory.parameters()), "lr": 4e-4},
            {"params": list(self.balancing.parameters()), "lr": 2e-3 * self.rate},
            {"params": list(self.closer.parameters()), "lr": 2e-3 * self.rate},
        ]
        if self.adapters:
            groups.append({"params": self.adapters, "lr": 5e-4})
        return [*gentle, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]

    def gradient_norms(self) -> Measures:
        """Gradient norm of each part, before clipping."""
        out, half = self.balancing.out, self.balancing.out.out_features // 2
        parts = {
            "participatory": [p.grad for p in self.participatory.parameters()],
            "weights": [out.weight.grad[:half], out.bias.grad[:half]],
            "tensions": [out.weight.grad[half:], out.bias.grad[half:]],
            "balancing": [p.grad for p in self.balancing.parameters()],
            "closer": [p.grad for p in self.closer.parameters()],
            "qformer": [p.grad for p in self.qformer.parameters()],
        }
        return {
            f"gradient_{name}": torch.stack([g.norm() for g in found if g is not None]).norm().item()
            for name, found in parts.items()
            if any(g is not None for g in found)
        }

    def weigh(self, rows: Rows) -> Weighed:
        """As `RelevanceAllocator.weigh`, computing each image's places once for all its questions."""
        ids, mask = question_tensors(self.tokenizer, rows.questions)
        places = self.participatory.places(rows.looks.features.float())
        maps = rows.looks.maps[rows.owner]
        return self.allocator.balance(maps[:, 0], maps[:, 1], places[rows.owner], ids, mask)

    def choose(self, rows: Rows, weighed: Weighed, noise: Tensor, temperature: float) -> tuple[Choice, Tensor]:
        """The refined cells, and the map that ranks the cells [R, 64]. Only guided rows train the allocator."""
        cells, tensions = select_each(rows.policies, weighed, noise)
        guided = rows.guided[:, None]
        cells = torch.where(guided, cells, cells.detach())
        tensions = torch.where(guided, tensions, tensions.detach())
        made = choose(self.allocator, cells, tensions, rows.budget, closer=rows.closely, temperature=temperature)
        return made, cells

    def read(self, rows: Rows, choice: Choice, cells: Tensor, groups: int = 1) -> Tensor:
        """The Q-Former's outputs, float32 [R, 32 * groups, its width]."""
        features = rows.looks.features.float()
        detail = self.closer(features, rows.looks.detail.float()) if rows.closely else None
        # Tokens belong to an image, gates to a question.
        candidates = self.allocator.allocation.sources(features, detail)
        gates = gates_of(self.allocator.allocation, choice)
        regions = self.allocator.focus(cells.detach()).of_cell
        with mixed():
            outputs = [self.qformer.read(candidates, gates=gates, owner=rows.owner)]
            for region in range(1, groups):
                inside = region_gates(self.allocator.allocation, gates, regions, region)
                outputs.append(self.qformer.read(candidates, gates=inside, owner=rows.owner))
        return torch.cat(outputs, dim=1).float()

    def answer(self, outputs: Tensor, questions: list[Question]) -> tuple[Tensor, Tensor]:
        """The loss [R] and whether the answer is right, bool [R]."""
        prefix = self.model.language_projection(outputs)
        rows = self.packer.rows(questions, prefix.shape[1])
        with mixed():
            return row_losses(self.model.language_model, self._decode, prefix, rows)
