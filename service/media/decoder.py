"""Decode an image's bytes to pixels.

The bytes come from callers, so their size is checked before a pixel is decoded. Triton's models import this module
too, so it imports neither settings nor asyncio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL import Image as Pillow

from service.core.errors import InvalidImage, TooLarge
from service.core.viewport import Viewport
from service.core.vision import CLOSER_SIZE, CROPS, IMAGE_SIZE, UInt8Array
from service.media.colours import in_colour, in_colour_of_gif, in_colour_of_png
from service.media.exif import SIDEWAYS
from service.media.foreign import found_in
from service.media.formats import SENT
from service.media.header import page_count, require_page
from service.media.structure import Structure, structure_of

try:
    import pi_heif
except ImportError:  # the extra `heic` is not installed
    pi_heif = None

# Imported here because Pillow otherwise imports all fifty readers in the first request, which takes 30 ms.
READERS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    AvifImagePlugin.AvifImageFile,
    TiffImagePlugin.TiffImageFile,
    BmpImagePlugin.BmpImageFile,
)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as many images are decoded at once as the operator wants threads
if pi_heif is not None:
    pi_heif.options.DECODE_THREADS = 1
    pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
TURNS = {  # EXIF orientation -> the turn that brings the picture upright
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}

# Pillow's own limit warns at 89 and raises at 179 megapixels. ImageLimits is checked before it and is lower.
Pillow.MAX_IMAGE_PIXELS = None


Box = tuple[float, float, float, float]  # left, top, right, bottom
Media = Literal["image", "video"]  # the field at fault, and the word for it in messages


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest image that is decoded."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_side: int = 65_535  # JPEG's own limit. Resizing takes memory by the side: 32 bytes a pixel of it


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image in the form that the vision encoder reads."""

    views: Mapping[int, UInt8Array]  # by their size in pixels: [3, size, size] RGB
    width: int  # of the whole picture, upright
    height: int
    pages: int = 1  # of the file

    @property
    def pixels(self) -> UInt8Array:
        """[3, 224, 224] RGB: the whole picture."""
        return self.views[IMAGE_SIZE]

    @property
    def crops(self) -> UInt8Array:
        """[4, 3, 224, 224] RGB: the closer view's top left, top right, bottom left and bottom right."""
        rows = self.views[CLOSER_SIZE].reshape(3, 2, IMAGE_SIZE, 2, IMAGE_SIZE)
        return np.ascontiguousarray(rows.transpose(1, 3, 0, 2, 4)).reshape(CROPS, 3, IMAGE_SIZE, IMAGE_SIZE)


def decode(
    data: bytes,
    limits: ImageLimits,
    views: Sequence[int] = (IMAGE_SIZE,),
    viewport: Viewport | None = None,
    page: int = 1,
) -> Decoded:
    """Decode an image of one of FORMATS to uint8 [3, size, size] RGB for each view.

    The first picture of a file is decoded, or the chosen page of a TIFF.

    The whole picture is resized to a square with Pillow's bicubic filter, as BLIP-2's BlipImageProcessor does. A
    picture of that size is not changed. With a viewport, its square is resized instead, by one factor for both sides.
    Transparent pixels become white, 16-bit samples keep their upper 8 bits, CMYK is converted without a colour profile,
    EXIF orientation is applied. A view does not depend on the other views. Raises InvalidImage, TooLarge.
    """
    require_bytes(data, limits)
    require_page(data, page)
    structure = structure_of(data, page)
    if structure is None:
        raise InvalidImage(f"{found_in(data)}; {SENT}", param="image")
    if structure.format == "HEIF" and pi_heif is None:
        raise InvalidImage(f"the image is a HEIC, and this server has no decoder for it: {SENT}", param="image")
    require_size(structure.width, structure.height, limits)
    # On hostile bytes a decoder may raise anything (OSError, SyntaxError, struct.error, ValueError). All of it means
    # that these bytes are no image.
    try:
        pixels = _views(structure, views, viewport)
    except MemoryError as exc:
        raise TooLarge(
            f"decoding the {structure.format} takes too much memory: send it smaller, or save it anew "
            f"(the model sees {IMAGE_SIZE}x{IMAGE_SIZE} pixels)",
            param="image",
        ) from exc
    except Exception as exc:
        raise InvalidImage(
            f"the {structure.format} is damaged or cut short ({len(data):,} bytes arrived): send the whole file",
            param="image",
        ) from exc
    width, height = structure.width, structure.height
    size = (height, width) if structure.orientation in SIDEWAYS else (width, height)
    return Decoded(pixels, *size, page_count(data) or 1)


def require_bytes(data: bytes, limits: ImageLimits, what: Media = "image") -> None:
    """Raises InvalidImage for no bytes, TooLarge for too many."""
    if not data:
        raise InvalidImage(
            f"the {what} is empty (0 bytes): check that the file was read before it was sent", param=what
        )
    if len(data) > limits.max_bytes:
        raise TooLarge(
            f"the {what} has {len(data):,} bytes, the limit is {limits.max_bytes:,}: send a smaller one "
            f"(the model sees {IMAGE_SIZE}x{IMAGE_SIZE} pixels)",
            param=what,
        )


