"""Read the one EXIF tag that matters: how the picture is turned."""

from __future__ import annotations

from service.media.fields import unpack

MAX_EXIF_TAGS = 512  # of the first directory; cameras write about 20
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # orientations whose width is the file's height


def exif_orientation(exif: bytes | memoryview) -> int:
    """EXIF's 1 to 8; 1 if there is none or it cannot be read, as in browsers. Reads the first directory only."""
    tiff = exif[6:] if exif[:6] == b"Exif\0\0" else exif
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return 1
    (directory,) = unpack(f"{order}I", tiff, 4)
    (tags,) = unpack(f"{order}H", tiff, directory)
    for entry in range(directory + 2, directory + 2 + 12 * min(tags, MAX_EXIF_TAGS), 12):
        tag, kind = unpack(f"{order}HH", tiff, entry)
        if tag == ORIENTATION:
            layout = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
            (value,) = unpack(order + layout, tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1
