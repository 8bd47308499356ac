"""Recognise the formats that are not read, so that a message can name them."""

from __future__ import annotations

import re
from typing import Literal

from service.media.formats import format_of, is_pdf

# The file's beginning behind white space, in any case -> its name. The first that matches.
BEGINNINGS = (
    (rb"<svg\b|(<\?xml|<!--|<!doctype svg).*<svg\b", "an SVG drawing"),
    (rb"<!doctype html|<html\b|<head\b|<body\b", "an HTML page"),
    (rb"<\?xml", "an XML file"),
    (rb"%!ps", "a PostScript file"),
    (rb"....ftyp(qt|mqt)", "a QuickTime video"),
    (rb"....ftyp", "an MP4 video"),
    (rb"....moov|....mdat", "a QuickTime video"),
    (rb"\x1a\x45\xdf\xa3", "a WebM or Matroska video"),
    (rb"riff....avi ", "an AVI video"),
    (rb"riff....wave", "a WAV sound"),
    (rb"iiu\0|iiro|iirs", "a camera's raw image"),
    (rb"\x00\x00\x01\x00", "an icon (ICO)"),
    (rb"\x00\x00\x02\x00", "a cursor (CUR)"),
    (rb"icns", "an icon (ICNS)"),
    (rb"\xff\x0a|....jxl \r\n\x87\n", "a JPEG XL image"),
    (rb"....jp  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"8bps", "a Photoshop document"),
    (rb"p[1-7]\s", "a Netpbm image"),
    (rb"qoif", "a QOI image"),
    (rb"dds ", "a DDS texture"),
    (rb"pk\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive"),
    (rb"data:", "a data: URL, which only JSON may hold"),
    (rb"https?://", "the address of a file, which is not fetched"),
    (rb"--[^\r\n]+\r\ncontent-disposition:", "a form without its content-type multipart/form-data"),
    (rb"[{\[]\s*[\"{\[\]}]", "JSON"),
    (rb"ivborw0kggo|/9j/|r0lgodd?|uklgr", "an image in base64: decode it first"),
)
Wanted = Literal["image", "video"]  # an image may be a document's page
NAMES = tuple((re.compile(beginning, re.DOTALL | re.IGNORECASE), name) for beginning, name in BEGINNINGS)
# `curl -d` and other text modes remove the line breaks of a file, or make two bytes of each byte over 127.
MANGLED = (
    b"\x89PNG",
    "\x89PNG".encode(),
    "\xff\xd8".encode(),
    b"\xef\xbf\xbdPNG",
    b"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd",
)
READ_BYTES = 1024
VIDEOS = {
    "an MP4 video": "send it as a video",
    "a QuickTime video": "send it as a video",
    "a WebM or Matroska video": "send it as a video",
    "an AVI video": "save it as MP4 and send it as a video",
}
PDF_ADVICE = (
    "pages of PDFs are read if the operator has run .venv/bin/pip install -c constraints.txt -e '.[pdf]' in Glimpse's "
    "folder"
)


def found_in(data: bytes, wanted: Wanted = "image") -> str:
    """Say in words what the bytes are, which are no image that is read, or no video."""
    refusal = f"not {'an image' if wanted == 'image' else 'a video'} that can be read"
    image = format_of(data)
    if image is not None:
        return f"{refusal}: it looks like an image ({image.name})"
    if data.startswith(MANGLED):
        return "an image whose bytes were changed as text on the way (curl sends files with --data-binary or -F)"
    if is_pdf(data):
        advice = f" ({PDF_ADVICE})" if wanted == "image" else ""
        return f"{refusal}: it looks like a PDF document{advice}"
    start = data[:READ_BYTES].removeprefix(b"\xef\xbb\xbf")
    start = start.lstrip() or start
    for beginning, name in NAMES:
        if beginning.match(start):
            advice = f" ({VIDEOS[name]})" if wanted == "image" and name in VIDEOS else ""
            return f"{refusal}: it looks like {name}{advice}"
    if _is_text(data[:READ_BYTES]):
        return f"{refusal}: it looks like plain text"
    return f"{refusal}: its {len(data):,} bytes are of no format that is known here"


def _is_text(start: bytes) -> bool:
    try:
        words = start.decode()
    except UnicodeDecodeError as exc:
        if len(start) < READ_BYTES or exc.start < READ_BYTES - 3:  # else a letter is cut at the end
            return False
        words = start[: exc.start].decode()
    return all(letter.isprintable() or letter.isspace() for letter in words)
