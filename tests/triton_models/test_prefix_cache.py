"""Test the prefix cache: lookup by ids and extra ids, a bound in bytes, LRU eviction."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.prompt import Prompt
from service.text.prompt import visual_token_ids
from triton_models.prefix_cache import LEAST_TOKENS, TOKEN_BYTES, PrefixCache, naming_rows

V = 100  # the vocabulary
COLUMN_BYTES = 2 * 3 * 4 * 4  # two parts, three heads, four float32 numbers per head


def prompt(*text: int, key: bytes | None = b"image", visual: int = 32) -> Prompt:
    """Make a prompt of visual tokens, with extra ids unless `key` is None, and text."""
    extra = np.zeros(visual, np.uint64) if key is None else visual_token_ids(key, visual)
    ids = np.concatenate([np.arange(V, V + visual), np.array(text, np.int64)]).astype(np.int32)
    return Prompt(ids, np.zeros((visual, 8), np.float32), np.concatenate([extra, np.zeros(len(text), np.uint64)]))


def kv(of: Prompt) -> np.ndarray:
    """Make keys and values [2, 3, T, 4] whose columns encode the tokens before them."""
    history = [
        hash((of.input_ids[:n].tobytes(), of.extra_ids[:n].tobytes())) % 2**20 for n in range(1, len(of.input_ids) + 1)
    ]
    return np.broadcast_to(np.array(history, np.float32)[:, np.newaxis], (2, 3, len(history), 4))


def cache_of(*prompts: Prompt, max_bytes: int = 1 << 20) -> PrefixCache:
    cache = PrefixCache(max_bytes, V)
    for each in prompts:
        cache.keep(each, kv(each))
    return cache


def known(cache: PrefixCache, asked: Prompt) -> int:
    """Return the number of recalled tokens, after checking that they are the prompt's own."""
    found = cache.recall(asked)
    if found is None:
        return 0
    tokens = found.shape[2]
    assert np.array_equal(found, kv(asked)[:, :, :tokens])
    return tokens


def test_a_repeat_is_known_but_for_its_last_token():
    first = prompt(1, 2, 3)
    assert known(cache_of(first), first) == 34


def test_prompts_of_other_weights_share_nothing():
    own = prompt(1, 2, 3)
    other = replace(own, clip_weights=True)
    cache = cache_of(own)
    assert known(cache, other) == 0
    cache.keep(other, kv(other))
    assert (known(cache, own), known(cache, other), len(cache)) == (34, 34, 2)


def test_what_two_prompts_have_in_common_is_known():
    cache = cache_of(prompt(1, 2, 3, 4))
    assert known(cache, prompt(1, 2, 9, 4, 5)) == 34
    assert known(cache, prompt(1, 2, 3, 4, 5, 6)) == 36
    assert known(cache, prompt(9)) == 32
    assert known(cache, prompt(1, 2)) == 33


def test_the_same_ids_of_another_image_are_not_known():
    """Visual ids are equal for every image; only extra ids tell images apart."""
    cache = cache_of(prompt(1, 2, 3))
    assert known(cache, prompt(1, 2, 3, key=b"another")) == 0
    assert known(cache, prompt(1, 2, 3, key=b"image")) == 34


def test_one_other_extra_id_ends_what_is_known():
    first = prompt(1, 2, 3)
    extra = first.extra_ids.copy()
    extra[20] += np.uint64(1)
    assert known(cache_of(first), Prompt(first.input_ids, first.visual_tokens, extra)) == 20


def test_visual_tokens_without_extra_ids_are_never_shared():
    nameless = prompt(1, 2, 3, key=None)
    cache = cache_of(nameless)
    assert len(cache) == 0
    assert known(cache, nameless) == 0
    named = prompt(1, 2, 3)
    extra = named.extra_ids.copy()
    extra[5] = 0
    assert known(cache_of(named), Prompt(named.input_ids, named.visual_tokens, extra)) == 0


def rows_named(asked: Prompt, table: np.ndarray) -> Prompt:
    extra_ids = naming_rows(asked.input_ids, table, asked.extra_ids, V)
    return replace(asked, visual_tokens=table, extra_ids=extra_ids)


