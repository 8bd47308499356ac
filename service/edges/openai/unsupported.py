"""Refuse, by its name, every parameter of OpenAI's chat API that is not supported. Values without an effect pass."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from service.edges.http.faults import UNSUPPORTED


class Only:
    """Mark a field that takes these values only. Each of them means what leaving the field out means."""

    def __init__(self, *neutral: object, mend: str = "leave it out") -> None:
        self.neutral = (None, *neutral)
        self.mend = mend

    def check(self, value: object) -> object:
        """Compare types too, because True == 1. Raises PydanticCustomError."""
        if any(type(value) is type(each) and value == each for each in self.neutral):
            return value
        raise unsupported(self.mend)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, core_schema.any_schema())

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.neutral), "description": f"Not supported: {self.mend}."}


def unsupported(mend: str) -> PydanticCustomError:
    return PydanticCustomError(UNSUPPORTED, "is not supported: {mend}", {"mend": mend})


Refused = Annotated[object, Only()]


class Unsupported(BaseModel):
    """Hold the parameters of OpenAI's chat API that Glimpse does not support."""

    audio: Refused = None
    frequency_penalty: Annotated[object, Only(0, 0.0, mend="use repetition_penalty")] = None
    function_call: Annotated[object, Only("none", "auto")] = None
    functions: Annotated[object, Only([])] = None
    logit_bias: Annotated[object, Only({})] = None
    modalities: Annotated[object, Only(["text"], mend="answers are text")] = None
    moderation: Refused = None
    n: Annotated[object, Only(1, mend="ask several times for several answers")] = None
    parallel_tool_calls: Annotated[object, Only(True, False)] = None
    prediction: Refused = None
    presence_penalty: Annotated[object, Only(0, 0.0, mend="use repetition_penalty")] = None
    prompt_cache_options: Refused = None
    reasoning_effort: Annotated[object, Only("none")] = None
    service_tier: Annotated[object, Only("auto", "default", mend="use priority")] = None
    store: Annotated[object, Only(False)] = None
    tool_choice: Annotated[object, Only("none", "auto")] = None
    tools: Annotated[object, Only([])] = None
    verbosity: Annotated[object, Only("medium", mend="use max_tokens")] = None
    web_search_options: Refused = None
