"""Small PDFs, written by hand, and TIFFs of several pages."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image as Pillow

Colour = tuple[int, int, int]
RED, GREEN, BLUE = (220, 30, 40), (20, 160, 60), (30, 60, 200)
NO_XREF = 0


@dataclass(frozen=True, slots=True)
class Page:
    """A page and what is drawn on it."""

    content: bytes  # operators
    box: tuple[float, float, float, float] = (0, 0, 300, 200)  # the MediaBox
    extra: bytes = b""  # more entries of the page
    objects: dict[bytes, bytes] = field(default_factory=dict)  # XObjects by name: a stream's dictionary and bytes


def filled(colour: Colour, box: tuple[float, float, float, float] = (0, 0, 300, 200), extra: bytes = b"") -> Page:
    """A page of one colour, whose left upper quarter is black."""
    red, green, blue = (each / 255 for each in colour)
    left, bottom, right, top = box
    quarter = f"0 g {left} {(bottom + top) / 2} {(right - left) / 2} {(top - bottom) / 2} re f"
    whole = f"{red} {green} {blue} rg {left} {bottom} {right - left} {top - bottom} re f"
    return Page(f"{whole} {quarter}".encode(), box, extra)


def showing(jpeg: bytes, side: int = 224, box: tuple[float, float, float, float] = (0, 0, 224, 224)) -> Page:
    """A page that is covered by a square JPEG."""
    image = (
        f"<</Type/XObject/Subtype/Image/Width {side}/Height {side}/ColorSpace/DeviceRGB/BitsPerComponent 8"
        f"/Filter/DCTDecode/Length {len(jpeg)}>>"
    )
    left, bottom, right, top = box
    place = f"q {right - left} 0 0 {top - bottom} {left} {bottom} cm /I Do Q".encode()
    return Page(place, box, objects={b"I": stream(image.encode(), jpeg)})


def bomb(width: int = 30_000, height: int = 30_000) -> Page:
    """A page whose image inflates to 3 bytes a pixel from next to nothing."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(3 * width)) for _ in range(height)) + packer.flush()
    image = (
        f"<</Type/XObject/Subtype/Image/Width {width}/Height {height}/ColorSpace/DeviceRGB/BitsPerComponent 8"
        f"/Filter/FlateDecode/Length {len(packed)}>>"
    )
    return Page(b"q 300 0 0 200 0 0 cm /I Do Q", objects={b"I": stream(image.encode(), packed)})


def stream(dictionary: bytes, data: bytes) -> bytes:
    return dictionary + b"\nstream\n" + data + b"\nendstream"


def pdf(pages: Sequence[Page], trailer: bytes = b"", count: int | None = None) -> bytes:
    """A PDF of these pages. `trailer`: more entries of the trailer; `count`: how many pages it says it has."""
    objects: list[bytes] = [b"<</Type/Catalog/Pages 2 0 R>>", b""]
    kids = []
    for page in pages:
        names = []
        for name, body in page.objects.items():
            objects.append(body)
            names.append(b"/%s %d 0 R" % (name, len(objects)))
        objects.append(stream(b"<</Length %d>>" % len(page.content), page.content))
        box = " ".join(f"{each:f}" for each in page.box).encode()
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[%s]/Contents %d 0 R/Resources<</XObject<<%s>>>>%s>>"
            % (box, len(objects), b"".join(names), page.extra)
        )
        kids.append(b"%d 0 R" % len(objects))
    said = len(pages) if count is None else count
    objects[1] = b"<</Type/Pages/Count %d/Kids[%s]>>" % (said, b" ".join(kids))
    return written(objects, trailer)


def written(objects: Sequence[bytes], trailer: bytes = b"") -> bytes:
    """A file of these objects, numbered from 1; the first one is the catalogue."""
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start)
    return bytes(out)


def deep(levels: int) -> bytes:
    """A PDF whose one page lies below so many nodes."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>"]
    for level in range(levels):
        parent = b"" if level == 0 else b"/Parent %d 0 R" % (level + 1)
        objects.append(b"<</Type/Pages%s/Count 1/Kids[%d 0 R]>>" % (parent, level + 3))
    objects.append(b"<</Type/Page/Parent %d 0 R/MediaBox[0 0 300 200]>>" % (levels + 1))
    return written(objects)


def encrypted() -> bytes:
    """A PDF that needs a password: its keys fit none."""
    key = b"<</Filter/Standard/V 1/R 2/Length 40/P -4/O(%s)/U(%s)>>" % (b"o" * 32, b"u" * 32)
    return pdf([filled(RED)], b"/Encrypt %s/ID[(%s)(%s)]" % (key, b"i" * 16, b"i" * 16))


def tiff(pages: Sequence[Pillow.Image], **saved: object) -> bytes:
    out = BytesIO()
    first, *others = pages
    first.save(out, "TIFF", save_all=True, append_images=others, **saved)
    return out.getvalue()
