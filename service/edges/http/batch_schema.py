"""Define the wire types of a batch over HTTP: one line for each question, and one for each result."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, RootModel, WithJsonSchema

from service.core.request import Priority
from service.edges.http.schema import VqaAnswer, VqaRequest, WireError, WithNulls, or_default


def _whole_answers(value: bool) -> bool:
    if value:
        raise ValueError("must be false: a batch sends each answer whole")
    return value


class BatchQuestion(VqaRequest):
    """One question of a batch: a question as JSON, but for the defaults."""

    priority: Annotated[Priority | None, or_default(Priority.LOW)] = Field(
        Priority.LOW, description="`low` lets your other requests go first while the service is busy."
    )
    stream: Annotated[
        bool,
        or_default(False),
        AfterValidator(_whole_answers),
        WithJsonSchema({"anyOf": [{"const": False}, {"type": "null"}]}),
    ] = Field(False, description="A batch sends each answer whole.")


INDEX = Field(description="The question's place in the batch, from 0.")


class BatchAnswer(VqaAnswer):
    """The answer of one question of a batch."""

    index: int = INDEX


class BatchError(WithNulls):
    """One question of a batch that failed."""

    index: int = INDEX
    status: int = Field(description="The status that the question would have got alone.")
    error: WireError


class BatchEnd(WithNulls):
    """In place of all results that are still missing: why the batch ended early."""

    error: WireError


class BatchLine(RootModel[BatchAnswer | BatchError | BatchEnd]):
    """One line of a batch's results, in the order in which they are ready."""


def line_of(result: BaseModel) -> bytes:
    return result.model_dump_json(exclude_none=not isinstance(result, WithNulls)).encode() + b"\n"