def test_ids_that_name_rows_differ_if_a_row_or_an_extra_id_does():
    table = np.random.default_rng(0).normal(size=(70, 8)).astype(np.float32)
    asked, other = prompt(1, 2, 3, visual=70), prompt(1, 2, 3, visual=70, key=b"another")
    cache = cache_of(rows_named(asked, table))
    assert known(cache, rows_named(asked, table.copy())) == 72
    assert known(cache, rows_named(other, table)) == 0
    for row, same in ((0, 0), (31, 0), (32, 32), (69, 64)):  # 32 rows have one hash
        changed = table.copy()
        changed[row, 5] = np.nextafter(changed[row, 5], np.float32(9))
        assert known(cache, rows_named(asked, changed)) == same
    nameless = prompt(1, 2, 3, visual=70, key=None)
    assert not rows_named(nameless, table).extra_ids.any()


def test_rows_are_named_in_their_own_places_of_the_table():
    """Two images with a text between them, whose rows stand in the other order."""
    table = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    extra = np.r_[visual_token_ids(b"1", 32), [0, 0], visual_token_ids(b"2", 32)].astype(np.uint64)
    first, second = np.arange(V, V + 32), np.arange(V + 32, V + 64)
    one = naming_rows(np.r_[first, [1, 2], second].astype(np.int32), table, extra, V)
    two = naming_rows(np.r_[second, [1, 2], first].astype(np.int32), np.roll(table, 32, axis=0), extra, V)
    assert np.array_equal(one, two)
    swapped = naming_rows(np.r_[second, [1, 2], first].astype(np.int32), table, extra, V)
    assert not np.equal(swapped, one)[extra > 0].any()


def test_text_alone_is_shared_by_its_ids():
    system = range(20)
    cache = cache_of(prompt(*system, 30, 31, visual=0))
    assert known(cache, prompt(*system, 40, 41, 42, visual=0)) == 20
    assert known(cache, prompt(7, *system, visual=0)) == 0


def test_a_few_tokens_in_common_are_not_worth_a_copy():
    few = LEAST_TOKENS - 1
    assert known(cache_of(prompt(*range(few), 30, 31, visual=0)), prompt(*range(few), 40, 41, visual=0)) == 0
    assert len(cache_of(prompt(*range(LEAST_TOKENS), visual=0))) == 0


def test_a_prompt_that_continues_another_takes_its_place():
    cache = cache_of(prompt(1, 2), prompt(1, 2, 3, 4))
    assert len(cache) == 1
    cache.keep(prompt(1), kv(prompt(1)))
    assert len(cache) == 1
    assert known(cache, prompt(1, 2, 3, 4, 5)) == 36
    assert cache.nbytes == 36 * (COLUMN_BYTES + TOKEN_BYTES)


def test_the_least_recently_used_goes_first():
    first, second, third = (prompt(1, 2, key=name) for name in (b"1", b"2", b"3"))
    cache = cache_of(first, second, max_bytes=2 * 34 * (COLUMN_BYTES + TOKEN_BYTES))
    assert known(cache, first) == 33
    cache.keep(third, kv(third))
    assert (known(cache, first), known(cache, second), known(cache, third)) == (33, 0, 33)


def test_what_was_recalled_outlives_its_place():
    first = prompt(1, 2, key=b"1")
    cache = cache_of(first, max_bytes=34 * (COLUMN_BYTES + TOKEN_BYTES))
    found = cache.recall(first)
    cache.keep(prompt(1, 2, key=b"2"), kv(prompt(1, 2, key=b"2")))
    assert cache.recall(first) is None
    assert np.array_equal(found, kv(first)[:, :, :33])


@pytest.mark.parametrize("max_bytes", [0, 34 * (COLUMN_BYTES + TOKEN_BYTES) - 1])
def test_what_does_not_fit_is_not_kept(max_bytes):
    cache = cache_of(prompt(1, 2), max_bytes=max_bytes)
    assert (len(cache), cache.nbytes, known(cache, prompt(1, 2))) == (0, 0, 0)


texts = st.lists(st.integers(0, 2), min_size=1, max_size=6)
asked = st.builds(
    lambda text, key, visual: prompt(*text, key=key, visual=visual),
    texts,
    st.sampled_from([b"1", b"2"]),
    st.sampled_from([0, 18, 32]),
)


