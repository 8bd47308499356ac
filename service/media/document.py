"""Decode an image or one page of a document: the decoder's images, TIFFs of several pages, and PDFs."""

from __future__ import annotations

from collections.abc import Sequence

from service.core.viewport import Viewport
from service.core.vision import IMAGE_SIZE
from service.media.decoder import Decoded, ImageLimits, decode, require_bytes
from service.media.formats import reads_as_pdf


def decode_page(
    data: bytes,
    limits: ImageLimits,
    views: Sequence[int] = (IMAGE_SIZE,),
    viewport: Viewport | None = None,
    page: int = 1,
) -> Decoded:
    """Decode the page, counted from 1, to the views. Raises InvalidImage, TooLarge."""
    if reads_as_pdf(data):
        from service.media.pdf import decode_pdf  # noqa: PLC0415  (loads PDFium, which the gateway's own process never needs)

        require_bytes(data, limits)
        return decode_pdf(data, limits, views, viewport, page)
    return decode(data, limits, views, viewport, page)
