"""Bring short answers into the form in which the field's benchmarks compare them.

`vqa` follows the description of VQAv2's evaluation (visualqa.org/evaluation): lower case, no full stops but decimal points,
number words as digits, no articles, apostrophes in contractions, other punctuation as spaces. `textvqa` does the same
after TextVQA's own first step, which drops commas and question marks and parts `'s` from its word.
"""

from __future__ import annotations

import re

ARTICLES = frozenset({"a", "an", "the"})
DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # neither apostrophe nor colon: girl's, 2:50
FULL_STOP = re.compile(r"\.(?!\d)")  # a decimal point has a digit behind it
COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
# What stands before n't, 'd, 'll, 're, 've and 's. Without its apostrophe a word that English has too stays as it is:
# cant and wont are mended, well and were are not.
NOT = "ai are ca could did do does had has have is might must need sha should was were wo would"
CONTRACTIONS = {
    "d": "he how i it she that there they we what when where who why you everyone everybody someone somebody something",
    "ll": "everyone everybody how it somebody someone something that there they what where who why you",
    "re": "how there they what where who why you",
    "ve": "could he how i might must not she should there they we what where who would you",
    "s": "everyone everybody he here how let she somebody someone something that there what when where who why",
}
ALSO = {"im": "i'm", "maam": "ma'am", "oclock": "o'clock", "yall": "y'all", "twas": "'twas"}
WORDS_THEMSELVES = frozenset({"id", "hed", "shed", "wed", "itd", "whys", "hows"})


def _contractions() -> dict[str, str]:
    """{contraction without its apostrophe: with it}."""
    found = {f"{word}nt": f"{word}n't" for word in NOT.split()}
    for end, words in CONTRACTIONS.items():
        found |= {f"{word}{end}": f"{word}'{end}" for word in words.split()}
    return {bare: whole for bare, whole in (found | ALSO).items() if bare not in WORDS_THEMSELVES}


APOSTROPHES = _contractions()


def exact(text: str) -> str:
    """Case, outer space and a full stop at the end do not count."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def vqa(text: str) -> str:
    """The form in which VQAv2 compares."""
    return _words(_unpunctuated(" ".join(text.lower().split())))


def textvqa(text: str) -> str:
    """The form in which TextVQA compares."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_unpunctuated(" ".join(plain.split())))


def _unpunctuated(text: str) -> str:
    """A mark between two words becomes a space, a mark beside a space or a comma within a number nothing."""
    text = COMMA_IN_NUMBER.sub("", text)
    for mark in PUNCTUATION:
        beside_space = f" {mark}" in text or f"{mark} " in text
        text = text.replace(mark, "" if beside_space else " ")
    return FULL_STOP.sub("", text)


def _words(text: str) -> str:
    words = (DIGITS.get(word, word) for word in text.split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)
