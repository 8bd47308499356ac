"""Test draws: which tokens are possible, equal seeds repeat, and other rows never matter."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.core.request import Sampling
from triton_models.sampling import SHORTLISTS, Sampler, choose, likeliest, log_probs, penalise, uniform

VOCABULARY = 24
NO_IDS = np.zeros(0, np.int32)

logits_rows = hnp.arrays(np.float32, (1, VOCABULARY), elements=st.floats(-8, 8, width=32))
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, VOCABULARY + 2),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


def draw_alone(sampling: Sampling, steps: np.ndarray, prompt: np.ndarray = NO_IDS) -> list[int]:
    """Draw one token per row of `steps` [n, V]."""
    sampler = Sampler(1, steps.shape[1])
    sampler.append(sampling, prompt)
    return [int(sampler.draw(logits[np.newaxis])[0][0]) for logits in steps]


@given(logits_rows)
def test_temperature_zero_takes_the_likeliest(logits):
    assert draw_alone(Sampling(temperature=0, top_k=3, top_p=0.5, seed=9), logits) == [int(logits.argmax())]


@given(logits_rows, st.integers(1, VOCABULARY), st.integers(0, 2**64 - 1))
def test_top_k_draws_among_the_k_likeliest(logits, top_k, seed):
    (token,) = draw_alone(Sampling(temperature=1.0, top_k=top_k, seed=seed), logits)
    assert logits[0, token] >= np.sort(logits[0])[-top_k]


@given(logits_rows, st.floats(0.01, 1.0), st.integers(0, 2**64 - 1))
def test_top_p_draws_from_the_least_set_that_reaches_the_mass(logits, top_p, seed):
    (token,) = draw_alone(Sampling(temperature=1.0, top_p=top_p, seed=seed), logits)
    mass = np.exp(logits[0].astype(np.float64))
    mass /= mass.sum()
    likelier = mass[logits[0] > logits[0, token]].sum()
    assert likelier < top_p + 1e-9


def test_top_k_one_is_greedy_at_any_temperature():
    logits = np.random.default_rng(0).normal(size=(50, VOCABULARY)).astype(np.float32)
    drawn = [draw_alone(Sampling(temperature=5.0, top_k=1, seed=7), row[np.newaxis])[0] for row in logits]
    assert drawn == logits.argmax(axis=1).tolist()


def test_draws_follow_the_filtered_distribution():
    scores = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    uniforms = (np.arange(10_000) + 0.5) / 10_000
    tokens = choose(np.repeat(scores, 10_000, 0), np.full(10_000, 4), np.full(10_000, 0.9), uniforms)
    shares = np.bincount(tokens, minlength=4) / 10_000
    np.testing.assert_allclose(shares, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=2e-4)


@pytest.mark.parametrize(
    ("top_k", "top_p", "spread"),
    [(0, 0.9, 3.0), (0, 0.9, 0.1), (50, 1.0, 1.0), (50, 0.5, 1.0), (3000, 0.8, 1.0), (0, 1.0, 1.0)],
    ids=["top_p", "flat, so that top_p wants more than the shortlists", "top_k", "both", "long top_k", "no filter"],
)
def test_a_large_vocabulary_is_drawn_from_as_if_it_were_sorted(top_k, top_p, spread):
    size, draws = 4 * SHORTLISTS[-1], 400
    scores = np.random.default_rng(2).normal(scale=spread, size=(1, size))
    mass = np.exp(scores[0])
    order = np.argsort(-mass)
    kept = mass[order][: top_k or size]
    kept = kept[np.cumsum(kept) - kept < top_p * kept.sum()]
    expected = np.zeros(size)
    expected[order[: len(kept)]] = kept / kept.sum()
    uniforms = (np.arange(draws) + 0.5) / draws
    limits = np.full(draws, top_k or size), np.full(draws, top_p)
    tokens = choose(np.repeat(scores, draws, 0), *limits, uniforms)
    if top_k or top_p < 1:  # likeliest first
        reached = np.cumsum(expected[order])
        assert tokens.tolist() == order[np.searchsorted(reached, uniforms)].tolist()
    else:
        assert tokens.tolist() == np.searchsorted(np.cumsum(expected), uniforms).tolist()


@pytest.mark.slow
def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    logits = np.repeat(np.array([[2.0, 1.0, 0.0, 0.0]], np.float32), 4000, 0)

    def share_of_likeliest(temperature: float) -> float:
        tokens = draw_alone(Sampling(temperature=temperature, seed=1), logits)
        return tokens.count(0) / len(tokens)

    expected = np.exp(2) / (np.exp(2) + np.exp(1) + 2)
    assert share_of_likeliest(1.0) == pytest.approx(expected, abs=0.03)
    assert share_of_likeliest(0.2) > 0.95
    assert share_of_likeliest(50.0) == pytest.approx(0.25, abs=0.03)


def test_numbers_are_uniform_and_seeds_independent():
    seeds = np.arange(200, dtype=np.uint64)
    numbers = np.stack([uniform(seeds, np.full(200, n, np.uint64)) for n in range(200)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    np.testing.assert_allclose(np.histogram(numbers, 10, (0, 1))[0] / numbers.size, 0.1, atol=0.01)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(200)).max() < 0.35  # 200 draws: 5 sigma
    assert len(np.unique(numbers)) == numbers.size


@given(st.lists(samplings, min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.data())
def test_a_row_draws_the_same_alone_and_in_any_company(wishes, seed, data):
    generator = np.random.default_rng(seed)
    steps = generator.normal(scale=3, size=(5, len(wishes), VOCABULARY)).astype(np.float32)
    prompts = generator.integers(0, 2 * VOCABULARY, (len(wishes), 4))
    alone = [draw_alone(wish, steps[:, row], prompts[row]) for row, wish in enumerate(wishes)]
    sampler = Sampler(len(wishes), VOCABULARY)
    for wish, prompt in zip(wishes, prompts, strict=True):
        sampler.append(wish, prompt)
    rows = list(range(len(wishes)))  # rows[i] is the request in the sampler's row i
    for n, step in enumerate(steps):
        tokens, _ = sampler.draw(step[rows])
        assert tokens.tolist() == [alone[row][n] for row in rows]
        if len(rows) > 1:
            leaves = data.draw(st.integers(0, len(rows) - 1))
            sampler.drop(leaves)
            rows[leaves] = rows[-1]
            rows.pop()


def test_a_row_that_joins_late_is_drawn_without_moving_the_others():
    steps = np.random.default_rng(3).normal(size=(4, VOCABULARY)).astype(np.float32)
    first, second = Sampling(temperature=1, seed=5), Sampling(temperature=1, seed=6)
    sampler = Sampler(2, VOCABULARY)
    sampler.append(first, NO_IDS)
    drawn = [int(sampler.draw(steps[:1])[0][0])]
    sampler.append(second, NO_IDS)
    joined = sampler.draw(steps[:1], first=1)[0]
    drawn += [int(sampler.draw(np.stack([row, row]))[0][0]) for row in steps[1:]]
    assert drawn == draw_alone(first, steps)
    assert joined.tolist() == draw_alone(second, steps[:1])


def test_repetition_penalty_counts_prompt_and_answer_but_not_visual_ids():
    logits = np.array([[3.0, 2.9, 2.8, -1.0]], np.float32)
    steps = np.repeat(logits, 3, 0)
    penalised = Sampling(repetition_penalty=1.5)
    assert draw_alone(Sampling(), steps) == [0, 0, 0]
    assert draw_alone(penalised, steps) == [0, 1, 2]
    assert draw_alone(penalised, steps, np.array([0, 4, 400])) == [1, 2, 0]


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    scores = np.array([[2.0, -2.0, 2.0, -2.0]])
    seen = np.array([[True, True, False, False]])
    assert penalise(scores, seen, np.array([2.0])).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@given(logits_rows, st.integers(0, VOCABULARY - 1))
def test_log_probabilities_are_the_models_own(logits, token):
    expected = logits[0, token] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    found = log_probs(logits, np.array([token]), np.arange(1))
    assert found[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("asked", [False, True])
def test_logits_that_are_not_finite_show_in_the_log_probability(broken, asked):
    logits = np.zeros((2, VOCABULARY), np.float32)
    logits[1, 3] = broken
    sampler = Sampler(2, VOCABULARY)
    for seed in range(2):
        sampler.append(Sampling(temperature=1.0, seed=seed, log_probs=asked, top_log_probs=2 * asked), NO_IDS)
    _, found = sampler.draw(logits)
    assert np.isfinite(found).tolist() == [True, False]
    assert sampler.likeliest(logits).keys() == (set(range(2)) if asked else set())


def test_only_rows_that_ask_get_log_probabilities_and_the_likeliest_tokens():
    logits = np.random.default_rng(3).normal(size=(4, VOCABULARY)).astype(np.float32)
    sampler = Sampler(4, VOCABULARY)
    for wishes in ({}, {"log_probs": True}, {"log_probs": True, "top_log_probs": 3}, {}):
        sampler.append(Sampling(**wishes), NO_IDS)
    tokens, found = sampler.draw(logits)
    own = log_probs(logits, tokens, np.arange(4))
    assert found.tolist() == [0, own[1], own[2], 0]
    assert sampler.likeliest(logits).keys() == {2}
    sampler.drop(0)
    assert sampler.likeliest(logits[2:], first=2).keys() == {0}


@given(logits_rows, st.integers(1, VOCABULARY + 2))
def test_the_likeliest_tokens_are_the_first_of_all_by_the_models_own_probability(logits, count):
    found = likeliest(logits[0], count)
    order = np.argsort(-logits[0], kind="stable")[:count]
    assert found.tokens.tolist() == order.tolist()
    own = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert found.log_probs == pytest.approx(own[order], abs=1e-5)


WEYL, WORD = 0x9E3779B97F4A7C15, 2**64


def splitmix64(state: int) -> int:
    """The output after `state`, in Python's own integers. Source: Vigna's splitmix64.c."""
    z = (state + WEYL) % WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return z ^ z >> 31


def test_the_reference_draws_the_published_numbers():
    states = [(1234567 + n * WEYL) % WORD for n in range(3)]
    assert [splitmix64(state) for state in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**63, 2**64 - 1])
def test_a_seeds_numbers_are_those_of_splitmix64_started_at_the_seeds_own_output(seed):
    """Pinned, as answers are repeated by seed: another generator would change every sampled answer."""
    start = splitmix64(seed)
    expected = [(splitmix64((start + n * WEYL) % WORD) >> 11) * 2.0**-53 for n in range(5)]
    assert uniform(np.full(5, seed, np.uint64), np.arange(5, dtype=np.uint64)).tolist() == expected


@pytest.mark.parametrize(
    "sampling",
    [Sampling(repetition_penalty=1.7), Sampling(temperature=0.3, seed=4), Sampling(temperature=1, top_k=2, top_p=0.5)],
    ids=["penalty", "temperature", "filters"],
)
def test_the_log_probability_told_is_the_models_own_before_penalty_temperature_and_filters(sampling):
    steps = np.random.default_rng(5).normal(scale=2, size=(6, 1, VOCABULARY)).astype(np.float32)
    own = steps - np.log(np.exp(steps.astype(np.float64)).sum(axis=2, keepdims=True))
    sampler = Sampler(1, VOCABULARY)
    sampler.append(replace(sampling, log_probs=True), np.arange(VOCABULARY))
    for step, expected in zip(steps, own, strict=True):
        before = step.copy()
        (token,), (found,) = sampler.draw(step)
        assert found == pytest.approx(expected[0, token], abs=1e-5)
        assert np.array_equal(step, before)  # the decoder's logits stay as they are


def test_log_probabilities_hold_for_scores_of_any_height():
    logits = np.array([[1000.0, 999.0, -1000.0], [-2000.0, -2001.0, -4000.0]], np.float32)
    found = log_probs(logits, np.array([1, 0]), np.arange(2))
    assert found.dtype == np.float64
    assert found == pytest.approx([-1 - np.log1p(np.exp(-1)), -np.log1p(np.exp(-1))], abs=1e-5)


def test_top_k_of_zero_or_the_whole_vocabulary_is_no_filter():
    """Both take the way that sorts nothing, so they draw the same tokens."""
    logits = np.random.default_rng(6).normal(size=(40, VOCABULARY)).astype(np.float32)
    free = draw_alone(Sampling(temperature=1, seed=3), logits)
    for top_k in (VOCABULARY, VOCABULARY + 1, -1):
        assert draw_alone(Sampling(temperature=1, seed=3, top_k=top_k), logits) == free
    assert len(set(free)) > 5


@pytest.mark.parametrize(("uniforms", "token"), [(0.0, 0), (0.4999, 0), (0.5, 1), (0.7499, 1), (0.75, 2), (0.9999, 2)])
@pytest.mark.parametrize("top_k", [3, 4], ids=["sorted", "in the vocabulary's order"])
def test_a_number_falls_to_the_token_whose_share_holds_it(uniforms, token, top_k):
    """Shares of a half and two quarters; a number on an edge belongs to the next one."""
    scores = np.log(np.array([[0.5, 0.25, 0.25, 1e-300]]))
    drawn = choose(scores, np.array([top_k]), np.array([1.0]), np.array([uniforms]))
    assert drawn.tolist() == [token]


def test_tokens_without_mass_are_never_drawn():
    scores = np.array([[-np.inf, 0.0, -np.inf, 0.0]])
    for top_k in (3, 4):
        drawn = {
            int(choose(scores, np.array([top_k]), np.array([1.0]), np.array([u]))[0]) for u in (0, 0.3, 0.6, 0.999)
        }
        assert drawn == {1, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    scores = np.log(np.array([[0.1, 0.5, 0.1, 0.3]]))
    drawn = {int(choose(scores, np.array([4]), np.array([top_p]), np.array([n / 100]))[0]) for n in range(100)}
    assert drawn == set([1, 3, 0, 2][:kept])


def test_top_p_is_a_share_of_what_top_k_leaves():
    """After top-k of 2, the shares are 5/8 and 3/8: 0.6 of that is reached by the first alone."""
    scores = np.log(np.array([[0.1, 0.5, 0.1, 0.3]]))
    for top_p, kept in ((0.6, {1}), (0.7, {1, 3})):
        drawn = {int(choose(scores, np.array([2]), np.array([top_p]), np.array([n / 50]))[0]) for n in range(50)}
        assert drawn == kept


@pytest.mark.parametrize("size", SHORTLISTS)
def test_a_shortlist_is_enough_up_to_its_own_length(size):
    """top_k of its length, and the next one that must look further, both reach their last token."""
    vocabulary = 4 * SHORTLISTS[-1]
    scores = np.linspace(0, -1e-3, vocabulary)[np.newaxis]
    for top_k in (size - 1, size, size + 1):
        last = choose(scores, np.array([top_k]), np.array([1.0]), np.array([1 - 1e-9]))
        assert last.tolist() == [top_k - 1]


def test_a_row_that_leaves_takes_what_it_saw_with_it():
    """A new row in its place has seen its own prompt only, and draws from its own start."""
    logits = np.array([[3.0, 2.9, 2.8, -1.0]], np.float32)
    sampler = Sampler(1, 4)
    sampler.append(Sampling(repetition_penalty=1.5), np.array([0, 1]))
    assert sampler.draw(logits)[0].tolist() == [2]
    sampler.drop(0)
    assert sampler.rows == 0
    sampler.append(Sampling(repetition_penalty=1.5), np.array([0]))
    assert sampler.draw(logits)[0].tolist() == [1]


def test_only_the_rows_drawn_are_counted_on():
    steps = np.random.default_rng(8).normal(size=(3, VOCABULARY)).astype(np.float32)
    sampler = Sampler(2, VOCABULARY)
    for seed in (5, 6):
        sampler.append(Sampling(temperature=1, seed=seed, repetition_penalty=1.2), NO_IDS)
    drawn = [int(sampler.draw(step[np.newaxis], first=1)[0][0]) for step in steps]
    assert drawn == draw_alone(Sampling(temperature=1, seed=6, repetition_penalty=1.2), steps)
    assert (
        int(sampler.draw(np.repeat(steps[:1], 2, 0))[0][0])
        == draw_alone(Sampling(temperature=1, seed=5, repetition_penalty=1.2), steps[:1])[0]
    )


def test_a_large_vocabulary_is_drawn_from_by_each_row_alone():
    """Rows of other scores, filters and numbers, some settled by a shortlist and some by a whole sort."""
    size, rows = 2 * SHORTLISTS[-1] + 7, 24
    generator = np.random.default_rng(11)
    scores = generator.normal(size=(rows, size)) * np.linspace(0.05, 6, rows)[:, np.newaxis]
    top_k = generator.choice([1, 5, SHORTLISTS[0], SHORTLISTS[0] + 1, size - 1, size], rows)
    top_p = generator.choice([0.2, 0.9, 0.999, 1.0], rows)
    uniforms = generator.random(rows)
    together = choose(scores, top_k, top_p, uniforms)
    alone = [choose(scores[n : n + 1], top_k[n : n + 1], top_p[n : n + 1], uniforms[n : n + 1])[0] for n in range(rows)]
    assert together.tolist() == alone
    for n in range(rows):
        order = np.argsort(-scores[n])[: top_k[n]]
        if top_k[n] == size and top_p[n] == 1:
            order = np.arange(size)
        mass = np.exp(scores[n][order] - scores[n].max())
        if top_p[n] < 1:
            mass = mass[np.cumsum(mass) - mass < top_p[n] * mass.sum()]
        assert together[n] == order[np.searchsorted(np.cumsum(mass), uniforms[n] * mass.sum(), side="right")]


def test_the_mass_that_a_shortlist_must_reach_is_its_own_rows():
    """Two peaked rows: the mass of both together would keep a token too many of each."""
    size = 4 * SHORTLISTS[-1]
    scores = np.full((2, size), -50.0)
    scores[:, :3] = np.log([0.35, 0.33, 0.32])
    tokens = choose(scores, np.full(2, size), np.full(2, 0.34), np.array([0.99, 0.5]))
    assert tokens.tolist() == [0, 0]


def test_a_rows_nth_token_takes_its_seeds_nth_number_also_where_another_row_was_before():
    flat = np.zeros((1, VOCABULARY), np.float32)
    sampler = Sampler(1, VOCABULARY)
    for seed in (5, 2**63 + 11):
        sampler.append(Sampling(temperature=1.0, seed=seed), NO_IDS)
        numbers = uniform(np.full(20, seed, np.uint64), np.arange(20, dtype=np.uint64))
        assert [int(sampler.draw(flat)[0][0]) for _ in numbers] == (numbers * VOCABULARY).astype(int).tolist()
        sampler.drop(0)


@pytest.mark.parametrize(("top_k", "top_p"), [(VOCABULARY, 1.0), (5, 1.0), (VOCABULARY, 0.7)])
@pytest.mark.parametrize("height", [-900.0, 900.0])
def test_draws_hold_for_scores_of_any_height(top_k, top_p, height):
    """exp(900) is more than float64 holds."""
    scores = np.random.default_rng(3).normal(size=(40, VOCABULARY))
    wish = np.full(40, top_k), np.full(40, top_p), np.linspace(0, 0.999, 40)
    assert choose(scores + height, *wish).tolist() == choose(scores, *wish).tolist()


@pytest.mark.parametrize("penalty", [2.0, 0.5, 1.001])
@pytest.mark.parametrize("height", [0.1, 0.5, 1.0, 4.0])
def test_a_penalty_moves_a_seen_token_behind_its_equal_whatever_both_are(penalty, height):
    """Both of a pair of equal scores: the seen one falls with a penalty above 1, and rises with one below."""
    for sign in (1, -1):
        logits = np.array([[sign * height, sign * height, -9.0]], np.float32)
        for seen in (0, 1):
            chosen = 1 - seen if penalty > 1 else seen
            assert draw_alone(Sampling(repetition_penalty=penalty), logits, np.array([seen])) == [chosen]


@pytest.mark.parametrize(("top_k", "top_p"), [(VOCABULARY, 1.0), (5, 1.0), (VOCABULARY, 0.7)])
def test_a_row_far_below_another_is_drawn_as_if_alone(top_k, top_p):
    low = np.random.default_rng(4).normal(size=(1, VOCABULARY))
    for number in (0.1, 0.5, 0.9):
        wish = np.array([top_k]), np.array([top_p]), np.array([number])
        both = choose(np.concatenate([low, low + 5000]), *(np.repeat(each, 2) for each in wish))
        assert both.tolist() == [int(choose(low, *wish)[0])] * 2
