"""Serve GET and PATCH /v1/variants: what administrators see of the variants, and change for all gateways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self, cast

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from service.core.access import Grant
from service.core.errors import Forbidden, InvalidRequest, NotFound
from service.core.variant import MOST_WEIGHT, VariantsChange, VariantState
from service.edges.http.access import GRANT
from service.edges.http.answering import media_type_of
from service.edges.http.body import BOM, JSON, read_small_body
from service.edges.http.edge import caller_of, edge_of
from service.edges.http.faults import invalid_request
from service.edges.http.respond import JsonResponse

MAX_BYTES = 64 * 1024

router = APIRouter()


class WireVariant(BaseModel):
    name: str
    model: str | None = Field(description="Its card's name; left out until this gateway has read its models.")
    weight: float
    share: float = Field(description="Of the questions that name no variant, 0 to 1, while all variants answer.")
    draining: bool = Field(description="It gets no new questions.")
    tritons: int = Field(description="How many this gateway knows.")
    tritons_out: int = Field(description="How many of them get no requests of this gateway.")
    in_flight: int = Field(description="Questions that it answers in this gateway.")

    @classmethod
    def of(cls, state: VariantState) -> Self:
        return cls(
            name=state.name,
            model=state.model or None,
            weight=state.weight,
            share=round(state.share, 6),
            draining=state.is_draining,
            tritons=state.tritons,
            tritons_out=state.tritons_out,
            in_flight=state.in_flight,
        )


class VariantList(BaseModel):
    """The variants; none in a service without variants."""

    object: Literal["list"] = "list"
    sticky: Literal["session", "tenant"] | None = Field(None, description="What stays with a variant.")
    data: list[WireVariant]

    @classmethod
    def of(cls, states: Sequence[VariantState], sticky: str) -> Self:
        return cls(sticky=cast(Literal["session", "tenant"], sticky), data=[WireVariant.of(each) for each in states])


Weight = Annotated[float, Field(ge=0, le=MOST_WEIGHT, allow_inf_nan=False)]


class VariantsUpdate(BaseModel):
    """A change of some variants. Those that it does not name stay as they are."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    weights: Annotated[dict[str, Weight], Field(min_length=1)] = Field(
        default_factory=dict, description="Weights by the variants' names. 0: only callers that name it get it."
    )
    draining: Annotated[dict[str, bool], Field(min_length=1)] = Field(
        default_factory=dict, description="By name, whether a variant gets no new questions."
    )

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Types are not converted. Raises InvalidRequest."""
        try:
            update = cls.model_validate_json(body, strict=True)
        except ValidationError as exc:
            raise invalid_request(exc, cls.model_fields, {}) from exc
        if not update.model_fields_set:
            raise InvalidRequest('the body changes nothing: send {"weights": {"stable": 95, "next": 5}} or draining')
        return update


def require_administrator(request: Request) -> None:
    """A key was checked by its path's scope. Without keys nobody is an administrator. Raises Forbidden."""
    if not cast(Grant, request.scope[GRANT]).key:
        raise Forbidden(
            "this call needs an API key with the scope admin, and the service has no keys: make one with `glimpse keys "
            "create --scope admin`, or use `glimpse variants` where the variants are kept"
        )


@router.get("/v1/variants")
async def list_variants(request: Request) -> Response:
    """Describe the variants as this gateway uses them: weights, what drains, how many Tritons, questions in flight."""
    require_administrator(request)
    control = edge_of(request).variants
    return JsonResponse(VariantList(data=[]) if control is None else VariantList.of(control.states(), control.sticky))


@router.patch("/v1/variants")
async def change_variants(request: Request) -> Response:
    """Change weights, and which variants drain: all of it or nothing, for all gateways, which follow within a second.

    The answer has the variants as they are kept now.
    """
    require_administrator(request)
    edge, caller = edge_of(request), caller_of(request)
    if (kind := media_type_of(request.headers.get("content-type", JSON))) != JSON:
        raise InvalidRequest(
            f"content-type {kind[:80]!r} is not read here: send {JSON}", code="unsupported_content_type"
        )
    body = await read_small_body(request, MAX_BYTES, edge.bodies)
    update = VariantsUpdate.from_json(body.removeprefix(BOM))
    if edge.variants is None:
        raise NotFound("this service has no variants: set GLIMPSE_VARIANTS to have some", code="no_variants")
    states = await edge.variants.change(
        VariantsChange(update.weights, update.draining),
        tenant=caller.tenant,
        key=caller.key,
        request_id=caller.trace_id,
    )
    return JsonResponse(VariantList.of(states, edge.variants.sticky))
