import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from service.core.errors import InvalidRequest
from service.core.prompt import Prompt
from service.core.request import Budget, Clip, Exchange, ImageId, Part, Request, Sampling, Text
from service.text.prompt import KEPT_CHARS, Detokeniser, PromptBuilder, load_tokenizer, token_bytes, visual_token_ids
from tests.support.fakes import CARD, SPELLED, TOKENIZER

PROMPTS = PromptBuilder(CARD, TOKENIZER)
IMAGE = ImageId("img_1")


def request(*parts: Part, exchanges: tuple[Exchange, ...] = (), visual: int = 32, max_tokens: int = 16) -> Request:
    """`visual` are the visual tokens of each image, at the most."""
    budget = Budget(visual_tokens=(32, visual))
    return Request("vqa_1", parts, budget, Sampling(max_tokens), timeout_s=10, exchanges=exchanges)


def one_row_each(asked: Request) -> list[tuple[np.ndarray, bytes]]:
    """Visual tokens [1, 4] of each image, filled with its number, and a key."""
    return [(np.full((1, 4), number, np.float32), b"%d" % number) for number in range(len(asked.images))]


def shown(prompt: Prompt) -> str:
    """The prompt as text, with `<s>` for BOS and the numbers of visual tokens in brackets."""
    v = CARD.vocab_size
    spelled = {CARD.bos_id: b"<s>"}
    return b"".join(b"[%d]" % (i - v) if i >= v else spelled.get(i, SPELLED[i]) for i in prompt.input_ids).decode()


def test_a_short_question_is_padded():
    question = PROMPTS.question("red")
    assert question.ids.shape == question.mask.shape == (32,)
    assert question.ids.dtype == question.mask.dtype == np.int32
    assert question.mask.sum() == 1
    assert question.ids[1:].tolist() == [0] * 31


@pytest.mark.parametrize(("chars", "kept"), [(KEPT_CHARS, 1), (KEPT_CHARS + 1, 0)])
def test_long_texts_are_not_kept(chars, kept):
    prompts, text = PromptBuilder(CARD, TOKENIZER), "a" * chars
    ids = prompts.question(text).ids.tolist()
    assert ids == prompts.question(text).ids.tolist() == TOKENIZER.encode(text, add_special_tokens=False).ids[:32]
    assert prompts._kept.cache_info().currsize == kept


def test_a_long_question_is_cut_for_the_allocator_only():
    text = "w" * 50
    assert PROMPTS.question(text).mask.sum() == 32
    assert len(PROMPTS.text_ids(text)) > 50


def unigram() -> Tokenizer:
    """As T5's: SentencePiece's control tokens are pieces of the vocabulary."""
    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzQ?A:</>"]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


FLAN_T5 = replace(CARD, bos_id=None, text_end_id=1, decoder_start_id=0, interleaved=False)


def test_a_flan_t5_reads_an_end_token_after_everything_and_no_bos():
    tokenizer = unigram()
    prompts = PromptBuilder(FLAN_T5, tokenizer)
    text = tokenizer.encode("Question: a Answer:", add_special_tokens=False).ids
    assert prompts.text_ids("a") == [*text, 1]
    asked = request(Text("a"), IMAGE, IMAGE, exchanges=(Exchange((Text("b"),), "c"),))
    v = FLAN_T5.vocab_size
    found = prompts.compose_request(asked, [(np.zeros((2, 4), np.float32), b"a"), (np.ones((1, 4), np.float32), b"b")])
    before = tokenizer.encode("Question: b Answer: c", add_special_tokens=False).ids
    assert found.input_ids.tolist() == [*before, v, v + 1, v + 2, *text, 1]
    asked = request(Text("a"), max_tokens=4)
    assert prompts.require_room(asked) == len(text) + 1 + 4


