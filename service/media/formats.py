"""The formats that are decoded, in one place: their names, and how a file of each begins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

PillowFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP"]


@dataclass(frozen=True, slots=True)
class Format:
    """A format of image files."""

    name: str  # as texts write it
    pillow: PillowFormat  # as Pillow names it
    start: re.Pattern[bytes]
    is_extra: bool = False  # decoded only if a plugin is installed, so texts do not tell callers to send it

    def begins(self, data: bytes) -> bool:
        """Whether the file begins like one of this format."""
        return self.start.match(data) is not None


def _format(name: str, pillow: PillowFormat, start: bytes, *, is_extra: bool = False) -> Format:
    return Format(name, pillow, re.compile(start, re.DOTALL), is_extra)


FORMATS = (
    _format("PNG", "PNG", rb"\x89PNG\r\n\x1a\n"),
    _format("JPEG", "JPEG", rb"\xff\xd8"),
    _format("WebP", "WEBP", rb"RIFF....WEBP"),
    _format("GIF", "GIF", rb"GIF8[79]a"),
    _format("AVIF", "AVIF", rb"....ftyp(avif|avis)"),
    _format("HEIC", "HEIF", rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", is_extra=True),  # mif1 may be AVIF too
    _format("TIFF", "TIFF", rb"II[*+]\0|MM\0[*+]"),
    _format("BMP", "BMP", rb"BM....\0\0\0\0"),
)

HAS_PDFIUM = find_spec("pypdfium2") is not None  # the extra `pdf` is installed
PDF_MARK = b"%PDF-"
PDF_MARK_WITHIN_BYTES = 1024  # as readers of PDFs search for it


def format_of(data: bytes) -> Format | None:
    """Return the format that the file begins like, or None."""
    return next((each for each in FORMATS if each.begins(data)), None)


def is_pdf(data: bytes) -> bool:
    """Whether the file is a PDF, whose first line may stand behind other bytes."""
    return data.find(PDF_MARK, 0, PDF_MARK_WITHIN_BYTES) >= 0 and format_of(data) is None


def reads_as_pdf(data: bytes) -> bool:
    """Whether the file is a PDF, and PDFs are read here."""
    return HAS_PDFIUM and is_pdf(data)


_SENT = [each.name for each in FORMATS if not each.is_extra]
NAMES = " or ".join((", ".join(_SENT[:-1]), _SENT[-1]))
SENT = f"send {NAMES}"
