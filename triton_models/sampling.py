"""Draw the next token of many rows at once; a row's draw depends on that row alone.

The random number of a row's n-th token is a hash of its seed and n, not the state of a generator. The same seed
therefore draws the same tokens in any batch. Filters apply in the order of Hugging Face's `generate`: repetition
penalty, guide, temperature, top-k, top-p.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.core.request import Sampling
from triton_models.masks import Allowed

FloatArray = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

SHORTLISTS = (64, 1024)  # a filtered draw tries these numbers of most likely tokens before it sorts a large vocabulary

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Likeliest(NamedTuple):
    """The likeliest tokens in one place, likeliest first: ids [k] and the model's log probabilities [k]."""

    tokens: Int64Array
    log_probs: Float64Array


class Sampler:
    """Hold the sampling state of up to `max_rows` rows, compact at the front like the KV cache."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.rows = 0
        self._temperature = np.zeros(max_rows)
        self._top_k = np.zeros(max_rows, np.int64)
        self._top_p = np.ones(max_rows)
        self._seed = np.zeros(max_rows, np.uint64)
        self._drawn = np.zeros(max_rows, np.uint64)
        self._penalty = np.ones(max_rows)
        self._seen = np.zeros((max_rows, vocab_size), bool)  # valid only for rows with a penalty
        self._told = np.zeros(max_rows, bool)  # rows that ask for log probabilities
        self._likeliest = np.zeros(max_rows, np.int64)  # how many of the likeliest tokens a row asks for

    def append(self, sampling: Sampling, input_ids: npt.NDArray[np.integer]) -> None:
        """Add a last row; vocabulary ids in `input_ids` count as seen for the repetition penalty."""
        row = self.rows
        self._temperature[row] = sampling.temperature
        self._top_k[row] = sampling.top_k if 0 < sampling.top_k < self.vocab_size else self.vocab_size
        self._top_p[row] = sampling.top_p
        self._seed[row] = sampling.seed
        self._drawn[row] = 0
        self._penalty[row] = sampling.repetition_penalty
        self._told[row] = sampling.log_probs
        self._likeliest[row] = sampling.top_log_probs
        if sampling.repetition_penalty != 1:
            self._seen[row] = False
            self._seen[row, input_ids[input_ids < self.vocab_size]] = True
        self.rows += 1

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            for column in (
                *(self._temperature, self._top_k, self._top_p, self._seed, self._drawn, self._penalty, self._seen),
                *(self._told, self._likeliest),
            ):
                column[row] = column[last]
        self.rows = last

    def draw(
        self, logits: FloatArray, first: int = 0, allowed: Allowed | None = None
    ) -> tuple[Int64Array, Float64Array]:
        """Draw from logits [n, V] of rows first, first+1, ... -> token ids [n], log probabilities [n].

        The rows of `allowed` draw from its tokens only. The log probability is the model's own, before penalty, guide,
        temperature and filters. It is 0 for a row that does not ask for it, and NaN if the row's logits are not finite.
        """
        rows = slice(first, first + len(logits))
        index = np.arange(len(logits))
        tokens = logits.argmax(axis=1)
        changed, scores = self._changed(logits, first, allowed)
        if changed.size:
            tokens[changed] = scores.argmax(axis=1)
        sampled = np.flatnonzero(self._temperature[rows])
        if sampled.size:
            at = first + sampled
            drawn_from = logits[sampled]
            if changed.size:
                _, here, there = np.intersect1d(sampled, changed, assume_unique=True, return_indices=True)
                drawn_from[here] = scores[there]
            scaled = drawn_from / self._temperature[at, np.newaxis]
            tokens[sampled] = choose(scaled, self._top_k[at], self._top_p[at], uniform(self._seed[at], self._drawn[at]))
        self._drawn[rows] += np.uint64(1)
        penalised = np.flatnonzero(self._penalty[rows] != 1)
        if penalised.size:
            self._seen[first + penalised, tokens[penalised]] = True
        if (told := self._told[rows]).all():
            return tokens, log_probs(logits, tokens, index)
        found = np.where(np.isfinite(logits.max(axis=1)) & np.isfinite(logits[index, tokens]), 0.0, np.nan)
        if told.any():
            found[told] = log_probs(logits[told], tokens[told], index[: np.count_nonzero(told)])
        return tokens, found

    def likeliest(self, logits: FloatArray, first: int = 0) -> dict[int, Likeliest]:
        """Find the likeliest tokens for the rows that ask for them, by their places in logits [n, V].

        The logits are those of rows first, first+1, ...
        """
        asked = self._likeliest[first : first + len(logits)]
        return {place: likeliest(logits[place], int(asked[place])) for place in np.flatnonzero(asked).tolist()}

    def _changed(self, logits: FloatArray, first: int, allowed: Allowed | None) -> tuple[Int64Array, FloatArray]:
        """Return the rows [k] with a penalty or a guide, and their scores [k, V]. Other rows are not copied."""
        changed = self._penalty[first : first + len(logits)] != 1
        if allowed is not None:
            if not changed.any():
                return allowed.rows, np.where(allowed.tokens, logits[allowed.rows], -np.inf)
            penalised = changed.copy()
            changed[allowed.rows] = True
        else:
            penalised = changed
        rows = np.flatnonzero(changed)
        scores = logits[rows]
        if penalised.any():
            where = np.flatnonzero(penalised[rows])
            at = first + rows[where]
            scores[where] = penalise(scores[where], self._seen[at], self._penalty[at])
        if allowed is not None:
            where = np.searchsorted(rows, allowed.rows)
            scores[where] = np.where(allowed.tokens, scores[where], -np.inf)
        return rows, scores


def likeliest(logits: FloatArray, count: int) -> Likeliest:
    """Find the `count` likeliest tokens of logits [V], or all of them if there are fewer.

    Equal tokens count in the order of their ids.
    """
    first = max(logits.size - count, 0)
    least = np.partition(logits, first)[first]
    above, equal = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
    tokens = np.concatenate([above, equal[: logits.size - first - above.size]])
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
    return Likeliest(tokens, log_probs(np.broadcast_to(logits, (1, logits.size)), tokens, np.zeros_like(tokens)))


def penalise(scores: FloatArray, seen: npt.NDArray[np.bool_], penalty: Float64Array) -> FloatArray:
    """Apply the repetition penalty (CTRL) to the scores [n, V] of seen tokens.

    A positive score is divided by the row's penalty, a negative one multiplied by it.
    """
    factor = penalty[:, np.newaxis]
    return np.where(seen, np.where(scores > 0, scores / factor, scores * factor), scores)


def choose(scores: FloatArray, top_k: Int64Array, top_p: Float64Array, uniforms: Float64Array) -> Int64Array:
    """Draw one token id per row from softmax(scores [n, V]), cut to its most likely tokens.

    At most `top_k` [n] tokens stay, then the fewest of them that reach the mass `top_p` [n]. `uniforms` [n] in [0, 1)
    picks among the rest by inverting the cumulative distribution. The code path of a row depends on that row alone.
    """
    vocab_size = scores.shape[1]
    tokens = np.empty(len(scores), np.int64)
    whole = (top_k >= vocab_size) & (top_p >= 1)
    if rows := _where(whole):
        tokens[rows] = _choose_from_all(scores[rows], uniforms[rows])
    rows = _where(~whole)
    for size in SHORTLISTS:  # sorting 50,000 scores takes 18 ms a row
        if rows and vocab_size > 2 * size:
            found, settled = _choose_from_shortlist(size, scores[rows], top_k[rows], top_p[rows], uniforms[rows])
            tokens[rows] = found
            rows = [row for row, done in zip(rows, settled.tolist(), strict=True) if not done]
    if rows:
        order = np.argsort(-scores[rows], axis=1, kind="stable")
        ranked = np.take_along_axis(scores[rows], order, axis=1)
        rank = _choose_rank(_mass(ranked, ranked[:, :1]), top_k[rows], top_p[rows], uniforms[rows])
        tokens[rows] = order[np.arange(len(rows)), rank]
    return tokens


def _where(rows: npt.NDArray[np.bool_]) -> list[int]:
    found: list[int] = np.flatnonzero(rows).tolist()
    return found


def _choose_from_all(scores: FloatArray, uniforms: Float64Array) -> Int64Array:
    """Draw one token id per row [n] from all tokens; without a filter there is no need to sort."""
    reached = np.cumsum(_mass(scores, scores.max(axis=1, keepdims=True)), axis=1)
    below = np.count_nonzero(reached <= uniforms[:, np.newaxis] * reached[:, -1:], axis=1)
    return np.asarray(np.minimum(below, scores.shape[1] - 1), np.int64)


def _choose_from_shortlist(
    size: int, scores: FloatArray, top_k: Int64Array, top_p: Float64Array, uniforms: Float64Array
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """Draw from the `size` most likely tokens -> token ids [n], and whether they were enough [n]."""
    first = scores.shape[1] - size
    listed = np.argpartition(scores, first, axis=1)[:, first:]
    order = np.argsort(-np.take_along_axis(scores, listed, axis=1), axis=1, kind="stable")
    listed = np.take_along_axis(listed, order, axis=1)
    ranked = np.take_along_axis(scores, listed, axis=1)
    mass = _mass(ranked, ranked[:, :1])
    total = _mass(scores, ranked[:, :1]).sum(axis=1)
    short = top_k <= size
    settled = short | ((top_k >= scores.shape[1]) & (mass.sum(axis=1) >= top_p * total))
    share = np.where(short, top_p, top_p * total / mass.sum(axis=1))  # top_p as a share of the shortlist's mass
    rank = _choose_rank(mass, top_k, share, uniforms)
    return listed[np.arange(len(scores)), rank], settled


def _choose_rank(mass: Float64Array, top_k: Int64Array, top_p: Float64Array, uniforms: Float64Array) -> Int64Array:
    """Draw from mass [n, m], largest first -> the index [n] of the drawn token."""
    mass = np.where(np.arange(mass.shape[1]) < top_k[:, np.newaxis], mass, 0)
    reached = np.cumsum(mass, axis=1)
    kept = np.count_nonzero((reached - mass < top_p[:, np.newaxis] * reached[:, -1:]) & (mass > 0), axis=1)
    target = uniforms * reached[np.arange(len(mass)), kept - 1]
    return np.asarray(np.minimum(np.count_nonzero(reached <= target[:, np.newaxis], axis=1), kept - 1), np.int64)


def _mass(scores: FloatArray, highest: FloatArray) -> Float64Array:
    """Compute exp(scores - highest) in float64; NaN if scores are not finite."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(scores - highest, dtype=np.float64))


def uniform(seed: UInt64Array, drawn: UInt64Array) -> Float64Array:
    """Hash seeds [n] and counters [n] to numbers in [0, 1): SplitMix64's output function, seeded by itself."""
    bits = _mix(_mix(seed + _WEYL) + (drawn + np.uint64(1)) * _WEYL)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: UInt64Array) -> UInt64Array:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def log_probs(logits: FloatArray, tokens: Int64Array, rows: Int64Array) -> Float64Array:
    """Compute the log softmax of logits [n, V] at tokens [n]; NaN for a row that is not finite."""
    highest = logits.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shifted = logits - highest
    return np.asarray(shifted[rows, tokens] - np.log(np.exp(shifted).sum(axis=1)), np.float64)
