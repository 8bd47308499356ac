"""Bring short answers into the form in which the field's benchmarks compare them.

`vqa` follows the description of VQAv2's evaluation (visualqa.org/evaluation): lower case, no full stops but decimal
points, number words as digits, no articles, apostrophes in contractions, other punctuation as spaces. Where it leaves
room, it does what the evaluation's script does: a mark beside a space goes without a trace, and so does every mark of a
text with a comma in a number. `textvqa` does the same after TextVQA's own first step, which drops commas and question
marks and parts `'s` from its word.
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
# What stands before n't, 'd, 'll, 're, 've and 's. A word that English has too, such as well or shed, stays as it is.
NOT = "ai are ca could did do does had has have is might must need ought sha should was were wo would"
ENDINGS = {
    "d": "he how it someone something there they where who you",
    "ll": "how it somebody someone something they what who why you",
    "re": "there they what why you",
    "ve": "could might must not should they we what where who would you",
    "s": "he how somebody someone that there what when where who why",
}
APOSTROPHES = (
    {f"{word}nt": f"{word}n't" for word in NOT.split()}
    | {f"{word}{end}": f"{word}'{end}" for end, words in ENDINGS.items() for word in words.split()}
    | {"maam": "ma'am", "oclock": "o'clock", "yall": "y'all", "twas": "'twas"}
)


def exact(text: str) -> str:
    """Case, outer space and a full stop at the end do not count."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def vqa(text: str) -> str:
    """The form in which VQAv2 compares."""
    return _words(unpunctuated(" ".join(text.lower().split())))


def textvqa(text: str) -> str:
    """The form in which TextVQA compares."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(unpunctuated(" ".join(plain.split())))


def unpunctuated(text: str) -> str:
    """Marks between two words become spaces, others nothing."""
    in_number = COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        beside_space = f" {mark}" in text or f"{mark} " in text
        plain = plain.replace(mark, "" if beside_space or in_number else " ")
    return FULL_STOP.sub("", plain)


def _words(text: str) -> str:
    words = (DIGITS.get(word, word) for word in text.split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)