@settings(deadline=None)
@given(st.lists(asked, max_size=30), st.integers(0, 150 * (COLUMN_BYTES + TOKEN_BYTES)))
def test_nothing_wrong_is_ever_recalled_and_the_bytes_are_those_it_holds(prompts, max_bytes):
    cache = PrefixCache(max_bytes, V)
    for each in prompts:
        assert known(cache, each) < each.input_ids.size
        cache.keep(each, kv(each))
        assert cache.nbytes <= max_bytes
    held = sum(len(key) + array.nbytes for key, array in cache._kept.items())
    assert cache.nbytes == held
    assert sorted(key for akin in cache._by_start.values() for key in akin) == sorted(cache._kept)
    assert all(cache._by_start.values())


def test_nothing_stays_of_prompts_that_are_gone():
    """A start whose prompts all left would be a leak: every new image brings one."""
    cache = PrefixCache(34 * (COLUMN_BYTES + TOKEN_BYTES), V)
    for number in range(50):
        cache.keep(prompt(1, 2, key=b"%d" % number), kv(prompt(1, 2)))
    assert len(cache) == len(cache._by_start) == 1


def test_a_start_stays_known_while_one_of_its_prompts_does():
    first, second, other = prompt(1, 2), prompt(3, 4), prompt(1, 2, key=b"other")
    cache = cache_of(first, second, max_bytes=2 * 34 * (COLUMN_BYTES + TOKEN_BYTES))
    cache.keep(other, kv(other))
    assert (known(cache, first), known(cache, second)) == (32, 33)


@pytest.mark.parametrize("tokens", [LEAST_TOKENS, LEAST_TOKENS + 1])
def test_the_fewest_tokens_that_are_worth_a_copy(tokens):
    """A prompt of LEAST_TOKENS is not kept, as its last token must be read again; of one token more it is."""
    text = prompt(*range(tokens), visual=0)
    cache = cache_of(text)
    assert len(cache) == tokens - LEAST_TOKENS
    assert known(cache, text) == (LEAST_TOKENS if tokens > LEAST_TOKENS else 0)


def test_the_longest_of_several_beginnings_is_recalled_and_counts_as_used():
    short, long, other = prompt(1, 9, 9, 9), prompt(1, 2, 3, 9), prompt(7, 7, 7, 7, key=b"other")
    cache = cache_of(long, short, max_bytes=2 * 36 * (COLUMN_BYTES + TOKEN_BYTES))
    assert known(cache, prompt(1, 2, 3, 4)) == 35
    cache.keep(other, kv(other))
    assert (known(cache, long), known(cache, short), known(cache, other)) == (35, 33, 35)


def test_a_prompt_that_is_kept_again_counts_as_used():
    first, second, third = (prompt(1, 2, key=name) for name in (b"1", b"2", b"3"))
    cache = cache_of(first, second, first, max_bytes=2 * 34 * (COLUMN_BYTES + TOKEN_BYTES))
    assert len(cache) == 2
    cache.keep(third, kv(third))
    assert (known(cache, first), known(cache, second), known(cache, third)) == (33, 0, 33)


def test_every_shorter_prompt_that_one_continues_makes_room_for_it():
    cache = cache_of(prompt(1, 5), prompt(1, 2), prompt(1, 2, 3))
    assert len(cache) == 2
    cache.keep(prompt(1, 2, 3, 4), kv(prompt(1, 2, 3, 4)))
    assert len(cache) == 2
    assert cache.nbytes == (34 + 36) * (COLUMN_BYTES + TOKEN_BYTES)


def test_the_last_id_of_the_vocabulary_is_text_and_the_next_a_visual_token():
    text = prompt(*[V - 1] * 20, visual=0)
    assert known(cache_of(text), text) == 19
    nameless = prompt(*[V] * 20, visual=0)
    assert len(cache_of(nameless)) == 0


def test_what_is_kept_is_a_copy():
    first = prompt(1, 2)
    given = kv(first).copy()
    cache = PrefixCache(1 << 20, V)
    cache.keep(first, given)
    given[:] = 0
    assert known(cache, first) == 33
