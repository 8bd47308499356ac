"""Hold what answers questions: each variant's card, prompts, vision stage and LLM; and say who answers a request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from service.core.card import ModelCard
from service.core.errors import InvalidRequest, NotFound
from service.core.guide import Guide
from service.core.models import LanguageModel
from service.core.request import Budget, Clip, Request
from service.core.variant import ANY, DEFAULT, Route, Served
from service.text.prompt import PromptBuilder, token_bytes
from service.text.spelling import Spelling, needed
from service.upstreams.retry_budget import RetryBudget
from service.upstreams.variants import EVERY, Sticky, assigned, words
from service.vision_stage import VisionStage
from service.vision_stage.estimating import Estimator


class Health(Protocol):
    """Know whether a variant's Tritons answer."""

    @property
    def answers(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Model:
    """One variant's models."""

    card: ModelCard
    prompts: PromptBuilder
    vision_stage: VisionStage
    language: LanguageModel
    estimator: Estimator
    variant: str = DEFAULT
    weight: float = 1.0
    is_draining: bool = False
    health: Health | None = None  # None: there is no other that could answer
    in_flight: int = 0  # attempts
    users: int = 0  # requests that may still try it
    spelled: list[bytes] = field(default_factory=list)  # each token's bytes; read from the tokenizer if left out
    spelling: Spelling = field(init=False)

    def __post_init__(self) -> None:
        self.spelled = self.spelled or token_bytes(self.prompts.tokenizer)
        self.spelling = Spelling.of(self.spelled)

    @property
    def answers(self) -> bool:
        return self.health is None or self.health.answers

    def adapted(self, request: Request) -> Request:
        """Return the request with this model's defaults for what its caller left out."""
        (gave_vision, gave_visual), budget = request.gave_budget, request.budget
        own = Budget(
            budget.vision_tokens if gave_vision else self.card.unasked_vision_tokens(request.seen_detail),
            budget.visual_tokens if gave_visual else self.card.default_visual_tokens,
        )
        return request if own == budget else replace(request, budget=own)

    def check(self, request: Request) -> int:
        """Return the most LLM tokens that the request can use. Raises InvalidRequest if the model cannot answer it."""
        budget, card = request.budget, self.card
        if request.clip is not None:
            self._check_clip(request, request.clip)
        if request.system and not card.system_template:
            raise InvalidRequest(
                f"{card.name} has no place for a system message: put it into the question", param="system"
            )
        if request.sampling.top_log_probs and not card.top_log_probs:
            raise InvalidRequest(
                f"the server of {card.name} tells no likeliest tokens: leave top_logprobs out",
                param="top_logprobs",
                code="top_logprobs_not_supported",
            )
        if request.detail == "high" and not card.closer_view:
            raise InvalidRequest(
                f'{card.name} has no closer view: leave detail out, or ask for "low" or "auto"',
                param="detail",
                code="detail_not_supported",
            )
        if request.min_confidence is not None and card.confidence is None:
            raise InvalidRequest(
                f"{card.name} does not tell how sure it is (GET /v1/models says why): leave min_confidence out",
                param="min_confidence",
                code="confidence_not_supported",
            )
        if request.min_confidence is not None and not card.tells_confidence(request):
            what = "a video" if request.clip is not None else "several images"
            raise InvalidRequest(
                f"min_confidence cannot be asked of {what}: confidence is calibrated for one image only. Leave it out",
                param="min_confidence",
                code="confidence_not_supported",
            )
        if (guide := request.sampling.guide) is not None:
            self._check_guide(guide)
        detail = request.seen_detail
        offered = card.vision_tokens_for(detail)
        model = f"{card.name} with detail {detail}" if card.closer_view else card.name
        require_range("budget.vision_tokens", budget.vision_tokens, offered, model)
        require_range("budget.visual_tokens", budget.visual_tokens, card.visual_tokens, card.name, multiple_of=32)
        self._check_clip_tokens(request)
        return self.prompts.require_room(request)

    def _check_guide(self, guide: Guide) -> None:
        """Raises InvalidRequest if the model's answers cannot follow the guide."""
        why = ""
        if not self.card.guides:
            why = f"the server of {self.card.name} cannot constrain answers: leave {guide.field} out"
        elif lacking := self.spelling.lacks(needed(guide)):
            told = ", ".join(map(repr, lacking))
            why = (
                f"no token of {self.card.name} has {told}, which {guide.field} must have: leave {guide.field} out, or "
                "ask for other characters"
            )
        if why:
            raise InvalidRequest(why, param=guide.field, code="constraints_not_supported")

    def _check_clip(self, request: Request, clip: Clip) -> None:
        """Raises InvalidRequest if the model cannot answer about the clip."""
        most = self.card.most_frames
        if isinstance(clip.source, tuple) and clip.frames == len(clip.source) > most:
            raise InvalidRequest(
                f"frames has {clip.frames} images: {self.card.name} looks at {most} frames at most. Send fewer, or say "
                "how many with video_frames",
                param="frames",
            )
        if clip.frames is not None and not 1 <= clip.frames <= most:
            raise InvalidRequest(
                f"video_frames is {clip.frames}: {self.card.name} looks at 1 to {most} frames", param="video_frames"
            )
        if request.images:  # what follows is about them
            return
        if request.detail == "high":
            raise InvalidRequest(
                'the frames of a video have no closer view: leave detail out, or ask for "low" or "auto"',
                param="detail",
                code="detail_not_supported",
            )
        if request.fit not in (None, "squash"):
            raise InvalidRequest(
                f'the frames of a video are seen squashed, and fit is "{request.fit}": leave fit out', param="fit"
            )

    def _check_clip_tokens(self, request: Request) -> None:
        """Raises InvalidRequest if a question about a clip alone asks for visual tokens that its resampler never makes.

        Beside images, the budget is about them.
        """
        resampler, (_, gave_visual) = self.card.clip, request.gave_budget
        if request.clip is None or resampler is None or request.images or not gave_visual:
            return
        least, most = request.budget.visual_tokens
        if not least <= resampler.visual_tokens <= most:
            raise InvalidRequest(
                f"budget.visual_tokens [{least}, {most}] is without {resampler.visual_tokens}, which is what "
                f"{self.card.name} makes of a video: leave visual_tokens out",
                param="budget.visual_tokens",
            )


@dataclass(frozen=True, slots=True)
class Choice:
    """One variant that can answer a request: the request with its defaults, and the most LLM tokens that it can use."""

    model: Model
    request: Request
    tokens: int


class Models:
    """Hold the models in use. Without variants there is one, and nothing is chosen."""

    def __init__(self, models: Sequence[Model], *, named: bool = False, sticky: Sticky = "session") -> None:
        """`named`: the service has variants, so answers say which one it was."""
        self.models = list(models)
        self.named = named
        self.sticky = sticky
        self.retries = RetryBudget(time.monotonic())  # of this gateway, for Tritons and variants together

    @property
    def primary(self) -> Model:
        """Return the model that gets most questions: its card describes the service."""
        return max(self.models, key=lambda model: (not model.is_draining, model.weight))

    def asked(self, route: Route) -> list[Model]:
        """Return the models that a caller may get, the one with most weight first.

        Raises InvalidRequest for an unknown variant, NotFound for an unknown model.
        """
        if not self.named and route == ANY:
            return self.models
        found = [model for model in self.models if not model.is_draining]
        if route.variant:
            found = [model for model in found if model.variant == route.variant]
            if not found:
                raise self._no_variant(route.variant)
        if route.model and not (self.named and route.model == EVERY):
            found = [model for model in found if route.model in (model.card.name, self._name(model))]
            if not found:
                raise self._no_model(route.model)
        return sorted(found, key=lambda model: (-model.weight, model.variant)) if len(found) > 1 else found

    def offers(self) -> list[tuple[str, ModelCard]]:
        """Return the names that a caller can ask for, and their cards."""
        found = [(self._name(model), model.card) for model in self.models if not model.is_draining]
        return [(EVERY, self.primary.card), *found] if self.named else found

    def choices(self, request: Request) -> list[Choice]:
        """Return the variants that can answer the request.

        Raises InvalidRequest if none can, and what `asked` does.
        """
        found: list[Choice] = []
        faults: list[InvalidRequest] = []
        for model in self.asked(request.route):
            adapted = model.adapted(request) if self.named else request
            try:
                found.append(Choice(model, adapted, model.check(adapted)))
            except InvalidRequest as fault:
                faults.append(fault)
        if not found:
            raise faults[0]
        return found

    def in_order(self, choices: Sequence[Choice], first_image: str) -> tuple[Model, list[Choice]]:
        """Return the caller's own variant, and the choices in the order in which they are tried: it, then by weight.

        A variant whose Tritons do not answer comes last. A caller that names its variant gets no other, and one
        without a weight is for callers that name it.
        """
        if len(choices) == 1:
            return choices[0].model, list(choices)
        some = [choice for choice in choices if choice.model.weight > 0] or list(choices)
        request = some[0].request
        key = f"{request.tenant}\0"
        if self.sticky == "session":
            key += request.route.session or first_image or request.id
        own = assigned(key, [(choice.model.variant, choice.model.weight) for choice in some])
        order = sorted(some, key=lambda choice: (not choice.model.answers, choice.model.variant != own))
        return next(choice.model for choice in some if choice.model.variant == own), order

    def served(self, model: Model, own: Model) -> Served:
        """Say that `model` answers a request of `own`."""
        instead = "" if model is own else own.variant
        return Served(model.variant, model.card.name, model.card.visual_fingerprint, instead, self.named)

    def _name(self, model: Model) -> str:
        return model.variant if self.named else model.card.name

    def _no_variant(self, name: str) -> InvalidRequest:
        known = [model.variant for model in self.models if not model.is_draining]
        return InvalidRequest(
            f"there is no variant {name[:64]!r}: {words(known)}. Without x-glimpse-variant the weights decide",
            param="x-glimpse-variant",
            code="unknown_variant",
        )

    def _no_model(self, name: str) -> NotFound:
        known = dict.fromkeys([model.card.name for model in self.models if not model.is_draining])
        if self.named:
            known = dict.fromkeys([EVERY, *known, *(model.variant for model in self.models if not model.is_draining)])
        return NotFound(
            f"there is no model {name[:100]!r}: ask for {' or '.join(map(repr, known))}",
            param="model",
            code="model_not_found",
        )


def require_range(
    name: str, asked: tuple[int, int], offered: tuple[int, int], model: str, multiple_of: int = 1
) -> None:
    """Raise InvalidRequest unless least <= most and both are in the offered range."""
    least, most = asked
    if least > most:
        raise InvalidRequest(f"{name} is [least, most], and {least} is more than {most}: swap them", param=name)
    if least < offered[0] or most > offered[1]:
        raise InvalidRequest(
            f"{name} [{least}, {most}] is outside [{offered[0]}, {offered[1]}], which is what {model} offers",
            param=name,
        )
    if least % multiple_of or most % multiple_of:
        raise InvalidRequest(f"{name} [{least}, {most}] must be multiples of {multiple_of}", param=name)
