"""The limits of a request's fields, through the routes: the last value that is taken, and the first that is not."""

import base64
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from service.edges.http.application import http_api
from tests.support.fakes import CLOSER, House, png

IMAGE = base64.b64encode(png()).decode()
CHARS, TIMEOUT_S = 40, 5  # the house's max_question_chars and max_timeout_s


class Caller:
    """An HTTP client of a service without Triton, as JSON or as a form."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(http_api(house.edge)), base_url="http://localhost")

    async def ask(self, **changes: object) -> httpx.Response:
        return await self.http.post("/v1/vqa", json={"image": IMAGE, "question": "what colour?"} | changes)

    async def fill_in(self, **changes: str) -> httpx.Response:
        fields = {"question": "what colour?"} | changes
        return await self.http.post("/v1/vqa", data=fields, files={"image": ("x.png", png())})

    async def close(self) -> None:
        await self.http.aclose()
        self.house.reader.close()


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(CLOSER, max_question_chars=CHARS, max_timeout_s=TIMEOUT_S, default_timeout_s=TIMEOUT_S))
    yield caller
    await caller.close()


def refusal(response: httpx.Response) -> tuple[str, str]:
    """The field at fault and what is said of it."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


LAST_TAKEN = {
    "question": "w" * CHARS,
    "timeout_s": TIMEOUT_S,
    "max_tokens": 1,
    "temperature": 5,
    "top_k": 1_000_000,
    "top_p": 1,
    "seed": 2**63 - 1,
    "repetition_penalty": 10,
    "stop": ["." * 64] * 8,
}
FIRST_REFUSED = {
    "question": ("w" * (CHARS + 1), f"{CHARS + 1} characters, the limit is {CHARS}: shorten it"),
    "timeout_s": (TIMEOUT_S + 0.001, f"the limit is {TIMEOUT_S}"),
    "max_tokens": (0, "greater than or equal to 1"),
    "temperature": (5.001, "less than or equal to 5"),
    "top_k": (1_000_001, "less than or equal to 1000000"),
    "top_p": (1.001, "less than or equal to 1"),
    "seed": (2**63, "less than or equal to"),
    "repetition_penalty": (10.001, "less than or equal to 10"),
}


@pytest.mark.parametrize(("field", "value"), LAST_TAKEN.items(), ids=LAST_TAKEN)
async def test_the_last_value_within_a_limit_is_taken(caller, field, value):
    assert (await caller.ask(**{field: value})).status_code == 200
    if field in ("temperature", "top_k", "top_p", "seed", "repetition_penalty", "max_tokens"):
        assert getattr(caller.house.language.sampling[-1], field) == value


@pytest.mark.parametrize(("field", "value", "said"), [(name, *each) for name, each in FIRST_REFUSED.items()])
async def test_the_first_value_beyond_a_limit_is_refused(caller, field, value, said):
    param, message = refusal(await caller.ask(**{field: value}))
    assert param == field
    assert said in message


LEAST_TAKEN = {"timeout_s": 0.9, "temperature": 0, "top_k": 0, "top_p": 1e-6, "seed": 0, "repetition_penalty": 0.01}
TOO_LITTLE = {"timeout_s": 0, "temperature": 0.009, "top_k": -1, "top_p": 9e-7, "seed": -1, "repetition_penalty": 0.009}


@pytest.mark.parametrize("field", LEAST_TAKEN)
async def test_the_least_value_is_taken_and_what_is_below_it_refused(caller, field):
    assert (await caller.ask(**{field: LEAST_TAKEN[field]})).status_code == 200
    assert refusal(await caller.ask(**{field: TOO_LITTLE[field]}))[0] == field


@pytest.mark.parametrize(
    ("stop", "taken"),
    [([], True), (["."] * 8, True), (["."] * 9, False), (["." * 64], True), (["." * 65], False), ([""], False)],
    ids=["none", "8", "9", "64 characters", "65 characters", "empty"],
)
async def test_stop_holds_at_most_eight_strings_of_64_characters(caller, stop, taken):
    response = await caller.ask(stop=stop)
    assert response.status_code == (200 if taken else 400)
    if taken:
        assert caller.house.language.sampling[-1].stop == tuple(stop)
    else:
        param, message = refusal(response)
        assert param == "stop"
        assert message.startswith("stop may hold at most 8 strings of 1 to 64 characters; it is [")