def require_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raises TooLarge."""
    if max(width, height) > limits.max_side:
        raise TooLarge(
            f"the image has {width}x{height} pixels, the limit of a side is {limits.max_side:,}: cut it, or send it "
            f"smaller (the model sees {IMAGE_SIZE}x{IMAGE_SIZE} pixels)",
            param="image",
        )
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"the image has {width}x{height} pixels ({width * height / 1e6:.1f} megapixels), the limit is "
            f"{limits.max_pixels / 1e6:.1f}: send it smaller (the model sees {IMAGE_SIZE}x{IMAGE_SIZE} pixels)",
            param="image",
        )


def _views(structure: Structure, views: Sequence[int], viewport: Viewport | None) -> dict[int, UInt8Array]:
    """Decode once, or once a view if the JPEG is so large that the views need different scales."""
    if structure.is_short:
        raise ValueError("bytes are missing")
    whole, colours, found = (structure.width, structure.height), None, {}
    for size in sorted(views):
        if colours is None or colours.size != whole:
            with Pillow.open(BytesIO(structure.data), formats=(structure.format,)) as picture:
                if structure.format == "HEIF" and _is_within(picture.size, whole):
                    whole = picture.size  # its decoder cuts off what is not to be shown
                if picture.size != whole:
                    raise ValueError(f"two sizes: {whole} and {picture.size}")
                # A JPEG is cheaper to decode at 1/2, 1/4 or 1/8. Below twice the needed size the result would differ.
                picture.draft(None, _needed(whole, 2 * size, viewport))
                colours = _in_colour(picture, structure)
                if structure.is_negative:
                    colours = ImageOps.invert(colours)
        if viewport is None:
            found[size] = squashed(colours, size, structure.orientation)
        else:
            found[size] = _viewed(colours, size, structure.orientation, viewport)
    return found


def _in_colour(picture: ImageFile.ImageFile, structure: Structure) -> Pillow.Image:
    match structure.format:
        case "PNG":
            return in_colour_of_png(picture, structure.data)
        case "GIF":
            return in_colour_of_gif(picture)
    return in_colour(picture)


def _is_within(size: tuple[int, int], whole: tuple[int, int]) -> bool:
    return size[0] <= whole[0] and size[1] <= whole[1]


def _needed(whole: tuple[int, int], size: int, viewport: Viewport | None) -> tuple[int, int]:
    """Return how large the whole picture must be so that the square has `size` pixels a side."""
    if viewport is None:
        return size, size
    return max(1, whole[0] * size // viewport.side), max(1, whole[1] * size // viewport.side)


def squashed(colours: Pillow.Image, size: int, orientation: int = 1) -> UInt8Array:
    """Resize to [3, size, size] RGB, upright."""
    side = (size, size)
    if colours.size != side:
        colours = colours.resize(side, Pillow.Resampling.BICUBIC)
    colours = _on_white(colours)
    if orientation in TURNS:  # a turn commutes with the resize to a square
        colours = colours.transpose(TURNS[orientation])
    return np.ascontiguousarray(np.asarray(colours).transpose(2, 0, 1))


def _viewed(colours: Pillow.Image, size: int, orientation: int, viewport: Viewport) -> UInt8Array:
    """Resize what the viewport has of the picture, on the colour of its padding: [3, size, size] RGB, upright."""
    if orientation in TURNS:
        colours = colours.transpose(TURNS[orientation])
    across, down = colours.width / viewport.width, colours.height / viewport.height  # below 1 if a draft was decoded

    def cut(box: Box, to: tuple[int, int]) -> Pillow.Image:
        left, top, right, bottom = box
        place = (left * across, top * down, right * across, bottom * down)
        return _on_white(colours.resize(to, Pillow.Resampling.BICUBIC, place))

    return viewed(viewport, size, cut)


def viewed(viewport: Viewport, size: int, cut: Callable[[Box, tuple[int, int]], Pillow.Image]) -> UInt8Array:
    """Put what the viewport has of a picture on the colour of its padding: [3, size, size] RGB.

    `cut`: a box of the upright picture -> RGB of so many pixels.
    """
    left, right, at_x, wide = _along(viewport.left, viewport.side, viewport.width, size)
    top, bottom, at_y, high = _along(viewport.top, viewport.side, viewport.height, size)
    square = Pillow.new("RGB", (size, size), viewport.colour)
    square.paste(cut((left, top, right, bottom), (wide, high)), (at_x, at_y))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _along(start: int, side: int, whole: int, size: int) -> tuple[int, int, int, int]:
    """Along one axis: from where to where the picture is seen, and where that lies in the view and how long it is."""
    first, last = max(start, 0), min(start + side, whole)
    length = max(1, round((last - first) * size / side))
    return first, last, min(round((first - start) * size / side), size - length), length


def _on_white(colours: Pillow.Image) -> Pillow.Image:
    """Put white below transparent pixels: after a resize, which weighs colours by alpha."""
    if colours.mode != "RGBA":
        return colours
    white = Pillow.new("RGBA", colours.size, (255, 255, 255, 255))
    return Pillow.alpha_composite(white, colours).convert("RGB")
