"""What an operator may say of variants, and which variant a caller gets."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.precision import PRECISIONS
from service.core.variant import MOST_WEIGHT
from service.upstreams.variants import NoVariantLeft, UnknownVariant, Variant, Variants, VariantsError, assigned

STABLE = Variant("stable", "/models/7", ("a:8001", "b:8001"), ("a:8001", "b:8001"), 95.0)
NEXT = Variant("next", "/models/8", ("v:8001",), ("unix:/run/llm",), 5.0)
BOTH = Variants({"stable": STABLE, "next": NEXT})
WEIGHTS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.floats(0.5, 100, allow_nan=False), min_size=1, max_size=4
)


def test_json_keeps_everything():
    assert Variants.from_json(BOTH.to_json()) == BOTH
    assert Variants.from_json(BOTH.drained("next").to_json()).variants["next"].is_draining
    exact = Variants({"stable": replace(STABLE, precision=PRECISIONS[0])}, "tenant")
    assert Variants.from_json(exact.to_json()) == exact


def test_json_is_written_for_people():
    """Indented, with the fields that were given, and whole weights as whole numbers."""
    one = Variant("next", "m", ("x:1",), ("x:1",), 5.0)
    assert Variants({"next": one}).to_json() == (
        b'{\n  "sticky": "session",\n  "variants": {\n    "next": {\n      "models": "m",\n      "tritons": [\n'
        b'        "x:1"\n      ],\n      "weight": 5\n    }\n  }\n}\n'
    )
    assert replace(one, weight=2.5, llm=("y:1",), precision=PRECISIONS[0], is_draining=True).told() == {
        "models": "m", "vision": ("x:1",), "llm": ("y:1",), "weight": 2.5, "precision": PRECISIONS[0], "draining": True
    }  # fmt: skip
    assert type(one.told()["weight"]) is int


def test_what_is_left_out_has_its_default():
    assert Variants.from_json(b"{}") == Variants({}, "session")
    one = Variant.parse("a", {"models": "m", "tritons": ["x:1"]})
    assert one == Variant("a", "m", ("x:1",), ("x:1",), weight=0.0, is_draining=False, precision=None)
    assert one.is_draining is False


def test_every_field_is_read():
    told = {"models": "m", "tritons": ["x:1"], "vision": ["v:1"], "llm": ["l:1"], "weight": 2.5, "draining": True,
            "precision": PRECISIONS[0]}  # fmt: skip
    assert Variant.parse("a", told) == Variant("a", "m", ("v:1",), ("l:1",), 2.5, True, PRECISIONS[0])


FIELDS = "draining, llm, models, precision, tritons, vision, weight"
ADDRESSES = "of a must be a list of gRPC addresses, HOST:PORT without http:// or unix:/PATH: "


def one(**fields: object) -> dict[str, object]:
    return {"variants": {"a": {"models": "m", "tritons": ["h:1"]} | fields}}


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ([], 'write an object with "variants" and, if you like, "sticky"'),
        ({"sticky": "image"}, 'sticky must be "session" or "tenant"'),
        ({"variants": []}, "variants must be an object: the name of each variant, and its fields"),
        (
            {"variants": {"X" * 65: {}}},
            f"{'X' * 64!r} is not a valid name of a variant: write 1 to 63 small letters, digits and . _ -, and not "
            "glimpse",
        ),
        (one(wait=1), f"the variant a must be an object with these fields only: {FIELDS}"),
        (one(models=""), "the variant a has no models: name the folder of its model repository"),
        (one(tritons=[]), "the variant a has no Tritons: set tritons, or vision and llm"),
        (one(weight=MOST_WEIGHT + 1), f"the weight of a must be a number from 0 to {MOST_WEIGHT:,}"),
        (one(draining=1), "draining of a must be true or false"),
        (one(precision="wide"), f"precision of a must be one of {', '.join(PRECISIONS)}, or left out"),
        (one(tritons=["h:0"]), f"tritons {ADDRESSES}['h:0']"),
        (one(vision=["h:65536"]), f"vision {ADDRESSES}['h:65536']"),
        (one(llm=["h" * 200]), f"llm {ADDRESSES}['{'h' * 98}"),
    ],
)
def test_the_whole_message_is_for_the_operator(told, says):
    with pytest.raises(VariantsError) as caught:
        Variants.from_json(orjson.dumps(told))
    assert str(caught.value) == says


def test_the_bounds_themselves_are_taken():
    told = one(tritons=["h:1", "h:65535", "unix:/run/llm"], weight=MOST_WEIGHT)
    read = Variants.from_json(orjson.dumps(told)).variants["a"]
    assert (read.vision, read.weight) == (("h:1", "h:65535", "unix:/run/llm"), MOST_WEIGHT)


def test_an_unknown_name_is_told_shortened_with_the_known_ones():
    for variants, known in ((BOTH, "stable, next"), (Variants(), "none")):
        with pytest.raises(UnknownVariant) as caught:
            variants.named("x" * 70)
        assert str(caught.value) == f"there is no variant {'x' * 64!r}: the variants are {known}"
        assert caught.value.name == "x" * 70


def test_a_wrong_weight_names_its_variant():
    with pytest.raises(VariantsError, match=f"^the weight of next must be a number from 0 to {MOST_WEIGHT:,}$"):
        BOTH.weighted({"next": -1})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "write an object"),
        (b'{"variant": {}}', "write an object"),
        (b'{"sticky": "image"}', "sticky must be"),
        (b'{"variants": []}', "variants must be an object"),
        (b'{"variants": {"No Name": {}}}', "is not a valid name of a variant"),
        (b'{"variants": {"glimpse": {}}}', "is not a valid name of a variant"),
        (b'{"variants": {"a": {"wait": 1}}}', "with these fields only"),
        (b'{"variants": {"a": {"models": "m", "tritons": ["h:1"], "weight": -1}}}', "weight of a must be"),
        (b'{"variants": {"a": {"models": "m", "tritons": ["h:1"], "weight": true}}}', "weight of a must be"),
        (b'{"variants": {"a": {"tritons": ["h:1"]}}}', "has no models"),
        (b'{"variants": {"a": {"models": "m"}}}', "has no Tritons"),
        (b'{"variants": {"a": {"models": "m", "vision": ["h:1"]}}}', "has no Tritons"),
        (b'{"variants": {"a": {"models": "m", "tritons": ["http://h:1"]}}}', "without http://"),
        (b'{"variants": {"a": {"models": "m", "tritons": "h:1"}}}', "must be a list"),
        (b'{"variants": {"a": {"models": "m", "tritons": ["h:1"], "draining": 1}}}', "true or false"),
    ],
)
def test_what_is_wrong_is_said(text, says):
    with pytest.raises(VariantsError, match=says):
        Variants.from_json(text)


def test_changes_leave_the_other_variants_as_they_were():
    assert BOTH.weighted({"next": 50}).variants == {"stable": STABLE, "next": Variant(**told(NEXT) | {"weight": 50})}
    assert BOTH.drained("stable").variants["next"] == NEXT
    assert BOTH.without("stable").variants == {"next": NEXT}
    assert BOTH.added(Variant("third", "m", ("x:1",), ("x:1",))).variants.keys() == {"stable", "next", "third"}
    with pytest.raises(VariantsError, match="the variants are stable, next"):
        BOTH.weighted({"nxt": 1})


def kept(*variants: tuple[str, float, bool]) -> Variants:
    """Variants by name, weight and whether they drain."""
    return Variants({name: Variant(name, "m", ("x:1",), ("x:1",), *rest) for name, *rest in variants})


@pytest.mark.parametrize(
    ("before", "weights", "draining", "shares"),
    [
        (kept(("stable", 0, False), ("next", 0, False)), {}, {"next": True}, {"stable": 1, "next": 0}),
        (kept(("stable", 0, False), ("next", 0, True)), {}, {"next": False}, {"stable": 0.5, "next": 0.5}),
        (kept(("stable", 100, True), ("next", 0, False)), {"stable": 100}, {}, {"stable": 0, "next": 1}),
        (kept(("stable", 100, False), ("next", 0, False)), {"next": 0}, {"stable": True}, {"stable": 0, "next": 1}),
        (kept(("stable", 0, False), ("next", 0, False)), {"stable": 0}, {}, {"stable": 0.5, "next": 0.5}),
        (kept(("stable", 0, True), ("next", 0, True)), {}, {"next": False}, {"stable": 0, "next": 1}),
    ],
)
def test_a_change_that_leaves_a_variant_which_gets_questions_is_made(before, weights, draining, shares):
    assert before.changed(weights, draining).shares == shares


@pytest.mark.parametrize(
    ("before", "weights", "draining", "says"),
    [
        (kept(("stable", 9, False), ("next", 1, True)), {}, {"stable": True}, "variants drain next --undo"),
        (kept(("stable", 9, False), ("next", 1, False)), {}, {"stable": True, "next": True}, "drain stable --undo"),
        (kept(("stable", 9, True)), {"stable": 5}, {}, "drain stable --undo"),
        (kept(("stable", 9, False), ("next", 0, False)), {"stable": 0}, {}, "such as stable=100$"),
        (
            kept(("stable", 9, True), ("next", 1, False)),
            {"next": 0},
            {},
            "next=100, or let .*drain stable --undo",
        ),
        (kept(("stable", 9, False), ("next", 1, False)), {"next": 0}, {"stable": True}, "next=100, or let stable"),
        (kept(("stable", 9, False), ("next", 0, True)), {"stable": 0}, {}, "such as stable=100$"),
        (kept(("stable", 9, False), ("next", 0.5, True)), {"stable": 0}, {}, "stable=100, or let next"),
        (Variants(), {}, {}, "all of them drain: let NAME get questions again"),
    ],
)
def test_a_change_after_which_nobody_gets_questions_or_has_a_weight_is_refused(before, weights, draining, says):
    with pytest.raises(NoVariantLeft, match=says):
        before.changed(weights, draining)


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (kept(("stable", 9, False)), "stable"),
        (kept(("stable", 0, False)), "stable"),
        (kept(("stable", 9, False), ("next", 1, True)), "stable"),
        (kept(("stable", 9, False), ("next", 0, False)), "stable"),
    ],
)
def test_the_only_variant_that_gets_questions_is_not_removed(before, name):
    other = next((each for each in before.variants if each != name), "NAME")
    with pytest.raises(NoVariantLeft) as caught:
        before.without(name)
    assert str(caught.value) == (
        f"only {name} gets questions: give another variant a weight before you remove it "
        f"(`glimpse variants weights {other}=100`)"
    )


@pytest.mark.parametrize(
    ("before", "left"),
    [
        (kept(("stable", 9, False), ("next", 1, False)), {"next": 1.0}),
        (kept(("stable", 9, True), ("next", 0, False)), {"next": 1.0}),
        (kept(("stable", 0, False), ("next", 0, False)), {"next": 1.0}),
        (kept(("stable", 9, True)), {}),
    ],
)
def test_a_variant_that_others_can_stand_in_for_is_removed(before, left):
    assert before.without("stable").shares == left


def test_a_replaced_variant_does_not_take_the_last_weight_away():
    before = kept(("stable", 9, False), ("next", 0, False))
    moved = Variant("stable", "other", ("y:1",), ("y:1",), 9)
    assert before.replaced(moved).variants["stable"] == moved
    says = "only stable gets questions, and it would have no weight: keep one above 0, such as `--weight 100`"
    with pytest.raises(NoVariantLeft, match=f"^{says}$"):
        before.replaced(Variant("stable", "other", ("y:1",), ("y:1",), 0))


@pytest.mark.parametrize("host", ["triton..svc", ".svc", "..", f"{'a' * 64}.svc"])
def test_a_host_that_no_resolver_takes_is_refused(host):
    """Such as triton.$NS.svc without the variable."""
    with pytest.raises(VariantsError, match="tritons of next must be a list of gRPC addresses"):
        Variant.parse("next", {"models": "m", "tritons": [f"{host}:8001"]})


@pytest.mark.parametrize("host", ["triton", "a_b.c-d.", f"{'a' * 63}.{'b' * 63}", "10.0.0.1", "[::1]"])
def test_other_hosts_are_taken(host):
    assert Variant.parse("next", {"models": "m", "tritons": [f"{host}:8001"]}).llm == (f"{host}:8001",)


def told(variant: Variant) -> dict[str, object]:
    return {name: getattr(variant, name) for name in Variant.__dataclass_fields__}


@pytest.mark.parametrize(
    "weights", [{"stable": 95.0, "next": 5.0}, {"a": 1.0, "b": 1.0}, {"a": 60.0, "b": 30.0, "c": 10.0}]
)
def test_a_thousand_keys_follow_the_weights_within_three_points(weights):
    counts = Counter(assigned(f"tenant-{number}", list(weights.items())) for number in range(1000))
    for name, weight in weights.items():
        assert counts[name] / 10 == pytest.approx(100 * weight / sum(weights.values()), abs=3)


def test_without_a_weight_all_are_equal_and_beside_one_they_get_nothing():
    counts = Counter(assigned(str(number), [("a", 0.0), ("b", 0.0)]) for number in range(1000))
    assert counts["a"] == pytest.approx(500, abs=60)
    assert {assigned(str(number), [("a", 0.0), ("b", 0.1)]) for number in range(100)} == {"b"}


@given(st.text(max_size=30), WEIGHTS)
def test_a_key_stays_with_its_variant_whatever_the_order(key, weights):
    told = list(weights.items())
    assert assigned(key, told) == assigned(key, told[::-1])


@given(st.text(max_size=30), WEIGHTS, st.floats(1.0, 10.0))
def test_more_weight_takes_keys_and_gives_none_away(key, weights, factor):
    before = assigned(key, list(weights.items()))
    name = min(weights)
    after = assigned(key, list((weights | {name: weights[name] * factor}).items()))
    assert after in (before, name)


@given(st.text(max_size=30), WEIGHTS)
def test_a_variant_that_goes_moves_only_its_own_keys(key, weights):
    before = assigned(key, list(weights.items()))
    for name in weights.keys() - {before}:
        assert assigned(key, [each for each in weights.items() if each[0] != name]) == before