async def test_question_and_turns_share_one_limit_after_their_blanks_are_cut(caller):
    """Both sides of every turn count."""
    turns = [{"question": "q" * 9, "answer": " " + "a" * 8}, {"question": "q" * 7 + "\n", "answer": "a" * 6}]
    told = 9 + 8 + 7 + 6
    assert (await caller.ask(question=f"  {'w' * (CHARS - told)}  ", turns=turns, max_tokens=8)).status_code == 200
    param, message = refusal(await caller.ask(question="w" * (CHARS - told + 1), turns=turns))
    assert param == "turns"
    assert (
        message == f"question and turns have {CHARS + 1} characters, the limit is {CHARS}: leave the earliest turns out"
    )
    assert (await caller.ask(question="w" * CHARS, turns=[])).status_code == 200


async def test_64_turns_are_taken_and_65_are_not():
    caller = Caller(House(CLOSER, max_question_chars=10_000))
    turn = {"question": "a", "answer": "b"}
    # 64 turns are longer than the tiny model's context: what is said of them then is another refusal.
    assert "context" in (await caller.ask(turns=[turn] * 64)).json()["error"]["code"]
    assert "at most 64 items" in refusal(await caller.ask(turns=[turn] * 65))[1]
    form = await caller.fill_in(turns=json.dumps([turn] * 65))
    assert "at most 64 items" in refusal(form)[1]
    await caller.close()


@pytest.mark.parametrize("field", ["seed", "budget", "timeout_s"])
async def test_null_in_a_form_is_a_field_left_out(caller, field):
    """As in JSON: a generated form writes `null` where nothing was chosen."""
    response = await caller.fill_in(**{field: "null"})
    assert response.status_code == 200, response.text
    assert (await caller.ask(**{field: None})).status_code == 200


async def test_null_is_no_question(caller):
    """A form's question may say null."""
    assert refusal(await caller.ask(question=None))[0] == "question"


@pytest.mark.parametrize("field", ["max_tokens", "temperature", "top_k", "top_p", "repetition_penalty"])
async def test_null_leaves_any_other_field_out(caller, field):
    for response in (await caller.ask(**{field: None}), await caller.fill_in(**{field: "null"})):
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("as_form", [True, False])
async def test_without_timeout_s_the_default_holds(as_form):
    caller = Caller(House(default_timeout_s=0.05, max_timeout_s=60))
    caller.house.vision.close("see")
    response = await (caller.fill_in(timeout_s="null") if as_form else caller.ask(timeout_s=None))
    assert response.status_code == 504, response.text
    await caller.close()


@pytest.mark.parametrize(("count", "counted"), [(100, False), (101, True)])
async def test_a_hundred_faults_are_told_by_the_first_and_more_are_counted(caller, count, counted):
    response = await caller.ask(**{f"zzz{number}": 1 for number in range(count)})
    _, message = refusal(response)
    assert (f"{count} faults" in message) is counted
    assert (f"and {count - 1} more" in message) is not counted


@pytest.mark.parametrize(("given", "more"), [({"zzz": 1}, ""), ({"zzz": 1, "zzy": 2}, " (and 1 more)")])
async def test_one_fault_has_no_more_beside_it(caller, given, more):
    _, message = refusal(await caller.ask(**given))
    assert message.endswith(more) if more else "more)" not in message


@pytest.mark.parametrize("name", ["vision_tokens", "visual_tokens"])
async def test_a_budget_of_tokens_is_bounded_before_the_model_is_asked(caller, name):
    assert "less than or equal to 1000000" in refusal(await caller.ask(budget={name: [64, 1_000_001]}))[1]
    assert "greater than or equal to 0" in refusal(await caller.ask(budget={name: [-1, 64]}))[1]
    _, message = refusal(await caller.ask(budget={name: [0, 1_000_000]}))
    assert "equal to" not in message  # what is said now is the model's own range
