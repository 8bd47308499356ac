"""Compile guides, the constraints on answers, into matchers that say which tokens may come next.

The engine is llguidance. A matcher's mask has one bit a token; the end token is allowed only where the constraint is
satisfied. An answer may begin with one space, as text after a prompt does, and with no other white space: it is not
part of the answer. JSON has no white space but one space after a comma or a colon.

The copies of a matcher share its lexer, and with it the lexer's states. When those are full, no copy works any more, of
whatever answer: the guide must be compiled anew.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from service.core.errors import InvalidRequest
from service.core.guide import Guide
from service.text.spelling import Spelling

KEPT_GUIDES = 16  # each with the lexer's states that its answers came to: up to 20 MB
MAX_REASON_CHARS = 200
WORD_BITS = 32  # of a mask
LIMITS = llguidance.LLParserLimits(
    max_grammar_size=20_000,
    initial_lexer_fuel=1_000_000,
    max_lexer_states=10_000,  # each takes 1 to 2 kB
    verbose_errors=False,
)
_ASCII = {"\n", *map(chr, range(32, 127))}
_SLASHES = re.compile(r"\\.|[/\n\r]", re.DOTALL)
_WITHOUT = {"/": r"\x2F", r"\/": r"\x2F", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}
_WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A guide's matcher before the first token, for copies, and the mask of the first token: uint32 [words].

    `anew` compiles the guide again, with a lexer of its own. Any thread may call it.
    """

    matcher: Any
    first_mask: npt.NDArray[np.int32]
    anew: Callable[[], Compiled]

    def works(self) -> bool:
        """Return whether copies can still take tokens, in microseconds."""
        copy = self.matcher.deep_copy()
        copy.compute_bitmask()  # only this looks at the lexer's error
        return not copy.is_error()


Encode = Callable[[str], list[int]]


class _Vocabulary:
    """What llguidance asks of a tokenizer: where a constraint forces text, it allows that text's own tokens only."""

    bos_token_id = None

    def __init__(self, spelled: Sequence[bytes], end_id: int, encode: Encode | None) -> None:
        self._spelled = spelled
        self._encode = encode
        self._ids = {each: token for token, each in enumerate(spelled) if each and token != end_id}
        self._longest = max(map(len, self._ids))
        self.eos_token_id = end_id
        self.tokens = [each or f"<|{token}|>".encode() for token, each in enumerate(spelled)]
        self.tokens[end_id] = b"<|end|>"
        self.special_token_ids = [token for token, each in enumerate(spelled) if not each or token == end_id]

    def __call__(self, text: bytes) -> list[int]:
        """Tokenise as the model's tokenizer does; a tokenizer that changes the text, such as its case, is not used."""
        if self._encode is not None:
            ids = self._encode(text.decode(errors="replace"))
            if b"".join(self._spelled[token] for token in ids) == text:
                return ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """Take the longest token each time. A vocabulary that does not spell every byte ends the text there."""
        ids: list[int] = []
        place = 0
        while place < len(text):
            lengths = range(min(self._longest, len(text) - place), 0, -1)
            found = next((length for length in lengths if text[place : place + length] in self._ids), 0)
            if not found:
                break
            ids.append(self._ids[text[place : place + found]])
            place += found
        return ids


class Guides:
    """Compile guides for one vocabulary. The most recent ones are kept. Any thread may call it."""

    def __init__(
        self, spelled: Sequence[bytes], end_id: int, encode: Encode | None = None, kept: int = KEPT_GUIDES
    ) -> None:
        """`spelled` are the tokens' bytes [V]; a token without bytes never comes in a guided answer. `encode` is the
        model's tokenizer, without special tokens."""
        self.vocab_size = len(spelled)
        self._unspelled = Spelling.of(spelled).lacks(_ASCII)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(spelled, end_id, encode)), n_vocab=len(spelled)
        )
        self._kept: OrderedDict[Guide, Compiled] = OrderedDict()
        self._most = kept
        self._lock = threading.Lock()

    @classmethod
    def of_bytes(cls) -> Guides:
        """Compile for a vocabulary of the 256 bytes: enough to check a guide."""
        return cls([*(bytes([byte]) for byte in range(256)), b""], end_id=256, kept=0)

    def known(self, guide: Guide) -> Compiled | None:
        """Return a guide that was compiled lately and still works."""
        with self._lock:
            compiled = self._kept.pop(guide, None)
            if compiled is None or not compiled.works():
                return None
            self._kept[guide] = compiled
            return compiled

    def compile(self, guide: Guide) -> Compiled:
        """Compile a guide, in milliseconds. Raises InvalidRequest for one that no answer can follow."""
        if (known := self.known(guide)) is not None:
            return known
        compiled = self._compiled(guide)
        with self._lock:
            self._kept[guide] = compiled
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return compiled

    def _compiled(self, guide: Guide) -> Compiled:
        matcher = llguidance.LLMatcher(self._tokenizer, _grammar(guide, self._unspelled), log_level=0, limits=LIMITS)
        if not (error := matcher.get_error()):
            mask = np.frombuffer(matcher.compute_bitmask(), np.int32)
            error = matcher.get_error() and "no answer can satisfy it"
        if error:
            raise InvalidRequest(f"{guide.field or guide.kind} cannot be followed: {_reason(error)}", param=guide.field)
        return Compiled(matcher, mask, partial(self._compiled, guide))


def _grammar(guide: Guide, unspelled: Sequence[str]) -> str:
    """Write a guide in llguidance's own dialect of Lark.

    Matches of a regular expression with a character that no token has are left out: an answer that began one could not
    go on.
    """
    if guide.kind == "json_schema":
        schema = _schema(guide) | {"x-guidance": _WHITESPACE}
        return f'start: answer | " " answer\nanswer: %json {json.dumps(schema)}\n'
    regex = _SLASHES.sub(lambda found: _WITHOUT.get(found[0], found[0]), guide.text)
    form = f"FORM: /{regex}/\nSPACED: /(?s:\\s.*)/\n"
    if not unspelled:
        return f"start: ANSWER\nANSWER: / ?/ (FORM & ~SPACED)\n{form}"
    left_out = "".join(f"\\x{ord(each):02X}" for each in unspelled)
    return f"start: ANSWER\nANSWER: / ?/ (FORM & ~SPACED & ~LACKING)\n{form}LACKING: /(?s:.*[{left_out}].*)/\n"


def _schema(guide: Guide) -> dict[str, Any]:
    try:
        schema = json.loads(guide.text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{guide.field or guide.kind} must be a JSON object", param=guide.field)
    return schema


def _reason(error: str) -> str:
    """Take the fault out of llguidance's text, which also quotes the grammar."""
    if found := re.search(r"^error: (.*)$", error, re.MULTILINE):  # of a regular expression
        reason = found[1]
    else:
        reason = re.sub(r"^at \d+\(\d+\): ", "", error.partition("\n")[0])
        reason = reason.removeprefix("failed to compile JSON schema: ")
    return reason if len(reason) <= MAX_REASON_CHARS else f"{reason[: MAX_REASON_CHARS - 3]}..."
