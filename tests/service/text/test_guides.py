"""Test what llguidance makes of guides: which answers it allows, and which guides it refuses."""

import asyncio
import gc
import time
from pathlib import Path

import numpy as np
import pytest

from service.core.card import LLM_TOKENIZER, ModelCard
from service.core.errors import InvalidRequest
from service.core.guide import Guide, guide_of
from service.text.guide_checks import GuideChecks
from service.text.guides import Compiled, Guides
from service.text.prompt import load_tokenizer, token_bytes
from tests.support.paths import PROJECT

REPOSITORY = PROJECT / "model_repository"
COUNT = {
    "type": "object",
    "properties": {"Count": {"type": "integer"}, "where": {"type": "array", "items": {"type": "string"}}},
    "required": ["Count", "where"],
    "additionalProperties": False,
}


def guide(choices=None, regex=None, json_schema=None) -> Guide:
    found = guide_of(choices, regex, json_schema)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def spelled() -> list[bytes]:
    return token_bytes(load_tokenizer(REPOSITORY / LLM_TOKENIZER))


@pytest.fixture(scope="module")
def guides(spelled) -> Guides:
    tokenizer = load_tokenizer(REPOSITORY / LLM_TOKENIZER)
    card = ModelCard.from_json(Path(REPOSITORY / "card.json").read_text())
    return Guides(spelled, card.end_id, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


BYTES = Guides.of_bytes()


def allows(wanted: Guide, answer: str) -> bool:
    matcher = BYTES.compile(wanted).matcher.deep_copy()
    data = list(answer.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def tokens_in(mask: np.ndarray, spelled: list[bytes]) -> set[bytes]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(spelled)]
    return {spelled[token] for token in np.flatnonzero(bits)}


@pytest.mark.parametrize("lead", ["", " "])
@pytest.mark.parametrize("choice", ["yes", "a.b", "x y\nz", "50% (a|b)", "a/b\\c", "é & ~#", "-1"])
def test_a_choice_may_follow_one_space(choice, lead):
    wanted = guide(choices=["yes", "a.b", "x y\nz", "50% (a|b)", "a/b\\c", "é & ~#", "-1"])
    assert allows(wanted, lead + choice)
    assert not allows(wanted, f"  {choice}")
    assert not allows(wanted, f"{choice}.")
    assert not allows(wanted, choice[:-1])


@pytest.mark.parametrize(
    ("regex", "right", "wrong"),
    [
        (".*", ["", "red", " red"], ["  red", "\tred", "re\nd"]),
        ("a|b", ["a", "b"], ["ab", ""]),
        ("a/b\\/c", ["a/b/c"], ["a\\/b"]),
        ("^a$", ["a"], ["^a$"]),
        ("a\nb", ["a\nb"], ["anb"]),
        ("(?i)yes", ["YES"], ["yess"]),
    ],
)
def test_an_expression_matches_the_whole_answer(regex, right, wrong):
    wanted = guide(regex=regex)
    assert [allows(wanted, answer) for answer in right] == [True] * len(right)
    assert [allows(wanted, answer) for answer in wrong] == [False] * len(wrong)


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ('{"Count":1,"where":["x","y"]}', True),
        (' {"Count": 1, "where": ["x", "y"]}', True),
        ('{"Count":  1,"where":[]}', False),
        ('{ "Count":1,"where":[]}', False),
        ('{"where":[],"Count":1}', False),
        ('{"Count":1}', False),
        ('{"Count":1.5,"where":[]}', False),
    ],
)
def test_json_has_the_schemas_fields_in_their_order_and_little_white_space(answer, fits):
    assert allows(guide(json_schema=COUNT), answer) is fits


def test_a_string_has_no_half_characters():
    assert not allows(guide(json_schema={"type": "string"}), r'"\ud800"')
    assert allows(guide(json_schema={"type": "string"}), '"\U0001f600"')


def test_the_first_mask_has_every_token_that_may_begin(guides, spelled):
    choices = (b"square", b"star", b"yes", b" square", b" star", b" yes")
    begin = {each for each in spelled if each and any(choice.startswith(each) for choice in choices)}
    assert {b"s", b" square", b" "} <= begin
    assert tokens_in(guides.compile(guide(choices=["square", "star", "yes"])).first_mask, spelled) == begin


