"""Provide the load's images and questions: any number of different JPEG files per committed scene."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Self

from PIL import Image

from build_engines.evaluation.accuracy import NOT_IN_TOTAL, SCENES, Row, rows

JPEG_QUALITY = 90
START = b"\xff\xd8"  # every JPEG begins with it
COMMENT = b"\xff\xfe"


@dataclass(frozen=True, slots=True)
class Scenes:
    """Image n shows scene n modulo their number."""

    files: list[bytes]
    rows: list[list[Row]]  # by scene: its questions with short answers

    @classmethod
    def load(cls, count: int = 64) -> Self:
        """Load the first `count` committed scenes."""
        asked: dict[str, list[Row]] = {}
        for row in rows(SCENES):
            if row.type != NOT_IN_TOTAL:
                asked.setdefault(row.image, []).append(row)
        names = sorted(asked)[:count]
        return cls([_jpeg(name) for name in names], [asked[name] for name in names])

    def jpeg(self, number: int) -> bytes:
        """Return the bytes of image `number`.

        Different numbers have different bytes: the number is in a JPEG comment, which decoders skip.
        """
        file = self.files[number % len(self.files)]
        comment = str(number).encode()
        return START + COMMENT + (len(comment) + 2).to_bytes(2) + comment + file[len(START) :]

    def question(self, image: int, number: int) -> str:
        """Return a question that fits the image.

        Different numbers give different questions, so no answer can come from an exact repeat.
        """
        return f"{self.row(image, number).question} ({number})"

    def row(self, image: int, number: int) -> Row:
        """Return a question that fits the image, and its answer. Equal numbers give equal questions."""
        fitting = self.rows[image % len(self.rows)]
        return fitting[number % len(fitting)]


def _jpeg(name: str) -> bytes:
    encoded = io.BytesIO()
    with Image.open(SCENES / name) as image:
        image.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()
