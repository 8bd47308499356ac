"""Render one page of a PDF with PDFium.

Only a page's own content is drawn. Scripts, form fields, annotations, links and attachments are left alone: PDFium
reads them in calls that are not made here, and this build of it has no JavaScript engine. Only `document` imports this
module, in the processes that decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ctypes import c_uint
from itertools import islice
from math import isfinite
from threading import Lock
from typing import Any

import numpy as np
import pypdfium2.raw as pdfium
from PIL import Image as Pillow

from service.core.errors import GlimpseError, InvalidImage, TooLarge
from service.core.viewport import MOST_TILES, Viewport
from service.core.vision import CLOSER_SIZE, UInt8Array
from service.media.decoder import Box, Decoded, ImageLimits, squashed, viewed
from service.media.pages import MAX_PAGES, page_not_found

# A page's size in pixels: of its longer side, at which the smallest tile has the closer view's pixels.
PAGE_SIDE = CLOSER_SIZE * (MOST_TILES + 1) // 2
MAX_POINTS = 1_000_000  # of a side, 350 m; the standard's own limit is 14,400
MOST_OBJECTS = 20_000  # of a page that are looked through for images; text takes one a word
OVERSAMPLING = 2  # a view is drawn twice as large and then resized, as a JPEG's draft is
# PDFium is used by one thread at a time. A worker has no other; those of ImageReader wait here.
LOCK = Lock()


def decode_pdf(
    data: bytes, limits: ImageLimits, views: Sequence[int], viewport: Viewport | None = None, page: int = 1
) -> Decoded:
    """Render a page as each view needs it. Without views, only its size and the number of pages are read.

    Raises InvalidImage, TooLarge.
    """
    try:
        with LOCK, ExitStack() as opened:
            document, pages = _document(data, opened)
            if page > pages:
                raise page_not_found(page, pages)
            loaded = _closed_by(opened, pdfium.FPDF_LoadPage(document, page - 1), pdfium.FPDF_ClosePage)
            if not loaded:
                raise InvalidImage(f"page {page:,} of the PDF is damaged: save it anew", param="image")
            whole = _size(loaded, page)
            if views:
                _require_small_images(loaded, limits, page)
            return Decoded({size: _view(loaded, whole, size, viewport) for size in views}, *whole, pages)
    except GlimpseError:
        raise
    except MemoryError as exc:
        raise TooLarge("rendering the PDF takes too much memory: send the page as an image", param="image") from exc


def _document(data: bytes, opened: ExitStack) -> tuple[Any, int]:
    """Open a document -> it and its number of pages. Raises InvalidImage, TooLarge."""
    document = _closed_by(opened, pdfium.FPDF_LoadMemDocument64(data, len(data), None), pdfium.FPDF_CloseDocument)
    if not document:
        if pdfium.FPDF_GetLastError() in (pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY):
            raise InvalidImage("the PDF is encrypted: send one without a password", param="image")
        raise InvalidImage(
            f"the PDF is damaged or cut short ({len(data):,} bytes arrived): send the whole file", param="image"
        )
    pages = pdfium.FPDF_GetPageCount(document)
    if pages < 1:
        raise InvalidImage("the PDF has no pages that can be read: save it anew", param="image")
    if pages > MAX_PAGES:
        raise TooLarge(f"the PDF has {pages:,} pages, the limit is {MAX_PAGES:,}: send it in parts", param="image")
    return document, pages


def _closed_by(opened: ExitStack, handle: Any, close: Any) -> Any:
    if handle:
        opened.callback(close, handle)
    return handle


def _size(page: Any, number: int) -> tuple[int, int]:
    """Return the page's size in pixels, as it is turned to be read. Raises InvalidImage, TooLarge."""
    width, height = pdfium.FPDF_GetPageWidthF(page), pdfium.FPDF_GetPageHeightF(page)
    if not (isfinite(width) and isfinite(height) and min(width, height) > 0):
        raise InvalidImage(f"page {number:,} of the PDF has no size: save it anew", param="image")
    if max(width, height) > MAX_POINTS:
        raise TooLarge(
            f"page {number:,} of the PDF has a side of {max(width, height):,.0f} points, the limit is "
            f"{MAX_POINTS:,}: save it with smaller pages",
            param="image",
        )
    scale = PAGE_SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _require_small_images(page: Any, limits: ImageLimits, number: int) -> None:
    """Raises TooLarge. What is not looked through here has the limits of CPU time and memory only."""
    width, height = c_uint(), c_uint()
    for each in islice(_objects(page), MOST_OBJECTS):
        is_image = pdfium.FPDFPageObj_GetType(each) == pdfium.FPDF_PAGEOBJ_IMAGE
        if is_image and pdfium.FPDFImageObj_GetImagePixelSize(each, width, height):
            pixels = width.value * height.value
            if pixels > limits.max_pixels or max(width.value, height.value) > limits.max_side:
                raise TooLarge(
                    f"page {number:,} of the PDF has an image of {width.value}x{height.value} pixels "
                    f"({pixels / 1e6:.1f} megapixels), the limit is {limits.max_pixels / 1e6:.1f}: save it with "
                    "smaller images",
                    param="image",
                )


def _objects(page: Any) -> Iterator[Any]:
    """Yield what is drawn on a page, also inside the forms on it, which PDFium has read to a bounded depth."""
    forms: list[Any] = []
    for index in range(pdfium.FPDFPage_CountObjects(page)):
        forms.append(pdfium.FPDFPage_GetObject(page, index))
        while forms:
            each = forms.pop()
            yield each
            if pdfium.FPDFPageObj_GetType(each) == pdfium.FPDF_PAGEOBJ_FORM:
                count = pdfium.FPDFFormObj_CountObjects(each)
                forms += [pdfium.FPDFFormObj_GetObject(each, place) for place in range(min(count, MOST_OBJECTS))]


def _view(page: Any, whole: tuple[int, int], size: int, viewport: Viewport | None) -> UInt8Array:
    if viewport is None:
        return squashed(_rendered(page, whole, (0, 0, *whole), (size, size)), size)
    return viewed(viewport, size, lambda box, to: _rendered(page, whole, box, to))


def _rendered(page: Any, whole: tuple[int, int], box: Box, to: tuple[int, int]) -> Pillow.Image:
    """Draw what a box of the page shows, on white, with so many pixels."""
    left, top, right, bottom = box
    across, down = OVERSAMPLING * to[0] / (right - left), OVERSAMPLING * to[1] / (bottom - top)
    pixels = np.full((OVERSAMPLING * to[1], OVERSAMPLING * to[0], 4), 255, np.uint8)
    height, width, _ = pixels.shape
    bitmap = pdfium.FPDFBitmap_CreateEx(width, height, pdfium.FPDFBitmap_BGRx, pixels.ctypes.data, 4 * width)
    try:
        pdfium.FPDF_RenderPageBitmap(
            bitmap,
            page,
            -round(left * across),
            -round(top * down),
            round(whole[0] * across),
            round(whole[1] * down),
            0,  # turned as the page itself says
            pdfium.FPDF_REVERSE_BYTE_ORDER | pdfium.FPDF_RENDER_LIMITEDIMAGECACHE,
        )
    finally:
        pdfium.FPDFBitmap_Destroy(bitmap)
    drawn = Pillow.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    return drawn.resize(to, Pillow.Resampling.BICUBIC)