def test_the_end_comes_only_where_the_form_is_complete(guides, spelled):
    compiled = guides.compile(guide(choices=["a", "ab"]))
    matcher, end = compiled.matcher.deep_copy(), 2
    ends = []
    for byte in (b"a", b"b"):
        ends.append(bool(matcher.compute_bitmask()[end // 8] >> end % 8 & 1))
        assert matcher.consume_token(spelled.index(byte))
    ends.append(bool(matcher.compute_bitmask()[end // 8] >> end % 8 & 1))
    assert ends == [False, True, True]


def test_text_that_a_tokenizer_would_change_can_be_forced(guides, spelled):
    """The reference model's tokenizer writes all letters small."""
    matcher = guides.compile(guide(json_schema=COUNT)).matcher.deep_copy()
    said = b""
    while b"C" not in said:
        (token, *_) = sorted(tokens_in(np.frombuffer(matcher.compute_bitmask(), np.int32), spelled) - {b" "})
        assert matcher.consume_token(spelled.index(token))
        said += token
    assert said.endswith(b'"C')


REFUSED = {
    "a malformed expression": (guide(regex="(a"), "regex cannot be followed: unclosed group"),
    "one that closes ours": (guide(regex="a)|(b"), "regex cannot be followed: unopened group"),
    "one that looks around": (guide(regex="(?=a)b"), "regex cannot be followed: look-around"),
    "one for white space": (guide(regex=" x"), "no answer can satisfy it"),
    "an unknown type": (guide(json_schema={"type": "strin"}), "Invalid type: strin"),
    "an unknown keyword": (guide(json_schema={"not": {}}), "Unimplemented keys"),
    "an address": (guide(json_schema={"$ref": "http://127.0.0.1:9/x"}), "not present in a registry"),
    "nothing": (guide(json_schema={"type": "object", "properties": {"a": False}, "required": ["a"]}), "Unsatisfiable"),
    "no object": (Guide("json_schema", "[1", "json_schema"), "must be a JSON object"),
}


@pytest.mark.parametrize(("wanted", "why"), REFUSED.values(), ids=REFUSED)
async def test_a_guide_that_cannot_be_followed_is_refused_each_time(wanted, why):
    checks = GuideChecks()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=why) as caught:
            await checks.require(wanted)
        assert caught.value.param == wanted.field
        assert len(caught.value.message) < 300
        assert "SPACED" not in caught.value.message


async def test_verdicts_on_guides_that_are_refused_are_bounded_too():
    checks, before = GuideChecks(kept=4), set(map(id, kept_guides()))
    for number in range(20):
        with pytest.raises(InvalidRequest):
            await checks.require(guide(regex="(" * 2 + str(number)))
    assert len([each for each in kept_guides() if id(each) not in before]) <= 4


def kept_guides() -> list[Guide]:
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, Guide)]


names = [f"a property of the schema, number {number}" for number in range(250)]
HEAVY = {
    "many properties": guide(
        json_schema={"type": "object", "properties": {name: {"type": "string"} for name in names}}
    ),
    "many texts": guide(json_schema={"enum": names}),
    "many choices": guide(choices=names),
    "lists of lists": guide(
        json_schema={"items": {"items": {"type": "array", "maxItems": 250}, "minItems": 250}, "maxItems": 250}
    ),
    "states": guide(regex="(a|b)*a(a|b){200}"),
    "all letters": guide(regex=r"(\p{L}|\p{N}){1,250}[^x]{250}"),
    "a multiple": guide(json_schema={"type": "integer", "multipleOf": 997}),
}


@pytest.mark.parametrize("wanted", HEAVY.values(), ids=HEAVY)
async def test_a_heavy_guide_takes_little_time_and_no_turn_of_the_loop(wanted):
    """CPU time: the first check takes 1 to 100 ms. The loop runs meanwhile."""
    checks, turns = GuideChecks(), 0
    begun = time.process_time()
    checking = asyncio.create_task(checks.require(wanted))
    while not checking.done():
        await asyncio.sleep(0)
        turns += 1
    await checking
    assert turns > 2
    assert time.process_time() - begun < 20  # with the turns' own


def test_what_no_token_spells_is_left_out_of_an_expression():
    few = [b"a", b"b", b"c", b" ", b""]
    guides = Guides(few, end_id=4)
    compiled = guides.compile(guide(regex=r"a\{b|[bc]"))
    assert tokens_in(compiled.first_mask, few) == {b"b", b"c", b" "}
    assert tokens_in(guides.compile(guide(choices=["a", "a<b"])).first_mask, few) == {b"a", b" "}
    with pytest.raises(InvalidRequest, match="no answer can satisfy it"):
        guides.compile(guide(regex=r"\{.*"))


def test_recent_guides_are_kept_and_others_go(spelled):
    few = Guides(spelled, 2, kept=2)
    first, second, third = (guide(regex=regex) for regex in "abc")
    kept = few.compile(first)
    few.compile(second)
    assert few.compile(first) is kept
    few.compile(third)
    assert few.known(first) is kept
    assert few.known(second) is None


def filled(compiled: Compiled, spelled: list[bytes]) -> None:
    """Let answers of as and bs come to states until the lexer has no more."""
    letters, draws = [spelled.index(b"a"), spelled.index(b"b")], np.random.default_rng(0)
    for _ in range(100):
        matcher = compiled.matcher.deep_copy()
        for letter in draws.integers(0, 2, 250).tolist():
            matcher.compute_bitmask()
            if not matcher.consume_token(letters[letter]):
                assert "too many states" in matcher.get_error()
                return
    pytest.fail("the states never end")


def test_a_guide_whose_states_are_full_is_compiled_anew(spelled):
    guides = Guides(spelled, 2)
    full = guides.compile(HEAVY["states"])
    filled(full, spelled)
    assert guides.known(HEAVY["states"]) is None
    again = guides.compile(HEAVY["states"])
    matcher = again.matcher.deep_copy()
    assert matcher.consume_token(spelled.index(b"a"))
    matcher.compute_bitmask()
    assert not matcher.is_error()
    assert guides.compile(HEAVY["states"]) is again
