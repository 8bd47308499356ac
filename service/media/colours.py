"""Convert what Pillow opened to RGB, or to RGBA if something is transparent, where Pillow alone would be wrong."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageFile

from service.core.vision import UInt8Array

PNG_DEPTH_AT = 24  # bits of a sample, in IHDR, which is the first chunk


def in_colour(picture: Pillow.Image) -> Pillow.Image:
    """Convert to RGB, or to RGBA if something is transparent."""
    if picture.mode.startswith("I"):  # 16-bit grey: I;16, I;16B, or I with 16-bit values
        grey = np.asarray(picture).clip(0, 65535) >> 8
        return Pillow.fromarray(grey.astype(np.uint8)).convert("RGB")
    picture.load()  # only now is a late tRNS chunk of a PNG read
    if picture.mode == "La":  # grey that is multiplied by its alpha; Pillow converts it to LA only
        picture = picture.convert("LA")
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)  # a conversion to its own mode copies


def in_colour_of_png(picture: ImageFile.ImageFile, data: bytes) -> Pillow.Image:
    """The same for a PNG with these bytes, whose tRNS chunk may name one colour as transparent.

    Pillow compares that colour, which has the file's depth, with samples of 8 bits. So samples of another depth are
    compared here.
    """
    picture.load()
    colour, depth = picture.info.get("transparency"), data[PNG_DEPTH_AT]
    if picture.mode == "L" and isinstance(colour, int) and depth < 8:
        most = (1 << depth) - 1
        picture.info["transparency"] = (colour & most) * 255 // most
    elif picture.mode == "I;16" and colour is not None:
        grey = np.asarray(picture)
        upper = Pillow.fromarray((grey >> 8).astype(np.uint8))
        return Pillow.merge("RGBA", (upper, upper, upper, _clear_where(grey == colour)))
    elif picture.mode == "RGB" and colour is not None and depth == 16:
        upper_key, lower_key = np.divmod(np.array(colour), 256)
        is_clear = (np.asarray(picture) == upper_key).all(axis=2) & (_lower_bytes(data) == lower_key).all(axis=2)
        return Pillow.merge("RGBA", (*picture.split(), _clear_where(is_clear)))
    return in_colour(picture)


def in_colour_of_gif(picture: ImageFile.ImageFile) -> Pillow.Image:
    """The same for a GIF's first frame. What it does not cover is transparent, as in browsers.

    Pillow gives that part the frame's transparent colour. If it has none, the first of its colours.
    """
    place, whole = picture.tile[0].extents, (0, 0, *picture.size)
    colours = in_colour(picture)
    if place == whole or place is None or colours.mode == "RGBA":
        return colours
    canvas = Pillow.new("RGBA", colours.size)
    canvas.paste(colours.crop(place), place)
    return canvas


def _clear_where(is_clear: npt.NDArray[np.bool_]) -> Pillow.Image:
    return Pillow.fromarray(np.where(is_clear, np.uint8(0), np.uint8(255)))


def _lower_bytes(data: bytes) -> UInt8Array:
    """Decode a PNG of 16-bit colours to the lower bytes of its samples: [height, width, 3]. Pillow gives the upper."""
    with Pillow.open(BytesIO(data), formats=("PNG",)) as picture:
        picture.tile = [tile._replace(args="RGB;16L") for tile in picture.tile]
        return np.asarray(picture)
