import json
from dataclasses import asdict, replace
from math import prod

import pytest

from service.core.card import ModelCard
from service.core.tensors import DTYPES
from tests.support.fakes import CARD, CLIPS, CLOSER


def test_a_card_comes_back_from_its_json_with_its_budgets_as_pairs():
    assert ModelCard.from_json(json.dumps(asdict(CLOSER))) == CLOSER


def test_a_request_without_a_budget_gets_the_cards_default_within_what_its_detail_allows():
    assert CLOSER.unasked_vision_tokens("high") == (64, 400)
    told = replace(CLOSER, default_vision_tokens=(96, 192))
    assert (told.unasked_vision_tokens("low"), told.unasked_vision_tokens("high")) == ((96, 192), (96, 400))
    assert ModelCard.from_json(told.to_json()) == told


def test_models_in_another_precision_are_other_models():
    """A card of an older build does not tell its language model, whatever the precision."""
    told = replace(CARD, language_fingerprint="l")
    computed = told.computed_in("int8")
    for name in ("fingerprint", "visual_fingerprint", "language_fingerprint"):
        assert getattr(computed, name) not in ("", getattr(told, name))
    assert CARD.computed_in("int8").language_fingerprint == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [({"name": None}, "'name'"), ({"zzz": 1}, "'zzz'"), ({"vision_tokens": 5}, "not iterable")],
)
def test_what_is_no_card_says_what_is_missing_or_unknown(change, said):
    fields = asdict(CARD) | change
    text = json.dumps({name: value for name, value in fields.items() if value is not None})
    with pytest.raises(ValueError, match=f"^not a model card: .*{said}"):
        ModelCard.from_json(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual_tokens": 32}, "clip.visual_tokens is 32, and 64 are read"),
        ({"frames": 0}, "clip.frames is 0: 1 to 32 are possible"),
        ({"frames": 33}, "clip.frames is 33: 1 to 32 are possible"),
        ({"frames": "8"}, "clip.frames is 8: 1 to 32"),
        ({"frames": 8.0}, r"clip.frames is 8\.0: 1 to 32"),
        ({"vision_tokens": [256, 64]}, r"clip.vision_tokens is \[256, 64\]"),
        ({"vision_tokens": [64]}, "not enough values"),
        ({"zzz": 1}, "'zzz'"),
    ],
)
def test_a_clip_resampler_that_cannot_be_used_is_no_card(change, said):
    fields = json.loads(CLIPS.to_json())
    assert ModelCard.from_json(json.dumps(fields)) == CLIPS
    fields["clip"] |= change
    with pytest.raises(ValueError, match=f"^not a model card: .*{said}"):
        ModelCard.from_json(json.dumps(fields))


def test_a_card_of_an_older_build_still_tells_of_its_clip_resampler():
    fields = json.loads(CLIPS.to_json())
    fields["clip"]["trained_frames"] = 8
    assert ModelCard.from_json(json.dumps(fields)) == CLIPS


@pytest.mark.parametrize("text", ["[]", "1", "null"])
def test_json_that_is_no_object_is_no_card(text):
    with pytest.raises(ValueError, match=r"^not a model card: "):
        ModelCard.from_json(text)


def test_features_have_a_row_a_patch_and_one_for_cls_in_the_first_view_only():
    assert replace(CARD, vision_width=7).feature_shapes == {
        224: {"features": (257, 7), "saliency": (256,), "entropy": (256,), "texture": (13, 16, 16)},
        448: {"features": (1024, 7)},
    }


def test_saliency_and_entropy_are_float32_whatever_the_features_are():
    half = replace(CARD, float_type="FP16")
    found = {name: half.type_of(name) for name in half.feature_shapes[224]}
    assert found == {"features": "FP16", "saliency": "FP32", "entropy": "FP32", "texture": "FP16"}
    assert CARD.type_of("features") == "FP32"


def test_the_closer_view_is_called_where_there_is_one():
    assert CARD.called == ("see", "attend", "llm")
    assert CLOSER.called == ("see", "attend", "attend_448", "llm")


@pytest.mark.parametrize(
    ("card", "detail", "vision_tokens"),
    [
        (CARD, "low", (64, 256)),
        (CARD, "high", (64, 256)),
        (CARD, "auto", (64, 256)),
        (CLOSER, "low", (64, 256)),
        (CLOSER, "high", (64, 400)),
        (CLOSER, "auto", (64, 400)),
    ],
)
def test_a_budget_can_ask_for_more_where_the_closer_view_may_be_looked_at(card, detail, vision_tokens):
    assert card.vision_tokens_for(detail) == vision_tokens


@pytest.mark.parametrize(
    ("width", "float_type", "frames"),
    [(1408, "FP32", 32), (1408, "FP16", 32), (2048, "FP32", 31), (4096, "FP32", 15), (4096, "FP16", 31)],
)
def test_a_clip_has_no_more_frames_than_one_message_holds(width, float_type, frames):
    card = replace(CLIPS, vision_width=width, float_type=float_type)
    assert card.most_frames == frames
    assert CARD.most_frames == 32
    assert replace(CLIPS, clip=replace(CLIPS.clip, frames=12)).most_frames == 12
    frame = sum(prod(shape) * DTYPES[card.type_of(name)].itemsize for name, shape in card.feature_shapes[224].items())
    assert frames * frame < 64 * 2**20 - 2000