def test_a_text_with_the_name_of_a_control_token_is_read_as_letters(tmp_path):
    unigram().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert unigram().encode("a</s>b").ids.count(1) == 1  # without care it ends the prompt
    for text in ("</s>", "a</s>b", "<pad></s>", "a < b </ s>", "<<unk>"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert not {0, 1, 2}.intersection(ids), text
        assert tokenizer.decode(ids) == text
    plain = "what is it a < b?"
    assert tokenizer.encode(plain).ids == unigram().encode(plain).ids


def qformer_tokenizer() -> Tokenizer:
    """As InstructBLIP's: a word is a token, between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def test_a_qformer_with_its_own_tokenizer_reads_the_whole_prompt():
    prompts = PromptBuilder(CARD, TOKENIZER, qformer_tokenizer())
    question = prompts.question("red?")  # Question : red ? Answer :
    assert question.ids[:9].tolist() == [2, 1, 1, 4, 1, 1, 1, 3, 0]
    assert question.mask.tolist() == [1] * 8 + [0] * 24
    assert prompts.text_ids("red?") == PROMPTS.text_ids("red?")


def test_what_is_too_long_for_the_qformer_still_ends_as_it_should():
    question = PromptBuilder(CARD, TOKENIZER, qformer_tokenizer()).question("red " * 50)
    assert question.mask.all()
    assert question.ids[[0, 31]].tolist() == [2, 3]


def test_the_tokenizers_of_a_repository_are_those_that_its_card_names(tmp_path):
    load_from = {"tokenizer.json": TOKENIZER, "qformer_tokenizer.json": qformer_tokenizer()}
    for name, tokenizer in load_from.items():
        tokenizer.save(str(tmp_path / name))
    own = PromptBuilder.load(replace(CARD, question_tokenizer="qformer_tokenizer.json"), tmp_path)
    assert own.question("red").ids[3] == 4
    assert PromptBuilder.load(CARD, tmp_path).question("red").ids[0] == PROMPTS.question("red").ids[0]


def test_the_prompt_is_visual_ids_then_bos_then_the_template():
    visual = np.ones((3, 4), np.float32)
    prompt = PROMPTS.compose("what {colour}?", [(visual, b"key")])
    v = CARD.vocab_size
    assert prompt.input_ids[:4].tolist() == [v, v + 1, v + 2, CARD.bos_id]
    assert prompt.input_ids.dtype == np.int32
    text = b"".join(SPELLED[i] for i in prompt.input_ids[4:])
    assert text == b"Question: what {colour}? Answer:"
    assert prompt.visual_tokens is visual
    assert prompt.extra_ids.dtype == np.uint64
    assert (prompt.extra_ids[:3] >= 1).all()
    assert not prompt.extra_ids[3:].any()


def test_several_images_stand_in_order_each_with_ids_of_its_own():
    first, second = np.ones((2, 4), np.float32), np.zeros((3, 4), np.float32)
    prompt = PROMPTS.compose("what?", [(first, b"a"), (second, b"b")])
    v = CARD.vocab_size
    assert prompt.input_ids[:6].tolist() == [v, v + 1, v + 2, v + 3, v + 4, CARD.bos_id]
    assert prompt.visual_tokens[:, 0].tolist() == [1, 1, 0, 0, 0]
    assert prompt.extra_ids[:5].tolist() == [*visual_token_ids(b"a", 2), *visual_token_ids(b"b", 3)]


def test_earlier_turns_stand_before_the_question_in_its_own_template():
    exchanges = (Exchange((Text("what?"),), "a circle"), Exchange((Text("which colour?"),), "red"))
    asked = request(IMAGE, Text("how large?"), exchanges=exchanges)
    assert shown(PROMPTS.compose_request(asked, one_row_each(asked))) == (
        "<s>Question: what? Answer: a circle Question: which colour? Answer: red[0] Question: how large? Answer:"
    )


TWO_EARLIER = (Exchange((IMAGE, IMAGE, Text("what?")), "a circle"), Exchange((Text("which?"),), "red"))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (request(IMAGE, Text("what {colour}?")), "Question: what {colour}? Answer:"),
        (request(IMAGE, IMAGE, Text("what?")), "Question: what? Answer:"),
        (
            request(Text("how large?"), exchanges=TWO_EARLIER),
            "Question: what? Answer: a circle Question: which? Answer: red Question: how large? Answer:",
        ),
    ],
)
def test_images_at_the_front_give_the_ids_that_the_service_always_gave(asked, text):
    """Visual ids, BOS, and all text encoded at once."""
    images = [(np.full((3, 4), 0.5, np.float32), b"a"), (np.ones((2, 4), np.float32), b"b")][: len(asked.images)]
    prompt = PROMPTS.compose_request(asked, images)
    rows, v = sum(len(tokens) for tokens, _ in images), CARD.vocab_size
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert prompt.input_ids.tolist() == [*range(v, v + rows), CARD.bos_id, *ids]
    assert prompt.input_ids.dtype == np.int32
    assert np.array_equal(prompt.visual_tokens, np.concatenate([tokens for tokens, _ in images]))
    visual = np.concatenate([visual_token_ids(key, len(tokens)) for tokens, key in images])
    assert prompt.extra_ids.tolist() == [*visual, *[0] * (1 + len(ids))]
    assert prompt.extra_ids.dtype == np.uint64


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (request(Text("is"), IMAGE, Text("like this?")), "<s>Question: is[0] like this? Answer:"),
        (request(Text("what is this?"), IMAGE), "<s>Question: what is this?[0] Answer:"),
        (request(IMAGE, Text("is"), IMAGE, Text("like it?")), "[0]<s>Question: is[1] like it? Answer:"),
        (request(Text("is"), IMAGE, IMAGE, Text("red")), "<s>Question: is[0][1] red Answer:"),
        (request(IMAGE, Text("is"), Text("it red?")), "[0]<s>Question: is it red? Answer:"),
    ],
)
def test_an_image_inside_a_question_stands_at_the_end_of_the_text_before_it(asked, text):
    prompt = PROMPTS.compose_request(asked, one_row_each(asked))
    assert shown(prompt) == text
    assert prompt.visual_tokens[:, 0].tolist() == list(range(len(asked.images)))
    visual = [visual_token_ids(key, 1)[0] for _, key in one_row_each(asked)]
    assert prompt.extra_ids[prompt.input_ids >= CARD.vocab_size].tolist() == visual
    assert not prompt.extra_ids[prompt.input_ids < CARD.vocab_size].any()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (request(Text("is"), IMAGE, Text("like this?")), "[0]<s>Question: is like this? Answer:"),
        (request(IMAGE, Text("is"), IMAGE, Text("like it?")), "[0][1]<s>Question: is like it? Answer:"),
        (
            request(Text("or"), IMAGE, Text("?"), exchanges=(Exchange((Text("is"), IMAGE, Text("red?")), "yes"),)),
            "[0]<s>Question: is red? Answer: yes[1] Question: or ? Answer:",
        ),
    ],
)
def test_an_llm_that_knows_images_at_the_front_only_gets_them_there(asked, text):
    prompts = PromptBuilder(replace(CARD, interleaved=False), TOKENIZER)
    prompt = prompts.compose_request(asked, one_row_each(asked))
    assert shown(prompt) == text
    assert prompt.visual_tokens[:, 0].tolist() == list(range(len(asked.images)))
    assert prompts.require_room(asked) == len(prompt.input_ids) + 31 * len(asked.images) + 16


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (request(IMAGE, Text("red?")), "[0]<s>be brief Question: red? Answer:"),
        (request(Text("is"), IMAGE, Text("red?")), "<s>be brief Question: is[0] red? Answer:"),
        (
            request(Text("sure?"), exchanges=(Exchange((IMAGE, Text("red?")), "yes"),)),
            "[0]<s>be brief Question: red? Answer: yes Question: sure? Answer:",
        ),
    ],
)
def test_a_system_message_stands_before_the_first_question(asked, text):
    told = replace(asked, system="be brief")
    prompt = PROMPTS.compose_request(told, one_row_each(asked))
    assert shown(prompt) == text
    assert PROMPTS.require_room(told) == len(prompt.input_ids) + 31 + 16
    assert told.question == asked.question


def test_a_system_message_has_the_cards_template():
    asked = replace(request(IMAGE, Text("red?")), system="be {question} {system}")
    prompts = PromptBuilder(replace(CARD, system_template="<<{system}>>"), TOKENIZER)
    assert shown(prompts.compose_request(asked, one_row_each(asked))) == (
        "[0]<s><<be {question} {system}>>Question: red? Answer:"
    )


def test_what_stands_around_an_image_is_read_as_it_would_be_without_it():
    asked = request(Text("is"), IMAGE, Text("red?"))
    ids = PROMPTS.compose_request(asked, one_row_each(asked)).input_ids
    assert ids[ids < CARD.vocab_size].tolist() == PROMPTS.text_ids("is red?")
    assert asked.question == "is red?"


def test_images_in_earlier_turns_stand_in_their_own_question():
    exchanges = (
        Exchange((Text("what"), IMAGE, Text("is it?")), "a circle"),
        Exchange((IMAGE, Text("and this?")), "a cross"),
    )
    asked = request(IMAGE, Text("which is red?"), exchanges=exchanges)
    assert shown(PROMPTS.compose_request(asked, one_row_each(asked))) == (
        "<s>Question: what[0] is it? Answer: a circle[1] Question: and this? Answer: a cross"
        "[2] Question: which is red? Answer:"
    )
    assert asked.question == "which is red?"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_room_is_counted_the_same_wherever_the_image_stands(place):
    parts = [Text("is it"), Text("red?")]
    parts.insert(place, IMAGE)
    total = 32 + len(PROMPTS.text_ids("is it red?")) + 16
    assert PROMPTS.require_room(request(*parts)) == total
    earlier = request(Text("why?"), exchanges=(Exchange(tuple(parts), "yes"),))
    assert PROMPTS.require_room(earlier) == total + len(
        TOKENIZER.encode(" yes Question: why? Answer:", add_special_tokens=False).ids
    )


LONG = Exchange((Text("w" * 200),), "yes")


@pytest.mark.parametrize(
    ("asked", "param", "mend"),
    [
        (request(IMAGE, Text("a?"), max_tokens=200), "max_tokens", "lower max_tokens to"),
        (
            request(IMAGE, IMAGE, Text("a?"), visual=96),
            "images",
            "192 visual of 2 images .* has room for 192: ask about fewer images",
        ),
        (
            request(IMAGE, Text("a?"), visual=96, exchanges=(Exchange((IMAGE, Text("b?")), "c"),)),
            "images",
            "192 visual of 2 images .* has room for 192: ask about fewer images",
        ),
        (request(IMAGE, Text("a?"), exchanges=(LONG,)), "turns", "leave the earliest turns out"),
    ],
)
def test_what_does_not_fit_is_told_with_what_mends_it(asked, param, mend):
    with pytest.raises(InvalidRequest, match=mend) as caught:
        PROMPTS.require_room(asked)
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")


def test_equal_keys_give_equal_ids_and_others_others():
    assert np.array_equal(visual_token_ids(b"a", 32), visual_token_ids(b"a", 32))
    every = np.concatenate([visual_token_ids(key, 128) for key in (b"a", b"b", b"c")])
    assert len(set(every.tolist())) == 3 * 128


def test_room_is_counted_before_any_work():
    prompt_tokens = len(PROMPTS.text_ids("red"))
    most = CARD.max_positions - 32 - prompt_tokens
    assert PROMPTS.require_room(request(IMAGE, Text("red"), max_tokens=most)) == CARD.max_positions
    with pytest.raises(
        InvalidRequest, match=rf"32 visual \+ {prompt_tokens} prompt \+ 200 max_tokens = .* lower"
    ) as caught:
        PROMPTS.require_room(request(IMAGE, Text("red"), max_tokens=200))
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequest, match="shorten the question") as caught:
        PROMPTS.require_room(request(IMAGE, Text("w" * 200), max_tokens=1))
    assert caught.value.param == "question"


BOUND = PromptBuilder(replace(CARD, max_positions=1000, most_visual_tokens=96), TOKENIZER)


@pytest.mark.parametrize(
    ("asked", "param", "mend"),
    [
        (
            request(IMAGE, IMAGE, Text("a?"), visual=64),
            "images",
            "^128 visual tokens of 2 images, tiny has room for 96 in one request: ask about fewer images",
        ),
        (
            request(IMAGE, Text("a?"), visual=128),
            "budget.visual_tokens",
            r"^128 visual tokens, .* lower budget\.visual_tokens",
        ),
        (
            request(IMAGE, Clip(IMAGE, frames=4), Text("a?")),
            "video_frames",
            "^160 visual tokens of 1 images and 4 frames, .*: 2 frames fit, so set video_frames to 2",
        ),
    ],
)
def test_more_visual_tokens_than_the_engine_takes_are_told_with_what_mends_it(asked, param, mend):
    with pytest.raises(InvalidRequest, match=mend) as caught:
        BOUND.require_room(asked)
    assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
    assert PromptBuilder(replace(BOUND.card, most_visual_tokens=None), TOKENIZER).require_room(asked)


def test_a_clip_without_a_number_of_frames_has_as_many_as_the_engine_takes():
    asked = request(IMAGE, Clip(IMAGE), Text("a?"))
    assert BOUND.frames(asked) == 2
    assert BOUND.visual_tokens(asked) == 96
    assert BOUND.require_room(asked)


def test_special_tokens_in_a_question_are_plain_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    prompts = PromptBuilder(CARD, load_tokenizer(path))
    assert not set(prompts.text_ids("</s><pad>")[1:]) & {0, 1, 2}


def test_special_tokens_have_no_text_and_unknown_ids_none():
    assert SPELLED[:3] == [b"", b"", b""]
    assert Detokeniser(SPELLED).push([0, 2, 10**6, -1]) == ""


def test_sentencepiece_tokens_are_spelled_with_byte_fallback():
    vocabulary = {"<unk>": 0, "▁red": 1, "<0xC3>": 2, "<0xA9>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert token_bytes(tokenizer) == [b"<unk>", b" red", b"\xc3", b"\xa9"]
    assert Detokeniser(token_bytes(tokenizer)).push([1, 2, 3]) == "redé"


def test_a_tokenizer_of_another_kind_is_refused_at_start():
    tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        token_bytes(tokenizer)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def spoken(parts: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    detokeniser = Detokeniser(SPELLED, stop)
    said = [detokeniser.push_bytes(part) for part in parts]
    return "".join(said) + detokeniser.finish(), detokeniser.stopped


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 200)))
def test_any_split_of_any_text_gives_the_text(text, cuts):
    assert spoken(pieces(text.encode(), cuts)) == (text.lstrip(), False)


@settings(deadline=None)
@given(st.binary(), st.lists(st.integers(0, 200)))
def test_any_split_of_any_bytes_gives_the_same_text(data, cuts):
    assert spoken(pieces(data, cuts)) == spoken([data])


@pytest.mark.slow
@settings(deadline=None, max_examples=500)
@given(
    st.text("ab\né", max_size=30),
    st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 60)),
)
def test_any_split_stops_at_the_same_place(text, stop, cuts):
    said, stopped = spoken(pieces(text.encode(), cuts), tuple(stop))
    assert (said, stopped) == spoken([text.encode()], tuple(stop))
    assert not any(one in said for one in stop)
    assert stopped == any(one in text.lstrip() for one in stop)
    assert text.lstrip().startswith(said)


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 200)))
def test_no_replacement_character_stands_for_half_a_character(text, cuts):
    detokeniser = Detokeniser(SPELLED)
    said = "".join(detokeniser.push_bytes(part) for part in pieces(text.encode(), cuts)[:-1])
    assert text.lstrip().startswith(said)


def test_half_a_character_at_the_end_is_dropped():
    assert spoken([b" red \xc3"]) == ("red ", False)


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_certain():
    detokeniser = Detokeniser(SPELLED, ("END",))
    assert detokeniser.push_bytes(b"red E") == "red "
    assert detokeniser.push_bytes(b"N") == ""
    assert detokeniser.push_bytes(b"T") == "ENT"
    assert detokeniser.push_bytes(b"EN") == ""
    assert detokeniser.finish() == "EN"


def test_nothing_is_said_after_a_stop_string():
    detokeniser = Detokeniser(SPELLED, (".", "\n"))
    assert detokeniser.push_bytes(b" red. And more\n") == "red"
    assert detokeniser.stopped
    assert detokeniser.push_bytes(b"more") == detokeniser.finish() == ""


@settings(deadline=None)
@given(st.text(max_size=40))
def test_what_is_encoded_comes_back(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert b"".join(SPELLED[i] for i in ids) == text.encode() or any(s in text for s in ("<s>", "<pad>", "</s>"))
