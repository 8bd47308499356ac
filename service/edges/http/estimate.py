"""Serve POST /v1/vqa/estimate: what a question would cost, and whether it would be admitted now."""

from __future__ import annotations

from typing import Self

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from service.core.estimate import Amounts, Estimate
from service.edges.asking import to_request
from service.edges.http.body import JSON, read_body
from service.edges.http.edge import caller_of, edge_of, present, reserved
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import WithNulls
from service.edges.http.vqa import parse_question

router = APIRouter()


class WireAmounts(BaseModel):
    """What admission counts."""

    bytes: int = Field(description="Of request bodies.")
    pixels: int = Field(description="Of images that must be decoded.")
    tokens: int = Field(description="Of the LLM: visual tokens, prompt and `max_tokens`; at least a whole row.")

    @classmethod
    def of(cls, amounts: Amounts) -> Self:
        return cls(bytes=amounts.nbytes, pixels=amounts.pixels, tokens=amounts.tokens)


class WireNotAdmitted(BaseModel):
    code: str
    message: str
    retry_after_s: float


class WireEstimatedImage(BaseModel):
    id: str
    bytes: int
    width: int | None = Field(description="As the file's header says, before EXIF turns the picture.")
    height: int | None
    known: bool = Field(description="Its features are in memory: nothing has to be decoded or encoded.")


class WireEstimatedVideo(BaseModel):
    id: str | None = Field(description="Of its file; null if its frames came as images.")
    bytes: int
    frames: int = Field(description="The most that would be looked at.")
    known: bool = Field(description="The features of all of them are in memory: nothing has to be decoded or encoded.")


class VqaEstimate(WithNulls):
    """What a question would take. Nothing is decoded, encoded or reserved for it."""

    model: str
    admitted: bool = Field(description="Whether there is room for it now.")
    refusal: WireNotAdmitted | None = Field(description="Why not.")
    prompt_tokens: int = Field(description="Text tokens of the prompt.")
    image_tokens: tuple[int, int] = Field(description="The least and the most visual tokens that the LLM would read.")
    vision_tokens: tuple[int, int] = Field(
        description="The least and the most vision tokens, all images and frames together."
    )
    max_tokens: int
    reduced: bool = Field(description="It would be looked at less closely than the request allows, because of load.")
    images: list[WireEstimatedImage]
    video: WireEstimatedVideo | None
    cost: WireAmounts = Field(description="What would be reserved.")
    limits: WireAmounts = Field(description="Of all requests together.")

    @classmethod
    def of(cls, estimate: Estimate, model: str) -> Self:
        refusal = estimate.refusal
        return cls(
            model=model,
            admitted=refusal is None,
            refusal=refusal
            and WireNotAdmitted(code=refusal.code, message=refusal.message, retry_after_s=refusal.retry_after_s),
            prompt_tokens=estimate.prompt_tokens,
            image_tokens=estimate.visual_tokens,
            vision_tokens=estimate.vision_tokens,
            max_tokens=estimate.max_tokens,
            reduced=estimate.reduced,
            images=[
                WireEstimatedImage(
                    id=each.id, bytes=each.nbytes, width=each.width, height=each.height, known=each.known
                )
                for each in estimate.images
            ],
            video=None
            if (clip := estimate.clip) is None
            else WireEstimatedVideo(id=clip.id or None, bytes=clip.nbytes, frames=clip.frames, known=clip.known),
            cost=WireAmounts.of(estimate.cost),
            limits=WireAmounts.of(estimate.limits),
        )


@router.post("/v1/vqa/estimate")
async def estimate(request: Request) -> Response:
    """Say what a question would cost and whether it would be admitted now. The body is that of `POST /v1/vqa`.

    Only the headers of its images are read, so the beginning of a file is enough; the bytes counted are those sent.
    """
    edge, caller = edge_of(request), caller_of(request)
    reservation = reserved(request, caller.tenant, row=False)
    body = await read_body(request, edge.bodies.max_body_bytes, edge.bodies, reservation)
    await edge.turns.next()
    _, fields = await parse_question(body, request.headers.get("content-type", JSON), edge)
    card = edge.pipeline.card_for(caller.route)
    question = to_request(fields, card, edge.questions, caller)
    async with present(request.receive, question.timeout_s, reservation):
        return JsonResponse(VqaEstimate.of(await edge.pipeline.estimate(question, reservation), card.name))
